"""A tiny model and tiny data: the demo from end to end in a second or two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

# Words by domain and label; each row of a label repeats some of them, so that a tiny model can tell labels apart.
WORDS = {
    "north": {"snow": "white cold flake", "wolf": "grey howl pack"},
    "south": {"sand": "dry hot dune", "palm": "tall green nut"},
    "west": {"wave": "salt foam surf", "gull": "wing cry beak"},
}


HEADER = ("text", "label", "domain")


def write_tsv(path: Path, rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")


def rows_of(count: int) -> list[tuple[str, str, str]]:
    """``count`` rows per label, all different."""
    return [
        (" ".join([*words.split(), *words.split()[: number % 3], "the"][number % 2 :]) + " a" * number, label, domain)
        for domain, labels in WORDS.items()
        for label, words in labels.items()
        for number in range(count)
    ]


def _write_data(folder: Path) -> Path:
    """Write three domains of two labels, with 6 training and 3 test rows per label."""
    write_tsv(folder / "train.tsv", rows_of(6))
    write_tsv(folder / "test.tsv", rows_of(3))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of data that a test may change."""
    folder = tmp_path / "data"
    folder.mkdir()
    return _write_data(folder)


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data, not to be changed."""
    return _write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of one layer and a WordPiece vocabulary of the words above."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("model")
    words = sorted({word for labels in WORDS.values() for text in labels.values() for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast.from_pretrained(str(folder)).save_pretrained(str(folder))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For fixtures of a whole module, which are made before the one of the suite limits the threads of a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""gradguide capture: the file equals that of the library's own functions; bad input is one line, and writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from gradguide import StructuredSource
from gradguide.cli.main import main
from gradguide.integrations.sampling import own_text, sampled_loss
from tests.sources.structured.problems import VOCABULARY, llama

WORDS = ["<s>", "<unk>", *(f"w{index}" for index in range(VOCABULARY - 2))]
LINES = [" ".join(f"w{(7 * line + 3 * word) % 40}" for word in range(6 + 5 * line)) for line in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small language model with a tokenizer of words."""
    made = tmp_path_factory.mktemp("model")
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>").save_pretrained(made)
    llama(1).save_pretrained(made)
    return made


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def captured(folder: Path, out: Path, *options: str) -> StructuredSource:
    assert main(["capture", str(folder), "--out", str(out), "--length", "16", *options]) == 0
    return StructuredSource.load(out)


def same(found: StructuredSource, wanted: StructuredSource) -> None:
    assert found.names() == wanted.names()
    for name in wanted.names():
        for ours, theirs in zip(found.factors(name), wanted.factors(name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", [[], [0]], ids=["no BOS before a text", "BOS before a text"])
def test_text_of_a_file_is_cut_into_windows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], head: list[int]
) -> None:
    """Each window starts as texts do in use."""
    if head:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        folder = shutil.copytree(folder, tmp_path / "model")
        tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("\n\n".join(LINES), encoding="utf-8")
    source = captured(folder, tmp_path / "s", "--text", str(tmp_path / "text.txt"), "--rank", "4", "--batch-size", "3")
    windows = []
    for line in LINES:
        tokens = [WORDS.index(word) for word in line.split()]
        size = 16 - len(head)
        windows += [head + tokens[start : start + size] for start in range(0, len(tokens), size)]
    count = sum(map(len, windows))
    assert count == 80 + len(head) * len(windows)
    assert capsys.readouterr().out == f"wrote {tmp_path / 's'}: 7 layers from {count} tokens\n"
    batches = []
    for start in range(0, len(windows), 3):
        rows = windows[start : start + 3]
        size = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (size - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows])
        batches.append({"input_ids": ids, "attention_mask": mask})
    model = llama(1)
    torch.manual_seed(0)
    same(source, StructuredSource.capture(model, batches, sampled_loss, rank=4))
    assert source.metadata["text"] == "text.txt"
    assert source.metadata["base"]["id"].startswith(str(folder))


def test_text_that_the_model_writes_and_options(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--own-text", "320", "--rank", "4", "--dtype", "bfloat16", "--modules", "q_proj,v_proj", "--json"]
    source = captured(folder, tmp_path / "s", *options, "--modules", "*.mlp.*")
    found = json.loads(capsys.readouterr().out)
    assert (found["out"], found["layers"], found["tokens"]) == (str(tmp_path / "s"), 5, 320)
    model = llama(1)
    batches = own_text(model, AutoTokenizer.from_pretrained(folder), tokens=320, length=16)
    torch.manual_seed(0)
    layers = ["q_proj", "v_proj", "*.mlp.*"]
    same(source, StructuredSource.capture(model, batches, sampled_loss, rank=4, dtype=torch.bfloat16, modules=layers))
    assert source.metadata["text"] == "written by the model"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["capture", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.strip().splitlines()[-1].rpartition("\r")[2].strip()  # after a progress bar
    assert line.startswith("gradguide: error: ")
    assert "Traceback" not in err
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required: --out"),
        (["--out", "s", "--rank", "0"], "must be a whole number of at least 1, found '0'"),
        (["--out", "s", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--out", "s", "--text", "a", "--own-text", "9"], "not allowed with argument"),
        (["--out", "s", "--text", "none.txt"], "none.txt"),
        (["--out", "s", "--text", "empty.txt"], "'empty.txt' has no text"),
        (["--out", "s", "--text", "binary.txt"], "'binary.txt' is not a text in UTF-8"),
        (["--out", "s", "--text", "word.txt", "--length", "16"], "has no paragraph of at least 2 tokens"),
        (["--out", "s"], "length must be at most 64, the positions of"),
        (["--out", "s", "--text", "word.txt", "--length", "1"], "length must be at least 2"),
        (["--out", "s", "--length", "16", "--own-text", "5"], "tokens must be at least length=16, found 5"),
        (["--out", "s", "--length", "16", "--modules", "nothing", "--own-text", "16"], "is called 'nothing'"),
        (["--out", "."], "is a folder, expected a file"),
        (["--out", "word.txt/s", "--length", "16"], "word.txt"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"empty.txt": b"\n \n", "binary.txt": b"\xff\xfe", "word.txt": b"w1\n"}.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert message in refused(capsys, str(folder), *options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_without_a_language_model_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    refused(capsys, str(tmp_path / "empty"), "--out", str(tmp_path / "s"))
    encoder = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    encoder.save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "bert")
    line = refused(capsys, str(tmp_path / "bert"), "--out", str(tmp_path / "s"), "--length", "16")
    assert "has no weights for" in line
    masked = BertForMaskedLM(encoder.config)
    for p in masked.parameters():
        p.data *= 20 if p.dim() > 1 else 1  # random weights are small
    masked.save_pretrained(tmp_path / "bert")
    line = refused(capsys, str(tmp_path / "bert"), "--out", str(tmp_path / "s"), "--length", "16")
    assert "depend on the tokens that follow" in line
    assert not (tmp_path / "s").exists()

"""Damaged files, closed pipes and Ctrl-C: one line or none on stderr, the usual exit codes, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gradguide
from gradguide import History, SourceGradient
from gradguide.cli.main import main
from tests.cli.damage import flip_header_bits, loads

ROOT = Path(gradguide.__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")


def source() -> SourceGradient:
    table = {"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}
    return SourceGradient(table, fisher=table, anchor=table, metadata={"examples": 7, "versions": {"torch": "2"}})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    source().save(path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line on stderr of a command that ends with exit code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gradguide: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert len(err) < 1100
    return err


def test_inspect_refuses_what_load_refuses_after_any_flipped_bit_of_the_header(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusals = 0
    for _ in flip_header_bits(file, file.read_bytes(), 300):
        if loads(SourceGradient.load, file):
            assert main(["inspect", str(file), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["source"]["tensors"] == 2
        else:
            refusals += 1
            refused(capsys, "inspect", str(file), "--json")
    assert refusals > 100


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a source file with changed metadata."""
    metadata = {"format": 1, "names": ["w"], "examples": 1}
    change(metadata)
    save_file({"gradient/w": torch.ones(2)}, path, metadata={"gradguide": json.dumps(metadata)})


def test_inspect_refuses_metadata_that_load_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "source"
    rewritten(path, lambda m: None)
    assert main(["inspect", str(path), "--json"]) == 0
    capsys.readouterr()
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m.update(names=3),
        lambda m: m.update(names={"w": 1}),
        lambda m: m.update(names=["w", "w"]),
        lambda m: m.update(names=["v"]),
        lambda m: m.update(names=[["w"]]),
        lambda m: m.pop("names"),
        lambda m: m.pop("format"),
        lambda m: m.update(format="1"),
        lambda m: m.update(format=2),
        lambda m: m.update(versions=["torch"]),
    ]
    for change in changes:
        rewritten(path, change)
        assert not loads(SourceGradient.load, path)
        assert str(path) in refused(capsys, "inspect", str(path))
        assert str(path) in refused(capsys, "inspect", str(path), "--json")


def test_inspect_shows_names_with_brackets_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "source"
    rewritten(path, lambda m: m.update(versions={"[/bold]": "[red]"}))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "captured with [/bold]" in out
    assert "[red]" in out


def test_inspect_refuses_strange_files(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = tmp_path / "strange"
    nested = '{"format": 1, "names": ["w"], "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"
    contents: list[Callable[[], object]] = [
        lambda: strange.write_bytes(b""),
        lambda: strange.write_bytes(b"\xff" * 100),
        lambda: strange.write_bytes(file.read_bytes()[:-1]),
        lambda: strange.write_bytes(struct.pack("<Q", 1 << 62)),
        lambda: save_file({}, strange, metadata={"gradguide": '{"format": 1, "names": []}'}),
        lambda: save_file({"w": torch.ones(2)}, strange),
        lambda: save_file({"gradient/w": torch.ones(2)}, strange, metadata={"gradguide": nested}),
        lambda: save_file(
            {"gradient/w": torch.ones(2).long()}, strange, metadata={"gradguide": '{"format": 1, "names": ["w"]}'}
        ),
        lambda: save_file(
            {"gradient/w": torch.full((2,), torch.nan)},
            strange,
            metadata={"gradguide": '{"format": 1, "names": ["w"]}'},
        ),
    ]
    for write in contents:
        write()
        assert not loads(SourceGradient.load, strange)
        refused(capsys, "inspect", str(strange))
        refused(capsys, "inspect", str(file), "--against", str(strange))
        refused(capsys, "inspect", str(file), "--adapter", str(strange))
    for path in (tmp_path, tmp_path / "none", file / "below"):
        refused(capsys, "inspect", str(path))


def test_plot_refuses_strange_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plot.png"
    for name, content in (
        ("h.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("h.jsonl", b'{"a": ' + b"1" * 400 + b"}"),
        ("h.jsonl", b'{"a": ' + b"1" * 5000 + b"}"),
        ("h.jsonl", b'{"a": {"b": 1}}'),
        ("h.jsonl", b"\x00\xff"),
        ("h.csv", b"\xff\xfe\x00"),
        ("h.csv", b"a,b\n1,2,3\n"),
        ("h.csv", b'a\n"' + b"1" * 200_000),
    ):
        (tmp_path / name).write_bytes(content)
        assert name in refused(capsys, "plot", str(tmp_path / name), "--out", str(out))
    history = History()
    history.append({"grad_norm": 1.0})
    history.save(tmp_path / "h.csv")
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "plot.png", tmp_path / "plot.doc"):
        refused(capsys, "plot", str(tmp_path / "h.csv"), "--out", str(target))
    assert not out.exists()


def test_an_unforeseen_error_says_its_kind_and_place(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise KeyError("names\nand more")

    monkeypatch.setattr("gradguide.cli.inspect_stored.describe", broken)
    assert "KeyError: 'names\\nand more' (test_main.py, line " in refused(capsys, "inspect", str(file))


@posix
@pytest.mark.parametrize("arguments", [["--json"], [], ["--help"]], ids=["json", "tables", "help"])
def test_a_closed_pipe_ends_quietly(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["inspect", str(file), *arguments]) == 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # for data left in the buffer
    assert capsys.readouterr().err == ""


def environment(*first: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*first, ROOT)))}


@posix
def test_a_closed_pipe_leaves_nothing_to_complain_about_when_the_interpreter_ends(file: Path) -> None:
    shell = '{0} -m gradguide inspect {1} --json | true; echo "${{PIPESTATUS[0]}}"; {0} -m gradguide none 2>&1 | true'
    command = shell.format(sys.executable, file)
    done = subprocess.run(
        ["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout in ("0\n", "141\n")
    assert done.stderr == ""


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def started(tmp_path: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gradguide", *argv]
    pipe = subprocess.PIPE

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # children of a background job would ignore it

    return subprocess.Popen(command, env=environment(tmp_path), stdout=pipe, stderr=pipe, text=True, preexec_fn=listen)


# Replaces torch, whose import takes seconds, and waits for the interrupt.
TORCH = """
import time, weakref

class Thing: pass

def wait(*_):
    print("importing", flush=True)
    time.sleep(60)

"""
WAYS = {
    "raised": "wait()",
    "turned into another error": "try:\n    wait()\nexcept KeyboardInterrupt:\n    raise ImportError('failed')",
    "lost in a callback": "thing = Thing(); kept = weakref.ref(thing, wait); del thing; raise ImportError('went on')",
}


@posix
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", [["inspect", "x"], ["demo"]], ids=["inspect", "demo"])
def test_ctrl_c_during_imports_is_exit_code_130_and_silent(tmp_path: Path, command: list[str], way: str) -> None:
    (tmp_path / "torch.py").write_text(TORCH + WAYS[way])
    with started(tmp_path, *command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        assert interrupted(process) == (130, "", "")


@posix
def test_ctrl_c_while_reading_is_exit_code_130_and_silent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "h.csv")
    with started(tmp_path, "plot", str(tmp_path / "h.csv")) as process, (tmp_path / "h.csv").open("w"):
        assert interrupted(process) == (130, "", "")

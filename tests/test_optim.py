"""Guided optimizers by name, in torch's form and in the loaders of configuration files."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, SourceGradient
from gradguide.optim import Guided, GuidedAdamW


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.full((4, 3), 1.0 + step)).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_it_steps_as_the_wrapper_around_the_base() -> None:
    rules: dict[str, Any] = {"direction": Direction(decay=0.5), "magnitude": Magnitude(max_norm=0.5)}
    plain: dict[str, Any] = {"direction": {"decay": 0.5}, "magnitude": {"max_norm": 0.5}}
    net = model()
    wanted = train(net, GradGuide(AdamW(net.parameters(), 0.1, (0.8, 0.9), weight_decay=0.3), **rules))
    for options in (rules, plain):
        net = model()
        assert same(train(net, GuidedAdamW(net.parameters(), 0.1, (0.8, 0.9), weight_decay=0.3, **options)), wanted)
        net = model()
        assert same(train(net, Guided(net.parameters(), 0.1, (0.8, 0.9), weight_decay=0.3, **options)), wanted)
    net = model()
    wanted = train(net, GradGuide(SGD(net.parameters(), 0.1, 0.9, nesterov=True), **rules))
    net = model()
    found = Guided(net.parameters(), 0.1, 0.9, nesterov=True, base="torch.optim.SGD", **plain)
    assert same(train(net, found), wanted)


def test_null_turns_a_rule_off() -> None:
    net, other = model(), model()
    optimizer = GuidedAdamW(net.parameters(), 0.1, direction=None, magnitude=None)
    assert same(train(net, optimizer), train(other, AdamW(other.parameters(), 0.1)))


def test_a_regularizer_is_given_by_plain_values() -> None:
    net = model()
    optimizer = GuidedAdamW(net.parameters(), regularizer={"magnitude": 0.5})
    assert str(Regularizer(magnitude=0.5)) in repr(optimizer)


def test_a_source_is_matched_by_named_parameters() -> None:
    net = model()
    batches = [torch.ones(2, 3), torch.full((2, 3), 2.0)]
    source = SourceGradient.capture(net, batches, lambda net, batch: net(batch).square().mean())
    optimizer = GuidedAdamW(net.named_parameters(), alignment=Alignment(source))
    train(net, optimizer)
    assert optimizer.metrics()["source_cosine"] > 0


def test_the_arguments_of_adamw_have_torch_s_defaults() -> None:
    own = inspect.signature(GuidedAdamW).parameters
    for name, parameter in inspect.signature(AdamW).parameters.items():
        if name != "differentiable":  # GradGuide refuses it
            assert (own[name].default, own[name].kind) == (parameter.default, parameter.kind), name
    assert GuidedAdamW(model().parameters()).defaults == AdamW(model().parameters()).defaults


def test_every_option_of_gradguide_is_an_option() -> None:
    wanted = {n: p.default for n, p in inspect.signature(GradGuide).parameters.items() if p.kind is p.KEYWORD_ONLY}
    found = {name: p.default for name, p in inspect.signature(Guided).parameters.items()}
    assert {name: found[name] for name in wanted} == {**wanted, "magnitude": {}}
    assert (wanted["direction"], wanted["magnitude"]) == (None, Magnitude())
    net = model()
    assert repr(Guided(net.parameters())) == repr(GradGuide(AdamW(net.parameters())))
    given = Guided(net.parameters(), direction={}, magnitude={})
    assert repr(given) == repr(GradGuide(AdamW(net.parameters()), direction=Direction(), magnitude=Magnitude()))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", [GuidedAdamW, Guided])
def test_classes_and_instances_are_pickled(kind: Any, way: Any) -> None:
    assert way(kind) is kind
    net = model()
    optimizer = kind(net.parameters(), 0.1)
    train(net, optimizer)
    twin, other = way((net, optimizer))
    assert type(other) is kind
    assert same(train(twin, other), train(net, optimizer))


def test_a_checkpoint_is_read_without_unpickling(tmp_path: Path) -> None:
    net = model()
    optimizer = GuidedAdamW(net.parameters(), 0.1, betas=[0.8, 0.9])  # type: ignore[arg-type]
    train(net, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["param_groups"][0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"base": "torch.optim.Nonsense"},
            ValueError,
            "dotted path of an optimizer class, such as torch.optim.SGD: .*Non",
        ),
        ({"base": "nonsense.SGD"}, ValueError, "dotted path of an optimizer class.*nonsense"),
        ({"base": "AdamW"}, ValueError, "dotted path of an optimizer class.*AdamW"),
        ({"base": "torch.nn.Linear"}, TypeError, "found 'torch.nn.Linear'"),
        ({"base": SGD}, TypeError, "dotted path of an optimizer class.*found <class"),
        ({"base_args": {"lr": 0.2}}, TypeError, "base_args holds lr"),
        ({"base": "gradguide.GradGuide"}, TypeError, "unexpected keyword argument 'lr'|GradGuide"),
        ({"magnitude": {"max_nrom": 1.0}}, TypeError, "max_nrom"),
        ({"direction": {"decay": 2.0}}, ValueError, r"decay must be in \[0, 1\).*2.0"),
        ({"direction": 0.9}, TypeError, "direction"),
        ({"rate": 0.1}, TypeError, "rate"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Guided(model().parameters(), **{"lr": 0.1, **arguments})


def test_base_args_do_not_give_way_to_defaults() -> None:
    with pytest.raises(TypeError, match="base_args holds lr, weight_decay"):
        GuidedAdamW(model().parameters(), base_args={"lr": 0.1, "weight_decay": 0.3})


SGD_CONFIG: dict[str, Any] = {
    "base": "torch.optim.SGD",
    "lr": 0.1,
    "momentum": 0.9,
    "direction": {"decay": 0.5},
    "magnitude": {"max_norm": 0.5},
}
ADAMW_CONFIG: dict[str, Any] = {"lr": 0.1, "betas": [0.8, 0.9], "direction": None, "magnitude": {"max_norm": 0.5}}
CONFIGS = [("gradguide.optim.Guided", SGD_CONFIG), ("gradguide.optim.GuidedAdamW", ADAMW_CONFIG)]


def check_loaded(optimizer: Any, net: nn.Module, path: str, config: dict[str, Any], folder: Path) -> None:
    """Compare the trajectory of a loaded optimizer with that of GradGuide made by hand. Its checkpoint is plain."""
    other = model()
    if path.endswith("AdamW"):
        base: torch.optim.Optimizer = AdamW(other.parameters(), lr=config["lr"], betas=(0.8, 0.9))
        wanted = GradGuide(base, direction=None, magnitude=Magnitude(max_norm=0.5))
    else:
        base = SGD(other.parameters(), lr=config["lr"], momentum=0.9)
        wanted = GradGuide(base, direction=Direction(decay=0.5), magnitude=Magnitude(max_norm=0.5))
    assert type(optimizer).__name__ == path.rpartition(".")[2]
    assert same(train(net, optimizer), train(other, wanted))
    torch.save(optimizer.state_dict(), folder / "state.pt")
    torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize(("path", "config"), CONFIGS)
def test_hydra_instantiates_it(tmp_path: Path, path: str, config: dict[str, Any]) -> None:
    utils = pytest.importorskip("hydra.utils")
    omegaconf = pytest.importorskip("omegaconf")
    net = model()
    given = omegaconf.OmegaConf.create({"_target_": path, **config})
    check_loaded(utils.instantiate(given, net.parameters()), net, path, config, tmp_path)
    partial = omegaconf.OmegaConf.create({"_target_": path, "_partial_": True, **config})
    assert isinstance(utils.instantiate(partial)(params=model().parameters()), GradGuide)


@pytest.mark.parametrize(("path", "config"), CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_torchtune_loads_it_as_a_component(tmp_path: Path, path: str, config: dict[str, Any]) -> None:
    loader = pytest.importorskip("torchtune.config", exc_type=ImportError)
    omegaconf = pytest.importorskip("omegaconf")
    net = model()
    given = omegaconf.OmegaConf.create({"_component_": path, **config})
    check_loaded(loader.instantiate(given, net.parameters()), net, path, config, tmp_path)


LIGHTNING_CLI = """
import sys
import lightning, torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)
    def training_step(self, batch, index):
        return self.net(batch[0]).square().sum()
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=4)

if __name__ == "__main__":
    cli = LightningCLI(Module, save_config_callback=None)
    optimizer = cli.trainer.optimizers[0]
    print("FOUND", type(optimizer).__name__, type(optimizer.base).__name__, optimizer.defaults["lr"],
          optimizer.defaults.get("momentum"), repr(optimizer).splitlines()[0], optimizer.metrics()["steps"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("path", "config"), CONFIGS)
def test_lightning_cli_makes_it_from_a_file(tmp_path: Path, path: str, config: dict[str, Any]) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    quiet = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    arguments = dict(config)
    if path.endswith("Guided"):
        arguments["base_args"] = {name: arguments.pop(name) for name in ("lr", "momentum")}
    file = {
        "trainer": {**quiet, "enable_progress_bar": False},
        "optimizer": {"class_path": path, "init_args": arguments},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(file), encoding="utf-8")
    (tmp_path / "main.py").write_text(LIGHTNING_CLI, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "main.py", "fit", "--config", "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    name = path.rpartition(".")[2]
    assert line.startswith(f"FOUND {name} {'AdamW 0.1 None' if name == 'GuidedAdamW' else 'SGD 0.1 0.9'} GradGuide(")
    assert str(Magnitude(max_norm=0.5)) in line
    assert ("Direction" in line) == (name == "Guided")
    assert line.endswith(" 2.0")

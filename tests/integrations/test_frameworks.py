"""The recipes of gradguide.integrations.frameworks, with the frameworks that are installed."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import GradGuide, unwrap
from tests.contract import kit
from tests.integrations.test_causal_trainer import texts
from tests.integrations.test_guide_trl import tokenizer
from tests.sources.structured.problems import adapted, llama
from tests.test_recipes import RECIPES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def recipe(folder: Path, name: str) -> Any:
    """Write a recipe to an empty folder and import it from there."""
    path = folder / f"{name}.py"
    path.write_text(RECIPES[path.name], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def options(**more: Any) -> dict[str, Any]:
    return {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        **more,
    }


def rows() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(
        [{k: v.tolist() for k, v in row.items()} for row in texts(0)]
    )


def check(trainer: Any) -> None:
    trainer.train()
    found = unwrap(trainer.optimizer)
    assert isinstance(found, GradGuide)
    assert found.metrics()["steps"] == 3
    assert [row["gradguide/steps"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3]


def test_axolotl_s_plugin_guides_its_trainer(tmp_path: Path) -> None:
    base = pytest.importorskip("axolotl.integrations.base", exc_type=ImportError)
    trainers = pytest.importorskip("axolotl.core.trainers.base", exc_type=ImportError)
    arguments = pytest.importorskip("axolotl.core.training_args", exc_type=ImportError)
    recipe(tmp_path, "guided_axolotl")
    manager = base.PluginManager.get_instance()
    manager.register("guided_axolotl.GuidedPlugin")
    trainer = trainers.AxolotlTrainer(
        model=adapted(llama(1)),
        args=arguments.AxolotlTrainingArguments(str(tmp_path), **options()),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    manager.post_trainer_create({}, trainer)
    check(trainer)


def test_llama_factory_trains_with_a_guided_trainer(tmp_path: Path) -> None:
    """By its own entry point, from a configuration file."""
    pytest.importorskip("llamafactory.train.sft.workflow", exc_type=ImportError)
    (tmp_path / "guided_llamafactory.py").write_text(RECIPES["guided_llamafactory.py"], encoding="utf-8")
    model = llama(1)
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"instruction": f"w{i + 3}", "input": "", "output": f"w{i + 4} w{i + 5}"} for i in range(12)]
    config = {
        "model_name_or_path": "model",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset": "lines",
        "dataset_dir": ".",
        "template": "default",
        "output_dir": "output",
        **options(report_to="none"),
    }
    files = {"lines.json": lines, "dataset_info.json": {"lines": {"file_name": "lines.json"}}, "config.yaml": config}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "guided_llamafactory.py", "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "output" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [row["gradguide/steps"] for row in state["log_history"] if "loss" in row] == [1, 2, 3]


def test_ms_swift_s_optimizer_is_guided(tmp_path: Path) -> None:
    optimizers = pytest.importorskip("swift.optimizers", exc_type=ImportError)
    trainers = pytest.importorskip("swift.trainers", exc_type=ImportError)
    mixin = pytest.importorskip("swift.trainers.mixin", exc_type=ImportError)
    transformers = pytest.importorskip("transformers")
    recipe(tmp_path, "guided_swift")
    arguments = trainers.TrainingArguments(str(tmp_path), **options(max_grad_norm=0.0))

    class Trainer(transformers.Trainer):  # type: ignore[name-defined, misc]
        """The part of swift's trainer that makes the optimizer: the rest needs a template of its hub."""

        create_optimizer = mixin.SwiftMixin.create_optimizer
        _disable_foreach_for_deepspeed = mixin.SwiftMixin._disable_foreach_for_deepspeed

    trainer = Trainer(adapted(llama(1)), arguments, train_dataset=texts(seed=0))
    trainer.optimizer_callback = optimizers.optimizers_map["guided"](arguments, trainer)
    check(trainer)


def test_torchtitan_s_optimizers_are_guided_and_resume(tmp_path: Path) -> None:
    titan = pytest.importorskip("torchtitan.components.optimizer", exc_type=ImportError)
    guided = recipe(tmp_path, "guided_torchtitan").GuidedOptimizers
    adamw = {"optimizer_name": "AdamW", "optimizer_kwargs": {"lr": 1e-2}}
    config = guided.Config(
        param_groups=[
            titan.ParamGroupConfig(pattern=r".*bias$", optimizer_name="Adam", optimizer_kwargs={"lr": 1e-3}),
            titan.ParamGroupConfig(pattern=r".*", **adamw),
        ],
        implementation="foreach",
    )

    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        return model, config.build(model_parts=[model])

    def train(model: nn.Module, optimizers: Any) -> None:
        for step in range(3):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            optimizers.zero_grad()
            model(x).square().mean().backward()
            optimizers.step()

    model, optimizers = make()
    assert [type(each.base) for each in optimizers] == [torch.optim.Adam, torch.optim.AdamW]
    train(model, optimizers)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for each, guides in ((model, optimizers), (other, resumed)):
        train(each, guides)
    assert [each.metrics()["steps"] for each in resumed] == [6, 6]
    kit.assert_same(kit.parameters_of(other), kit.parameters_of(model))

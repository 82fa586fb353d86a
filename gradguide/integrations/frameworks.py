"""Guide what Axolotl, LLaMA-Factory, ms-swift and torchtitan train: recipes, without code to import.

Axolotl: save this beside the configuration, and name it there under ``plugins: [guided_axolotl.GuidedPlugin]``::

    # recipe: guided_axolotl.py
    from axolotl.integrations.base import BasePlugin

    from gradguide.integrations.transformers import guide


    class GuidedPlugin(BasePlugin):
        def post_trainer_create(self, cfg, trainer):
            guide(trainer)  # or guide(trainer, alignment=Alignment(StructuredSource.load("base.safetensors")))

LLaMA-Factory has no hook for the trainer, so a script replaces the class that its stage makes. Start it instead of
``llamafactory-cli train``: ``python guided_llamafactory.py config.yaml``. For other stages replace the name of the
module and of the class, such as ``dpo`` and ``CustomDPOTrainer``::

    # recipe: guided_llamafactory.py
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    from gradguide.integrations.transformers import guide


    class GuidedTrainer(workflow.CustomSeq2SeqTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            guide(self)


    workflow.CustomSeq2SeqTrainer = GuidedTrainer

    if __name__ == "__main__":
        run_exp()

ms-swift: ``swift sft --external_plugins guided_swift.py --optimizer guided --max_grad_norm 0``::

    # recipe: guided_swift.py
    from swift.optimizers import OptimizerCallback, optimizers_map

    from gradguide import GradGuide
    from gradguide.integrations.transformers import GradGuideCallback


    class GuidedCallback(OptimizerCallback):
        def create_optimizer(self, model=None):
            self.trainer.add_callback(GradGuideCallback())
            model = self.trainer.model if model is None else model
            return GradGuide(super().create_optimizer(model), names=model)


    optimizers_map["guided"] = GuidedCallback

torchtitan: give ``GuidedOptimizers.Config(...)`` as ``optimizer`` in the trainer's configuration, with the fields of
``OptimizersContainer.Config``, and a ``training.max_norm`` of infinity, since GradGuide clips::

    # recipe: guided_torchtitan.py
    from dataclasses import dataclass

    from torchtitan.components.optimizer import OptimizersContainer

    from gradguide import GradGuide


    class GuidedOptimizers(OptimizersContainer):
        @dataclass(kw_only=True, slots=True)
        class Config(OptimizersContainer.Config):
            pass

        def __init__(self, config, *, model_parts):
            super().__init__(config, model_parts=model_parts)
            self.optimizers = [GradGuide(optimizer) for optimizer in self.optimizers]

        def load_state_dict(self, state_dict):
            # torchtitan looks up the names of the state in the base, which lacks GradGuide's own.
            for optimizer in self.optimizers:
                groups, state = optimizer.state_dict()["param_groups"], {}
                for group in groups:
                    names = group["param_names"]
                    for key in group.keys() - {"params", "param_names"}:
                        group[key] = state_dict[f"param_groups.{names[0]}.{key}"]
                    for index, name in zip(group["params"], names):
                        start = f"state.{name}."
                        found = {key: value for key, value in state_dict.items() if key.startswith(start)}
                        state[index] = {key.removeprefix(start): value for key, value in found.items()}
                optimizer.load_state_dict({"state": state, "param_groups": groups})
"""

"""Pruner training in LLaVA's own training code, under the deepspeed launcher.

    deepspeed --module llava_prune.train --deepspeed zero_configs/zero2.json --prune_config avg128 <LLaVA's own flags>

`TrainingArguments`, `LLaVATrainer`, the dataset and the final save are rebound in `llava.train.train`; then its
`train()` runs as it is.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from .adaptation import check_what_learns, of_baseline
from .config import PruneConfig

_FLAG_TYPES: dict[str, Any] = {
    "int": int | None,
    "int | None": int | None,
    "float": float | None,
    "float | None": float | None,
    "bool": bool | None,
    "str": str | None,
    "tuple[int, ...]": list[int] | None,
    "tuple[float, ...] | None": list[float] | None,
}
_PREFIX = "prune_"


def flag_fields() -> list[tuple[str, Any, Any]]:
    """`--prune_config`, `_start`, `_baseline`, and an optional `--prune_<field>` for each field of `PruneConfig`."""
    fields: list[tuple[str, Any, Any]] = [
        (
            "prune_config",
            str,
            dataclasses.field(default="default", metadata={"help": "a preset's name, or a YAML or JSON file"}),
        )
    ]
    start = {"help": "pruners to start from: the output of a training with the same layers and sizes of pruners"}
    fields.append(("prune_start", _optional(str | None), dataclasses.field(default=None, metadata=start)))
    baseline = {"help": "training-free method that LoRA is adapted to, in place of pruners, at target_token_num"}
    fields.append(("prune_baseline", _optional(str | None), dataclasses.field(default=None, metadata=baseline)))
    for item in dataclasses.fields(PruneConfig):
        metadata = {"help": item.metadata["help"].replace("%", "%%")}  # argparse puts values into it
        kind = _optional(_FLAG_TYPES[str(item.type)])
        fields.append((_PREFIX + item.name, kind, dataclasses.field(default=None, metadata=metadata)))
    return fields


def _optional(kind: Any) -> Any:
    """`X | None` as `Optional[X]`, which is what HfArgumentParser of 4.37 reads."""
    from typing import Optional, get_args

    return Optional[get_args(kind)[0]]  # noqa: UP045


def resolve_config(args: Any) -> PruneConfig:
    """The `PruneConfig` that parsed arguments ask for; raises ValueError as `PruneConfig.load`."""
    overrides = {name: getattr(args, _PREFIX + name) for name in PruneConfig.field_names()}
    config = PruneConfig.load(args.prune_config, {k: v for k, v in overrides.items() if v is not None})
    return config if args.prune_baseline is None else of_baseline(config)


def training_arguments_class(base: type) -> type:
    """LLaVA's (or Hugging Face's) `TrainingArguments` with the pruning flags; `.prune` is the resolved config."""

    def post_init(self: Any) -> None:
        base.__post_init__(self)
        names = [n for n in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs") if hasattr(self, n)]
        given = dict(getattr(self, names[0]) or {})
        if given.get("use_reentrant"):
            raise ValueError(
                "reentrant gradient checkpointing leaves the pruners without a gradient: leave use_reentrant out of "
                f"{names[0]}, or set it to False"
            )
        for name in names:  # 5.x renamed it and keeps the old name in step
            object.__setattr__(self, name, {**given, "use_reentrant": False})
        object.__setattr__(self, "prune", resolve_config(self))

    def reduce(self: Any) -> tuple:
        # trainers pickle their arguments, and no module holds a class that is made here
        from transformers import TrainingArguments

        return object.__new__, (TrainingArguments,), self.__dict__

    namespace = {"__post_init__": post_init, "__reduce__": reduce}
    return dataclasses.make_dataclass("PruneTrainingArguments", flag_fields(), bases=(base,), namespace=namespace)


def use_cpu_where_there_is_no_gpu() -> None:
    """DeepSpeed on CPU ranks: accelerate 0.27 would ask for NCCL unless the process group exists already."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if "LOCAL_RANK" in os.environ:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name())


def leave_process_group() -> None:
    """Stop the group's threads: interpreters that exit while those run were seen to abort, after all was saved."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def bind_llava_training(module: Any) -> None:
    """Put the pruning classes in place of LLaVA's in `llava.train.train`."""
    from .data_check import NamedErrors
    from .trainer import PruneTrainerMixin

    class PruneTrainer(PruneTrainerMixin, module.LLaVATrainer):
        pass

    make_data = module.make_supervised_data_module

    def make_checked_data(*args: Any, **kwargs: Any) -> dict[str, Any]:
        data = make_data(*args, **kwargs)
        return {**data, "train_dataset": NamedErrors(data["train_dataset"])}

    def save_at_the_end(trainer: Any, output_dir: str) -> None:
        # pruners were saved by the trainer; a base that was trained is saved beside them
        if trainer.prune.train_base:
            trainer.save_model(output_dir)

    module.TrainingArguments = training_arguments_class(module.TrainingArguments)
    module.LLaVATrainer = PruneTrainer
    module.make_supervised_data_module = make_checked_data
    module.safe_save_model_for_hf_trainer = save_at_the_end


def check_before_loading(module: Any) -> None:
    """Parse the command line and read the data before the model is loaded; raises ValueError."""
    import transformers

    from .compat_training import check_8bit_lora
    from .data_check import check_training_data

    parser = transformers.HfArgumentParser((module.ModelArguments, module.DataArguments, module.TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    if model_args.vision_tower is None:
        raise ValueError(
            "--vision_tower is not given: without it LLaVA trains a text-only model; give the base model's own tower, "
            "e.g. openai/clip-vit-large-patch14-336"
        )
    if data_args.data_path is None:
        raise ValueError("--data_path is not given: a JSON file in LLaVA's conversation format")
    # by class: hub configs of LLaVA-1.5 name a model_type that transformers gives to its own LLaVA
    base = module.LlavaLlamaForCausalLM.config_class.from_pretrained(model_args.model_name_or_path)
    training_args.prune.check_layers(base.num_hidden_layers)
    if training_args.prune.alignment in ("gan", "mse", "mean_var"):
        training_args.prune.disc_layer_indices(base.num_hidden_layers)
    kept_by = (training_args.prune_start, training_args.prune_baseline)
    check_what_learns(training_args.prune, *kept_by, training_args.lora_enable)
    if training_args.bits == 8 and training_args.lora_enable:
        check_8bit_lora()
    if training_args.local_rank in (-1, 0):
        turns_problem = turns_problem_of(module.conversation_lib, model_args.version)
        check_training_data(data_args.data_path, data_args.image_folder, turns_problem)


def turns_problem_of(conversation_lib: Any, version: str) -> Any:
    """For `check_training_data`: what LLaVA's `--version` needs of turns, None where it takes them in any order."""
    from .data_check import in_turns

    template = conversation_lib.default_conversation
    if version not in ("v0", "v0.5"):  # these leave the default as it is
        template = conversation_lib.conv_templates.get(version, conversation_lib.conv_templates["vicuna_v1"])
    return None if template.sep_style.name in ("SINGLE", "PLAIN") else in_turns


def _take_stack(argv: list[str]) -> str:
    """Remove `--stack NAME` from `argv` and return the name."""
    index = argv.index("--stack")
    stack = argv[index + 1] if index + 1 < len(argv) else None
    if stack not in ("llava", "hf"):
        raise SystemExit(f"llava_prune: --stack is {stack!r}; use llava (LLaVA's own code) or hf (transformers 5.x)")
    del argv[index : index + 2]
    return stack


def main() -> None:
    """Train pruners with the command line of LLaVA's `train.py` plus the `--prune_*` flags.

    `--stack hf` trains on Hugging Face's classes instead, see `train_hf`.
    """
    import sys

    if "--stack" in sys.argv:
        stack = _take_stack(sys.argv)
        if stack == "hf":
            from .train_hf import main as train_hf

            return train_hf()
    import llava.train.train as llava_train

    use_cpu_where_there_is_no_gpu()
    bind_llava_training(llava_train)
    try:
        check_before_loading(llava_train)
    except ValueError as error:
        sys.exit(f"llava_prune: {error}")
    llava_train.train()
    leave_process_group()


if __name__ == "__main__":
    main()

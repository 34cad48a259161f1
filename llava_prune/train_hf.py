"""Pruner training on Hugging Face's LLaVA classes and plain `Trainer`, under the deepspeed launcher.

    deepspeed --module llava_prune.train --stack hf --deepspeed zero_configs/zero2.json --prune_config avg128 \
        --model_name_or_path HF_DIR --data_path train.json --image_folder images --output_dir out

The flags are LLaVA's where LLaVA has them, else those of `TrainingArguments`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from . import compat_training
from .checkpoint import gathered
from .train import leave_process_group, training_arguments_class, use_cpu_where_there_is_no_gpu


@dataclass
class ModelArguments:
    """The base model."""

    model_name_or_path: str = field(metadata={"help": "a Hugging Face LLaVA: a folder (see `convert`) or a hub name"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager or sdpa"})


@dataclass
class DataArguments:
    """LLaVA's conversation data."""

    data_path: str = field(metadata={"help": "a JSON file in LLaVA's conversation format"})
    image_folder: str | None = field(default=None, metadata={"help": "what image paths are relative to"})


def arguments_class() -> type:
    """`TrainingArguments` of transformers with the pruning flags and LLaVA's own."""
    from transformers import TrainingArguments

    @dataclass
    class HostArguments(TrainingArguments):
        remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False"})
        model_max_length: int = field(default=2048, metadata={"help": "positions of a sample, vision tokens included"})
        lora_enable: bool = field(default=False, metadata={"help": "train LoRA on the language model too"})
        lora_r: int = field(default=64, metadata={"help": "rank of LoRA"})
        lora_alpha: int = field(default=16, metadata={"help": "scale of LoRA"})
        lora_dropout: float = field(default=0.05, metadata={"help": "dropout of LoRA"})

        def __post_init__(self) -> None:
            if self.deepspeed and self.accelerator_config is None and compat_training.configure_cpu_ranks():
                self.accelerator_config = {"use_configured_state": True}
            super().__post_init__()

    return training_arguments_class(HostArguments)


def make_trainer(argv: list[str] | None = None) -> Any:
    """The `PruneTrainer` that the command line asks for, its data checked and its model loaded.

    Raises:
        ValueError: data, layers or flags do not fit, with what would be right.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer

    from .data_check import NamedErrors, check_training_data, question_first
    from .data_hf import Collator, ConversationDataset
    from .trainer import PruneTrainerMixin

    class PruneTrainer(PruneTrainerMixin, Trainer):
        pass

    parser = HfArgumentParser((ModelArguments, DataArguments, arguments_class()))
    model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    layers = AutoConfig.from_pretrained(model_args.model_name_or_path).get_text_config().num_hidden_layers
    args.prune.check_layers(layers)
    if args.prune.alignment in ("gan", "mse", "mean_var"):
        args.prune.disc_layer_indices(layers)
    if args.process_index == 0:
        check_training_data(data_args.data_path, data_args.image_folder, question_first)
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path, dtype=dtype, attn_implementation=model_args.attn_implementation
    )
    if args.lora_enable:
        model = _with_lora(model, args)
    data = ConversationDataset(data_args.data_path, data_args.image_folder, processor, args.model_max_length)
    return PruneTrainer(
        model=model,
        args=args,
        train_dataset=NamedErrors(data),
        data_collator=Collator(processor),
        processing_class=processor,
    )


def _with_lora(model: Any, args: Any) -> Any:
    """LoRA on every linear layer of the language model, as LLaVA does."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    names = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".language_model." in name
    }
    return get_peft_model(
        model,
        LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=sorted(names),
            task_type="CAUSAL_LM",
        ),
    )


def main(argv: list[str] | None = None) -> None:
    """Train pruners; resumes from the last checkpoint in `--output_dir`, if there is one."""
    use_cpu_where_there_is_no_gpu()
    try:
        trainer = make_trainer(argv)
    except ValueError as error:
        sys.exit(f"llava_prune: {error}")
    trainer.train(resume_from_checkpoint=True)
    trainer.save_state()
    if trainer.lora:
        with gathered([parameter for parameter in trainer.model.parameters() if parameter.requires_grad]):
            if trainer.args.should_save:
                # the adapter, whose folder can be loaded alone; pruners were saved by the trainer
                trainer.model.save_pretrained(trainer.args.output_dir)
                trainer.processing_class.save_pretrained(trainer.args.output_dir)
    elif trainer.prune.train_base:
        trainer.save_model(trainer.args.output_dir)
    leave_process_group()

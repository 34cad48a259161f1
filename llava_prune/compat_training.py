"""What Trainers, DeepSpeed, accelerate and PEFT of either stack have to be told, each with the reason it exists."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps that the host's Trainer takes in an epoch; 4.37 leaves out what is left over."""
    import transformers

    left_over = batches % accumulation > 0 and int(transformers.__version__.split(".")[0]) > 4
    return max(batches // accumulation + left_over, 1)


def leave_accumulation_to_the_engine(engine: Any) -> None:
    """accelerate 0.27 enters the engine's `no_sync` between accumulated micro-batches, which ZeRO-2 and 3 refuse.

    The engine counts micro-batches itself; newer accelerate no longer asks.
    """
    engine.no_sync = nullcontext


def exclude_frozen_parameters(engine: Any) -> None:
    """Make a DeepSpeed engine write and expect trainable parameters only.

    The Trainers ask for this for PEFT models alone (and 4.37 then fails to load). A non-strict load drops nothing
    unseen: trainable weights come back from the optimizer's fp32 partitions, whose shapes are checked.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return save(*args, **{**kwargs, "exclude_frozen_parameters": True})

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "load_module_strict": False})

    # the Trainer asks the method's signature which arguments it takes
    save_checkpoint.__signature__ = inspect.signature(save)
    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def configure_cpu_ranks() -> bool:
    """Tell accelerate of the process group of CPU ranks, which accelerate 1.x counts as one process under DeepSpeed.

    It looks for GPUs alone unless it is told to leave them, and then it leaves DeepSpeed too.

    Returns:
        Whether there was a group to tell of; `TrainingArguments` then have to use the configured state.
    """
    import os

    import torch.distributed as dist

    if torch.cuda.is_available() or not dist.is_initialized():
        return False
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend=dist.get_backend())
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return True


def loading_numpy_random_state() -> AbstractContextManager:
    """Let `torch.load` read a Trainer's RNG file: torch >= 2.6 loads weights only, 4.37 lists no numpy types."""
    if not hasattr(torch.serialization, "safe_globals"):
        return nullcontext()
    import numpy as np

    reconstruct = np.random.get_state()[1].__reduce__()[0]  # numpy.core or numpy._core, by version
    types = [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    return torch.serialization.safe_globals(types)


@contextmanager
def as_model_with_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block a quantised base passes as what it is here, a frozen model with trainable adapters.

    The Trainers look for PEFT's own mark and refuse any other adapter on a 4- or 8-bit model; `PreTrainedModel.to`
    refuses to be called on one, and DeepSpeed calls it, with the device it is on already. Under PEFT neither shows,
    since PEFT's wrapper is the model that they see.
    """
    if not getattr(model, "is_quantized", False):
        yield
        return
    names = ("_hf_peft_config_loaded", "to", "half", "float")
    before = {name: model.__dict__[name] for name in names if name in model.__dict__}
    model._hf_peft_config_loaded = True
    for name in names[1:]:
        setattr(model, name, MethodType(getattr(nn.Module, name), model))
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


def check_8bit_lora() -> None:
    """Raises ValueError where LoRA can not adapt 8-bit layers: peft 0.9 copies a field that bitsandbytes dropped."""
    import bitsandbytes
    import peft

    field = "memory_efficient_backward"
    source = Path(peft.__file__).with_name("tuners") / "lora" / "bnb.py"
    if field in source.read_text() and not hasattr(bitsandbytes.MatmulLtState(), field):
        raise ValueError(
            f"peft {peft.__version__} can not put LoRA on 8-bit layers of bitsandbytes {bitsandbytes.__version__}: "
            "use --bits 4, train without LoRA, or install another pair of the two"
        )

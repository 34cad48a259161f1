"""`PruneTrainerMixin`: adversarial pruner training on top of LLaVATrainer (or any Hugging Face Trainer).

One optimizer step: the pruned pass with gradient, the unpruned pass from the hidden states recorded before the first
pruner, one summed loss and one backward through the engine; then the discriminator's own step outside of it.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import set_seed

from . import compat, compat_training
from .adaptation import (
    check_same_baseline,
    check_same_pruners,
    check_what_learns,
    drawn_budget,
    kept_metrics,
    save_baseline,
)
from .adversary import Adversary
from .baselines import attach_baseline
from .checkpoint import base_identity, pruner_state_dict, read_description, read_weights, save_pruners, start_from
from .config import PruneConfig
from .guards import check_guards
from .guidance import guidance_of, lessons_of, mean_guidance
from .layout import IGNORE_INDEX, gather_rows, padded_index
from .losses import kl_loss, mean_var_loss, mse_loss
from .objective import budget_terms
from .patch import PruneHandle, attach_pruners, prune_mode
from .replay import Replay, joined
from .resuming import (
    check_same_training,
    is_finished,
    load_beside_lora,
    newest_complete,
    save_beside_lora,
    save_training,
)
from .sampling import SeededSampler
from .schedules import ScheduleValues, schedule
from .soft_attention import check_compilable
from .state import ForwardRecord
from .turns import supervise_one_turn
from .unpruned import UnprunedPass

ADVERSARY_FILE = "adversary.pt"


class _Finished(Exception):
    """A training that is at its end was started again."""


class PruneTrainerMixin:
    """Put before a Trainer class: `class PruneTrainer(PruneTrainerMixin, LLaVATrainer)`.

    Its training arguments carry `prune`, a `PruneConfig`, and may carry LLaVA's `lora_enable`.
    """

    def __init__(self, model: nn.Module, args: Any, **kwargs: Any):
        self.prune: PruneConfig = args.prune
        self.lora = bool(getattr(args, "lora_enable", False))
        _check_processes(args)
        if self.prune.train_base and self.lora:
            raise ValueError("prune_train_base and lora_enable: LoRA keeps the base as it is; give one of them")
        check_what_learns(self.prune, args.prune_start, args.prune_baseline, self.lora)
        base = base_identity(model)
        set_seed(args.seed)  # the host seeds later than the pruners are made
        self.prune_handle = _attach(model, self.prune, args.prune_baseline)
        self.has_pruners = args.prune_baseline is None
        by_masks = self.prune.train_pruners and self.prune.guidance_only_ratio < 1  # guidance alone has no target
        if by_masks and self.prune_handle.vision_tokens is not None:
            self.prune.check_prunes(self.prune_handle.vision_tokens)
        if (args.bf16 or args.fp16) and not args.deepspeed:
            # DeepSpeed keeps fp32 copies of what it trains; without it small steps would be rounded away
            self.prune_handle.pruners.float()
        if args.prune_start is not None:
            description = start_from(model, args.prune_start)
            if not self.prune.train_pruners:
                self._share_as(description)
        state = self.prune_handle.state
        num_layers = self.prune_handle.num_layers
        if self.prune.alignment == "kl":
            state.feature_layers = (num_layers - 1,)
        elif self.prune.alignment != "none":
            state.feature_layers = self.prune.disc_layer_indices(num_layers)
        _set_trainable(model, self.prune_handle.pruners, self.prune, self.lora)
        if self.prune.compile_layers:
            check_compilable(self.prune_handle.decoder)
            zero = getattr(args, "hf_deepspeed_config", None)
            if zero is not None and zero.is_zero3():
                raise ValueError(
                    "compile_layers: ZeRO-3 splits the weights of each layer; use ZeRO-2, or leave it out"
                )
        if self.prune.train_base:
            # what comes out is another model than the one that went in
            model.config.llava_prune_base = Path(args.output_dir).name
        _match_vision_dtype(model, args)
        self._image_token = compat.image_token(model)
        with compat_training.as_model_with_adapters(model):
            super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False  # transformers 5: the trainer divides by the accumulation steps
        self.adversary = None
        if self.prune.alignment == "gan":
            self.adversary = Adversary(
                self.prune_handle.hidden_size, len(state.feature_layers), self.prune, args.device
            )
        self._features: tuple[list[Tensor], list[Tensor], Tensor, Tensor] | None = None
        self._replay = Replay(self.prune.guidance_memory) if self.prune.guidance_replays else None
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)
        self._unpruned = UnprunedPass(self.model, self.prune_handle, self.lora)
        samples = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        self._training = {"seed": args.seed, "base_model": base, "samples": samples}
        self._adapt_engine_once_made()

    # ---- optimizer and data

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The host's optimizer, with pruners and merger in a group of their own learning rate."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if created:
            own = [p for p in self.prune_handle.pruners.parameters() if p.requires_grad]
            ids = {id(p) for p in own}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            if own:
                rates = {"lr": self.prune.pruner_lr, "weight_decay": self.prune.pruner_weight_decay}
                optimizer.add_param_group({"params": own, **rates})
        return optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        return None if sampler is None else SeededSampler(sampler, self.args.seed, self._epoch)

    def _epoch(self) -> int:
        """By the steps taken: the host's own count ends below a whole epoch where batches are left over."""
        loader = self.callback_handler.train_dataloader
        if loader is None:
            return 0
        accumulation = self.args.gradient_accumulation_steps
        return self.state.global_step // compat_training.steps_per_epoch(len(loader), accumulation)

    # ---- one step

    def _schedule(self) -> ScheduleValues:
        return schedule(self.prune, self.state.global_step, self.state.max_steps)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Generator step inside the engine, then the discriminator's outside of it."""
        if 0 < self.state.max_steps <= self.state.global_step:
            raise _Finished  # the host asks only after a step whether there is one left
        values = self._schedule()
        state = self.prune_handle.state
        state.temperature, state.target_ease = values.temperature, values.target_ease
        state.guided, state.prefix_only = values.guidance_weight > 0, values.guidance_only
        state.loss_only = True
        state.target_token_num = drawn_budget(self.prune)
        # the mode must hold through the backward pass, where checkpointed layers run again
        with prune_mode(self.model, values.mode):
            loss = super().training_step(model, inputs, *args, **kwargs)
        state.loss_only = state.guided = state.prefix_only = False
        if not values.guidance_only:
            self._replay = None  # gigabytes
            if self.adversary is not None:
                self._train_adversary()
        state.record, state.target_ease, state.target_token_num = None, 1.0, None
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """All generator terms in one scalar, or the task loss in evaluation; `return_outputs` as in Trainer."""
        if not self.model.training:
            with prune_mode(self.model, "masked" if self.prune.train_pruners else "hard"):
                outputs = model(**inputs, use_cache=False)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        values = self._schedule()
        state = self.prune_handle.state
        inputs = supervise_one_turn(inputs, torch.rand(len(inputs["input_ids"])), self._image_token)
        # a cache would keep every key and value, and 5.x switches it off in the outer config alone
        outputs = model(**inputs, use_cache=False)
        record = state.record
        if values.guidance_only:
            loss = values.guidance_weight * self._guidance_alone(record)
            return (loss, outputs) if return_outputs else loss
        num_layers = self.prune_handle.num_layers
        if self.prune.train_pruners:
            terms, metrics = budget_terms(self.prune, record, num_layers, values.target_ease)
        else:
            terms, metrics = {}, kept_metrics(record, num_layers)
        # the drawn turn may lie behind where the host cuts long samples, and a mean over nothing is nan
        answered = (record.layout.labels != IGNORE_INDEX).any()
        terms["task"] = torch.where(answered, outputs.loss, torch.zeros_like(outputs.loss))
        if state.feature_layers or state.guided:
            real, real_index, shares = self._unpruned(record, inputs)
            if state.guided:
                valid = record.layout.vision_valid
                terms["guidance"] = mean_guidance(record.logits, {k: (share, valid) for k, share in shares.items()})
            if state.feature_layers:
                terms["adversarial"] = self._alignment(record, real, real_index)
        weights = {
            "task": values.task_weight,
            "adversarial": values.adversarial_weight,
            "guidance": values.guidance_weight,
            "sparsity": self.prune.sparsity_weight,
            "token_count": self.prune.token_count_weight,
            "binarization": self.prune.binarization_weight,
        }
        loss = sum(weights[name] * term for name, term in terms.items())
        self._note({f"loss/{name}": term for name, term in terms.items()} | metrics)
        eased = {"prune/temperature": values.temperature, "prune/target_ease": values.target_ease}
        self._note({name: torch.tensor(value) for name, value in eased.items()})
        return (loss, outputs) if return_outputs else loss

    def _guidance_alone(self, record: ForwardRecord) -> Tensor:
        """Guidance of every pruner on the unpruned pass, by what enters its layer there, and on earlier passes."""
        handle = self.prune_handle
        lessons = lessons_of(handle, self.model.get_output_embeddings(), record)
        if self._replay is not None:
            earlier = self._replay.drawn(self.prune.guidance_replays) if len(self._replay) else None
            self._replay.remember(lessons)
            lessons = lessons if earlier is None else joined(lessons, earlier)
        with self.accelerator.autocast():  # the host has it around the model's forward alone
            pruners = {layer: handle.scorers[layer].pruner for layer in lessons}
            term = guidance_of(pruners, lessons, self.prune.compile_layers)
        self._note({"loss/guidance": term, "prune/with_image": (record.layout.vision_counts > 0).any()})
        return term

    def _alignment(self, record: ForwardRecord, real_features: dict[int, Tensor], real_index: Tensor) -> Tensor:
        """The term that holds pruned text hidden states (or logits) to the unpruned ones."""
        config, state = self.prune, self.prune_handle.state
        index, mask = padded_index(record.layout.text_after_image)
        fake = [gather_rows(record.features[layer], index) for layer in state.feature_layers]
        real = [gather_rows(real_features[layer], real_index) for layer in state.feature_layers]
        if config.alignment == "mse":
            return mse_loss(fake, real, mask)
        if config.alignment == "mean_var":
            return mean_var_loss(fake, real, mask)
        if config.alignment == "kl":
            head, norm = self.model.get_output_embeddings(), self.prune_handle.decoder.norm
            with torch.no_grad():
                real_logits = head(norm(real[-1]))
            return kl_loss(head(norm(fake[-1])), real_logits, mask)
        weights = (record.layout.vision_counts > 0).float()
        self._features = (real, [x.detach() for x in fake], mask, weights)
        return self.adversary.generator_loss(real, fake, mask, weights)

    def _train_adversary(self) -> None:
        if self._features is not None:
            real, fake, mask, weights = self._features
            self._features = None
            metrics = self.adversary.accumulate(real, fake, mask, weights, self.args.gradient_accumulation_steps)
            self._note({f"gan/{name}": value for name, value in metrics.items()})
        if self.accelerator.sync_gradients:
            stepped = self.adversary.step()
            self._note({"gan/d_stepped": torch.tensor(float(stepped))})

    # ---- logging and guards

    def _note(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._metrics[name].append(value.detach().float())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the metrics noted since the last call, averaged over steps and ranks, and checks the guards."""
        metrics = {}
        if "loss" in logs and self._metrics:
            names = list(self._metrics)
            device = self.args.device
            averages = torch.stack([torch.stack([v.to(device) for v in self._metrics[n]]).mean() for n in names])
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(averages)
                averages /= dist.get_world_size()
            metrics = _ratios_of_images(dict(zip(names, averages.tolist(), strict=True)))
            metrics = {name: round(value, 6) for name, value in metrics.items()}
            self._metrics.clear()
        super().log({**logs, **metrics}, *args, **kwargs)
        # exact counts are set, not learned
        if "prune/keep_ratio" in metrics and self.prune.selection == "threshold":
            ratios = [metrics[f"prune/keep_ratio_l{layer}"] for layer in self.prune.pruning_layers]
            self.prune_handle.state.keep_fractions = tuple(ratios)
        if metrics:
            check_guards(self.prune, self.state.log_history, self.prune_handle.num_layers, self.args.output_dir)

    # ---- saving and resuming

    def _adapt_engine_once_made(self) -> None:
        """Have DeepSpeed save trainable parameters only, since the base is loaded from its own files."""
        prepare = self.accelerator.prepare

        def prepare_and_bind(*args: Any, **kwargs: Any) -> Any:
            with compat_training.as_model_with_adapters(self.model):
                prepared = prepare(*args, **kwargs)
            for item in prepared if isinstance(prepared, tuple) else (prepared,):
                if hasattr(item, "save_checkpoint") and hasattr(item, "load_checkpoint"):
                    compat_training.exclude_frozen_parameters(item)
                    compat_training.leave_accumulation_to_the_engine(item)
            return prepared

        self.accelerator.prepare = prepare_and_bind

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train as the host does, then save the pruners to the output directory; arguments as in Trainer.

        `resume_from_checkpoint=True` goes on from the newest complete checkpoint in the output directory, if there is
        one.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(self.args.output_dir)
        if resume_from_checkpoint:
            check_same_training(resume_from_checkpoint, self._training)
            if not self.prune.train_pruners:
                self._check_adapted_to_the_same(resume_from_checkpoint)
            if is_finished(resume_from_checkpoint, self.args):
                self.args.ignore_data_skip = True  # all of it would be read for nothing
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except _Finished:
            result, self.is_in_train = None, False  # as the host leaves its loop
        self._save_pruners(self.args.output_dir)
        # LLaVA's LoRA saving collects whatever is trainable; the pruners have a file of their own
        self.prune_handle.pruners.requires_grad_(False)
        return result

    def _check_adapted_to_the_same(self, checkpoint: str) -> None:
        if self.has_pruners:
            check_same_pruners(checkpoint, pruner_state_dict(self.prune_handle))
        else:
            check_same_baseline(checkpoint, self.args.prune_baseline, self.prune.target_token_num)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Pruners, and what else was trained: the whole base, or an adapter that DeepSpeed does not save."""
        output_dir = output_dir or self.args.output_dir
        if self.prune.train_base and not self.lora or self.lora and not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        if self.lora and not self.is_deepspeed_enabled and self.args.should_save:
            save_beside_lora(self.model, output_dir)
        self._save_pruners(output_dir)

    def _save_pruners(self, output_dir: str) -> None:
        if self.has_pruners:
            save_pruners(self.model, output_dir, write=self.args.should_save)
        elif self.args.should_save:
            save_baseline(output_dir, self.args.prune_baseline, self.prune.target_token_num)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {k: v for k, v in state_dict.items() if ".llava_pruners." not in k})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_training(output_dir, self._training)
        if self.adversary is not None and self.args.should_save:
            torch.save(self.adversary.state_dict(), Path(output_dir) / ADVERSARY_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._take_up(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.adversary is not None:
            path = Path(checkpoint) / ADVERSARY_FILE
            if not path.is_file():
                raise FileNotFoundError(
                    f"{checkpoint} has no {ADVERSARY_FILE}: it was not written by this training, or with another "
                    "alignment than 'gan'; remove it or use another output_dir"
                )
            self.adversary.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))

    def _take_up(self, checkpoint: str) -> None:
        """Go on from what a checkpoint says of its pruners; one of other settings must not be gone on with."""
        if not self.has_pruners:
            return
        description = read_description(checkpoint)
        written, now = description["prune_config"], self.prune.to_dict()
        changed = sorted(name for name in now if written.get(name) != now[name])
        if changed:
            raise ValueError(
                f"{checkpoint} was written with other settings of {changed}: use another output_dir, or remove the "
                "checkpoints to train anew"
            )
        self._share_as(description)

    def _share_as(self, description: dict[str, Any]) -> None:
        """Layers share exact budgets as those of a checkpoint did late in its training."""
        fractions = description.get("keep_fractions")
        self.prune_handle.state.keep_fractions = None if fractions is None else tuple(fractions)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with compat_training.loading_numpy_random_state():
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Only called without DeepSpeed."""
        if self.prune.train_base or self.lora:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.lora:
            load_beside_lora(self.model, resume_from_checkpoint)
        if self.has_pruners:
            self.prune_handle.pruners.load_state_dict(read_weights(resume_from_checkpoint))


def _attach(model: nn.Module, config: PruneConfig, baseline: str | None) -> PruneHandle:
    """What keeps tokens in the training: pruners, or a baseline that LoRA is adapted to."""
    if baseline is None:
        return attach_pruners(model, config)
    return attach_baseline(model, baseline, config.target_token_num)


def _check_processes(args: Any) -> None:
    """Raises ValueError for what several GPUs can not do without DeepSpeed."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process would spread the model over {args.n_gpu} GPUs by DataParallel, which copies what is bound: "
            "start one process a GPU (torchrun or deepspeed), or set CUDA_VISIBLE_DEVICES to one"
        )
    if args.world_size > 1 and not args.deepspeed and args.prune.guidance_only_ratio > 0:
        raise ValueError("guidance alone trains several processes under DeepSpeed only: add --deepspeed zero2.json")


def _ratios_of_images(metrics: dict[str, float]) -> dict[str, float]:
    """Averaged metrics with ratios and accuracies of the batches that had an image, left out if none had."""
    share = metrics.pop("prune/with_image")
    ratios = ("prune/keep_ratio", "prune/target_ratio", "prune/kept_share", "gan/d_acc")
    kept = {name: value for name, value in metrics.items() if share or not name.startswith(ratios)}
    return {name: value / share if name.startswith(ratios) else value for name, value in kept.items()}


def _set_trainable(model: nn.Module, pruners: nn.Module, config: PruneConfig, lora: bool) -> None:
    """Freeze the base unless it is to be trained; LoRA keeps what LLaVA made trainable."""
    flags = {name: parameter.requires_grad for name, parameter in pruners.named_parameters()}
    if not config.train_base and not lora:
        model.requires_grad_(False)
        if getattr(model, "_require_grads_hook", None) is not None:
            # gradients through frozen layers before the first pruner would keep their activations for nothing
            model.disable_input_require_grads()
    elif config.train_base and compat.find_llava(model) is None:
        compat.vision_modules(model)[0].requires_grad_(False)  # as LLaVA does by itself
    for name, parameter in pruners.named_parameters():
        parameter.requires_grad_(flags[name] and config.train_pruners)


def _match_vision_dtype(model: nn.Module, args: Any) -> None:
    """LLaVA casts the vision tower to fp16 when the run is fp32; give it the run's precision."""
    llava = compat.find_llava(model)
    if llava is not None and not (args.fp16 or args.bf16) and llava.get_vision_tower() is not None:
        llava.get_vision_tower().float()

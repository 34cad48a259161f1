"""Trains the testbed's tiny LLaVA from scratch: `python -m llava_prune.testbed.make_base --out DIR`.

Vision tower, projector and language model learn together, from nothing, to answer questions about mosaics; the loss is
on the answers alone. In the first part of training each patch must also tell the shape and color of the cell it lies
in, through a linear head that is then thrown away: it gives the language model features worth reading early. Meant for
one GPU, a few minutes; `--steps 2` tries it on a CPU. Of the training pictures 400 are held back, to see how it goes;
the test pictures are not touched.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from .base_data import GRID, Conversations, paint_batch
from .base_model import PATCH, PIXELS, BaseSize, build_base, save_base
from .pictures import COLORS, SHAPES, load_pictures
from .questions import KINDS
from .tokens import conversation_ids

HELD_BACK = 400
WARMUP = 0.03
PATCH_LOSS_ENDS = 0.4


class Trainee(nn.Module):
    """The model with the sequence that LLaVA would build for it, at fixed lengths, and a tower that learns.

    Args:
        model: a `LlavaLlamaForCausalLM` with its tower loaded.
        opening: ids before the picture.
    """

    def __init__(self, model: nn.Module, opening: list[int]):
        super().__init__()
        self.model = model
        self.patch_head = nn.Linear(model.config.mm_hidden_size, len(SHAPES) + len(COLORS))
        self.register_buffer("opening", torch.tensor(opening), persistent=False)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the sequence of the opening, the picture's 144 tokens and `ids`.

        Args:
            pixels: (B, 3, 192, 192), normalised.
            ids: (B, T) the text after the picture.

        Returns:
            The logits that predict `ids`, (B, T, vocabulary), and those of each patch's shape and color, (B, 144, 11).
        """
        tower, core = self.model.get_vision_tower(), self.model.get_model()
        # The tower's own forward is under no_grad.
        features = tower.feature_select(tower.vision_tower(pixels, output_hidden_states=True))
        text = core.embed_tokens(ids)
        before = core.embed_tokens(self.opening).expand(len(ids), -1, -1)
        embeds = torch.cat([before, core.mm_projector(features).to(text.dtype), text], dim=1)
        hidden = core(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[:, -ids.shape[1] - 1 : -1]), self.patch_head(features)


def learning_rate(progress: float) -> float:
    """Share of the peak at `progress` in [0, 1]: a linear warm-up, then half a cosine down to 0."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


def patch_targets(labels: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape and color index of each patch, (B, 144) each, from `labels` (N, 2) and `cells` (B, 9)."""
    rows, columns = GRID
    side = PIXELS // PATCH
    places = torch.arange(side, device=cells.device)
    cell_of = (places * rows // side)[:, None] * columns + (places * columns // side)[None]
    both = labels[cells[:, cell_of.flatten()]]
    return both[..., 0], both[..., 1]


def losses(text_logits, patch_logits, ids, answers, shapes, colors) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the answer tokens, and over the patches' shapes and colors."""
    targets = ids.masked_fill(~answers, -100)
    text = functional.cross_entropy(text_logits.float().flatten(0, 1), targets.flatten())
    shape_logits, color_logits = patch_logits.float().flatten(0, 1).split([len(SHAPES), len(COLORS)], dim=-1)
    patch = functional.cross_entropy(shape_logits, shapes.flatten())
    return text, patch + functional.cross_entropy(color_logits, colors.flatten())


@torch.no_grad()
def accuracy(trainee, images, batches, processor, autocast) -> dict[str, float]:
    """Share of first turns whose every answer token, `</s>` included, is the likeliest: "all", and by kind."""
    right, kinds = [], []
    for cells, ids, answers, kind in batches:
        with autocast():
            logits, _ = trainee(paint_batch(images, cells, processor, flip=False), ids)
        right.append(((logits.argmax(-1) == ids) | ~answers).all(-1))
        kinds.append(kind)
    right, kinds = torch.cat(right).float(), torch.cat(kinds)
    result = {"all": right.mean().item()}
    return result | {name: right[kinds == index].mean().item() for index, name in enumerate(KINDS)}


def train(args: argparse.Namespace) -> None:
    """Builds, trains and saves the model; writes `training.json` beside it, what was run and how it went."""
    began = time.monotonic()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)

    pictures = load_pictures("train")
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.tensor(
        [(SHAPES.index(shape), COLORS.index(color)) for shape, color in pictures.labels], device=device
    )
    limit = len(images) - HELD_BACK
    learned = {label: [i for i in group if i < limit] for label, group in pictures.by_label().items()}
    held_back = {label: [i for i in group if i >= limit] for label, group in pictures.by_label().items()}

    model, tokenizer = build_base(args.out, BaseSize())
    model.requires_grad_(True)
    processor = model.get_vision_tower().image_processor
    opening, turn = conversation_ids(tokenizer)
    trainee = Trainee(model, opening).to(device)
    run = torch.compile(trainee) if args.compile else trainee
    check_stream = iter(Conversations(held_back, turn, args.batch_size, 1, args.seed))
    checks = [[x.to(device) for x in next(check_stream)] for _ in range(math.ceil(args.check_size / args.batch_size))]
    stream = DataLoader(
        Conversations(learned, turn, args.batch_size, args.most_turns, args.seed),
        batch_size=None,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=8 if args.workers else None,
    )
    optimizer = torch.optim.AdamW(
        trainee.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05, fused=device.type == "cuda"
    )

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    log, report_at, loss, patch_loss = [], 0.0, torch.zeros(()), torch.zeros(())
    for step, batch in enumerate(stream):
        minutes = (time.monotonic() - began) / 60
        progress = step / args.steps if args.steps else minutes / args.minutes
        if minutes >= report_at or progress >= 1:
            log.append({"step": step, "minutes": minutes, "loss": loss.item(), "patch_loss": patch_loss.item()})
            log[-1] |= accuracy(trainee, images, checks, processor, autocast)
            log[-1] = {name: round(value, 4) for name, value in log[-1].items()}
            print(json.dumps(log[-1]), flush=True)
            report_at = minutes + args.report_minutes
        if progress >= 1:
            break
        cells, ids, answers, _ = (x.to(device, non_blocking=True) for x in batch)
        with autocast():
            text_logits, patch_logits = run(paint_batch(images, cells, processor, flip=True), ids)
        loss, patch_loss = losses(text_logits, patch_logits, ids, answers, *patch_targets(labels, cells))
        (loss + max(0.0, 1 - progress / PATCH_LOSS_ENDS) * patch_loss).backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    save_base(model, args.out)
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    (args.out / "training.json").write_text(json.dumps({"arguments": arguments, "log": log}, indent=1) + "\n")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults made the shipped checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.8, help="wall clock; the learning rate reaches 0 then")
    parser.add_argument("--steps", type=int, default=None, help="train this many steps instead")
    parser.add_argument("--lr", type=float, default=7e-4, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=256, help="conversations a step")
    parser.add_argument("--most-turns", type=int, default=3, help="questions about one mosaic, 1 to this many")
    parser.add_argument("--check-size", type=int, default=2048, help="held-back questions asked at each report")
    parser.add_argument("--report-minutes", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=4, help="processes that make questions")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse_args())

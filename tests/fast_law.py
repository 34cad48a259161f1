"""The accelerated decoder is the plain one: same tokens, same report; both stacks use these assertions."""

import torch
from law import GENERATION, randomise_pruners

from llava_prune import attach_pruners, last_report, prune_mode
from llava_prune.fast import accelerate

FACTORS = {
    "batch": (1, 3),
    "padding": ("none", "left", "right"),
    "images": ("0", "1", "2", "mixed"),
    "selection": ("threshold", "topk"),
    "residual": (False, True),
    "first": (1, 0),  # pruning layer
    "how": tuple(GENERATION),
}
NEW_TOKENS = 64
SMALL = {"room": 16, "bucket": 4, "emulate": True}  # so that caches must grow and shapes change


@torch.no_grad()
def assert_fast_is_plain(model, config, inputs, generate, how, ends_in_padding):
    """In origin and hard, twice each, so that the second time everything is replayed.

    Batches that end in padding are left to the plain path, with a warning.
    """
    handle = attach_pruners(model, config)
    randomise_pruners(handle)
    plain = {mode: _answer(model, mode, inputs, generate, how) for mode in ("origin", "hard")}
    with accelerate(model, **SMALL) as fast:
        for mode in ("origin", "hard", "origin", "hard"):
            found = _answer(model, mode, inputs, generate, how)
            for name, value in plain[mode].items():
                _assert_same(found[name], value, (mode, name))
        assert len(fast.graphs) > 0 or ends_in_padding
    assert "forward" not in handle.decoder.__dict__
    _assert_same(_answer(model, "hard", inputs, generate, how)["tokens"], plain["hard"]["tokens"], "removed")


def _answer(model, mode, inputs, generate, how):
    """What a call and a generation give; logits at text positions alone, since the others are nobody's."""
    with prune_mode(model, mode) as handle:
        logits = model(**inputs).logits
        record = handle.state.record
        valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        if record is not None:
            text = record.layout.text
        elif logits.shape[1] == valid.shape[1]:
            text = valid
        else:  # LLaVA's own stack, origin of a padded batch
            text = None
        torch.manual_seed(0)
        settings = {**GENERATION[how], "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        tokens = generate(model, inputs, settings)
        result = {"tokens": tokens, "logits": None if text is None else logits[text]}
        if mode == "hard" and record is not None:
            report = last_report(model)
            result["tokens_per_layer"] = report.tokens_per_layer
            for layer, rows in report.kept.items():
                result[f"kept {layer}"] = torch.cat(rows)
            for layer, rows in report.probabilities.items():
                result[f"probabilities {layer}"] = torch.cat(rows)
        return result


def _assert_same(found, expected, label):
    if expected is None:
        return
    if expected.is_floating_point():
        torch.testing.assert_close(
            found, expected, atol=1e-4, rtol=1e-4, equal_nan=True, msg=lambda m: f"{label}: {m}"
        )
    else:
        assert torch.equal(found, expected), label

"""The law on a GPU: what masked and hard must share, in any dtype and on any backend."""

import torch

from llava_prune import last_report, prune_mode
from llava_prune.bench.decisions import keeping
from llava_prune.masks import keep_probability

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
MARGIN = {torch.float32: 0.0, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def assert_keep_all_is_stock(model, handle, inputs, stock):
    """Fresh pruners keep everything: every mode gives the logits `stock`, bit for bit."""
    for mode in ("origin", "masked", "hard"):
        with prune_mode(model, mode):
            logits = model(**inputs).logits
            text = handle.state.record.layout.text
            assert torch.equal(logits[text], stock[text]), mode


def assert_decided_alike(plain, other, dtype):
    """The first pruner, which sees the same on both paths, finds the same probabilities, up to the dtype."""
    first = min(plain.probabilities, default=None)
    if first is not None:
        difference = (plain.probabilities[first] - other.probabilities[first]).abs().nan_to_num().max()
        assert difference <= max(MARGIN[dtype], 1e-5), difference


def assert_masked_equals_hard(model, handle, inputs, dtype, label):
    """Same tokens at every layer and, with the same tokens, the same text logits, up to the dtype.

    In half precision a matrix product over fewer rows may round otherwise, so a later pruner may decide otherwise
    about a token whose keep probability lies on the threshold: of few tokens that are left, one changes the logits.
    """
    logits, records = {}, {}
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            logits[mode] = model(**inputs).logits.float()
            records[mode] = handle.state.record
            tokens = last_report(model).tokens_per_layer
    flipped = torch.zeros_like(records["hard"].layout.vision_valid)
    for layer, kept in records["masked"].kept.items():
        others = (kept != records["hard"].kept[layer]) & ~flipped  # what is gone stays gone
        margin = (keep_probability(records["masked"].logits[layer]) - handle.config.threshold).abs()
        assert (margin[others] <= MARGIN[dtype]).all(), (layer, margin[others].tolist())
        flipped |= others
    if flipped.any():
        with keeping(handle, records["hard"].kept):
            logits["masked"] = model(**inputs).logits.float()
    text = records["hard"].layout.text
    difference = (logits["masked"] - logits["hard"])[text].abs().max() / logits["masked"][text].abs().max()
    print(
        f"{label} {dtype}: relative difference {difference:.1e}, {int(flipped.sum())} flips, tokens {tokens.tolist()}"
    )
    assert (tokens[:, -1] < tokens[:, 0]).any(), "nothing was pruned"
    assert difference < TOLERANCE[dtype]

"""What the budget losses move."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava_prune import PruneConfig
from llava_prune.layout import TokenLayout
from llava_prune.objective import budget_terms

CONFIG = PruneConfig(pruning_layers=(1, 3), target_sparsity=0.5)
LAYERS, TOKENS = 8, 4


@pytest.mark.parametrize("credit", ["all", "own"])
def test_a_pruner_answers_for_its_layers_or_for_all_after_it(credit):
    """Layers 1 and 2 see the first pruner's mask, 3 to 7 both."""
    vision = torch.ones(1, TOKENS, dtype=torch.bool)
    layout = TokenLayout.build(vision, vision, torch.tensor([1]))
    first, second = (torch.tensor([[0.9, 0.8, 0.7, 0.6]]).requires_grad_() for _ in range(2))
    both = first * second
    masks = {1: first, 3: both}
    record = SimpleNamespace(
        layout=layout,
        masks=masks,
        charged={1: first, 3: first.detach() * second},
        kept={layer: mask > 0.5 for layer, mask in masks.items()},
    )
    terms, metrics = budget_terms(replace(CONFIG, budget_credit=credit), record, LAYERS, 1.0)
    kept = metrics["prune/keep_ratio"]
    assert kept == pytest.approx(float((1 + 2 * first.mean() + 5 * both.mean()) / LAYERS))
    terms["sparsity"].backward()
    unit = 2 * (kept - 0.5) / (LAYERS * TOKENS)  # of the squared distance, for one token of one layer
    torch.testing.assert_close(second.grad, unit * 5 * first.detach())
    of_first = 2 + 5 * second.detach() if credit == "all" else torch.full_like(first, 2.0)
    torch.testing.assert_close(first.grad, unit * of_first.detach())

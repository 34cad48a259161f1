"""What a layer's pruner looks at."""

import pytest
import torch

from llava_prune import PruneConfig
from llava_prune.pruner import LayerPruner


@pytest.mark.parametrize("use_question", [True, False])
@torch.no_grad()
def test_only_a_pruner_that_uses_the_question_depends_on_it(use_question):
    torch.manual_seed(0)
    sizes = {"pruner_rank": 8, "pruner_dim": 16, "pruner_heads": 2, "use_question": use_question}
    pruner = LayerPruner(24, PruneConfig(pruning_layers=(1,), target_token_num=4, **sizes))
    vision, questions = torch.randn(1, 5, 24).expand(3, -1, -1), torch.randn(3, 4, 24)
    valid = torch.tensor([[True] * 4, [True] * 4, [False] * 4])
    logits = pruner(vision, questions, valid)
    assert torch.equal(logits[0], logits[1]) == torch.equal(logits[0], logits[2]) == (not use_question)
    assert torch.allclose(logits[2], pruner(vision, questions[:, :0], valid[:, :0])[2], atol=1e-6)

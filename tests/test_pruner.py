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


def test_no_logit_settles():
    """However large the last layer grows, and the attention residual with it: a keep logit can still be moved."""
    torch.manual_seed(0)
    sizes = {"pruner_rank": 8, "pruner_dim": 16, "pruner_heads": 2, "use_attn_residual": True, "init_keep_logit": 2.5}
    pruner = LayerPruner(24, PruneConfig(pruning_layers=(1,), target_token_num=4, logit_cap=3.0, **sizes))
    vision, question, valid = torch.randn(2, 5, 24), torch.randn(2, 4, 24), torch.ones(2, 4, dtype=torch.bool)

    def margin(residual=0.0):
        logits = pruner(vision, question, valid, torch.full((2, 5), residual))
        return logits[..., 1] - logits[..., 0]

    assert torch.allclose(margin(), torch.tensor(2.5), atol=0.1)
    with torch.no_grad():
        pruner.joint_logits.weight.mul_(1000)
    assert margin(3.0).abs().max() <= 3.0 and margin().std() > 1

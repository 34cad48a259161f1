"""A run that has collapsed stops with a message; one odd batch does not stop it."""

import pytest

from llava_prune import PruneConfig, trainer
from llava_prune.guards import TrainingCollapsed, check_guards


def check(task=None, kept=None, ease=None):
    """Run the guards over logged task losses and keep ratios, target about 0.25 and floor 0.125."""
    length = len(task or kept)
    logs = [
        {
            "step": i,
            "loss/task": t,
            "prune/keep_ratio": k,
            "prune/target_ratio": 0.25 + 0.001 * (i % 3),
            "prune/target_ease": e,
        }
        for i, (t, k, e) in enumerate(
            zip(task or [0.1] * length, kept or [0.25] * length, ease or [1.0] * length, strict=True)
        )
    ]
    config = PruneConfig(pruning_layers=(1,), target_token_num=36, guard_patience=3)
    check_guards(config, [{"epoch": 1}, *logs], num_layers=8, output_dir="out")


def test_a_healthy_run_and_an_odd_batch_go_on():
    check(task=[0.1] * 20)
    check(task=[0.1, 0.1, 9.0, 0.2, 9.0, 9.0, 0.3])
    check(kept=[1.0, 0.9, 0.5, 0.3, 0.12, 0.25])
    check(kept=[1.0] * 8, ease=[0.0, 0.1, 0.4, 1.0, 1.0, 1.0, 1.0, 1.0])
    check(kept=[0.99 - 0.002 * i for i in range(6)])


def test_a_collapse_stops_with_what_to_do():
    with pytest.raises(TrainingCollapsed, match="task loss.*Lower pruner_lr"):
        check(task=[0.1, 0.2, 0.1, 9.0, 9.0, 9.0])
    with pytest.raises(TrainingCollapsed, match="keep ratio collapsed"):
        check(kept=[1.0, 0.5, 0.3, 0.126, 0.126, 0.126])
    with pytest.raises(TrainingCollapsed, match="nothing is pruned. Raise sparsity_weight"):
        check(kept=[1.0, 0.99, 0.99, 0.99, 0.99, 0.99, 0.99])


@pytest.mark.parametrize("name", ["loss/task", "loss/guidance"])
def test_a_loss_that_is_lost_stops_too_and_one_odd_batch_does_not(name):
    config = PruneConfig(pruning_layers=(1,), target_token_num=36, guard_patience=3)

    def check(*losses):
        logs = [{"step": i, name: loss} for i, loss in enumerate(losses)]
        check_guards(config, logs, num_layers=8, output_dir="out")

    check(0.1, float("nan"), float("inf"), 0.1)
    with pytest.raises(TrainingCollapsed, match="loss at step 3 is nan, .* 3 logs .*Lower pruner_lr"):
        check(0.1, float("nan"), float("inf"), float("nan"))


def test_logs_without_an_image_are_no_collapse():
    ratios = trainer._ratios_of_images(
        {"loss/task": 1.0, "prune/keep_ratio": 0.2, "prune/target_ratio": 0.1, "prune/with_image": 0.5}
    )
    assert ratios == {"loss/task": 1.0, "prune/keep_ratio": 0.4, "prune/target_ratio": 0.2}
    assert trainer._ratios_of_images({"loss/task": 1.0, "prune/keep_ratio_l3": 0.0, "prune/with_image": 0.0}) == {
        "loss/task": 1.0
    }

"""The discriminator, its losses and its step."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llava_prune import PruneConfig
from llava_prune.adversary import Adversary
from llava_prune.discriminator import Discriminator, positions_of
from llava_prune.losses import (
    binarization_loss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    kl_loss,
    mean_var_loss,
    mse_loss,
    sparsity_loss,
    token_count_loss,
)

CONFIG = PruneConfig(target_token_num=200, disc_dim=8, disc_max_accuracy=1.0, disc_lr=1e-2)
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])


def features(seed, layers=2, batch=3, length=5, width=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, width, generator=generator) for _ in range(layers)]


def test_padding_is_not_seen():
    torch.manual_seed(0)
    discriminator = Discriminator(6, 2, CONFIG)
    hidden = features(0)
    other = [torch.where(MASK[..., None], h, torch.full_like(h, 7.0)) for h in hidden]
    assert torch.equal(discriminator(hidden, MASK, noise=False), discriminator(other, MASK, noise=False))


def test_noise_is_relative_and_larger_on_early_tokens():
    config = PruneConfig(target_token_num=200, noise_scale_start=1.0, noise_scale_end=0.0, disc_dim=4)
    torch.manual_seed(0)
    discriminator = Discriminator(6, 1, config)
    seen = []
    discriminator.layers[0] = torch.nn.Identity()
    discriminator.head = torch.nn.Linear(6, 1)
    hidden = [torch.randn(1, 9, 6)]
    mask = torch.ones(1, 9, dtype=torch.bool)
    for scale in (1.0, 100.0):
        torch.manual_seed(1)
        seen.append(discriminator([hidden[0] * scale], mask))
    assert torch.allclose(*seen, atol=1e-4), "the noise must scale with the token"
    assert torch.allclose(positions_of(MASK)[1], torch.tensor([0, 0.5, 1, 1, 1]))
    assert discriminator(hidden, mask, noise=False).equal(discriminator(hidden, mask, noise=False))


def test_late_tokens_weigh_more():
    torch.manual_seed(0)
    discriminator = Discriminator(6, 1, CONFIG)
    hidden = torch.randn(1, 5, 6)
    discriminator.layers[0] = torch.nn.Identity()
    discriminator.head = torch.nn.Linear(6, 1)
    pooled = []
    discriminator.requires_grad_(False)
    for place in range(5):
        one = torch.zeros(1, 5, 6)
        one[0, place] = hidden[0, 0]
        pooled.append(
            (discriminator([one], torch.ones(1, 5, dtype=torch.bool), False) - discriminator.head.bias).abs()
        )
    assert all(a < b for a, b in zip(pooled, pooled[1:], strict=False))
    assert float(pooled[-1] / pooled[0]) == pytest.approx(1.0 / 0.3, rel=1e-3)


def test_spectral_norm_bounds_every_weight():
    config = PruneConfig(target_token_num=200, spectral_norm=True, disc_dim=8)
    discriminator = Discriminator(6, 2, config)
    for _ in range(30):
        discriminator(features(0), MASK)
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.linalg.matrix_norm(module.weight, 2) < 1.05


def by_hand(config, batches, weights, steps_at):
    """The same training of D written out: one loss, one AdamW, gradients averaged over the window."""
    torch.manual_seed(0)
    discriminator = Discriminator(6, 2, config)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=config.disc_lr, weight_decay=0.0)
    for i, (real, fake) in enumerate(batches):
        torch.manual_seed(10 + i)
        real_logits, fake_logits = discriminator(real, MASK), discriminator(fake, MASK)
        if config.gan_loss == "relativistic":
            values = -torch.log(torch.sigmoid(real_logits - fake_logits))
        elif config.gan_loss == "hinge":
            values = (1 - real_logits).clamp(min=0) + (1 + fake_logits).clamp(min=0)
        else:
            values = -torch.log(torch.sigmoid(real_logits)) - torch.log(1 - torch.sigmoid(fake_logits))
        ((values * weights).sum() / weights.sum() / steps_at).backward()
        if (i + 1) % steps_at == 0:
            optimizer.step()
            optimizer.zero_grad()
    return discriminator


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("gan_loss", ["non_saturating", "hinge", "relativistic"])
def test_the_step_equals_one_written_by_hand(gan_loss, accumulation):
    config = PruneConfig(target_token_num=200, disc_dim=8, disc_max_accuracy=1.0, disc_lr=1e-2, gan_loss=gan_loss)
    batches = [(features(2 * i), features(2 * i + 1)) for i in range(4)]
    weights = torch.tensor([1.0, 1.0, 0.0])
    torch.manual_seed(0)
    adversary = Adversary(6, 2, config, torch.device("cpu"))
    for i, (real, fake) in enumerate(batches):
        torch.manual_seed(10 + i)
        adversary.accumulate(real, fake, MASK, weights, accumulation)
        if (i + 1) % accumulation == 0:
            assert adversary.step()
    reference = by_hand(config, batches, weights, accumulation)
    for (name, ours), theirs in zip(adversary.discriminator.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


@pytest.mark.parametrize("gan_loss", ["non_saturating", "hinge", "relativistic"])
def test_the_generator_term_moves_the_fake_and_not_the_discriminator(gan_loss):
    adversary = Adversary(6, 2, replace(CONFIG, gan_loss=gan_loss), torch.device("cpu"))
    fake = [x.requires_grad_() for x in features(1)]
    adversary.generator_loss(features(0), fake, MASK, torch.ones(3)).backward()
    assert all(x.grad.abs().sum() > 0 for x in fake)
    assert all(p.grad is None and p.requires_grad for p in adversary.discriminator.parameters())


def test_the_gradient_penalty_is_the_squared_gradient():
    """D(x) = w . mean(x) has the gradient w / S at every position."""
    weight, inputs = torch.tensor([3.0, 4.0]), [torch.randn(2, 5, 2, requires_grad=True) for _ in range(2)]
    logits = sum((x.mean(1) * weight).sum(-1) for x in inputs)
    penalty = gradient_penalty(logits, inputs, torch.tensor([1.0, 0.0]))
    assert penalty == pytest.approx(0.5 * 2 * 25 / 5, rel=1e-5)


def test_a_penalised_discriminator_is_flatter_and_still_learns():
    real, fake = features(0), [x + 1 for x in features(1)]
    slopes, accuracies = [], []
    for penalty in (0.0, 3.0):
        torch.manual_seed(0)
        config = replace(CONFIG, gradient_penalty=penalty, gan_loss="relativistic")
        adversary = Adversary(6, 2, config, torch.device("cpu"))
        for _ in range(60):
            metrics = adversary.accumulate(real, fake, MASK, torch.ones(3))
            adversary.step()
        inputs = [x.requires_grad_() for x in features(1)]
        adversary.discriminator(inputs, MASK, noise=False).sum().backward()
        slopes.append(sum(x.grad.square().sum() for x in inputs))
        accuracies.append(metrics["d_acc_real"])
    assert slopes[1] < slopes[0] / 2 and accuracies == [1.0, 1.0]


def test_the_relativistic_loss_compares_within_a_sample():
    real, fake = torch.tensor([5.0, -5.0]), torch.tensor([4.0, -6.0])
    both = torch.ones(2)
    assert generator_loss(fake, both, "relativistic", real) == pytest.approx(F.softplus(torch.tensor(1.0)))
    assert discriminator_loss(real, fake, both, "relativistic") == pytest.approx(F.softplus(torch.tensor(-1.0)))


def test_a_discriminator_that_is_too_good_rests():
    config = PruneConfig(target_token_num=200, disc_dim=8, disc_max_accuracy=0.6, disc_lr=0.1)
    torch.manual_seed(0)
    adversary = Adversary(6, 1, config, torch.device("cpu"))
    real, fake = [torch.ones(3, 5, 6) * torch.arange(6)], [-torch.ones(3, 5, 6) * torch.arange(6)]
    stepped = []
    for _ in range(20):
        adversary.accumulate(real, fake, MASK, torch.ones(3))
        stepped.append(adversary.step())
    assert not stepped[-1]


def test_samples_without_an_image_say_nothing_of_how_good_it_is():
    """Beside micro-batches of text alone it still rests, and of those alone it does not move."""
    config = replace(CONFIG, disc_max_accuracy=0.9)
    torch.manual_seed(0)
    adversary = Adversary(6, 1, config, torch.device("cpu"))
    real, fake = [torch.ones(3, 5, 6) * torch.arange(6)], [-torch.ones(3, 5, 6) * torch.arange(6)]
    for _ in range(200):
        adversary.accumulate(real, fake, MASK, torch.ones(3))
        if not adversary.step():
            break
    before = deepcopy(adversary.discriminator.state_dict())
    for weights in (torch.ones(3), torch.zeros(3)):
        metrics = adversary.accumulate(real, fake, MASK, weights, 2)
        assert metrics["d_acc_real"] == weights[0]
    assert not adversary.step(), "it is right of every image"
    adversary.accumulate(fake, real, MASK, torch.zeros(3))
    assert not adversary.step(), "there is nothing to learn"
    assert all(torch.equal(value, before[name]) for name, value in adversary.discriminator.state_dict().items())


def test_state_survives_a_round_trip():
    first, second = (Adversary(6, 2, CONFIG, torch.device("cpu")) for _ in range(2))
    first.accumulate(features(0), features(1), MASK, torch.ones(3))
    first.step()
    second.load_state_dict(deepcopy(first.state_dict()))
    for adversary in (first, second):
        torch.manual_seed(5)
        adversary.accumulate(features(2), features(3), MASK, torch.ones(3))
        adversary.step()
    for a, b in zip(first.discriminator.parameters(), second.discriminator.parameters(), strict=True):
        assert torch.equal(a, b)


def test_losses_on_cases_worked_out_by_hand():
    weights = torch.tensor([1.0, 1.0, 0.0])
    kept, target = torch.tensor([0.2, 0.4, 1.0]), torch.tensor([0.4, 0.4, 0.4])
    assert sparsity_loss(kept, target, weights) == pytest.approx(0.01)
    assert sparsity_loss(kept, target, weights, only_on_excess=True) == 0
    assert sparsity_loss(target + 0.1, target, weights, only_on_excess=True) == pytest.approx(0.01, rel=1e-4)
    assert token_count_loss(kept, target, weights) == pytest.approx(0.1)
    mask = torch.tensor([[0.0, 1.0, 0.5]])
    assert binarization_loss(mask, torch.tensor([[True, True, True]])) == pytest.approx(1 / 3)
    assert binarization_loss(mask, torch.tensor([[True, True, False]])) == 0
    logits = torch.tensor([0.3, -2.0, 9.0])
    assert generator_loss(logits, weights, "hinge") == pytest.approx(0.85)
    assert torch.allclose(generator_loss(logits, weights, "non_saturating"), -F.logsigmoid(logits[:2]).mean())
    assert discriminator_loss(logits, logits, weights, "hinge") == pytest.approx((0.7 + 1.3 + 3.0) / 2)


@pytest.mark.parametrize("loss", [mse_loss, mean_var_loss])
def test_matching_losses_vanish_only_at_the_target_and_ignore_padding(loss):
    real = features(0)
    same = [torch.where(MASK[..., None], h, h + 3) for h in real]
    assert loss(same, real, MASK) < 1e-9
    assert loss(features(1), real, MASK) > 1e-2


def test_kl_is_that_of_torch():
    real, fake = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    expected = F.kl_div(fake.log_softmax(-1)[MASK], real.log_softmax(-1)[MASK], log_target=True, reduction="batchmean")
    assert torch.allclose(kl_loss(fake, real, MASK), expected, atol=1e-6)

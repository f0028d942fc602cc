"""Losses against closed forms and numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prefopt import objectives


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class TestDPO:
    chosen = torch.tensor([-10.0, -20.0], requires_grad=True)
    rejected = torch.tensor([-12.0, -18.0], requires_grad=True)
    reference_chosen = torch.tensor([-11.0, -20.0])
    reference_rejected = torch.tensor([-11.0, -21.0])

    def test_hand_worked_losses_and_rewards(self) -> None:
        losses, chosen, rejected = objectives.dpo_loss(
            self.chosen, self.rejected, self.reference_chosen, self.reference_rejected, beta=0.5
        )
        # Margins 0.5 * (1 - (-1)) = 1 and 0.5 * (0 - 3) = -1.5.
        assert losses.tolist() == pytest.approx([-math.log(sigmoid(1.0)), -math.log(sigmoid(-1.5))])
        assert chosen.tolist() == pytest.approx([0.5, 0.0])
        assert rejected.tolist() == pytest.approx([-0.5, 1.5])

    def test_is_ln_two_where_policy_and_reference_agree(self) -> None:
        logps = torch.tensor([-3.0])
        losses, chosen, rejected = objectives.dpo_loss(logps, 2 * logps, logps, 2 * logps, beta=0.1)
        assert losses.item() == pytest.approx(math.log(2))
        assert (chosen - rejected).item() == 0

    def test_gradient_is_the_papers(self) -> None:
        losses, _, _ = objectives.dpo_loss(
            self.chosen, self.rejected, self.reference_chosen, self.reference_rejected, beta=0.5
        )
        # Section 4: -beta * sigmoid(r_l - r_w) on log pi(y_w), the opposite on log pi(y_l).
        gradients = torch.autograd.grad(losses.sum(), [self.chosen, self.rejected])
        expected = [-0.5 * sigmoid(-1.0), -0.5 * sigmoid(1.5)]
        assert gradients[0].tolist() == pytest.approx(expected)
        assert gradients[1].tolist() == pytest.approx([-g for g in expected])

    def test_label_smoothing_is_the_mixture_of_both_labels(self) -> None:
        losses, _, _ = objectives.dpo_loss(
            self.chosen, self.rejected, self.reference_chosen, self.reference_rejected, 0.5, label_smoothing=0.1
        )
        expected = -0.9 * math.log(sigmoid(1.0)) - 0.1 * math.log(sigmoid(-1.0))
        assert losses[0].item() == pytest.approx(expected)

    def test_ipo_by_hand(self) -> None:
        losses, chosen, rejected = objectives.ipo_loss(
            *(self.chosen, self.rejected, self.reference_chosen, self.reference_rejected),
            chosen_lengths=torch.tensor([2, 4]),
            rejected_lengths=torch.tensor([2, 3]),
            beta=0.25,
        )
        # Averaged log-ratios: 1/2 - (-1)/2 = 1 and 0 - 3/3 = -1; the target is 1 / (2 * 0.25) = 2.
        assert losses.tolist() == pytest.approx([1.0, 9.0])
        assert chosen.tolist() == pytest.approx([0.125, 0.0])
        assert rejected.tolist() == pytest.approx([-0.125, 0.25])


def pairs_of(*logps: float, lengths: tuple[int, int] = (2, 4)) -> objectives.Pairs:
    """One pair: log-probabilities of chosen and rejected under the policy and, where given, the reference."""
    values = [torch.tensor([logp]) for logp in logps] + [None] * (4 - len(logps))
    return objectives.Pairs(*values, *(torch.tensor([length]) for length in lengths))  # type: ignore[arg-type]


class TestOthers:
    """A policy of -4 and -8 on two and four tokens, a reference of -5 and -6: log-ratios 1 and -2, a margin of 3 beta."""

    pairs = pairs_of(-4.0, -8.0, -5.0, -6.0)

    def loss(self, kind: str, beta: float, smoothing: float = 0.0, **values: Any) -> float:
        return objectives.dpo(self.pairs, kind, beta, smoothing, **values).losses.item()  # type: ignore[arg-type]

    def test_hinge_is_zero_beyond_a_margin_of_one(self) -> None:
        assert self.loss("hinge", 0.1) == pytest.approx(1 - 0.3) and self.loss("hinge", 1.0) == 0

    def test_the_robust_loss_is_unbiased_over_flipped_labels(self) -> None:
        """(1 - e) of the loss on a label and e of that on the other label are DPO's loss on the right one."""
        turned = objectives.Pairs(*(self.pairs[i] for i in (1, 0, 3, 2, 5, 4)))
        other = objectives.dpo(turned, "robust", 0.5, 0.2).losses.item()
        assert 0.8 * self.loss("robust", 0.5, 0.2) + 0.2 * other == pytest.approx(-math.log(sigmoid(1.5)))

    def test_smoothed_labels_are_the_mixture_of_both(self) -> None:
        expected = -0.9 * math.log(sigmoid(1.5)) - 0.1 * math.log(sigmoid(-1.5))
        assert self.loss("sigmoid", 0.5, 0.1) == pytest.approx(expected)

    def test_a_likelihood_term_is_of_a_token_of_the_chosen_completion(self) -> None:
        assert self.loss("sigmoid", 0.5, nll_weight=0.25) == pytest.approx(-math.log(sigmoid(1.5)) + 0.25 * 2)
        assert self.loss("ipo", 0.5, nll_weight=1.0) == pytest.approx((0.5 + 0.5 - 1) ** 2 + 2)

    def test_log_ratios_averaged_over_tokens(self) -> None:
        # 1 / 2 - (-2) / 4 = 1.
        assert self.loss("sigmoid", 2.0, length_normalized=True) == pytest.approx(-math.log(sigmoid(2.0)))
        rewards = objectives.dpo(self.pairs, "hinge", 2.0, 0.0, length_normalized=True)
        assert (rewards.chosen_reward.item(), rewards.rejected_reward.item()) == (1.0, -1.0)  # type: ignore[union-attr]

    def test_simpo_by_hand(self) -> None:
        made = objectives.simpo(pairs_of(-4.0, -10.0), beta=2.0, margin=0.5)
        # Mean log-probabilities -2 and -2.5, rewards -4 and -5.
        assert made.losses.item() == pytest.approx(-math.log(sigmoid(1.0 - 0.5)))
        assert (made.chosen_reward.item(), made.rejected_reward.item()) == (-4.0, -5.0)  # type: ignore[union-attr]

    def test_orpo_by_hand(self) -> None:
        # A token's probability is 1/2 in the chosen and 1/5 in the rejected completion: odds of 1 and 1/4.
        made = objectives.orpo(pairs_of(2 * math.log(0.5), 4 * math.log(0.2)), beta=0.5)
        assert made.losses.item() == pytest.approx(math.log(2) - 0.5 * math.log(sigmoid(math.log(4))))
        rewards = (made.chosen_reward.item(), made.rejected_reward.item())  # type: ignore[union-attr]
        assert rewards == pytest.approx((0.5 * math.log(0.5), 0.5 * math.log(0.2)))

    def test_unlikelihood_by_hand_has_no_rewards(self) -> None:
        made = objectives.unlikelihood(pairs_of(-4.0, -10.0), alpha=0.25)
        assert made.losses.tolist() == [4.0 - 2.5]
        assert made.chosen_reward is None and made.rejected_reward is None

    def test_what_is_as_good_as_certain_has_finite_odds(self) -> None:
        """A probability of 1 counts as exp(-1e-6), odds of some 1e6; float32 knows its complement to a tenth."""
        chosen, rejected = torch.tensor([0.0, 0.0, -1.0]), torch.tensor([-1.0, 0.0, 0.0])
        losses = objectives.odds_ratio_loss(chosen, rejected)
        other = -1.0 - math.log(1 - math.exp(-1.0))
        assert losses.tolist() == pytest.approx([0.0, math.log(2), math.log(1e6) - other], abs=0.1)


class TestKTO:
    """Log-ratios of 2 and -1 of desirable completions and of 1 of an undesirable one; a beta of 0.5."""

    ratios = torch.tensor([2.0, -1.0, 1.0], requires_grad=True)
    desirable = torch.tensor([True, True, False])

    def made(self, mean: float) -> tuple[torch.Tensor, torch.Tensor]:
        return objectives.kto(self.ratios, self.desirable, mean, 0.5, desirable_weight=1.5, undesirable_weight=2.0)

    def test_losses_and_margins_by_hand(self) -> None:
        losses, margins = self.made(0.4)
        assert margins.tolist() == pytest.approx([0.5 * 1.6, 0.5 * -1.4, 0.5 * -0.6])
        expected = [1.5 * (1 - sigmoid(0.8)), 1.5 * (1 - sigmoid(-0.7)), 2.0 * (1 - sigmoid(-0.3))]
        assert losses.tolist() == pytest.approx(expected)

    def test_margins_have_the_precision_of_the_log_ratios(self) -> None:
        ratios = torch.tensor([2.0, 1.0], dtype=torch.float64)
        losses, margins = objectives.kto(ratios, torch.tensor([True, False]), 0.4, 0.3, 1.0, 1.0)
        assert margins.tolist() == pytest.approx([0.3 * 1.6, -0.3 * 0.6], rel=1e-14)
        assert losses.tolist() == pytest.approx([sigmoid(-0.3 * 1.6), sigmoid(0.3 * 0.6)], rel=1e-14)

    def test_an_estimate_below_zero_is_zero(self) -> None:
        losses, margins = self.made(-3.0)
        assert margins.tolist() == pytest.approx([1.0, -0.5, -0.5])
        assert losses.tolist() == pytest.approx([1.5 * sigmoid(-1.0), 1.5 * sigmoid(0.5), 2.0 * sigmoid(0.5)])

    def test_gradient_by_hand(self) -> None:
        """-w_D beta s (1 - s) of a desirable completion at s = sigmoid(margin), and the same upwards of another."""
        losses, _ = self.made(0.4)
        (gradient,) = torch.autograd.grad(losses.sum(), self.ratios)
        slope = [sigmoid(margin) * sigmoid(-margin) for margin in (0.8, -0.7, -0.3)]
        assert gradient.tolist() == pytest.approx([-0.75 * slope[0], -0.75 * slope[1], 1.0 * slope[2]])


def test_bradley_terry_by_hand() -> None:
    losses = objectives.bradley_terry_loss(torch.tensor([1.0]), torch.tensor([3.0]))
    assert losses.item() == pytest.approx(math.log(1 + math.e**2))


class TestPPO:
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def test_score_lands_on_the_last_real_token_and_padding_stays_zero(self) -> None:
        rewards = objectives.per_token_rewards(
            scores=torch.tensor([2.0, -1.0]),
            logps=torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 7.0, 7.0]]),
            reference_logps=torch.tensor([[-1.5, -2.0, -2.0], [-1.0, 3.0, 3.0]]),
            mask=self.mask,
            kl_coef=0.1,
        )
        expected = torch.tensor([[-0.05, 0.0, 0.1 + 2.0], [-1.0, 0.0, 0.0]])
        torch.testing.assert_close(rewards, expected)

    def test_gae_by_hand(self) -> None:
        rewards = torch.tensor([[0.0, 0.0, 1.0]])
        values = torch.tensor([[0.5, 0.25, 0.5]])
        mask = torch.ones(1, 3, dtype=torch.bool)
        advantages, returns = objectives.generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
        # delta = [0.125 - 0.5, 0.25 - 0.25, 1 - 0.5]; A2 = 0.5, A1 = 0 + 0.25 * 0.5, A0 = -0.375 + 0.25 * 0.125.
        torch.testing.assert_close(advantages, torch.tensor([[-0.34375, 0.125, 0.5]]))
        torch.testing.assert_close(returns, advantages + values)

    def test_gae_with_lambda_one_is_return_minus_value(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rewards, values = torch.randn(2, 5, 6, generator=generator)
        mask = torch.arange(6) < torch.tensor([[6], [1], [3], [5], [2]])
        rewards = rewards * mask
        advantages, returns = objectives.generalized_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
        to_go = rewards.flip(1).cumsum(1).flip(1)
        torch.testing.assert_close(advantages, (to_go - values) * mask)
        torch.testing.assert_close(returns, to_go * mask)

    def test_padding_does_not_leak_into_gae(self) -> None:
        rewards = torch.tensor([[1.0, 99.0]])
        values = torch.tensor([[0.5, 99.0]])
        mask = torch.tensor([[True, False]])
        advantages, _ = objectives.generalized_advantages(rewards * mask, values, mask, gamma=1.0, lam=0.95)
        torch.testing.assert_close(advantages, torch.tensor([[0.5, 0.0]]))

    def test_gae_of_one_token_is_its_reward_less_its_value(self) -> None:
        mask = torch.ones(1, 1, dtype=torch.bool)
        advantages, returns = objectives.generalized_advantages(
            torch.tensor([[2.0]]), torch.tensor([[0.5]]), mask, gamma=1.0, lam=0.95
        )
        assert (advantages.tolist(), returns.tolist()) == ([[1.5]], [[2.0]])

    def test_whiten_of_two_values_and_of_equal_ones(self) -> None:
        mask = torch.tensor([[True, True, False]])
        white = objectives.whiten(torch.tensor([[1.0, 3.0, 9.0]]), mask)
        assert white.tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0])]
        assert objectives.whiten(torch.full((1, 3), 4.0), mask).tolist() == [[0.0, 0.0, 0.0]]

    def test_whiten_has_mean_zero_and_variance_one_over_the_mask_only(self) -> None:
        values = torch.tensor([[1.0, 2.0, 3.0], [6.0, 50.0, 50.0]])
        white = objectives.whiten(values, self.mask)
        real = white[self.mask]
        assert real.mean().item() == pytest.approx(0, abs=1e-6)
        assert real.var().item() == pytest.approx(1, abs=1e-5)
        assert white[~self.mask].tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "clipped"),
        [
            (1.0, 2.0, -2.0, False),
            (1.5, 2.0, -2.4, True),  # a rise beyond 1.2 earns nothing more
            (0.5, 2.0, -1.0, False),  # but a fall is always paid for
            (0.5, -2.0, 1.6, True),
            (1.5, -2.0, 3.0, False),
        ],
    )
    def test_clipped_surrogate(self, ratio: float, advantage: float, loss: float, clipped: bool) -> None:
        old = torch.tensor([-1.5])
        losses, flags = objectives.ppo_policy_loss(old + math.log(ratio), old, torch.tensor([advantage]), clip=0.2)
        assert losses.item() == pytest.approx(loss)
        assert flags.item() is clipped

    def test_value_loss_takes_the_larger_of_plain_and_clipped(self) -> None:
        values, old, returns = torch.tensor([[2.0, 0.1], [0.0, 0.0], [1.0, 1.0]])
        losses = objectives.ppo_value_loss(values, old, returns, clip=0.2)
        assert losses.tolist() == pytest.approx([0.5 * 1.0, 0.5 * 0.81])
        far = objectives.ppo_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.2)
        assert far.item() == pytest.approx(0.5 * 0.64)
        # From 1 down to 0 a value may go to 0.8 alone.
        below = objectives.ppo_value_loss(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0.0]), clip=0.2)
        assert below.item() == pytest.approx(0.5 * 0.64)


def test_unlikelihood_pushes_the_rejected_completion_down_by_alpha() -> None:
    chosen = torch.tensor([-1.0, -3.0], requires_grad=True)
    rejected = torch.tensor([-2.0, -0.5], requires_grad=True)
    losses = objectives.unlikelihood_loss(chosen, rejected, alpha=0.5)
    assert losses.tolist() == [0.0, 2.75]
    losses.sum().backward()
    assert chosen.grad.tolist() == [-1.0, -1.0]  # type: ignore[union-attr]
    assert rejected.grad.tolist() == [0.5, 0.5]  # type: ignore[union-attr]


def test_unlikelihood_gradient_of_the_logits() -> None:
    """Of one token: -(onehot(chosen) - p) + alpha * (onehot(rejected) - p)."""
    logits = torch.tensor([0.2, -0.4, 0.9], requires_grad=True)
    logps = torch.log_softmax(logits, dim=0)
    objectives.unlikelihood_loss(logps[0], logps[2], alpha=0.1).backward()
    p = torch.softmax(logits.detach(), dim=0)
    expected = -(torch.tensor([1.0, 0, 0]) - p) + 0.1 * (torch.tensor([0, 0, 1.0]) - p)
    assert torch.allclose(logits.grad, expected, atol=1e-6)  # type: ignore[arg-type]


class TestAdaptiveKL:
    """Ziegler et al. 2019, section 2.2."""

    @pytest.mark.parametrize(
        ("kl", "factor"), [(6.0, 1.0), (6.6, 1 + 0.1 * 0.0256), (60.0, 1 + 0.2 * 0.0256), (0.0, 1 - 0.2 * 0.0256)]
    )
    def test_one_step(self, kl: float, factor: float) -> None:
        assert objectives.adapted_kl_coef(0.2, kl, 6.0, completions=256, horizon=10000) == pytest.approx(0.2 * factor)

    @pytest.mark.parametrize("target", [3.0, 12.0])
    def test_reaches_its_target_where_more_weight_means_less_divergence(self, target: float) -> None:
        """A toy whose optimum at weight w has KL 2/w, and whose policy goes a tenth of the way in each update."""
        coef, kl = 1.0, 0.0
        for _ in range(400):
            kl += 0.1 * (2 / coef - kl)
            coef = objectives.adapted_kl_coef(coef, kl, target, completions=256, horizon=1000)
        assert kl == pytest.approx(target, rel=0.02)
        assert coef == pytest.approx(2 / target, rel=0.02)

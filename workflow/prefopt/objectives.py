"""Every loss of the experiment, as a pure function of tensors.

`logp` is a completion's natural-log probability summed over its tokens, EOS included. Shapes: `n` completions
or preference pairs; `T` completion tokens, right-padded, with a boolean `mask` that is true on real tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """What an objective on preference pairs learns from; each of shape [n]."""

    chosen_logp: Tensor  # float, log pi(y_w|x)
    rejected_logp: Tensor
    reference_chosen_logp: Tensor | None  # the same under the reference policy, where the objective has one
    reference_rejected_logp: Tensor | None
    chosen_lengths: Tensor  # int, tokens of a completion, EOS included
    rejected_lengths: Tensor


class PairLoss(NamedTuple):
    """What an objective makes of pairs; each float [n]."""

    losses: Tensor
    chosen_reward: Tensor | None = None  # detached; None where the objective has no implicit reward
    rejected_reward: Tensor | None = None


class Objective(NamedTuple):
    """A loss on pairs, whose further arguments are the values of its method, and what a batch's loss is a mean over."""

    loss: Callable[..., PairLoss]
    mean_over: Literal["pairs", "chosen_tokens"] = "pairs"


def dpo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    reference_chosen_logp: Tensor,
    reference_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO's sigmoid loss (Rafailov et al. 2023, equation 7), or conservative DPO with label smoothing.

    With h = beta * (log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)) and smoothing e, the loss is
    -(1 - e) log sigmoid(h) - e log sigmoid(-h): the labels are taken to be flipped with probability e.

    Args:
        policy_chosen_logp: float [n], log pi(y_w|x).
        policy_rejected_logp: float [n], log pi(y_l|x).
        reference_chosen_logp: float [n], log pi_ref(y_w|x).
        reference_rejected_logp: float [n], log pi_ref(y_l|x).
        beta: strength of the implicit KL constraint, > 0.
        label_smoothing: e above, in [0, 0.5).

    Returns:
        losses float [n]; the implicit rewards beta * (log pi - log pi_ref) of chosen and rejected, float [n],
        detached.
    """
    chosen_log_ratio = policy_chosen_logp - reference_chosen_logp
    rejected_log_ratio = policy_rejected_logp - reference_rejected_logp
    margin = beta * (chosen_log_ratio - rejected_log_ratio)
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, beta * chosen_log_ratio.detach(), beta * rejected_log_ratio.detach()


def ipo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    reference_chosen_logp: Tensor,
    reference_rejected_logp: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """IPO's squared loss (Azar et al. 2023, equation 17) on log-ratios averaged over tokens.

    The average is what IPO's authors confirmed to the TRL project; the original DPO code sums.

    Args:
        chosen_lengths: int [n], tokens of the chosen completion.
        rejected_lengths: int [n], tokens of the rejected completion.
        beta: the regularisation tau of the IPO paper, > 0.
        (the others as in `dpo_loss`)

    Returns:
        losses float [n]; chosen and rejected implicit rewards as in `dpo_loss`, of the averaged log-ratios.
    """
    chosen_log_ratio = (policy_chosen_logp - reference_chosen_logp) / chosen_lengths
    rejected_log_ratio = (policy_rejected_logp - reference_rejected_logp) / rejected_lengths
    losses = (chosen_log_ratio - rejected_log_ratio - 1 / (2 * beta)) ** 2
    return losses, beta * chosen_log_ratio.detach(), beta * rejected_log_ratio.detach()


def bradley_terry_loss(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """The reward model's loss (equation 2): -log sigmoid(r(x, y_w) - r(x, y_l)).

    Args:
        chosen_reward: float [n].
        rejected_reward: float [n].

    Returns:
        losses, float [n].
    """
    return -F.logsigmoid(chosen_reward - rejected_reward)


def unlikelihood_loss(chosen_logp: Tensor, rejected_logp: Tensor, alpha: float) -> Tensor:
    """Unlikelihood (section 6): makes the chosen completion more probable and the rejected one less.

    The loss is -log pi(y_w|x) + alpha * log pi(y_l|x). It has no lower bound and no reference policy, so nothing
    stops the policy from leaving every text it knew.

    Args:
        chosen_logp: float [n], log pi(y_w|x).
        rejected_logp: float [n], log pi(y_l|x).
        alpha: weight of the rejected completion, in [0, 1]; 0 is Preferred-FT on the pairs.

    Returns:
        losses, float [n].
    """
    return -chosen_logp + alpha * rejected_logp


def per_token_rewards(scores: Tensor, logps: Tensor, reference_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """PPO's reward for each token: -kl_coef * (log pi - log pi_ref), and the score on the last real token.

    Args:
        scores: float [n], the reward of the whole completion.
        logps: float [n, T], log-probability of each sampled token under the policy that sampled it.
        reference_logps: float [n, T], the same under the reference policy, at the same temperature.
        mask: bool [n, T].
        kl_coef: weight of the KL penalty, >= 0.

    Returns:
        rewards float [n, T], zero on padding.
    """
    rewards = -kl_coef * (logps - reference_logps) * mask
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016); the episode ends after the last real token.

    Args:
        rewards: float [n, T].
        values: float [n, T], the value before each token is taken.
        mask: bool [n, T].
        gamma: discount of rewards, in [0, 1].
        lam: GAE's lambda, in [0, 1].

    Returns:
        advantages float [n, T] and returns (advantages + values) float [n, T], zero on padding.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following_advantage = torch.zeros_like(rewards[:, 0])
    following_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = (delta + gamma * lam * following_advantage) * mask[:, t]
        following_value = values[:, t]
        advantages[:, t] = following_advantage
    return advantages, advantages + values


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; both of any one shape."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shifts and scales the masked values to mean 0 and (unbiased) variance 1; zero on padding.

    Args:
        values: float [n, T].
        mask: bool [n, T].
    """
    centred = values - masked_mean(values, mask)
    variance = (centred.square() * mask).sum() / (mask.sum() - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8) * mask


def ppo_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), to be minimised.

    Args:
        logps: float, log-probabilities of the sampled tokens under the policy being trained.
        old_logps: the same under the policy that sampled them.
        advantages: the same shape.
        clip: the ratio stays within [1 - clip, 1 + clip].

    Returns:
        losses and, bool, where the clipped term was the one that counted; both shaped as `logps`.
    """
    ratio = torch.exp(logps - old_logps)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).detach()


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of the value, the larger of the plain and the clipped one (as in PPO2).

    Args:
        values: float, the value network's present estimates.
        old_values: its estimates when the rollout was made.
        returns: targets; all of one shape.
        clip: how far a value may move from its old estimate before the gradient stops.

    Returns:
        losses of the same shape.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def adapted_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: float) -> float:
    """The KL penalty's weight after an update, from Ziegler et al. 2019, section 2.2: a proportional controller.

    The weight is multiplied with 1 + clip(kl / target - 1, -0.2, 0.2) * completions / horizon.

    Args:
        kl_coef: weight of the update that was made.
        kl: mean KL of its completions to the reference policy, in nats per completion.
        target: wanted KL, in nats per completion, > 0.
        completions: how many completions the update sampled.
        horizon: completions over which the weight grows by a fifth where the KL is far too large.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


def hinge_loss(margin: Tensor) -> Tensor:
    """SLiC-HF's hinge on DPO's margin (Zhao et al. 2023; Liu et al. 2024, RSO, equation 14): max(0, 1 - margin).

    Args:
        margin: float [n], the implicit reward of chosen less that of rejected.

    Returns:
        losses, float [n].
    """
    return torch.relu(1 - margin)


def robust_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, equation 12): unbiased where labels are flipped with probability e.

    (-(1 - e) log sigmoid(margin) + e log sigmoid(-margin)) / (1 - 2e), whose mean over flipped labels is DPO's loss
    on the right ones. It has no lower bound.

    Args:
        margin: float [n], the implicit reward of chosen less that of rejected.
        label_smoothing: e above, in [0, 0.5).

    Returns:
        losses, float [n].
    """
    kept, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    return (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def odds_ratio_loss(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor) -> Tensor:
    """ORPO's odds-ratio term (Hong et al. 2024, equation 7): -log sigmoid(log odds of chosen - log odds of rejected).

    Args:
        chosen_mean_logp: float [n], log-probability of a token of the chosen completion, on average; < 0.
        rejected_mean_logp: the same of the rejected one.

    Returns:
        losses, float [n].
    """

    def log_odds(logp: Tensor) -> Tensor:
        return logp - torch.log1p(-torch.exp(logp.clamp(max=-1e-6)))

    return -F.logsigmoid(log_odds(chosen_mean_logp) - log_odds(rejected_mean_logp))


def dpo(
    pairs: Pairs,
    loss: Literal["sigmoid", "ipo", "hinge", "robust"],
    beta: float,
    label_smoothing: float,
    nll_weight: float = 0.0,
    length_normalized: bool = False,
) -> PairLoss:
    """DPO and what differs from it in the loss on the margin.

    Args:
        pairs: with a reference policy.
        loss: see `dpo_loss` (conservative with label_smoothing), `ipo_loss`, `hinge_loss`, `robust_loss`.
        beta: strength of the pull to the reference policy.
        label_smoothing: assumed share of flipped labels.
        nll_weight: weight of the chosen completion's negative log-likelihood of a token, which keeps its probability from
            falling (Pang et al. 2024, iterative RPO, equation 2).
        length_normalized: log-ratios are averaged over tokens (Meng et al. 2024, table 3); IPO's always are.
    """
    assert pairs.reference_chosen_logp is not None and pairs.reference_rejected_logp is not None
    logps = (*pairs[:2], pairs.reference_chosen_logp, pairs.reference_rejected_logp)
    lengths = (pairs.chosen_lengths, pairs.rejected_lengths)
    if length_normalized:
        logps = (logps[0] / lengths[0], logps[1] / lengths[1], logps[2] / lengths[0], logps[3] / lengths[1])
    if loss == "ipo":
        losses, chosen, rejected = ipo_loss(*logps, *lengths, beta)
    else:
        losses, chosen, rejected = dpo_loss(*logps, beta, label_smoothing)
        margin = beta * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
        losses = {"sigmoid": losses, "hinge": hinge_loss(margin), "robust": robust_loss(margin, label_smoothing)}[loss]
    if nll_weight > 0:
        losses = losses - nll_weight * pairs.chosen_logp / pairs.chosen_lengths
    return PairLoss(losses, chosen, rejected)


def simpo(pairs: Pairs, beta: float, margin: float) -> PairLoss:
    """SimPO's loss (Meng et al. 2024, equation 6), -log sigmoid(beta * (mean logp of chosen - of rejected) - margin).

    Args:
        pairs: without a reference policy.
        beta: scale of the rewards, > 0.
        margin: by how much the chosen completion's reward is to be larger, >= 0; gamma in the paper.
    """
    chosen = beta * pairs.chosen_logp / pairs.chosen_lengths
    rejected = beta * pairs.rejected_logp / pairs.rejected_lengths
    return PairLoss(-F.logsigmoid(chosen - rejected - margin), chosen.detach(), rejected.detach())


def orpo(pairs: Pairs, beta: float) -> PairLoss:
    """ORPO's loss (Hong et al. 2024, equation 6): the chosen completion's likelihood and, weighted, the odds ratio.

    Args:
        pairs: without a reference policy.
        beta: weight of the odds ratio; lambda in the paper.
    """
    chosen, rejected = pairs.chosen_logp / pairs.chosen_lengths, pairs.rejected_logp / pairs.rejected_lengths
    losses = -chosen + beta * odds_ratio_loss(chosen, rejected)
    return PairLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def kto(
    log_ratios: Tensor,
    desirable: Tensor,
    mean_mismatched: float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor]:
    """KTO's loss (Ethayarajh et al. 2024, equation 7) on completions with a label each, and no pairs.

    With r = log pi(y|x)/pi_ref(y|x) and z0 = max(0, the mean of the same of completions that answer other prompts), an
    estimate of KL(pi || pi_ref) that is a constant to the gradient, a desirable completion has the loss
    w_D (1 - sigmoid(beta (r - z0))), an undesirable one w_U (1 - sigmoid(beta (z0 - r))).

    Args:
        log_ratios: float [n], r above.
        desirable: bool [n], the labels.
        mean_mismatched: the mean log-ratio of mismatched completions over the whole batch, before it is cut off at 0.
        beta: how soon a completion far from z0 has nothing more to give, > 0.
        desirable_weight: w_D above, > 0.
        undesirable_weight: w_U above, > 0.

    Returns:
        losses float [n]; beta (r - z0) of a desirable completion and beta (z0 - r) of another, float [n], detached.
    """
    signs = desirable.to(log_ratios.dtype) * 2 - 1
    margins = signs * beta * (log_ratios - max(0.0, mean_mismatched))
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * torch.sigmoid(-margins), margins.detach()


def unlikelihood(pairs: Pairs, alpha: float) -> PairLoss:
    """See `unlikelihood_loss`; averaged over the chosen completions' tokens, as Preferred-FT is."""
    return PairLoss(unlikelihood_loss(pairs.chosen_logp, pairs.rejected_logp, alpha))


# What a method on pairs may minimise, by the name in its entry (`experiment.methods`).
OBJECTIVES = {
    "dpo": Objective(dpo),
    "simpo": Objective(simpo),
    "orpo": Objective(orpo),
    "unlikelihood": Objective(unlikelihood, mean_over="chosen_tokens"),
}

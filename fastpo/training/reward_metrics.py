"""What is logged of a reward model, under TRL's keys: sums over pairs as of every pair loss, and the range of the
rewards, which no sum has.

S = responses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RANGE = 2  # minus the smallest reward, and the largest: two numbers whose maxima are taken


def no_range(device: torch.device) -> Tensor:
    """The range of no rewards. -> [RANGE] fp32"""
    return torch.full((RANGE,), -torch.inf, device=device)


def reward_range(rewards: Tensor) -> Tensor:
    """Of the rewards [S] of a batch. -> [RANGE] fp32"""
    rewards = rewards.detach().float()
    return torch.stack([-rewards.amin(), rewards.amax()])


def range_means(sums: Sequence[float], steps: float) -> dict[str, float]:
    """TRL's keys from the ranges of so many steps, summed."""
    return {"min_reward": -sums[0] / steps, "max_reward": sums[1] / steps}


def reward_means(chosen: float, rejected: float, accuracies: float, pairs: float) -> dict[str, float]:
    """TRL's keys from sums over pairs. A response counts once for each of its pairs, as in rows of one pair each."""
    if not pairs:
        return {}
    return {
        "accuracy": accuracies / pairs,
        "margin": (chosen - rejected) / pairs,
        "mean_reward": (chosen + rejected) / (2 * pairs),
    }

"""From rewards to what a loss per token is multiplied by: advantages, weights of a sampler's own log-probabilities, and
DAPO's penalty of over-long responses. No model; numbers are fp64 tensors on the CPU unless they came from elsewhere.

R = responses of a step over all ranks, F = reward functions, N = tokens, S = responses of a packed batch. A group is
the responses of one prompt, of any number.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.errors import ConfigError
from fastpo.losses.segments import segment_ids, segment_sum

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out", "batch", "none")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SMALLEST_STD = 1e-4  # added to a standard deviation before it divides, as in TRL


class Advantages(NamedTuple):
    """Each [R], in the order of the rewards."""

    values: Tensor  # fp64; 0 where not used, and where a group or the batch has nothing to compare with
    used: Tensor  # bool: some function judged the response
    reward: Tensor  # fp64, the weighted sum, less the penalty; NaN where not used
    zero_std: Tensor  # bool: all used rewards of what scales it are alike


def advantages(
    rewards: Any,  # [R, F] numbers, NaN where a function did not judge a response
    groups: Any,  # [R] int: the prompt of each response, in any order
    *,
    weights: Sequence[float] | None = None,  # [F]
    aggregation: str = "sum_then_normalize",
    scale: str = "group",
    baseline: str = "mean",
    penalty: Any = None,  # [R], taken from the reward: beta times `response_kl`, as RLOO has it
    clip_range: tuple[float, float] | None = None,  # of the weighted sum, before the penalty
    normalize: bool = False,  # RLOO's normalize_advantages: to mean 0 and deviation 1 over all that are used
) -> Advantages:
    """(reward - baseline) / (deviation + 1e-4) of each response.

    The reward is sum_f w_f r_f over the functions that judged it. `baseline`: `mean` of the group (GRPO), of its other
    responses (`leave_one_out`, RLOO), of the `batch`, or `none`. `scale`: the deviation of the group's rewards (GRPO),
    of the `batch`, or `none` (Dr. GRPO). `normalize_then_sum` is GDPO: each function's rewards are scaled in the group
    first, their weighted sum over the batch; it has no baseline, scale or penalty of its own. A response that no
    function judged has advantage 0 and no part in any mean; one that is alone in its group has 0 where the baseline is
    the group's.

    As TRL 1.16's GRPOTrainer and RLOOTrainer, but that groups may differ in size, that a group with one usable response
    counts as of deviation 0 where TRL has NaN, and that equal rewards of a group give 0 to the bit, not to rounding.
    Raises ConfigError.
    """
    for name, value, known in (
        ("multi_objective_aggregation", aggregation, AGGREGATIONS), ("scale_rewards", scale, SCALES),
        ("baseline", baseline, BASELINES),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    r = torch.as_tensor(rewards, dtype=torch.float64)
    r = r[:, None] if r.dim() == 1 else r
    of = torch.unique(torch.as_tensor(groups, device=r.device), return_inverse=True)[1]
    w = torch.ones(r.shape[1]) if weights is None else torch.as_tensor(list(weights), dtype=torch.float64)
    w = w.to(r)
    if of.shape != r.shape[:1] or w.shape != r.shape[1:]:
        raise ConfigError(
            f"rewards {list(r.shape)} are of {r.shape[0]} responses and {r.shape[1]} functions: groups "
            f"{list(of.shape)}, weights {list(w.shape)}"
        )
    if torch.isinf(r).any():
        raise ConfigError("rewards must be finite, or NaN where a response was not judged")
    used = ~r.isnan().all(1)
    reward = _weighted(r, w, used)
    if aggregation == "normalize_then_sum":
        if baseline != "mean" or scale != "group" or penalty is not None or clip_range is not None or normalize:
            raise ConfigError(
                "multi_objective_aggregation=normalize_then_sum scales each reward by its group and their sum by the "
                "batch: it goes with no other baseline, scale_rewards, penalty, clip_range or normalize"
            )
        by_function = [_above_mean(c, of) / (_deviation(c, of, alone=math.nan) + SMALLEST_STD) for c in r.unbind(1)]
        total = _weighted(torch.stack(by_function, 1), w, used)
        together = torch.zeros_like(of)
        std = _deviation(total, together)
        values = _above_mean(total, together) / (std + SMALLEST_STD)
        return Advantages(values.nan_to_num(nan=0.0), used, reward, _is_zero(std))
    if clip_range is not None:
        reward = reward.clamp(*clip_range)
    if penalty is not None:
        reward = reward - torch.as_tensor(penalty, dtype=r.dtype).to(reward)
    together = torch.zeros_like(of)
    if baseline == "leave_one_out":
        # reward - (total - reward)/(count - 1); of one alone 0/0, which is no advantage
        count = _sums(~reward.isnan(), of)
        values = _above_mean(reward, of) * count / (count - 1)
    elif baseline == "none":
        values = reward
    else:
        values = _above_mean(reward, of if baseline == "mean" else together)
    std = _deviation(reward, together if scale == "batch" else of)
    if scale != "none":
        values = values / (std + SMALLEST_STD)
    if normalize:
        values = _above_mean(values, together) / (_deviation(values, together, alone=math.nan) + SMALLEST_STD)
    return Advantages(values.nan_to_num(nan=0.0), used, reward, _is_zero(std))


def _weighted(r: Tensor, w: Tensor, used: Tensor) -> Tensor:
    return torch.where(used, (r * w).nansum(1), math.nan)


def _sums(values: Tensor, of: Tensor) -> Tensor:
    """The sum of each response's group, NaN left out. [R]"""
    values = values.double().nan_to_num(nan=0.0)
    size = int(of.max()) + 1 if len(of) else 0
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, of, values)[of]


def _above_mean(values: Tensor, of: Tensor) -> Tensor:
    """Each less the mean of its group; exactly 0 where all of a group are equal, as the rounded mean may not be."""
    lowest, highest = (
        torch.full_like(values, -sign * math.inf).scatter_reduce(
            0, of, torch.where(values.isnan(), -sign * math.inf, values), kind
        )[of]
        for kind, sign in (("amin", -1), ("amax", 1))
    )
    above = values - _sums(values, of) / _sums(~values.isnan(), of)
    return torch.where((lowest == highest) & ~values.isnan(), 0.0, above)


def _deviation(values: Tensor, of: Tensor, alone: float = 0.0) -> Tensor:
    """With Bessel's correction; `alone` for a group of one that can be used, NaN for one of none."""
    count = _sums(~values.isnan(), of)
    squares = _sums(_above_mean(values, of) ** 2, of)
    out = (squares / (count - 1)).sqrt()
    return torch.where(count == 1, alone, torch.where(count == 0, math.nan, out))


def _is_zero(std: Tensor) -> Tensor:
    return torch.isclose(std, torch.zeros_like(std))


def correction(
    old_logp: Tensor,  # [N] by our own pass
    sampler_logp: Tensor,  # [N] the sampler's own of the same weights; NaN where it gave none
    offsets: Tensor,  # [S + 1]
    *,
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
    mask: Tensor | None = None,  # [N] 0/1
    per_response: bool = False,
) -> Tensor:
    """pi_old / pi_sampler of each token, or of its whole response (`sequence_*`); outside [clip_min, clip_max] it is
    brought to the bound (`*_truncate`) or 0 (`*_mask`). A token without a sampler's number has the ratio 1. -> [N], or
    with `per_response` [S] in the sequence modes, which is what `vespo` must be given. As TRL's
    vllm_importance_sampling_*. Raises ConfigError.
    """
    if mode not in CORRECTIONS:
        raise ConfigError(f"importance_sampling_mode must be one of {', '.join(CORRECTIONS)}, not {mode!r}")
    if clip_min is not None and clip_max is not None and clip_min > clip_max:
        raise ConfigError(f"importance sampling: clip_min={clip_min} is above clip_max={clip_max}")
    if per_response and mode.startswith("token"):
        raise ConfigError(f"importance_sampling_mode={mode} has a weight for each token, not for each response")
    apart = (old_logp.detach() - sampler_logp.detach()).nan_to_num(nan=0.0)
    if mask is not None:
        apart = torch.where(mask > 0, apart, 0.0)
    of_responses = mode.startswith("sequence")
    ratio = torch.exp(segment_sum(apart, offsets) if of_responses else apart)
    low, high = (-math.inf if clip_min is None else clip_min), (math.inf if clip_max is None else clip_max)
    if mode.endswith("truncate"):
        ratio = ratio.clamp(low, high)
    else:
        ratio = torch.where((ratio < low) | (ratio > high), 0.0, ratio)
    return ratio[segment_ids(offsets, old_logp.shape[0])] if of_responses and not per_response else ratio


def response_kl(old_logp: Tensor, ref_logp: Tensor, offsets: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum_t log(pi_old / pi_ref) of each response, [S]: RLOO's penalty is `beta` times it."""
    apart = old_logp.detach() - ref_logp.detach()
    return segment_sum(apart if mask is None else torch.where(mask > 0, apart, 0.0), offsets)


def soft_overlong(lengths: Any, max_length: int, cache: int) -> Tensor:
    """DAPO's penalty of a response's length, [R] in [-1, 0]: 0 up to max_length - cache, from there falling in a line
    to -1 at max_length, -1 beyond. 2503.14476 eq. 13. Raises ConfigError.
    """
    if not 0 < cache <= max_length:
        raise ConfigError(f"the over-long buffer must lie in 1 to max_completion_length={max_length}, not {cache}")
    n = torch.as_tensor(lengths, dtype=torch.float64)
    return ((max_length - cache - n) / cache).clamp(-1.0, 0.0)

"""Advantages, corrections and penalties: by hand, against their definitions, and against TRL 1.16's own code."""

import math

import pytest
import torch

from fastpo.errors import ConfigError
from fastpo.kernels import reference_tokens
from fastpo.losses.advantages import advantages, correction, response_kl, soft_overlong

NAN = math.nan


def same(got, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(got).double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def std(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def by_hand(reward, groups, scale, baseline):
    """One response after another; `reward` with None for one that was not judged."""
    batch = [r for r in reward if r is not None]
    out = []
    for r, g in zip(reward, groups, strict=True):
        group = [q for q, h in zip(reward, groups, strict=True) if h == g and q is not None]
        if r is None:
            out.append(0.0)
            continue
        others = (sum(group) - r, len(group) - 1)
        of = {"mean": (sum(group), len(group)), "leave_one_out": others, "batch": (sum(batch), len(batch))}
        total, count = of.get(baseline, (0.0, 1))
        if count == 0:
            out.append(0.0)
            continue
        by = {"group": group, "batch": batch}.get(scale)
        deviation = 0.0 if by is None or len(by) < 2 else std(by)
        out.append((r - total / count) / (1.0 if by is None else deviation + 1e-4))
    return out


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "batch", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_by_hand(scale, baseline):
    """Groups of different sizes in any order, one of one, one of which nothing was judged."""
    reward = [1.0, 0.5, None, 2.0, -1.0, 0.25, 0.75, None, 3.0, 0.1]
    groups = [7, 3, 7, 7, 3, 3, 7, 5, 9, 3]
    got = advantages([NAN if r is None else r for r in reward], groups, scale=scale, baseline=baseline)
    same(got.values, by_hand(reward, groups, scale, baseline))
    assert got.used.tolist() == [r is not None for r in reward]
    same(got.reward, [NAN if r is None else r for r in reward])


def test_several_functions_and_weights():
    rewards = [[1.0, 0.0], [NAN, 2.0], [NAN, NAN], [3.0, NAN]]
    got = advantages(rewards, [0, 0, 0, 0], weights=[0.5, 2.0])
    same(got.reward, [0.5, 4.0, NAN, 1.5])
    same(got.values, by_hand([0.5, 4.0, None, 1.5], [0] * 4, "group", "mean"))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3e5])
def test_equal_rewards_are_zero_to_the_bit(value, baseline):
    """The mean of seven times 0.1 is not 0.1; such responses are to cost no backward pass."""
    got = advantages([value] * 7 + [0.0, 1.0], [0] * 7 + [1, 1], baseline=baseline)
    assert not got.values[:7].any() and got.values[7:].all()
    assert got.zero_std.tolist() == [True] * 7 + [False] * 2


def test_nothing_to_compare_with():
    got = advantages([1.0, NAN, NAN, NAN], [0, 0, 1, 1])
    assert got.values.tolist() == [0.0] * 4 and got.used.tolist() == [True, False, False, False]
    assert got.zero_std.tolist() == [True, True, False, False]
    none = advantages(torch.zeros(0, 2), [])
    assert none.values.shape == none.used.shape == none.reward.shape == (0,)


def test_penalty_clip_and_normalisation():
    got = advantages([3.0, -2.0, 0.5, 1.0], [0, 0, 1, 1], baseline="leave_one_out", scale="none", clip_range=(-1, 1),
                     penalty=[0.1, 0.2, 0.3, 0.4])  # fmt: skip
    same(got.reward, [0.9, -1.2, 0.2, 0.6])
    same(got.values, [2.1, -2.1, -0.4, 0.4])
    scaled = advantages([3.0, -2.0, 0.5, 1.0], [0, 0, 1, 1], baseline="leave_one_out", scale="none", normalize=True)
    same(scaled.values.mean(), 0.0)
    same(scaled.values, [v / (std([5.0, -5.0, -0.5, 0.5]) + 1e-4) for v in (5.0, -5.0, -0.5, 0.5)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: advantages([1.0], [0], scale="batches"), "scale_rewards must be one of group, batch, none, not 'bat"),
        (lambda: advantages([1.0], [0], baseline="median"), "baseline must be one of mean, leave_one_out, batch, none"),
        (lambda: advantages([1.0], [0], aggregation="sum"), "multi_objective_aggregation must be one of sum_then_nor"),
        (lambda: advantages([1.0, 2.0], [0]), r"rewards \[2, 1\] are of 2 responses and 1 functions: groups \[1\]"),
        (lambda: advantages([1.0], [0], weights=[1, 2]), r"1 functions: groups \[1\], weights \[2\]"),
        (lambda: advantages([math.inf], [0]), "rewards must be finite, or NaN where a response was not judged"),
        (lambda: advantages([1.0], [0], aggregation="normalize_then_sum", scale="none"), "it goes with no other base"),
        (lambda: soft_overlong([3], 10, 0), "the over-long buffer must lie in 1 to max_completion_length=10, not 0"),
        (lambda: soft_overlong([3], 10, 11), "the over-long buffer must lie in 1 to"),
        (lambda: correct("sequence"), "importance_sampling_mode must be one of token_truncate, .*, not 'sequence'"),
        (lambda: correct("token_mask", clip_min=4.0), "clip_min=4.0 is above clip_max=3.0"),
        (lambda: correct("token_mask", per_response=True), "has a weight for each token, not for each response"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- corrections


OFFSETS = torch.tensor([0, 4, 4, 5, 12])
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def sampled(seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(12, generator=g, dtype=torch.float64)
    sampler = old + 0.5 * torch.randn(12, generator=g, dtype=torch.float64)
    sampler[6] = NAN
    return old, sampler, (torch.rand(12, generator=g) > 0.2).double()


def correct(mode, **more):
    old, sampler, _ = sampled()
    return correction(old, sampler, OFFSETS, mode=mode, **more)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [(None, 3.0), (0.8, 1.2), (None, None), (0.9, None)])
def test_corrections_are_their_definition(mode, bounds):
    for seed in range(4):
        old, sampler, mask = sampled(seed)
        got = correction(old, sampler, OFFSETS, mode=mode, clip_min=bounds[0], clip_max=bounds[1], mask=mask)
        assert got.shape == (12,)
        for a, b in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True):
            hidden = torch.where(mask[a:b] > 0, sampler[a:b], NAN)  # a masked token has the ratio 1
            expected = reference_tokens.sampled_weight(old[a:b], hidden, mode, *bounds)
            if b > a:
                same(got[a:b], expected.expand(b - a))
        if mode.startswith("sequence"):
            of_responses = correction(
                old, sampler, OFFSETS, mode=mode, clip_min=bounds[0], clip_max=bounds[1], mask=mask, per_response=True
            )
            same(of_responses[[0] * 4 + [2] + [3] * 7], got)
    ones = correction(old, torch.full_like(old, NAN), OFFSETS, mode=mode)
    same(ones, torch.ones(12))


def test_response_kl():
    old, ref, mask = sampled()
    ref = ref.nan_to_num(nan=-0.5)
    same(response_kl(old, ref, OFFSETS), [sum((old - ref)[a:b]) for a, b in ((0, 4), (4, 4), (4, 5), (5, 12))])
    ref[mask == 0] = NAN
    assert response_kl(old, ref, OFFSETS, mask).isfinite().all()


def test_soft_overlong():
    same(soft_overlong([1, 80, 85, 100, 130], 100, 20), [0, 0, -0.25, -1, -1])
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = list(range(70, 110))
    same(soft_overlong(lengths, 100, 20), theirs(completion_ids=[[0] * n for n in lengths]))

"""The packer against brute force, its lower bound and its promises; the compiled one against its Python twin."""

import functools
import itertools
import random

import numpy as np
import pytest

from fastpo.data import packer
from fastpo.data.packer import lower_bound, pack_step
from fastpo.errors import ConfigError

COMPILED = packer.COMPILED
IMPLEMENTATIONS = [
    pytest.param(COMPILED, id="c++", marks=pytest.mark.skipif(COMPILED is None, reason="csrc/ is not built")),
    pytest.param(None, id="python"),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    monkeypatch.setattr(packer, "COMPILED", request.param)


def instance(rng: random.Random, most: int, capacity: int = 100) -> list[int]:
    low, high = rng.choice([(1, 30), (1, 60), (15, 50), (15, 70), (20, 70), (15, 100), (1, 130)])
    return [rng.randint(low * capacity // 100 or 1, high * capacity // 100) for _ in range(rng.randint(1, most))]


@functools.cache  # of both implementations' tests
def fewest(sizes: tuple[int, ...], capacity: int) -> int:
    """Number of bins of the best packing, by trying all."""
    sizes = sorted(sizes, reverse=True)
    best = len(sizes)

    def put(i: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(sizes):
            best = len(rooms)
            return
        for k, room in enumerate(rooms):
            if room >= sizes[i] and room not in rooms[:k]:
                put(i + 1, [*rooms[:k], room - sizes[i], *rooms[k + 1 :]])
        put(i + 1, [*rooms, max(capacity - sizes[i], 0)])

    put(0, [])
    return best


def test_as_few_micro_batches_as_brute_force(implementation):
    rng = random.Random(0)
    best_fit_alone = 0
    for _ in range(300):
        sizes = instance(rng, 13)
        (bins,) = pack_step(range(len(sizes)), sizes, 100)
        optimum = fewest(tuple(sizes), 100)
        descending = sorted(sizes, reverse=True)
        assert len(bins) == optimum, sizes
        assert lower_bound(np.array(descending), 100) <= optimum, sizes
        best_fit_alone += packer._best_fit(descending, 100)[1] > optimum
    assert best_fit_alone > 3  # the search had something to do


@functools.cache
def shortest(sizes: tuple[int, ...], costs: tuple[int, ...], capacity: int, ranks: int, count: int) -> int:
    """The least work of the busiest rank over all packings in at most `count` micro-batches a rank."""
    best = sum(costs)

    def put(i: int, load: list[list[int]], work: list[int]) -> None:
        nonlocal best
        if max(work) >= best:
            return
        if i == len(sizes):
            best = max(work)
            return
        for r in range(ranks):
            tried = set()
            for k in range(count):
                full = load[r][k]
                if full in tried or (full and full + sizes[i] > capacity):
                    continue
                tried.add(full)
                load[r][k] += sizes[i]
                work[r] += costs[i]
                put(i + 1, load, work)
                load[r][k] -= sizes[i]
                work[r] -= costs[i]

    put(0, [[0] * count for _ in range(ranks)], [0] * ranks)
    return best


def test_the_busiest_rank_against_brute_force(implementation):
    """The bound stated is LPT's for two and three ranks, 4/3; it is met where the budget binds too, and on average the
    step is nearly as short as the shortest."""
    rng = random.Random(1)
    ratios = []
    for _ in range(150):
        sizes = instance(rng, 8)
        costs = [s + s * s // rng.choice([20, 100, 10_000]) for s in sizes]
        ranks = rng.choice([2, 3])
        shares = pack_step(range(len(sizes)), sizes, 100, ranks, costs)
        work = max(sum(costs[i] for part in share for i in part) for share in shares)
        ratios.append(work / shortest(tuple(sizes), tuple(costs), 100, ranks, max(map(len, shares))))
    assert max(ratios) <= 4 / 3 and np.mean(ratios) < 1.02, (max(ratios), np.mean(ratios))


def test_the_contract(implementation):
    rng = random.Random(2)
    for _ in range(120):
        sizes = instance(rng, rng.choice([3, 20, 120]), 1000)
        rows = rng.sample(range(1000), len(sizes))
        tokens = dict(zip(rows, sizes, strict=True))
        ranks = rng.choice([1, 2, 4, 7])
        shares = pack_step(rows, tokens, 1000, ranks)
        bins = [part for share in shares for part in share]
        assert sorted(i for part in bins for i in part) == sorted(rows) and all(bins)
        assert all(sum(tokens[i] for i in part) <= 1000 or len(part) == 1 for part in bins)
        assert len(shares) == ranks
        if len(rows) >= ranks:  # as many for each, but for a step with too few rows to fill them up
            counts = [len(share) for share in shares]
            assert min(counts) >= 1 and (max(counts) == min(counts) or sum(counts) == len(rows))
        assert shares == pack_step(list(rows), tokens, 1000, ranks)
    assert pack_step([], {}, 10, 2) == [[], []]
    assert pack_step([7], {7: 500}, 10, 3) == [[[7]], [], []]  # over the budget, and fewer rows than ranks
    assert sorted(pack_step([0, 1, 2], [5, 5, 5], 1)[0]) == [[0], [1], [2]]  # a budget that no row fits
    with pytest.raises(ConfigError, match="max_tokens=0"):
        pack_step([0], [1], 0)


def test_ranks_are_even_by_cost_not_by_tokens(implementation):
    """One long sequence costs as much as three times its tokens in short ones."""
    tokens, costs = [60, 30, 30, 30, 30], [300, 100, 100, 100, 100]
    shares = pack_step(range(5), tokens, 100, 2, costs)
    assert sorted(sum(costs[i] for part in share for i in part) for share in shares) == [300, 400]
    assert [len(share) for share in shares] == [1, 1] or sum(map(len, shares)) == 4


@pytest.mark.parametrize("mean, budget", [(250, 2048), (1500, 8192)])
def test_large_steps_are_full(implementation, mean, budget):
    rng = np.random.default_rng(0)
    for n in (1000, 20_000):
        sizes = np.clip(rng.lognormal(np.log(mean), 0.6, n), 10, budget).astype(np.int64)
        (bins,) = pack_step(range(n), sizes, budget)
        assert len(bins) <= 1.01 * lower_bound(-np.sort(-sizes), budget)
        assert sizes.sum() / (len(bins) * budget) >= 0.97


@pytest.mark.skipif(COMPILED is None, reason="csrc/ is not built")
def test_the_twin_packs_alike(monkeypatch):
    rng = random.Random(3)
    for most, ranks in itertools.product((1, 12, 70, 400), (1, 2, 8)):
        for _ in range(10):
            capacity = rng.choice([100, 2048])
            sizes = instance(rng, most, capacity)
            costs = [s + s * s // 50 for s in sizes]
            packed = []
            for implementation in (COMPILED, None):
                monkeypatch.setattr(packer, "COMPILED", implementation)
                packed.append(pack_step(range(len(sizes)), sizes, capacity, ranks, costs))
            assert packed[0] == packed[1], (sizes, capacity, ranks)

"""Packed batches against a token-by-token construction; the packer against its promises."""

import random

import numpy as np
import pytest
import torch

from fastpo.data import Example
from fastpo.packing import collate, epoch_order, epoch_steps, nll_count, pack_all, pack_step, trunk_tokens


def example(rng: random.Random, responses: int = 2, **columns) -> Example:
    ids = lambda low, high: np.array([rng.randrange(50) for _ in range(rng.randint(low, high))], np.int32)  # noqa: E731
    pairs = [(0, k) for k in range(1, responses)]
    return Example(ids(1, 6), [ids(1, 7) for _ in range(responses)], pairs, columns, {})


def test_every_target_is_predicted_from_the_position_before_it():
    rng = random.Random(1)
    examples = [example(rng, k) for k in (2, 2, 3, 1)]
    order = [2, 0, 3]
    batch = collate(examples, order)
    rows = [(examples[i].prompt_ids, r) for i in order for r in examples[i].responses]
    # the trunk sees every row without its last token, end to end, positions restarting
    assert batch.input_ids.tolist() == [t for p, r in rows for t in [*p, *r[:-1]]]
    assert batch.position_ids.tolist() == [t for p, r in rows for t in range(len(p) + len(r) - 1)]
    start, expected_rows = 0, []
    for prompt, response in rows:
        expected_rows += range(start + len(prompt) - 1, start + len(prompt) + len(response) - 1)
        start += len(prompt) + len(response) - 1
    assert batch.logit_rows.tolist() == expected_rows
    assert batch.target.tolist() == [t for _, r in rows for t in r]
    assert batch.response_offsets.tolist() == np.cumsum([0, *(len(r) for _, r in rows)]).tolist()
    assert batch.cu_seqlens == tuple(np.cumsum([0, *(len(p) + len(r) - 1 for p, r in rows)]).tolist())
    # segments: prompt, response, prompt, response; a response's parent is its prompt
    assert batch.seg_parents == tuple(x for s in range(len(rows)) for x in (-1, 2 * s))
    assert batch.seg_offsets[-1] == batch.cu_seqlens[-1] == len(batch.input_ids)
    assert batch.num_tokens == sum(len(p) + len(r) for p, r in rows)
    assert batch.pairs.tolist() == [[0, 1], [0, 2], [3, 4]]
    assert not batch.unique and collate(examples, [0, 1]).unique


def test_columns_reach_their_pairs_and_tokens():
    rng = random.Random(2)
    a = example(rng, 2, weight=[2.0], win_prob=[0.9])
    b = example(rng, 2, win_prob_chosen=[0.8], win_prob_rejected=[0.3])
    ref = [[np.arange(len(r), dtype=np.float32) + 10 * k for k, r in enumerate(e.responses)] for e in (a, b)]
    batch = collate([a, b], [1, 0], ref)
    assert batch.pair_weight.tolist() == [1.0, 2.0]
    torch.testing.assert_close(batch.win_prob_chosen, torch.tensor([0.8, 0.9]))
    torch.testing.assert_close(batch.win_prob_rejected, torch.tensor([0.3, 0.1]))
    assert batch.ref_logp.tolist() == [x for i in (1, 0) for r in ref[i] for x in r.tolist()]
    lengths = [len(r) for e in (b, a) for r in e.responses]
    assert (
        batch.nll_weight.tolist() == [1.0] * lengths[0] + [0.0] * lengths[1] + [2.0] * lengths[2] + [0.0] * lengths[3]
    )
    assert nll_count(a) == len(a.responses[0]) and nll_count(a, "seq_mean") == 1
    # a column that only some rows have is no column
    assert collate([a, example(rng)], [0, 1]).win_prob_chosen is None


def test_sums_of_the_reference_from_the_data():
    rng = random.Random(3)
    examples = [example(rng) for _ in range(2)]
    for k, e in enumerate(examples):
        e.response_columns["ref_logps"] = [-1.0 - k, -2.0 - k]
    assert collate(examples, [1, 0]).ref_response_logps.tolist() == [-2, -3, -1, -2]


def test_responses_may_keep_different_prompts():
    """keep_end truncation shortens each response's own prompt."""
    ids = lambda *t: np.array(t, np.int32)  # noqa: E731
    row = Example(ids(2, 3), [ids(4), ids(5)], [(0, 1)], response_prompts=[ids(1, 2, 3), ids(2, 3)])
    batch = collate([row], [0])
    assert batch.input_ids.tolist() == [1, 2, 3, 2, 3] and batch.logit_rows.tolist() == [2, 4]
    assert trunk_tokens(row) == 5


def test_sft_rows_have_no_pairs():
    row = Example(np.array([1, 2], np.int32), [np.array([3, 4, 5], np.int32)])
    batch = collate([row], [0])
    assert batch.pairs.shape == (0, 2) and batch.nll_weight.tolist() == [1, 1, 1] and nll_count(row) == 3


def test_pack_step_fills_few_even_batches():
    rng = random.Random(4)
    for _ in range(200):
        tokens = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        rows = rng.sample(range(len(tokens)), rng.randint(1, len(tokens)))
        (bins,) = pack_step(rows, tokens, 100)
        assert sorted(r for b in bins for r in b) == sorted(rows) and all(bins)
        sizes = [sum(tokens[r] for r in b) for b in bins]
        assert max(sizes) <= 100
        # best-fit-decreasing needs at most 11/9 of the optimum plus one bin
        assert len(bins) <= 11 / 9 * lower_bound(rows, tokens) + 1
        assert pack_step(list(rows), tokens, 100) == [bins]
    assert pack_step([0, 1], [500, 3], 100) == [[[0], [1]]]  # over the budget: alone
    assert pack_step([0, 1, 2, 3], [40, 40, 40, 40], 90) == [[[0, 2], [1, 3]]]  # even, not 80 + 80 by luck


def lower_bound(rows: list[int], tokens: list[int]) -> int:
    """A lower bound of the optimum: the total size, and the rows over half of a bin."""
    return max(-(-sum(tokens[r] for r in rows) // 100), sum(tokens[r] > 50 for r in rows))


def test_pack_all_covers_every_row_once():
    tokens = [5, 90, 20, 40, 100, 130, 1]
    batches = pack_all(range(7), tokens, 100)
    assert sorted(r for b in batches for r in b) == list(range(7))
    assert all(sum(tokens[r] for r in b) <= 100 or len(b) == 1 for b in batches)


FULL_STEPS = [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_order_is_transformers_seeded_permutation():
    # accelerate's SeedableRandomSampler for n = 10 and seed 42, epochs 0 and 1
    assert epoch_order(10, seed=42, epoch=0, strategy="random") == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    assert epoch_order(10, seed=42, epoch=1, strategy="random") == [8, 4, 9, 0, 5, 1, 6, 7, 2, 3]
    assert epoch_order(3, seed=42, epoch=1, strategy="sequential") == [0, 1, 2]


@pytest.mark.parametrize(("drop", "steps"), [(False, [*FULL_STEPS, [8]]), (True, FULL_STEPS)])
def test_steps_of_an_epoch(drop, steps):
    assert epoch_steps(range(9), 2, 2, drop) == steps


def test_trunk_tokens():
    rng = random.Random(5)
    e = example(rng, 3)
    assert trunk_tokens(e) == len(collate([e], [0]).input_ids)

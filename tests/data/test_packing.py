"""Packed batches against a token-by-token construction; the packer against its promises."""

import random

import numpy as np
import pytest
import torch

import fastpo
from fastpo.data import Example
from fastpo.data.packer import pack_all, pack_step
from fastpo.data.packing import (
    TrunkCost,
    collate,
    nll_count,
    packed_size,
    pass_batches,
    repeated_prompts,
    set_sharing,
    step_batches,
    step_trees,
    trunk_tokens,
)
from fastpo.errors import ConfigError
from fastpo.models.policy import Policy


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


def test_trunk_tokens():
    rng = random.Random(5)
    e = example(rng, 3)
    assert trunk_tokens(e) == len(collate([e], [0]).input_ids)


# ---- rows of one prompt in one tree


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def context(batch, row: int) -> list[int]:
    """The tokens that trunk position `row` sees, by the boundaries of chains and by the branches."""
    start = max(s for s in batch.cu_seqlens[:-1] if s <= row)
    prompt = [p for b in batch.branches if b.start <= start < b.stop for p in range(b.prompt, b.prompt_stop)]
    return batch.input_ids[[*prompt, *range(start, row + 1)]].tolist()


def grouped_examples() -> list[Example]:
    """Rows 0, 2, 3 and 5 have one prompt; 0 and 3 a response too, and 5 one response alone."""
    p, q = ids(1, 2, 3, 4), ids(1, 2, 3)
    return [
        Example(p, [ids(5, 6, 7), ids(8)], [(0, 1)], {"weight": [2.0]}),
        Example(q, [ids(5, 6), ids(7, 8)], [(0, 1)]),
        Example(p.copy(), [ids(9), ids(10, 11)], [(0, 1)]),
        Example(p.copy(), [ids(12, 13), ids(5, 6, 7), ids(5, 6)], [(1, 0), (1, 2)], greedy=2),
        Example(p.copy(), [ids(5), ids(7, 8)], [(0, 1)], response_prompts=[p, p[1:]]),
        Example(p.copy(), [ids(14, 15)]),
    ]


def test_neighbours_of_one_prompt_are_one_tree():
    examples = grouped_examples()
    ref = [[np.full(len(r), 10 * i + k, np.float32) for k, r in enumerate(e.responses)] for i, e in enumerate(examples)]
    order = [1, 0, 3, 5, 2, 4]
    plain = collate(examples, order, ref, with_prompts=True)
    set_sharing(examples, "always", TrunkCost(1.0))
    assert [e.share_from for e in examples] == [2, 2, 2, 2, 0, 2]
    batch = collate(examples, order, ref, with_prompts=True)
    q_tree, p_tree = 3 + 1 + 1, 4 + 2 + 0 + 1 + 1 + 1 + 0 + 1  # prompt, then each response that is new, but its last
    assert len(batch.input_ids) == q_tree + p_tree + (4 + 0) + (3 + 1)
    assert len(batch.branches) == 2 and batch.branches[1].prompt_stop - batch.branches[1].prompt == 4
    # whatever head rows, responses, pairs and columns are, they are as without sharing
    for name in ("target", "response_offsets", "pairs", "pair_weight", "nll_weight", "ref_logp"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    for name in ("examples", "row_pairs", "row_responses", "num_tokens", "unique"):
        assert getattr(batch, name) == getattr(plain, name), name
    for mine, theirs in zip(batch.logit_rows.tolist(), plain.logit_rows.tolist(), strict=True):
        assert context(batch, mine) == context(plain, theirs)
        assert batch.position_ids[mine] == plain.position_ids[theirs] == len(context(batch, mine)) - 1
    # of a response that two rows have, the same positions are read twice
    rows = [batch.logit_rows[a:b].tolist() for a, b in zip(batch.response_offsets, batch.response_offsets[1:])]
    assert rows[2] == rows[5]
    # the prompt's own rows are there once, with the weight of all its preferred responses
    of = batch.prompts.of_pair.tolist()
    assert of[1] == of[2] == of[3] == of[4] and len(set(of)) == 3
    assert batch.prompts.weight.sum() == plain.prompts.weight.sum()
    assert batch.prompts.weight[of[1]] == 2.0 + 1.0 + 1.0  # rows 0, 3 (one response in two pairs) and 2
    assert batch.seg_offsets[-1] == batch.cu_seqlens[-1] == len(batch.input_ids)
    assert len(collate(examples, [0, 1, 2]).branches) == 2  # not neighbours


def test_a_tree_is_shared_where_it_pays():
    """A short prompt is copied for two responses and shared by six: by the estimate, not by the row."""
    cost = TrunkCost(token=1.0, branch=9.0)
    examples = [Example(ids(1, 2, 3), [ids(10 + i, 4), ids(20 + i, 5)], [(0, 1)]) for i in range(3)]
    set_sharing(examples, "auto", cost)
    assert [e.share_from for e in examples] == [4] * 3 and not any(e.share for e in examples)
    assert len(collate(examples, [0]).branches) == 0 and len(collate(examples, [0, 1]).branches) == 1
    assert cost._replace(pair=1.0).share_from(3) == 3  # attention over the prompt is saved too: 3 + 4.5 a copy
    assert step_trees(examples, [0, 1, 2], 100) == [[0, 1, 2]]
    assert step_trees(examples, [0, 1, 2], 8) == [[0, 1], [2]]  # a tree fits the budget: 3 + 4 tokens
    assert step_trees(examples, [2], 100) == [[2]] and step_trees(examples, [0, 1], 4) == [[0], [1]]
    twins = [Example(ids(1, 2), [ids(*range(20))]) for _ in range(9)]
    set_sharing(twins, "always", cost)
    assert step_trees(twins, range(9), 30) == [[*range(6)], [6, 7, 8]]  # 21 tokens, and at most 4 * 30 head rows or so
    assert repeated_prompts(examples) == 2
    set_sharing(examples, "never", cost)
    assert step_trees(examples, [0, 1, 2], 100) == [[0], [1], [2]] and repeated_prompts(examples) == 0


def test_batches_of_trees_hold_every_row_once():
    rng = random.Random(6)
    for _ in range(25):
        prompts = [ids(*(rng.randrange(50) for _ in range(rng.randint(1, 20)))) for _ in range(rng.randint(1, 8))]
        examples = [example(rng, rng.choice([1, 2, 3])) for _ in range(rng.randint(4, 40))]
        for e in examples:
            e.prompt_ids = prompts[rng.randrange(len(prompts))]
        set_sharing(examples, rng.choice(["auto", "always", "never"]), TrunkCost(1.0, 0.01, 10.0))
        rows = rng.sample(range(len(examples)), rng.randint(4, len(examples)))
        for ranks in (1, 2, 4):
            shares = step_batches(examples, rows, 60, TrunkCost(1.0, 0.01, 10.0), ranks)
            assert all(shares) and sorted(i for s in shares for part in s for i in part) == sorted(rows)
            for part in (part for share in shares for part in share):
                batch = collate(examples, part)
                assert max(len(batch.input_ids), -(-len(batch.target) // 4)) <= 60 or len(part) == 1
        batches = pass_batches(examples, rows, 60)
        assert sorted(i for part in batches for i in part) == sorted(rows)
        assert all(len(collate(examples, part).input_ids) <= 60 or len(part) == 1 for part in batches)
    # one tree is not all the work of one rank of two
    examples = [Example(ids(1, 2), [ids(3, k), ids(4, k)], [(0, 1)]) for k in range(8)]
    set_sharing(examples, "always", TrunkCost(1.0))
    assert [len(s) for s in step_batches(examples, range(8), 100, TrunkCost(1.0, branch=1.0), 2)] == [1, 1]


def test_a_micro_batch_is_within_the_budget_as_a_whole_too():
    """Where head rows count, rows together are not more than apart: Budget.passes would split such a micro-batch into
    itself for ever, and a sharded rank would have one more than the others wait for."""
    rng = random.Random(9)
    for _ in range(300):
        responses = [ids(*[k] * rng.randint(1, 11)) for k in range(4)]
        examples = [Example(ids(*range(8)), rng.sample(responses, 2), [(0, 1)]) for _ in range(rng.randint(4, 40))]
        set_sharing(examples, "always", TrunkCost(1.0))
        budget = rng.randint(20, 60)
        shares = step_batches(examples, range(len(examples)), budget, TrunkCost(1.0), rng.choice([1, 2]))
        for part in [*pass_batches(examples, range(len(examples)), budget), *(p for share in shares for p in share)]:
            assert packed_size(examples, part) <= budget or len(part) == 1


def test_padding_to_a_bucket_is_no_one_s():
    examples = grouped_examples()
    plain, batch = collate(examples, range(6)), collate(examples, range(6), token_bucket=32)
    assert plain.padding == 0 and len(batch.input_ids) % 32 == 0 < batch.padding < 32
    assert batch.cu_seqlens[-1] == batch.seg_offsets[-1] == len(batch.input_ids)
    assert batch.cu_seqlens[: len(plain.cu_seqlens)] == plain.cu_seqlens and batch.branches == plain.branches
    assert torch.equal(batch.input_ids[: -batch.padding], plain.input_ids)
    assert torch.equal(batch.logit_rows, plain.logit_rows) and batch.num_tokens == plain.num_tokens
    assert batch.position_ids.max() == plain.position_ids.max()  # within the model's, whatever the bucket
    assert collate(examples, range(6), token_bucket=len(plain.input_ids)).padding == 0


# ---- what is computed with them


def repeating(rng: random.Random, n: int) -> list[Example]:
    """Pairs over few prompts and few chosen responses; every fifth row has three responses."""
    draw = lambda low, high: ids(*(rng.randrange(3, 90) for _ in range(rng.randint(low, high))))  # noqa: E731
    prompts = [draw(1, 12) for _ in range(3)]
    chosen = [draw(1, 9) for _ in range(4)]
    rows = []
    for k in range(n):
        responses = [chosen[rng.randrange(4)], draw(1, 9)] + ([draw(1, 9)] if k % 5 == 4 else [])
        rows.append(Example(prompts[rng.randrange(3)], responses, [(0, j) for j in range(1, len(responses))]))
    return rows


def test_any_split_has_the_same_gradient(toy):
    """One step for 1, 2 and 4 ranks, grouped or not, padded or not: an SFT and pair objective in fp64."""
    model = toy.model().double()
    policy = Policy(model)
    examples = repeating(random.Random(7), 14)
    cost = TrunkCost(1.0, 0.01, 5.0)

    def gradients(mode: str, ranks: int, budget: int, bucket: int | None = None) -> torch.Tensor:
        set_sharing(examples, mode, cost)
        model.zero_grad()
        for share in step_batches(examples, range(len(examples)), budget, cost, ranks):
            for part in share:
                batch = collate(examples, part, token_bucket=bucket)
                logp = policy.logp(batch)
                sums = torch.segment_reduce(logp, "sum", offsets=batch.response_offsets.long())
                chosen, other = batch.pairs.long().unbind(1)
                loss = -torch.nn.functional.logsigmoid(0.1 * (sums[chosen] - sums[other])).sum()
                (loss - (batch.nll_weight * logp).sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with policy.attach():
        expected = gradients("never", 1, 10_000)
        splits = [("always", 1, 10_000, None), ("always", 2, 90, None), ("always", 4, 60, 16), ("auto", 1, 60, 32),
                  ("never", 2, 60, None), ("never", 4, 60, 16), ("always", 1, 1, 8)]  # fmt: skip
        for split in splits:
            error = (gradients(*split) - expected).abs().max()
            assert error < 1e-5 * expected.abs().max(), (split, float(error))  # logp is fp32


def rows_of_few_prompts(toy, unpaired: bool) -> list[dict]:
    rows = toy.rows(15, seed=4)
    for k, row in enumerate(rows):
        row["prompt"] = rows[k % 3]["prompt"]
        if k % 2:
            row["chosen"] = rows[0]["chosen"]
    if not unpaired:
        return rows
    return [
        {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
        for r in rows
        for k in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto", "aot", "sampo", "sft", "tdpo2"])
def test_training_is_the_same_grouped_or_not(toy, tmp_path, loss):
    """Every logged number and the weights, for losses that read a step, rows of tokens, prompts or single responses."""
    rows = rows_of_few_prompts(toy, loss == "kto")
    runs = []
    modes = [("never", {}), ("always", {"token_bucket": 64})]
    if loss in ("kto", "aot", "sampo"):  # in several micro-batches too: one that reads the whole step, one that draws
        modes.append(("always", {"max_tokens": 120}))
    for mode, more in modes:
        options = dict(
            output_dir=str(tmp_path / f"{len(runs)}"), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
            max_steps=2, per_device_train_batch_size=12, learning_rate=0.05, lr_scheduler_type="constant", optim="sgd",
            gradient_checkpointing=False, save_final=False, report=False, max_grad_norm=0.0, loss_type=loss,
            share_prompts=mode, eval_steps=2, **more,
        )  # fmt: skip
        result = fastpo.train(toy.model(), rows, eval_dataset=rows[:7], processing_class=toy.tokenizer(), args=options)
        runs.append((result, torch.cat([p.detach().flatten() for p in result.model.parameters()])))
    (plain, base), *others = runs
    for result, weights in others:
        for a, b in zip(plain.log_history, result.log_history, strict=True):
            keys = {k for k in a if k in ("loss", "grad_norm", "num_tokens", "kl", "eval_loss") or "/" in k}
            assert keys and all(b[k] == pytest.approx(a[k], rel=3e-5, abs=3e-6) for k in keys), (a, b)
        assert (weights - base).abs().max() < 2e-6
    full = [[line["packing_efficiency"] for line in r.log_history if "loss" in line] for r, _ in runs[:2]]
    saved = [[line["shared_prompt_savings"] for line in r.log_history if "loss" in line] for r, _ in runs[:2]]
    expected = [1 - shared / alone for alone, shared in zip(*full, strict=True)]
    assert saved[0] == [0.0, 0.0] and saved[1] == pytest.approx(expected)
    # prompts, and responses that several rows have, passed once; padding is not counted
    assert len(full[0]) == 2 and all(shared < 0.8 * alone for alone, shared in zip(*full, strict=True))


def test_rows_over_the_budget_are_named_once(toy, tmp_path, caplog):
    caplog.set_level("WARNING", logger="fastpo")
    options = dict(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=2, save_final=False, report=False
    )
    fastpo.train(toy.model(), toy.rows(8), processing_class=toy.tokenizer(), args={**options, "max_tokens": 40})
    said = [r.message for r in caplog.records if "more tokens than max_tokens=40" in r.message]
    assert len(said) == 1 and "of 8 train rows" in said[0]
    with pytest.raises(ConfigError, match="max_tokens=100 is no multiple of token_bucket=64"):
        more = {"max_tokens": 100, "token_bucket": 64, "overwrite_output_dir": True}
        fastpo.train(toy.model(), toy.rows(8), processing_class=toy.tokenizer(), args={**options, **more})

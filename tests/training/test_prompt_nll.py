"""ORPO's NLL of prompt and chosen response: against its formula on full logits, against TRL's trainer, for any cut."""

import random
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastpo.data import Example, prepare_examples
from fastpo.data.kway import Forming
from fastpo.data.packing import collate, nll_count
from fastpo.losses.table import LOSSES

REDUCTIONS = ("token_mean", "seq_mean", "seq_sum")
RATE = 0.25


@pytest.fixture
def run(sgd_run):
    """One step, or more."""
    return partial(sgd_run, max_steps=1, learning_rate=RATE, loss_type="orpo")


def logged(result, key="loss"):
    return [line[key] for line in result.log_history if key in line]


def weights(result_or_model):
    model = result_or_model if isinstance(result_or_model, torch.nn.Module) else result_or_model.model
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def weighted(toy, n=12, seed=4):
    """Pairs of different weight; one with a prompt of a single token, of which none has one before it."""
    rows = [row | {"weight": 0.5 + i % 3} for i, row in enumerate(toy.rows(n, seed=seed))]
    rows[3]["prompt"] = "w5"
    return rows


def kway(toy, n=7):
    return toy.kway_rows(n, seed=5, sizes=(2, 3, 4))


def orpo(model, examples, reduction="token_mean", token_weight=None, beta=0.1, coef=1.0):
    """The objective by its formula, one sequence at a time on the model's own logits; differentiable."""
    terms, tokens, firsts = [], [], []
    for e in examples:
        of = []
        for k, response in enumerate(e.responses):
            prompt = e.prompt_of(k).tolist()
            ids = torch.tensor([*prompt, *response.tolist()])
            logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            w = torch.ones(len(response)) if token_weight is None else token_weight(len(response))
            prompt_logp, logp = logp[: len(prompt) - 1], logp[len(prompt) - 1 :]
            of.append(((w * logp).sum(), w.sum(), prompt_logp.sum(), len(prompt_logp)))
        weights_of = {}  # preferred response -> weight of its first pair
        for (winner, loser), weight in zip(e.pairs, e.pair_columns.get("weight", [1.0] * len(e.pairs)), strict=True):
            weights_of.setdefault(winner, weight)
            (lw, nw, lp, n_p), (ll, nl, _, _) = of[winner], of[loser]
            p, q = lw / nw, ll / nl
            odds = (p - torch.log1p(-p.exp())) - (q - torch.log1p(-q.exp()))
            nll = {"token_mean": 0.0, "seq_sum": -(lw + lp), "seq_mean": -(lw + lp) / (nw + n_p)}[reduction]
            terms.append(weight * (-beta * torch.log(torch.sigmoid(odds)) + coef * nll))
        for winner, weight in weights_of.items():
            lw, nw, lp, n_p = of[winner]
            firsts.append(-weight * (lw + lp))
            tokens.append(nw + n_p)
    loss = torch.stack(terms).mean()
    return loss + coef * torch.stack(firsts).sum() / sum(tokens) if reduction == "token_mean" else loss


def check_step(toy, result, examples, **options):
    """Loss and update of the one step are those of the formula in fp64."""
    model = toy.model().double()
    before = weights(model)
    loss = orpo(model, examples, **options)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert logged(result)[0] == pytest.approx(loss.item(), rel=2e-6)
    update = (before - weights(result).double()) / RATE
    torch.testing.assert_close(update, gradient, rtol=1e-4, atol=2e-6 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_step_is_the_formula(toy, run, reduction):
    rows = weighted(toy)
    examples, _ = prepare_examples(rows, toy.tokenizer(), max_length=256, columns=["weight"])
    result = run(rows, loss_kwargs={"nll_reduction": reduction, "nll_coef": 0.7})
    check_step(toy, result, examples, reduction=reduction, coef=0.7)


@pytest.mark.parametrize("share", ["never", "always"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_step_on_k_responses_of_a_prompt(toy, run, reduction, share):
    """A prompt counts once for each preferred response; shared, it goes through the head once."""
    rows = kway(toy)
    forming = Forming("all", 0.0)
    examples, _ = prepare_examples(rows, toy.tokenizer(), max_length=256, forming=forming)
    assert any(len({winner for winner, _ in e.pairs}) > 1 for e in examples)
    result = run(rows, loss_kwargs={"nll_reduction": reduction}, pair_policy="all", share_prompts=share)
    check_step(toy, result, examples, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_tokens_are_the_responses(toy, run, reduction):
    rows, weight = toy.rows(8), lambda n: (0.5 + torch.arange(n) % 2).double()
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_token_weights"] = weight(len(row[side].split()) + 1).tolist()
    examples, _ = prepare_examples(rows, toy.tokenizer(), max_length=256)
    result = run(rows, loss_kwargs={"nll_reduction": reduction})
    check_step(toy, result, examples, reduction=reduction, token_weight=weight)


def test_responses_whose_prompts_were_cut_apart(toy, run):
    """Truncation keeps the end, so that the two responses of a pair have prompts of their own."""
    rows = toy.rows(12, seed=6)
    examples, _ = prepare_examples(rows, toy.tokenizer(), max_length=16, truncation_mode="keep_end")
    assert any(e.response_prompts is not None for e in examples)
    result = run(rows, max_length=16, truncation_mode="keep_end", share_prompts="always")
    check_step(toy, result, examples)


CUTS = [
    {"max_tokens": 10_000}, {"max_tokens": 1},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens": 70},
]  # fmt: skip


@pytest.mark.parametrize("names", [["orpo"], ["orpo", "sft", "cpo"], ["orpo", "wpo"]], ids="+".join)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_neither_packing_nor_sharing_changes_anything(toy, run, reduction, names):
    """Training and evaluation; another NLL beside it is that of the response alone."""
    rows = kway(toy, 16)
    options = {"loss_type": names, "loss_kwargs": {"nll_reduction": reduction}, "pair_policy": "all", "max_steps": 2,
               "per_device_train_batch_size": 8, "learning_rate": 0.02, "eval_strategy": "steps", "eval_steps": 2,
               "rest": {"eval_dataset": kway(toy, 5)}}  # fmt: skip
    first, *others = [run(rows, **{**options, **cut, "share_prompts": share})
                      for share in ("never", "always") for cut in CUTS]  # fmt: skip
    for other in others:
        for key in ("loss", "eval_loss", "grad_norm", "rewards/chosen", "logps/chosen"):
            assert logged(other, key) == pytest.approx(logged(first, key), rel=2e-5, abs=1e-6), key
        torch.testing.assert_close(weights(other), weights(first), atol=1e-6, rtol=1e-5)


def test_beside_another_nll(toy, run):
    """`sft` and cpo's NLL stay those of the response."""
    rows = toy.rows(10)
    alone = {name: logged(run(rows, loss_type=name))[0] for name in ("orpo", "sft", "cpo", "tdpo1")}
    for others in (["sft"], ["cpo", "sft"], ["tdpo1"]):  # tdpo1 reads further numbers of the response's rows
        together = logged(run(rows, loss_type=["orpo", *others]))[0]
        assert together == pytest.approx(alone["orpo"] + sum(alone[n] for n in others), rel=1e-6)


def test_evaluation_is_the_training_loss(toy, run):
    rows = weighted(toy)
    result = run(rows, eval_strategy="steps", eval_on_start=True, rest={"eval_dataset": rows})
    assert logged(result, "eval_loss")[0] == pytest.approx(logged(result)[0], rel=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean"])
def test_an_interrupted_run_goes_on_bit_for_bit(toy, run, tmp_path, reduction):
    options = {"loss_kwargs": {"nll_reduction": reduction}, "per_device_train_batch_size": 4, "save_strategy": "steps",
               "save_steps": 2, "max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3}  # fmt: skip
    rows = toy.rows(12)
    whole = run(rows, **options, output_dir=str(tmp_path / "whole"))
    resumed = run(rows, **options, output_dir=str(tmp_path / "on"),
                  resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))  # fmt: skip
    assert torch.equal(weights(resumed), weights(whole)) and logged(resumed) == logged(whole)


def test_gradients_through_checkpointing(toy, run):
    rows = toy.rows(8)
    runs = [run(rows, gradient_checkpointing=on) for on in (False, True)]
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), atol=1e-7, rtol=1e-6)


def test_trl_orpo_trainer(toy, run):
    """The whole of TRL's loss, and its gradient, from its own batch; one padded batch is our step."""
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orpo_module = pytest.importorskip("trl.experimental.orpo")
    rows = toy.rows(9)
    examples, _ = prepare_examples(rows, toy.tokenizer(), max_length=256)
    theirs = object.__new__(orpo_module.ORPOTrainer)
    theirs.__dict__ |= dict(
        beta=0.1, is_encoder_decoder=False, padding_value=2, aux_loss_enabled=False,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda t: t),
    )  # fmt: skip
    batch = {}
    for k, side in enumerate(("chosen", "rejected")):
        longest = max(len(e.prompt_ids) + len(e.responses[k]) for e in examples)
        parts = {"input_ids": [], "attention_mask": [], "labels": []}
        for e in examples:
            ids = [*e.prompt_ids.tolist(), *e.responses[k].tolist()]
            pad = longest - len(ids)
            parts["input_ids"].append(ids + [2] * pad)
            parts["attention_mask"].append([1] * len(ids) + [0] * pad)
            parts["labels"].append([-100] * len(e.prompt_ids) + e.responses[k].tolist() + [-100] * pad)
        batch |= {f"{side}_{name}": torch.tensor(part) for name, part in parts.items()}
    model = toy.model()
    loss, metrics = theirs.get_batch_loss_metrics(model, batch)
    loss.backward()
    result = run(rows)
    assert logged(result)[0] == pytest.approx(loss.item(), rel=2e-6)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close((weights(toy.model()) - weights(result)) / RATE, gradient, rtol=1e-3, atol=3e-6)
    # its NLL alone
    without = run(rows, beta=1e-12)
    assert logged(without)[0] == pytest.approx(metrics["nll_loss"], rel=2e-6)


def test_what_collate_lists(toy):
    rng = random.Random(3)
    ids = lambda n: np.array([rng.randrange(50) for _ in range(n)], np.int32)  # noqa: E731
    first = Example(ids(4), [ids(3), ids(2), ids(5)], [(0, 1), (2, 1)], {"weight": [2.0, 0.5]}, {})
    second = Example(ids(1), [ids(2), ids(2)], [(1, 0)], {}, {})
    plain = collate([first, second], [1, 0])
    assert plain.prompts is None
    for share in (False, True):
        first.share = second.share = share
        batch = collate([first, second], [1, 0], with_prompts=True)
        prompts = batch.prompts
        assert batch.input_ids[prompts.rows].tolist() == first.prompt_ids[:-1].tolist() * (1 if share else 2)
        assert prompts.target.tolist() == first.prompt_ids[1:].tolist() * (1 if share else 2)
        assert batch.position_ids[prompts.rows].tolist() == [0, 1, 2] * (1 if share else 2)
        assert prompts.offsets.tolist() == ([0, 0, 3] if share else [0, 0, 3, 6])
        assert prompts.weight.tolist() == ([1.0, 2.5] if share else [1.0, 2.0, 0.5])
        assert prompts.of_pair.tolist() == ([0, 1, 1] if share else [0, 1, 2])
        assert batch.target.tolist() == plain.target.tolist() and len(batch.logit_rows) == len(plain.logit_rows)
    assert nll_count(first) == 8 and nll_count(first, with_prompt=True) == 8 + 2 * 3
    assert nll_count(second, with_prompt=True) == 2 and nll_count(first, "seq_mean", with_prompt=True) == 2


def test_the_prompts_travel_to_the_device(toy, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    examples, _ = prepare_examples(toy.rows(3), toy.tokenizer(), max_length=256)
    moved = collate(examples, [0, 2], with_prompts=True).to(torch.device("meta"))
    assert {part.device.type for part in (*moved.prompts, moved.target)} == {"meta"}


@pytest.mark.gpu
def test_one_step_on_a_gpu(toy, run):
    rows = toy.rows(8)
    for reduction in REDUCTIONS:
        options = {"loss_kwargs": {"nll_reduction": reduction}}
        on_gpu, on_cpu = run(rows, use_cpu=False, **options), run(rows, **options)
        assert logged(on_gpu) == pytest.approx(logged(on_cpu), rel=1e-4)
        torch.testing.assert_close(weights(on_gpu).cpu(), weights(on_cpu), atol=1e-4, rtol=1e-3)


def test_the_log_says_that_the_prompt_is_trained_on(toy, run, caplog):
    with caplog.at_level("INFO", logger="fastpo"):
        run(toy.rows(4))
    assert "tokens, context, and in the NLL: " in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="fastpo"):
        run(toy.rows(4), loss_kwargs={"disable_prompt_loss": True})
    assert "tokens, context, no loss: " in caplog.text and "in the NLL" not in caplog.text


def test_the_table_agrees():
    """The function alone, token_mean over its pairs: what the trainer's two terms sum to."""
    g = torch.Generator().manual_seed(0)
    lw, ll, lp = (-9 * torch.rand(5, generator=g, dtype=torch.float64) - 1 for _ in range(3))
    n = dict(chosen_len=torch.arange(2.0, 7), rejected_len=torch.arange(3.0, 8))
    whole = LOSSES["orpo"](lw, ll, **n, prompt_logps=lp, prompt_len=torch.arange(5.0))
    parts = LOSSES["orpo"](lw, ll, **n, nll_coef=0.0).mean() - (lw + lp).sum() / (20 + 10)
    assert whole.mean() == pytest.approx(parts.item(), rel=1e-12)

"""INPO and regularised DNO: a previous policy from a model, a path, columns or the start, mixed with the reference."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import fastpo
from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.errors import ConfigError, DataError, TrainingError
from fastpo.losses.table import resolve_terms
from fastpo.models.policy import Policy
from fastpo.reference import sources as references
from fastpo.reference.passes import reference_logps
from fastpo.reference.policies import Policies, Start
from fastpo.reference.roles import PREV, Given
from fastpo.training.distributed import Engine, World

ETA = 0.05
KAPPA = 0.25
KWARGS = {"loss_type": "inpo", "loss_kwargs": {"eta": ETA, "kappa": KAPPA}}


@pytest.fixture
def run(toy, tmp_path):
    count = iter(range(100))

    def call(folder=None, *, model=None, rows=None, **options):
        folder = folder or f"run{next(count)}"
        given = {
            k: options.pop(k)
            for k in ("ref_model", "prev_model", "eval_dataset", "callbacks", "peft_config")
            if k in options
        }
        defaults = dict(
            output_dir=str(tmp_path / folder), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
            max_steps=3, per_device_train_batch_size=8, learning_rate=1e-3, gradient_checkpointing=False,
            save_final=False, report=False, lr_scheduler_type="constant", save_strategy="no",
        )  # fmt: skip
        return fastpo.train(
            toy.model() if model is None else model, toy.rows(16) if rows is None else rows,
            processing_class=toy.tokenizer(), args={**defaults, **KWARGS, **options}, **given,
        )  # fmt: skip

    return call


def losses(result):
    return [line["loss"] for line in result.log_history if "loss" in line]


@pytest.fixture(scope="module")
def sums(toy):
    """`sums(model, rows)`: [rows, 2] log-probabilities of chosen and rejected in fp64, one response at a time."""
    tokenizer = toy.tokenizer()

    @torch.no_grad()
    def call(model, rows):
        def of(row, response):
            ids = tokenizer(row["prompt"] + row[response] + "<eos>")["input_ids"]
            start = len(tokenizer(row["prompt"])["input_ids"])
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            return logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).sum()

        return torch.stack([torch.stack([of(row, k) for k in ("chosen", "rejected")]) for row in rows])

    return call


def columns(rows, **of):
    """The rows with a policy's sums, [rows, 2], as columns `NAME_chosen_logps`, `NAME_rejected_logps`."""
    out = [dict(row) for row in rows]
    for name, values in of.items():
        for row, (chosen, rejected) in zip(out, values.tolist(), strict=True):
            row |= {f"{name}_chosen_logps": chosen, f"{name}_rejected_logps": rejected}
    return out


def test_every_source_gives_the_formula(toy, run, sums, tmp_path):
    rows, options = toy.rows(8), dict(max_steps=1)
    policy, ref, prev = (toy.model(seed) for seed in range(3))
    prev.save_pretrained(tmp_path / "prev")
    p, r, t = (sums(m, rows) for m in (policy, ref, prev))
    d = lambda x: x[:, 0] - x[:, 1]  # noqa: E731
    inpo = lambda r, t: ((d(p) - KAPPA * d(r) - (1 - KAPPA) * d(t) - 1 / (2 * ETA)) ** 2).mean().item()  # noqa: E731

    def loss(**given):
        return losses(run(**{"rows": rows, **options, **given}))[0]

    whole = inpo(r, t)
    assert loss(ref_model=ref, prev_model=prev) == pytest.approx(whole, rel=1e-5)
    assert loss(ref_model=ref, prev_model=str(tmp_path / "prev")) == pytest.approx(whole, rel=1e-5)
    assert loss(rows=columns(rows, ref=r, prev=t)) == pytest.approx(whole, rel=1e-5)
    assert loss(rows=columns(rows, prev=t), ref_model=ref) == pytest.approx(whole, rel=1e-5)
    assert loss(rows=columns(rows, ref=r), prev_model=prev) == pytest.approx(whole, rel=1e-5)
    assert loss(rows=columns(rows, prev=r), ref_model=ref, prev_model=prev) == pytest.approx(whole, rel=1e-5)
    # the start where one is not given: with ref_model alone, h = kappa ((tw - tl) - (rw - rl)) at the first step
    assert loss(ref_model=ref) == pytest.approx(inpo(r, p), rel=1e-5)
    assert loss(ref_model=ref) == pytest.approx((KAPPA * (d(p) - d(r)) - 10).square().mean().item(), rel=1e-5)
    assert loss(rows=columns(rows, ref=r)) == pytest.approx(inpo(r, p), rel=1e-5)
    assert loss(prev_model=prev) == pytest.approx(inpo(p, t), rel=1e-5)
    assert loss(rows=columns(rows, prev=t)) == pytest.approx(inpo(p, t), rel=1e-5)
    assert loss() == pytest.approx(100.0, rel=1e-6)

    m = KAPPA * r + (1 - KAPPA) * t
    h = 0.1 * (d(p) - d(m))
    dno = {"loss_type": "dno_reg", "loss_kwargs": {"kappa": KAPPA}, "ref_model": ref, "prev_model": prev}
    assert loss(**dno) == pytest.approx(-logsigmoid(h).mean().item(), rel=1e-5)
    z = 1 / (1 + math.exp(-0.4))  # win probabilities are read where they are there: 0.7 and 0.3
    expected = (-z * logsigmoid(h) - (1 - z) * logsigmoid(-h)).mean().item()
    assert loss(**dno, **{"rows": [row | {"win_prob": 0.7} for row in rows]}) == pytest.approx(expected, rel=1e-5)


def test_the_first_iteration_is_ipo(run):
    """Without a previous policy both are the start: INPO is IPO's sum with tau = eta, step for step."""
    ipo = run("ipo", loss_type="ipo", ipo_reduce="sum", beta=ETA, loss_kwargs=None)
    first = losses(run())
    assert first == pytest.approx(losses(ipo), rel=1e-6) and first[0] > first[1] > first[2]


def test_kappa_1_is_the_reference_alone_and_0_the_previous_policy(toy, run):
    ref, prev = toy.model(1), toy.model(2)
    both = {"ref_model": ref, "prev_model": prev}
    for kappa, alone in ((1.0, ref), (0.0, prev)):
        mixed = losses(run(**both, loss_kwargs={"eta": ETA, "kappa": kappa}))
        ipo = run(loss_type="ipo", ipo_reduce="sum", beta=ETA, loss_kwargs=None, ref_model=alone)
        assert mixed == pytest.approx(losses(ipo), rel=1e-6)


def test_neither_packing_nor_tokens_nor_sums_change_anything(toy, run, sums):
    rows, ref, prev = toy.rows(16), toy.model(1), toy.model(2)
    given = {"ref_model": ref, "prev_model": prev, "optim": "sgd", "learning_rate": 1e-4}
    whole = losses(run(rows=rows, **given))
    assert losses(run(rows=rows, **given, max_tokens=1)) == pytest.approx(whole, rel=1e-5)
    given |= {"ref_model": None, "prev_model": None}
    by_sums = columns(rows, ref=sums(ref, rows), prev=sums(prev, rows))
    assert losses(run(rows=by_sums, **given)) == pytest.approx(whole, rel=1e-5)


def test_evaluation_mixes_too(toy, run, sums):
    rows, prev = toy.rows(8, seed=1), toy.model(2)
    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 3, "prev_model": prev}
    result = run(eval_dataset={"a": rows, "b": columns(rows, ref=sums(toy.model(), rows))}, **options)
    line = next(line for line in result.log_history if "eval_a_loss" in line)
    p, t = (sums(m, rows) for m in (toy.model(), prev))
    margin = ((1 - KAPPA) * (p - t)) @ torch.tensor([1.0, -1.0]).double()
    assert line["eval_a_loss"] == pytest.approx((margin - 10).square().mean().item(), rel=1e-5)
    second = next(line for line in result.log_history if "eval_b_loss" in line)
    assert second["eval_b_loss"] == pytest.approx(line["eval_a_loss"], rel=1e-5)


def test_mix():
    def tokens(*values):
        return [[np.array(v, np.float32) for v in values], []]  # the second row is never visited

    examples = [
        Example(np.ones(1), [np.ones(n), np.ones(1)], [(0, 1)], response_columns={"prev_logps": [-3.0, -1.0]})
        for n in (2, 1)
    ]
    mixed = references.mix(examples, tokens([-1, -2], [-4]), tokens([-3, -2], [0]), 0.25)
    assert [part.tolist() for part in mixed[0]] == [[-2.5, -2.0], [-1.0]] and mixed[1] == []
    assert references.mix(examples, tokens([-1, -2], [-4]), None, 0.25) is None
    assert examples[0].response_columns["ref_logps"] == [-3.0, -1.75]
    assert "ref_logps" not in examples[1].response_columns


# ---- resuming


class Stop:
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_resuming(toy, run, tmp_path, monkeypatch, caplog):
    """Both policies' log-probabilities lie in the checkpoint, unmixed; neither model nor cache is needed again."""
    options = dict(save_strategy="steps", save_steps=1)
    given = {"ref_model": toy.model(1), "prev_model": toy.model(2)}
    whole = run("whole", **given, **options)
    with pytest.raises(KeyboardInterrupt):
        run("run", **given, **options, callbacks=[Stop()])
    folder = tmp_path / "run" / "checkpoint-2"
    identity = json.loads((folder / "run.json").read_text())
    assert identity["previous"] != identity["reference"] != identity["model"]
    files = [folder / f"{name}.safetensors" for name in ("reference", "previous")]
    assert all(file.exists() for file in files) and files[0].read_bytes() != files[1].read_bytes()

    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "another"))
    passes = []
    monkeypatch.setattr("fastpo.reference.cache._of_batch", lambda *args: passes.append(args))
    for again in (given, {}, {"ref_model": toy.model(1)}):  # the run goes on with what it was begun with
        result = run("run", **again, **options, resume_from_checkpoint=str(folder))
        for a, b in zip(result.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert not passes
    other = run(
        "run", **given, **options | {"loss_kwargs": {"eta": ETA, "kappa": 0.9}}, resume_from_checkpoint=str(folder)
    )
    assert losses(other)[2] != pytest.approx(losses(whole)[2]) and "'kappa': 0.9" in caplog.text


def test_a_first_iteration_stays_one(toy, run, tmp_path):
    options = dict(save_strategy="steps", save_steps=1)
    run("run", **options, max_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"
    assert not (folder / "previous.safetensors").exists()
    identity = json.loads((folder / "run.json").read_text())
    assert identity["previous"] == identity["reference"]
    with pytest.raises(ConfigError, match="lacks the previous policy's log-probabilities"):
        run("run", **options, prev_model=toy.model(2), resume_from_checkpoint=str(folder))


# ---- guards and mistakes


@pytest.mark.parametrize("given", ["ref_model", "prev_model"])
def test_a_start_that_is_not_the_other_policy_is_refused(toy, run, monkeypatch, given):
    """The guard of the first step also where only one of the two is the start."""
    real = reference_logps
    monkeypatch.setattr(
        "fastpo.reference.passes.reference_logps",
        lambda *args, **kwargs: [[part + 0.5 for part in parts] for parts in real(*args, **kwargs)],
    )
    with pytest.raises(TrainingError, match=r"differ by 0.5 .*loss \[.*\] instead of \["):
        run(**{given: toy.model(1)})


def test_mistakes(toy, run):
    rows, other = toy.rows(4), toy.model(1)
    prev = {"prev_chosen_logps": -1.0, "prev_rejected_logps": -2.0}
    cases = [
        ({"loss_type": "dpo", "loss_kwargs": None, "prev_model": other}, "dpo mixes no previous .* as ref_model"),
        ({"loss_type": "sppo_hard", "loss_kwargs": None, "prev_model": other}, "pass it as ref_model, its only"),
        ({"loss_type": "simpo", "loss_kwargs": None, "prev_model": other}, "simpo mixes no previous .* leave it out"),
        ({"sync_ref_model": True}, "sync_ref_model moves the reference, and inpo mixes it"),
        ({"prev_model": 3}, "prev_model must be a model, or the name or path of one, not 3"),
        ({"loss_type": ["dpo", "inpo"]}, "dpo reads the reference alone and inpo its mixture .* cannot be mixed"),
        ({"loss_kwargs": {"kappa": -0.1}}, r"inpo: kappa must be in \[0, 1\], not -0.1"),
        ({"rows": [row | {"prev_chosen_logps": -1.0} for row in rows]}, "'prev_chosen_logps' needs 'prev_rejected_lo"),
        ({"rows": [row | prev | {"prev_chosen_logps": 5.0} for row in rows]}, "prev_chosen_logps.* is 5.0"),
        ({"rows": [rows[0] | prev, *rows[1:]]}, "prev_chosen_logps"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises((ConfigError, DataError), match=message) as caught:
            run(**{"rows": rows, **options})
        assert "\n" not in str(caught.value)


def test_what_can_be_summed():
    """Losses without a reference, supervised terms, and the two with each other."""
    for names in (["inpo", "simpo", "sft"], ["inpo", "dno_reg"]):
        assert [t.name for t in resolve_terms(names)] == names


def test_an_adapter(toy, run):
    """A new adapter's previous policy is the base model, which is the start."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"])
    alike = losses(run(ref_model=toy.model(1), max_steps=1))
    assert losses(run(ref_model=toy.model(1), max_steps=1, peft_config=adapter)) == pytest.approx(alike, rel=1e-5)


def test_a_model_that_is_split_already(toy):
    """One model in memory as both references, under fsdp: the second use finds the first one's shards."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        given = Given(prev_model=fully_shard(toy.model(), mesh=mesh))
        start = Start(Engine(Policy(toy.model())), "", torch.float32)
        policies = Policies(given, start, TrainConfig(fsdp="full_shard"), World(torch.device("cpu")))
        with contextlib.ExitStack() as stack, pytest.raises(ConfigError, match="prev_model .* pass a copy, or its"):
            policies.load(PREV, {}, stack)
    finally:
        dist.destroy_process_group()

"""The parts that know a run's fixed policies, each made alone: no trainer, no hub; a folder only where files are kept.

What they give is compared with the model's own logits, one response at a time.
"""

import contextlib
import logging

import numpy as np
import pytest
import torch
from torch import nn

from fastpo.config.train_config import TrainConfig
from fastpo.data.prepare import Example, prepare_examples
from fastpo.errors import ConfigError, DataError
from fastpo.losses.table import resolve_terms
from fastpo.models.policy import Policy
from fastpo.reference import live
from fastpo.reference.cache import MovingReference, RefCache, read_entries
from fastpo.reference.kept import Kept
from fastpo.reference.passes import ReferencePass
from fastpo.reference.policies import Policies, Start
from fastpo.reference.roles import PREV, REF, Given
from fastpo.reference.sources import References, of_batch
from fastpo.training.distributed import Engine, World
from fastpo.training.objective import Objective
from fastpo.training.progress import Progress
from fastpo.training.step_plan import StepPlan
from fastpo.training.stepwide import TRAIN_MISMATCHED

WORLD = World(torch.device("cpu"))
KAPPA = 0.25
INPO = {"loss_kwargs": {"kappa": KAPPA}}


class Bar:
    """A progress bar that remembers."""

    made: list["Bar"] = []

    def __init__(self, desc, total):
        self.desc, self.total, self.n, self.closed = desc, total, 0, False
        Bar.made.append(self)

    def update(self, n):
        self.n += n

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def examples(toy) -> list[Example]:
    return prepare_examples(toy.rows(6), toy.tokenizer())[0]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of log-probabilities that no other test has filled."""
    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def parts(toy, tmp_path):
    """`parts(model, losses, **given)`: a References of these, with `verified` and `plan` beside it."""

    def make(model, losses=("dpo",), moving=None, kept=None, name=None, is_base=False, config=None, **given):
        policy = Policy(model)
        config = TrainConfig(per_device_train_batch_size=2, max_steps=2, loss_type=list(losses), **config or {})
        verified: list[Engine] = []
        start = Start(Engine(policy), "of the start", policy.dtype, name, is_base)
        out = References(
            config, Objective(resolve_terms(losses, **(INPO if "inpo" in losses else {}))),
            Policies(Given(**given), start, config, WORLD, verify=verified.append), passing(),
            kept or Kept(tmp_path), moving,
        )  # fmt: skip
        return out, verified

    return make


def passing(**options) -> ReferencePass:
    defaults = dict(passes=lambda parts, examples, work: map(work, parts), max_tokens=lambda: 60, bar=Bar)
    return ReferencePass(lambda engine, batch: engine.policy.logp(batch), WORLD, **{**defaults, **options})


def plan(examples, steps=2, **options):
    options = dict(per_device_train_batch_size=2, max_steps=steps, train_sampling_strategy="sequential") | options
    return StepPlan(TrainConfig(**options), len(examples))


@torch.no_grad()
def truth(model: nn.Module, example: Example) -> list[np.ndarray]:
    """Of each response, the log-probabilities of its tokens by the model's own logits, fp64."""
    out = []
    for k, response in enumerate(example.responses):
        ids = torch.from_numpy(np.concatenate([example.prompt_of(k), response])).long()
        logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        at = torch.arange(len(ids) - len(response), len(ids))
        out.append(logits[at - 1, ids[at]].numpy())
    return out


def agree(logps, model, examples, rows=None) -> bool:
    for i in range(len(examples)) if rows is None else rows:
        for got, expected in zip(logps[i], truth(model, examples[i]), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)
    return rows is None or not any(logps[i] for i in set(range(len(examples))) - set(rows))


# ---- the pass


def test_a_pass_is_the_models_own(toy, examples):
    model, cache, sizes = toy.model().train(), RefCache("", None), []
    Bar.made.clear()

    def score(engine, batch):
        assert not engine.policy.model.training and not torch.is_grad_enabled()
        sizes.append(batch.target.numel())
        return engine.policy.logp(batch)

    compute = passing()
    compute.score = score
    engine = Engine(Policy(model))
    out = compute(engine, cache, {"train": examples, "eval": examples}, {"train": {1, 4}}, what="reference")
    assert agree(out["train"], model, examples, [1, 4]) and agree(out["eval"], model, examples) and model.training
    assert [bar.desc for bar in Bar.made] == ["reference"] * 2 and all(bar.closed for bar in Bar.made)
    assert [(bar.n, bar.total) for bar in Bar.made] == [(2, 2), (4, 4)]  # two were known by then
    before = len(sizes)
    compute(engine, cache, {"eval": examples}, {})
    assert len(sizes) == before and max(sizes) <= 60


def test_a_pass_reads_its_budget_when_it_runs(toy, examples):
    """`max_tokens` may change between two passes, and `passes` decides how a micro-batch runs."""
    seen, limit = [], [10_000]

    def passes(parts, examples, work):
        for part in parts:
            seen.append(list(part))
            yield work(part)

    compute = passing(passes=passes, max_tokens=lambda: limit[0])
    engine = Engine(Policy(toy.model()))
    compute(engine, RefCache("", None), {"eval": examples}, {})
    assert list(map(len, seen)) == [6]
    seen.clear()
    limit[0] = 1
    compute(engine, RefCache("", None), {"eval": examples}, {})
    assert list(map(len, seen)) == [1] * 6


def test_a_pass_that_is_refused(toy, examples):
    """Nothing is computed; what is in the cache is enough all the same."""
    engine, cache, compute = Engine(Policy(toy.model())), RefCache("", None), passing()
    with pytest.raises(ConfigError, match="^not this model$"):
        compute(engine, cache, {"train": examples}, {"train": {0}}, refuse="not this model")
    compute(engine, cache, {"train": examples}, {"train": {0}})
    out = compute(engine, cache, {"train": examples}, {"train": {0}}, refuse="not this model")
    assert agree(out["train"], toy.model(), examples, [0])


# ---- what is kept


def test_what_is_kept(tmp_path, examples, caplog):
    kept = Kept(tmp_path)
    assert kept.is_as_begun(REF, "a") and kept.is_as_begun(REF, "a") and not kept.is_as_begun(REF, "b")
    assert kept.keys == {"reference": "a"} and kept.is_as_begun(PREV, "b")
    logps = [[np.full(len(r), -float(i), np.float32) for r in e.responses] for i, e in enumerate(examples)]
    kept.write(REF, {"train": examples}, {"train": logps})
    assert len(read_entries(tmp_path / REF.file)[0]) == 12 and not list(tmp_path.glob(".*"))

    resumed = Kept(tmp_path / "next", tmp_path, {"reference": "a", "run_id": "x"})
    assert resumed.keys == {"reference": "a"} and not resumed.is_as_begun(REF, "b")
    resumed.clear()
    cache = RefCache("", None)
    resumed.read(REF, cache)
    resumed.read(PREV, cache)  # which is not there
    assert len(cache.entries) == 12
    resumed.write(REF, {"train": examples}, {"train": logps})  # its folder is not there
    assert "could not be written beside the run" in caplog.text
    kept.clear()
    assert not (tmp_path / REF.file).exists()


# ---- the references of a run


def test_the_start(toy, examples, parts, tmp_path):
    references, verified = parts(toy.model())
    assert references.starts_at_reference and references.start is None and references.of_set("train") is None
    steps = plan(examples)
    references.attach(steps, {"train": examples, TRAIN_MISMATCHED: examples, "eval": examples})
    rows = sorted(steps.visited())
    assert len(rows) == 4 and not verified and references.starts_at_reference
    for name in ("train", TRAIN_MISMATCHED):
        assert agree(references.of_set(name), toy.model(), examples, rows)
    assert agree(references.of_set("eval"), toy.model(), examples)
    assert (tmp_path / REF.file).exists() and list(references.kept.keys) == ["reference"]


def test_a_model_given(toy, examples, parts, tmp_path, own_cache):
    toy.model(2).save_pretrained(tmp_path / "other")
    for ref_model in (toy.model(2), str(tmp_path / "other")):
        references, verified = parts(toy.model(), ref_model=ref_model)
        references.attach(plan(examples, 3), {"train": examples})
        assert len(verified) == 1 and not references.starts_at_reference
        assert agree(references.of_set("train"), toy.model(2), examples)
    references, _ = parts(toy.model(), ref_model=3)
    with pytest.raises(ConfigError, match="ref_model must be a model, or its name or path, not 3"):
        references.attach(plan(examples), {"train": examples})


def test_the_base_below_an_adapter(toy, examples, parts):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(toy.model(), config)
    references, _ = parts(model, is_base=True)
    references.attach(plan(examples, 3), {"train": examples})
    assert agree(references.of_set("train"), toy.model(), examples)
    other = references.of_other_rows({"more": examples[:2]}, trained=True)["more"]
    assert agree(other, toy.model(), examples[:2])
    assert np.abs(truth(model, examples[0])[0] - truth(toy.model(), examples[0])[0]).max() > 1e-3  # it is on again


def with_sums(examples, column="ref_logps", value=-3.0, rows=None):
    out = prepare_again(examples)
    for i in range(len(out)) if rows is None else rows:
        out[i].response_columns[column] = [value] * len(out[i].responses)
    return out


def prepare_again(examples):
    return [Example(e.prompt_ids, e.responses, e.pairs) for e in examples]


def test_rows_that_give_their_sums(toy, examples, parts, caplog):
    caplog.set_level(logging.INFO, "fastpo")
    references, _ = parts(toy.model())
    references.attach(plan(examples), {"train": with_sums(examples), "eval": examples})
    assert references.of_set("train") is None and agree(references.of_set("eval"), toy.model(), examples)
    assert not references.starts_at_reference and "log-probabilities from the data" in caplog.text

    references, _ = parts(toy.model(), ref_model=toy.model(2))  # a model goes before them
    references.attach(plan(examples), {"train": with_sums(examples)})
    assert references.of_set("train") is not None

    with pytest.raises(DataError, match="ref_chosen_logps or .* missing in some rows of the train data"):
        parts(toy.model())[0].attach(plan(examples), {"train": with_sums(examples, rows=[0, 2])})
    with pytest.raises(DataError, match="sampo needs the reference's log-probability of every token"):
        parts(toy.model(), ["sampo"])[0].attach(plan(examples), {"train": with_sums(examples)})


def test_losses_that_read_none(toy, examples, parts):
    for losses in (["simpo"], ["tdpo2"]):  # the latter's is in memory
        references, _ = parts(toy.model(), losses)
        references.attach(plan(examples), {"train": examples})
        assert references.of_set("train") is None and not references.kept.keys
    assert parts(toy.model(), ["simpo"])[0].of_other_rows({"more": examples}, trained=True) == {}


# ---- the previous policy


def test_a_mixture(toy, examples, parts):
    ref, prev = toy.model(1), toy.model(2)
    references, verified = parts(toy.model(), ["inpo"], ref_model=ref, prev_model=prev)
    references.attach(plan(examples, 3), {"train": examples})
    assert len(verified) == 2 and set(references.kept.keys) == {"reference", "previous"} and references.start is None
    for example, logps in zip(examples, references.of_set("train"), strict=True):
        for got, r, t in zip(logps, truth(ref, example), truth(prev, example), strict=True):
            np.testing.assert_allclose(got, KAPPA * r + (1 - KAPPA) * t, atol=1e-5)


def test_a_mixture_with_the_start(toy, examples, parts):
    """The start's own numbers are known beside the mixture, for the guard of the first step."""
    for given in ("ref_model", "prev_model"):
        references, _ = parts(toy.model(), ["inpo"], **{given: toy.model(1)})
        references.attach(plan(examples, 3), {"train": examples})
        assert agree(references.start, toy.model(), examples) and not references.starts_at_reference


def test_a_mixture_with_sums(toy, examples, parts):
    rows = with_sums(examples, "prev_logps")
    references, _ = parts(toy.model(), ["inpo"])
    references.attach(plan(examples, 3), {"train": rows})
    assert references.of_set("train") is None
    for example in rows:
        expected = [KAPPA * logp.sum() + (1 - KAPPA) * -3.0 for logp in truth(toy.model(), example)]
        assert example.response_columns["ref_logps"] == pytest.approx(expected, abs=1e-4)


def test_a_first_iteration(toy, examples, parts, caplog):
    caplog.set_level(logging.INFO, "fastpo")
    references, _ = parts(toy.model(), ["inpo"])
    references.attach(plan(examples, 3), {"train": examples})
    assert agree(references.of_set("train"), toy.model(), examples) and references.starts_at_reference
    keys = references.kept.keys
    assert keys["previous"] == keys["reference"] and "the reference, which is the policy" in caplog.text


def test_check_previous(toy):
    dpo, inpo = Objective(resolve_terms(["dpo"])), Objective(resolve_terms(["inpo"]))
    dpo.check_reference(TrainConfig(), None, None)
    inpo.check_reference(TrainConfig(loss_type="inpo"), None, toy)
    with pytest.raises(ConfigError, match="dpo mixes no previous policy .* pass it as ref_model"):
        dpo.check_reference(TrainConfig(loss_type="dpo"), None, toy)
    with pytest.raises(ConfigError, match="inpo mixes it with the previous policy once"):
        inpo.check_reference(TrainConfig(loss_type="inpo", sync_ref_model=True), None, None)


# ---- a reference that moves


def test_a_moving_reference(toy, examples, parts):
    model, progress, held = toy.model(), Progress(), []

    @contextlib.contextmanager
    def whole():
        with progress.exchanging():
            held.append(progress.updating)
            yield

    moving = MovingReference(dict(model.named_parameters()), 0.5, every=1, whole=whole)
    references, _ = parts(model, moving=moving, config={"sync_ref_model": True})
    steps = plan(examples)
    references.attach(steps, {"train": examples})
    assert references.of_set("train") is None and not held and references.starts_at_reference
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    references.move(steps, 0)
    assert agree(references.of_set("train"), toy.model(), examples, steps[0][1])
    moving.move_()
    references.move(steps, 1)
    between, policy = toy.model(), dict(model.named_parameters())
    with torch.no_grad():
        for name, p in between.named_parameters():
            p.lerp_(policy[name], 0.5)
    assert agree(references.of_set("train"), between, examples, steps[1][1])
    other = references.of_other_rows({"more": examples}, trained=True)["more"]
    assert agree(other, between, examples)
    torch.testing.assert_close(policy["lm_head.weight"], 1.5 * toy.model().lm_head.weight)  # back in its place
    assert held == [True] * 6 and not progress.updating


def test_an_exchange_that_fails_leaves_the_mark():
    """Weights that are neither the policy's nor the reference's must not be saved afterwards either."""
    progress = Progress()
    with pytest.raises(RuntimeError), progress.exchanging():
        raise RuntimeError
    assert progress.updating


# ---- rows that the run did not begin with


def test_other_rows(toy, examples, parts, tmp_path, own_cache):
    references, _ = parts(toy.model())
    with references.held({"more": examples}, trained=False):
        assert agree(references.of_set("more"), toy.model(), examples)
    assert references.of_set("more") is None
    references.hold({"eval": examples}, trained=False)
    known = references.of_set("eval")
    references.hold({"eval": examples}, trained=True)  # known by then
    assert references.of_set("eval") is known and agree(known, toy.model(), examples)
    with pytest.raises(ConfigError, match=r"which is gone; pass the rows as eval_dataset, or pass ref_model$"):
        references.check_other_rows(trained=True)
    with pytest.raises(ConfigError, match="which is gone"), references.held({"more": examples}, trained=True):
        pass
    given, _ = parts(toy.model(), ref_model=toy.model(2))
    assert agree(given.of_other_rows({"more": examples}, trained=True)["more"], toy.model(2), examples)
    for losses in (["inpo"], ["tdpo2"]):
        with pytest.raises(ConfigError, match=r"evaluate\(\) takes no rows with"):
            parts(toy.model(), losses)[0].check_other_rows(trained=False)


def test_the_start_loaded_again(toy, examples, parts, tmp_path, own_cache):
    """By the name that the policy was given by, if its weights are still there; the fingerprint says so."""
    from fastpo.reference.cache import model_fingerprint

    folder = str(tmp_path / "model")
    toy.model().save_pretrained(folder)
    references, _ = parts(toy.model(5), name=folder)  # as training has left it
    with pytest.raises(ConfigError, match="is no longer what the run began with"):
        references.of_other_rows({"more": examples}, trained=True)
    start = references.policies.start
    begun = Start(start.engine, model_fingerprint(toy.model()), start.dtype, folder)
    references.policies = Policies(Given(), begun, TrainConfig(), WORLD)
    assert agree(references.of_other_rows({"more": examples}, trained=True)["more"], toy.model(), examples)


# ---- a resumed run


def test_a_resumed_run(toy, examples, parts, tmp_path, own_cache, monkeypatch):
    sets, begun = {"train": examples}, tmp_path / "begun"
    begun.mkdir()
    first, _ = parts(toy.model(), ref_model=toy.model(1), kept=Kept(begun))
    first.attach(plan(examples), sets)
    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "another"))
    # Another model is given now: what the checkpoint has is used, and nothing that it lacks is computed.
    resumed, _ = parts(toy.model(), ref_model=toy.model(2), kept=Kept(tmp_path, begun, first.kept.keys))
    resumed.attach(plan(examples), sets)
    assert agree(resumed.of_set("train"), toy.model(1), examples, plan(examples).visited())
    resumed, _ = parts(toy.model(), ref_model=toy.model(2), kept=Kept(tmp_path, begun, first.kept.keys))
    for _ in range(2):  # what has failed is not taken for done
        with pytest.raises(ConfigError, match="lacks the reference's log-probabilities for rows .* and ref_model that"):
            resumed.attach(plan(examples, 3), sets)
    with pytest.raises(ConfigError, match="lacks the reference's log-probabilities"):
        resumed.of_other_rows({"more": examples}, trained=True)
    same, _ = parts(toy.model(), ref_model=toy.model(1), kept=Kept(tmp_path, begun, first.kept.keys))
    same.attach(plan(examples, 3), sets)
    assert agree(same.of_set("train"), toy.model(1), examples)


# ---- a reference in memory


def policies(model, config=None, is_base=False, **given):
    policy = Policy(model)
    start = Start(Engine(policy), "of the start", policy.dtype, is_base=is_base)
    return Policies(Given(**given), start, config or TrainConfig(), WORLD)


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("source", ["start", "model", "base"])
def test_a_live_reference(toy, examples, tmp_path, source):
    from fastpo.data.packing import collate

    model, given, expected = toy.model(), {}, toy.model()
    if source == "base":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    if source == "model":
        given, expected = {"ref_model": toy.model(2)}, toy.model(2)
    progress, kept = Progress(), Kept(tmp_path)
    made = policies(model, is_base=source == "base", **given)
    reference = live.start(
        made, kept, {"train": examples}, trainable(model), loss="tdpo2", whole=progress.exchanging
    )  # fmt: skip
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.1)  # a step of training
    left = {n: p.clone() for n, p in model.named_parameters()}
    batch = collate(examples, [2, 0])
    hidden, head = reference.rows(batch)
    reference.close()
    wanted = [truth(expected, examples[i]) for i in batch.examples]
    torch.testing.assert_close(batch.ref_logp, of_batch(dict(zip(batch.examples, wanted, strict=True)), batch),
                               atol=1e-5, rtol=0)  # fmt: skip
    assert hidden.shape[0] == batch.target.numel() and not head.weight.requires_grad
    assert all(torch.equal(left[n], p) for n, p in model.named_parameters()) and not progress.updating
    assert list(kept.keys) == ["reference"]


def test_a_live_reference_is_refused(toy, examples, tmp_path):
    model, sharing = toy.model(), toy.model(1)
    sharing.lm_head.weight = model.lm_head.weight
    sets = {"train": examples}
    with pytest.raises(ConfigError, match="ref_model shares weights with the model that is trained"):
        live.start(policies(model, ref_model=sharing), Kept(tmp_path), sets, trainable(model), loss="tdpo2")
    with pytest.raises(ConfigError, match="ref_model has 120 tokens and the model 100"):
        other = policies(model, ref_model=toy.model(vocab_size=120))
        live.start(other, Kept(tmp_path), sets, trainable(model), loss="tdpo2")
    with pytest.raises(DataError, match="the train data have ref_chosen_logps .* tdpo2 needs the reference's logits"):
        live.start(
            policies(model), Kept(tmp_path), {"train": with_sums(examples)}, trainable(model), loss="tdpo2"
        )  # fmt: skip
    with pytest.raises(ConfigError, match="was trained against another reference, which is not in it"):
        kept = Kept(tmp_path, tmp_path, {"reference": "of another"})
        live.start(policies(model), kept, sets, trainable(model), loss="tdpo2")

"""The parts that the trainer is made of, each alone: no trainer, no folder, no hub."""

import contextlib
import math

import pytest
import torch
from transformers import TrainerControl, TrainerState

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, TrainingError
from fastpo.models.policy import Policy
from fastpo.plan.settle import settle
from fastpo.training import start_guard
from fastpo.training.accumulation import Accumulation
from fastpo.training.distributed import Engine, World
from fastpo.training.evaluation import Evaluation
from fastpo.training.forward import Forward
from fastpo.training.inputs import Origin
from fastpo.training.memory import Budget, savings
from fastpo.training.metrics import token_sums
from fastpo.training.micro_batches import MicroBatches
from fastpo.training.objective import Objective
from fastpo.training.optim import Gradients
from fastpo.training.passes import Passes
from fastpo.training.progress import Progress
from fastpo.training.run_data import DataSets
from fastpo.training.schedule import Schedule
from fastpo.training.stepwide import StepWide
from fastpo.training.take_model import take_model
from fastpo.training.update import Update, check_optimizers

CPU = torch.device("cpu")
WORLD = World(CPU, 0, 1, 0)


def config_of(**options):
    return TrainConfig.build({"use_cpu": True, "bf16": False, "gradient_checkpointing": False, **options})


class Parts:
    """The parts around a toy model and `rows`, as the trainer connects them."""

    def __init__(self, toy, rows, max_tokens=80, **options):
        self.config = config_of(**options)
        self.objective = Objective.of_options(self.config)
        self.data = DataSets(self.config, WORLD, toy.tokenizer(), self.objective)
        self.data.read(rows, None)
        self.model = toy.model().eval()
        self.policy = Policy(self.model)
        self.forward = Forward(Engine(self.policy), self.config, CPU, self.objective.row_statistics)
        self.batches = MicroBatches(self.config, WORLD, self.objective, self.policy)
        self.batches.place("train", self.data.train)
        self.budget = Budget(max_tokens, self.config, WORLD, lambda training: "less", self.data.name_of)
        self.passes = Passes(self.batches, self.forward, self.budget, WORLD)
        self.stepwide = StepWide(self.objective.pair_terms, self.config)
        self.stepwide.prepare(self.data.all)

    def logps(self, max_tokens=80):
        """Token log-probabilities of all rows by row: what a reference of the policy itself has."""
        shares = self.batches.of_step(self.data.train, range(len(self.data.train)), max_tokens)
        out = {}
        with self.policy.attach():
            for batch, logp in self.passes.logps(shares[0], len(shares[0]), self.data.train, None, [0]):
                lengths = [len(r) for i in batch.examples for r in self.data.train[i].responses]
                parts = iter(logp.split(lengths))
                for i in batch.examples:
                    out[i] = [next(parts).numpy() for _ in self.data.train[i].responses]
        return [out[i] for i in range(len(out))]


def test_the_objective_says_what_it_reads():
    plain = Objective.of_options(config_of(loss_type="simpo"))
    assert not plain.uses_reference and plain.kappa is None and not plain.row_statistics
    with pytest.raises(ConfigError, match="ref_model is given, and simpo has no reference"):
        plain.check_reference(config_of(loss_type="simpo"), object())
    several = Objective.of_options(config_of(loss_type=["inpo", "sft"]))
    assert several.uses_reference and several.kappa is not None and [t.name for t in several.sft_terms] == ["sft"]
    assert Objective.of_options(config_of(loss_type="tdpo2")).row_statistics == {"token_kl"}
    listed = config_of(loss_type="exo_rw", pair_policy="all")
    with pytest.raises(ConfigError, match="exo_rw reads whole lists"):
        Objective.of_options(listed).forming(listed)


def test_data_sets_name_their_rows(toy):
    parts = Parts(toy, [{"prompt": "w1", "chosen": "", "rejected": ""}, *toy.rows(3)], invalid_rows="drop")
    assert len(parts.data.train) == 3 and list(parts.data.all) == ["train"]
    assert parts.data.name_of(parts.data.train, 0) == "row 1 of the train data"  # the one that was left out counts
    with pytest.raises(ConfigError, match="eval_strategy is set, but there is no eval_dataset"):
        DataSets(config_of(eval_strategy="steps"), WORLD, toy.tokenizer(), parts.objective).read(toy.rows(2), None)


def test_columns_are_not_read_where_a_model_stands_for_them(toy):
    objective = Objective.of_options(config_of(loss_type="inpo"))
    columns = {
        given: set(DataSets(config_of(loss_type="inpo"), WORLD, toy.tokenizer(), objective, given=set(given)).columns)
        for given in ((), ("ref_model",), ("prev_model",))
    }
    assert columns[()] - columns[("ref_model",)] == {"ref_chosen_logps", "ref_rejected_logps", "ref_greedy_logps"}
    assert columns[()] - columns[("prev_model",)] == {"prev_chosen_logps", "prev_rejected_logps"}


def test_packing_changes_no_log_probability(toy):
    parts = Parts(toy, toy.rows(9))
    wide, narrow = parts.logps(10_000), parts.logps(40)
    for a, b in zip(wide, narrow, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(torch.from_numpy(x), torch.from_numpy(y), rtol=1e-5, atol=1e-5)
    odd = config_of(max_tokens=100, token_bucket=64)
    with pytest.raises(ConfigError, match="max_tokens=100 is no multiple of token_bucket=64: 64 is one"):
        settle(parts.model, odd, WORLD, parts.data.train, parts.objective, autocast=False)


def test_a_forward_watches_only_when_asked(toy):
    parts = Parts(toy, toy.rows(2))
    batch = parts.batches.batch(parts.data.train, [0, 1], None)
    with torch.no_grad(), parts.policy.attach():
        parts.forward(batch)
        assert not batch.rows
        with parts.forward.watching():
            parts.forward(batch)
        assert set(batch.rows) == {"entropy", "top1"} and not parts.forward.watches
    entropy = batch.rows["entropy"]
    assert 0 < entropy.min() and entropy.max() <= math.log(toy.words + 3) + 1e-5


def test_a_forward_gives_entropies_with_a_gradient_to_a_loss_that_wants_them(toy):
    """In passes with statistics alone; the log's sums of them have no graph."""
    parts = Parts(toy, toy.rows(2))
    batch = parts.batches.batch(parts.data.train, [0, 1], None)
    parts.forward.wants_entropy = True
    with parts.policy.attach(), parts.forward.watching():
        plain = parts.forward(batch, statistics=False)
        assert not batch.rows
        logp = parts.forward(batch)
        entropy = batch.rows["entropy"]
        assert logp.equal(plain) and entropy.requires_grad and not token_sums(batch).requires_grad
        assert set(batch.rows) == {"entropy", "top1"}
        entropy.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.model.parameters())
    parts.forward.wants_entropy = False
    with torch.no_grad(), parts.policy.attach(), parts.forward.watching():
        parts.forward(batch)
    assert batch.rows["entropy"].equal(entropy.detach())


def test_a_step_is_normalised_over_all_of_its_micro_batches(toy):
    """Loss, metrics and gradients of a step are the same in one micro-batch and in many."""
    found = []
    for max_tokens in (10_000, 60):
        parts = Parts(toy, toy.rows(6), max_tokens=max_tokens, loss_type=["simpo", "sft"], token_metrics=True)
        gradients = Gradients(dict(parts.model.named_parameters()), master_weights="none", seed=0)
        substeps = []
        accumulation = Accumulation(
            parts.objective, parts.stepwide, parts.passes, gradients, parts.data.train, lambda to=substeps: to.append(1)
        )
        with contextlib.closing(gradients), parts.policy.attach(), parts.forward.watching():
            sums = accumulation(range(6), lambda name: None, 1, warn=lambda warning: None)
            gradients.reduce_()
            found.append((sums, len(substeps), parts.model.lm_head.weight.grad.clone()))
    (one, none, grad_one), (many, some, grad_many) = found
    assert len(one.batches) == 1 and not none and some == len(many.batches) - 1 > 1
    for name in ("loss", "metrics", "tokens"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_one, grad_many, rtol=1e-4, atol=1e-6)


def test_a_step_that_does_not_start_at_its_reference_ends_the_run(toy):
    parts = Parts(toy, toy.rows(4))
    off = [[logp + 0.5 for logp in of_row] for of_row in parts.logps()]
    guard = start_guard.StartGuard(parts.objective, False, lambda batch: batch.ref_logp, "the cache")
    gradients = Gradients(dict(parts.model.named_parameters()), master_weights="none", seed=0)
    accumulation = Accumulation(parts.objective, parts.stepwide, parts.passes, gradients, parts.data.train)
    with contextlib.closing(gradients), parts.policy.attach():
        with pytest.raises(TrainingError, match="should start at its reference, .* differ by 0.5 on average"):
            accumulation(range(4), {"train": off}.get, 1, lambda warning: None, guard)


def test_a_budget_halves_after_the_second_failure(toy):
    parts = Parts(toy, toy.rows(8), max_tokens=1000)
    budget, warned, dropped, tried = parts.budget, [], [], []

    def work():
        part = list(range(8)) if not budget.lowered else [0]
        budget.tries(parts.data.train, part)
        tried.append(budget.tokens)
        if not budget.lowered:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    got = budget.repeat(work, drop=lambda: dropped.append(1), restart=lambda: None, step=3, warn=warned.append)
    assert got == "done" and len(dropped) == 2 and tried[:2] == [1000, 1000] and tried[2] < 1000
    assert [w.name for w in warned] == ["out_of_memory"] and warned[0].step == 3
    state = budget.state_dict()
    fresh = Budget(1000, parts.config, WORLD, lambda training: "less", parts.data.name_of)
    fresh.load_state_dict(state)
    assert fresh.tokens == budget.tokens and fresh.lowered


def test_a_row_that_does_not_fit_alone_is_named(toy):
    parts = Parts(toy, toy.rows(3))

    def work(part):
        raise MemoryError

    with pytest.raises(TrainingError, match="out of memory: row 1 of the train data alone, .* use less"):
        list(parts.budget.passes([[1]], parts.data.train, work))
    advice = savings(parts.config, parts.model, torch.float32, CPU, True)
    assert advice.startswith("gradient_checkpointing, logits_memory_budget=0")


def test_statistics_of_a_step_do_not_depend_on_its_packing(toy):
    """KTO's KL over mismatched rows; the reference is a policy a little off."""
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": bool(i % 2)} for i, r in enumerate(toy.rows(6))]
    found = []
    for max_tokens in (40, 10_000):
        parts = Parts(toy, rows, loss_type="kto", max_tokens=max_tokens)
        off = [[logp + 0.25 for logp in of_row] for of_row in _logps_of(parts, parts.stepwide.mismatched["train"])]
        with parts.policy.attach():
            stats = parts.stepwide.statistics("train", range(6), parts.passes, {"train mismatched": off}.get)
        found.append(stats.kl.item())
    tokens = [len(e.responses[0]) for e in parts.stepwide.mismatched["train"]]
    assert found[0] == pytest.approx(found[1], rel=1e-4) == pytest.approx(-0.25 * sum(tokens) / 6, rel=1e-4)


def _logps_of(parts, examples):
    out = {}
    with parts.policy.attach():
        for batch, logp in parts.passes.logps([list(range(len(examples)))], 1, examples, None, [0]):
            split = logp.split([len(examples[i].responses[0]) for i in batch.examples])
            out |= {i: [x.numpy()] for i, x in zip(batch.examples, split, strict=True)}
    return [out[i] for i in range(len(examples))]


def test_an_evaluation_against_itself_has_no_margin(toy):
    parts = Parts(toy, toy.rows(7))
    ref = parts.logps()
    evaluation = Evaluation(parts.objective, parts.stepwide, parts.passes, True, lambda e: {"n": len(e.chosen_logps)})
    metrics = evaluation(parts.data.train, {"train": ref}.get, "train", "mine")
    assert metrics["mine_loss"] == pytest.approx(math.log(2), abs=1e-6) and metrics["mine_n"] == 7
    assert metrics["mine_rewards/margins"] == pytest.approx(0, abs=1e-6) and "mine_entropy" in metrics


def test_an_update_moves_the_weights_unless_the_step_is_not_finite(toy):
    model = torch.nn.Linear(2, 1, bias=False)
    before, called = model.weight.detach().clone(), []
    config = config_of(optim="sgd", learning_rate=0.5, lr_scheduler_type="linear", max_grad_norm=0.0)
    update = Update(model, dict(model.named_parameters()), config, WORLD, (None, None), steps=2)
    with contextlib.closing(update.gradients):
        for step, loss in enumerate((torch.tensor(1.0), torch.tensor(math.nan)), 1):
            update.gradients.begin(1, step)
            model(torch.ones(1, 2)).sum().backward()
            update.gradients.reduce_()
            norm, finite = update.norm(loss)
            assert norm.item() == pytest.approx(math.sqrt(2)) and bool(finite) == math.isfinite(loss)
            update.step(finite, then=lambda: called.append(1))
    torch.testing.assert_close(model.weight.detach(), before - 0.5)
    assert len(called) == 2 and update.learning_rate() == 0.0
    with pytest.raises(ConfigError, match="fsdp splits the parameters"):
        check_optimizers((update.optimizer, None), config_of(fsdp="full_shard"))


def test_a_schedule_marks_what_is_due():
    config = config_of(
        logging_steps=2, save_strategy="epoch", eval_strategy="steps", eval_steps=3, per_device_train_batch_size=2
    )
    schedule = Schedule(config, rows=7, batch=config.per_device_train_batch_size, steps=8)
    state, control = TrainerState(), TrainerControl()
    schedule.begin(state)
    assert (state.max_steps, state.logging_steps, state.eval_steps) == (8, 2, 3)
    due = []
    for step in range(1, 9):
        state.global_step, state.epoch = step, step / 4
        control.should_log = control.should_evaluate = control.should_save = False
        assert schedule.logs_next(TrainerState(global_step=step - 1, logging_steps=2), False, step == 8) == (
            step % 2 == 0
        )
        schedule.mark_due(control, state, "steps", at_end=step == 8)
        if step % 4 == 0:
            schedule.mark_due(control, state, "epoch", at_end=step == 8)
        due.append((control.should_log, control.should_evaluate, control.should_save))
    assert [log for log, _, _ in due] == [False, True] * 4
    assert [at + 1 for at, (_, evaluate, _) in enumerate(due) if evaluate] == [3, 6, 8]
    assert [at + 1 for at, (_, _, save) in enumerate(due) if save] == [4, 8]
    assert schedule.epoch(1, 3) == 1.5  # two of the four batches of seven rows


def test_the_start_guard_knows_another_policy(toy):
    parts = Parts(toy, toy.rows(3))
    ref = parts.logps()
    guard = start_guard.StartGuard(parts.objective, False, lambda batch: batch.ref_logp, "the cache")
    batch = parts.batches.batch(parts.data.train, [0, 1, 2], ref)
    with torch.no_grad(), parts.policy.attach():
        logp = parts.forward(batch)
    assert guard(logp, batch) is None
    assert "differ by 0.5 on average" in guard(logp + 0.5, batch)
    first = parts.data.train[:2]
    assert start_guard.verify(parts.forward, parts.forward.engine, first, [parts.data.train], quiet=True) is None


def test_progress_goes_on_where_it_was():
    progress = Progress(cursor=3, seen=5, rows_done=9, num_tokens=70, todo={"stage": 1})
    progress.start()
    fresh = Progress()
    fresh.load_state_dict(progress.state_dict())
    assert (fresh.cursor, fresh.seen, fresh.num_tokens, fresh.todo) == (3, 5, 70, {"stage": 1})
    assert fresh.saved_step == -1 and not fresh.updating


def test_a_model_in_memory_is_taken_as_it_is(toy):
    model = toy.model(attention_dropout=0.1)
    origin = Origin.of(model, toy.rows(1), None, None, None, WORLD)
    assert not origin.by_name and origin.paths == {} and origin.dataset_name is None
    assert take_model(origin, config_of(), CPU, None, None, None) is model
    with pytest.raises(ConfigError, match="need a model given by name or path"):
        take_model(origin, config_of(dtype="bfloat16"), CPU, None, None, None)
    with pytest.raises(ConfigError, match="ref_model is the model that is trained"):
        Origin.of(model, toy.rows(1), None, model, None, WORLD)

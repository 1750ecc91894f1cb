"""The trainer: `fastpo.train(model, train_dataset, ...)`, one optimiser step after another.

A step is `per_device_train_batch_size x gradient_accumulation_steps x processes` pairs in the seeded order. It is
packed into micro-batches of at most `max_tokens` tokens, shared between the processes; every loss term is normalised by
its count over the whole step, so the numbers depend neither on the packing nor on the number of processes. Metrics stay
on the device until a logging step.

The map:

    __init__   the parts, made from arguments and options: losses, data, model, micro-batches, memory
    ready      the model as this run's processes hold it, its guard, and the policies that it is compared with
    _train     what needs the plan of all steps: the reference's log-probabilities, optimiser, log, checkpoints
    _loop      epochs and steps; `_settle` after each step: log, evaluate, save, in this order
    _step      one optimiser step: gradients (training/accumulation.py), clip, update, count

Where is the loss normalised? In training/accumulation.py, `_run`. Where is a checkpoint decided? In
training/schedule.py by the options, then by the callbacks, and `_settle` saves. Where does the reference come from?
reference/sources.py, `attach`. An online loss's responses? online/rollouts.py. In face.py: what scripts read and call.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, set_seed

from fastpo import face
from fastpo.checkpoints import checkpoint, identity, model_files, run_folder, run_lock, run_state, saving, weights
from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import trunk_tokens
from fastpo.errors import ConfigError
from fastpo.models.adapters import rewrites_base, starts_at_base
from fastpo.models.loading import load_tokenizer
from fastpo.models.modes import set_numerics, training_mode
from fastpo.online import run as online
from fastpo.online.rollouts import Rollouts
from fastpo.plan.settle import settle
from fastpo.reference import cache, kept, live, policies, roles, sources
from fastpo.report import outputs
from fastpo.report.callbacks import Callbacks, check_best
from fastpo.report.hub import Hub
from fastpo.report.outputs import Reporter
from fastpo.training import inputs, router_loss, run_data, start_checks, start_guard
from fastpo.training.accumulation import Accumulation
from fastpo.training.distributed import Engine, World, hold, trainable, uses_bf16
from fastpo.training.evaluation import Evaluated, Evaluation
from fastpo.training.forward import Forward
from fastpo.training.guardrails import Guardrails
from fastpo.training.memory import Budget, savings
from fastpo.training.metrics import PAIR_METRICS, TOKEN_KL, Window
from fastpo.training.micro_batches import MicroBatches
from fastpo.training.objective import Objective
from fastpo.training.passes import Passes
from fastpo.training.progress import Progress
from fastpo.training.random_state import rng_state
from fastpo.training.samples import Answers
from fastpo.training.schedule import Schedule
from fastpo.training.signals import Signals
from fastpo.training.step_plan import StepPlan
from fastpo.training.stepwide import StepWide
from fastpo.training.take_model import as_policy, take_model
from fastpo.training.update import Update, check_optimizers

log = logging.getLogger("fastpo")


def train(
    model: Any,
    train_dataset: Any,
    *,
    ref_model: Any = None,
    prev_model: Any = None,
    args: Any = None,
    eval_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    callbacks: Sequence[Any] | None = None,
    optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
    reward_funcs: Any = None,
    reward_processing_classes: Any = None,
    judge: Any = None,
    sampler: Any = None,
    **overrides: Any,
) -> face.TrainResult:
    """Preference-train a causal language model, as TRL's `DPOTrainer(...).train()` with the same arguments.

    * `model`: a name or path (of a model, or of a trained adapter), or a model of transformers or PEFT in memory,
      trained in place; at the call it is the reference where a loss needs one and neither `ref_model` nor the data do.
      `loss_type="reward"`: a sequence classifier of one label, or the name of a language model, which gets a new head.
    * `train_dataset`: a `datasets.Dataset`, a list of dicts, a .jsonl, .jsonl.gz, .json or .parquet path or a hub id,
      with `prompt`, `chosen`, `rejected` (sft: `prompt`, `completion`). `eval_dataset`: the same, or several by name.
    * `ref_model`: a model in memory, or a name or path, such as an earlier checkpoint.
    * `prev_model`: the same for the previous policy of inpo and dno_reg; without it and the columns `prev_*_logps` that
      is the policy as it is at the call, as in their papers' first iteration.
    * `args`: a `TrainConfig`, a dict, a YAML path or TRL's DPOConfig, GRPOConfig or the like; `overrides` go on top.
    * `compute_metrics`: called at every evaluation with a `fastpo.Evaluated`, returns further metrics of it.
    * `reward_funcs`, or a `judge` of two: what judges the responses of an online loss, such as loss_type="grpo", which
      takes rows of `prompt` and any columns and draws the responses as it trains (docs/online.md). `sampler`: who does.

    Under torchrun every process calls it alike. Raises fastpo.errors.FastpoError with one line for whatever a user can
    mend.
    """
    run = Trainer(
        model, train_dataset, ref_model=ref_model, prev_model=prev_model, args=args, eval_dataset=eval_dataset,
        processing_class=processing_class, peft_config=peft_config, quantization_config=quantization_config,
        callbacks=callbacks, optimizers=optimizers, compute_metrics=compute_metrics, reward_funcs=reward_funcs,
        reward_processing_classes=reward_processing_classes, judge=judge, sampler=sampler, **overrides,
    )  # fmt: skip
    run.stays = False
    return run.train()


class Trainer(face.Face):
    """One run, with the arguments of `train`: for scripts that evaluate, save or look at it before and after `train()`.
    What such scripts read and call is in face.py; here is the run."""

    _tag_names = ("fastpo", "preference-optimization")  # of the model and its card; the losses' names follow
    stays = True  # whether `evaluate` may be called after training: the evaluation sets need their reference by then

    def __init__(
        self,
        model: Any,
        train_dataset: Any = None,
        *,
        ref_model: Any = None,
        prev_model: Any = None,
        args: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        compute_metrics: Callable[[Evaluated], Mapping[str, float]] | None = None,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        judge: Any = None,
        sampler: Any = None,
        **overrides: Any,
    ):
        self.config = config = TrainConfig.build(args, **overrides, **online.options(judge=judge, sampler=sampler))
        if train_dataset is None:
            raise ConfigError("`train_dataset` is required: a datasets.Dataset, a list of dicts, a path or a hub id")
        run_data.check_precomputed(config, train_dataset, eval_dataset)
        self.world = world = World.start(config)
        outputs.ensure_log_handler(quiet=not world.main)
        set_numerics(config)
        self.device = world.device

        # The losses, and what of the arguments and options would fail later.
        self.objective = objective = Objective.of_options(config)
        objective.check_reference(config, ref_model, prev_model)
        objective.forming(config)
        if TOKEN_KL in objective.row_statistics:
            live.check(config, objective.pair_terms)
        start_checks.check_options(config, self.device, cache.cache_folder())
        inputs.check(processing_class, callbacks, optimizers, eval_dataset)
        peft_config = inputs.peft_config(peft_config, scalar_head=config.scalar_head)
        quantized = inputs.quantization_config(quantization_config)
        model_files.check_shard_size(config.max_shard_size)
        self.online = online.of_arguments(config, world.size, reward_funcs, reward_processing_classes, judge, sampler)

        # The folder, and what lies in it.
        self.output_dir = Path(config.output_dir)
        self.lock = run_lock.RunLock(self.output_dir)
        self.resume, remarks = world.first(lambda: checkpoint.find(self.output_dir, config.resume_from_checkpoint))
        for remark in remarks:
            log.warning("%s", remark)
        world.first(lambda: run_folder.check(config, resumes=config.resume_from_checkpoint not in (None, False)))
        set_seed(config.seed)

        # The rows.
        self.origin = origin = inputs.Origin.of(model, train_dataset, eval_dataset, ref_model, prev_model, world)
        self.reporter = Reporter(config, self.output_dir, world.main, origin.paths, again=self.lock.again)
        self.fixed = roles.Given(origin.ref_model, origin.prev_model)
        self.tokenizer = processing_class if processing_class is not None else load_tokenizer(
            origin.model_name, trust_remote_code=config.trust_remote_code,
            revision=(config.model_init_kwargs or {}).get("revision"),
        )  # fmt: skip
        self.callbacks = Callbacks(
            callbacks, config, tokenizer=self.tokenizer, rank=world.rank, local_rank=world.local_rank,
            world_size=world.size, device=self.device, around=self.around_callbacks,
        )  # fmt: skip
        given = {role.model for role in roles.ROLES if self.fixed[role] is not None}
        self.data = online.sets(self.online, config, world, self.tokenizer, objective, given)
        self.data.read(train_dataset, eval_dataset)
        self.plan = online.plan(self.online, config, len(self.data.train), world.size)
        self.stepwide = StepWide(objective.pair_terms, config)
        self.stepwide.prepare(self.data.all)
        if compute_metrics is None:  # else nobody knows yet what evaluations report
            check_best(config, self.data.reported())
        self.hub = Hub(config) if config.push_to_hub and world.main else None

        # The model, and how rows go through it.
        self.model = take_model(origin, config, self.device, peft_config, quantized, self.tokenizer)
        self.callbacks.take(self.model)
        self.tags = face.add_tags(self.model, [*self._tag_names, *dict.fromkeys(t.name for t in objective.terms)])
        self.policy = as_policy(self.model, config, self.device, objective)
        # PiSSA and its like take part of the base away, so that the base with the adapter off is another model.
        self.reference_is_base = peft_config is not None and not rewrites_base(peft_config)
        self.start_is_known = config.disable_dropout and starts_at_base(peft_config)
        self.engine = Engine(self.policy)
        self.batches = MicroBatches(config, world, objective, self.policy)
        self.router = router_loss.of_run(self.policy, config, self.data.all.values())
        for name, examples in self.data.all.items():
            self.batches.place(name, examples)
        self.optimizers = check_optimizers(optimizers, config)
        self.settled = settled = settle(
            self.model, config, world, self.data.train, objective, ref_model=self.fixed[roles.REF],
            autocast=uses_bf16(config, self.device), own_optimizer=self.optimizers[0] is None, resume=self.resume,
        )  # fmt: skip
        self.forward = Forward(self.engine, settled.config, self.device, objective.row_statistics)
        advice = functools.partial(savings, settled.config, self.model, self.policy.dtype, self.device)
        retreat = settled.retreat(self.policy)
        self.budget = Budget(settled.max_tokens, config, world, advice, self.data.name_of, retreat)
        self.passes = Passes(self.batches, self.forward, self.budget, world)
        self.evaluation: Any = Evaluation(objective, self.stepwide, self.passes, config.token_metrics, compute_metrics)

        # The run itself.
        self.progress, self.is_ready, self.in_loop = Progress(), False, False
        alpha, every = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        self.new_moving = functools.partial(cache.MovingReference, alpha=alpha, every=every, whole=self._exchanging)
        self.moving: cache.MovingReference | None = None
        self.moving_model: nn.Module | None = None  # the same as a model to look at
        if config.sync_ref_model and config.fsdp == "no":  # else when its shards are there
            self.moving = self.new_moving(trainable(self.model))
            self.moving_model = face.moving_reference(self.model, self.moving)
        self.live: live.LiveReference | None = None
        self.rollouts: Rollouts | None = None
        self.signals = Signals(busy=lambda: self.progress.updating)
        self.callbacks.call("on_init_end")

    # ---------------------------------------------------------------- a run

    def train(self) -> face.TrainResult:
        """Run all steps, evaluate and save as configured, return the result."""
        finished, self.in_loop = False, True
        try:
            self.world.first(self.lock.take)
            result, finished = self._train(), True
            return result
        finally:
            World.failed, self.in_loop = not finished, False
            if self.live is not None:
                self.live.close()
            online.close(self.online, self.rollouts)
            if hasattr(self, "update"):  # its hooks would take the next run's gradients from a model in memory
                self.update.gradients.close()
            self.callbacks.close(failed=not finished)
            if self.hub is not None:
                self.hub.close()
            self.lock.release()

    def ready(self) -> None:
        """Once: the model as it starts, identified, held as this run's processes hold it, and verified."""
        if self.is_ready:
            return
        config, world = self.config, self.world
        self.data.say_sharing(self.budget.max_tokens)
        saving.prepare(self.model, self.tokenizer, self.data.train, trainable(self.model), config, world)
        self.identity = identity.identify(
            self.model, self.data.train, config, world, name=self.origin.model_name, of_base=self.reference_is_base,
            settled=self.settled.record(self.device.type),
        )  # fmt: skip
        fingerprint = self.identity["model"]
        if self.resume is not None:
            self.identity = identity.as_begun(self.resume, self.identity, self.origin.by_name)
        self.loaded_dtype = self.policy.dtype
        self.weights = weights.Weights(*hold(self.policy, config, world, self.forward.autocast_dtype), world)
        self.engine, self.parameters = self.weights.engine, self.weights.parameters
        again, size = self.reporter.ensure_folder, config.max_shard_size
        self.files = saving.ModelFiles(self.weights, self.tokenizer, self.output_dir, size, again)
        if config.sync_ref_model and self.moving is None:
            self.moving = self.new_moving(self.parameters)
        first = self.data.probe(self.plan[0][1])
        everything = self.data.all.values() if self.online is None else [first]
        self.router = start_guard.verify(
            self.forward, self.engine, first, everything, quiet=config.disable_dropout, router=self.router
        )
        self.forward.begin(self.engine, self.router)
        start = policies.Start(
            self.engine, fingerprint, self.loaded_dtype, self.origin.model_name if self.origin.by_name else None,
            is_base=self.reference_is_base, is_exact=self.start_is_known,
        )  # fmt: skip
        self.references = sources.References.of_run(
            config, self.objective, self.fixed, start, self.passes,
            kept.Kept(self.output_dir, self.resume, self.identity), self.moving,
            verify=lambda engine: start_guard.verify(self.forward, engine, first, everything), bar=self.reporter.bar,
        )  # fmt: skip
        self.is_ready = True

    def _train(self) -> face.TrainResult:
        config, settled, plan = self.config, self.settled.config, self.plan
        self.progress = Progress()  # of this call: a second one begins anew
        self.ready()
        if self.resume is not None:
            self.callbacks.restore(checkpoint.read_state(self.resume))
        self.callbacks.start_trackers()
        start_checks.say_without_effect(
            config, self.origin.paths, self.parameters.values(), self.optimizers, self.world, len(plan)
        )
        self.answers = None
        if config.sample_generations and (self.world.main or self.engine.sharded):
            shown = next(iter(self.data.evals.values()), self.data.train)
            self.answers = Answers(self.forward, self.tokenizer, shown, config.generation_kwargs)
            start_checks.try_samples(config, self.answers)
        # A callback may ask for an evaluation that the options do not.
        evaluates = config.eval_strategy != "no" or config.eval_on_start or self.callbacks.user or self.stays
        sets = self.data.all if evaluates else {"train": self.data.train}
        sets = {**sets, **self.stepwide.reference_sets(sets)}
        if self.online is None:
            self.references.attach(plan, sets)
        if TOKEN_KL in self.objective.row_statistics:
            self.start_live(sets)
        self.begin_online()
        self.update = update = Update(self.model, self.parameters, settled, self.world, self.optimizers, len(plan))
        self.accumulation = Accumulation(
            self.objective, self.stepwide, self.passes, self.update.gradients,
            self.rollouts.examples if self.rollouts is not None else self.data.train,
            on_substep_end=lambda: self.callbacks.call("on_substep_end"),
        )  # fmt: skip
        self.callbacks.begin(update.optimizer, update.scheduler)
        self.schedule = Schedule(config, plan.rows, plan.batch, len(plan))
        self.schedule.begin(self.state)
        if self.world.main:
            self.reporter.start(*run_folder.begin(self.output_dir, self.resume))
        self.window = Window(
            self.device, self.policy, self.objective.terms, lambda: self.budget.tokens, config.max_nonfinite_steps
        )
        self.guards = Guardrails(
            self.objective.terms, config, not self.weights.adapter, pairs_per_step=self.step_size,
            starts_at_reference=self.references.starts_at_reference, optimizer_given=not self.update.own_optimizer,
            parameters=sum(p.numel() for p in self.model.parameters()),
        )  # fmt: skip
        self.start_guard = None
        if self.references.starts_at_reference or self.references.start is not None:
            self.start_guard = start_guard.StartGuard(
                self.objective, self.forward.low_precision, self.references.start_of, str(cache.cache_folder())
            )
        parts = {"scheduler": update.kept_schedule(), "window": self.window, "stepwide": self.stepwide,
                 "budget": self.budget, "guards": run_state.AsJson(self.guards)}  # fmt: skip
        parts |= {"rollouts": self.rollouts} if self.rollouts is not None else {}
        state = run_state.RunState(self.weights, update.gradients, update.optimizer, self.progress, parts, self.moving)
        run = self.identity | self.references.kept.keys
        self.checkpoints = saving.Checkpoints(config, run, self.files, state, self.callbacks, self.hub)
        check = weights.WeightCheck(self.weights, sorted(self.data.train, key=trunk_tokens)[:4], self.forward.autocast)
        self.saver = saving.Saver(self.checkpoints, check, self.callbacks, self.progress, self.signals, self.window)
        if self.resume is not None:
            self.checkpoints.restore(self.resume)
        self.warn(self.guards.at_start(self.data.reports))
        if self.moving is not None:
            self.references.move(plan, self.progress.reference_start)
        bar = self.reporter.bar(desc="train", total=len(plan), initial=self.progress.cursor)
        with bar, training_mode(self.policy, settled):
            summary = self._loop(plan, bar)
        self.finish(summary)
        return face.TrainResult(self.model, self.state.log_history, summary, self.state, self.guards.warnings)

    # ------------------------------------------------------------- the loop

    def _loop(self, plan: StepPlan, bar: tqdm) -> dict[str, float]:
        """The steps of the plan from `progress.cursor` on, and the trained model's files. Returns the summary."""
        config, call, at, control = self.config, self.callbacks.call, self.progress, lambda: self.callbacks.control
        at.start()
        if at.cursor >= len(plan):
            log.info("nothing is left to train: step %d of %d", self.state.global_step, len(plan))
        with self.signals.taken(not self.world.several):
            try:
                call("on_train_begin")
                if config.eval_on_start and self.resume is None:
                    self.evaluate_in_run()
                self.callbacks.agree(self.world.group)
                if at.todo:
                    self._settle(plan)
                while at.cursor < len(plan) and not control().should_training_stop:
                    epoch, rows = plan[at.cursor]
                    last_of_epoch = at.cursor + 1 == len(plan) or plan[at.cursor + 1][0] != epoch
                    if at.cursor == 0 or plan[at.cursor - 1][0] != epoch:
                        at.seen = 0
                        call("on_epoch_begin")
                    at.rng = rng_state()
                    call("on_step_begin")
                    logs = self.schedule.logs_next(self.state, last_of_epoch, at.cursor + 1 == len(plan))
                    with self.forward.watching(config.token_metrics and logs):
                        learning_rate = self._step(rows)
                    at.rows_done += len(rows)
                    at.cursor += 1
                    at.seen += len(rows)
                    self.state.epoch = self.schedule.epoch(epoch, at.seen)
                    moved = self.moving is not None and self.state.global_step % self.moving.every == 0
                    if moved:
                        at.reference_start = at.cursor
                    self.schedule.mark_due(control(), self.state, "steps", at_end=at.cursor == len(plan))
                    at.todo = {"stage": 0, "learning_rate": learning_rate, "epoch": epoch, "last": last_of_epoch}
                    at.rng, at.updating = None, False
                    self.signals.check()
                    bar.update()
                    if moved:
                        self.references.move(plan, at.cursor)
                    self._settle(plan, bar)
                summary = self.window.summary(at.seconds(), self.state.global_step, at.rows_done, at.num_tokens)
                self.saver.check_trained()
                if config.load_best_model_at_end:
                    at.updating = True  # the weights are no longer the last step's
                    self.checkpoints.load_best()
                if config.save_final:
                    with self.signals.whole():
                        self.files.save(self.output_dir)
                self.log(summary)
                call("on_train_end")
            except BaseException as error:
                self.saver.rescue(error)
                self.reporter.fail(self.facts(), self.state, error, self.data.reports, self.guards.warnings)
                raise
            finally:
                self.update.gradients.close()
        return summary

    def _settle(self, plan: StepPlan, bar: tqdm | None = None) -> None:
        """What follows a step, in transformers' order: on_step_end, log, evaluate, on_epoch_end, log, evaluate; and
        save last, so that a resumed run misses nothing. A run that was cut short in here goes on with that stage.
        """
        at, todo, control = self.progress, self.progress.todo, lambda: self.callbacks.control
        if todo["stage"] == 0:
            self.callbacks.call("on_step_end")
            self.callbacks.agree(self.world.group)
            if control().should_epoch_stop:
                todo["last"] = True
                while at.cursor < len(plan) and plan[at.cursor][0] == todo["epoch"]:
                    at.cursor += 1
                if self.moving is not None:
                    at.reference_start = at.cursor
                    self.references.move(plan, at.cursor)
            todo["stage"] = 1
        if todo["stage"] == 1:
            self.log_and_evaluate(bar)
            todo["stage"] = 2
        if todo["stage"] == 2:
            if todo["last"]:
                self.schedule.mark_due(control(), self.state, "epoch")
                self.callbacks.call("on_epoch_end")
                self.callbacks.agree(self.world.group)
            todo["stage"] = 3
        self.log_and_evaluate(bar)
        at.todo = {}
        if control().should_save:
            self.saver.save()
            self.callbacks.agree(self.world.group)

    # ------------------------------------------------------------- one step

    def _step(self, rows: list[int]) -> float:
        """One optimiser step; returns the learning rate that it used. Leaves `updating` set: counters follow."""
        state, window = self.state, self.window
        guard = self.start_guard if state.global_step == 0 else None
        rows, seen = self.rows_of_step(rows)
        sums = self.accumulation(
            rows, self.references.of_set, state.global_step + 1, self.guards.warnings.append, guard
        )
        self.update.gradients.reduce_()
        loss, metrics = self.world.sum_(torch.cat([sums.loss.reshape(1), sums.metrics])).split([1, len(PAIR_METRICS)])
        learning_rate = self.update.learning_rate()
        norm, finite = self.update.norm(loss[0])
        self.callbacks.call("on_pre_optimizer_step")
        self.progress.updating = True
        self.update.step(finite, then=lambda: self.callbacks.call("on_optimizer_step"))
        if self.stepwide.reads_mean:
            self.stepwide.commit(bool(finite))
        window.add(loss[0], metrics, norm, finite)
        if self.router is not None:
            window.add_aux(self.world.sum_(self.router.total), finite)
        dropped, tokens = bool(self.config.grad_filter), self.forward.watches
        window.add_rows(sums, self.world, finite, dropped=dropped, tokens=tokens)
        for batch in sums.batches:  # here, so that a step cut short leaves no trace in the counters
            window.trunk(batch)
        self.progress.num_tokens += seen
        state.global_step += 1
        if self.moving is not None and state.global_step % self.moving.every == 0:
            self.moving.move_()
        return learning_rate

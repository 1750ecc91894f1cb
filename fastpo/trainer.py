"""The trainer: `fastpo.train(model, train_dataset, ...)`, one optimiser step after another.

A step is `per_device_train_batch_size x gradient_accumulation_steps x processes` pairs in the seeded order. It is
packed into micro-batches of at most `max_tokens` tokens, shared between the processes; every loss term is normalised by
its count over the whole step, so the numbers depend neither on the packing nor on the number of processes. Metrics stay
on the device until a logging step.
"""

import contextlib
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerState, set_seed

from fastpo import face
from fastpo.checkpoints import checkpoint, model_files, saving
from fastpo.checkpoints.run_lock import RunLock
from fastpo.config.train_config import TrainConfig
from fastpo.data import mixing, rows
from fastpo.data import prepare as data
from fastpo.data.kway import Forming
from fastpo.data.packing import (
    PackedBatch,
    TrunkCost,
    collate,
    loss_count,
    sequence_tokens,
    set_sharing,
    sharing_mode,
    step_batches,
    trunk_tokens,
)
from fastpo.errors import ConfigError, TrainingError
from fastpo.losses import table as losses
from fastpo.models import adapters, rotary
from fastpo.models.loading import freeze_towers, load_model, load_tokenizer
from fastpo.models.modes import check_ids, interval, set_numerics, training_mode
from fastpo.models.noise import check_quiet, disable_dropout
from fastpo.models.policy import DROPPED_MASS, Policy
from fastpo.models.verify import guard_rows, verify_or_unpack
from fastpo.reference import live as live_reference
from fastpo.reference import sources as references
from fastpo.reference.cache import MovingReference, cache_folder
from fastpo.report import outputs
from fastpo.report.callbacks import Callbacks, check_best
from fastpo.report.hub import Hub
from fastpo.training import evaluation, inputs, router_loss, run_data, start_checks
from fastpo.training.distributed import Engine, World, shard, uses_bf16
from fastpo.training.guardrails import Guardrails
from fastpo.training.memory import Budget, is_out_of_memory, resolve_max_tokens
from fastpo.training.metrics import (
    PAIR_METRICS,
    PROMPT_LOGP,
    TOKEN_SUMS,
    Flops,
    Window,
    pair_inputs,
    token_sums,
)
from fastpo.training.objective import Objective
from fastpo.training.optim import Gradients, build_optimizer, build_scheduler, check_given
from fastpo.training.progress import Progress
from fastpo.training.row_statistics import EVALUATION, TOKEN_KL, TRAIN, draw_rows, observer, row_statistics
from fastpo.training.signals import Signals
from fastpo.training.step_plan import StepPlan
from fastpo.training.stepwide import Statistics, StepWide

log = logging.getLogger("fastpo")


@dataclass
class TrainResult:
    """What `fastpo.train` returns: model, logged lines, last metrics, transformers' TrainerState, warnings."""

    model: nn.Module = field(repr=False)
    log_history: list[dict[str, float]] = field(repr=False)
    metrics: dict[str, float]
    state: TrainerState = field(repr=False)
    warnings: list[Any] = field(default_factory=list)


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
    **overrides: Any,
) -> TrainResult:
    """Preference-train a causal language model, as TRL's `DPOTrainer(...).train()` with the same arguments.

    * `model`: a name or path (of a model, or of a trained adapter), or a transformers / PEFT model in memory, which is
      trained in place. Its weights at the call are the reference where a loss needs one and neither `ref_model` nor
      the data give one.
    * `train_dataset`: a `datasets.Dataset`, a list of dicts, a .jsonl, .jsonl.gz, .json or .parquet path or a hub id,
      with `prompt`, `chosen`, `rejected` (or `prompt`, `completion` for `loss_type="sft"`).
    * `eval_dataset`: the same, or a mapping of names to several.
    * `ref_model`: a model in memory, or a name or path, such as an earlier checkpoint.
    * `prev_model`: the same for the previous policy of `inpo` and `dno_reg`. Without it (and without the columns
      `prev_chosen_logps`, `prev_rejected_logps`) that is the policy as it is at the call, as in their papers' first
      iteration.
    * `args`: a `TrainConfig`, a dict, a YAML path or a TRL `DPOConfig` (`KTOConfig`, `CPOConfig`, `ORPOConfig`);
      `overrides` go on top.
    * `compute_metrics`: called at every evaluation with a `fastpo.Evaluated`; returns further metrics of it.

    Under torchrun every process calls it alike. Raises fastpo.errors.FastpoError with one line for whatever a user can
    mend.
    """
    run = Trainer(
        model, train_dataset, ref_model=ref_model, prev_model=prev_model, args=args, eval_dataset=eval_dataset,
        processing_class=processing_class, peft_config=peft_config, quantization_config=quantization_config,
        callbacks=callbacks, optimizers=optimizers, compute_metrics=compute_metrics, **overrides,
    )  # fmt: skip
    run.stays = False
    return run.train()


class Trainer(face.Face):
    """One run, with the arguments of `train`: for scripts that evaluate, save or look at it before and after `train()`.

    Its parts are methods, and functions of it in training/run_data.py, training/evaluation.py, reference/sources.py,
    checkpoints/saving.py, report/outputs.py and face.py, so that each can be read, and tested, alone.
    """

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
        compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
        **overrides: Any,
    ):
        self.config = config = TrainConfig.build(args, **overrides)
        if train_dataset is None:
            raise ConfigError("`train_dataset` is required: a datasets.Dataset, a list of dicts, a path or a hub id")
        run_data.check_precomputed(config, train_dataset, eval_dataset)
        self.compute_metrics = compute_metrics
        self.world = world = World.start(config)
        outputs.ensure_log_handler(quiet=not world.main)
        set_numerics(config)
        self.device = world.device
        self._resolve_losses(ref_model, prev_model)
        start_checks.check_options(config, self.device)
        inputs.check(processing_class, callbacks, optimizers, eval_dataset)
        peft_config, quantization_config = (
            inputs.peft_config(peft_config),
            inputs.quantization_config(quantization_config),
        )
        model_files.check_shard_size(config.max_shard_size)
        self.output_dir = Path(config.output_dir)
        self.lock = RunLock(self.output_dir)
        self.metrics_file, self.samples_file = outputs.lines_of(self)
        self.resume, remarks = world.first(lambda: checkpoint.find(self.output_dir, config.resume_from_checkpoint))
        for remark in remarks:
            log.warning("%s", remark)
        world.first(lambda: outputs.check_folder(config, resumes=config.resume_from_checkpoint not in (None, False)))
        set_seed(config.seed)

        self._note_inputs(model, train_dataset, eval_dataset)
        self.tokenizer = processing_class if processing_class is not None else load_tokenizer(
            self.model_name, trust_remote_code=config.trust_remote_code,
            revision=(config.model_init_kwargs or {}).get("revision"),
        )  # fmt: skip
        self.callbacks = Callbacks(
            callbacks, config, tokenizer=self.tokenizer, rank=world.rank, local_rank=world.local_rank,
            world_size=world.size, device=self.device, around=self._around_callbacks,
        )  # fmt: skip
        self.data_reports: dict[str, data.DataReport] = {}
        self.examples = run_data.prepare(self, train_dataset, config.dataset_train_split, "train")
        self.eval_sets = run_data.prepare_eval(self, eval_dataset)
        self.plan = StepPlan(config, len(self.examples), world.size)
        self.stepwide = StepWide(self)
        self.stepwide.prepare({"train": self.examples, **self.eval_sets})
        if compute_metrics is None:  # else nobody knows yet what evaluations report
            check_best(config, {k: ["loss", *run_data.reported(self, e)] for k, e in self.eval_sets.items()})
        self.hub = Hub(config) if config.push_to_hub and world.main else None

        self._take_model(model, peft_config, quantization_config)
        if config.grad_filter and self.device.type == "cuda":
            log.warning("grad_filter runs plain PyTorch operations on a GPU, unmeasured: compare tokens_per_second")
        self.autocast_dtype = torch.bfloat16 if uses_bf16(config, self.device) else None
        self.low_precision = self.autocast_dtype is not None or self.policy.low_precision
        self._size_micro_batches()
        self.optimizer, self.scheduler = (None, None) if optimizers is None else optimizers
        if self.optimizer is not None and config.fsdp != "no":
            raise ConfigError("fsdp splits the parameters, so an optimiser made before does not fit: set optim instead")
        self.progress = Progress()
        self.ref: dict[str, Any] = {}
        self.start: Any = None  # the start's own log-probabilities, where `ref` is a mixture of them and others
        self.other_reference = False  # whether a resumed run's reference is not the one that it began with
        self.signals = Signals(busy=lambda: self.progress.updating)
        self.rescued = False  # whether a save that failed has left the weights alone
        self.callbacks.call("on_init_end")

    def _resolve_losses(self, ref_model: Any, prev_model: Any) -> None:
        """The loss terms, and what they read beside the policy: references, previous policies, lists, statistics."""
        config = self.config
        self.terms = losses.resolve_terms(
            config.losses, config.loss_weights, loss_kwargs=config.loss_kwargs, beta=config.beta,
            label_smoothing=config.label_smoothing, gamma_beta_ratio=config.gamma_beta_ratio,
            ipo_reduce=config.ipo_reduce, discopop_tau=config.discopop_tau, f_divergence_type=config.f_divergence_type,
            f_alpha_divergence_coef=config.f_alpha_divergence_coef, ld_alpha=config.ld_alpha,
            use_weighting=config.use_weighting,
        )  # fmt: skip
        self.objective = Objective(self.terms)
        self.pair_terms = self.objective.pair_terms
        self.uses_reference = any(t.loss.reference for t in self.pair_terms)
        if config.sync_ref_model and not self.uses_reference:
            raise ConfigError(f"sync_ref_model moves a reference, and {'+'.join(config.losses)} has none")
        if config.sync_ref_model and ref_model is not None:
            raise ConfigError("sync_ref_model starts from the policy: leave ref_model out, or sync_ref_model")
        if ref_model is not None and not self.uses_reference:
            raise ConfigError(f"ref_model is given, and {'+'.join(config.losses)} has no reference: leave it out")
        self.reads_prompts = any(t.reads_prompt for t in self.terms)
        self.kappa = next((t.hyper["kappa"] for t in self.pair_terms if t.loss.previous), None)
        lists = [t.name for t in self.pair_terms if t.loss.shape == "lists"]
        if lists and config.pair_policy != "best_worst":
            raise ConfigError(f"{lists[0]} reads whole lists of responses: leave pair_policy={config.pair_policy} out")
        self.forming = Forming(config.pair_policy, config.pair_margin, whole=bool(lists))
        references.check_previous(self, prev_model)
        self.ref_model, self.prev_model = ref_model, prev_model
        self.row_statistics = row_statistics(self.pair_terms)
        if TOKEN_KL in self.row_statistics:
            live_reference.check(config, self.pair_terms)
        self.live: live_reference.LiveReference | None = None
        self.watch_tokens = False  # whether a forward pass looks at its tokens' distributions

    def _note_inputs(self, model: Any, train_dataset: Any, eval_dataset: Any) -> None:
        """Names and paths of what the run is made from, for its files; a path that is not there ends it here."""
        name = inputs.model_name("model", model)
        if isinstance(model, nn.Module) and self.ref_model is model:
            raise ConfigError("ref_model is the model that is trained: leave it out for its weights at the start")
        for argument in ("ref_model", "prev_model"):
            if (given := getattr(self, argument)) is not None:
                setattr(self, argument, inputs.model_name(argument, given) or given)
        self.model_name = name or getattr(getattr(model, "config", None), "_name_or_path", "") or ""
        self.model_given_by_name = name is not None
        self.dataset_name = train_dataset if isinstance(train_dataset, str) else None
        paths = {"model": name, "train_dataset": train_dataset, "eval_dataset": eval_dataset,
                 "ref_model": self.ref_model, "prev_model": self.prev_model}  # fmt: skip
        self.inputs: dict[str, Any] = {k: os.fspath(v) for k, v in paths.items() if isinstance(v, str | os.PathLike)}
        evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        named = [path for d in (train_dataset, *evaluated.values()) for path in mixing.paths_of(d)]
        self.world.first(lambda: [rows.check_path(dataset) for dataset in named])  # before the hub is asked for a model
        self.inputs |= mixing.described(train_dataset)
        if isinstance(eval_dataset, Mapping) and all(isinstance(v, str | os.PathLike) for v in eval_dataset.values()):
            self.inputs["eval_dataset"] = {name: os.fspath(v) for name, v in eval_dataset.items()}

    def _take_model(self, model: Any, peft_config: Any, quantization_config: Any) -> None:
        """The model on its device, with its adapter; and whether it starts as its reference."""
        config = self.config
        home = torch.device("cpu") if config.fsdp != "no" else self.device  # FSDP moves its shards itself
        if quantization_config is not None and peft_config is None and adapters.saved_adapter(self.model_name) is None:
            raise ConfigError(
                "a quantised model cannot be trained itself: pass peft_config (--use-peft) for an adapter"
            )
        if self.model_given_by_name:
            model = load_model(
                self.model_name, dtype=config.dtype, device=home, trust_remote_code=config.trust_remote_code,
                quantization_config=quantization_config, model_init_kwargs=config.model_init_kwargs,
            )  # fmt: skip
        elif quantization_config is not None or config.model_init_kwargs or config.dtype:
            raise ConfigError("quantization_config, model_init_kwargs and dtype need a model given by name or path")
        self.new_adapter = peft_config is not None
        if peft_config is not None:
            if hasattr(model, "peft_config"):
                raise ConfigError("peft_config is given, but the model has an adapter already")
            model = adapters.with_adapter(model, peft_config)
        adapters.check_quantized(model)
        adapters.check_adapter_base(model)
        if config.save_merged:
            adapters.check_mergeable(model, sharded=config.fsdp != "no")
        if not adapters.is_quantized(model):
            model.to(home)
        if config.disable_dropout:
            disable_dropout(model)
        self.model = self.callbacks.model = model
        self.tags = face.add_tags(model, [*self._tag_names, *dict.fromkeys(t.name for t in self.terms)])
        self.policy = Policy(model)  # which refuses what it cannot train, before anything is changed for good
        if config.use_liger_kernel:
            adapters.apply_liger(model, config.liger_kernel_config, self.device)
        freeze_towers(model)
        self.engine = Engine(self.policy)
        for set_name, examples in {"train": self.examples, **self.eval_sets}.items():
            check_ids(self.policy, examples, set_name)
        self.router = router_loss.of_run(self.policy, config, (self.examples, *self.eval_sets.values()))
        # PiSSA and its like take part of the base away, so that the base with the adapter off is another model.
        self.reference_is_base = self.new_adapter and not adapters.rewrites_base(peft_config)
        self.start_is_known = config.disable_dropout and adapters.starts_at_base(peft_config)
        self.starts_at_reference = self.ref_model is None and self.start_is_known
        self.is_ready = self.in_loop = False
        self.moving: MovingReference | None = None
        if config.sync_ref_model and config.fsdp == "no":  # else when its shards are there
            self.moving = self._moving_reference({n: p for n, p in model.named_parameters() if p.requires_grad})
            self.ref_model = face.moving_reference(model, self.moving)

    def _size_micro_batches(self) -> None:
        """Which rows share their prompt, and how many tokens a micro-batch holds."""
        config = self.config
        self.trunk_cost = TrunkCost.of(Flops(self.policy, self.device), self.device)
        for examples in (self.examples, *self.eval_sets.values()):  # before max_tokens=auto counts their tokens
            set_sharing(examples, sharing_mode(config.share_prompts, self.device.type), self.trunk_cost)
            rotary.unshare(self.policy.trunk, examples)
        self.max_tokens = resolve_max_tokens(self)
        if config.token_bucket and self.max_tokens % config.token_bucket:
            nearest = max(1, self.max_tokens // config.token_bucket) * config.token_bucket
            raise ConfigError(
                f"max_tokens={self.max_tokens} is no multiple of token_bucket={config.token_bucket}: {nearest} is one"
            )
        self.budget = Budget(self)

    @property
    def state(self) -> TrainerState:
        return self.callbacks.state

    @property
    def step_size(self) -> int:
        """Pairs of an optimiser step, over all processes."""
        return self.config.step_size * self.world.size

    # ------------------------------------------------------------- forward

    def logp(self, engine: Engine, batch: PackedBatch, statistics: bool = True) -> Tensor:
        """Token log-probabilities [N] fp32 of a packed batch; into it, with `statistics`, what else the losses read."""
        observe = observer(self, batch) if statistics else None
        prompts = statistics and batch.prompts is not None
        config = self.config
        options: dict[str, Any] = {"memory_budget": config.logits_memory_budget, "grad_filter": config.grad_filter}
        router = self.router if engine is self.engine else None
        with self.autocast(), router.collecting(batch) if router is not None else contextlib.nullcontext():
            logp = engine(lambda: engine.policy.logp(batch, observe=observe, prompts=prompts, **options))
        assert isinstance(logp, Tensor)
        if prompts:
            logp, batch.rows[PROMPT_LOGP] = logp.split([batch.target.numel(), logp.numel() - batch.target.numel()])
        return logp

    def batch(
        self, examples: Sequence[data.Example], part: Sequence[int], ref: Any, stream: int = EVALUATION, step: int = 0
    ) -> PackedBatch:
        """A micro-batch on the device; `stream` and `step` say which tokens are drawn, where a loss draws some."""
        batch = collate(examples, part, ref, with_prompts=self.reads_prompts, token_bucket=self.config.token_bucket)
        if any(t.loss.drawn for t in self.pair_terms):
            seed = self.config.seed if self.config.data_seed is None else self.config.data_seed
            batch.drawn_rows = draw_rows(examples, part, seed, stream, step)
        return batch.to(self.device)

    def autocast(self) -> Any:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    # ---------------------------------------------------------------- train

    def train(self) -> TrainResult:
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
            if hasattr(self, "gradients"):  # its hooks would take the next run's gradients from a model in memory
                self.gradients.close()
            self.callbacks.close(failed=not finished)
            if self.hub is not None:
                self.hub.close()
            self.lock.release()

    def _train(self) -> TrainResult:
        config, plan = self.config, self.plan
        self.progress = Progress(num_tokens=self.progress.num_tokens)  # of this call: a second one begins anew
        self.ready()
        if self.resume is not None:
            self.callbacks.restore(checkpoint.read_state(self.resume))
        self.callbacks.start_trackers()
        start_checks.say_without_effect(self, len(plan))
        start_checks.try_samples(self)
        references.attach(self, plan)
        if TOKEN_KL in self.row_statistics:
            self.live = live_reference.start(self, plan[0][1])
        self._build_optimizer(len(plan))
        outputs.start(self)
        self.window = Window(self.device, self.policy, self.terms, self.max_tokens, config.max_nonfinite_steps)
        self.guards = Guardrails(
            self.terms, config, not hasattr(self.model, "peft_config"), starts_at_reference=self.starts_at_reference,
            pairs_per_step=self.step_size, parameters=sum(p.numel() for p in self.model.parameters()),
            optimizer_given=not self.own_optimizer,
        )  # fmt: skip
        if self.resume is not None:
            saving.restore(self, self.resume)
        self._warn(self.guards.at_start(self.data_reports))
        if self.moving is not None:
            references.move(self, plan, self.progress.reference_start)
        with (
            self.bar(desc="train", total=len(plan), initial=self.progress.cursor) as bar,
            training_mode(self.policy, config),
        ):
            summary = self._loop(plan, bar)
        outputs.finish(self, summary)
        return TrainResult(self.model, self.state.log_history, summary, self.state, self.guards.warnings)

    def ready(self) -> None:
        """Once: the model as it starts, identified, held as this run's processes hold it, and verified."""
        if self.is_ready:
            return
        run_data.say_sharing(self)
        self._tokens = [trunk_tokens(e) for e in self.examples]
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError(
                "no parameter of the model requires a gradient (an adapter is loaded with is_trainable=True)"
            )
        saving.prepare(self)
        self.fingerprint, self.identity = saving.identify(self)
        self._distribute()
        if self.config.sync_ref_model and self.moving is None:
            self.moving = self._moving_reference(self.parameters)
        self.verify(self.engine, self.plan[0][1])
        self.is_ready = True

    def _moving_reference(self, parameters: dict[str, nn.Parameter]) -> MovingReference:
        return MovingReference(parameters, self.config.ref_model_mixup_alpha, self.config.ref_model_sync_steps)

    def _distribute(self) -> None:
        """The model as this run's processes hold it."""
        config, world = self.config, self.world
        self.saved_dtypes = {n: p.dtype for n, p in self.model.named_parameters()}
        self.loaded_dtype = self.policy.dtype
        if config.fsdp != "no":
            self.parameters = {}  # whoever holds a parameter keeps it whole on the device
            self.engine = shard(self.policy, config, world, self.autocast_dtype)
            self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        else:
            world.agree_(self.model)
        if world.several and not config.disable_dropout:
            torch.manual_seed(config.seed + world.rank)  # every rank draws its own masks

    def _build_optimizer(self, steps: int) -> None:
        config = self.config
        self.own_optimizer = self.optimizer is None
        self.gradients = Gradients(
            self.parameters, master_weights=config.master_weights if self.own_optimizer else "none", seed=config.seed,
            group=self.world.group, sharded=self.engine.sharded,
        )  # fmt: skip
        if not self.own_optimizer:
            check_given(self.optimizer, self.parameters)
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, config, self.gradients)
        if self.scheduler is None:
            self.scheduler = build_scheduler(self.optimizer, config, steps)
        self.callbacks.optimizer, self.callbacks.scheduler = self.optimizer, self.scheduler
        state = self.state
        state.max_steps, state.num_train_epochs = steps, math.ceil(config.num_train_epochs)
        state.logging_steps = interval(config.logging_steps, steps)
        state.eval_steps = interval(config.eval_steps or config.logging_steps, steps)
        state.save_steps = interval(config.save_steps, steps)
        state.train_batch_size = config.per_device_train_batch_size

    def _loop(self, plan: StepPlan, bar: tqdm) -> dict[str, float]:
        """The steps of the plan from `self.progress.cursor` on, and the trained model's files. Returns the summary."""
        config, call = self.config, self.callbacks.call
        self.progress.start()
        if self.progress.cursor >= len(plan):
            log.info("nothing is left to train: step %d of %d", self.state.global_step, len(plan))
        with self.signals.taken(not self.world.several):
            try:
                call("on_train_begin")
                if config.eval_on_start and self.resume is None:
                    evaluation.evaluate_all(self)
                self.callbacks.agree(self.world.group)
                if self.progress.todo:
                    self._settle(plan)
                while self.progress.cursor < len(plan) and not self.callbacks.control.should_training_stop:
                    epoch, rows = plan[self.progress.cursor]
                    last_of_epoch = self.progress.cursor + 1 == len(plan) or plan[self.progress.cursor + 1][0] != epoch
                    if self.progress.cursor == 0 or plan[self.progress.cursor - 1][0] != epoch:
                        self.progress.seen = 0
                        call("on_epoch_begin")
                    self.progress.rng = saving.rng_state()
                    call("on_step_begin")
                    self.watch_tokens = config.token_metrics and self._logs_next(last_of_epoch, len(plan))
                    learning_rate = self._step(rows)
                    self.progress.rows_done += len(rows)
                    self.progress.cursor += 1
                    self.progress.seen += len(rows)
                    self.state.epoch = self._epoch(epoch)
                    moved = self.moving is not None and self.state.global_step % self.moving.every == 0
                    if moved:
                        self.progress.reference_start = self.progress.cursor
                    self._mark_due("steps", at_end=self.progress.cursor == len(plan))
                    self.progress.todo = {
                        "stage": 0,
                        "learning_rate": learning_rate,
                        "epoch": epoch,
                        "last": last_of_epoch,
                    }
                    self.progress.rng, self.progress.updating = None, False
                    self.signals.check()
                    bar.update()
                    if moved:
                        references.move(self, plan, self.progress.cursor)
                    self._settle(plan, bar)
                seconds = self.progress.seconds()
                summary = self.window.summary(
                    seconds, self.state.global_step, self.progress.rows_done, self.progress.num_tokens
                )
                saving.check_trained(self)
                if config.load_best_model_at_end:
                    self.progress.updating = True  # the weights are no longer the last step's
                    saving.load_best(self)
                if config.save_final:
                    saving.save_model(self, self.output_dir)
                self.log(summary)
                call("on_train_end")
            except BaseException as error:
                saving.rescue(self, error)
                raise
            finally:
                self.gradients.close()
        return summary

    def _logs_next(self, last_of_epoch: bool, steps: int) -> bool:
        """Whether the step at hand is logged, or the run's last."""
        config, step = self.config, self.state.global_step + 1
        if config.logging_strategy == "steps" and step % self.state.logging_steps == 0:
            return True
        first = config.logging_first_step and step == 1
        return first or (config.logging_strategy == "epoch" and last_of_epoch) or self.progress.cursor + 1 == steps

    def _mark_due(self, strategy: str, at_end: bool = False) -> None:
        """Set the control flags of what is due after this step, or after this epoch; callbacks may change them."""
        config, control, state = self.config, self.callbacks.control, self.state
        step = state.global_step

        def due(chosen: str, every: int) -> bool:
            return chosen == strategy and (strategy == "epoch" or step % every == 0)

        control.should_log |= due(config.logging_strategy, state.logging_steps)
        control.should_log |= strategy == "steps" and step == 1 and config.logging_first_step
        late_enough = config.eval_delay <= (state.epoch if strategy == "epoch" else step)
        evaluates = due(config.eval_strategy, state.eval_steps) or (at_end and config.eval_strategy == strategy)
        control.should_evaluate |= evaluates and late_enough
        # At the end too, as in transformers: a finished run can be continued.
        control.should_save |= due(config.save_strategy, state.save_steps) or (
            at_end and config.save_strategy == strategy
        )

    def _settle(self, plan: StepPlan, bar: tqdm | None = None) -> None:
        """What follows a step, in transformers' order: on_step_end, log, evaluate, on_epoch_end, log, evaluate; and
        save last, so that a resumed run misses nothing. A run that was cut short in here goes on with that stage.
        """
        todo, control = self.progress.todo, lambda: self.callbacks.control
        if todo["stage"] == 0:
            self.callbacks.call("on_step_end")
            self.callbacks.agree(self.world.group)
            if control().should_epoch_stop:
                todo["last"] = True
                while self.progress.cursor < len(plan) and plan[self.progress.cursor][0] == todo["epoch"]:
                    self.progress.cursor += 1
                if self.moving is not None:
                    references.move(self, plan, self.progress.cursor)
            todo["stage"] = 1
        if todo["stage"] == 1:
            self._log_and_evaluate(bar)
            todo["stage"] = 2
        if todo["stage"] == 2:
            if todo["last"]:
                self._mark_due("epoch")
                self.callbacks.call("on_epoch_end")
                self.callbacks.agree(self.world.group)
            todo["stage"] = 3
        self._log_and_evaluate(bar)
        self.progress.todo = {}
        if control().should_save:
            saving.save_checkpoint(self)
            self.callbacks.agree(self.world.group)

    def _log_and_evaluate(self, bar: tqdm | None) -> None:
        if self.callbacks.control.should_log and not self.progress.todo.get("logged"):
            with saving.whole(self):
                metrics = self.window.flush(self.progress.todo["learning_rate"], self.progress.num_tokens)
                self.progress.todo["logged"] = True
                self.log(metrics, bar)
            self.callbacks.agree(self.world.group)
        if self.callbacks.control.should_evaluate:
            better = evaluation.evaluate_all(self)
            self.callbacks.agree(self.world.group)
            # The best is worth a checkpoint wherever save_steps falls.
            self.callbacks.control.should_save |= better and self.config.load_best_model_at_end

    def _step(self, rows: list[int]) -> float:
        """One optimiser step; returns the learning rate that it used. Leaves `updating` set: counters follow."""
        self._begin(rows)
        loss, metrics = self._forward_backward(rows)
        self.gradients.reduce_()
        loss, metrics = self.world.sum_(torch.cat([loss.reshape(1), metrics])).split([1, len(PAIR_METRICS)])
        learning_rate = self.scheduler.get_last_lr()[0]
        norm = self.gradients.clip_(self.config.max_grad_norm)
        finite = torch.isfinite(norm).to(loss.device) & torch.isfinite(loss[0])
        self.callbacks.call("on_pre_optimizer_step")
        self.progress.updating = True
        self.gradients.step_(self.optimizer, finite)
        self.callbacks.call("on_optimizer_step")
        self.scheduler.step()
        if self.stepwide.reads_mean:
            self.stepwide.commit(bool(finite))
        self.window.add(loss[0], metrics, norm, finite)
        if self.router is not None:
            self.window.add_aux(self.world.sum_(self.router.total), finite)
        if self.config.grad_filter:
            self.window.add_dropped(self.dropped, self.world)
        if self.watch_tokens:
            self.window.tokens = self.world.sum_(self.of_tokens)
            self.watch_tokens = False
        for batch in self.done:  # here, so that a step cut short leaves no trace in the counters
            self.window.trunk(batch)
        self.progress.num_tokens += sum(sequence_tokens(self.examples[i]) for i in rows)
        self.state.global_step += 1
        if self.moving is not None and self.state.global_step % self.moving.every == 0:
            self.moving.move_()
        return learning_rate

    def _begin(self, rows: list[int]) -> None:
        """Packs the step into this process's micro-batches, and forgets the last one's gradients."""
        shares = step_batches(self.examples, rows, self.max_tokens, self.trunk_cost, self.world.size)
        self.share = self.budget.fit(shares[self.world.rank], rows)
        # Sharded ranks gather parameters together, so that one without work runs the smallest row for nothing.
        self.rounds = max(map(len, shares)) if self.engine.sharded else len(self.share)
        self.gradients.begin(len(self.share), self.state.global_step + 1)

    def _forward_backward(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Gradients of this process's part of a step; returns its loss and metric sums, detached."""
        idle = [min(rows, key=lambda i: self._tokens[i])]
        check_start = self.state.global_step == 0 and (self.starts_at_reference or self.start is not None)
        stats = self.stepwide.statistics("train", rows)
        if self.world.several:  # here the ranks meet, and a rank that begins its part anew does so alone
            self.stepwide.look_ahead(stats, self.share, self.rounds, idle)
        loss, metrics, wrong = self.budget.repeat(
            lambda: self._accumulate(rows, stats, idle, check_start), restart=lambda: self._begin(rows)
        )
        if check_start and any(self.world.gather(wrong)):
            raise TrainingError(wrong or "another process does not start at the reference")
        return loss, metrics

    def _accumulate(
        self, rows: list[int], stats: Statistics, idle_rows: list[int], check_start: bool
    ) -> tuple[Tensor, Tensor, str | None]:
        """The micro-batches of this process, one after another; also what is wrong with the start, if it is looked at.
        Nothing is exchanged between processes here, but by sharded ones."""
        pair_count = sum(loss_count(self.examples[i]) for i in rows)
        nlls = self.objective.nll_counts(self.examples[i] for i in rows)
        step_loss = torch.zeros((), device=self.device)
        step_metrics = torch.zeros(len(PAIR_METRICS), device=self.device)
        self.done, self.dropped, wrong = [], [], None
        self.of_tokens = torch.zeros(TOKEN_SUMS, device=self.device)
        if self.router is not None:
            self.router.begin()
        at_once = not self.world.several and len(self.share) == 1
        if not (self.world.several or at_once):
            self.stepwide.look_ahead(stats, self.share, self.rounds, idle_rows)
        for k in range(self.rounds):
            idle = k >= len(self.share)
            part = self.budget.part = idle_rows if idle else self.share[k]
            self.engine.sync_gradients(k == self.rounds - 1)
            batch = self.batch(self.examples, part, self.ref["train"], TRAIN, self.state.global_step)
            logp = self.logp(self.engine, batch)
            if idle:
                (0.0 * logp.sum()).backward()
                continue
            if self.stepwide.reads_rows and at_once:
                self.stepwide.of_rows(stats, [(batch, logp)], self.examples, train=True)
            loss, metrics = self.objective(logp, batch, stats, pair_count, nlls)
            if self.router is not None:
                loss = loss + self.router.share(batch, stats.router)
            if check_start:
                wrong = wrong or self._wrong_start(logp.detach(), batch)
            loss.backward()
            if self.config.grad_filter:
                self.dropped.append(batch.rows[DROPPED_MASS])
            if self.watch_tokens:
                self.of_tokens += token_sums(batch)
            batch.rows.clear()  # the step's batches are counted at its end: their graphs need not live until then
            step_loss += loss.detach()
            step_metrics += metrics
            self.done.append(batch)
            if k + 1 < self.rounds:
                self.callbacks.call("on_substep_end")
        return step_loss, step_metrics, wrong

    # --------------------------------------------------------------- guards

    def verify(self, engine: Engine, rows: list[int]) -> None:
        """The packed path must equal the model's own logits on a few real rows of the first step, and the longest."""
        everything = itertools.chain(self.examples, *self.eval_sets.values())
        chosen = guard_rows(engine.policy, [self.examples[i] for i in rows], everything)
        with self.autocast(), torch.no_grad():
            try:
                engine(lambda: verify_or_unpack(engine.policy, chosen))
            except Exception as error:
                chosen = chosen[:1]  # as training goes on in smaller micro-batches
                if not is_out_of_memory(error):
                    raise
                engine(lambda: verify_or_unpack(engine.policy, chosen))
            if engine is self.engine and self.router is not None:
                self.router = engine(lambda: self.router.verify(chosen, self.low_precision))
            if engine is self.engine and self.config.disable_dropout:
                engine(lambda: check_quiet(engine.policy, chosen[:1]))

    def _wrong_start(self, logp: Tensor, batch: PackedBatch) -> str | None:
        """A policy that starts as its reference must reproduce the losses' closed form, to the dtype's error."""
        start_logp = batch.ref_logp if self.start is None else references.of_batch(self.start, batch)
        if start_logp is None:
            return None
        gap = (logp - start_logp).abs().mean().item()
        allowed = 0.1 if self.low_precision else 1e-4 * max(1.0, logp.abs().mean().item())
        if gap <= allowed:
            return None
        zero = logp.new_zeros(())  # what a step's statistics are at the start
        stats, both = Statistics(zero, zero), ((pair_inputs(v, batch), v) for v in (logp, start_logp))
        got, expected = ([round(stats.loss(t, *v, batch).mean().item(), 4) for t in self.pair_terms] for v in both)
        return (
            f"the policy should start at its reference, but its token log-probabilities differ by {gap:.2g} on average "
            f"(allowed {allowed:.2g}; loss {got} instead of {expected}): did {cache_folder()} outlive a change of the "
            "model's code?"
        )

    def _warn(self, warnings: Sequence[Any]) -> None:
        for warning in warnings if self.config.guardrails else []:
            log.warning("%s", warning)

    # ------------------------------------------------------- logs and saves

    def _epoch(self, epoch: int) -> float:
        """TRL's fractional epoch: batches seen over batches of the epoch, from the epoch's rows seen so far."""
        size = self.config.per_device_train_batch_size * self.world.size
        n = len(self.examples)
        batches = n // size if self.config.dataloader_drop_last else math.ceil(n / size)
        return epoch + math.ceil(self.progress.seen / size) / batches

    def log(self, metrics: dict[str, float], bar: tqdm | None = None) -> None:
        line = {**metrics, "epoch": round(self.state.epoch or 0.0, 4), "step": self.state.global_step}
        self.state.log_history.append(line)
        outputs.write_line(self, line)
        if self.world.main and (self.config.disable_tqdm or not sys.stderr.isatty()):
            outputs.say(metrics, self.state.global_step, self.state.max_steps)
        if bar is not None:
            names = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins"}
            names["tok/s"] = "tokens_per_second"
            bar.set_postfix({k: f"{metrics[v]:.4g}" for k, v in names.items() if v in metrics})
        self.callbacks.log(metrics)
        self._warn(self.guards.check(self.state.global_step, metrics))

    @contextlib.contextmanager
    def _around_callbacks(self) -> Iterator[None]:
        """A callback may call generate() or forward(), on the model as it came; its time is no training time."""
        if not hasattr(self, "window"):
            yield
            return
        with self.window.paused(), self.policy.detached():
            yield

    def bar(self, **kwargs: Any) -> tqdm:
        quiet = self.config.disable_tqdm or not self.world.main or not sys.stderr.isatty()
        return tqdm(disable=quiet, file=sys.stderr, dynamic_ncols=True, **kwargs)

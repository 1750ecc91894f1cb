"""The trainer: `fastpo.train(model, train_dataset, ...)`, one optimiser step after another.

A step is `per_device_train_batch_size x gradient_accumulation_steps` pairs in the seeded order. It is packed into
micro-batches of at most `max_tokens` tokens; every loss term is normalised by its count over the whole step, so the
numbers do not depend on the packing. Metrics stay on the device until a logging step.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments, set_seed

from fastpo import data, losses, ops, rows
from fastpo.config import TrainConfig
from fastpo.errors import ConfigError, DataError, DeviceError, TrainingError
from fastpo.losses import SFT
from fastpo.metrics import PAIR_METRICS, Window, fused_pair_loss, metric_means, pair_inputs, pair_metrics
from fastpo.model import Policy, load_model, load_tokenizer, resolve_device, verify_policy
from fastpo.optim import Gradients, build_optimizer, build_scheduler
from fastpo.packing import (
    PackedBatch,
    collate,
    epoch_order,
    epoch_steps,
    nll_tokens,
    pack_all,
    pack_step,
    trunk_tokens,
)
from fastpo.ref_policy import RefCache, cache_folder, model_fingerprint, reference_logps

log = logging.getLogger("fastpo")

# On a CPU half of DESIGN's 4,096: as fast, and a fifth less memory (bench/train_vs_trl.py).
MAX_TOKENS = {"cuda": 16_384, "cpu": 2_048}
GUARD_ROWS = 3  # real rows on which the packed path must equal the model's own logits before the first step


@dataclass
class TrainResult:
    """What `fastpo.train` returns: the model, every logged line, the last metrics, transformers' TrainerState."""

    model: nn.Module
    log_history: list[dict[str, float]]
    metrics: dict[str, float]
    state: TrainerState


def train(
    model: Any,
    train_dataset: Any,
    *,
    ref_model: nn.Module | None = None,
    args: Any = None,
    eval_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    callbacks: Sequence[Any] | None = None,
    optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    **overrides: Any,
) -> TrainResult:
    """Preference-train a causal language model, as TRL's `DPOTrainer(...).train()` with the same arguments.

    model: a name or path, or a transformers / PEFT model in memory (trained in place; its weights at the call are the
    reference where a loss needs one and neither `ref_model` nor the data give one).
    train_dataset: a `datasets.Dataset`, a list of dicts, a .jsonl/.jsonl.gz/.json/.parquet path or a hub id, with
    `prompt`, `chosen`, `rejected` (or `prompt`, `completion` for loss_type="sft").
    args: a `TrainConfig`, a dict, a YAML path or a TRL `DPOConfig`; `overrides` go on top.
    Raises fastpo.errors.FastpoError with one line for whatever a user can mend.
    """
    return Trainer(
        model, train_dataset, ref_model=ref_model, args=args, eval_dataset=eval_dataset,
        processing_class=processing_class, peft_config=peft_config, quantization_config=quantization_config,
        callbacks=callbacks, optimizers=optimizers, **overrides,
    ).train()  # fmt: skip


class Trainer:
    """One run. `train` is its public face; the parts are methods so that each can be read, and tested, alone."""

    def __init__(
        self,
        model: Any,
        train_dataset: Any,
        *,
        ref_model: nn.Module | None = None,
        args: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        **overrides: Any,
    ):
        self.config = config = TrainConfig.build(args, **overrides)
        _ensure_log_handler()
        self.terms = losses.resolve_terms(
            config.losses, config.loss_weights, beta=config.beta, label_smoothing=config.label_smoothing,
            gamma_beta_ratio=config.gamma_beta_ratio,
            ipo_reduce=config.ipo_reduce if config.ipo_reduce != "mean" else None,
        )  # fmt: skip
        self.pair_terms = [t for t in self.terms if t.loss is not None]
        if ref_model is not None and not isinstance(ref_model, nn.Module):
            raise ConfigError(f"ref_model must be a model in memory, not {ref_model!r}: load it first")
        self.ref_model = ref_model
        self.device = _device(config)
        self.output_dir = _fresh_output_dir(config)
        set_seed(config.seed)

        self.tokenizer = processing_class if processing_class is not None else load_tokenizer(
            model if isinstance(model, str | os.PathLike) else getattr(model.config, "_name_or_path", ""),
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
        self.examples = self._prepare(train_dataset, config.dataset_train_split, "train")
        self.eval_sets = self._prepare_eval(eval_dataset)

        if isinstance(model, str | os.PathLike):
            model = load_model(
                os.fspath(model), dtype=config.dtype, device=self.device, trust_remote_code=config.trust_remote_code,
                quantization_config=quantization_config, model_init_kwargs=config.model_init_kwargs,
            )  # fmt: skip
        elif quantization_config is not None or config.model_init_kwargs or config.dtype:
            raise ConfigError("quantization_config, model_init_kwargs and dtype need a model given by name or path")
        self.new_adapter = peft_config is not None
        if peft_config is not None:
            if hasattr(model, "peft_config"):
                raise ConfigError("peft_config is given, but the model has an adapter already")
            model = _with_adapter(model, peft_config)
        if not _is_quantized(model):
            model.to(self.device)
        elif not hasattr(model, "peft_config"):
            raise ConfigError("a quantised model cannot be trained itself: pass peft_config for an adapter on top")
        if config.disable_dropout:
            _disable_dropout(model)
        self.model = model
        self.policy = Policy(model)
        for name, examples in {"train": self.examples, **self.eval_sets}.items():
            _check_ids(self.policy, examples, name)
        # The closed form at the start holds only where the policy begins as the reference by construction: PiSSA and
        # its like start an adapter away from zero.
        zero_adapter = getattr(peft_config, "init_lora_weights", True) in (True, "gaussian")
        self.starts_at_reference = ref_model is None and config.disable_dropout and zero_adapter
        self.autocast_dtype = torch.bfloat16 if _use_bf16(config, self.device) else None
        self.max_tokens = config.max_tokens or MAX_TOKENS[self.device.type]
        self.callbacks = [c() if isinstance(c, type) else c for c in callbacks or []]
        self.callback_args = CallbackArgs(config)
        self.optimizer, self.scheduler = optimizers or (None, None)
        self.written: list[Path] = []  # checkpoints of this run, the oldest first
        self.state = TrainerState()
        self.control = TrainerControl()
        self.num_tokens = 0

    # ------------------------------------------------------------------ data

    def _prepare(self, dataset: Any, split: str, name: str) -> list[data.Example]:
        config = self.config
        table = rows.load_rows(dataset, split=split, config_name=config.dataset_config)
        kind = "preference" if self.pair_terms or "chosen" in rows.column_names(table) else "sft"
        examples, report = data.prepare_examples(
            table, self.tokenizer, kind=kind, max_length=config.max_length, truncation_mode=config.truncation_mode,
            columns=self._columns(), invalid=config.invalid_rows, num_proc=config.dataset_num_proc,
        )  # fmt: skip
        log.info("%s data: %s", name, report.summary())
        for term in self.pair_terms:
            if term.loss.win_prob:
                needed = [("win_prob", "win_prob_chosen"), ("win_prob", "win_prob_rejected")]
                data.require_columns(examples, needed, term.name, report.columns)
        if name == "train":
            log.info("an example, as it is trained on:\n%s", data.describe_example(examples[0], self.tokenizer))
        return examples

    def _columns(self) -> list[str]:
        """The optional columns that this run reads; others may hold anything."""
        columns = ["weight"]
        if any(t.loss.reference for t in self.pair_terms) and self.ref_model is None:
            columns += ["ref_chosen_logps", "ref_rejected_logps"]
        if any(t.loss.win_prob for t in self.pair_terms):
            columns += ["win_prob", "win_prob_chosen", "win_prob_rejected"]
        return columns

    def _prepare_eval(self, eval_dataset: Any) -> dict[str, list[data.Example]]:
        split = self.config.dataset_test_split
        if eval_dataset is None:
            if self.config.eval_strategy != "no" or self.config.eval_on_start:
                raise ConfigError("eval_strategy is set, but there is no eval_dataset")
            return {}
        if isinstance(eval_dataset, Mapping):
            return {f"eval_{k}": self._prepare(v, split, f"eval {k}") for k, v in eval_dataset.items()}
        return {"eval": self._prepare(eval_dataset, split, "eval")}

    def _plan(self) -> list[tuple[int, list[int]]]:
        """(epoch, rows) of every optimiser step of the run."""
        config, n = self.config, len(self.examples)
        steps: list[tuple[int, list[int]]] = []
        seed = config.seed if config.data_seed is None else config.data_seed
        epoch = 0
        while True:
            order = epoch_order(n, seed=seed, epoch=epoch, strategy=config.train_sampling_strategy)
            batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
            of_epoch = epoch_steps(order, batch, accumulation, config.dataloader_drop_last)
            if not of_epoch:
                raise DataError(f"{n} rows do not fill one batch of {batch} (dataloader_drop_last)")
            total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * len(of_epoch))
            steps += [(epoch, rows) for rows in of_epoch]
            if len(steps) >= total:
                return steps[:total]
            epoch += 1

    # ------------------------------------------------------------- reference

    def _attach_reference(self, plan: list[tuple[int, list[int]]]) -> None:
        """Fill `self.ref` with token log-probabilities for every data set, or leave None where none is needed."""
        self.ref: dict[str, Any] = {"train": None, **dict.fromkeys(self.eval_sets)}
        if not any(t.loss.reference for t in self.pair_terms):
            return
        evaluates = self.config.eval_strategy != "no" or self.config.eval_on_start
        sets = {"train": self.examples, **(self.eval_sets if evaluates else {})}
        if self.ref_model is None:
            given = {name: ["ref_logps" in e.response_columns for e in examples] for name, examples in sets.items()}
            sets = {name: examples for name, examples in sets.items() if not all(given[name])}
            for name in sets:
                if any(given[name]):
                    raise DataError(
                        f"ref_chosen_logps or ref_rejected_logps is missing in some rows of the {name} data"
                    )
            if not sets:
                log.info("reference: log-probabilities from the data")
                self.starts_at_reference = False
                return
        with contextlib.ExitStack() as stack:
            policy = self.policy
            if self.ref_model is not None:
                stack.enter_context(_on_device(self.ref_model, self.device))
                policy = Policy(self.ref_model)
                self._verify(policy, plan[0][1])
            self._reference_pass(policy, sets, plan)
        self.ref_model = None  # its log-probabilities are all that training needs of it

    def _reference_pass(
        self, policy: Policy, sets: dict[str, list[data.Example]], plan: list[tuple[int, list[int]]]
    ) -> None:
        compute = f"{self.autocast_dtype or 'as loaded'}|{self.device.type}"
        fingerprint = model_fingerprint(policy.model, compute=compute, without_adapter=self.new_adapter)
        cache = RefCache(fingerprint, cache_folder())
        # A new adapter's reference is the base model; one that was trained before is its own reference, as in TRL.
        adapter_off: Any = policy.model.disable_adapter if self.new_adapter else contextlib.nullcontext
        visited = sorted({row for _, rows in plan for row in rows})
        with torch.no_grad(), _eval_mode(policy.model), policy.attach(), adapter_off():
            for name, examples in sets.items():
                with self._bar(desc="reference", total=None) as bar:

                    def progress(done: int, total: int, bar: tqdm = bar) -> None:
                        bar.total = total
                        bar.update(done - bar.n)

                    self.ref[name] = reference_logps(
                        examples, visited if name == "train" else range(len(examples)), cache,
                        lambda batch: self._logp(policy, batch.to(self.device)),
                        max_tokens=self.max_tokens, progress=progress,
                    )  # fmt: skip

    # ------------------------------------------------------------- forward

    def _logp(self, policy: Policy, batch: PackedBatch) -> Tensor:
        """Token log-probabilities [N] fp32 of a packed batch."""
        autocast = (
            torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else contextlib.nullcontext()
        )
        with autocast:
            logp = policy.logp(batch, memory_budget=self.config.logits_memory_budget)
        assert isinstance(logp, Tensor)
        return logp

    def _objective(self, logp: Tensor, batch: PackedBatch, pair_count: int, nll_count: int) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's loss, and its metrics [len(PAIR_METRICS)], both on the device."""
        total = logp.new_zeros(())
        metrics = logp.new_zeros(len(PAIR_METRICS))
        for term in self.terms:
            if term.name == SFT:
                total = total - term.weight / max(nll_count, 1) * (batch.nll_weight * logp).sum()
        if self.pair_terms:
            share, metrics = self._pair_loss(logp, batch)
            total = total + share / pair_count
        return total, metrics

    def _pair_loss(self, logp: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """sum over terms and pairs of weight * loss, and the metrics as sums over pairs."""
        total = logp.new_zeros(())
        if logp.is_cuda and "triton" in ops.available_backends():
            for term in self.pair_terms:
                share, out = fused_pair_loss(term, logp, batch)
                total = total + term.weight * share
            x = pair_inputs(logp, batch, out[1:])
        else:
            x = pair_inputs(logp, batch)
            for term in self.pair_terms:
                total = total + term.weight * (batch.pair_weight * term.loss.fn(x, **term.hyper)).sum()
        return total, pair_metrics(x, self.pair_terms[0])

    # ---------------------------------------------------------------- train

    def train(self) -> TrainResult:
        """Run all steps, evaluate and save as configured, return the result."""
        config = self.config
        plan = self._plan()
        self._tokens = [trunk_tokens(e) for e in self.examples]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ConfigError(
                "no parameter of the model requires a gradient (an adapter is loaded with is_trainable=True)"
            )
        self._start_files()
        self._verify(self.policy, plan[0][1])
        self._attach_reference(plan)

        gradients = Gradients(parameters, masters=self.optimizer is None)
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, config, gradients)
        if self.scheduler is None:
            self.scheduler = build_scheduler(self.optimizer, config, len(plan))
        state = self.state
        state.max_steps, state.num_train_epochs = len(plan), math.ceil(config.num_train_epochs)
        state.logging_steps = _interval(config.logging_steps, len(plan))
        state.eval_steps = _interval(config.eval_steps or config.logging_steps, len(plan))
        state.save_steps = _interval(config.save_steps, len(plan))
        state.train_batch_size = config.per_device_train_batch_size
        window = self.window = Window(self.device, self.policy, self.terms, self.max_tokens, config.max_nonfinite_steps)
        started = time.monotonic()
        seen = 0  # rows of the epoch

        with self._bar(desc="train", total=len(plan)) as bar, self._training():
            self._call("on_train_begin")
            if config.eval_on_start:
                self._evaluate_all()
            try:
                for step, (epoch, rows) in enumerate(plan, start=1):
                    first_of_epoch = step == 1 or plan[step - 2][0] != epoch
                    last_of_epoch = step == len(plan) or plan[step][0] != epoch
                    if first_of_epoch:
                        self._call("on_epoch_begin")
                    self._call("on_step_begin")
                    loss, metrics = self._forward_backward(rows, gradients, window, check_start=step == 1)
                    learning_rate = self.scheduler.get_last_lr()[0]
                    norm = gradients.clip_(config.max_grad_norm)
                    finite = torch.isfinite(norm) & torch.isfinite(loss)
                    gradients.step_(self.optimizer, finite)
                    self.scheduler.step()
                    window.add(loss, metrics, norm, finite)

                    state.global_step = step
                    seen = len(rows) if first_of_epoch else seen + len(rows)
                    state.epoch = self._epoch(epoch, seen)
                    bar.update()
                    self._call("on_step_end")
                    first_logged = step == 1 and config.logging_first_step
                    if step % state.logging_steps == 0 or first_logged or self.control.should_log:
                        self._log(window.flush(learning_rate, self.num_tokens), bar)
                    if last_of_epoch:
                        self._call("on_epoch_end")
                    at_end = step == len(plan) or self.control.should_training_stop
                    evaluate = self._due(config.eval_strategy, state.eval_steps, last_of_epoch, at_end)
                    if evaluate or self.control.should_evaluate:
                        self._evaluate_all()
                    save = self._due(config.save_strategy, state.save_steps, last_of_epoch, False)
                    if save or self.control.should_save:
                        self._save_checkpoint()
                    self.control.should_log = self.control.should_evaluate = self.control.should_save = False
                    if self.control.should_training_stop:
                        break
                rows_seen = sum(len(rows) for _, rows in plan[: state.global_step])
                seconds = time.monotonic() - started
                summary = window.summary(seconds, state.global_step, rows_seen, self.num_tokens)
            except BaseException:
                self._rescue()
                raise
            finally:
                gradients.close()
            self._log(summary, None)
            self._call("on_train_end")
        if config.save_final:
            self._save_model(self.output_dir)
        return TrainResult(self.model, state.log_history, summary, state)

    def _forward_backward(
        self, rows: list[int], gradients: Gradients, window: Window, check_start: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of one step's loss, micro-batch by micro-batch; returns the loss and the metric sums, detached."""
        pair_count = sum(len(self.examples[i].pairs) for i in rows)
        nll_count = sum(nll_tokens(self.examples[i]) for i in rows)
        step_loss = torch.zeros((), device=self.device)
        step_metrics = torch.zeros(len(PAIR_METRICS), device=self.device)
        micro_batches = pack_step(rows, self._tokens, self.max_tokens)
        gradients.begin(len(micro_batches))
        for part in micro_batches:
            batch = collate(self.examples, part, self.ref["train"]).to(self.device)
            logp = self._logp(self.policy, batch)
            loss, metrics = self._objective(logp, batch, pair_count, nll_count)
            if check_start and self.starts_at_reference and batch.ref_logp is not None:
                self._check_start(logp.detach(), batch)
            loss.backward()
            step_loss += loss.detach()
            step_metrics += metrics
            self.num_tokens += batch.num_tokens
            window.trunk(batch)
        return step_loss, step_metrics

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """The model as training needs it: packed attention, train mode, checkpointing; put back afterwards."""
        model, config = self.model, self.config
        was_training = model.training
        model.train()
        already = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        if config.gradient_checkpointing and not already:
            kwargs = {"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})}
            _checkpointing(self.policy.causal_lm, kwargs)
        try:
            with self.policy.attach():
                yield
        finally:
            model.train(was_training)
            if config.gradient_checkpointing and not already:
                _checkpointing(self.policy.causal_lm, None)

    # --------------------------------------------------------------- guards

    def _verify(self, policy: Policy, rows: list[int]) -> None:
        """The packed path must equal the model's own logits on a few real rows; short ones, to keep it cheap."""
        rows = sorted(rows, key=lambda i: self._tokens[i])[:GUARD_ROWS]
        autocast = (
            torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else contextlib.nullcontext()
        )
        with autocast:
            verify_policy(policy, [self.examples[i] for i in rows])

    def _check_start(self, logp: Tensor, batch: PackedBatch) -> None:
        """A policy that starts as its reference must reproduce the losses' closed form, to the dtype's error."""
        gap = (logp - batch.ref_logp).abs().mean().item()
        low_precision = self.autocast_dtype is not None or self.policy.dtype != torch.float32
        allowed = 0.1 if low_precision else 1e-4 * max(1.0, logp.abs().mean().item())
        if not gap <= allowed:
            x = pair_inputs(logp, batch)
            start = x._replace(chosen_logps=x.ref_chosen_logps, rejected_logps=x.ref_rejected_logps)
            got, expected = (
                [round(t.loss.fn(v, **t.hyper).mean().item(), 4) for t in self.pair_terms] for v in (x, start)
            )
            raise TrainingError(
                f"the policy should start at its reference, but its token log-probabilities differ by {gap:.2g} on "
                f"average (allowed {allowed:.2g}; loss {got} instead of {expected}): is the model random in train "
                f"mode, or did {cache_folder()} outlive a change of the model's code?"
            )

    def _rescue(self) -> None:
        """A crash or Ctrl-C loses nothing: the weights of the last finished step are saved."""
        if self.state.global_step == 0:
            return
        try:
            log.warning("stopped at step %d; the model is saved in %s", self.state.global_step, self._save_checkpoint())
        except Exception as error:
            log.warning("the model could not be saved after the failure: %s", error)

    # ----------------------------------------------------------- evaluation

    def _evaluate_all(self) -> None:
        for name, examples in self.eval_sets.items():
            with self.window.paused():
                metrics = self.evaluate(examples, self.ref[name], name)
            self._log(metrics, None)
            self._call("on_evaluate", metrics={**metrics, "epoch": self.state.epoch})

    @torch.no_grad()
    def evaluate(self, examples: Sequence[data.Example], ref: Any, prefix: str = "eval") -> dict[str, float]:
        """The training metrics on other data, every pair once; keys carry `prefix`."""
        started = time.monotonic()
        tokens = [trunk_tokens(e) for e in examples]
        pair_count = sum(len(e.pairs) for e in examples)
        nll_count = sum(map(nll_tokens, examples))
        total, sums = torch.zeros((), device=self.device), torch.zeros(len(PAIR_METRICS), device=self.device)
        with _eval_mode(self.model):
            for rows in pack_all(range(len(examples)), tokens, self.max_tokens):
                batch = collate(examples, rows, ref).to(self.device)
                loss, metrics = self._objective(self._logp(self.policy, batch), batch, pair_count, nll_count)
                total += loss
                sums += metrics
        seconds = time.monotonic() - started
        out = {"loss": total.item(), **(metric_means(sums.tolist(), self.pair_terms) if self.pair_terms else {})}
        out = {f"{prefix}_{k}": v for k, v in out.items()}
        return {**out, f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": len(examples) / seconds}

    # ------------------------------------------------------- logs and saves

    def _due(self, strategy: str, every: int, last_of_epoch: bool, at_end: bool) -> bool:
        if strategy == "steps":
            return self.state.global_step % every == 0 or at_end
        return strategy == "epoch" and last_of_epoch

    def _epoch(self, epoch: int, seen: int) -> float:
        """TRL's fractional epoch: batches seen over batches of the epoch, from the epoch's rows seen so far."""
        size = self.config.per_device_train_batch_size
        n = len(self.examples)
        batches = n // size if self.config.dataloader_drop_last else math.ceil(n / size)
        return epoch + math.ceil(seen / size) / batches

    def _log(self, metrics: dict[str, float], bar: tqdm | None) -> None:
        line = {**metrics, "epoch": round(self.state.epoch or 0.0, 4), "step": self.state.global_step}
        self.state.log_history.append(line)
        with open(self.output_dir / "metrics.jsonl", "a") as f:
            shown = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            f.write(json.dumps(shown) + "\n")
        if bar is not None:
            names = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins"}
            names["tok/s"] = "tokens_per_second"
            bar.set_postfix({k: f"{metrics[v]:.4g}" for k, v in names.items() if v in metrics})
        self._call("on_log", logs=metrics)

    def _call(self, event: str, **extra: Any) -> None:
        """transformers' TrainerCallback protocol; a callback steers through `control`, in place or returned.

        The events: on_train_begin, on_epoch_begin, on_step_begin, on_step_end, on_log, on_evaluate, on_save,
        on_epoch_end, on_train_end.
        """
        handlers = [h for callback in self.callbacks if (h := getattr(callback, event, None)) is not None]
        if not handlers:
            return
        given = {"model": self.model, "processing_class": self.tokenizer, "optimizer": self.optimizer,
                 "lr_scheduler": self.scheduler}  # fmt: skip
        # A callback may call generate() or forward(), on the model as it came.
        with self.window.paused(), self.policy.detached():
            for handler in handlers:
                self.control = handler(self.callback_args, self.state, self.control, **given, **extra) or self.control

    def _bar(self, **kwargs: Any) -> tqdm:
        return tqdm(disable=self.config.disable_tqdm, file=sys.stderr, dynamic_ncols=True, **kwargs)

    def _start_files(self) -> None:
        """What marks the folder as this run's: its configuration, and no metrics of another run."""
        (self.output_dir / "metrics.jsonl").unlink(missing_ok=True)
        plain = json.loads(json.dumps(self.config.to_dict(), default=str))
        (self.output_dir / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))

    def _save_checkpoint(self) -> Path:
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        with self.window.paused():
            self._save_model(folder)
        self.written = [f for f in self.written if f != folder] + [folder]
        while self.config.save_total_limit is not None and len(self.written) > self.config.save_total_limit:
            shutil.rmtree(self.written.pop(0), ignore_errors=True)
        self._call("on_save")
        return folder

    def _save_model(self, folder: Path) -> None:
        """Model and tokenizer as `from_pretrained` reads them, written beside and then renamed."""
        temporary = self.output_dir / f".saving-{folder.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        with self.policy.detached():
            self.model.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        if folder == self.output_dir:
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
            temporary.rmdir()
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)


def _ensure_log_handler() -> None:
    """fastpo's messages are shown unless the program has set up logging itself."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fastpo: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def _device(config: TrainConfig) -> torch.device:
    device = resolve_device(config.device, use_cpu=config.use_cpu)
    if device.type not in MAX_TOKENS:
        raise DeviceError(f"device {config.device!r} is not supported; use cuda or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _checkpointing(model: nn.Module, kwargs: dict | None) -> None:
    """Switch it on with `kwargs`, or off; transformers 5.12 renamed the methods."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if kwargs is None:
        getattr(model, f"{name}_checkpointing_disable")()
    else:
        getattr(model, f"{name}_checkpointing_enable")(kwargs)


def _use_bf16(config: TrainConfig, device: torch.device) -> bool:
    if config.bf16 is not None:
        return config.bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _fresh_output_dir(config: TrainConfig) -> Path:
    """The output folder, made; one that holds another run is refused."""
    folder = Path(config.output_dir)
    names = ("metrics.jsonl", "config.yaml", "config.json", "adapter_config.json", "checkpoint-*")
    marks = [path.name for name in names for path in folder.glob(name)]
    if marks and not config.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {str(folder)!r} holds another run ({marks[0]}); choose another, or set overwrite_output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} cannot be written: {error.strerror}") from None
    return folder


def _with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    try:
        from peft import get_peft_model
    except ImportError:
        raise ConfigError("peft_config needs the peft package: pip install 'fastpo[peft]'") from None
    return get_peft_model(model, peft_config)


def _is_quantized(model: nn.Module) -> bool:
    return getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None


def _disable_dropout(model: nn.Module) -> None:
    """Every dropout probability to zero: the modules', and those that attention layers keep as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _interval(value: float, total: int) -> int:
    """Steps; below 1 a share of all steps, as in transformers."""
    return max(1, math.ceil(value * total) if value < 1 else int(value))


@contextlib.contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A reference model where and how it is needed; put back afterwards, so that it holds no device memory."""
    home, was_training = next(model.parameters()).device, model.training
    model.eval()
    if not _is_quantized(model):
        model.to(device)
    try:
        yield
    finally:
        model.train(was_training)
        if not _is_quantized(model):
            model.to(home)


def _check_ids(policy: Policy, examples: Sequence[data.Example], name: str) -> None:
    """Token ids and positions must exist in the model: on a GPU the look-up of one that does not is a lost context."""
    rows = policy.causal_lm.get_input_embeddings().weight.shape[0]
    largest = max(int(ids.max()) for e in examples for ids in (e.prompt_ids, *e.responses))
    if largest >= rows:
        raise DataError(
            f"the {name} data hold token id {largest}, but the model has {rows} embeddings: "
            "call model.resize_token_embeddings(len(tokenizer)), or use the model's own tokenizer"
        )
    positions = ("wpe", "embed_positions")
    learnt = [
        module.num_embeddings
        for path, module in policy.trunk.named_modules()
        if path.rpartition(".")[2] in positions and isinstance(module, nn.Embedding)
    ]
    longest = max(len(e.prompt_of(k)) + len(r) for e in examples for k, r in enumerate(e.responses))
    if learnt and longest > min(learnt):
        raise DataError(
            f"the {name} data hold a row of {longest} tokens, the model has {min(learnt)} positions: set max_length"
        )


class CallbackArgs:
    """The configuration as a transformers callback expects its `args`: fastpo's fields, else transformers' defaults."""

    world_size, process_index, local_process_index, should_save, is_world_process_zero = 1, 0, 0, True, True

    def __init__(self, config: TrainConfig):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._config, name):
            return getattr(self._config, name)
        for field in dataclasses.fields(TrainingArguments):
            if field.name == name:
                return field.default
        raise AttributeError(f"fastpo's configuration has no {name!r}, nor have transformers' TrainingArguments")

    def to_dict(self) -> dict[str, Any]:
        return self._config.to_dict()

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), default=str)

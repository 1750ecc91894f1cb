"""What a run writes for people: metrics, samples, configuration; at the end the model's card and the report."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm
from transformers import TrainerState

from fastpo import env
from fastpo.config.train_config import TrainConfig
from fastpo.losses.table import Term
from fastpo.report import disks, hub
from fastpo.report.callbacks import plain_config
from fastpo.report.hub import last_metrics, model_card
from fastpo.report.page import write_report

log = logging.getLogger("fastpo")


def ensure_log_handler(quiet: bool) -> None:
    """fastpo's messages are shown, by one process, unless the program has set up logging itself."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fastpo: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    if quiet:
        log.setLevel(logging.ERROR)


def say(metrics: Mapping[str, Any], step: int, steps: int) -> None:
    """A log line on the terminal, where no bar shows it."""
    names = {"loss": "loss", "eval_loss": "eval_loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
             "accuracy": "accuracy", "margin": "margin",  # of a reward model
             "grad_norm": "grad_norm", "learning_rate": "lr", "tokens_per_second": "tokens/s"}  # fmt: skip
    parts = [f"{short} {metrics[name]:.4g}" for name, short in names.items() if name in metrics]
    parts += [f"{k} {v:.4g}" for k, v in metrics.items() if k.endswith("_loss") and k not in (*names, "train_loss")]
    if any("loss" in key for key in metrics if key != "train_loss"):  # the summary has a line of its own
        log.info("step %d of %d: %s", step, steps, ", ".join(parts))


@dataclass(frozen=True)
class RunFacts:
    """What card and report say of a run, beside its options, its log and its data."""

    model_name: str  # a name or a path; empty where the model has none
    architecture: str  # the model's class
    adapter: bool
    dtype: str  # as the model was loaded
    chat: bool  # whether the tokenizer has a chat template
    parameters: int
    trainable_parameters: int
    terms: Sequence[Term]
    rows: int  # of the training data
    dataset_name: str | None
    step_size: int  # pairs of a step, over all processes
    device: str
    world_size: int
    tags: Sequence[str]
    repo_id: str | None = None  # where the model is pushed to


class Reporter:
    """The files of a run in `folder` but for model and checkpoints, and its last words. Only the `main` rank writes.

    inputs: names and paths of model and data, for config.yaml. again: called when the folder was removed and is made
    again.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        main: bool = True,
        inputs: Mapping[str, Any] | None = None,
        again: Callable[[], None] = lambda: None,
    ):
        self.config, self.folder, self.main, self.inputs, self.again = config, folder, main, inputs or {}, again
        self.history: Sequence[Mapping[str, Any]] = ()  # as of the last line
        self.metrics = disks.Lines(folder / "metrics.jsonl", lambda: [_json_line(line) for line in self.history])
        self.samples = disks.Lines(folder / "samples.jsonl")

    # ---------------------------------------------------- while the run goes on

    def start(self, history: Sequence[Mapping[str, Any]] = (), step: int = 0) -> None:
        """What marks the folder as this run's: its configuration, and metrics and samples up to where it starts."""
        if not self.main:
            return
        samples = self.samples.path
        try:
            _rewrite(self.metrics.path, [_json_line(line) for line in history])
            if samples.exists():
                _rewrite(samples, [s for s in samples.read_text().splitlines(True) if _step(s) <= step])
        except OSError as error:
            log.error("metrics.jsonl could not be begun: %s", error.strerror)
        self._write_config()

    def _write_config(self) -> None:
        """config.yaml: what the command line needs to run it again."""
        inputs = {key: value for key, value in self.inputs.items() if value}
        try:
            text = yaml.safe_dump(inputs | plain_config(self.config), sort_keys=False)
            (self.folder / "config.yaml").write_text(text)
        except OSError as error:
            log.error("config.yaml could not be written: %s", error.strerror)

    def ensure_folder(self) -> None:
        """The output folder again, if somebody has removed it."""
        if self.folder.is_dir():
            return
        log.error("output_dir %s was removed while the run goes on: it is made again", self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.again()
        self._write_config()

    def add_line(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Append the last line of the log history to metrics.jsonl; all of them, where the file is gone."""
        if self.main:
            self.history = history
            with contextlib.suppress(OSError):  # where even the folder cannot be made, the line waits
                self.ensure_folder()
            self.metrics.add(_json_line(history[-1]))

    def show(self, metrics: Mapping[str, Any], state: TrainerState, bar: Any = None) -> None:
        """A log line on the terminal: at the end of the `bar`, or below where there is none."""
        if self.main and (self.config.disable_tqdm or not sys.stderr.isatty()):
            say(metrics, state.global_step, state.max_steps)
        if bar is not None:
            names = {"loss": "loss", "rewards/accuracies": "acc", "accuracy": "acc", "rewards/margins": "margin",
                     "margin": "margin", "tokens_per_second": "tok/s"}  # fmt: skip
            bar.set_postfix({short: f"{metrics[k]:.4g}" for k, short in names.items() if k in metrics})

    def bar(self, **kwargs: Any) -> tqdm:
        """A progress bar, where somebody looks at it."""
        quiet = self.config.disable_tqdm or not self.main or not sys.stderr.isatty()
        return tqdm(disable=quiet, file=sys.stderr, dynamic_ncols=True, **kwargs)

    def add_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append the answers at a step to samples.jsonl."""
        if self.main:
            self.samples.add(*(json.dumps({"step": step, **s}) + "\n" for s in samples))

    # ---------------------------------------------------------------- at its end

    def write_card(self, facts: RunFacts, state: TrainerState) -> None:
        """README.md of the trained model; one that cannot be written costs nothing else."""
        if not self.main:
            return
        try:
            hub.write_card(self.folder, self._card(facts, state))
        except Exception as error:  # of the run nothing hangs on it
            log.error("the model card could not be written: %s", disks.cause(error))

    def _card(self, facts: RunFacts, state: TrainerState) -> str:
        history = state.log_history
        if self.config.load_best_model_at_end and state.best_global_step:  # what the model is, not where the run ended
            history = [line for line in history if line["step"] <= state.best_global_step]
        return model_card(
            self.config, facts.terms, base_model=facts.model_name or None, adapter=facts.adapter,
            datasets=[facts.dataset_name] if facts.dataset_name else [], rows=facts.rows, steps=state.global_step,
            batch_size=facts.step_size, metrics=last_metrics(history), chat=facts.chat, repo_id=facts.repo_id,
            dtype=facts.dtype, tags=facts.tags,
        )  # fmt: skip

    def finish(
        self,
        facts: RunFacts,
        state: TrainerState,
        summary: Mapping[str, float],
        data: Mapping[str, Any],
        warnings: Sequence[Any],
    ) -> None:
        """The report of a run that has come to its end, and a line that says where all is."""
        stopped = state.global_step < state.max_steps
        outcome = f"stopped by a callback at step {state.global_step} of {state.max_steps}" if stopped else "finished"
        self._report(facts, state, {**summary, "outcome": outcome}, data, warnings)
        if self.main:
            loss = f", loss {summary['train_loss']:.4g}" if "train_loss" in summary else ""
            model = f"; the model is in {self.folder}" if self.config.save_final else ""
            curves = f", curves in {self.folder / 'report.html'}" if self.config.report else ""
            steps = f"{state.global_step} step{'' if state.global_step == 1 else 's'}"
            log.info("%s%s%s%s", steps, loss, model, curves)

    def fail(
        self,
        facts: RunFacts,
        state: TrainerState,
        error: BaseException,
        data: Mapping[str, Any],
        warnings: Sequence[Any],
    ) -> None:
        """The report of a run that an error has ended."""
        self._report(facts, state, {"outcome": f"failed: {type(error).__name__}: {error}"}, data, warnings)

    def _report(
        self,
        facts: RunFacts,
        state: TrainerState,
        summary: Mapping[str, Any],
        data: Mapping[str, Any],
        warnings: Sequence[Any],
    ) -> None:
        """report.html. data: set name -> DataReport. warnings: the guardrails'."""
        if not (self.config.report and self.main):
            return
        try:
            write_report(
                self.folder / "report.html",
                title=self.config.run_name or self.folder.name,
                config=plain_config(self.config),
                log_history=state.log_history,
                data=data,
                warnings=[w.to_dict() for w in warnings] if self.config.guardrails else [],
                environment=env.collect(),
                summary={
                    **summary, "model": facts.model_name or facts.architecture,
                    "steps": state.global_step, "max_steps": state.max_steps,
                    "parameters": facts.parameters, "trainable_parameters": facts.trainable_parameters,
                    "device": facts.device, "world_size": facts.world_size,
                    **({"best checkpoint": f"{state.best_model_checkpoint} ({state.best_metric:.4g})"}
                       if state.best_model_checkpoint else {}),
                },
            )  # fmt: skip
        except Exception as error:  # of the run nothing hangs on it
            log.warning("report.html could not be written: %s", disks.cause(error))


def _json_line(line: Mapping[str, Any]) -> str:
    shown = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(shown) + "\n"


def _rewrite(path: Path, lines: Sequence[str]) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(lines))
    os.replace(temporary, path)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # a kill cut it off
        return math.inf

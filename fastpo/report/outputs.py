"""What a run writes for people: metrics, samples, configuration; at the end the model, its card and the report."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastpo import env
from fastpo.checkpoints import checkpoint, run_lock
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.models import adapters
from fastpo.report import disks, hub
from fastpo.report.callbacks import plain_config
from fastpo.report.hub import last_metrics, model_card
from fastpo.report.page import write_report

if TYPE_CHECKING:
    from fastpo.trainer import Trainer

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


def check_folder(config: TrainConfig, resumes: bool) -> None:
    """The output folder, made; one that holds another run is refused unless it is resumed, and one in which a run lives
    in any case."""
    folder = Path(config.output_dir)
    run_lock.check(folder)
    names = ("metrics.jsonl", "config.yaml", "config.json", "adapter_config.json", "checkpoint-*")
    marks = [path.name for name in names for path in folder.glob(name)]
    if marks and not (config.overwrite_output_dir or resumes):
        go_on = "set resume_from_checkpoint=true to go on with it, " if checkpoint.checkpoints(folder) else ""
        raise ConfigError(
            f"output_dir {str(folder)!r} holds another run ({marks[0]}); choose another, {go_on}or set "
            "overwrite_output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} cannot be written: {error.strerror}") from None


def lines_of(run: "Trainer") -> tuple[disks.Lines, disks.Lines]:
    """metrics.jsonl and samples.jsonl, as they are written while the run goes on."""
    folder = run.output_dir
    metrics = disks.Lines(folder / "metrics.jsonl", lambda: [_json_line(line) for line in run.state.log_history])
    return metrics, disks.Lines(folder / "samples.jsonl")


def start(run: "Trainer") -> None:
    """What marks the folder as this run's: its configuration, and the metrics up to where it starts."""
    if not run.world.main:
        return
    checkpoint.clear_temporaries(run.output_dir)
    history, step = [], 0
    if run.resume is not None:
        state = checkpoint.read_state(run.resume)
        history, step = state.log_history, state.global_step
    left = checkpoint.set_aside(run.output_dir, after=step if run.resume is not None else -1)
    if left and run.resume is not None:
        log.warning("checkpoints beyond step %d are left behind as %s", step, ", ".join(path.name for path in left))
    samples = run.output_dir / "samples.jsonl"
    try:
        _rewrite(run.metrics_file.path, [_json_line(line) for line in history])
        if samples.exists():
            _rewrite(samples, [s for s in samples.read_text().splitlines(True) if _step(s) <= step])
    except OSError as error:
        log.error("metrics.jsonl could not be begun: %s", error.strerror)
    _write_config(run)


def _write_config(run: "Trainer") -> None:
    """config.yaml: what the command line needs to run it again."""
    inputs = {key: value for key, value in run.inputs.items() if value}
    try:
        text = yaml.safe_dump(inputs | plain_config(run.config), sort_keys=False)
        (run.output_dir / "config.yaml").write_text(text)
    except OSError as error:
        log.error("config.yaml could not be written: %s", error.strerror)


def ensure_folder(run: "Trainer") -> None:
    """The output folder again, if somebody has removed it."""
    if run.output_dir.is_dir():
        return
    log.error("output_dir %s was removed while the run goes on: it is made again", run.output_dir)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    run.lock.again()
    _write_config(run)


def write_line(run: "Trainer", line: Mapping[str, Any]) -> None:
    """Append to metrics.jsonl: to be called once the line is in the state's history."""
    if run.world.main:
        with contextlib.suppress(OSError):  # where even the folder cannot be made, the line waits
            ensure_folder(run)
        run.metrics_file.add(_json_line(line))


def say(metrics: Mapping[str, Any], step: int, steps: int) -> None:
    """A log line on the terminal, where no bar shows it."""
    names = {"loss": "loss", "eval_loss": "eval_loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
             "grad_norm": "grad_norm", "learning_rate": "lr", "tokens_per_second": "tokens/s"}  # fmt: skip
    parts = [f"{short} {metrics[name]:.4g}" for name, short in names.items() if name in metrics]
    parts += [f"{k} {v:.4g}" for k, v in metrics.items() if k.endswith("_loss") and k not in (*names, "train_loss")]
    if any("loss" in key for key in metrics if key != "train_loss"):  # the summary has a line of its own
        log.info("step %d of %d: %s", step, steps, ", ".join(parts))


def write_samples(run: "Trainer", samples: Sequence[Mapping[str, Any]]) -> None:
    """Append to samples.jsonl."""
    if run.world.main:
        run.samples_file.add(*(json.dumps({"step": run.state.global_step, **s}) + "\n" for s in samples))


def finish(run: "Trainer", summary: dict[str, float]) -> None:
    """The trained model, its card and the report; then the hub."""
    config = run.config
    if config.save_final and run.world.main:
        write_card(run)
        if config.save_merged:
            _save_merged(run)
    stopped = run.state.global_step < run.state.max_steps
    outcome = f"stopped by a callback at step {run.state.global_step} of {run.state.max_steps}"
    report(run, summary, outcome if stopped else "finished")
    if run.world.main:
        loss = f", loss {summary['train_loss']:.4g}" if "train_loss" in summary else ""
        model = f"; the model is in {run.output_dir}" if config.save_final else ""
        curves = f", curves in {run.output_dir / 'report.html'}" if config.report else ""
        log.info("%d steps%s%s%s", run.state.global_step, loss, model, curves)
    if run.hub is not None:
        run.callbacks.call("on_push_begin")
        run.hub.push(run.output_dir)


def _save_merged(run: "Trainer") -> None:
    try:
        adapters.save_merged(
            run.model, run.tokenizer, run.output_dir / "merged", run.config.max_shard_size,
            adapter_folder=run.output_dir if run.engine.sharded else None,
        )  # fmt: skip
    except Exception as error:  # PEFT may refuse at this late hour, a disk be full; the adapter itself is saved
        log.warning("no merged model: %s", disks.cause(error))


def write_card(run: "Trainer") -> None:
    """README.md of the trained model; one that cannot be written costs nothing else."""
    try:
        hub.write_card(run.output_dir, _card(run))
    except Exception as error:  # of the run nothing hangs on it
        log.error("the model card could not be written: %s", disks.cause(error))


def _card(run: "Trainer") -> str:
    history = run.state.log_history
    if run.config.load_best_model_at_end and run.state.best_global_step:  # what the model is, not where the run ended
        history = [line for line in history if line["step"] <= run.state.best_global_step]
    return model_card(
        run.config, run.terms, base_model=run.model_name or None, adapter=hasattr(run.model, "peft_config"),
        datasets=[run.dataset_name] if run.dataset_name else [], rows=len(run.examples),
        steps=run.state.global_step, batch_size=run.step_size, metrics=last_metrics(history),
        chat=bool(getattr(run.tokenizer, "chat_template", None)),
        repo_id=run.hub.repo_id if run.hub is not None else None, dtype=str(run.loaded_dtype).removeprefix("torch."),
        tags=run.tags,
    )  # fmt: skip


def report(run: "Trainer", summary: dict[str, float], outcome: str) -> None:
    """report.html, on rank 0."""
    if not (run.config.report and run.world.main):
        return
    try:
        write_report(
            run.output_dir / "report.html",
            title=run.config.run_name or run.output_dir.name,
            config=plain_config(run.config),
            log_history=run.state.log_history,
            data=run.data_reports,
            warnings=[w.to_dict() for w in run.guards.warnings] if run.config.guardrails else [],
            environment=env.collect(),
            summary={
                **summary, "model": run.model_name or type(run.policy.causal_lm).__name__, "outcome": outcome,
                "steps": run.state.global_step, "max_steps": run.state.max_steps,
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "trainable_parameters": sum(p.numel() for p in run.parameters.values()),
                "device": str(run.device), "world_size": run.world.size,
                **({"best checkpoint": f"{run.state.best_model_checkpoint} ({run.state.best_metric:.4g})"}
                   if run.state.best_model_checkpoint else {}),
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

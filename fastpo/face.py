"""What a script reads of a trainer, before a run and after it, under the names of transformers' Trainer."""

import abc
import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerState

from fastpo.checkpoints.saving import ModelFiles
from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import sequence_tokens
from fastpo.data.prepare import Example
from fastpo.errors import ConfigError
from fastpo.models.policy import Policy
from fastpo.online import run as online_run
from fastpo.online.rollouts import Rollouts
from fastpo.reference import live as live_reference
from fastpo.reference.cache import MovingReference
from fastpo.reference.roles import PREV, REF, Given
from fastpo.reference.sources import References
from fastpo.report.callbacks import Callbacks, best
from fastpo.report.hub import Hub
from fastpo.report.outputs import Reporter, RunFacts
from fastpo.training import run_data
from fastpo.training.distributed import Engine, World
from fastpo.training.forward import Forward
from fastpo.training.guardrails import Guardrails
from fastpo.training.inputs import Origin
from fastpo.training.metrics import Window
from fastpo.training.micro_batches import MicroBatches
from fastpo.training.objective import Objective
from fastpo.training.passes import Passes
from fastpo.training.progress import Progress
from fastpo.training.router_loss import RouterLoss
from fastpo.training.run_data import DataSets
from fastpo.training.samples import Answers
from fastpo.training.signals import Signals
from fastpo.training.step_plan import StepPlan
from fastpo.training.stepwide import StepWide

log = logging.getLogger("fastpo")


@dataclass
class TrainResult:
    """What `fastpo.train` returns: model, logged lines, last metrics, transformers' TrainerState, warnings."""

    model: nn.Module = field(repr=False)
    log_history: list[dict[str, float]] = field(repr=False)
    metrics: dict[str, float]
    state: TrainerState = field(repr=False)
    warnings: list[Any] = field(default_factory=list)


class TokenizedRows(Sequence[dict[str, Any]]):
    """The rows of a run as token ids: `prompt_ids` beside `chosen_ids` and `rejected_ids` of a pair (the preferred
    response of its first pair, and the other), `completion_ids` and `label` of an unpaired row, `completion_ids` of
    one for sft alone, or `responses_ids` and `pairs` of K responses. Lists of ints, made as they are read.
    """

    def __init__(self, examples: Sequence[Example]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._row, self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row(example) for example in self._examples[index]]
        return self._row(self._examples[index])

    @staticmethod
    def _row(example: Example) -> dict[str, Any]:
        responses = [ids.tolist() for ids in example.responses]
        out: dict[str, Any] = {"prompt_ids": example.prompt_of(0).tolist()}
        if "label" in example.response_columns:
            return {**out, "completion_ids": responses[0], "label": bool(example.response_columns["label"][0])}
        if len(responses) == 1:
            return {**out, "completion_ids": responses[0]}
        if len(responses) > 2 or not example.pairs:
            return {**out, "responses_ids": responses, "pairs": [list(map(int, pair)) for pair in example.pairs]}
        chosen, rejected = example.pairs[0]
        return {**out, "chosen_ids": responses[chosen], "rejected_ids": responses[rejected]}


def rows_of_sets(sets: Mapping[str, Sequence[Example]]) -> Any:
    """What `trainer.eval_dataset` is: None, the rows of the one set, or a dict of them by the names that were given."""
    if not sets:
        return None
    rows = {name.removeprefix("eval_"): TokenizedRows(examples) for name, examples in sets.items()}
    return rows["eval"] if set(sets) == {"eval"} else rows


def moving_reference(model: nn.Module, moving: MovingReference) -> nn.Module:
    """The reference of `sync_ref_model` as a model to look at: the policy's modules around the reference's weights.

    What does not move is shared with the policy, not copied; before training the reference is a copy of the policy.
    """
    memo: dict[int, Any] = {}
    for name, parameter in moving.parameters.items():
        memo[id(parameter)] = nn.Parameter(moving.values[name], requires_grad=False)
    for parameter in model.parameters():
        if id(parameter) not in memo and not parameter.requires_grad:
            memo[id(parameter)] = parameter
    return copy.deepcopy(model, memo).eval()


def add_tags(model: Any, tags: Sequence[str]) -> list[str]:
    """Marks a transformers model with tags of its card, behind those that it has; returns all of them."""
    if hasattr(model, "add_model_tags"):
        model.add_model_tags([tag for tag in tags if tag not in (getattr(model, "model_tags", None) or [])])
    return list(dict.fromkeys([*(getattr(model, "model_tags", None) or []), *tags]))


def write_metrics(folder: Path, split: str, metrics: Mapping[str, Any], combined: bool) -> None:
    """`{split}_results.json`, with `combined` the same into all_results.json, as transformers' scripts keep them."""
    for name in [f"{split}_results.json", *(["all_results.json"] if combined else [])]:
        path = folder / name
        old = json.loads(path.read_text()) if name.startswith("all_") and path.exists() else {}
        temporary = path.with_name(f".{name}")
        temporary.write_text(json.dumps({**old, **metrics}, indent=4, sort_keys=True))
        os.replace(temporary, path)


_GIVEN = "rows given to "  # what the name of a set given to `evaluate` begins with inside a run; `eval` follows


class Face(abc.ABC):
    """The methods and attributes; `fastpo.trainer.Trainer` has them."""

    config: TrainConfig
    world: World
    device: torch.device
    objective: Objective
    origin: Origin
    data: DataSets
    tokenizer: Any
    callbacks: Callbacks
    output_dir: Path
    reporter: Reporter
    hub: Hub | None
    model: nn.Module
    policy: Policy
    parameters: Mapping[str, nn.Parameter]
    loaded_dtype: torch.dtype
    tags: list[str]
    batches: MicroBatches
    passes: Passes
    router: RouterLoss | None
    stepwide: StepWide
    engine: Engine
    forward: Forward
    plan: StepPlan
    online: online_run.OnlineRun | None
    live: live_reference.LiveReference | None
    moving: MovingReference | None
    evaluation: Any  # Evaluation, or of an online run OnlineEvaluation
    rollouts: Rollouts | None
    fixed: Given
    moving_model: nn.Module | None
    references: References
    files: ModelFiles
    signals: Signals
    in_loop: bool
    progress: Progress
    window: Window
    guards: Guardrails
    answers: Answers | None

    @property
    def state(self) -> TrainerState:
        """transformers' TrainerState: the step, the epoch, the log."""
        return self.callbacks.state

    @property
    def step_size(self) -> int:
        """Pairs of an optimiser step, over all processes."""
        return self.config.step_size * self.world.size

    @property
    def max_tokens(self) -> int:
        """Of a micro-batch."""
        return self.passes.budget.max_tokens

    @property
    def examples(self) -> list[Example]:
        """The rows as they are trained on."""
        return self.data.train

    @property
    def ref_model(self) -> Any:
        """The model given as the reference, or the one that moves; None where that is the policy's start."""
        return self.fixed[REF] if self.moving_model is None else self.moving_model

    @property
    def prev_model(self) -> Any:
        """The model given as the previous policy, or None."""
        return self.fixed[PREV]

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    @property
    def args(self) -> Any:
        """The options, under transformers' names too."""
        return self.callbacks.args

    @property
    def train_dataset(self) -> TokenizedRows:
        """The rows as token ids."""
        return TokenizedRows(self.data.train)

    @property
    def eval_dataset(self) -> Any:
        """The same of the evaluation set; a dict of several, None of none."""
        return rows_of_sets(self.data.evals)

    @abc.abstractmethod
    def ready(self) -> None:
        """Bring the model to where it is trained, once."""

    def facts(self) -> RunFacts:
        """What the model's card and the report say of this run."""
        return RunFacts(
            model_name=self.origin.model_name, architecture=type(self.policy.causal_lm).__name__,
            adapter=hasattr(self.model, "peft_config"), dtype=str(self.loaded_dtype).removeprefix("torch."),
            chat=bool(getattr(self.tokenizer, "chat_template", None)),
            parameters=sum(p.numel() for p in self.model.parameters()),
            trainable_parameters=sum(p.numel() for p in self.parameters.values()),
            terms=self.objective.terms, rows=len(self.data.train), dataset_name=self.origin.dataset_name,
            step_size=self.step_size, device=str(self.device), world_size=self.world.size, tags=self.tags,
            repo_id=self.hub.repo_id if self.hub is not None else None,
        )  # fmt: skip

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the evaluation data, or of rows given here as `train` takes them (a mapping of names for several).

        Before or after `train()`; logged, and given to on_evaluate. After it, given rows need a reference that is still
        there: an adapter's base, a ref_model, or a model given by name. `ignore_keys` is accepted and has no meaning.
        """
        if self.in_loop:
            raise ConfigError("evaluate() within a run: set control.should_evaluate in the callback, or eval_strategy")
        self.ready()
        if eval_dataset is None and not self.data.evals:
            raise ConfigError("evaluate() needs rows: pass them, or an eval_dataset to the trainer")
        metrics: dict[str, float] = {}
        if self.rollouts is None:
            self.begin_online()
        try:
            with self._sets(eval_dataset) as sets:
                for name, examples in sets.items():
                    shown = metric_key_prefix + name.removeprefix(_GIVEN).removeprefix("eval")
                    metrics |= self.evaluation(examples, self.references.of_set, name, shown)
        finally:
            online_run.close(self.online, self.rollouts)
        state = self.callbacks.state
        line = {**metrics, "epoch": round(state.epoch or 0.0, 4), "step": state.global_step}
        state.log_history.append(line)
        self.callbacks.log(metrics)
        self.callbacks.call("on_evaluate", metrics={**metrics, "epoch": state.epoch})
        return metrics

    @contextlib.contextmanager
    def _sets(self, dataset: Any) -> Iterator[dict[str, list[Example]]]:
        """The sets to evaluate, with their reference known; that of rows given only inside."""
        references, trained = self.references, self.callbacks.state.global_step > 0
        if dataset is None:
            sets = self.data.evals
            if self.online is not None:  # what is compared is not drawn yet
                yield sets
                return
            references.hold({**sets, **self.stepwide.reference_sets(sets)}, trained=trained)
            yield sets
            return
        if self.online is None:
            references.check_other_rows(trained=trained)
        run_data.check_precomputed(self.config, dataset)
        if isinstance(dataset, Mapping):
            given = {f"{_GIVEN}eval_{name}": rows for name, rows in dataset.items()}
        else:
            given = {f"{_GIVEN}eval": dataset}
        split = self.config.dataset_test_split
        sets = {name: self.data.prepare(rows, split, name) for name, rows in given.items()}
        try:
            if self.online is not None:
                yield sets
                return
            self._place(sets)
            with references.held({**sets, **self.stepwide.reference_sets(sets)}, trained=trained):
                yield sets
        finally:
            self.stepwide.forget(sets)

    def _place(self, sets: dict[str, list[Example]]) -> None:
        """What a run must know of sets that it did not begin with."""
        for name, examples in sets.items():
            if self.router is not None:
                self.router.take_whole(examples)
            self.batches.place(name, examples)
        self.stepwide.prepare(sets)

    def start_live(self, sets: dict[str, list[Example]]) -> None:
        """The reference in memory, with its weights as they are at the start."""
        if self.live is None or self.fixed[REF] is not None:  # else a first call's has them
            self.live = live_reference.start(
                self.references.policies, self.references.kept, sets, self.parameters,
                loss="+".join(self.config.losses), whole=self._exchanging,
            )  # fmt: skip
        self.forward.begin(self.engine, self.router, None if self.online else self.live.rows)

    def begin_online(self) -> None:
        """What an online run draws, trains on and is evaluated by; of another run nothing."""
        if self.online is None:
            return
        if self.objective.compares and self.moving is None:
            self.start_live(self.data.all)
        of_run = (self.tokenizer, self.live, self.moving, self.callbacks, self.files.save, self.output_dir)
        self.rollouts = self.online.begin(self.plan, self.data, self.passes, *of_run)
        self.evaluation = self.online.evaluation(self.rollouts)

    def _exchanging(self) -> contextlib.AbstractContextManager[None]:
        return self.progress.exchanging()  # of the run under way: train() begins with another

    def evaluate_in_run(self) -> bool:
        """Evaluates and logs every set; returns whether the result is the best so far. What a run cut short had done is
        not done again."""
        todo, done = self.progress.todo, self.progress.todo.setdefault("evaluated", {})
        with self.window.paused():
            for name, examples in self.data.evals.items():
                if name not in done:
                    metrics = self.evaluation(examples, self.references.of_set, name)
                    with self.signals.whole():
                        done[name] = metrics
                        self.log(metrics)
            if self.answers is not None:
                self.reporter.add_samples(self.answers(self.config.sample_generations), self.state.global_step)
        for metrics in done.values():
            self.callbacks.call("on_evaluate", metrics={**metrics, "epoch": self.state.epoch})
        del todo["evaluated"]
        if self.state.global_step == 0:
            return False  # as in transformers: what a run begins with is not its best
        return best(self.state, {k: v for metrics in done.values() for k, v in metrics.items()}, self.config)

    def rows_of_step(self, rows: list[int]) -> tuple[list[int], int]:
        """(the rows that the step at hand trains of those of its plan, prompt and response tokens that they are of)."""
        if self.rollouts is not None:
            return self.rollouts.begin_step(self.progress.cursor, self.stepwide)
        return rows, sum(sequence_tokens(self.data.train[i]) for i in rows)

    def log_and_evaluate(self, bar: tqdm | None) -> None:
        """What is due after a step of the log and of evaluations; each once, though a run is cut short in here."""
        todo = self.progress.todo
        if self.callbacks.control.should_log and not todo.get("logged"):
            with self.signals.whole():  # a log line and the note that it is written go together
                metrics = self.window.flush(todo["learning_rate"], self.progress.num_tokens)
                metrics |= self.rollouts.flush() if self.rollouts is not None else {}
                todo["logged"] = True
                self.log(metrics, bar)
            self.callbacks.agree(self.world.group)
        if self.callbacks.control.should_evaluate:
            better = self.evaluate_in_run()
            self.callbacks.agree(self.world.group)
            # The best is worth a checkpoint wherever save_steps falls.
            self.callbacks.control.should_save |= better and self.config.load_best_model_at_end

    @contextlib.contextmanager
    def around_callbacks(self) -> Iterator[None]:
        """A callback may call generate() or forward(), on the model as it came; its time is no training time."""
        if not hasattr(self, "window"):
            yield
            return
        with self.window.paused(), self.policy.detached():
            yield

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Model and tokenizer as they are now, as `from_pretrained` reads them. Every rank calls it."""
        self.ready()
        folder = Path(output_dir) if output_dir is not None else self.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        with self.signals.whole():
            self.files.save(folder)

    def finish(self, summary: dict[str, float]) -> None:
        """The card of the trained model, its merged form, the report; then the hub."""
        if self.config.save_final:
            self.reporter.write_card(self.facts(), self.state)
            if self.config.save_merged and self.world.main:
                self.files.save_merged()
        self.reporter.finish(self.facts(), self.state, summary, self.data.reports, self.guards.warnings)
        if self.hub is not None:
            self.callbacks.call("on_push_begin")
            self.hub.push(self.output_dir)

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """Save model and card in output_dir, and upload them to `hub_model_id`; the commit's address."""
        self.save_model()
        if not self.world.main:
            return None
        self.hub = self.hub or Hub(self.config)
        self.reporter.write_card(self.facts(), self.callbacks.state)
        return self.hub.push(self.output_dir, commit_message)

    def log(self, metrics: dict[str, float], bar: tqdm | None = None) -> None:
        """Metrics become a line of the log, of metrics.jsonl, of the terminal and of the trackers."""
        epoch, step = round(self.state.epoch or 0.0, 4), self.state.global_step
        self.state.log_history.append({**metrics, "epoch": epoch, "step": step})
        self.reporter.add_line(self.state.log_history)
        self.reporter.show(metrics, self.state, bar)
        self.callbacks.log(metrics)
        self.warn(self.guards.check(step, metrics))

    def warn(self, warnings: Sequence[Any]) -> None:
        for warning in warnings if self.config.guardrails else []:
            log.warning("%s", warning)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """One line a metric, in fastpo's log."""
        for name in sorted(metrics):
            value = metrics[name]
            log.info("%s metrics: %s = %s", split, name, f"{value:.6g}" if isinstance(value, float) else value)

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """`{split}_results.json` and all_results.json in output_dir, on rank 0."""
        if self.world.main:
            write_metrics(self.output_dir, split, metrics, combined)

    def save_state(self) -> None:
        """trainer_state.json in output_dir, on rank 0."""
        if self.world.main:
            self.callbacks.export().save_to_json(str(self.output_dir / "trainer_state.json"))

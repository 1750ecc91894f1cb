"""What a script reads of a trainer, before a run and after it, under the names of transformers' Trainer."""

import abc
import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastpo.checkpoints import saving
from fastpo.data.prepare import Example
from fastpo.reference.cache import MovingReference
from fastpo.report import outputs
from fastpo.report.hub import Hub
from fastpo.training import evaluation

log = logging.getLogger("fastpo")


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
        if len(responses) > 2:
            return {**out, "responses_ids": responses, "pairs": [list(map(int, pair)) for pair in example.pairs]}
        chosen, rejected = example.pairs[0]
        return {**out, "chosen_ids": responses[chosen], "rejected_ids": responses[rejected]}


def rows_of_sets(sets: Mapping[str, Sequence[Example]]) -> Any:
    """What `trainer.eval_dataset` is: None, the rows of the one set, or a dict of them by the names that were given."""
    if not sets:
        return None
    rows = {name.removeprefix("eval_"): TokenizedRows(examples) for name, examples in sets.items()}
    return rows["eval"] if set(sets) == {"eval"} else rows


def moving_reference(model: nn.Module, moving: MovingReference | None) -> nn.Module:
    """The reference of `sync_ref_model` as a model to look at: the policy's modules around the reference's weights.

    What does not move is shared with the policy, not copied; before training the reference is a copy of the policy.
    """
    memo: dict[int, Any] = {}
    if moving is not None:
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


class Face(abc.ABC):
    """The methods and attributes; `fastpo.trainer.Trainer` has them."""

    examples: list[Example]
    eval_sets: dict[str, list[Example]]
    output_dir: Path
    tokenizer: Any
    callbacks: Any
    world: Any
    config: Any
    hub: Hub | None

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
        return TokenizedRows(self.examples)

    @property
    def eval_dataset(self) -> Any:
        """The same of the evaluation set; a dict of several, None of none."""
        return rows_of_sets(self.eval_sets)

    @abc.abstractmethod
    def ready(self) -> None:
        """Bring the model to where it is trained, once."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the evaluation data, or of rows given here as `train` takes them (a mapping of names for several).

        Before or after `train()`; logged, and given to on_evaluate. After it, given rows need a reference that is still
        there: an adapter's base, a ref_model, or a model given by name. `ignore_keys` is accepted and has no meaning.
        """
        run: Any = self
        return evaluation.evaluate_now(run, eval_dataset, metric_key_prefix)

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Model and tokenizer as they are now, as `from_pretrained` reads them. Every rank calls it."""
        self.ready()
        folder = Path(output_dir) if output_dir is not None else self.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        run: Any = self
        saving.save_model(run, folder)

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """Save model and card in output_dir, and upload them to `hub_model_id`; the commit's address."""
        self.save_model()
        if not self.world.main:
            return None
        self.hub = self.hub or Hub(self.config)
        run: Any = self
        outputs.write_card(run)
        return self.hub.push(self.output_dir, commit_message)

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

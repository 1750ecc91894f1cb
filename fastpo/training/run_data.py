"""The rows of a run: read, made into token ids, checked against what its losses need; whether they share prompts."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastpo.config.train_config import TrainConfig
from fastpo.data import layouts as row_layouts
from fastpo.data import mixing, rows, sources
from fastpo.data import prepare as data
from fastpo.data.packing import repeated_prompts, sequence_tokens, set_sharing, sharing_mode, trunk_tokens
from fastpo.errors import ConfigError, DataError
from fastpo.models import rotary
from fastpo.models.modes import check_ids
from fastpo.training.metrics import PAIR_METRICS, metric_means
from fastpo.training.row_statistics import needs_reference_tokens

if TYPE_CHECKING:
    from fastpo.trainer import Trainer

log = logging.getLogger("fastpo")


def check_precomputed(config: TrainConfig, *datasets: Any) -> None:
    """ConfigError where the options ask for the reference of a whole data set whose end nobody knows."""
    streamed = [d for d in datasets for d in (d.values() if isinstance(d, Mapping) else [d])
                if type(d).__module__.startswith("datasets.") and type(d).__name__.startswith("Iterable")]  # fmt: skip
    if config.precompute_ref_log_probs and streamed:
        raise ConfigError(
            "precompute_ref_log_probs=True is not supported with IterableDataset, whose end nobody knows: leave it "
            "out, and the reference of the rows that are read is computed ahead all the same"
        )


def prepare(run: "Trainer", dataset: Any, split: str, name: str) -> list[data.Example]:
    """Rows to token ids, on rank 0 for all: the others would only do the same work again."""
    examples, report = run.world.first(lambda: _examples(run, dataset, split, name))
    if report.streamed and run.config.train_sampling_strategy != "sequential":
        run.config.train_sampling_strategy = "sequential"
        log.info("the data are streamed: %d rows were read, and are trained in their order "
                 "(train_sampling_strategy=sequential)", report.rows)  # fmt: skip
    run.data_reports[name] = report
    log.info("%s data: %s", name, report.summary())
    if name == "train":
        shown = data.describe_example(examples[0], run.tokenizer, prompt_loss=run.reads_prompts)
        log.info("an example, as it is trained on:\n%s", shown)
    return examples


def _examples(run: "Trainer", dataset: Any, split: str, name: str) -> tuple[list[data.Example], data.DataReport]:
    """The examples of one data set, or of a mixture of several."""
    parts = mixing.parts_of(dataset)
    if parts is None:
        return _of_one(run, mixing.Part("", dataset), split, name)
    prepared = []
    for part in parts:
        try:
            prepared.append(_of_one(run, part, split, name))
        except DataError as error:
            raise DataError(f"{part.label}: {error}") from error
    seed = run.config.seed if run.config.data_seed is None else run.config.data_seed
    return mixing.mix(parts, prepared, seed, _columns(run))


def _of_one(run: "Trainer", part: mixing.Part, split: str, name: str) -> tuple[list[data.Example], data.DataReport]:
    config = run.config
    table = open_table(part, split, config.dataset_config)
    losses = "sft" if not run.pair_terms else "pairs"
    if any(t.loss.shape == "unpaired" for t in run.pair_terms):
        losses = "unpaired"
    kind = row_layouts.kind_of(sources.column_names(table), sources.head_rows(table), losses)
    limit = None
    if isinstance(table, sources.Stream) and name == "train":
        limit = _stream_limit(table, config, run.world.size, mixed=bool(part.label))
    examples, report = data.prepare_examples(
        table, run.tokenizer, kind=kind, max_length=config.max_length, truncation_mode=config.truncation_mode,
        columns=_columns(run), invalid=config.invalid_rows, num_proc=config.dataset_num_proc, forming=run.forming,
        recognise=config.recognise_layouts, limit=limit, assistant_only=config.assistant_only_loss,
        apart=losses == "unpaired" and kind == "preference",
    )  # fmt: skip
    placed = [t.name for t in run.pair_terms if needs_reference_tokens(t.loss)]
    if placed and report.masked_rows:
        raise DataError(
            f"{placed[0]} takes tokens by their number, and in {report.masked_rows} rows the responses have turns that "
            "are not trained on: set assistant_only_loss=false, or leave those rows out"
        )
    for term in run.pair_terms:
        data.require_columns(examples, term.loss.columns, term.name, report.columns)
    if losses == "unpaired" and kind == "preference" and "weight" in report.columns:
        log.warning("the column 'weight' is not used: %s takes each response of a pair as a row of its own",
                    run.pair_terms[0].name)  # fmt: skip
    return examples, report


def open_table(part: mixing.Part, split: str, config_name: str | None) -> Any:
    """The rows of a data set, with the columns that the mixture says."""
    table = sources.load_rows(part.dataset, split=part.split or split, config_name=part.config_name or config_name,
                              **part.options)  # fmt: skip
    return mixing.select_columns(table, part)


def _stream_limit(table: sources.Stream, config: "TrainConfig", processes: int, mixed: bool) -> int | None:
    """How many rows a run reads of what can be read once: those of max_steps, or all of what has an end."""
    if mixed:
        if table.endless:
            raise ConfigError("a streamed data set cannot be part of a mixture, whose shares need its size: pass a "
                              "Dataset, or list(dataset.take(n))")  # fmt: skip
        return None
    if config.max_steps > 0:
        return config.max_steps * config.step_size * processes
    if table.endless:
        raise ConfigError("a streamed train_dataset is read as far as the run needs, and only max_steps says how far: "
                          "set max_steps, or pass a Dataset, or list(dataset.take(n))")  # fmt: skip
    return None


def _columns(run: "Trainer") -> list[str]:
    """The optional columns that this run reads; others may hold anything."""
    columns = ["weight", *rows.TOKEN_COLUMNS]
    if run.uses_reference and run.ref_model is None and not run.config.sync_ref_model:
        columns += [*rows.RESPONSE_COLUMNS["ref_logps"], "ref_greedy_logps"]
    if run.kappa is not None and run.prev_model is None:
        columns += rows.RESPONSE_COLUMNS["prev_logps"]
    of_losses = [name for t in run.pair_terms for names in (*t.loss.columns, t.loss.may_read) for name in names]
    return [*columns, *dict.fromkeys(of_losses)]


def prepare_eval(run: "Trainer", eval_dataset: Any) -> dict[str, list[data.Example]]:
    """The evaluation sets by the prefix of their metrics; ConfigError where the options ask for one that is missing."""
    config = run.config
    if eval_dataset is None or (isinstance(eval_dataset, Mapping) and not eval_dataset):
        if config.eval_strategy != "no" or config.eval_on_start:
            raise ConfigError("eval_strategy is set, but there is no eval_dataset")
        return {}
    if config.eval_strategy == "no" and not config.eval_on_start:
        log.warning("eval_dataset is given, but eval_strategy=no: only a callback evaluates on it")
    split = config.dataset_test_split
    if isinstance(eval_dataset, Mapping):
        return {f"eval_{k}": prepare(run, v, split, f"eval {k}") for k, v in eval_dataset.items()}
    return {"eval": prepare(run, eval_dataset, split, "eval")}


def place(run: "Trainer", sets: Mapping[str, list[data.Example]]) -> None:
    """What a run must know of sets that it did not begin with: ids, shared prompts, mismatched rows."""
    for name, examples in sets.items():
        check_ids(run.policy, examples, name)
        set_sharing(examples, sharing_mode(run.config.share_prompts, run.device.type), run.trunk_cost)
        rotary.unshare(run.policy.trunk, examples)
    run.stepwide.prepare(dict(sets))


def reported(run: "Trainer", examples: Sequence[data.Example]) -> list[str]:
    """Pair metrics of an evaluation of `examples`: unpaired rows may be of one kind, and have no pairs."""
    if not run.pair_terms:
        return []
    labels = {label for e in examples for label in e.response_columns.get(rows.LABEL, ())}
    counts = dict.fromkeys(PAIR_METRICS, 1.0)
    counts |= {"chosen": float(labels != {0.0}), "rejected": float(labels != {1.0}), "pairs": float(not labels)}
    return list(metric_means(list(counts.values()), run.pair_terms))


def say_sharing(run: "Trainer") -> None:
    """One line on what shared prompts save, and a warning for rows that no micro-batch fits."""
    for name, examples in {"train": run.examples, **run.eval_sets}.items():
        over = [tokens for e in examples if (tokens := trunk_tokens(e)) > run.max_tokens]
        if over:
            log.warning("%d of %d %s rows have more tokens than max_tokens=%d, the largest %d: each is a "
                        "micro-batch of its own, and takes the memory of one", len(over), len(examples), name,
                        run.max_tokens, max(over))  # fmt: skip
    repeated = repeated_prompts(run.examples)
    if any(e.share for e in run.examples):
        alone = sum(sequence_tokens(e) - len(e.responses) for e in run.examples)
        shared = sum(map(trunk_tokens, run.examples))
        log.info("prompts are shared by their responses: %d tokens an epoch instead of %d", shared, alone)
    if repeated:
        log.info("%d of %d rows have the prompt of another: they share it where a step has both", repeated,
                 len(run.examples))  # fmt: skip
    elif run.config.share_prompts == "always" and not any(e.share for e in run.examples):
        log.warning("share_prompts=always has no effect: no two responses have the same prompt")

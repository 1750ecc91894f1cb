"""The rows of a run: read, made into token ids, checked against what its losses need."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastpo.config.train_config import TrainConfig
from fastpo.data import layouts, mixing, row_loss, rows, sources
from fastpo.data.packing import repeated_prompts, sequence_tokens, trunk_tokens
from fastpo.data.prepare import DataReport, Example, describe_example, prepare_examples, require_columns
from fastpo.errors import ConfigError, DataError
from fastpo.losses.table import DEGREE, SFT, Term
from fastpo.training.degree_metrics import DEGREE_SUMS, degree_means
from fastpo.training.distributed import World
from fastpo.training.metrics import PAIR_METRICS, metric_means
from fastpo.training.objective import Objective
from fastpo.training.reward_metrics import range_means

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


class DataSets:
    """The rows of a run: `train`, `evals` by the prefix of their metrics, and `reports` of how each set was read.

    given: the fixed policies that come as models (`ref_model`, `prev_model`): the columns that would stand for them are
    not read.
    """

    def __init__(
        self, config: TrainConfig, world: World, tokenizer: Any, objective: Objective, given: Collection[str] = ()
    ):
        self.config, self.world, self.tokenizer, self.objective = config, world, tokenizer, objective
        self.forming = objective.forming(config)
        self.columns = _columns(config, objective.pair_terms, given)
        self.losses = {name: _columns(config, [t for t in objective.pair_terms if t.of == name], given)
                       for name in dict.fromkeys(t.of for t in objective.terms)}  # fmt: skip
        self.train: list[Example] = []
        self.evals: dict[str, list[Example]] = {}
        self.reports: dict[str, DataReport] = {}

    @property
    def all(self) -> dict[str, list[Example]]:
        """Every set by its name, `train` first."""
        return {"train": self.train, **self.evals}

    # ------------------------------------------------------------- reading

    def read(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Rows to token ids; ConfigError where the options ask for an evaluation set that is missing."""
        config = self.config
        self.train = self.prepare(train_dataset, config.dataset_train_split, "train")
        named = {e.loss for e in self.train}
        if self.objective.degrees and (DEGREE not in named or named <= {DEGREE, SFT}):
            raise DataError(
                f"no row names {'a loss of pairs' if DEGREE in named else DEGREE} in the column 'loss': {DEGREE} "
                "trains rows of prompt, completion and degree that name it, beside pairs that name theirs"
            )
        if eval_dataset is None or (isinstance(eval_dataset, Mapping) and not eval_dataset):
            if config.eval_strategy != "no" or config.eval_on_start:
                raise ConfigError("eval_strategy is set, but there is no eval_dataset")
            return
        if config.eval_strategy == "no" and not config.eval_on_start:
            log.warning("eval_dataset is given, but eval_strategy=no: only a callback evaluates on it")
        split = config.dataset_test_split
        if isinstance(eval_dataset, Mapping):
            self.evals = {f"eval_{k}": self.prepare(v, split, f"eval {k}") for k, v in eval_dataset.items()}
        else:
            self.evals = {"eval": self.prepare(eval_dataset, split, "eval")}

    def prepare(self, dataset: Any, split: str, name: str) -> list[Example]:
        """Rows to token ids, on rank 0 for all: the others would only do the same work again."""
        examples, report = self.world.first(lambda: self._examples(dataset, split, name))
        if report.streamed and self.config.train_sampling_strategy != "sequential":
            self.config.train_sampling_strategy = "sequential"
            log.info("the data are streamed: %d rows were read, and are trained in their order "
                     "(train_sampling_strategy=sequential)", report.rows)  # fmt: skip
        self.reports[name] = report
        log.info("%s data: %s", name, report.summary())
        if name == "train":
            self.show(examples[0])
        return examples

    def show(self, example: Example) -> None:
        """An example of the training data, in the log."""
        shown = describe_example(example, self.tokenizer, prompt_loss=bool(self.objective.reads_prompts))
        log.info("an example, as it is trained on:\n%s", shown)

    def identified(self) -> list[Example]:
        """The training rows by which a run that goes on is known as the same."""
        return self.train

    def sized(self) -> list[Example]:
        """Rows as large as those that the step's micro-batches are made of."""
        return self.train

    def probe(self, places: Sequence[int]) -> list[Example]:
        """Of these training rows what the guard looks at."""
        return [self.train[i] for i in places]

    def _examples(self, dataset: Any, split: str, name: str) -> tuple[list[Example], DataReport]:
        """The examples of one data set, or of a mixture of several; what is wrong with an evaluation set names it."""
        if name == "train":
            return self._of_all(dataset, split, name)
        try:
            return self._of_all(dataset, split, name)
        except DataError as error:
            raise DataError(f"{name} data: {error}") from error

    def _of_all(self, dataset: Any, split: str, name: str) -> tuple[list[Example], DataReport]:
        parts = mixing.parts_of(dataset)
        if parts is None:
            return self._of_one(mixing.Part("", dataset), split, name)
        prepared = []
        for part in parts:
            try:
                prepared.append(self._of_one(part, split, name))
            except DataError as error:
                raise DataError(f"{part.label}: {error}") from error
        seed = self.config.seed if self.config.data_seed is None else self.config.data_seed
        return mixing.mix(parts, prepared, seed, self.columns, self.losses)

    def _of_one(self, part: mixing.Part, split: str, name: str) -> tuple[list[Example], DataReport]:
        config, pair_terms = self.config, self.objective.pair_terms
        table = open_table(part, split, config.dataset_config)
        losses = "unpaired" if self.objective.unpaired else "pairs" if pair_terms else "sft"
        names, head = sources.column_names(table), sources.head_rows(table)
        kind = layouts.kind_of(names, head, losses)
        if row_loss.are_named(head) and len(self.losses) > 1:
            self.objective.check_row_losses()
            # Among other data sets there may be one of sft alone, in whatever layout.
            if SFT in self.losses and not {"chosen", "rejected", rows.RESPONSES} & set(names):
                kind = layouts.kind_of(names, head, "sft")
        limit = None
        if isinstance(table, sources.Stream) and name == "train":
            limit = _stream_limit(table, config, self.world.size, mixed=bool(part.label))
        examples, report = prepare_examples(
            table, self.tokenizer, kind=kind, max_length=config.max_length,
            truncation_mode="drop" if self.objective.scores else config.truncation_mode,
            columns=self.columns, invalid=config.invalid_rows, num_proc=config.dataset_num_proc, forming=self.forming,
            recognise=config.recognise_layouts, limit=limit, assistant_only=config.assistant_only_loss,
            apart=losses == "unpaired" and kind == "preference", losses=self.losses,
            degrees=self.objective.degrees,
        )  # fmt: skip
        if self.objective.of_tokens and report.masked_rows:
            raise DataError(
                f"{self.objective.of_tokens} takes tokens by their number, and in {report.masked_rows} rows the "
                "responses have turns that are not trained on: set assistant_only_loss=false, or leave those rows out"
            )
        for term in pair_terms:
            own = [e for e in examples if e.loss in (None, term.of)]
            require_columns(own, term.loss.columns, term.name, report.columns)
        if losses == "unpaired" and kind == "preference" and "weight" in report.columns:
            log.warning("the column 'weight' is not used: %s takes each response of a pair as a row of its own",
                        pair_terms[0].name)  # fmt: skip
        return examples, report

    # ------------------------------------------------------ what is in them

    def reported(self) -> dict[str, list[str]]:
        """Metrics that an evaluation of each set will report: unpaired rows may be of one kind, and have no pairs."""
        return {name: ["loss", *self._pair_metrics(examples), *self._degree_metrics(examples)]
                for name, examples in self.evals.items()}  # fmt: skip

    def _degree_metrics(self, examples: Sequence[Example]) -> list[str]:
        return list(degree_means([1.0] * DEGREE_SUMS)) if any(e.loss == DEGREE for e in examples) else []

    def _pair_metrics(self, examples: Sequence[Example]) -> list[str]:
        if not self.objective.pair_terms:
            return []
        labels = {label for e in examples for label in e.response_columns.get(rows.LABEL, ())}
        counts = dict.fromkeys(PAIR_METRICS, 1.0)
        counts |= {"chosen": float(labels != {0.0}), "rejected": float(labels != {1.0}), "pairs": float(not labels)}
        of_range = range_means((0.0, 0.0), 1) if self.objective.scores else {}
        return [*metric_means(list(counts.values()), self.objective.pair_terms), *of_range]

    def name_of(self, examples: Sequence[Example], row: int) -> str:
        """`row 12 of the train data`, as people count: rows that were dropped count too."""
        name = next((name for name, of_set in self.all.items() if of_set is examples), "")
        kept = self.reports[name.replace("eval_", "eval ", 1)].kept_rows if name else []
        number = kept[row] if len(kept) == len(examples) else row
        return f"row {number}{f' of the {name} data' if name else ''}"

    def say_sharing(self, max_tokens: int) -> None:
        """One line on what shared prompts save, and a warning for rows that no micro-batch fits."""
        for name, examples in self.all.items():
            over = [tokens for e in examples if (tokens := trunk_tokens(e)) > max_tokens]
            if over:
                log.warning("%d of %d %s rows have more tokens than max_tokens=%d, the largest %d: each is a "
                            "micro-batch of its own, and takes the memory of one", len(over), len(examples), name,
                            max_tokens, max(over))  # fmt: skip
        repeated = repeated_prompts(self.train)
        if any(e.share for e in self.train):
            alone = sum(sequence_tokens(e) - (not e.whole) * len(e.responses) for e in self.train)
            shared = sum(map(trunk_tokens, self.train))
            log.info("prompts are shared by their responses: %d tokens an epoch instead of %d", shared, alone)
        if repeated:
            log.info("%d of %d rows have the prompt of another: they share it where a step has both", repeated,
                     len(self.train))  # fmt: skip
        elif self.config.share_prompts == "always" and not any(e.share for e in self.train):
            log.warning("share_prompts=always has no effect: no two responses have the same prompt")


def _columns(config: TrainConfig, terms: Sequence[Term], given: Collection[str]) -> list[str]:
    """The optional columns that losses of pairs read; others may hold anything."""
    columns = (
        ["weight"]
        if any(t.loss is not None and t.loss.shape == "scores" for t in terms)
        else ["weight", *rows.TOKEN_COLUMNS]
    )
    if any(t.loss.reference for t in terms) and "ref_model" not in given and not config.sync_ref_model:
        columns += [*rows.RESPONSE_COLUMNS["ref_logps"], "ref_greedy_logps"]
    if any(t.loss.previous for t in terms) and "prev_model" not in given:
        columns += rows.RESPONSE_COLUMNS["prev_logps"]
    of_losses = [name for t in terms for names in (*t.loss.columns, t.loss.may_read) for name in names]
    return [*columns, *dict.fromkeys(of_losses)]


def open_table(part: mixing.Part, split: str, config_name: str | None) -> Any:
    """The rows of a data set, with the columns that the mixture says."""
    table = sources.load_rows(part.dataset, split=part.split or split, config_name=part.config_name or config_name,
                              **part.options)  # fmt: skip
    return mixing.select_columns(table, part)


def _stream_limit(table: sources.Stream, config: TrainConfig, processes: int, mixed: bool) -> int | None:
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

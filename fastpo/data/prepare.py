"""Rows to token ids: TRL's dataset rules, and what of them is refused, dropped or shortened.

Preference rows have `chosen` and `rejected`, with `prompt` or with the prompt inside both; sft rows have `prompt` and
`completion`, unpaired rows a `label` too. Conversations go through the tokenizer's chat template, with the row's
`tools` and `chat_template_kwargs`.

The prompt (with the generation prompt) and prompt + response are tokenised whole; the response begins where the
first token differs. Texts get an EOS; conversations end as their template ends them. Three things differ from TRL, and
each is counted and said once: a BOS (or EOS) that the tokenizer adds to a text that already has it is removed; a text
that already ends with a special token, such as an end of turn, gets no EOS behind it; and pairs whose responses are the
same after truncation are dropped. So a pre-rendered chat text gives the ids of the conversation it was rendered from.

Truncation is `(prompt + response)[:max_length]` for each sequence, or `[-max_length:]` with `keep_end`. With the latter
the responses of one pair may keep prompts of different length: `Example.response_prompts`.
"""

import itertools
import logging
import multiprocessing
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastpo.data import content, exact, kway, row_loss
from fastpo.data.encoding import Encoded, Encoder
from fastpo.data.example import Example, even_weights
from fastpo.data.kway import BEST_WORST, Forming
from fastpo.data.layouts import Reading, read_as
from fastpo.data.long_rows import TOO_LONG, without_long
from fastpo.data.mismatched import mismatched
from fastpo.data.report import DataReport, warn
from fastpo.data.row_loss import ByLoss, Losses
from fastpo.data.rows import (
    BOUNDS,
    COMPLETIONS,
    DEGREE_OF,
    GREEDY,
    LABEL,
    LOSS,
    PROMPT_IDS,
    RESPONSE_COLUMNS,
    SFT_WEIGHTS,
    TOKEN_COLUMNS,
    InvalidRow,
    Row,
    Schema,
    common_length,
    extract_prompt,
    read_schema,
)
from fastpo.data.sources import Stream, chunks, column_names, first_rows, head_rows, load_rows
from fastpo.data.win_probs import check_win_probs
from fastpo.errors import DataError, FastpoError, nearest, one_line, quoted
from fastpo.losses.table import SFT

__all__ = [
    "DataError",
    "DataReport",
    "Example",
    "describe_example",
    "extract_prompt",
    "load_rows",
    "mismatched",
    "prepare_examples",
    "require_columns",
    "unpair",
]

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 1000  # rows that are tokenised in one call: enough to keep all threads of a fast tokenizer busy


class _Equal(Exception):
    """Responses of a row of K are the same token ids."""


@dataclass(frozen=True)
class _Preparer:
    """Everything that turns a chunk of rows into examples; can be sent to another process."""

    encoder: Encoder
    schema: Schema
    max_length: int | None
    keep_end: bool
    drop_invalid: bool
    reading: Reading = Reading()
    losses: Losses | None = None  # that rows may name
    named: ByLoss | None = None  # where they do
    drop_long: bool = False

    def parse(self, raw: Mapping, number: int) -> Row:
        """The row, which passed the checks; InvalidRow, or DataError."""
        if self.named is not None:
            return self.named(raw, number)
        if self.losses and isinstance(raw.get(LOSS), str):
            raise DataError(f"row {number} names a '{LOSS}', which the rows before do not")
        return row_loss.parse(raw, number, self.schema)

    def __call__(self, start: int, raw_rows: Sequence[Mapping]) -> tuple[list[Example], DataReport]:
        report = DataReport(rows=len(raw_rows))
        rows = []
        for number, raw in enumerate(raw_rows, start=start):
            try:
                row = self.parse(self.reading(raw, number), number)
                rows.append(self._without_prompt(row, report))
            except InvalidRow as error:
                self._refuse(error, report, 1 + self.schema.apart)
            except FastpoError:
                raise
            except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:  # arrays and other objects
                message = f"row {number} cannot be read: {one_line(error)}"
                self._refuse(InvalidRow("cannot be read", message), report, 1 + self.schema.apart)
        if self.schema.apart:
            report.rows *= 2
            rows = _apart(rows)
        examples = []
        for encoded in self._encode(rows, report):
            try:
                try:
                    example = self._build(encoded, report)
                except _Equal:
                    example = self._merged(encoded.row, report)
            except InvalidRow as error:
                self._refuse(error, report)
                continue
            if example is not None:
                examples.append(example)
        report.kept = len(examples)
        return examples, report

    def _without_prompt(self, row: Row, report: DataReport) -> Row:
        """Counts a prompt that the responses repeat; of conversations, whose turns are checked, it is taken out."""
        texts = exact.texts_of(row)
        if texts is None:
            return row
        if self.schema.conversational:
            content.check(texts)
            shorter = content.without_prompt(texts) if self.schema.explicit_prompt else texts
            content.check_responses(shorter)
            report.repeated_turns += shorter is not texts
            return exact.with_texts(row, shorter)
        size = 0 if self.schema.token_ids or not texts.completions else len(row.prompt)
        if self.schema.explicit_prompt and size and all(text[:size] == row.prompt for text in texts.completions):
            report.repeated_prompts += 1
        return row

    def _refuse(self, error: InvalidRow, report: DataReport, rows: int = 1) -> None:
        if not self.drop_invalid and not error.always_dropped:
            raise DataError(f"{error} (invalid_rows='drop' leaves such rows out and counts them)") from error
        report.dropped[error.reason] = report.dropped.get(error.reason, 0) + rows

    def _encode(self, rows: list[Row], report: DataReport) -> Iterable[Encoded]:
        if not rows:
            return []
        if self.schema.token_ids:
            return [Encoded(row, [list(row.prompt), *([*row.prompt, *ids] for ids in row.completions)],
                            [None] * len(row.completions)) for row in rows]  # fmt: skip
        texts = [exact.texts_of(row) for row in rows]
        try:
            given = [of_row for of_row in texts if of_row is not None]
            encoded = iter(self.encoder(given, report) if given else ())
        except InvalidRow as error:
            if not self.drop_invalid or len(rows) == 1:
                self._refuse(error, report)
                return []
            # A template refused some row: go through them one by one. The encoder counts only rows that it returns.
            return list(itertools.chain.from_iterable(self._encode([row], report) for row in rows))
        out = []
        for row, of_row in zip(rows, texts, strict=True):
            found = Encoded(row, []) if of_row is None else next(encoded)
            out.append(found if row.prompt_ids is None else replace(found, row=row))
        return out

    def _merged(self, row: Row, report: DataReport) -> Example | None:
        """The example of a row of K of which some responses are the same once they are token ids: these are one."""
        scratch = DataReport()  # what is counted of the row's texts was counted
        kept: list[list[int]] = []
        for encoded in self._encode([self._without_prompt(kway.whole(row), scratch)], scratch):
            if encoded.row.prompt_ids is not None:
                encoded = exact.joined(encoded, self.encoder, scratch)
            prompt, *wholes = encoded.ids
            boundary = min(common_length(prompt, whole) for whole in wholes)
            kept = self._truncate(prompt[:boundary], [whole[boundary:] for whole in wholes])[1]
        keys = [(k if not ids else -1, *ids) for k, ids in enumerate(kept)]  # of which nothing is left: each its own
        if keys:
            again = kway.merged(row, keys, self.schema)
            again = self._without_prompt(row_loss.winners(again) if row.loss == SFT else again, scratch)
            for encoded in self._encode([again], scratch):
                try:
                    return self._build(encoded, report)
                except _Equal:
                    message = f"row {row.number}: two responses have the same token ids"
                    raise InvalidRow("identical responses", message) from None
        for reason, count in scratch.dropped.items():
            report.dropped[reason] = report.dropped.get(reason, 0) + count
        return None

    def _build(self, encoded: Encoded, report: DataReport) -> Example | None:
        row = encoded.row
        if row.prompt_ids is not None:
            encoded = exact.joined(encoded, self.encoder, report)
        if self.drop_long and self.max_length is not None:
            fitting = without_long(encoded, self.max_length)
            if fitting is None:
                report.dropped[TOO_LONG] = report.dropped.get(TOO_LONG, 0) + 1
                return None
            encoded, row = fitting, fitting.row
        prompt, *wholes = encoded.ids
        boundary = min(common_length(prompt, whole) for whole in wholes)
        if self.schema.language:
            boundary = (
                1  # nothing predicts the first token: it is the context of the second, as in TRL's shifted labels
            )
            prompt = wholes[0][:1]
        elif self.schema.token_ids or row.prompt_ids is not None:
            size = len(self.encoder.tokenizer)
            token = max(map(max, wholes))
            if token >= size:
                message = f"row {row.number}: token id {token} is none of the tokenizer's {size} tokens"
                raise InvalidRow("bad token ids", message)
        responses = [whole[boundary:] for whole in wholes]
        if not boundary:
            why = "merges whole into the first token of the response" if prompt else "is empty"
            message = f"row {row.number}: the prompt {why}, so no token is left to predict the response from"
            raise InvalidRow("empty prompt", message)
        if not all(responses):
            raise InvalidRow("empty completion", f"row {row.number}: a response has no tokens of its own")
        pair, compared = self.schema.kind == "preference", row.compared
        several = self.schema.kway is not None
        if pair and _twins(responses[:compared]):
            if several:
                raise _Equal
            message = f"row {row.number}: 'chosen' and 'rejected' have the same token ids"
            raise InvalidRow("identical pair", message)
        for name, given, response in zip(TOKEN_COLUMNS, row.token_weights, responses, strict=False):
            if len(given) != len(response):
                message = (
                    f"row {row.number}: '{name}' has {len(given)} numbers and the response {len(response)} tokens, end "
                    "of sequence included"
                )
                raise InvalidRow(f"'{name}' does not fit", message)
        prompts, kept = self._truncate(prompt[:boundary], responses)
        dropped = None
        if not all(kept):
            dropped = "prompt fills max_length"
        elif pair and _twins(kept[:compared]):
            if several:
                raise _Equal
            dropped = "identical pair after truncation"
        if boundary < len(prompt):
            report.boundary_moved += 1
            report.moved_text = report.moved_text or self.encoder.tokenizer.decode(prompt[boundary:])
        weights = [np.array(w[-len(ids) :] if self.keep_end else w[: len(ids)], np.float32) if w
                   else np.ones(len(ids), np.float32)
                   for w, ids in zip(row.token_weights, kept, strict=False)]  # fmt: skip
        weights = self._masked(weights, encoded.trained, boundary, kept)
        if not dropped and not all(w.any() for w in weights):
            dropped = "no token of weight is left after truncation"
        if dropped:
            report.dropped[dropped] = report.dropped.get(dropped, 0) + 1
            return None
        greedy = row.greedy
        if compared < len(kept):  # a greedy response in no pair: its ids may be a response's where its text is none's
            twin = [k for k in range(compared) if (prompts[k], kept[k]) == (prompts[-1], kept[-1])]
            if twin:
                greedy = twin[0]
                prompts, responses, kept = prompts[:compared], responses[:compared], kept[:compared]
                weights = weights[:compared]
        self._count(row, boundary, prompts, responses, kept, report)
        if any(encoded.trained):
            report.masked_tokens += sum(int((w == 0).sum()) for w in weights)
        leads = tuple(common_length(prompt, whole) - boundary for whole in wholes)
        arrays = [np.array(ids, dtype=np.int32) for ids in prompts]
        shortest = min(arrays, key=len)
        return Example(
            prompt_ids=shortest,
            responses=[np.array(ids, dtype=np.int32) for ids in kept],
            pairs=list(row.pairs),
            pair_columns=dict(row.pair_columns),
            response_columns={name: values[: len(kept)] for name, values in row.response_columns.items()},
            response_prompts=None if all(ids == prompts[0] for ids in prompts) else arrays,
            token_weights=weights or None,
            greedy=greedy,
            loss=row.loss,
            leads=leads if any(leads) and not self.keep_end else None,
        )

    def _masked(
        self, weights: list[np.ndarray], trained: Sequence[list[bool] | None], boundary: int, kept: Sequence[list[int]]
    ) -> list[np.ndarray]:
        """Weights of the tokens kept, 0 where they are of turns that are not trained; none where all of them are 1."""
        if not any(trained):
            return weights
        weights = weights or [np.ones(len(ids), np.float32) for ids in kept]
        for k, mask in enumerate(trained):
            if mask is not None:
                own = mask[boundary:]
                own = own[len(own) - len(kept[k]) :] if self.keep_end else own[: len(kept[k])]
                weights[k] = weights[k] * np.array(own, np.float32)
        return weights

    def _truncate(self, prompt: list[int], responses: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Each response's prompt and itself within max_length; an empty response where nothing of it can be trained."""
        if self.max_length is None:
            return [prompt] * len(responses), responses
        if not self.keep_end:
            room = max(self.max_length - len(prompt), 0)
            return [prompt] * len(responses), [ids[:room] for ids in responses]
        prompts, kept = [], []
        for ids in responses:
            ids = ids[-self.max_length :]
            room = self.max_length - len(ids)
            if room == 0:
                # Nothing predicts the first token that is kept: it serves as context, as it does in TRL's shifted mask.
                prompts.append(ids[:1])
                kept.append(ids[1:])
            else:
                prompts.append(prompt[-room:])
                kept.append(ids)
        return prompts, kept

    def _count(
        self, row: Row, prompt_len: int, prompts: list, responses: list, kept: list, report: DataReport
    ) -> None:  # fmt: skip
        report.offered += row.offered
        report.merged += row.merged
        report.unfinished += row.unfinished
        report.pairs += len(row.pairs)
        report.kept_rows.append(row.number)
        if row.loss is not None:
            report.by_loss[row.loss] = report.by_loss.get(row.loss, 0) + 1
        report.responses += len(kept)
        for own_prompt, before, after in zip(prompts, responses, kept, strict=True):
            report.response_tokens += len(after)
            report.longest_sequence = max(report.longest_sequence, len(own_prompt) + len(after))
            if len(after) < len(before):
                report.truncated += 1
                if not self.keep_end:
                    lost = before[len(after) :]
                    report.truncated_eos += any(token in self.encoder.ending_ids for token in lost)
        shortest = min(map(len, prompts))
        report.prompt_tokens += shortest
        report.truncated_prompts += shortest < prompt_len


def _apart(rows: Sequence[Row]) -> list[Row]:
    """Two unpaired rows of each pair, the preferred one desirable: all of these, then all others."""
    out = []
    for k, label in ((0, 1.0), (1, 0.0)):
        for row in rows:
            columns = {name: [values[k]] for name, values in row.response_columns.items()}
            columns[LABEL] = [label]
            out.append(row._replace(completions=(row.completions[k],), pairs=(), pair_columns={},
                                    response_columns=columns, token_weights=row.token_weights[k : k + 1]))  # fmt: skip
    return out


def _twins(responses: Sequence[list[int]]) -> bool:
    return len({tuple(ids) for ids in responses}) < len(responses)


def prepare_examples(
    dataset: Any,
    tokenizer: Any,
    *,
    kind: str = "preference",
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    columns: Collection[str] | None = None,
    invalid: str = "raise",
    num_proc: int | None = None,
    forming: Forming = BEST_WORST,
    assistant_only: bool = True,
    apart: bool = False,
    recognise: bool = True,
    limit: int | None = None,
    losses: Losses | None = None,
    degrees: int = 0,
) -> tuple[list[Example], DataReport]:
    """Examples in the order of the rows, and what became of every row.

    `kind` is "preference", "sft" or "unpaired"; pairs of the last kind, and with `apart` those of the first, are two
    rows each, tokenised apart, of every thousand pairs all chosen ones first, as in TRL. `assistant_only`: turns of
    others behind the prompt have a token weight of 0. `columns` names the optional columns to read (default: all that
    are there); the others may hold anything. `forming` says which pairs rows of K `responses` give. `invalid="drop"`
    counts rows with NaN, None or out-of-range values, empty texts or identical pairs where "raise" refuses the first of
    them; rows lost to `max_length` and rows of K that form no pair are always dropped and counted (truncation_mode
    "drop": preferences with a response that is longer). `recognise` converts rows of other layouts
    (fastpo/data/layouts.py). `limit` ends the reading when there are as many examples. `losses`: the entries of
    loss_type that rows may name in the column `loss`, with the optional columns that each reads. `degrees`: of a row of
    degree_aux, so many.
    """
    for name, value, allowed in (
        ("kind", kind, tuple(COMPLETIONS)),
        ("truncation_mode", truncation_mode, ("keep_start", "keep_end", "drop")),
        ("invalid", invalid, ("raise", "drop")),
    ):
        if value not in allowed:
            raise DataError(f"{name}={value!r}: expected one of {quoted(allowed)}")
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length={max_length}: a prompt token and a response token need at least 2")
    rows = load_rows(dataset)
    if not rows.head(1) if isinstance(rows, Stream) else len(rows) == 0:
        raise DataError("the dataset has no rows")
    given = column_names(rows)
    if kind == "unpaired" and "chosen" in given and not {"completion", LABEL} <= set(given):
        kind, apart = "preference", True
    reading = read_as(given, head_rows(rows), kind, columns, recognise)
    read = {"prompt", "chosen", "rejected", "completion", "tools", "chat_template_kwargs", *BOUNDS, *TOKEN_COLUMNS,
            LABEL, GREEDY, SFT_WEIGHTS, kway.RESPONSES, kway.PAIRS, PROMPT_IDS, LOSS, DEGREE_OF,
            *reading.reads()}  # fmt: skip
    names, first = reading.names(given), reading.first(first_rows(rows, read, _CHUNK_ROWS))
    by_loss = bool(losses) and row_loss.are_named(first)
    if kind == "preference" and kway.is_kway(names, first):
        schema = kway.read_schema(names, first, columns, forming)
    elif kind == "preference" and by_loss:
        schema = read_schema([*names, *(c for c in ("chosen", "rejected") if c not in names)], row_loss.as_pairs(first),
                             kind, columns)  # fmt: skip
    else:
        schema = read_schema(names, first, kind, columns)
    schema = replace(schema, language=reading.layout is not None and reading.layout.language,
                     apart=apart)  # fmt: skip
    try:
        encoder = Encoder(tokenizer, schema.conversational, assistant_only)
    except DataError as error:
        if not (schema.token_ids or schema.prompt_ids):
            raise DataError(f"{error} (the rows are {reading.says()})") if reading.says() else error from None
        encoder = Encoder(tokenizer, False, refuses=str(error))  # rows of ids need none of what is lacking
    prepare = _Preparer(encoder, schema, max_length, truncation_mode == "keep_end", invalid == "drop", reading, losses,
                        ByLoss(schema, losses, degrees) if by_loss and losses else None,
                        drop_long=truncation_mode == "drop")  # fmt: skip

    report = DataReport(max_length=max_length, columns=names, reading=reading.says(), streamed=limit is not None)
    if report.reading:
        count = "" if isinstance(rows, Stream) else f"{len(rows)} "
        logger.info("the %srows are %s (recognise_layouts=false: rows as they are)", count, report.reading)
    examples: list[Example] = []
    for part, part_report in _run(prepare, chunks(rows, read, _CHUNK_ROWS), None if limit else num_proc):
        examples += part
        report.add(part_report)
        if limit is not None and len(examples) >= limit:
            break
    if limit is not None and len(examples) > limit:
        del examples[limit:], report.kept_rows[limit:]
        report.kept = limit
    even_weights(examples)
    row_loss.fill_columns(examples, losses or {})
    if losses and LOSS in names and not by_loss:
        report.warnings.append(f"the column '{LOSS}' is not used: it names none of loss_type")
    if schema.kway is None and forming.policy != "best_worst":
        report.warnings.append(f"pair_policy={forming.policy} has no effect: the rows have no '{kway.RESPONSES}'")
    warn(report, schema, names)
    if not examples:
        raise DataError(f"no row is left to train on: {report.summary()}")
    check_win_probs(examples, report.kept_rows)
    return examples, report


PROCESSES_A_CORE = 4  # more cost their start and bring nothing: the pool forks them all at once


def _run(prepare: _Preparer, parts: Iterable, num_proc: int | None) -> Iterator[tuple[list[Example], DataReport]]:
    num_proc = min(num_proc or 1, PROCESSES_A_CORE * (os.cpu_count() or 1))
    if num_proc <= 1:
        yield from itertools.starmap(prepare, parts)
        return
    # Forked, so that the tokenizer (seconds to pickle where the vocabulary is large) is inherited.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, mp_context=fork, initializer=_set_worker, initargs=(prepare,)) as pool:
        yield from pool.map(_work, *zip(*parts, strict=True))


_worker: _Preparer | None = None


def _set_worker(prepare: _Preparer) -> None:
    global _worker
    _worker = prepare


def _work(start: int, raw_rows: Sequence[Mapping]) -> tuple[list[Example], DataReport]:
    assert _worker is not None
    return _worker(start, raw_rows)


def require_columns(
    examples: Sequence[Example], names: Iterable[str | tuple[str, ...]], loss_name: str, columns: Iterable[str] = ()
) -> None:
    """DataError unless every example has each of the columns (of a tuple: any one of them).

    Names are those of the dataset ("chosen_score") or of the example ("score"); `columns` are the dataset's own, for a
    hint at a misspelt one.
    """
    fields_of = {column: name for name, pair in RESPONSE_COLUMNS.items() for column in pair}
    for alternatives in names:
        wanted = (alternatives,) if isinstance(alternatives, str) else alternatives
        keys = dict.fromkeys(fields_of.get(name, name) for name in wanted)
        if all(any(_has(e, key) for key in keys) for e in examples):
            continue
        in_data = " or ".join(" with ".join(map(repr, RESPONSE_COLUMNS.get(key, (key,)))) for key in keys)
        message = f"loss_type={loss_name!r} needs the column {in_data}, which the dataset has not"
        if kway.RESPONSES in columns and wanted[0] != GREEDY:
            return kway.refuse_loss(loss_name, next(iter(keys)), single=len(keys) == 1)
        close = nearest(wanted[0], columns, 0.7)
        raise DataError(f"{message}: did you mean '{close}'?" if close else message)


def _has(example: Example, key: str) -> bool:
    if key == GREEDY:
        return example.greedy is not None
    return key in example.pair_columns or key in example.response_columns


def describe_example(example: Example, tokenizer: Any, max_chars: int = 600, prompt_loss: bool = False) -> str:
    """The decoded prompt and responses, each marked as context or as trained on; with `prompt_loss` the prompts of
    preferred responses are both."""
    if example.pairs == [(0, 1)] and len(example.responses) == 2 + (example.greedy == 2):
        labels = ["chosen", "rejected", "greedy"][: len(example.responses)]
    elif len(example.responses) == 1:
        labels = ["completion"]
    else:
        labels = [f"response {k}" for k in range(len(example.responses))]

    def line(label: str, ids: np.ndarray, mask: str) -> str:
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        if len(text) > max_chars:
            text = f"{text[: max_chars * 2 // 3]} [...] {text[-max_chars // 3 :]}"
        return f"{label:<10} {len(ids):>6} tokens, {mask}: {text!r}"

    lines = []
    preferred = {winner for winner, _ in example.pairs} if prompt_loss else set()
    for k, (label, response) in enumerate(zip(labels, example.responses, strict=True)):
        own = example.response_prompts is not None
        if own or k == 0:
            in_loss = k in preferred if own else bool(preferred)
            mask = "context, and in the NLL" if in_loss else "context, no loss"
            lines.append(line("prompt", example.prompt_of(k), mask))
        ends = "" if response[-1] == tokenizer.eos_token_id else " (no EOS at the end)"
        lines.append(line(label, response, f"trained on{ends}"))
    values = {**example.pair_columns, **example.response_columns} | ({"loss": example.loss} if example.loss else {})
    if values:
        lines.append("columns    " + ", ".join(f"{name} {value}" for name, value in values.items()))
    return "\n".join(lines)


def unpair(examples: Sequence[Example]) -> list[Example]:
    """Each response of the pairs as an unpaired row: desirable if it was chosen.

    As TRL's KTOTrainer does: of every thousand pairs all chosen ones, then all rejected ones; a response begins where
    it would alone. `prepare_examples` does it by itself for pairs of kind "unpaired", before tokenising.
    """
    out = []
    for start in range(0, len(examples), _CHUNK_ROWS):
        pairs = examples[start : start + _CHUNK_ROWS]
        for k in (0, 1):
            out += [_alone(example, k) for example in pairs]
    return [example for example in out if len(example.responses[0])]


def _alone(example: Example, k: int) -> Example:
    columns = {name: [values[k]] for name, values in example.response_columns.items()}
    columns[LABEL] = [float(k == 0)]
    lead = example.leads[k] if example.leads else 0
    prompt, response = example.prompt_of(k), example.responses[k]
    weights = None if example.token_weights is None else [example.token_weights[k][lead:]]
    prompt = np.concatenate([prompt, response[:lead]]) if lead else prompt
    return Example(prompt, [response[lead:]], response_columns=columns, token_weights=weights)

"""What became of a data set's rows: counts, one line of summary, and what is said once, whatever the number of rows."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from fastpo.data import kway
from fastpo.data.rows import BOUNDS, GREEDY, PROMPT_IDS, RESPONSE_COLUMNS, TOKEN_COLUMNS, Schema
from fastpo.errors import nearest, quoted

logger = logging.getLogger("fastpo.data")


@dataclass(slots=True)
class DataReport:
    """What became of the rows; the counts of responses and prompts are of sequences, all others of rows."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    pairs: int = 0
    offered: int = 0  # responses of the rows kept that have K of them; `responses` counts those in use
    merged: int = 0  # of those offered: how many were the same as another one of their row
    unfinished: int = 0  # of those in use: how many the policy did not end, so that they have no end of sequence
    by_loss: dict[str, int] = field(default_factory=dict)  # rows kept, where they name their loss
    other_prompts: int = 0  # rows in which a text after `prompt_ids` was tokenised behind other ids than these
    responses: int = 0
    truncated: int = 0  # responses that lost tokens to max_length
    truncated_eos: int = 0  # of these, how many lost their EOS or end of turn
    truncated_prompts: int = 0  # prompts that lost tokens (keep_end)
    boundary_moved: int = 0  # the prompt's tokens are not the beginning of the whole's: the response begins earlier
    doubled_specials: int = 0  # a second BOS or EOS was removed
    own_endings: int = 0  # texts that end as the chat template ends a turn: no EOS added
    repeated_prompts: int = 0  # chosen and rejected both begin with the prompt, which is in its own column too
    repeated_turns: int = 0  # of these, conversations whose prompt was taken out of the responses
    continued: int = 0  # the prompt ends in a turn that the response goes on in
    masked_rows: int = 0  # with turns behind the prompt that are not the assistant's
    masked_tokens: int = 0  # of responses, not trained on: turns that are not the assistant's
    flattened: int = 0  # contents given as lists became texts, or the other way round, as the template has them
    read_arguments: int = 0  # tool arguments given as JSON text became objects, or the other way round
    lost: dict[str, int] = field(default_factory=dict)  # by kind of given piece: the template does not write it
    lost_example: dict[str, tuple[int, str]] = field(default_factory=dict)  # the first row of each kind, and a text
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest_sequence: int = 0
    max_length: int | None = None
    kept_rows: list[int] = field(default_factory=list)  # row number of each example
    columns: list[str] = field(default_factory=list)  # names in the data
    warnings: list[str] = field(default_factory=list)
    moved_text: str = ""  # an end of a prompt that was left out, for the warning
    reading: str = ""  # the layout that the rows were read as, where it is another's
    mixed: str = ""  # what each data set of a mixture contributes
    streamed: bool = False  # whether the rows came from what is read once, in order, as far as the run needs

    def add(self, other: "DataReport") -> None:
        """Adds the counts of another part of the same rows."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name in ("dropped", "lost", "by_loss"):
                for reason, count in theirs.items():
                    mine[reason] = mine.get(reason, 0) + count
            elif item.name == "lost_example":
                setattr(self, item.name, {**theirs, **mine})
            elif item.name == "longest_sequence":
                self.longest_sequence = max(mine, theirs)
            elif item.name in ("moved_text", "reading", "mixed", "streamed"):
                setattr(self, item.name, mine or theirs)
            elif item.name == "kept_rows":
                mine.extend(theirs)
            elif item.name not in ("max_length", "columns", "warnings"):
                setattr(self, item.name, mine + theirs)

    def summary(self) -> str:
        """One line: rows kept and dropped, responses truncated, mean lengths."""
        parts = [f"{self.kept} of {self.rows} rows kept"]
        parts += [f"mixed: {self.mixed}"] * bool(self.mixed)
        if self.offered:
            parts.append(f"{self.pairs} pairs of {self.responses} of their {self.offered} responses")
        if self.by_loss:
            parts.append("by " + ", ".join(f"{loss} {count}" for loss, count in self.by_loss.items()))
        parts += [f"{self.merged} responses merged with equal ones"] * bool(self.merged)
        parts += [f"{self.unfinished} responses unfinished, trained without an end"] * bool(self.unfinished)
        parts += [f"{count} dropped: {reason}" for reason, count in self.dropped.items()]
        if self.truncated or self.truncated_prompts:
            cut = f"{self.truncated} of {self.responses} responses truncated at max_length {self.max_length}"
            parts.append(f"{cut} ({self.truncated_eos} lost their end of sequence)")
        if self.truncated_prompts:
            parts.append(f"{self.truncated_prompts} prompts truncated")
        if self.kept and not self.responses:  # prompts alone, whose responses are drawn
            parts.append(f"mean prompt {self.prompt_tokens / self.kept:.0f} tokens")
        elif self.kept:
            prompt, response = self.prompt_tokens / self.kept, self.response_tokens / self.responses
            parts.append(f"mean prompt {prompt:.0f} tokens, response {response:.0f}, longest {self.longest_sequence}")
        return "; ".join(parts)


def warn(report: DataReport, schema: Schema, names: list[str]) -> None:
    """Says each thing once, whatever the number of rows."""
    add = report.warnings.append
    if report.boundary_moved:
        add(
            f"in {report.boundary_moved} rows the prompt's own tokens are not how prompt and response begin together "
            "(the chat template writes a prompt alone differently, or tokens merge across the boundary). There the "
            f"response starts at the first difference; left out, for example: {report.moved_text!r}"
        )
    if report.doubled_specials:
        add(
            f"in {report.doubled_specials} rows the text already holds the BOS or EOS that the tokenizer adds "
            "(a chat template was applied before?): the second one was removed"
        )
    if report.other_prompts:
        add(
            f"in {report.other_prompts} rows 'prompt_ids' are not how the prompt and a text after it are tokenised "
            "together (another chat template, or tokens merge across the boundary): the text's own tokens follow them"
        )
    if report.own_endings:
        add(f"{report.own_endings} responses end as the chat template ends a turn: no EOS was added to them")
    _warn_of_turns(report, add)
    if report.repeated_prompts * 2 > report.rows:
        add(f"in {report.repeated_prompts} rows the responses begin with the prompt, which then stands twice")
    for chosen, rejected in (RESPONSE_COLUMNS["ref_logps"], RESPONSE_COLUMNS["prev_logps"]):
        if report.truncated and chosen in schema.numbers:
            add(f"responses were truncated: {chosen} and {rejected} must be of the truncated ones")
    unread = [name for name in (*BOUNDS, *TOKEN_COLUMNS) if name in names]
    if schema.kway is not None:
        unread = [name for name in unread if name not in (*kway.OF_PAIRS, "ref_greedy_logps")]
        if kway.PAIRS in names and schema.kway.policy != "explicit":
            add(f"the column '{kway.PAIRS}' is not used: pair_policy=explicit reads it")
    elif schema.kind == "preference":
        unread = []
    if unread:
        add(f"the columns {quoted(unread)} are not used for {'K-way' if schema.kway else schema.kind} rows")
    if PROMPT_IDS in names and schema.prompt_ids != PROMPT_IDS:
        add(f"the column '{PROMPT_IDS}' is not used: it is empty in the first rows")
    if "tools" in names and not schema.conversational:
        add("the column 'tools' is not used: the rows are texts, and only a chat template can show tools")
    known = {*BOUNDS, *TOKEN_COLUMNS, GREEDY, kway.RESPONSES, PROMPT_IDS, "tools", "chat_template_kwargs"}
    for name in names:
        close = nearest(name, known, 0.8)
        if close and close not in names and name not in known:
            add(f"the column '{name}' is not read: did you mean '{close}'?")
    for message in report.warnings:
        logger.warning(message)


def _warn_of_turns(report: DataReport, add: Callable[[str], None]) -> None:
    """What conversations held that the template does not write, or that was changed so that it does."""
    for kind, count in report.lost.items():
        row, example = report.lost_example[kind]
        shown = f", for example {example.strip()[:60]!r}" if example.strip() else ""
        add(
            f"in {count} rows the chat template does not write the {kind} (first in row {row}{shown}): not trained on, "
            "and not seen by the model"
        )
    for count, what in (
        (report.repeated_turns, "the responses begin with the turns of the prompt: they were taken once"),
        (report.continued, "the prompt ends in a turn that the assistant began: the responses continue it"),
        (report.flattened, "contents were turned from lists of text parts into texts (or texts into lists), as the "
                           "chat template writes them"),
        (report.read_arguments, "tool arguments were turned from JSON text into objects (or back), as the chat "
                                "template writes them"),
        (report.masked_rows, f"the responses have turns that are not the assistant's: {report.masked_tokens} tokens "
                             "are not trained on (assistant_only_loss=false trains on them)"),
    ):  # fmt: skip
        if count:
            add(f"in {count} rows {what}")

"""The layouts that other projects and popular data sets give their rows, and how each becomes fastpo's own columns.

A layout is recognised by its columns and by what the first rows hold in them. Where its meaning is certain its rows are
converted one by one, as they are read; where it is not, the error has the line to write. Rows that are in fastpo's own
form already are none of these.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpo.data import conversions as to
from fastpo.data.rows import PASSED, PROMPT_IDS, RESPONSES, InvalidRow, NoPair
from fastpo.errors import DataError, one_line, quoted

# Names of the scores of a pair in other data: chosen's and rejected's.
SCORES = (
    *((f"{what}_chosen", f"{what}_rejected") for what in ("score", "rating", "reward")),
    *((f"chosen{what}", f"rejected{what}") for what in ("_rating", "-rating", "_avg_rating", "_reward")),
)


@dataclass(frozen=True)
class Layout:
    """One layout. `shapes` says what the first rows must hold; `without` are columns that make it another one."""

    name: str
    kind: str
    shapes: Mapping[str, str]  # column -> text, texts (as JSON or list), turn, turns, dict, dicts, number, flag, ids
    gives: str  # its columns as fastpo's, for the one line that says so and for the docs
    convert: Callable[[Mapping, bool], Mapping] | None = None  # (row, whether prompts are texts as they are)
    optional: Sequence[str] = ()  # read too, where they are there
    without: Collection[str] = ()
    unless: Callable[[Sequence[Mapping]], bool] | None = None  # what of the first rows makes it fastpo's own form
    prompt: str | None = None  # the column of text that may be made ready for its answer
    own: Sequence[str] = ()  # fastpo's columns that it gives (empty: all of its kind)
    language: bool = False  # the whole of it is trained: there is no prompt
    line: str = ""  # what to write, where the meaning is not certain
    why: str = ""

    @property
    def passes(self) -> tuple[str, ...]:
        """Columns that go through its conversion as they are."""
        return PASSED if "ids" in self.shapes.values() else (*PASSED, PROMPT_IDS)

    def fits(self, columns: Collection[str], rows: Sequence[Mapping]) -> bool:
        if not set(self.shapes) <= set(columns) or set(self.without) & set(columns):
            return False
        if not all(to.holds(to.first_value(rows, name), shape) for name, shape in self.shapes.items()):
            return False
        return self.unless is None or not self.unless(rows)


def _turn_map(prompt: str, chosen: str, rejected: str) -> str:
    """The line that makes turns of three columns of text."""
    turns = {"prompt": ("user", prompt), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    items = ", ".join(
        f'"{ours}": [{{"role": "{role}", "content": x["{name}"]}}]' for ours, (role, name) in turns.items()
    )
    return f"dataset.map(lambda x: {{{items}}}, remove_columns=dataset.column_names)"


_SUMMARIES = (
    'dataset.map(lambda x: {"prompt": x["info"]["post"] + "\\n\\nTL;DR:", "chosen": '
    'x["summaries"][x["choice"]]["text"], "rejected": x["summaries"][1 - x["choice"]]["text"]}, '
    "remove_columns=dataset.column_names)"
)
_SAFE = (
    'dataset.map(lambda x: {"prompt": [{"role": "user", "content": x["prompt"]}], "chosen": [{"role": "assistant", '
    '"content": x[f"response_{x[\'better_response_id\']}"]}], "rejected": [{"role": "assistant", "content": '
    "x[f\"response_{1 - x['better_response_id']}\"]}]}, remove_columns=dataset.column_names)"
)
_ATTRIBUTES = (
    '[{"prompt": [{"role": "user", "content": a["prompt"]}], "chosen": [{"role": "assistant", "content": '
    'max(a, b, key=lambda x: x["helpfulness"])["response"]}], "rejected": [{"role": "assistant", "content": '
    'min(a, b, key=lambda x: x["helpfulness"])["response"]}]} for a, b in zip(list(dataset)[::2], list(dataset)[1::2]) '
    'if a["helpfulness"] != b["helpfulness"]]'
)
_RATED = 'dataset.map(lambda x: {"label": x["rating"] >= 4}, remove_columns=["rating"])'
_TEXTS = {"chosen": "text", "rejected": "text"}
_ANSWERS = {"chosen": "answer", "rejected": "answer"}
_PROMPTS = ("prompt", "question", "input", "instruction", "query", "context", "history", "user", "problem", "post")
P, U, S = "preference", "unpaired", "sft"

# The first that fits is taken. Token ids go before the texts that they are of.
LAYOUTS: tuple[Layout, ...] = (
    Layout("token ids, pairs", P, {"prompt_ids": "ids", "chosen_ids": "ids", "rejected_ids": "ids"},
           "prompt_ids -> prompt, chosen_ids -> chosen, rejected_ids -> rejected",
           to.renamed(prompt="prompt_ids", chosen="chosen_ids", rejected="rejected_ids")),
    Layout("token ids, labelled", U, {"prompt_ids": "ids", "completion_ids": "ids", "label": "flag"},
           "prompt_ids -> prompt, completion_ids -> completion, label",
           to.renamed(prompt="prompt_ids", completion="completion_ids", label="label")),
    Layout("token ids, prompt and completion", S, {"prompt_ids": "ids", "completion_ids": "ids"},
           "prompt_ids -> prompt, completion_ids -> completion",
           to.renamed(prompt="prompt_ids", completion="completion_ids")),
    Layout("UltraFeedback", P, {"instruction": "text", "completions": "dicts"},
           "instruction -> prompt, completions -> responses, their overall_score -> score", to.ultrafeedback,
           own=("prompt", RESPONSES)),
    Layout("UltraFeedback, binarised by Argilla", P,
           {"instruction": "text", "chosen_response": "text", "rejected_response": "text"},
           "instruction -> prompt, chosen_response -> chosen, rejected_response -> rejected",
           to.system_pair("instruction", "chosen_response", "rejected_response"), ("system",), ("input",)),
    Layout("Nectar", P, {"prompt": "text", "answers": "dicts"},
           "prompt, answers -> responses, the lowest rank is the best", to.nectar,
           own=("prompt", RESPONSES), prompt="prompt"),
    Layout("LLaMA-Factory, alpaca pairs", P, {"instruction": "text", "input": "text", **_TEXTS},
           "system, history, instruction and input -> prompt; chosen, rejected",
           lambda row, _: {"prompt": to.alpaca_prompt(row), "chosen": to.bot(to.text_of(row, "chosen")),
                           "rejected": to.bot(to.text_of(row, "rejected"))}, ("system", "history"), ("prompt",)),
    *(Layout("pairs with a system text (orca, truthy)", P, {"system": "text", name: "text", **_TEXTS},
             f"system and {name} -> prompt; chosen, rejected", to.system_pair(name),
             without=() if name == "prompt" else ("prompt",),
             unless=to.rendered_with_system if name == "prompt" else None)
      for name in _PROMPTS),
    Layout("share-gpt pairs", P, {"conversations": "turns", **_ANSWERS},
           "conversations -> prompt, chosen, rejected", to.conversation_pair("conversations"), ("system",),
           ("prompt",)),
    Layout("messages pairs (axolotl)", P, {"messages": "turns", **_ANSWERS}, "messages -> prompt, chosen, rejected",
           to.conversation_pair("messages"), ("system",), ("prompt",)),
    Layout("UltraInteract pairs", P, {"trajectory": "turns", **_ANSWERS}, "trajectory -> prompt, chosen, rejected",
           to.conversation_pair("trajectory"), ("system",), ("prompt",)),
    Layout("ms-swift", P, {"messages": "turns", "rejected_response": "text"},
           "messages -> prompt and, its last turn, chosen; rejected_response -> rejected", to.swift, (), ("chosen",)),
    Layout("ms-swift, whole conversations", P, {"messages": "turns", "rejected_messages": "turns"},
           "messages -> chosen, rejected_messages -> rejected", to.swift_messages, (), ("chosen",),
           own=("chosen", "rejected")),
    Layout("OpenAI preferences", P, {"input": "dict", "preferred_output": "turns", "non_preferred_output": "turns"},
           "input.messages -> prompt, preferred_output -> chosen, non_preferred_output -> rejected", to.openai),
    Layout("PKU-SafeRLHF", P, {"prompt": "text", "response_0": "text", "response_1": "text",
                               "better_response_id": "number"},
           "prompt; the response of better_response_id -> chosen, the other -> rejected",
           to.of_two("prompt", "response_0", "response_1", to.is_first("better_response_id", 0), "better_response_id"),
           (), ("safer_response_id",), prompt="prompt"),
    Layout("PKU-SafeRLHF with two verdicts", P, {"prompt": "text", "response_0": "text", "response_1": "text",
                                                 "better_response_id": "number", "safer_response_id": "number"},
           "", line=_SAFE, why="the better response and the safer one are two columns: choose one of them (for the "
           "safer write safer_response_id in place of better_response_id)"),
    Layout("Code-Preference-Pairs", P, {"input": "text", "accepted": "text", "rejected": "text"},
           "input -> prompt, accepted -> chosen, rejected", to.system_pair("input", "accepted"),
           ("system",), ("chosen",)),
    Layout("stack-exchange-paired", P, {"question": "text", "response_j": "text", "response_k": "text"},
           "question -> prompt, response_j -> chosen, response_k -> rejected",
           to.system_pair("question", "response_j", "response_k")),
    Layout("HelpSteer 2, preferences", P, {"prompt": "text", "response_1": "text", "response_2": "text",
                                           "preference_strength": "number"},
           "prompt; preference_strength below 0: response_1 -> chosen, above 0: response_2",
           to.of_two("prompt", "response_1", "response_2", to.sign("preference_strength"), "preference_strength"),
           prompt="prompt"),
    Layout("HelpSteer, attributes", P, {"prompt": "text", "response": "text", "helpfulness": "number"}, "",
           line=_ATTRIBUTES, why="each row is one rated response, and rows of one prompt stand beside each other"),
    Layout("HelpSteer 3", P, {"context": "turns", "response1": "text", "response2": "text",
                              "overall_preference": "number"},
           "context -> prompt; overall_preference below 0: response1 -> chosen, above 0: response2",
           to.of_two("context", "response1", "response2", to.sign("overall_preference"), "overall_preference")),
    Layout("HelpSteer 3 without its verdict", P, {"context": "turns", "response1": "text", "response2": "text"}, "",
           line='dataset.map(lambda x: {"prompt": x["context"], "chosen": [{"role": "assistant", "content": '
                'x["response1"]}], "rejected": [{"role": "assistant", "content": x["response2"]}]}, '
                "remove_columns=dataset.column_names)",
           why="no column 'overall_preference' says which response is better; if response1 is"),
    Layout("SHP", P, {"history": "text", "human_ref_A": "text", "human_ref_B": "text", "labels": "number"},
           "history -> prompt; labels 1: human_ref_A -> chosen, 0: human_ref_B",
           to.of_two("history", "human_ref_A", "human_ref_B", to.is_first("labels", 1), "labels")),
    Layout("arena", P, {"conversation_a": "turns", "conversation_b": "turns", "winner": "text"},
           "the conversation of the winner -> chosen, the other -> rejected", to.arena, own=("chosen", "rejected")),
    Layout("arena, texts", P, {"prompt": "any", "response_a": "any", "response_b": "any", "winner": "text"},
           "prompt and the response of the winner -> chosen, of the other -> rejected", to.arena_texts,
           own=("chosen", "rejected")),
    Layout("arena, texts with flags", P, {"prompt": "any", "response_a": "any", "response_b": "any",
                                          "winner_model_a": "number", "winner_model_b": "number"},
           "prompt and the response of the winner -> chosen, of the other -> rejected", to.arena_texts,
           own=("chosen", "rejected")),
    Layout("webgpt comparisons", P, {"question": "dict", "answer_0": "text", "answer_1": "text", "score_0": "number",
                                     "score_1": "number"},
           "question.full_text -> prompt; the answer of the higher score -> chosen", to.webgpt),
    Layout("summarize_from_feedback", P, {"info": "dict", "summaries": "dicts", "choice": "number"}, "",
           line=_SUMMARIES, why="how the summary is asked for is not in the data"),
    *(Layout("pairs after a prompt of another form", P, {name: form, "chosen": shape, "rejected": shape},
             f"{name} -> prompt; prompt, chosen, rejected -> turns", to.wrapped(name), ("system",),
             () if name == "prompt" else ("prompt",))
      for name in _PROMPTS
      for form, shape in (("turns", "text"), ("turns", "turn"), ("text", "answers"), ("text", "turn"),
                          *((("turns", "answers"),) if name != "prompt" else ()))),
    Layout("alpaca pairs in one column", P, {"instruction": "text", "output": "two"},
           "instruction and input -> prompt; output -> chosen, rejected",
           lambda row, _: {"prompt": to.alpaca_prompt(row), "chosen": to.bot(row["output"][0]),
                           "rejected": to.bot(row["output"][1])}, ("input", "system", "history"), ("chosen",)),
    *(Layout(f"pairs with '{name}' for a prompt", P, {name: "text", **_TEXTS}, "", without=("prompt",),
             unless=to.in_both(name), line=_turn_map(name, "chosen", "rejected"),
             why=f"'{name}' holds the prompt, and how the responses follow it is not in the data: texts as they "
             f"are need dataset.rename_column('{name}', 'prompt'), turns of a chat")
      for name in _PROMPTS[1:]),
    *(Layout("LLaMA-Factory, kto conversations", U, {name: "turns", "kto_tag": "flag"},
             f"{name} -> prompt and, its last turn, completion; kto_tag -> label", to.kto_turns(name, "kto_tag"),
             ("system",)) for name in ("conversations", "messages")),
    *(Layout("labelled conversations (ms-swift, axolotl)", U, {name: "turns", "label": "flag"},
             f"{name} -> prompt and, its last turn, completion; label", to.kto_turns(name, "label"), ("system",),
             ("completion",)) for name in ("messages", "conversations")),
    Layout("LLaMA-Factory, kto alpaca", U, {"instruction": "text", "output": "text", "kto_tag": "flag"},
           "instruction and input -> prompt, output -> completion, kto_tag -> label",
           lambda row, _: {"prompt": to.alpaca_prompt(row), "completion": to.bot(to.text_of(row, "output")),
                           "label": row.get("kto_tag")}, ("input", "system", "history")),
    *(Layout("labelled responses", U, {"prompt": "any", response: "any", name: shape},
             f"prompt, {response} -> completion, {name} -> label", to.kto_verdict(response, name),
             without=("chosen",), prompt="prompt")
      for response in ("completion", "response")
      for name, shape in (("label", "word" if response == "completion" else "label"), ("rating", "verdict"),
                          ("feedback", "verdict"), ("thumbs", "verdict"))),
    Layout("rated responses", U, {"prompt": "any", "completion": "any", "rating": "number"}, "", without=("label",),
           line=_RATED, why="which ratings are good ones is not in the data"),
    Layout("token ids", S, {"input_ids": "ids"}, "input_ids -> prompt and completion, by labels, completion_mask or "
           "assistant_masks where they are there", to.token_ids, ("labels", "completion_mask", "assistant_masks"),
           ("completion",)),
    *(Layout("conversations", S, {name: "turns"}, f"{name} -> prompt (to the assistant's first turn) and completion",
             to.sft_turns(name), ("system",), ("completion",))
      for name in ("messages", "conversations", "conversation")),
    Layout("alpaca", S, {"instruction": "text", "output": "text"},
           "system, history, instruction and input -> prompt; output -> completion",
           lambda row, _: {"prompt": to.alpaca_prompt(row), "completion": to.bot(to.text_of(row, "output"))},
           ("input", "system", "history"), ("completion", "prompt")),
    Layout("dolly", S, {"instruction": "text", "response": "text"},
           "instruction and context -> prompt; response -> completion",
           lambda row, _: {"prompt": to.alpaca_prompt({"instruction": row.get("instruction"),
                                                     "input": row.get("context")}),
                           "completion": to.bot(to.text_of(row, "response"))}, ("context",), ("completion", "prompt")),
    *(Layout("questions with answers", S, {prompt: "text", response: "text"},
             f"{prompt} -> prompt, {response} -> completion", to.asked(prompt, response), ("system",),
             ("completion", *(() if prompt == "prompt" else ("prompt",))), prompt=prompt)
      for prompt in ("prompt", "question", "query", "input") for response in ("response", "answer", "output")),
    Layout("text", S, {"text": "text"}, "text, every token of which is trained",
           lambda row, _: {"prompt": "", "completion": to.text_of(row, "text")}, (), ("completion", "prompt"),
           language=True),
    *(Layout("turns of other keys", kind, {name: "any" for name in names}, "turns of 'from' and 'value' -> 'role' and "
             "'content'", to.plain_turns, own=names, unless=to.no_foreign(names))
      for kind, names in ((P, ("prompt", "chosen", "rejected")), (P, ("chosen", "rejected")),
                          (U, ("prompt", "completion")), (S, ("prompt", "completion")))),
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """How rows become fastpo's own: by a layout, or as they stand; and where the scores of a pair are."""

    layout: Layout | None = None
    as_text: bool = False
    scores: tuple[str, str] | None = None

    def __call__(self, row: Mapping, number: int) -> Mapping:
        """The row in fastpo's columns; InvalidRow, or NoPair for a tie, with the row's number."""
        if self.layout is None and self.scores is None:
            return row
        out: dict[str, Any] = dict(row)
        if self.layout is not None:
            assert self.layout.convert is not None
            try:
                given = self.layout.convert(row, self.as_text)
            except to.Tie as tie:
                raise NoPair(str(tie), f"row {number}: {tie}") from None
            except to.Unfit as error:
                raise InvalidRow(error.reason, f"row {number}: {error}") from None
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                message = f"row {number} is not as the rows of {self.layout.name} are: {one_line(error)}"
                raise InvalidRow(f"not as rows of {self.layout.name} are", message) from None
            out = {name: row[name] for name in self.layout.passes if name in row} | dict(given)
        if self.scores is not None:
            out |= {"chosen_score": row.get(self.scores[0]), "rejected_score": row.get(self.scores[1])}
        return out

    def first(self, rows: Sequence[Mapping]) -> list[Mapping]:
        """The first rows, with {} in the place of those that are refused or ties; DataError where all are."""
        out: list[Mapping] = []
        refused: InvalidRow | None = None
        for number, row in enumerate(rows):
            try:
                out.append(self(row, number))
            except InvalidRow as error:
                refused = refused or error
                out.append({})
        if refused is not None and not any(out):
            raise DataError(f"none of the first {len(out)} rows can be trained on: {refused}")
        return out

    def names(self, columns: Sequence[str]) -> list[str]:
        """The names of the columns after the conversion: those that pass, and what the layout gives."""
        names = list(columns)
        if self.layout is not None:
            own = self.layout.own or {"preference": ("prompt", "chosen", "rejected"), "sft": ("prompt", "completion"),
                                      "unpaired": ("prompt", "completion", "label")}[self.layout.kind]  # fmt: skip
            names = list(dict.fromkeys([*own, *(n for n in columns if n in self.layout.passes)]))
        if self.scores is not None:
            names = list(dict.fromkeys([*names, "chosen_score", "rejected_score"]))
        return names

    def reads(self) -> set[str]:
        """The columns that the conversion reads."""
        layout = self.layout
        return {*(self.scores or ()), *((*layout.shapes, *layout.optional) if layout else ())}

    def says(self) -> str:
        """One line on what is read as what; empty where rows are taken as they stand."""
        parts = []
        if self.layout is not None:
            parts.append(f"read as {self.layout.name} ({self.layout.gives})")
        if self.scores is not None:
            parts.append(f"{self.scores[0]}, {self.scores[1]} -> chosen_score, rejected_score")
        return "; ".join(parts)


def find(columns: Collection[str], rows: Sequence[Mapping], kinds: Sequence[str]) -> Layout | None:
    """The layout of rows with these columns, of the first of `kinds` that has one; None for fastpo's own form."""
    for kind in kinds:
        for layout in LAYOUTS:
            if layout.kind == kind and layout.fits(columns, rows):
                return layout
    return None


def kind_of(columns: Collection[str], rows: Sequence[Mapping], losses: str) -> str:
    """What rows of these columns are read as for losses of "pairs", of "unpaired" rows, or of "sft" alone."""
    pairs = "chosen" in columns or (RESPONSES in columns and "completion" not in columns)
    if losses == "pairs":
        return "preference"
    if losses == "unpaired":
        if {"completion", "label"} <= set(columns):
            return "unpaired"
        layout = None if "chosen" in columns else find(columns, rows, ("unpaired", "preference"))
        # Rows of K responses stay unpaired ones, which is refused: their pairs are not made for labels.
        if "chosen" in columns or (layout is not None and layout.kind == "preference" and RESPONSES not in layout.own):
            return "preference"
        return "unpaired"
    if pairs:
        return "preference"
    layout = None if {"prompt", "completion"} <= set(columns) else find(columns, rows, ("sft", "preference"))
    return "sft" if layout is None else layout.kind


def read_as(
    columns: Collection[str], rows: Sequence[Mapping], kind: str, wanted: Collection[str] | None, convert: bool = True
) -> Reading:
    """How rows of these columns are read as `kind`. DataError with the line to write where that is not certain.

    `rows` are the first of them; `wanted` are the optional columns that the run reads (None: all). Without `convert` a
    layout of another form is an error that names it.
    """
    layout = find(columns, rows, (kind,))
    if layout is not None and not layout.line and not convert:
        raise DataError(f"the columns {quoted(columns)} are those of {layout.name}: recognise_layouts=true reads them "
                        f"({layout.gives})")  # fmt: skip
    if layout is not None and layout.line:
        raise DataError(f"the columns {quoted(columns)} are those of {layout.name}: {layout.why}: {layout.line}")
    as_text = False
    if layout is not None and layout.prompt is not None:
        prompt = to.first_value(rows, layout.prompt)
        as_text = isinstance(prompt, str) and to.RENDERED.search(prompt) is not None
    scores = None
    if kind == "preference" and convert and wanted is not None and "chosen_score" in wanted and \
            not {"chosen_score", "rejected_score"} <= set(columns):  # fmt: skip
        scores = next((pair for pair in SCORES if set(pair) <= set(columns)), None)
    return Reading(layout, as_text, scores)

"""Rows to the token ids of the prompt and of prompt + response, each tokenised whole: what fastpo/data/prepare.py cuts
up."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from fastpo.data import content, turns
from fastpo.data.report import DataReport
from fastpo.data.rows import InvalidRow, Row, Unfinished, check_text
from fastpo.errors import DataError, one_line


@dataclass(slots=True)
class Encoded:
    """A row's token ids, and what was found on the way to them."""

    row: Row  # with its turns as they were rendered
    ids: list[list[int]]  # of the prompt, and of the prompt and each response
    # Of each response, which tokens of prompt and response the assistant writes; None: all of the response's.
    trained: list[list[bool] | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # what the ids are of; none where a tokenizer gives ids directly


@dataclass(slots=True)
class _Chat:
    """One conversation as the template wrote it."""

    row: Row
    texts: list[str]  # of the prompt, and of the prompt and each response
    spans: list[turns.Spans | list[bool] | None]  # of each response: what the assistant writes of it
    found: Counter  # counts for the report
    lost: dict[str, str]  # kinds of pieces that are in none of the texts, with an example


class Encoder:
    """Rows to the token ids of the prompt and of prompt + response, each tokenised whole.

    `assistant_only`: in responses of several turns only the assistant's are marked as trained on. `refuses`: why the
    tokenizer takes no texts, for rows that may be all token ids: the first text is the error then.
    """

    def __init__(self, tokenizer: Any, conversational: bool, assistant_only: bool = True, refuses: str = ""):
        if hasattr(tokenizer, "image_processor") or not hasattr(tokenizer, "eos_token"):
            name = type(tokenizer).__name__
            raise DataError(f"processing_class must be a tokenizer, not a {name} (a processor has one as .tokenizer)")
        self.tokenizer = tokenizer
        self.conversational = conversational
        self.assistant_only = assistant_only
        self.refuses = refuses
        if refuses:
            self.ending_ids = {tokenizer.eos_token_id}
            return
        if conversational and not getattr(tokenizer, "chat_template", None) and _renders_as_text(tokenizer):
            raise DataError(
                "the rows are conversations and the tokenizer has no chat template: set tokenizer.chat_template, or "
                "give texts in the place of turns"
            )
        eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
        if not conversational:
            if eos is None or eos_id is None:
                raise DataError(
                    "the tokenizer has no EOS token, which ends every response: set it, as tokenizer.eos_token = '</s>'"
                )
            if not _renders_as_text(tokenizer):
                raise DataError(
                    f"a {type(tokenizer).__name__} (mistral-common) reads no special tokens in texts, so none can end "
                    "the responses: give conversations (lists of turns), or load the model's Hugging Face tokenizer"
                )
            if self._ids([eos], special=False)[0][-1:] != [eos_id]:
                raise DataError(f"the tokenizer does not read its own EOS text {eos!r} as one token: add it as special")
            # What the tokenizer adds to any text by itself.
            try:
                bare, whole = self._ids(["a"], special=False)[0], self._ids(["a"], special=True)[0]
            except Exception:  # a vocabulary of whole words without an unknown token cannot read the probe
                bare, whole = self._ids([""], special=False)[0], self._ids([""], special=True)[0]
            bos_id = tokenizer.bos_token_id
            self.leading = bos_id if bos_id is not None and whole[:1] == [bos_id] != bare[:1] else None
            self.trailing = eos_id if whole[-1:] == [eos_id] != bare[-1:] else None
        ends = self._template_endings()
        self.endings = (*ends, *((eos,) if eos else ()))
        self.ending_ids = {*ends.values(), eos_id}

    def _template_endings(self) -> dict[str, int]:
        """The special tokens with which the chat template ends an assistant's turn, and their ids."""
        if not _renders_as_text(self.tokenizer) or not getattr(self.tokenizer, "chat_template", None):
            return {}
        wordless = getattr(self.tokenizer, "added_tokens_decoder", {})
        openings = {getattr(self.tokenizer, f"{role}_token", None) for role in ("bos", "unk", "pad", "cls", "mask")}
        openings -= {self.tokenizer.eos_token}
        special = {token.content: number for number, token in wordless.items()
                   if token.special and token.content not in openings}  # fmt: skip
        probe = [{"role": "user", "content": "zqu"}, {"role": "assistant", "content": "zqa"}]
        try:
            written = self.tokenizer.apply_chat_template(probe, tokenize=False)
        except Exception:  # a template that wants other conversations than this one
            return {}
        tail = written.rpartition("zqa")[2] if "zqa" in written else ""
        return {text: number for text, number in special.items() if text in tail}

    def __call__(self, rows: Sequence[Row], report: DataReport) -> list[Encoded]:
        """The rows' ids, in their order; InvalidRow for the first that cannot be rendered, with nothing counted."""
        if self.refuses:
            raise DataError(self.refuses)
        if self.conversational:
            return self._conversations(rows, report)
        texts = [self._texts(row, report) for row in rows]
        ids = iter(self._ids([text for of_row in texts for text in of_row], special=True))
        out = []
        for row, of_row in zip(rows, texts, strict=True):
            row_ids = [next(ids) for _ in of_row]
            self._undouble(row_ids, report)
            out.append(Encoded(row, row_ids, [None] * len(row.completions), of_row))
        return out

    def apart(self, text: str) -> list[int]:
        """The ids of a text that continues others, tokenised behind an EOS: without the space that some tokenizers put
        before the first word of all."""
        eos = self.tokenizer.eos_token
        return self._ids([eos + text], special=False)[0][1:] if eos else self._ids([text], special=False)[0]

    def _texts(self, row: Row, report: DataReport) -> list[str]:
        texts = [row.prompt]
        for completion in row.completions:
            if not (completion.endswith(self.tokenizer.eos_token) or isinstance(completion, Unfinished)):
                if completion.rstrip().endswith(self.endings):
                    report.own_endings += 1
                else:
                    completion = completion + self.tokenizer.eos_token
            texts.append(row.prompt + completion)
        return texts

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(text=texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def _undouble(self, row_ids: list[list[int]], report: DataReport) -> None:
        """Removes, in place, what the tokenizer adds by itself although the text has it (an EOS or ending always)."""
        doubled = self.trailing is not None
        for index, ids in enumerate(row_ids):
            if self.leading is not None and ids[1:2] == [self.leading]:
                ids = ids[1:]
                doubled = True
            row_ids[index] = ids if self.trailing is None else ids[:-1]
        report.doubled_specials += doubled

    def prompt_ids(self, prompts: Sequence[Any], template_kwargs: Mapping[str, Any]) -> list[list[int]]:
        """The ids of prompts alone: those that a row of each has before an answer. DataError where one has none."""
        if not self.conversational:
            ids = self._ids(list(prompts), special=True)
            self._undouble(ids, DataReport())
            return ids
        rows = [Row(0, list(p), ([{"role": "assistant", "content": "a"}],), dict(template_kwargs)) for p in prompts]
        try:
            if not _renders_as_text(self.tokenizer):
                return [_Direct(self.tokenizer, self.assistant_only)(row).ids[0] for row in rows]
            return self._ids([self._prompt_text(row) for row in rows], special=False)
        except InvalidRow as error:
            raise DataError(str(error).removeprefix("row 0: ")) from error
        except Exception as error:  # whatever a template raises, jinja's errors and Python's alike
            raise DataError(f"the chat template refuses a prompt: {one_line(error)}") from error

    def _prompt_text(self, row: Row) -> str:
        """A conversation as its template writes it up to the answer."""
        row, continues = content.continued(row)
        form = self._form(row, [[*row.prompt[: len(row.prompt) - continues], *row.completions[0]]])
        how = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
        return self._render(row, form(row.prompt), **how)

    # ---- conversations

    def _conversations(self, rows: Sequence[Row], report: DataReport) -> list[Encoded]:
        if not _renders_as_text(self.tokenizer):
            direct = _Direct(self.tokenizer, self.assistant_only)
            done = [direct(row) for row in rows]
            found = [Counter(continued=0, masked=int(any(e.trained))) for e in done]
            lost: list[dict[str, str]] = [{} for _ in done]
        else:
            chats = [self._chat(row) for row in rows]
            ids = iter(self._ids([text for chat in chats for text in chat.texts], special=False))
            done = []
            for chat in chats:
                row_ids = [next(ids) for _ in chat.texts]
                trained = [self._trained(chat, k, row_ids[k + 1]) for k in range(len(chat.spans))]
                done.append(Encoded(chat.row, row_ids, trained, chat.texts))
            found, lost = [chat.found for chat in chats], [chat.lost for chat in chats]
        for row, counts, missing in zip(rows, found, lost, strict=True):
            report.continued += counts["continued"]
            report.masked_rows += counts["masked"]
            report.flattened += counts["flattened"]
            report.read_arguments += counts["read_arguments"]
            for kind, example in missing.items():
                report.lost[kind] = report.lost.get(kind, 0) + 1
                report.lost_example.setdefault(kind, (row.number, example))
        return done

    def _render(self, row: Row, given: content.Turns, **how: Any) -> str:
        """What the template writes of some turns; `how` may have other `tools`."""
        return self.tokenizer.apply_chat_template([dict(turn) for turn in given], tokenize=False,
                                                  **{**row.template_kwargs, **how})  # fmt: skip

    def _chat(self, row: Row) -> _Chat:
        """Renders the prompt, with the generation prompt, and the prompt with each response; InvalidRow if none can."""
        # Of responses that continue the prompt's last turn: whether they have no words of their own to add to it.
        wordless = [not content.text_of(completion[0].get("content", "")).strip() for completion in row.completions]
        row, continues = content.continued(row)
        first = len(row.prompt) - continues
        before, begun = list(row.prompt[:first]), row.prompt[-1].get("content", "") if continues else ""
        wholes = [[*before, *completion] for completion in row.completions]
        found: Counter = Counter(continued=int(continues))
        render = partial(self._render, row)
        try:
            form = self._form(row, wholes)
            prompt = form(row.prompt)
            wholes = [form(whole) for whole in wholes]
            texts = [render(whole, add_generation_prompt=False) for whole in wholes]
            if continues:
                prompt_text = render(prompt, continue_final_message=True)
            else:
                opens = any(content.is_models(completion[0]) for completion in row.completions)
                prompt_text = render(prompt, add_generation_prompt=opens)
        except Exception as error:  # whatever a template raises, jinja's errors and Python's alike
            message = f"row {row.number}: the chat template failed: {one_line(error)}"
            raise InvalidRow("refused by the chat template", message) from error
        found["flattened"] = int(form.contents != "given")
        given = [*row.prompt, *(turn for completion in row.completions for turn in completion)]
        found["read_arguments"] = int(content.Form(arguments=form.arguments)(given) != given)
        lost: dict[str, str] = {}
        for k, (given, text) in enumerate(zip(wholes, texts, strict=True)):
            missing, says = content.lost(
                given, first, row.template_kwargs, text,
                lambda marked, tools: render(marked, add_generation_prompt=False, tools=tools),
            )  # fmt: skip
            if not says or (continues and wordless[k]):
                self._refuse_empty(row, k, given, first, text, begun)
            for kind, example in missing.items():
                lost.setdefault(kind, example)
            boundary = len(os.path.commonprefix([prompt_text, text]))
            if boundary < len(prompt_text):
                self._refuse_eaten(row, prompt, prompt_text, text, boundary)
        for text in (prompt_text, *texts):
            check_text(text, f"row {row.number}: a turn")
        spans = [self._spans(row, given, first, text) for given, text in zip(wholes, texts, strict=True)]
        found["masked"] = int(any(span is not None for span in spans))
        return _Chat(row, [prompt_text, *texts], spans, found, lost)

    def _form(self, row: Row, wholes: Sequence[content.Turns]) -> content.Form:
        """How the template wants the conversations of a row: list parts, and tool arguments given as JSON text."""
        form = content.Form()
        for whole in wholes:
            special = any(not isinstance(turn.get("content"), str) for turn in whole)
            if special or self._takes_parts_only or any(turn.get(key) for turn in whole for key in content.CALLS):
                chosen = content.choose_form(whole, lambda some: self._render(row, some, add_generation_prompt=False))
                form = form.beside(chosen)
        return form

    @cached_property
    def _takes_parts_only(self) -> bool:
        """Whether the template cannot write a content that is a text, only lists of parts, of some roles at least."""
        probe = [{"role": "user", "content": "zqu"}, {"role": "assistant", "content": "zqa"}]
        try:
            written = self.tokenizer.apply_chat_template(probe, tokenize=False)
        except Exception:  # a template that wants other conversations than this one: by each row
            return True
        return "zqu" not in written or "zqa" not in written

    def _refuse_empty(self, row: Row, k: int, given: content.Turns, first: int, text: str, begun: Any) -> None:
        """InvalidRow where a response's assistant turns add nothing to what the template writes without their words."""
        try:
            frame = self._render(row, content.emptied(given, first, begun), add_generation_prompt=False)
        except Exception:  # a template that writes no empty turns
            return
        if frame == text:
            raise InvalidRow(
                "a response that renders empty",
                f"row {row.number}: the chat template writes nothing of response {k} but an empty turn (its content, "
                "tool calls or reasoning are empty or unknown to the template)",
            )

    def _refuse_eaten(self, row: Row, prompt: content.Turns, prompt_text: str, text: str, boundary: int) -> None:
        eaten = content.eats_prompt(prompt, prompt_text, text, boundary)
        if eaten is not None:
            raise _changed(row, eaten, "chat template")

    def _spans(self, row: Row, given: content.Turns, first: int, text: str) -> turns.Spans | list[bool] | None:
        """What the assistant writes of a response: None for all, else characters, or the template's own mask."""
        if not self.assistant_only or not turns.needs_mask(given[first:]):
            return None
        if turns.marks_generation(self.tokenizer.chat_template, row.template_kwargs.get("tools")):
            try:
                output = self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in given], tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                    **row.template_kwargs,
                )  # fmt: skip
                mask = [bool(value) for value in output["assistant_masks"]]
            except Exception:  # a slow tokenizer has no map from characters to tokens
                mask = []
            if any(mask):
                return mask
        try:
            return turns.models_spans(
                given, first, text, lambda some, generation: self._render(row, some, add_generation_prompt=generation)
            )
        except Exception as error:  # turns.Unclear, and whatever the template raises on the first turns alone
            raise _unclear(row, error) from error

    def _trained(self, chat: _Chat, k: int, ids: list[int]) -> list[bool] | None:
        spans = chat.spans[k]
        if not spans:
            return None
        if isinstance(spans[0], bool):
            return spans if len(spans) == len(ids) else self._refuse_mask(chat.row)
        if not getattr(self.tokenizer, "is_fast", False):
            return self._by_beginnings(chat, k, spans, ids)
        found = self.tokenizer(text=chat.texts[k + 1], add_special_tokens=False, return_offsets_mapping=True)
        return turns.trained_tokens(found["offset_mapping"], spans)

    def _by_beginnings(self, chat: _Chat, k: int, spans: turns.Spans, ids: list[int]) -> list[bool]:
        """The mask from a tokenizer without offsets: where the tokens of the text up to each character end."""
        text = chat.texts[k + 1]

        def place(at: int) -> int:
            return len(os.path.commonprefix([ids, self._ids([text[:at]], special=False)[0]])) if at else 0

        out = [False] * len(ids)
        for start, end in spans:
            first, last = place(start), len(ids) if end == len(text) else place(end)
            out[first:last] = [True] * (last - first)
        return out

    def _refuse_mask(self, row: Row) -> Any:
        raise _unclear(row, turns.Unclear("the template's own marks do not fit its tokens"))


def _changed(row: Row, eaten: str, writer: str) -> InvalidRow:
    shown = eaten if len(eaten) <= 40 else f"{eaten[:37]}..."
    return InvalidRow(
        "the prompt changes with the response",
        f"row {row.number}: the {writer} writes the prompt differently when a response follows, so that the prompt's "
        f"{shown!r} would be trained on as the response: use a template that writes its turns the same in both, or "
        "leave out what makes it differ (often the system text)",
    )


def _unclear(row: Row, error: Exception) -> InvalidRow:
    return InvalidRow(
        "turns that cannot be told apart",
        f"row {row.number}: the response has turns that are not the assistant's, and {one_line(error)} "
        "(assistant_only_loss=false trains on all turns)",
    )


class _Direct:
    """Conversations through a tokenizer that turns them into ids directly (mistral-common): no text, no template."""

    def __init__(self, tokenizer: Any, assistant_only: bool):
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only

    @cached_property
    def modes(self) -> tuple[Any, Any]:
        """The tokenizer for prompts, and the one for whole conversations: mistral-common has a mode for each."""
        path = getattr(self.tokenizer, "_tokenizer_path", None)
        if path is None or not hasattr(self.tokenizer, "mode"):  # another tokenizer with a way of its own
            return self.tokenizer, self.tokenizer
        prompts, wholes = (type(self.tokenizer)(tokenizer_path=path, mode=mode) for mode in ("test", "finetuning"))
        return prompts, wholes

    def _ids(self, row: Row, given: content.Turns, whole: bool, generation: bool = False) -> list[int]:
        tokenizer = self.modes[whole]
        how = {"add_generation_prompt": True} if generation else {}
        output = tokenizer.apply_chat_template([dict(turn) for turn in given], tokenize=True, return_dict=True,
                                               **how, **row.template_kwargs)  # fmt: skip
        return list(output["input_ids"])

    def __call__(self, row: Row) -> Encoded:
        row, continues = content.continued(row)
        first = len(row.prompt) - continues
        wholes = [content.Form("texts")([*row.prompt[:first], *completion]) for completion in row.completions]
        try:
            if continues:
                output = self.modes[0].apply_chat_template(
                    [dict(turn) for turn in row.prompt], tokenize=True, return_dict=True, continue_final_message=True,
                    **row.template_kwargs,
                )  # fmt: skip
                prompt = list(output["input_ids"])
            else:
                prompt = self._ids(row, content.Form("texts")(row.prompt), whole=False, generation=True)
            ids = [self._ids(row, whole, whole=True) for whole in wholes]
        except Exception as error:  # whatever its validation raises
            message = f"row {row.number}: {type(self.tokenizer).__name__} refused it: {one_line(error)}"
            raise InvalidRow("refused by the tokenizer", message) from error
        for whole in ids:
            self._refuse_eaten(row, prompt, whole)
        trained = [self._mask(row, whole, first, of) for whole, of in zip(wholes, ids, strict=True)]
        return Encoded(row, [prompt, *ids], trained)

    def _refuse_eaten(self, row: Row, prompt: list[int], whole: list[int]) -> None:
        boundary = len(os.path.commonprefix([prompt, whole]))
        if boundary < len(prompt):
            shown = [self.tokenizer.decode(ids).replace("\u2581", " ") for ids in (prompt, whole, whole[:boundary])]
            eaten = content.eats_prompt(row.prompt, shown[0], shown[1], len(shown[2]))
            if eaten is not None:
                raise _changed(row, eaten, "tokenizer")

    def _mask(self, row: Row, given: content.Turns, first: int, ids: list[int]) -> list[bool] | None:
        if not self.assistant_only or not turns.needs_mask(given[first:]):
            return None

        def of(some: content.Turns, generation: bool) -> list[int]:
            return self._ids(row, some, whole=content.is_models(some[-1]), generation=generation)

        try:
            return turns.trained_ids(given, first, ids, of)
        except Exception as error:  # turns.Unclear, and mistral-common's own
            raise _unclear(row, error) from error


def _renders_as_text(tokenizer: Any) -> bool:
    """False for tokenizers with a way of their own (mistral-common): those turn conversations into ids directly."""
    return type(tokenizer).apply_chat_template.__module__ == "transformers.tokenization_utils_base"

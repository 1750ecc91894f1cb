"""Rows to the token ids of the prompt and of prompt + response, each tokenised whole: what fastpo/data.py cuts up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastpo.errors import DataError
from fastpo.rows import InvalidRow, Row, check_text, one_line

if TYPE_CHECKING:
    from fastpo.data import DataReport


class Encoder:
    """Rows to the token ids of the prompt and of prompt + response, each tokenised whole."""

    def __init__(self, tokenizer: Any, conversational: bool):
        if hasattr(tokenizer, "image_processor") or not hasattr(tokenizer, "eos_token"):
            name = type(tokenizer).__name__
            raise DataError(f"processing_class must be a tokenizer, not a {name} (a processor has one as .tokenizer)")
        self.tokenizer = tokenizer
        self.conversational = conversational
        if conversational and not getattr(tokenizer, "chat_template", None) and _renders_as_text(tokenizer):
            raise DataError(
                "the rows are conversations and the tokenizer has no chat template: set tokenizer.chat_template, or "
                "give prompt, chosen and rejected as texts"
            )
        eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
        if not conversational:
            if eos is None or eos_id is None:
                raise DataError(
                    "the tokenizer has no EOS token, which ends every response: set it, as tokenizer.eos_token = '</s>'"
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
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token.content: number for number, token in added.items() if token.special}
        no_ending = {getattr(tokenizer, f"{role}_token", None) for role in ("bos", "unk", "pad", "cls", "mask")} - {eos}
        self.endings = tuple(text for text in special if text not in no_ending) + ((eos,) if eos else ())
        self.ending_ids = {special[text] for text in self.endings if text in special} | {eos_id}

    def __call__(self, rows: Sequence[Row], report: "DataReport") -> list[list[list[int]]]:
        """[[prompt, prompt + response, ...], ...] for each row."""
        if self.conversational and not _renders_as_text(self.tokenizer):
            return [
                [self._chat(row, k, tokenize=True)["input_ids"] for k in range(-1, len(row.completions))]
                for row in rows
            ]
        texts = [text for row in rows for text in self._texts(row, report)]
        ids = self._ids(texts, special=not self.conversational)
        rest = iter(ids)
        grouped = [[next(rest) for _ in range(1 + len(row.completions))] for row in rows]
        if not self.conversational:
            for row_ids in grouped:
                self._undouble(row_ids, report)
        return grouped

    def _texts(self, row: Row, report: "DataReport") -> list[str]:
        if self.conversational:
            return [self._chat(row, k, tokenize=False) for k in range(-1, len(row.completions))]
        texts = [row.prompt]
        for completion in row.completions:
            if not completion.endswith(self.tokenizer.eos_token):
                if completion.rstrip().endswith(self.endings):
                    report.own_endings += 1
                else:
                    completion = completion + self.tokenizer.eos_token
            texts.append(row.prompt + completion)
        return texts

    def _chat(self, row: Row, response: int, tokenize: bool) -> Any:
        """The prompt (response -1, with the generation prompt) or the whole conversation, rendered."""
        turns = row.prompt if response < 0 else [*row.prompt, *row.completions[response]]
        output = {"tokenize": tokenize, "return_dict": tokenize, "add_generation_prompt": response < 0}
        try:
            rendered = self.tokenizer.apply_chat_template(turns, **output, **row.template_kwargs)
        except Exception as error:  # whatever a template raises, jinja's errors and Python's alike
            message = f"row {row.number}: the chat template failed: {one_line(error)}"
            raise InvalidRow("refused by the chat template", message) from error
        if not tokenize:
            check_text(rendered, f"row {row.number}: a turn")
        return rendered

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(text=texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def _undouble(self, row_ids: list[list[int]], report: "DataReport") -> None:
        """Removes, in place, what the tokenizer adds by itself although the text has it (an EOS or ending always)."""
        doubled = self.trailing is not None
        for index, ids in enumerate(row_ids):
            if self.leading is not None and ids[1:2] == [self.leading]:
                ids = ids[1:]
                doubled = True
            row_ids[index] = ids if self.trailing is None else ids[:-1]
        report.doubled_specials += doubled


def _renders_as_text(tokenizer: Any) -> bool:
    """False for tokenizers with a way of their own (mistral-common): those turn conversations into ids directly."""
    return type(tokenizer).apply_chat_template.__module__ == "transformers.tokenization_utils_base"

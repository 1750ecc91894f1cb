"""Token log-probabilities of given responses under any model: what implicit rewards, density ratios and checks of a
sampler are made of."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpo.config.train_config import TrainConfig
from fastpo.data import prepare_examples
from fastpo.data.packing import PackedBatch, collate, pass_batches, set_sharing, sharing_mode
from fastpo.data.prepare import Example
from fastpo.data.rows import PROMPT_IDS, Unfinished, is_ids
from fastpo.data.sources import load_rows
from fastpo.errors import DataError, quoted
from fastpo.models import rotary
from fastpo.models.loading import load_model, load_tokenizer
from fastpo.models.modes import check_ids, eval_mode
from fastpo.models.policy import Policy
from fastpo.models.sharing import trunk_cost
from fastpo.models.verify import guard_rows, verify_or_unpack, verify_policy
from fastpo.training.distributed import World
from fastpo.training.memory import MAX_TOKENS, Budget, savings

T = TypeVar("T")

_RESPONSES = ("completion", "chosen", "rejected", "responses")


def sequence_logps(
    model: Any,
    rows: Any,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
    verify: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[np.ndarray]]:
    """log p(token | prompt, tokens before it) of every token of every response of every row.

    * `model`: a causal language model in memory (of transformers or PEFT), in the dtype and on the device where it is,
      or a name or path. Its mode and its attention are as before afterwards; nothing is trained, no gradient is kept.
    * `rows`: what `fastpo.train` takes, with `prompt` or `prompt_ids` and one of `completion`, `chosen` and `rejected`,
      or `responses` (entries with `text`, `messages` or `token_ids`, or their values alone). Texts, messages and token
      ids may stand side by side; equal responses are allowed.
    * `max_tokens`: of a micro-batch (default: 16,384 on a GPU, 2,048 on a CPU); halved where memory runs out.
    * `verify`: hold a few rows against the model's own logits first, as training does.
    * `progress`: called with (responses done, responses in all).

    Returns for each row, in the order of its responses (`chosen` before `rejected`), fp32 arrays [tokens]: of token ids
    as many as there are, of a text with the end that training would append to it. Responses of one prompt share it in
    one pass, wherever they stand, and no logits are kept. Call it under `torch.autocast` for another precision.
    DataError for a row that has no response, or one without tokens; UnsupportedModelError where the packed pass is not
    the model's own.
    """
    if not isinstance(model, nn.Module):
        name = os.fspath(model)
        tokenizer = processing_class or load_tokenizer(name)
        model = load_model(name)
    else:
        tokenizer = processing_class or load_tokenizer(getattr(model.config, "_name_or_path", ""))
    single = list(apart(load_rows(rows)))
    if not single:
        return []
    examples = prepared(single, tokenizer)
    out: list[np.ndarray] = [np.empty(0, np.float32)] * len(examples)

    def take(batch: PackedBatch, logp: np.ndarray) -> None:
        offsets = batch.response_offsets.tolist()
        for i, start, stop in zip(batch.examples, offsets, offsets[1:], strict=False):
            out[i] = logp[start:stop].copy()

    score(Policy(model), examples, take, max_tokens, verify_policy if verify else None, progress)
    return by_row(single, out)


# ---- of what fastpo.rewards is made too


def by_row(single: Sequence[tuple[int, Any]], values: Sequence[T]) -> list[list[T]]:
    """The responses' values, a list for each row; `single` as of `apart`."""
    out: list[list[T]] = [[] for _ in range(single[-1][0] + 1)]
    for (number, _), value in zip(single, values, strict=True):
        out[number].append(value)
    return out


def apart(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the row, a row with one completion) of every response."""
    for number, row in enumerate(rows):
        if row.get("prompt") is None and row.get(PROMPT_IDS) is None:
            raise DataError(f"row {number} has no prompt, after which a response is scored")
        names = ("prompt", PROMPT_IDS, "tools", "chat_template_kwargs")
        rest = {k: v for k, v in row.items() if k in names and v is not None}
        given = [(name, row[name]) for name in ("completion", "chosen", "rejected") if row.get(name) is not None]
        for k, entry in enumerate(row.get("responses") or ()):
            given.append((f"response {k}", _value(entry, f"row {number}: response {k}")))
        if not given:
            raise DataError(f"row {number} has no response: expected one of {', '.join(_RESPONSES)}")
        turns = _form(row.get("prompt")) == "turns"
        for what, response in given:
            if turns and isinstance(response, Unfinished):
                raise DataError(f"row {number}: {what} is not 'finished', and a chat template would end it: give its "
                                "'token_ids'")  # fmt: skip
            if turns and isinstance(response, str):
                response = [{"role": "assistant", "content": response}]
            yield number, {**rest, "completion": response}


def _form(value: Any) -> str:
    return "" if value is None else "text" if isinstance(value, str) else "ids" if is_ids(value) else "turns"


def _value(entry: Any, what: str) -> Any:
    """The token ids, turns or text of an entry of `responses`."""
    if not isinstance(entry, Mapping):
        return entry
    finished = entry.get("finished")
    if finished is not None and not isinstance(finished, bool):
        raise DataError(f"{what}: 'finished' must be true or false, not {finished!r}")
    value = next((entry[name] for name in ("token_ids", "messages", "text") if entry.get(name) is not None), None)
    if value is None:
        raise DataError(f"{what} needs 'text', 'messages' or 'token_ids', found {quoted(entry)}")
    return Unfinished(value) if finished is False and isinstance(value, str) else value


def prepared(single: Sequence[tuple[int, dict[str, Any]]], tokenizer: Any) -> list[Example]:
    """The example of each row with one completion; rows of one form are read together."""
    forms: dict[tuple, list[int]] = {}
    for at, (_, row) in enumerate(single):
        exact = row.get(PROMPT_IDS) is not None
        forms.setdefault((exact, _form(row.get("prompt")), exact or _form(row["completion"])), []).append(at)
    out: dict[int, Example] = {}
    for places in forms.values():
        try:
            found, _ = prepare_examples([single[at][1] for at in places], tokenizer, kind="sft", recognise=False)
        except DataError as error:  # which counts the rows of this part
            parts = re.split(r"(?<=\brow )(\d+)", str(error))
            parts[1::2] = [str(single[places[int(k)]][0]) for k in parts[1::2]]
            raise DataError("".join(parts)) from error
        out |= zip(places, found, strict=True)
    return [out[at] for at in range(len(single))]


def score(
    policy: Policy, examples: list[Example], take: Callable[[PackedBatch, np.ndarray], object],
    max_tokens: int | None, verify: Callable[[Policy, Sequence[Example]], None] | None,
    progress: Callable[[int, int], object],
) -> None:  # fmt: skip
    """Runs rows of one response each through a policy, packed, without gradient; `take` gets each micro-batch and what
    the policy reads of it, fp32. verify: the guard to hold a few rows against first."""
    check_ids(policy, examples, "given")
    policy.place(examples)
    device = policy.causal_lm.get_input_embeddings().weight.device
    most = max_tokens or MAX_TOKENS.get(device.type, MAX_TOKENS["cuda"])
    config = TrainConfig()
    bf16 = torch.is_autocast_enabled(device.type)
    cost = trunk_cost(policy, config, device.type, device, bf16=bf16, room=most)
    set_sharing(examples, sharing_mode("auto", cost), cost)
    rotary.unshare(policy.trunk, examples)
    budget = Budget(
        most, config, World(device), lambda training: savings(config, policy.model, policy.dtype, device, training),
        lambda _, row: f"response {row}",
    )  # fmt: skip
    done: set[int] = set()

    def work(part: list[int]) -> None:
        batch = collate(examples, part)
        take(batch, policy.read(batch.to(device)).float().cpu().numpy())
        done.update(part)

    parts: Iterable[list[int]] = pass_batches(examples, range(len(examples)), most)
    with torch.no_grad(), eval_mode(policy.model):
        if verify is not None:
            verify_or_unpack(policy, guard_rows(policy, examples[:2], examples), verify)
        with policy.attach():
            for _ in budget.passes(list(parts), examples, work):
                progress(len(done), len(examples))

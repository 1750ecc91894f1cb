"""Token log-probabilities of given responses under any model: what implicit rewards, density ratios and checks of a
sampler are made of."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpo.config.train_config import TrainConfig
from fastpo.data import prepare_examples
from fastpo.data.packing import collate, pass_batches, set_sharing, sharing_mode
from fastpo.data.prepare import Example
from fastpo.data.sources import load_rows
from fastpo.errors import DataError
from fastpo.models import rotary
from fastpo.models.loading import load_model, load_tokenizer
from fastpo.models.modes import check_ids, eval_mode
from fastpo.models.policy import Policy
from fastpo.models.sharing import trunk_cost
from fastpo.models.verify import guard_rows, verify_or_unpack
from fastpo.training.distributed import World
from fastpo.training.memory import MAX_TOKENS, Budget, savings

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
    * `rows`: what `fastpo.train` takes, with `prompt` and one of `completion`, `chosen` and `rejected`, or `responses`
      (texts, or entries with `text`): texts, messages or token ids. Equal responses are allowed.
    * `max_tokens`: of a micro-batch (default: 16,384 on a GPU, 2,048 on a CPU); halved where memory runs out.
    * `verify`: hold a few rows against the model's own logits first, as training does.
    * `progress`: called with (responses done, responses in all).

    Returns for each row, in the order of its responses (`chosen` before `rejected`), fp32 arrays [tokens]; the end that
    training would append to a text is the last of them. Responses of one prompt share it in one pass, wherever they
    stand, and no logits are kept. Call it under `torch.autocast` for another precision. DataError for a row that has
    no response, or one without tokens; UnsupportedModelError where the packed pass is not the model's own.
    """
    if not isinstance(model, nn.Module):
        name = os.fspath(model)
        tokenizer = processing_class or load_tokenizer(name)
        model = load_model(name)
    else:
        tokenizer = processing_class or load_tokenizer(getattr(model.config, "_name_or_path", ""))
    single = list(_apart(load_rows(rows)))
    if not single:
        return []
    prepared, _ = prepare_examples([row for _, row in single], tokenizer, kind="sft", recognise=False)
    policy = Policy(model)
    device = policy.causal_lm.get_input_embeddings().weight.device
    of_responses = _logps(policy, prepared, device, max_tokens, verify, progress)
    out: list[list[np.ndarray]] = [[] for _ in range(single[-1][0] + 1)]
    for (number, _), logp in zip(single, of_responses, strict=True):
        out[number].append(logp)
    return out


def _apart(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the row, a row with one completion) of every response."""
    for number, row in enumerate(rows):
        if row.get("prompt") is None:
            raise DataError(f"row {number} has no prompt, which log-probabilities of a response are given")
        rest = {k: v for k, v in row.items() if k in ("prompt", "tools", "chat_template_kwargs") and v is not None}
        given = [row[name] for name in ("completion", "chosen", "rejected") if row.get(name) is not None]
        if row.get("responses") is not None:
            given += [r["text"] if isinstance(r, Mapping) and "text" in r else r for r in row["responses"]]
        if not given:
            raise DataError(f"row {number} has no response: expected one of {', '.join(_RESPONSES)}")
        for response in given:
            yield number, {**rest, "completion": response}


def _logps(
    policy: Policy, examples: list[Example], device: torch.device, max_tokens: int | None, verify: bool,
    progress: Callable[[int, int], object],
) -> list[np.ndarray]:  # fmt: skip
    """Of the one response of each example."""
    check_ids(policy, examples, "given")
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
    out: list[np.ndarray] = [np.empty(0, np.float32)] * len(examples)

    def work(part: list[int]) -> None:
        batch = collate(examples, part)
        offsets = batch.response_offsets.tolist()
        logp = policy.logp(batch.to(device)).float().cpu().numpy()
        for i, start, stop in zip(batch.examples, offsets, offsets[1:], strict=False):
            out[i] = logp[start:stop].copy()

    parts: Iterable[list[int]] = pass_batches(examples, range(len(examples)), most)
    with torch.no_grad(), eval_mode(policy.model):
        if verify:
            verify_or_unpack(policy, guard_rows(policy, examples[:2], examples))
        with policy.attach():
            for _ in budget.passes(list(parts), examples, work):
                progress(sum(map(bool, map(len, out))), len(examples))
    return out

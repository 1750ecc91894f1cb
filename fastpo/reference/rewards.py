"""Rewards of given responses by a reward model: what best-of-n, judges and ensembles are made of."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpo.data.packing import PackedBatch
from fastpo.data.sources import load_rows
from fastpo.errors import ConfigError, DataError, UnsupportedModelError
from fastpo.models.loading import load_model, load_tokenizer
from fastpo.models.modes import eval_mode
from fastpo.models.scalar_head import RewardModel, has_scalar_head, head_is_new
from fastpo.models.verify_scalar import verify_rewards
from fastpo.reference.sequence_logps import apart, by_row, prepared, score
from fastpo.training.memory import MAX_TOKENS

log = logging.getLogger("fastpo")


def rewards(
    model: Any,
    rows: Any,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
    verify: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[float]]:
    """The reward of every response of every row, by a sequence classifier of one label.

    * `model`: in memory (of transformers or PEFT), in the dtype and on the device where it is, or a name or path, such
      as the output_dir of a run with loss_type=reward. Nothing of it is changed.
    * `rows`: what `fastpo.train` takes, with `prompt` and one of `completion`, `chosen` and `rejected`, or `responses`
      (texts, or entries with `text`): texts, messages or token ids. Equal responses are allowed.
    * `max_tokens`: of a micro-batch (default: 16,384 on a GPU, 2,048 on a CPU); halved where memory runs out.
    * `verify`: hold a few rows against the model's own forward first, as training does.
    * `progress`: called with (responses done, responses in all).

    Returns a list for each row, in the order of its responses (`chosen` before `rejected`): what the model's own
    forward gives for prompt, response and the end that training would append to a text. A causal model runs packed, and
    responses of one prompt share it, wherever they stand. One that cannot, and an encoder, run by their own forward in
    padded batches of about one length, which a warning says; to an encoder, prompt and response as texts are a pair of
    texts. ConfigError for more labels than one, or a head that nobody trained; DataError for a row without response.
    """
    if not isinstance(model, nn.Module):
        name = os.fspath(model)
        tokenizer = processing_class or load_tokenizer(name)
        model = load_model(name, scalar_head=True)
    else:
        tokenizer = processing_class or load_tokenizer(getattr(model.config, "_name_or_path", ""))
    _check(model)
    single = list(apart(load_rows(rows)))
    if not single:
        return []
    out = [0.0] * len(single)

    def take(batch: PackedBatch, found: np.ndarray) -> None:
        for i, value in zip(batch.examples, found.tolist(), strict=True):
            out[i] = value

    if not has_scalar_head(model):
        log.warning("%s is no causal classifier, so nothing is packed: padded batches, which is slower", _name(model))
        _padded(model, tokenizer, _encoded(tokenizer, single), out, max_tokens, progress)
        return by_row(single, out)
    examples = prepared(single, tokenizer)
    try:
        score(RewardModel(model), examples, take, max_tokens, verify_rewards if verify else None, progress)
    except UnsupportedModelError as error:
        log.warning("%s: padded batches of its own forward instead, which is slower", error)
        ids = [{"input_ids": [*e.prompt_ids.tolist(), *e.responses[0].tolist()]} for e in examples]
        _padded(model, tokenizer, ids, out, max_tokens, progress)
    return by_row(single, out)


def _name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def is_classifier(model: Any) -> bool:
    """Whether it is a sequence classifier of transformers or PEFT, which `rewards` takes."""
    return _name(model).endswith("ForSequenceClassification") or has_scalar_head(model)


def _check(model: Any) -> None:
    labels = getattr(getattr(model, "config", None), "num_labels", 1)
    if not is_classifier(model):
        raise ConfigError(
            f"{_name(model)} is no sequence classifier: load a reward model with AutoModelForSequenceClassification"
        )
    if labels != 1:
        raise ConfigError(f"{_name(model)} has num_labels={labels}, and a reward is one number")
    if head_is_new(model):
        raise ConfigError(
            f"{_name(model)}: the checkpoint has no scalar head, and a random one says nothing: train it with "
            "loss_type=reward"
        )


def _encoded(tokenizer: Any, single: Sequence[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What an encoder reads of each response: a pair of texts, the conversation, or the token ids in a row."""
    out = []
    for number, row in single:
        prompt, response = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(response, str):
            out.append(dict(tokenizer(prompt, response)))
        elif prompt and isinstance(prompt[0], Mapping):
            turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
            if not getattr(tokenizer, "chat_template", None):
                raise DataError(f"row {number} is a conversation, and the tokenizer has no chat template")
            out.append(dict(tokenizer.apply_chat_template([*prompt, *turns], return_dict=True)))
        elif isinstance(prompt, str):
            raise DataError(f"row {number}: the prompt is a text and the response is not")
        else:
            out.append({"input_ids": [*prompt, *response]})
    return out


def _padded(
    model: Any, tokenizer: Any, encoded: Sequence[dict[str, Any]], out: list[float], max_tokens: int | None,
    progress: Callable[[int, int], object],
) -> None:  # fmt: skip
    """By the model's own forward, longest first, so that running out of memory shows at once."""
    device = model.get_input_embeddings().weight.device
    most = max_tokens or MAX_TOKENS.get(device.type, MAX_TOKENS["cuda"])
    pads = model.config.get_text_config().pad_token_id
    pad = pads if pads is not None else getattr(tokenizer, "pad_token_id", None)
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
    causal, done = has_scalar_head(model), 0
    with torch.no_grad(), eval_mode(model):
        while done < len(order):
            longest = len(encoded[order[done]]["input_ids"])
            alone = pad is None or (causal and pads is None)  # what finds its last token by the padding cannot do more
            part = order[done : done + (1 if alone else max(1, most // longest))]
            batch = _batch([encoded[i] for i in part], longest, pad or 0, device)
            logits = model(**batch).logits.reshape(len(part)).float().tolist()
            for i, value in zip(part, logits, strict=True):
                out[i] = value
            done += len(part)
            progress(done, len(order))


def _batch(rows: Sequence[dict[str, Any]], longest: int, pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The rows padded to `longest` on the right, by the names of the model's arguments."""
    out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for row in rows:
        ids = list(row["input_ids"])
        more = longest - len(ids)
        out["input_ids"].append([*ids, *[pad] * more])
        out["attention_mask"].append([*[1] * len(ids), *[0] * more])
        if "token_type_ids" in row:
            out.setdefault("token_type_ids", []).append([*row["token_type_ids"], *[0] * more])
    return {name: torch.tensor(values, device=device) for name, values in out.items()}

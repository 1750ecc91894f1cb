"""Samples of a policy in this process, through transformers: left-padded batches by length, each row with its own seed.

The same requests give the same bytes, in whichever order and process: the batches are a plan of the requests alone, and
a batch is asked whole, even where some of its responses are there already.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fastpo.data.encoding import Encoder
from fastpo.errors import ConfigError
from fastpo.models.loading import load_model, load_tokenizer
from fastpo.models.modes import eval_mode
from fastpo.reference.cache import model_fingerprint
from fastpo.sampling.decoding import Mixture, decode
from fastpo.sampling.drawing import Draw, before_stop
from fastpo.sampling.items import Failure, Request, Response, digest
from fastpo.training.memory import is_out_of_memory
from fastpo.training.samples import end_ids, plain_generation

log = logging.getLogger("fastpo")

BATCH_SIZE = 32
LOADING = (
    "dtype",
    "device",
    "use_cpu",
    "attn_implementation",
    "trust_remote_code",
    "revision",
    "quantization_config",
    "model_init_kwargs",
)  # of load_model


class LocalSampler:
    """A Sampler of a model by name or path, or in memory, in the dtype and on the device where it is.

    * `batch_size`: prompts of a batch; a request with a contrast has two rows.
    * `batch_tokens`: a bound on rows times (longest prompt + max_tokens) of a batch, in the place of memory's.
    * `mixture`: tokens are drawn from softmax((1 - mixture) logits of the policy + mixture logits of `reference`), as
      IPO-MD and Nash-MD have it; the reference is another model in memory, or a function without arguments whose
      context manager makes of the policy its reference, entered for every forward pass of it. 1: of the reference
      alone, the policy is not run; 0: of the policy alone. `logp` and `token_logps` are the policy's, but at 1, where
      they are the reference's.
    * `live`: the model is trained between calls: `key` does not say which weights it has. Nothing else of a model in
      memory is kept from one call to the next, live or not.
    * `loading`: what `load_model` takes (LOADING).

    The model is loaded when it is first asked. Its modes, settings and attention, and the random state, are as before
    after every batch. A policy that is attached for training is sampled from inside `policy.detached()`, and in the
    precision of an autocast that was entered.
    """

    exact = True

    def __init__(
        self, model: Any, tokenizer: Any = None, *, batch_size: int = BATCH_SIZE, batch_tokens: int | None = None,
        mixture: float = 0.0, reference: nn.Module | Callable[[], AbstractContextManager[Any]] | None = None,
        live: bool = False, **loading: Any,
    ):  # fmt: skip
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens or 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"sample.{name} must be a whole number from 1 on, not {value!r}")
        if isinstance(mixture, bool) or not isinstance(mixture, int | float) or not 0 <= mixture <= 1:
            raise ConfigError(f"mixture must be from 0 (the policy) to 1 (the reference), not {mixture!r}")
        if mixture and reference is None:
            raise ConfigError(f"mixture={mixture:g} needs a reference: a model in memory, or what makes the policy it")
        self.batch_size, self.batch_tokens, self.mixture, self.live = batch_size, batch_tokens, float(mixture), live
        self._reference = reference
        self._given, self._loading = model, loading
        self._model: nn.Module | None = model if isinstance(model, nn.Module) else None
        self._tokenizer = tokenizer
        self._fits: int | None = None  # rows that did fit, where a batch did not

    @cached_property
    def tokenizer(self) -> Any:
        if self._tokenizer is not None:
            return self._tokenizer
        config = getattr(self._given, "config", None)
        name = getattr(config, "_name_or_path", "") if isinstance(self._given, nn.Module) else os.fspath(self._given)
        return load_tokenizer(name, trust_remote_code=bool(self._loading.get("trust_remote_code")))

    @cached_property
    def key(self) -> Mapping[str, Any]:
        if not isinstance(self._given, nn.Module):
            name = os.fspath(self._given)
        else:
            name = "in memory, trained" if self.live else f"in memory: {model_fingerprint(self._given)}"
        return {
            "engine": "transformers", "model": name, "tokens": "ids", "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens, "loading": {k: str(v) for k, v in sorted(self._loading.items())},
            "template": digest(getattr(self.tokenizer, "chat_template", None)),
        } | ({"mixture": self.mixture} if self.mixture else {})  # fmt: skip

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """By length, the longest first: where memory is too small, that is known at once. Those of a prompt are beside
        each other. What this gives of one of its batches is that batch."""
        order = sorted(requests, key=_place)
        out: list[list[Request]] = []
        width = 0
        for request in order:
            width = max(_length(request) + request.max_tokens, width if out else 0)
            full = bool(out) and (
                len(out[-1]) >= self.batch_size
                or (self.batch_tokens is not None and _rows([*out[-1], request]) * width > self.batch_tokens)
            )
            if not out or full:
                out.append([])
                width = _length(request) + request.max_tokens
            out[-1].append(request)
        return out

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Response | Failure]]:
        """In the order of the plan. TrainingError where the policy's logits are not finite."""
        contrasted = next((r for r in requests if r.contrast_ids is not None), None) if self.mixture else None
        if contrasted is not None:
            raise ConfigError(f"source {contrasted.source!r} mixes the logits of two prompts, which a mixture cannot")
        for batch in self.batches(requests):
            yield from self._batch(batch)

    def close(self) -> None:
        """Lets go of a model that it loaded."""
        if not isinstance(self._given, nn.Module):
            self._model = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # ---- one batch

    def _batch(self, batch: Sequence[Request]) -> list[tuple[Request, Response | Failure]]:
        limit = self._positions()
        can: list[Request] = []
        out: dict[tuple[str, str, int], Response | Failure] = {}
        for request in batch:
            failure = self._why_not(request, limit)
            if failure is None:
                can.append(request)
            else:
                out[request.unit] = failure
        out.update(zip((r.unit for r in can), self._within_memory(can, limit), strict=True))
        return [(request, out[request.unit]) for request in batch]

    def _why_not(self, request: Request, limit: int | None) -> Failure | None:
        if not request.prompt_ids or request.contrast_ids == ():
            return Failure("error", "the prompt has no tokens")
        if limit is not None and _length(request) >= limit:
            return Failure("error", f"the prompt has {_length(request)} tokens, the model {limit} positions")
        known = self.model.get_input_embeddings().weight.shape[0]
        if max((*request.prompt_ids, *(request.contrast_ids or ()))) >= known:
            raise ConfigError(
                f"prompt {request.id} holds a token that is none of the model's {known}: use the model's own tokenizer"
            )
        return None

    def _within_memory(self, batch: list[Request], limit: int | None) -> list[Response]:
        """All of a batch, in halves where memory runs out."""
        if not batch:
            return []
        if self._fits is None or len(batch) <= self._fits:
            try:
                return self._generate(batch, limit)
            except Exception as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            # Outside the handler, whose traceback holds the tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._fits = len(batch) // 2
            log.warning(
                "sample: a batch of %d did not fit into memory; batches are asked in parts of %d from here on. A run "
                "that is stopped and resumed may then differ from an unbroken one in the last bits: set "
                "sample.batch_size=%d for the same bytes", len(batch), self._fits, self._fits,
            )  # fmt: skip
        fits = self._fits
        parts = [batch[start : start + fits] for start in range(0, len(batch), fits)]
        return [response for part in parts for response in self._within_memory(part, limit)]

    def _generate(self, batch: Sequence[Request], limit: int | None) -> list[Response]:
        model, tokenizer, reference = self.model, self.tokenizer, self._reference
        within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        if isinstance(reference, nn.Module):
            of_it: Any = reference
        else:
            of_it, within = model, reference or within
        device = model.get_input_embeddings().weight.device
        own = end_ids(getattr(model, "generation_config", None), tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (own or [0])[0]
        rooms = [r.max_tokens if limit is None else min(r.max_tokens, limit - _length(r)) for r in batch]
        ends = [{*own} if isinstance(r.prompt, str) else {*own, *self._turn_ends} for r in batch]
        mix = Mixture(of_it, within, self.mixture) if 0 < self.mixture < 1 else None
        draw = Draw(batch, rooms, ends, pad, lambda ids: tokenizer.decode(ids), device, mix)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self.mixture == 1:
                model = of_it
                stack.enter_context(within())
            for one in {id(m): m for m in (model, of_it)}.values():
                stack.enter_context(eval_mode(one))
            stack.enter_context(plain_generation(model))
            decode(model, draw, device)
        return [self._response(draw, i) for i in range(len(batch))]

    def _response(self, draw: Draw, i: int) -> Response:
        request, tokens, logps = draw.requests[i], draw.tokens[i], draw.logps[i]
        text = before_stop(self.tokenizer.decode(tokens, skip_special_tokens=True), request.stop)
        return Response(
            text, tuple(tokens), draw.finished[i], sum(logps, 0.0), request.source, token_logps=logps
        )  # fmt: skip

    # ---- the model

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = load_model(self._given, **self._loading)
        return self._model

    def _positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def _turn_ends(self) -> set[int]:
        """The tokens with which the chat template ends the assistant's turn, which may be others than the EOS."""
        return {token for token in Encoder(self.tokenizer, True).ending_ids if token is not None}


def _length(request: Request) -> int:
    return max(len(request.prompt_ids), len(request.contrast_ids or ()))


def _rows(batch: Sequence[Request]) -> int:
    return sum(1 + (request.contrast_ids is not None) for request in batch)


def _place(request: Request) -> tuple[Any, ...]:
    contrast = request.contrast_ids or ()
    return (-_length(request), request.prompt_ids, contrast, request.id, request.source, request.k)

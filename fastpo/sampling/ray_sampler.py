"""Samples of vLLM on many machines, through Ray Data's batch inference (`ray.data.llm`).

Prompts go in as token ids and ids come out. The result of a row says nothing of why it ended, so that is read from its
ids. The part that runs vLLM itself has not been run by this project: it needs a GPU.
"""

import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import GenerationConfig

from fastpo.data.encoding import Encoder
from fastpo.errors import ConfigError
from fastpo.models.loading import load_tokenizer
from fastpo.sampling.drawing import before_stop
from fastpo.sampling.items import Failure, Request, Response, digest
from fastpo.training.samples import end_ids

_ERROR = "__inference_error__"  # the column of rows that failed, of Ray


class RaySampler:
    """A Sampler of `replicas` vLLM engines, in the Ray cluster that `ray.init` finds (RAY_ADDRESS), or one made here.

    * `policy`: a folder that every machine sees, or a name.
    * `engine_kwargs`: vLLM's: tensor_parallel_size, max_model_len, dtype, ...
    * `batch_size`: rows of a batch; an engine has several under way.
    * `processor`: in the place of vLLM's, what makes of a Ray dataset one with vLLM's columns.

    ConfigError where ray is not installed.
    """

    exact = False

    def __init__(
        self, policy: str | os.PathLike[str], tokenizer: Any = None, *, replicas: int = 1, batch_size: int = 64,
        engine_kwargs: Mapping[str, Any] | None = None, processor: Callable[[Any], Any] | None = None,
    ):  # fmt: skip
        try:
            import ray
            import ray.data
        except ModuleNotFoundError as error:
            raise ConfigError(f"sample.engine=ray needs {error.name}: pip install 'fastpo[ray]'") from None
        for name, value in (("replicas", replicas), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"sample.{name} must be a whole number from 1 on, not {value!r}")
        self._ray, self.policy, self._tokenizer = ray, os.fspath(policy), tokenizer
        self.replicas, self.batch_size, self.engine_kwargs = replicas, batch_size, dict(engine_kwargs or {})
        self._processor = processor
        self._began = False  # whether the cluster is one that it made

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.policy) if self._tokenizer is None else self._tokenizer

    @cached_property
    def key(self) -> Mapping[str, Any]:
        return {"engine": "ray", "model": self.policy, "tokens": "ids", "engine_kwargs": self.engine_kwargs,
                "template": digest(getattr(self.tokenizer, "chat_template", None))}  # fmt: skip

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Those of a prompt beside each other, so that an engine finds its prefix again."""
        return [sorted(requests, key=lambda r: (r.prompt_ids, r.id, r.source, r.k))]

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Response | Failure]]:
        """As Ray hands the rows on. A row that does not come back is a failure."""
        contrasted = next((r for r in requests if r.contrast_ids is not None), None)
        if contrasted is not None:
            raise ConfigError(
                f"source {contrasted.source!r} mixes the logits of two prompts, which vLLM cannot: take "
                "sample.engine=local for it"
            )
        if not requests:
            return
        order = self.batches(requests)[0]
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, include_dashboard=False)
            self._began = True
        rows = [{"number": i, "tokenized_prompt": list(r.prompt_ids), "sampling_params": self._params(r)}
                for i, r in enumerate(order)]  # fmt: skip
        missing = set(range(len(order)))
        for row in self._process(self._ray.data.from_items(rows)).iter_rows():
            number = int(row["number"])
            if number in missing:
                missing.discard(number)
                yield order[number], self._answer(row, order[number])
        for number in sorted(missing):
            yield order[number], Failure("error", "Ray gave no row for it")

    def close(self) -> None:
        """Ends a cluster that it made."""
        if self._began:
            self._began = False
            self._ray.shutdown()

    def _process(self, dataset: Any) -> Any:
        if self._processor is None:
            from ray.data.llm import build_processor, vLLMEngineProcessorConfig

            config = vLLMEngineProcessorConfig(
                model_source=self.policy, engine_kwargs=self.engine_kwargs, concurrency=self.replicas,
                batch_size=self.batch_size, should_continue_on_error=True, chat_template_stage=False,
                tokenize_stage=False, detokenize_stage=False,
            )  # fmt: skip
            self._processor = build_processor(config, preprocess=_as_it_is, postprocess=_kept)
        return self._processor(dataset)

    def _params(self, request: Request) -> dict[str, Any]:
        """vLLM's SamplingParams, the neutral ones too: what is left out is the checkpoint's own."""
        ends = sorted(self._ends)
        given = {"n": 1, "temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k or -1,
                 "min_p": request.min_p, "repetition_penalty": request.repetition_penalty, "seed": request.seed,
                 "max_tokens": request.max_tokens, "logprobs": 0}  # fmt: skip
        return (
            given | ({"stop": list(request.stop)} if request.stop else {}) | ({"stop_token_ids": ends} if ends else {})
        )

    def _answer(self, row: Mapping[str, Any], request: Request) -> Response | Failure:
        if row.get(_ERROR):
            return Failure("error", str(row[_ERROR])[:500])
        ids, text = [int(i) for i in row["generated_tokens"]], row.get("generated_text")
        if not ids or not isinstance(text, str):
            return Failure("unparsed", f"{len(ids)} tokens, text {text!r}"[:500])
        stopped = bool(request.stop) and any(s in self.tokenizer.decode(ids) for s in request.stop)
        logp, logps = row.get("logp"), row.get("logps")
        logps = None if logps is None or len(logps) != len(ids) else array("d", map(float, logps))
        return Response(before_stop(text, request.stop), tuple(ids), ids[-1] in self._ends or stopped,
                        None if logp is None else float(logp), request.source, token_logps=logps)  # fmt: skip

    @cached_property
    def _ends(self) -> set[int]:
        try:
            settings = GenerationConfig.from_pretrained(self.policy)
        except (OSError, ValueError):
            settings = None
        ends = set(end_ids(settings, self.tokenizer))
        if getattr(self.tokenizer, "chat_template", None):
            ends |= {token for token in Encoder(self.tokenizer, True).ending_ids if token is not None}
        return ends


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """Of vLLM's columns what a response is made of, on the machine where they are; of log-probabilities those of the
    tokens that were drawn."""
    ids, steps = list(row.get("generated_tokens", ())), row.get("logprobs")
    values = []
    for token, step in zip(ids, () if steps is None else steps, strict=False):
        found = dict(step).get(int(token), dict(step).get(str(token)))
        values.append(None if found is None else found["logprob"])
    whole = len(values) == len(ids) > 0 and all(value is not None for value in values)
    logps = [math.nan if value is None else float(value) for value in values] if len(values) == len(ids) else []
    return {"number": row["number"], "generated_tokens": ids, "generated_text": row.get("generated_text", ""),
            "logp": float(sum(values)) if whole else None, "logps": logps,
            _ERROR: str(row.get(_ERROR) or "")}  # fmt: skip

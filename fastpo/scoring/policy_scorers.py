"""Scorers that are models of transformers in this process: reward models, and ratios of two policies' log-probabilities
(DICE's implicit reward, arXiv:2406.09760; the density ratio of arXiv:2411.02481).

Each model sees prompt and response through its own tokenizer and chat template, or as the tokens that were sampled. A
template that drops or changes one of the texts, so that something else would be scored, makes a failed verdict.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from fastpo.data import prepare_examples
from fastpo.data.content import has_text
from fastpo.data.encoding import Encoder
from fastpo.errors import ConfigError, DataError, did_you_mean, one_line, quoted
from fastpo.models.adapters import saved_adapter
from fastpo.models.loading import load_model, load_tokenizer, loading_dtype, resolve_device
from fastpo.reference.rewards import is_classifier
from fastpo.reference.rewards import rewards as packed_rewards
from fastpo.reference.sequence_logps import sequence_logps
from fastpo.sampling.items import Failure, Item, Response, Scores, Unit, Verdict, digest
from fastpo.sampling.make import prompt_ids
from fastpo.sampling.parts import file_digest
from fastpo.scoring.scoring import RAW, BaseScorer
from fastpo.selection import length_penalty

log = logging.getLogger("fastpo")

Ids = tuple[list[int], list[int]]  # of the prompt, of the response
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf", ".model", ".json", ".jinja", ".txt")
_NO_WEIGHTS = ("trainer_state.json", "run.json", "all_results.json", "optimizer", "scheduler", "rng_state", "README")
_digests: dict[tuple[str, int, int], str] = {}


def weights_key(path: str) -> dict[str, str]:
    """What a model by name or path is: the digest of a folder's weights, configuration and tokenizer; of a name of the
    hub, the commit that is in the local cache. The base of an adapter is part of it."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json")
        return {"name": path} | ({"commit": Path(found).parent.name} if isinstance(found, str) else {})
    digests = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _WEIGHTS and not file.name.startswith(_NO_WEIGHTS):
            stat = file.stat()
            known = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
            if known not in _digests:
                _digests[known] = file_digest(file)
            digests[file.name] = _digests[known]
    adapter = saved_adapter(path)
    base = {} if adapter is None else {"base": digest(weights_key(str(adapter.base_model_name_or_path)))}
    return {"files": digest(digests)} | base


# ---- what a model sees


def as_row(prompt: Any, text: str, chat: bool, criterion: str | None = None) -> dict[str, Any]:
    """A row of one completion: turns for a model with a chat template, texts for one without. The criterion is the
    system's turn, before what stands there already, or a paragraph before the text."""
    if isinstance(prompt, str) and not chat:
        return {"prompt": f"{criterion}\n\n{prompt}" if criterion else prompt, "completion": text}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    if criterion:
        own, turns = ([turns[0]["content"]], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
        turns = [{"role": "system", "content": "\n\n".join([criterion, *own])}, *turns]
    return {"prompt": turns, "completion": [{"role": "assistant", "content": text}]}


class _Reader:
    """Rows to token ids as one model reads them."""

    def __init__(self, tokenizer: Any, name: str):
        self.tokenizer, self.name = tokenizer, name
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self._ends: set[int] | None = None

    def ids(self, rows: Sequence[Mapping[str, Any]]) -> list[Ids | Failure]:
        """Token ids of each row, the end that training appends included; a Failure for one that cannot be rendered, or
        whose texts are not in what the template writes."""
        found: list[Ids | Failure | None] = [self._unseen(row) for row in rows]
        whole = [n for n, failure in enumerate(found) if failure is None]
        for n, ids in zip(whole, self._encoded([rows[n] for n in whole]), strict=True):
            found[n] = ids
        return [f if f is not None else Failure("unreadable") for f in found]

    def _encoded(self, rows: Sequence[Mapping[str, Any]]) -> list[Ids | Failure]:
        if not rows:
            return []
        try:
            examples, _ = prepare_examples(list(rows), self.tokenizer, kind="sft", recognise=False)
        except DataError as error:
            if len(rows) == 1:
                return [Failure("unreadable", one_line(error)[:RAW])]
            return [self._encoded([row])[0] for row in rows]
        return [(e.prompt_ids.tolist(), e.responses[0].tolist()) for e in examples]

    def _unseen(self, row: Mapping[str, Any]) -> Failure | None:
        if isinstance(row["prompt"], str):
            return None if row["completion"] else Failure("empty", "")
        turns = [*row["prompt"], *row["completion"]]
        if not turns[-1]["content"].strip():
            return Failure("empty", "")
        if not self.chat:
            raise ConfigError(f"{self.name} has no chat template, and the prompts are conversations")
        try:
            written = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # whatever a template raises
            return Failure("unreadable", one_line(error)[:RAW])
        for turn in (turns[-1], *reversed(turns[:-1])):
            if not has_text(written, turn["content"]):
                message = f"the template of {self.name} does not write this {turn['role']}'s text: {written}"
                return Failure("not_seen", message[:RAW])
        return None

    def without_end(self, ids: Sequence[int]) -> list[int]:
        """The tokens before the first of those that end a response at its end."""
        if self._ends is None:
            self._ends = {i for i in Encoder(self.tokenizer, self.chat).ending_ids if i is not None}
        ids = list(ids)
        ends = [n for n in range(max(len(ids) - 3, 0), len(ids)) if ids[n] in self._ends]
        return ids[: ends[0]] if ends else ids


# ---- reward models


class RewardModelScorer(BaseScorer):
    """A sequence classifier of one label, as `loss_type=reward` and TRL's RewardTrainer train them.

    * `path`: name or folder. `label`: which of several labels' logits is the reward, by number or name.
    * `max_length`: tokens of prompt and response; what is longer is failed ("too_long"), never cut.
    * `batch_size`: of the model's own padded forward, of several labels.
    * `model`: in memory, in place of the one at `path`: any module whose output has `logits`; it stays on its device
      where none is given. `tokenizer`: in place of the one that lies at `path`.
    """

    cached = True

    def __init__(
        self, name: str, path: str, *, batch_size: int = 16, max_length: int | None = None,
        label: int | str | None = None, dtype: str | None = None, device: str | None = None, model: Any = None,
        tokenizer: Any = None,
    ):  # fmt: skip
        self.name, self.path, self.batch_size, self.max_length = name, str(path), batch_size, max_length
        self.label: Any = label
        self.dtype, self.device = dtype, device
        self.given, self.tokenizer = model, tokenizer
        self.cached = model is None  # nobody knows another model in memory from this one
        self._loaded: tuple[Any, _Reader] | None = None

    @property
    def key(self) -> Mapping[str, Any]:
        model = weights_key(self.path) if self.given is None else {"in_memory": type(self.given).__name__}
        return {"reward_model": model, "label": self.label, "dtype": self.dtype,
                "max_length": self.max_length}  # fmt: skip

    def content(self, unit: Unit) -> Any:
        return {k: v for k, v in super().content(unit).items() if k != "meta"}

    def load(self) -> tuple[Any, _Reader]:
        """The model and how it reads; loaded once. ConfigError for what is no reward model."""
        if self._loaded is not None:
            return self._loaded
        model = self._from_path() if self.given is None else getattr(self.given, "_orig_mod", self.given)
        if getattr(model, "config", None) is None:
            raise ConfigError(f"scorer {self.name!r}: {type(model).__name__} has no config: it is no reward model")
        self._check_label(model)
        if not self.path and self.tokenizer is None:
            raise ConfigError(f"scorer {self.name!r}: the model in memory does not say where its tokenizer is: pass it")
        tokenizer = self.tokenizer or load_tokenizer(self.path)
        if self.given is None or self.device is not None:
            model = model.to(resolve_device(self.device))
        self._loaded = model.eval(), _Reader(tokenizer, f"the reward model {self.path or self.name!r}")
        return self._loaded

    def _from_path(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.path, dtype=loading_dtype(self.dtype, {}), output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"scorer {self.name!r}: cannot load {self.path!r}: {one_line(error)}") from error
        if info["missing_keys"]:
            raise ConfigError(
                f"scorer {self.name!r}: {self.path!r} is no reward model: it has no weights for "
                f"{quoted(sorted(info['missing_keys'])[:3])}, which would be random"
            )
        return model

    def _check_label(self, model: Any) -> None:
        if not hasattr(model.config, "id2label"):
            return
        labels = {str(v): k for k, v in model.config.id2label.items()}
        if isinstance(self.label, str):
            if self.label not in labels:
                raise ConfigError(f"scorer {self.name!r}: label={self.label!r}{did_you_mean(self.label, labels)}")
            self.label = labels[self.label]
        if self.label is None and model.config.num_labels != 1:
            raise ConfigError(
                f"scorer {self.name!r}: {self.path!r} has the labels {quoted(labels)}: set `label` to the one whose "
                "logit is the reward"
            )
        if self.label is not None and not 0 <= self.label < model.config.num_labels:
            raise ConfigError(f"scorer {self.name!r}: label={self.label} of {model.config.num_labels} labels")

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        model, reader = self.load()
        rows = [as_row(u.item.prompt, u.responses[0].text, reader.chat) for u in units]
        limit = self.max_length or getattr(model.config, "max_position_embeddings", None)
        ids: list[Ids] = []
        at: list[int] = []
        for n, found in enumerate(reader.ids(rows)):
            if isinstance(found, Failure):
                yield units[n], Verdict.failed(found.status, found.raw)
            elif limit and sum(map(len, found)) > limit:
                size = sum(map(len, found))
                yield units[n], Verdict.failed("too_long", f"{size} tokens of at most {limit}")
            else:
                ids.append(found)
                at.append(n)
        for n, value in zip(at, self._rewards(model, reader.tokenizer, ids), strict=True):
            finite = value == value and abs(value) != float("inf")
            yield units[n], Verdict(value) if finite else Verdict.failed("not_finite", repr(value))

    def _rewards(self, model: Any, tokenizer: Any, ids: Sequence[Ids]) -> list[float]:
        if not ids:
            return []
        if model.config.num_labels == 1 and is_classifier(model):
            rows = [{"prompt": prompt, "completion": response} for prompt, response in ids]
            return [float(values[0]) for values in packed_rewards(model, rows, processing_class=tokenizer)]
        return self._padded(model, tokenizer, [prompt + response for prompt, response in ids])

    def _padded(self, model: Any, tokenizer: Any, ids: Sequence[list[int]]) -> list[float]:
        """The model's own forward, in batches of about one length, padded on the right."""
        pad = model.config.pad_token_id
        size = self.batch_size if pad is not None else 1  # without it the model does not know where a row ends
        order = sorted(range(len(ids)), key=lambda n: (len(ids[n]), n))
        out = [0.0] * len(ids)
        with torch.no_grad():
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                longest = max(len(ids[n]) for n in rows)
                tokens = torch.full((len(rows), longest), 0 if pad is None else pad, dtype=torch.long)  # [B, L]
                mask = torch.zeros_like(tokens)
                for b, n in enumerate(rows):
                    tokens[b, : len(ids[n])] = torch.tensor(ids[n])
                    mask[b, : len(ids[n])] = 1
                logits = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)).logits
                for n, value in zip(rows, logits[:, self.label or 0].float().tolist(), strict=True):
                    out[n] = value
        return out

    def close(self) -> None:
        self._loaded = None  # a model in memory is its owner's


# ---- log-probabilities of policies


class Kept(Protocol):
    """A store of numbers by key, across runs."""

    def get(self, keys: Sequence[str]) -> dict[str, Verdict]: ...
    def put(self, verdicts: Mapping[str, Verdict]) -> None: ...


class _Policy:
    """A causal model by name or path: sums of log-probabilities, each computed once."""

    def __init__(self, name: str, path: str, dtype: str | None, device: str | None):
        self.name, self.path, self.dtype, self.device = name, str(path), dtype, device
        self._model: Any = None
        self._reader: _Reader | None = None

    @property
    def key(self) -> dict[str, Any]:
        return {**weights_key(self.path), "dtype": self.dtype}

    @property
    def reader(self) -> _Reader:
        if self._reader is None:
            self._reader = _Reader(load_tokenizer(self.path), f"the policy {self.name!r}")
        return self._reader

    def sums(self, ids: Sequence[Ids], kept: Kept | None) -> list[float]:
        """log p(response | prompt), summed over the response's tokens, of each; 0 of an empty response."""
        device = str(resolve_device(self.device).type)
        keys = [digest({"logp": self.key, "device": device, "ids": pair}) for pair in ids]
        known = kept.get(keys) if kept is not None else {}
        # All or none: how rows are packed together moves the last bits, and a run that was killed must not differ.
        if len(known) < len(set(keys)):
            known = self._computed(ids, keys)
            if kept is not None:
                kept.put(known)
        return [float(known[key].value) for key in keys]  # type: ignore[arg-type]

    def _computed(self, ids: Sequence[Ids], keys: Sequence[str]) -> dict[str, Verdict]:
        if self._model is None:
            self._model = load_model(self.path, dtype=self.dtype, device=self.device).eval()
        there = [n for n, (_, response) in enumerate(ids) if response]
        rows = [{"prompt": ids[n][0], "completion": ids[n][1]} for n in there]
        found = sequence_logps(self._model, rows, processing_class=self.reader.tokenizer) if rows else []
        out = {key: Verdict(0.0) for key in keys}
        out |= {keys[n]: Verdict(float(logps[0].sum(dtype="float64"))) for n, logps in zip(there, found, strict=True)}
        return out

    def close(self) -> None:
        self._model = None


class _Ratio(BaseScorer):
    """What the two ratios share."""

    def __init__(self, name: str, first: tuple[str, str], second: tuple[str, str], end: str,
                 dtype: str | None, device: str | None):  # fmt: skip
        if end not in ("include", "mask"):
            raise ConfigError(f"scorer {name!r}: end={end!r}: expected include or mask")
        self.name, self.end = name, end
        self.first, self.second = (_Policy(*of, dtype, device) for of in (first, second))
        self.kept: Kept | None = None  # set by the score stage

    def _ended(self, reader: _Reader, ids: Ids, finished: bool) -> Ids:
        """Without an end where it is masked, or where the response had none."""
        return (ids[0], reader.without_end(ids[1])) if self.end == "mask" or not finished else ids

    def close(self) -> None:
        self.first.close()
        self.second.close()


class ImplicitReward(_Ratio):
    """DICE's reward: log pi(y|x) - log pi_ref(y|x), summed over tokens and without beta, less `alpha` a character.

    * `policy`, `reference`: (name, path) of two policies with one tokenizer: in iteration t those of t and t - 1.
    * `alpha`: the penalty per character of the text, or "auto": `selection.length_penalty` over the whole stage.
    * Responses that were sampled are read as the tokens that were sampled (`prompt_ids`, `token_ids`), others through
      the policy's template. `end`: "include" counts the token that ends a response, "mask" does not; a response that
      did not end has none.
    """

    def __init__(
        self, name: str, policy: tuple[str, str], reference: tuple[str, str], *, alpha: float | Literal["auto"] = 0.0,
        end: str = "include", dtype: str | None = None, device: str | None = None,
    ):  # fmt: skip
        super().__init__(name, policy, reference, end, dtype, device)
        if alpha != "auto" and not (isinstance(alpha, int | float) and 0 <= alpha < float("inf")):
            raise ConfigError(f"scorer {name!r}: alpha={alpha!r}: expected a number from 0 on, or 'auto'")
        self.alpha = alpha
        self._compared: list[bool] = []  # whether the policy's tokenizer reads sampled tokens as their text

    @property
    def key(self) -> Mapping[str, Any]:
        return {"implicit": self.first.key, "reference": self.second.key, "alpha": self.alpha, "end": self.end}

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        ids, at = [], []
        for n, found in enumerate(self._ids(units)):
            if isinstance(found, Failure):
                yield units[n], Verdict.failed(found.status, found.raw)
            else:
                ids.append(found)
                at.append(n)
        log_pi, log_ref = self.first.sums(ids, self.kept), self.second.sums(ids, self.kept)
        for n, pi, ref in zip(at, log_pi, log_ref, strict=True):
            yield units[n], _finite(pi - ref, {"policy": pi, "reference": ref})

    def _ids(self, units: Sequence[Unit]) -> list[Ids | Failure]:
        reader = self.first.reader
        found: list[Ids | Failure] = [Failure("empty", "")] * len(units)
        read = []  # what was not sampled
        for n, unit in enumerate(units):
            sampled = unit.responses[0].token_ids
            if sampled is None:
                read.append(n)
            elif len(sampled):
                self._check_tokens(unit.responses[0])
                own = unit.item.prompt_ids
                if own is None:
                    own = prompt_ids(reader.tokenizer, unit.item.prompt)
                found[n] = (list(own), list(sampled))
        # A text is a text, as in sampling and in training, and turns go through the template.
        for chat in (False, True):
            part = [n for n in read if isinstance(units[n].item.prompt, str) != chat]
            rows = [as_row(units[n].item.prompt, units[n].responses[0].text, chat) for n in part]
            for n, ids in zip(part, reader.ids(rows), strict=True):
                found[n] = ids
        # What was sampled has an end where the policy gave one, and none else.
        return [f if isinstance(f, Failure) else self._ended(reader, f, r.finished or r.token_ids is not None)
                for f, r in zip(found, (unit.responses[0] for unit in units))]  # fmt: skip

    def _check_tokens(self, response: Response) -> None:
        """A few sampled responses: their tokens must be their text in the policy's tokenizer too."""
        if len(self._compared) >= 16 or any(self._compared):
            return
        ids = [] if response.token_ids is None else list(response.token_ids)
        read = self.first.reader.tokenizer.decode(ids, skip_special_tokens=True)
        self._compared.append("".join(response.text.split()) in "".join(read.split()))
        if len(self._compared) == 16 and not any(self._compared):
            raise ConfigError(
                f"scorer {self.name!r}: the tokenizer of {self.first.name!r} reads the sampled tokens as other texts "
                f"(one as {read[:80]!r}, sampled as {response.text[:80]!r}): it is another model's; a density_ratio "
                "gives each policy the texts"
            )

    @property
    def settles(self) -> bool:  # type: ignore[override]
        return self.alpha != 0

    def settle(self, table: Mapping[str, Scores], items: Iterable[Item]) -> dict[str, Any]:
        """The penalty, found where it is to be found, and the mean gap in characters that it leaves."""
        if self.alpha != "auto":
            return {"alpha": self.alpha}
        values, lengths = [], []
        for item in items:
            there = [(v, len(r.text)) for v, r in zip(table[item.id].values, item.responses) if v is not None]
            if len(there) > 1:
                values.append(torch.tensor([v for v, _ in there], dtype=torch.float64))
                lengths.append(torch.tensor([float(n) for _, n in there], dtype=torch.float64))
        if not values:
            return {"alpha": None, "length_gap": None}
        alpha, gap = length_penalty(values, lengths)
        return {"alpha": alpha, "length_gap": gap}


class DensityRatio(_Ratio):
    """log p_strong(y|x) - log p_weak(y|x), each model reading the texts through its own tokenizer and template.

    * `reduce`: "sum" of the tokens, or "mean": the difference of the sums divided by the strong model's tokens.
    * `criterion`: a text that says what counts, put into the system's turn; `criterion_for`: "both", "strong", "weak".
    * `end`: "include" counts the tokens with which the template ends the answer, "mask" does not.
    """

    def __init__(
        self, name: str, strong: tuple[str, str], weak: tuple[str, str], *, reduce: str = "sum",
        criterion: str | None = None, criterion_for: str = "both", end: str = "include", dtype: str | None = None,
        device: str | None = None,
    ):  # fmt: skip
        super().__init__(name, strong, weak, end, dtype, device)
        for what, value, known in (
            ("reduce", reduce, ("sum", "mean")), ("criterion_for", criterion_for, ("both", "strong", "weak"))
        ):  # fmt: skip
            if value not in known:
                raise ConfigError(f"scorer {name!r}: {what}={value!r} is none of {', '.join(known)}")
        self.reduce, self.criterion, self.criterion_for = reduce, criterion, criterion_for

    @property
    def key(self) -> Mapping[str, Any]:
        return {"strong": self.first.key, "weak": self.second.key, "reduce": self.reduce, "end": self.end,
                "criterion": self.criterion, "criterion_for": self.criterion_for}  # fmt: skip

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        strong = self._ids(self.first, "strong", units)
        weak = self._ids(self.second, "weak", units)
        pairs: list[tuple[Ids, Ids]] = []
        at = []
        for n, (s, w) in enumerate(zip(strong, weak, strict=True)):
            if isinstance(s, Failure) or isinstance(w, Failure):
                failure = s if isinstance(s, Failure) else w
                assert isinstance(failure, Failure)
                yield units[n], Verdict.failed(failure.status, failure.raw)
            else:
                pairs.append((s, w))
                at.append(n)
        of_strong = self.first.sums([s for s, _ in pairs], self.kept)
        of_weak = self.second.sums([w for _, w in pairs], self.kept)
        for n, (ids, _), log_s, log_w in zip(at, pairs, of_strong, of_weak, strict=True):
            size = max(len(ids[1]), 1) if self.reduce == "mean" else 1
            yield units[n], _finite((log_s - log_w) / size, {"strong": log_s, "weak": log_w})

    def _ids(self, policy: _Policy, role: str, units: Sequence[Unit]) -> list[Ids | Failure]:
        reader = policy.reader
        criterion = self.criterion if self.criterion_for in ("both", role) else None
        rows = [as_row(u.item.prompt, u.responses[0].text, reader.chat, criterion) for u in units]
        return [f if isinstance(f, Failure) else self._ended(reader, f, u.responses[0].finished)
                for f, u in zip(reader.ids(rows), units, strict=True)]  # fmt: skip


def _finite(value: float, parts: Mapping[str, float]) -> Verdict:
    finite = value == value and abs(value) != float("inf")
    return Verdict(value, raw=json.dumps(dict(parts))) if finite else Verdict.failed("not_finite", repr(dict(parts)))

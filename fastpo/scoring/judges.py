"""Language models as judges: on any OpenAI-compatible server, by what they write or by the probabilities of the labels
that they would write; or in this process, by the latter.

The templates are text files (fastpo/scoring/templates/). What a judge writes is read by replies.py; what cannot be read
is a failure, never a number.
"""

import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from fastpo.errors import ConfigError, did_you_mean, quoted, shown
from fastpo.sampling.items import Failure, Unit, Verdict, digest, prompt_text
from fastpo.scoring import replies
from fastpo.scoring.client import Client
from fastpo.scoring.scoring import RAW, BaseScorer, UnitKind

Mode = Literal["pair", "response", "list", "rule"]
By = Literal["text", "logprobs", "systemone"]

_FIELDS: dict[str, tuple[str, ...]] = {  # what a template may name; the first ones it must
    "pair": ("prompt", "a", "b"),
    "response": ("prompt", "response", "low", "high"),
    "list": ("prompt", "responses", "count", "low", "high"),
    "rule": ("response", "rule", "prompt"),
}
_NEEDED = {"pair": 3, "response": 2, "list": 2, "rule": 2}
_OF_ALL = ("reference", "reference_block", "criterion", "criterion_block")
TEMPLATES = ("pair", "pair_graded", "pair_label", "score", "score_label", "score_reference", "dno_rubric", "rule")
_DEFAULT_TEMPLATE = {
    ("pair", "text"): "pair", ("pair", "other"): "pair_label", ("response", "text"): "score",
    ("response", "other"): "score_label", ("list", "text"): "dno_rubric", ("rule", "text"): "rule",
    ("rule", "other"): "rule",
}  # fmt: skip
_DEFAULT_SCALE = {("response", "text"): (1, 10), ("response", "other"): (1, 9), ("list", "text"): (0, 6)}
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Question:
    """What a backend is asked: a text, and the labels whose probabilities are wanted, none for a written reply."""

    text: str
    labels: tuple[str, ...] = ()


Reply = str | dict[str, float] | Failure  # written; or a probability for each label


class Backend(Protocol):
    """Where a judge's model is."""

    exact: bool

    @property
    def key(self) -> Mapping[str, Any]: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...
    def answers(
        self, questions: Sequence[Question], read: Callable[[Reply], Verdict]
    ) -> Iterator[tuple[int, Verdict]]: ...
    def close(self) -> None: ...


def template_text(template: str, where: Path) -> str:
    """A template of the package by its name, a file by its path (from `where`), or the text itself."""
    if "{" in template or "\n" in template:
        return template
    if template in TEMPLATES:
        folder = resources.files("fastpo.scoring").joinpath("templates")
        return folder.joinpath(f"{template}.txt").read_text(encoding="utf-8")
    path = where / template
    if not path.is_file():
        raise ConfigError(
            f"template={template!r} is no file and none of {', '.join(TEMPLATES)}{did_you_mean(template, TEMPLATES)}"
        )
    return path.read_text(encoding="utf-8")


class Judge(BaseScorer):
    """A scorer that asks a language model.

    * `mode`: "pair" (P(first is better)), "response" (a score), "list" (a score for each response, asked at once), or
      "rule" (whether a response follows a rule, for `Rules`).
    * `template`: name, file or text with {prompt}, {a} and {b}, {response}, {responses}, {rule}, {low}, {high},
      {count}; {reference} is the prompt's column `reference_column`, {criterion} the option; {reference_block} and
      {criterion_block} are the same with a heading, and empty where there is none.
    * `scale`: (low, high) of scores. `prose`: whether a list may stand among other text.
    """

    cached = True

    def __init__(
        self, name: str, backend: Backend, mode: Mode, *, by: By = "text", template: str | None = None,
        scale: tuple[float, float] | None = None, criterion: str | None = None,
        reference_column: str = "reference_text", prose: bool = False, where: Path = Path(),
    ):  # fmt: skip
        if mode not in _FIELDS:
            raise ConfigError(f"scorer {name!r}: mode={mode!r} is none of {', '.join(_FIELDS)}")
        way = "text" if by == "text" else "other"
        if (mode, way) not in _DEFAULT_TEMPLATE:
            raise ConfigError(f"scorer {name!r}: a judge of mode {mode} answers by text, not by {by}")
        self.name, self.backend, self.mode, self.by, self.prose = name, backend, mode, by, prose
        self.unit: UnitKind = "response" if mode == "rule" else mode
        self.template = template_text(template or _DEFAULT_TEMPLATE[mode, way], where)
        self.criterion, self.reference_column = criterion, reference_column
        self.low, self.high = scale or _DEFAULT_SCALE.get((mode, way), (0, 1))
        if not self.low < self.high:
            raise ConfigError(f"scorer {name!r}: scale={[self.low, self.high]}: expected [low, high]")
        self._check_template()
        self.labels = self._labels()
        self.exact = backend.exact

    def _check_template(self) -> None:
        named, known = set(_FIELD.findall(self.template)), (*_FIELDS[self.mode], *_OF_ALL)
        for field in sorted(named - set(known)):
            raise ConfigError(
                f"scorer {self.name!r}: the template names {{{field}}}, which mode {self.mode} does not have"
                f"{did_you_mean(field, known)}"
            )
        for field in _FIELDS[self.mode][: _NEEDED[self.mode]]:
            if field not in named:
                raise ConfigError(f"scorer {self.name!r}: the template has no {{{field}}}: the judge would not see it")
        if "criterion" in named and self.criterion is None:
            raise ConfigError(f"scorer {self.name!r}: the template names {{criterion}}, and no criterion is given")
        if self.criterion is not None and not named & {"criterion", "criterion_block"}:
            raise ConfigError(f"scorer {self.name!r}: a criterion is given, and the template has no {{criterion}}")

    def _labels(self) -> tuple[str, ...]:
        if self.by == "text":
            return ()
        if self.mode == "pair":
            return ("A", "B")
        if self.mode == "rule":
            return ("Yes", "No")
        if self.low != int(self.low) or self.high != int(self.high) or self.high - self.low > 25:
            raise ConfigError(f"scorer {self.name!r}: by {self.by} the scale must be at most 26 whole numbers")
        if self.by == "logprobs" and not 0 <= self.low <= self.high <= 9:
            raise ConfigError(
                f"scorer {self.name!r}: by logprobs the scale must lie in [0, 9], where each score is one token, not "
                f"{[self.low, self.high]}"
            )
        return tuple(str(n) for n in range(int(self.low), int(self.high) + 1))

    @property
    def key(self) -> Mapping[str, Any]:
        return {
            "judge": dict(self.backend.key), "mode": self.mode, "by": self.by, "template": self.template,
            "scale": [self.low, self.high], "criterion": self.criterion, "reference_column": self.reference_column,
            "prose": self.prose, "reads": replies.VERSION,
        }  # fmt: skip

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**self.key, "judge": dict(self.backend.identity)}

    def content(self, unit: Unit) -> Any:
        rendered = self._rendered(unit)
        return {"failed": rendered.status} if isinstance(rendered, Failure) else rendered

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        yield from ((units[n], v) for n, v in self._ask([(unit, None) for unit in units]))

    def ask_rules(self, asked: Sequence[tuple[Unit, str]]) -> Iterator[tuple[int, Verdict]]:
        """(place in `asked`, whether the response follows the rule) of each."""
        if self.mode != "rule":
            raise ConfigError(f"scorer {self.name!r}: rules need a judge of mode rule, not {self.mode}")
        return self._ask(asked)

    def _ask(self, asked: Sequence[tuple[Unit, str | None]]) -> Iterator[tuple[int, Verdict]]:
        places, questions, units = [], [], []
        for n, (unit, rule) in enumerate(asked):
            rendered = self._rendered(unit, rule)
            if isinstance(rendered, Failure):
                yield n, Verdict.failed(rendered.status, rendered.raw)
            else:
                places.append(n)
                units.append(unit)
                questions.append(Question(rendered, self.labels))
        if self.mode == "list":  # replies are read by how many responses there are
            for count in sorted({len(unit.responses) for unit in units}):
                those = [n for n, unit in enumerate(units) if len(unit.responses) == count]
                for n, verdict in self.backend.answers([questions[n] for n in those], self._reader(count)):
                    yield places[those[n]], verdict
        else:
            for n, verdict in self.backend.answers(questions, self._reader(0)):
                yield places[n], verdict

    # ---- questions

    def _rendered(self, unit: Unit, rule: str | None = None) -> str | Failure:
        item, texts = unit.item, [response.text for response in unit.responses]
        reference = item.meta.get(self.reference_column)
        if reference is not None and not isinstance(reference, str):
            return Failure("no_reference", f"{self.reference_column} of {item.id!r} is {shown(reference, 60)}, no text")
        if reference is None and "{reference}" in self.template:
            return Failure("no_reference", f"the prompt {item.id!r} has no column {self.reference_column!r}")
        fields = {
            "prompt": prompt_text(item.prompt), "low": f"{self.low:g}", "high": f"{self.high:g}",
            "count": str(len(texts)), "rule": rule or "", "criterion": self.criterion or "",
            "criterion_block": f"\nWhat counts most here: {self.criterion}" if self.criterion else "",
            "reference": reference or "",
            "reference_block": f"\n<reference>\n{reference}\n</reference>\n" if reference else "",
            "response": texts[0] if self.unit == "response" else "",
            "a": texts[0] if self.unit == "pair" else "", "b": texts[1] if self.unit == "pair" else "",
            "responses": "\n\n".join(f"<answer_{k}>\n{t}\n</answer_{k}>" for k, t in enumerate(texts, 1)),
        }  # fmt: skip
        # In one pass: what is put in is not looked at again.
        return _FIELD.sub(lambda m: fields[m[1]], self.template)

    # ---- replies

    def _reader(self, count: int) -> Callable[[Reply], Verdict]:
        def read(reply: Reply) -> Verdict:
            value = self._value(reply, count)
            raw = reply.raw if isinstance(reply, Failure) else reply if isinstance(reply, str) else _shown(reply)
            if isinstance(value, Failure):
                return Verdict.failed(value.status, (value.raw or raw)[:RAW])
            return Verdict(value, raw=raw[:RAW])

        return read

    def _value(self, reply: Reply, count: int) -> float | tuple[float | None, ...] | Failure:
        if isinstance(reply, Failure):
            return reply
        if isinstance(reply, dict):
            if self.mode in ("pair", "rule"):
                return reply[self.labels[0]]
            return math.fsum(float(label) * p for label, p in reply.items())
        if self.mode == "pair":
            return replies.read_pair(reply)
        if self.mode == "rule":
            return replies.read_yes_no(reply)
        if self.mode == "response":
            return replies.read_score(reply, self.low, self.high)
        return replies.read_list(reply, count, self.low, self.high, prose=self.prose)

    def close(self) -> None:
        self.backend.close()


def _shown(probabilities: Mapping[str, float]) -> str:
    return " ".join(f"{label}={p:.6g}" for label, p in probabilities.items())


# ---- servers


class ServerBackend:
    """A model of an OpenAI-compatible server.

    * `by="text"`: /chat/completions, the reply's text. `by="logprobs"`: the probabilities of the labels as the first
      token, of `top_logprobs`, normalised over the labels; less than `min_mass` on them together is a failure, as is a
      server that gives none. `by="systemone"`: /systemone of `transformers serve` (typed decisions), for every label a
      probability.
    * `model`: as the server calls it; None: the only one that it lists.
    * `temperature`, `top_p`, `max_tokens`, `seed`, `extra` (more fields of the body) are the decoding. A reply that
      cannot be read is asked for once more where the temperature is above 0.
    """

    exact = False

    def __init__(
        self, client: Client, model: str | None, *, by: By = "text", temperature: float = 0.0, top_p: float = 1.0,
        max_tokens: int = 1024, seed: int | None = None, system: str | None = None, min_mass: float = 0.5,
        top_logprobs: int = 20, extra: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        ways = ("text", "logprobs", "systemone")
        if by not in ways:
            raise ConfigError(f"by={by!r} is none of {', '.join(ways)}{did_you_mean(str(by), ways)}")
        if temperature < 0 or not 0 < top_p <= 1 or max_tokens < 1 or not 0 < min_mass <= 1:
            raise ConfigError("a judge's temperature must be >= 0, top_p and min_mass in (0, 1], max_tokens >= 1")
        self.client, self.by, self.system, self.min_mass = client, by, system, min_mass
        self.given_model, self.temperature, self.top_logprobs, self.seed = model, temperature, top_logprobs, seed
        self.decoding = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens} | dict(extra or {})
        if seed is not None:
            self.decoding["seed"] = seed
        self._listed: dict[str, Any] | None = None

    @property
    def key(self) -> Mapping[str, Any]:
        decoding = dict(self.decoding) if self.by == "text" else {"min_mass": self.min_mass}
        return {"model": self.given_model, "system": self.system, "decoding": decoding}

    @property
    def identity(self) -> Mapping[str, Any]:
        """With what the server lists of the model: its id, and the folder or the repository that it was loaded from."""
        listed = self._of_server()
        return {**self.key, "server": {k: listed[k] for k in ("id", "root", "owned_by") if k in listed}}

    def _of_server(self) -> dict[str, Any]:
        if self._listed is None:
            listed = self.client.models()
            wanted = [m for m in listed if self.given_model in (None, m["id"])]
            if self.given_model is None and len(wanted) != 1:
                raise ConfigError(
                    f"the judge's model is not named, and {self.client.urls[0]} lists "
                    f"{quoted(m['id'] for m in listed[:5]) or 'none'}: set `model`"
                )
            self._listed = wanted[0] if wanted else {}
        return self._listed

    @property
    def model(self) -> str:
        return self.given_model or self._of_server()["id"]

    def answers(self, questions: Sequence[Question], read: Callable[[Reply], Verdict]) -> Iterator[tuple[int, Verdict]]:
        model = self.model
        ask: dict[str, Callable[[str, Question, int], Awaitable[Reply]]] = {
            "text": self._written, "logprobs": self._top, "systemone": self._decided,
        }  # fmt: skip
        attempts = 2 if self.by == "text" and self.temperature > 0 else 1

        async def verdict(n: int) -> Verdict:
            for attempt in range(attempts):
                reply = await ask[self.by](model, questions[n], attempt)
                found = read(reply)
                if found.value is not None or found.status in ("timeout", "error"):
                    break  # the client has tried again already
            return found

        yield from self.client.each(verdict, range(len(questions)))

    def _messages(self, question: Question) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": question.text}]

    async def _choice(self, body: Mapping[str, Any]) -> Mapping[str, Any] | Failure:
        """The one choice of a reply."""
        reply = await self.client.chat(body)
        if isinstance(reply, Failure):
            return reply
        if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list):
            return Failure("error", f"no choices: {shown(reply, RAW)}")
        if len(reply["choices"]) != 1 or not isinstance(reply["choices"][0], dict):
            return Failure("wrong_count", f"{len(reply['choices'])} choices instead of one: {shown(reply, RAW)}")
        return reply["choices"][0]

    async def _written(self, model: str, question: Question, attempt: int) -> Reply:
        body = {"model": model, "messages": self._messages(question), **self.decoding}
        if attempt and self.seed is not None:
            body["seed"] = self.seed + attempt
        choice = await self._choice(body)
        if isinstance(choice, Failure):
            return choice
        message = choice.get("message")
        message = message if isinstance(message, dict) else {}
        text = message.get("content")
        if message.get("refusal"):
            return Failure("refused", str(message["refusal"]))
        if choice.get("finish_reason") == "content_filter":
            return Failure("refused", str(text or "content_filter"))
        if text is None or text == "":
            return Failure("empty", shown(choice, RAW))
        if not isinstance(text, str):
            return Failure("error", shown(choice, RAW))
        if choice.get("finish_reason") == "length":
            return Failure("truncated", text)  # "Score: 1" may have been going to be 10
        return text

    async def _top(self, model: str, question: Question, attempt: int) -> Reply:
        body = {
            "model": model, "messages": self._messages(question), "temperature": 0, "max_tokens": 1,
            "logprobs": True, "top_logprobs": self.top_logprobs,
        }  # fmt: skip
        choice = await self._choice(body)
        if isinstance(choice, Failure):
            return choice
        try:
            top = choice["logprobs"]["content"][0]["top_logprobs"]
            listed = [(str(entry["token"]), float(entry["logprob"])) for entry in top]
        except (KeyError, IndexError, TypeError, ValueError):
            return Failure("no_logprobs", f"the server gives no top_logprobs: {shown(choice, 500)}")
        mass = dict.fromkeys(question.labels, 0.0)
        for token, logprob in listed:
            label = (
                token.replace("\u0120", " ").replace("\u2581", " ").strip()
            )  # spaces of byte-level and SentencePiece
            if label in mass and logprob <= 1e-6:
                mass[label] += math.exp(logprob)
        total = math.fsum(mass.values())
        if not self.min_mass <= total <= 1 + 1e-3:
            tokens = " ".join(f"{token!r}={math.exp(min(logprob, 0)):.3g}" for token, logprob in listed[:8])
            return Failure("unparsed", f"{total:.3g} of the probability is on {quoted(question.labels)}: {tokens}")
        return {label: p / total for label, p in mass.items()}

    async def _decided(self, model: str, question: Question, attempt: int) -> Reply:
        kind, labels = _decision(question.labels)
        asked = {"type": kind} if kind == "noul" else {"type": kind, "criteria": labels}
        reply = await self.client.post(
            "/systemone", {"model": model, "state": question.text, "questions": {"verdict": asked}}
        )
        if isinstance(reply, Failure):
            return reply
        try:
            answer = reply["answers"]["verdict"]
            if kind == "noul":
                found = {"Yes": float(answer["noul"]), "No": 1 - float(answer["noul"])}
            elif kind == "score":  # levels are numbered from 0, in the order that was asked
                given = {str(k): float(p) for k, p in answer["probabilities"].items()}
                found = {label: given.pop(str(n)) for n, label in enumerate(question.labels)}
                if given:
                    raise KeyError(next(iter(given)))
            else:
                found = {str(k): float(p) for k, p in answer["probabilities"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            return Failure("unparsed", shown(reply, RAW))
        fits = set(found) == set(question.labels) and all(0 <= p <= 1 for p in found.values())
        if not fits or abs(math.fsum(found.values()) - 1) > 0.02:
            return Failure("unparsed", shown(reply, RAW))
        return {label: found[label] for label in question.labels}

    def close(self) -> None:
        self.client.close()


def _decision(labels: Sequence[str]) -> tuple[str, Any]:
    """(type of a typed decision, its criteria) for these labels."""
    if tuple(labels) == ("Yes", "No"):
        return "noul", None
    if all(label.lstrip("-").isdigit() for label in labels):
        return "score", list(labels)
    return "choice", dict.fromkeys(labels)


# ---- in this process


class LocalBackend:
    """A causal language model by name or path, in this process: the log-probabilities of the labels behind the
    template's text (its chat template applied where it has one), normalised over the labels.

    Every label must be one token. `batch_size` questions are given to one pass, which shares each question's prompt
    over its labels.
    """

    exact = True

    def __init__(self, path: str, *, batch_size: int = 16, dtype: str | None = None, device: str | None = None):
        self.path, self.batch_size, self.dtype, self.device = str(path), batch_size, dtype, device
        self._loaded: tuple[Any, Any] | None = None
        self._verified = False

    @property
    def key(self) -> Mapping[str, Any]:
        from fastpo.scoring.policy_scorers import weights_key

        return {"model": weights_key(self.path), "dtype": self.dtype}

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.key

    def _model(self) -> tuple[Any, Any]:
        from fastpo.models.loading import load_model, load_tokenizer

        if self._loaded is None:
            model = load_model(self.path, dtype=self.dtype, device=self.device).eval()
            self._loaded, self._verified = (model, load_tokenizer(self.path)), False
        return self._loaded

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        if not getattr(tokenizer, "chat_template", None):
            return list(tokenizer(text)["input_ids"])
        turns = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def answers(self, questions: Sequence[Question], read: Callable[[Reply], Verdict]) -> Iterator[tuple[int, Verdict]]:
        from fastpo.reference.sequence_logps import sequence_logps

        if not questions:
            return
        model, tokenizer = self._model()
        ids_of = {label: self._label_id(tokenizer, label) for question in questions for label in question.labels}
        if len(set(ids_of.values())) < len(ids_of):
            raise ConfigError(f"the judge {self.path!r} has one token for several of the labels {quoted(ids_of)}")
        for start in range(0, len(questions), self.batch_size):
            part = questions[start : start + self.batch_size]
            rows = []
            for question in part:
                prompt = self._ids(tokenizer, question.text)
                rows += [{"prompt": prompt, "completion": [ids_of[label]]} for label in question.labels]
            # The model is held against its own logits once: rows of one token each say little of it the second time.
            logps = iter(sequence_logps(model, rows, processing_class=tokenizer, verify=not self._verified))
            self._verified = True
            for n, question in enumerate(part, start):
                given = {label: float(next(logps)[0][0]) for label in question.labels}
                most = max(given.values())
                if not math.isfinite(most):
                    yield n, read(Failure("not_finite", _shown(given)))
                    continue
                mass = {label: math.exp(logp - most) for label, logp in given.items()}
                total = math.fsum(mass.values())
                yield n, read({label: p / total for label, p in mass.items()})

    def _label_id(self, tokenizer: Any, label: str) -> int:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError(f"the judge {self.path!r}: the label {label!r} is no single token of its tokenizer")
        return ids[0]

    def close(self) -> None:
        self._loaded = None


def cache_key(identity: Mapping[str, Any], content: Any) -> str:
    """Of a kept verdict."""
    return digest({"judge": identity, "content": content})

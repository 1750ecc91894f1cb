"""The work of a sample stage: every request asked once, a line for each as it comes, and what was there kept.

Beside the file goes what gave the responses: NAME.sampler.json. A line is {id, k, source, text, token_ids, finished,
logp, seed}, with `meta` where there is any, or of a failure {id, k, source, status, raw}. Of a sampler that is exact,
an interrupted stage and an unbroken one leave the same bytes: batches go in the order of the plan, and one that was
written in part is asked whole for the lines that lack.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fastpo.errors import TrainingError, shown
from fastpo.loop.stages import versions
from fastpo.sampling.items import POLICY, Failure, Request, Response, Sampler
from fastpo.sampling.parts import Part, read_lines, write_json

log = logging.getLogger("fastpo")

UnitId = tuple[str, str, int]  # of a request: (id, source, k)
_SURE = 20  # failures before a stage ends early: a few of a small run say nothing
_ALIKE = 8  # prompts whose answers are all the same before that is said


class _Done(NamedTuple):
    """What is kept of a line in memory."""

    finished: bool
    tokens: int | None  # of its ids; None: it has none
    text: int  # a hash

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "_Done":
        ids = line["token_ids"]
        return cls(line["finished"], None if ids is None else len(ids), hash(line["text"]))


def sample_stage(
    sampler: Sampler, requests: Sequence[Request], path: Path, *, bar: bool = True, max_failed: float = 0.02,
    name: str = "sample",
) -> dict[str, int]:  # fmt: skip
    """Asks what is not in the file yet; returns counts for the manifest, which depend on the file alone.

    Of a sampler that is not exact, what failed before is asked again, once. TrainingError where more than the share
    `max_failed` of all requests failed.
    """
    part = Part(path, keep=lambda line: (unit_of(line), line if _failed(line) else _Done.of(line)))
    done = {unit: one for unit, one in part.lines if isinstance(one, _Done)}
    failed = {unit: line for unit, line in part.lines if not isinstance(line, _Done) and unit not in done}
    asked = {request.unit for request in requests}
    if len(asked) < len(requests):
        twice = next(unit for unit, n in Counter(r.unit for r in requests).items() if n > 1)
        raise ValueError(f"{name}: {twice} is asked twice")
    # An exact sampler fails at the same ones again.
    there = {*done, *failed} if sampler.exact else set(done)
    missing = [request for request in requests if request.unit not in there]
    most = max(_SURE, max_failed * len(requests))
    again = 0
    with part, tqdm(total=len(requests), initial=len(requests) - len(missing), desc=name, unit="response",
                    disable=None if bar else True) as progress:  # fmt: skip
        for new in answered(sampler, requests, missing):
            written = []
            for request, answer in new:
                if request.unit in there:
                    continue
                line = line_of(request, answer)
                written.append(line)
                if isinstance(answer, Failure):
                    failed[request.unit] = line
                    again += 1
                else:
                    done[request.unit] = _Done.of(line)
                    failed.pop(request.unit, None)
            part.add(written)
            progress.update(len(written))
            if again > most:
                break
    failed = {unit: line for unit, line in failed.items() if unit in asked}
    if len(failed) > max_failed * len(requests):
        raise TrainingError(_too_many(name, failed, len(requests), max_failed, path))
    of_it = {"key": dict(sampler.key), "found": dict(getattr(sampler, "found", {})), "versions": versions()}
    if missing:
        write_json(path.with_suffix(".sampler.json"), of_it)
    _warn_alike(name, requests, done)
    return _counts([done[r.unit] for r in requests if r.unit in done], len(requests), failed)


def answered(
    sampler: Sampler, requests: Sequence[Request], missing: Sequence[Request]
) -> Iterator[list[tuple[Request, Response | Failure]]]:
    """What is to be written at once: of an exact sampler the plan's batches that lack something, else one by one."""
    if not missing:
        return
    if not sampler.exact:
        for answer in sampler.sample(missing):
            yield [answer]
        return
    units = {request.unit for request in missing}
    for batch in sampler.batches(requests):
        if any(request.unit in units for request in batch):
            answers = {request.unit: answer for request, answer in sampler.sample(batch)}
            yield [(request, answers[request.unit]) for request in batch]


def line_of(request: Request, answer: Response | Failure) -> dict[str, Any]:
    """The line of a request's answer."""
    line: dict[str, Any] = {"id": request.id, "k": request.k, "source": request.source}
    if isinstance(answer, Failure):
        return line | {"status": answer.status, "raw": answer.raw}
    given = {"text": answer.text, "token_ids": None if answer.token_ids is None else list(answer.token_ids),
             "finished": answer.finished, "logp": answer.logp, "seed": request.seed}  # fmt: skip
    given |= {"count": answer.count} if answer.count > 1 else {}
    return line | given | ({"meta": dict(answer.meta)} if answer.meta else {})


def unit_of(line: Mapping[str, Any]) -> UnitId:
    return (line["id"], line["source"], line["k"])


def _failed(line: Mapping[str, Any]) -> bool:
    return "status" in line


def read_samples(path: Path, sources: Sequence[str] | None = None) -> dict[str, list[Response]]:
    """The responses of each prompt by its id, ordered by source and k; failures are left out.

    `sources`: their order, as the requests have it; by default the policy's own first, then by name and number. A
    prompt of which there is none is not in the mapping.
    """
    found: dict[str, dict[tuple[Any, ...], Response]] = {}
    order = {source: place for place, source in enumerate(sources or ())}
    for line in read_lines(path):
        if not _failed(line):
            place = (order.get(line["source"], len(order)), *_by_name(line["source"]), line["k"])
            found.setdefault(line["id"], {})[place] = Response.from_json(line)
    return {name: [own[place] for place in sorted(own)] for name, own in found.items()}


def _by_name(source: str) -> tuple[bool, str, int]:
    """policy, greedy, refined-2, refined-10."""
    word, _, number = source.rpartition("-")
    return (source != POLICY, word, int(number)) if word and number.isdecimal() else (source != POLICY, source, -1)


def _counts(done: Sequence[_Done], asked: int, failed: Mapping[UnitId, Mapping[str, Any]]) -> dict[str, int]:
    exact = [one.tokens for one in done if one.tokens is not None]
    return {
        "asked": asked,
        "responses": len(done),
        "truncated": sum(not one.finished for one in done),
        "with_token_ids": len(exact),
        "tokens": sum(exact),
        "failed": len(failed),
        **{f"failed: {status}": n for status, n in sorted(Counter(line["status"] for line in failed.values()).items())},
    }


def _too_many(name: str, failed: Mapping[UnitId, Mapping[str, Any]], total: int, share: float, path: Path) -> str:
    by_status = Counter(line["status"] for line in failed.values())
    counts = ", ".join(f"{n:,} {status}" for status, n in by_status.most_common())
    replies = "; ".join(f"{unit[0]}: {shown(line['raw'], 200)}" for unit, line in list(failed.items())[:3])
    return (
        f"{name}: {len(failed):,} of {total:,} requests failed, more than max_failed={share:g}: {counts}. Replies: "
        f"{replies}. What there is of responses is kept in {path}; start again and only the rest is asked"
    )


def _warn_alike(name: str, requests: Iterable[Request], done: Mapping[UnitId, _Done]) -> None:
    """Says where the answers of each prompt are all one text although they were sampled: the server is greedy."""
    texts: dict[tuple[str, str], list[int]] = defaultdict(list)
    for request in requests:
        if request.temperature > 0 and request.unit in done:
            texts[request.id, request.source].append(done[request.unit].text)
    several = [own for own in texts.values() if len(own) > 1]
    if len(several) >= _ALIKE and all(len(set(own)) == 1 for own in several):
        log.warning(
            "%s: all responses of a prompt are the same text, of each of %d prompts, although the temperature is above "
            "0: the sampler decodes greedily, or the policy has no choice left", name, len(several),
        )  # fmt: skip

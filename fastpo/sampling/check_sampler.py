"""Whether samples are of the policy that they should be of: their log-probabilities against our own."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastpo.errors import TrainingError
from fastpo.reference.sequence_logps import sequence_logps
from fastpo.sampling.items import Request, Response

TOLERANCE = 0.1  # nats a token; what bf16 on another engine's kernels differs by is a tenth of it


class _Compared(NamedTuple):
    """One response: its prompt, how many tokens, and the sums of their log-probabilities."""

    prompt: str
    tokens: int
    theirs: float
    ours: float


def check_sampler(
    samples: Iterable[tuple[Request, Response]], policy: Any = None, tokenizer: Any = None, *, n: int = 4,
    tolerance: float = TOLERANCE, own: Sequence[Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Holds the sampler's log-probabilities of up to n responses against `fastpo.sequence_logps` of the policy.

    samples: requests with their responses; taken are the first of different prompts that have token ids and a
    log-probability. policy: a model in memory, or a name or path. Compared is the mean over responses of the difference
    of their sums, a token. Returns {"compared": how many, "difference": nats a token}, for the manifest; with nothing
    to compare {"compared": 0, "why": ...}. TrainingError where the difference is above `tolerance` or not finite.

    own: in the policy's place, our log-probabilities of every sample: an array or a CPU tensor [tokens] each, in the
    order of the samples. Then all samples are compared that can be, by their `token_logps`: tokens of which the sampler
    gave none (NaN) are left out on both sides, and a response without any by its `logp`.
    """
    pairs = list(samples) if own is not None else _first(samples, n)
    found = [r for _, r in pairs]
    compared = _by_own(pairs, own) if own is not None else _by_policy(pairs, policy, tokenizer)
    if not compared:
        lacking = "token ids" if all(r.token_ids is None for r in found) else "log-probabilities"
        why = f"the sampler gives no {lacking}" if found else "there are no samples"
        return {"compared": 0, "why": f"{why}, so it cannot be known from them which weights it has"}
    apart = [abs(one.theirs - one.ours) / one.tokens for one in compared]
    difference = float(np.mean(apart))
    if not difference <= tolerance:
        worst = compared[int(np.argmax(apart))]
        raise TrainingError(
            f"the sampler is not the policy: its log-probabilities of {len(compared)} responses differ from ours by "
            f"{difference:.3g} nats a token, more than tolerance={tolerance:g} (prompt {worst.prompt}: "
            f"{worst.theirs:.4g} there, {worst.ours:.4g} here): it has other or stale "
            "weights, another chat template, or another dtype; restart it with this policy's folder"
        )
    return {"compared": len(compared), "difference": difference}


def _first(samples: Iterable[tuple[Request, Response]], n: int) -> list[tuple[Request, Response]]:
    """The first n of different prompts that can be compared; where there are none, all of them."""
    chosen: dict[str, tuple[Request, Response]] = {}
    seen = []
    for request, response in samples:
        if response.token_ids and response.logp is not None:
            chosen.setdefault(request.id, (request, response))
        elif not chosen:
            seen.append((request, response))
        if len(chosen) >= n:
            break
    return list(chosen.values()) or seen


def _by_policy(pairs: Sequence[tuple[Request, Response]], policy: Any, tokenizer: Any) -> list[_Compared]:
    able = [(q, r) for q, r in pairs if r.token_ids and r.logp is not None]
    if not able:
        return []
    rows = [{"prompt": list(q.prompt_ids), "completion": list(r.token_ids or ())} for q, r in able]
    ours = [logps[0] for logps in sequence_logps(policy, rows, processing_class=tokenizer)]
    return [
        _Compared(q.id, len(own), float(r.logp or 0.0), float(own.sum(dtype=np.float64)))
        for (q, r), own in zip(able, ours, strict=True)
    ]


def _by_own(pairs: Sequence[tuple[Request, Response]], own: Sequence[Any]) -> list[_Compared]:
    out = []
    for (request, response), values in zip(pairs, own, strict=True):
        if not response.token_ids:
            continue
        ours = np.asarray(values, dtype=np.float64)
        if ours.shape != (len(response.token_ids),):
            raise ValueError(
                f"prompt {request.id}: {len(response.token_ids)} tokens were sampled, and our log-probabilities are "
                f"of shape {ours.shape}"
            )
        if response.token_logps is not None:
            theirs = np.asarray(response.token_logps, dtype=np.float64)
            given = ~np.isnan(theirs)
            if given.any():
                out.append(
                    _Compared(request.id, int(given.sum()), float(theirs[given].sum()), float(ours[given].sum()))
                )
        elif response.logp is not None:
            out.append(_Compared(request.id, len(ours), response.logp, float(ours.sum())))
    return out

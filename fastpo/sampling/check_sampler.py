"""Whether samples are of the policy that they should be of: their log-probabilities against our own."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastpo.errors import TrainingError
from fastpo.reference.sequence_logps import sequence_logps
from fastpo.sampling.items import Request, Response

TOLERANCE = 0.1  # nats a token; what bf16 on another engine's kernels differs by is a tenth of it


def check_sampler(
    samples: Iterable[tuple[Request, Response]], policy: Any, tokenizer: Any = None, *, n: int = 4,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:  # fmt: skip
    """Holds the sampler's log-probabilities of up to n responses against `fastpo.sequence_logps` of the policy.

    samples: requests with their responses; taken are the first of different prompts that have token ids and a
    log-probability. policy: a model in memory, or a name or path. Compared is the mean over responses of the difference
    of their sums, a token. Returns {"compared": how many, "difference": nats a token}, for the manifest; with nothing
    to compare {"compared": 0, "why": ...}. TrainingError where the difference is above `tolerance` or not finite.
    """
    chosen: dict[str, tuple[Request, Response]] = {}
    seen, without_ids = 0, 0
    for request, response in samples:
        seen += 1
        without_ids += response.token_ids is None
        if response.token_ids and response.logp is not None and request.id not in chosen:
            chosen[request.id] = (request, response)
        if len(chosen) >= n:
            break
    if not chosen:
        lacking = "token ids" if without_ids == seen else "log-probabilities"
        why = f"the sampler gives no {lacking}" if seen else "there are no samples"
        return {"compared": 0, "why": f"{why}, so it cannot be known from them which weights it has"}
    pairs = list(chosen.values())
    rows = [{"prompt": list(q.prompt_ids), "completion": list(r.token_ids or ())} for q, r in pairs]
    ours = [logps[0] for logps in sequence_logps(policy, rows, processing_class=tokenizer)]
    apart = [abs(float(r.logp or 0.0) - float(own.sum(dtype=np.float64))) / len(own)
             for (_, r), own in zip(pairs, ours, strict=True)]  # fmt: skip
    difference = float(np.mean(apart))
    if not difference <= tolerance:
        request, response = pairs[int(np.argmax(apart))]
        raise TrainingError(
            f"the sampler is not the policy: its log-probabilities of {len(pairs)} responses differ from ours by "
            f"{difference:.3g} nats a token, more than tolerance={tolerance:g} (prompt {request.id}: "
            f"{response.logp:.4g} there, {float(ours[int(np.argmax(apart))].sum()):.4g} here): it has other or stale "
            "weights, another chat template, or another dtype; restart it with this policy's folder"
        )
    return {"compared": len(pairs), "difference": difference}

"""The definition of every op, in plain PyTorch: the input's precision is kept (fp64 stays fp64), autograd works.

N = head rows (completion tokens), D = hidden, V = vocabulary, S = responses, P = pairs. 16-bit inputs: the GEMM runs in
the input dtype, everything after it in fp32, which is also what "plain PyTorch" means in the test criterion.
Nothing optimised imports this file's arithmetic; tests, `fastpo check` and the plain `torch` backend do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
LOSS_TYPES = ("dpo", "ipo", "simpo", "sppo", "sppo_hard", "hinge", "robust")


class PreferenceTerms(NamedTuple):
    """Per-pair results; differentiable in `logp` where they depend on it."""

    losses: Tensor  # [P], unweighted
    chosen_logps: Tensor  # [P], sums over the response
    rejected_logps: Tensor  # [P]
    ref_chosen_logps: Tensor  # [P], 0 without a reference
    ref_rejected_logps: Tensor  # [P]


def logit_rule(raw: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """softcap(logit_scale * raw), with softcap(z) = c * tanh(z / c); `raw` is hidden W^T + bias, any shape."""
    z = raw * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def row_logprob(
    raw: Tensor,  # [N, V]
    target: Tensor,  # [N] int64
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [N], lse [N], entropy [N]) of the rows of `raw`; lse and entropy are detached, -100 rows have logp 0."""
    z = logit_rule(raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw, softcap, logit_scale)
    live = target != IGNORE_INDEX
    picked = z.log_softmax(dim=-1).gather(1, target.where(live, 0).long().unsqueeze(1)).squeeze(1)
    entropy = torch.special.entr(z.detach().softmax(dim=-1)).sum(dim=-1)
    return picked.where(live, 0.0), z.detach().logsumexp(dim=-1), entropy


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(softcap(logit_scale * (hidden W^T + b)))[target] -> logp [N] (fp32, or fp64 for fp64 inputs)."""
    raw = F.linear(hidden, weight, bias)
    logp, _, entropy = row_logprob(raw, target, softcap=softcap, logit_scale=logit_scale)
    return (logp, entropy) if return_entropy else logp


def log_sum_sq(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    *,
    target: Tensor | None = None,  # [N] int64
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """log sum_v p_v^2 -> [N], p the softmax of a row's logits z: lse(2 z) - 2 lse(z); rows with target -100 have 0."""
    logp = _log_softmax(hidden, weight, bias, softcap, logit_scale)
    return _live((2 * logp).logsumexp(dim=-1), target)


def token_kl(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    ref_hidden: Tensor,  # [N, E]
    ref_weight: Tensor,  # [V, E]
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    *,
    target: Tensor | None = None,  # [N] int64
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    ref_logit_scale: float = 1.0,
) -> Tensor:
    """KL(p_ref || p) = sum_v p_ref,v (log p_ref,v - log p_v) -> [N]; no gradient to the reference; -100 rows have 0."""
    logp = _log_softmax(hidden, weight, bias, softcap, logit_scale)
    with torch.no_grad():
        ref = _log_softmax(ref_hidden, ref_weight, ref_bias, ref_softcap, ref_logit_scale).to(logp.dtype)
    return _live((ref.exp() * (ref - logp)).sum(dim=-1), target)


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """Log-probabilities [N, V] of the whole vocabulary."""
    raw = F.linear(hidden, weight, bias)
    raw = raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw
    return logit_rule(raw, softcap, logit_scale).log_softmax(dim=-1)


def _live(values: Tensor, target: Tensor | None) -> Tensor:
    return values if target is None else values.where(target != IGNORE_INDEX, 0.0)


def response_sums(logp: Tensor, response_offsets: Tensor) -> Tensor:
    """Sum of logp [N] over each response -> [S]."""
    lengths = response_offsets.diff().tolist()
    return torch.stack([part.sum() for part in logp.split(lengths)]) if lengths else logp.new_zeros(0)


def pair_losses(
    loss_type: str,
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor,  # [P]
    ref_rejected_logps: Tensor,  # [P]
    chosen_lengths: Tensor,  # [P]
    rejected_lengths: Tensor,  # [P]
    win_prob_chosen: Tensor | None,  # [P], sppo only
    win_prob_rejected: Tensor | None,  # [P], sppo only
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float = 0.0,
    ipo_mean: bool = True,
) -> Tensor:
    """Losses [P]. `label_smoothing` is read by dpo (cDPO), simpo and robust; `gamma_beta_ratio` by simpo."""
    a = chosen_logps - ref_chosen_logps
    b = rejected_logps - ref_rejected_logps
    eps = label_smoothing
    match loss_type:
        case "dpo":  # arXiv 2305.18290 eq. 7
            u = beta * (a - b)
            return -(1 - eps) * F.logsigmoid(u) - eps * F.logsigmoid(-u)
        case "robust":  # arXiv 2403.00409; unbounded below by construction
            u = beta * (a - b)
            return (-(1 - eps) * F.logsigmoid(u) + eps * F.logsigmoid(-u)) / (1 - 2 * eps)
        case "hinge":
            return torch.relu(1 - beta * (a - b))
        case "ipo":  # arXiv 2310.12036 eq. 17, beta is tau
            delta = a / chosen_lengths - b / rejected_lengths if ipo_mean else a - b
            return (delta - 1 / (2 * beta)) ** 2
        case "simpo":  # arXiv 2405.14734, reference-free
            z = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths - gamma_beta_ratio)
            return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)
        case "sppo":  # arXiv 2405.00675, soft probabilities, with the authors' factor 1/2
            assert win_prob_chosen is not None and win_prob_rejected is not None, "sppo needs both win probabilities"
            return 0.5 * ((a - (win_prob_chosen - 0.5) / beta) ** 2 + (b - (win_prob_rejected - 0.5) / beta) ** 2)
        case "sppo_hard":
            return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2
    raise ValueError(f"unknown loss_type {loss_type!r}; one of {', '.join(LOSS_TYPES)}")


def preference_loss(
    logp: Tensor,  # [N]
    ref_logp: Tensor | None,  # [N]
    response_offsets: Tensor,  # [S + 1] int32
    pairs: Tensor,  # [P, 2] int32
    win_prob_chosen: Tensor | None = None,  # [P]
    win_prob_rejected: Tensor | None = None,  # [P]
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float = 0.0,
    ipo_mean: bool = True,
    ref_response_logps: Tensor | None = None,  # [S], instead of ref_logp
) -> PreferenceTerms:
    """Token log-probabilities to per-pair losses; autograd through their weighted sum gives `dlogp`."""
    sums = response_sums(logp, response_offsets)
    if ref_response_logps is not None:
        ref_sums = ref_response_logps.to(logp.dtype)
    else:
        ref_sums = torch.zeros_like(sums) if ref_logp is None else response_sums(ref_logp, response_offsets)
    chosen, rejected = pairs.long().unbind(dim=1)
    lengths = response_offsets.diff().clamp(min=1).to(logp.dtype)
    terms = (sums[chosen], sums[rejected], ref_sums[chosen], ref_sums[rejected])
    losses = pair_losses(
        loss_type,
        *terms,
        lengths[chosen],
        lengths[rejected],
        win_prob_chosen,
        win_prob_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
        gamma_beta_ratio=gamma_beta_ratio,
        ipo_mean=ipo_mean,
    )
    return PreferenceTerms(losses, *terms)


def tree_mask(
    cu_seqlens: Sequence[int],  # C + 1 boundaries of the causal chains
    branches: Sequence[tuple[int, int, int, int]],  # whole chains [start, stop), and their prompt [prompt, prompt_stop)
    window: int | None = None,  # tokens that a query sees, itself included
) -> Tensor:
    """[T, T] bool: whether the query of a row sees the key of a column."""
    total = cu_seqlens[-1]
    visible = torch.zeros(total, total, dtype=torch.bool)
    for start, stop in zip(cu_seqlens, cu_seqlens[1:]):
        prompts = [b[2:] for b in branches if b[0] <= start < b[1]]
        sequence = [token for first, end in prompts for token in range(first, end)] + list(range(start, stop))
        for place in range(len(sequence) - (stop - start), len(sequence)):
            first = 0 if window is None else max(0, place - window + 1)
            visible[sequence[place], sequence[first : place + 1]] = True
    return visible


def tree_attention(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, G, D], H a multiple of G
    value: Tensor,  # [T, G, E]
    visible: Tensor,  # [T, T] bool
    *,
    scale: float,
    softcap: float | None = None,
    sink: Tensor | None = None,  # [H], a logit that takes part in the softmax and has no value
) -> Tensor:
    """Attention of every query on the keys that it sees -> [T, H, E]."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
    scores = logit_rule(q @ k.mT, softcap, scale).masked_fill(~visible.to(q.device), float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype)[:, None, None].expand(-1, len(query), 1)], -1)
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (probs[..., : len(query)] @ v).transpose(0, 1)

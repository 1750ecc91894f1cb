"""The definition of the losses per token, one response and one token after another, in plain PyTorch with autograd.

N = tokens of all responses, S = responses. Precision is the input's; nothing is clamped that the formulas do not clamp,
so large log-ratios overflow. Nothing optimised imports this file; tests do. `fastpo.losses.LOSSES` has the same losses
vectorised, with their gradients in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def token_kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """KL(pi || reference) by a token sampled from pi, d = log pi_ref - log pi: k1 -d, k2 d^2/2, k3 e^d - d - 1."""
    d = ref_logp - logp
    return {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - d - 1}[estimator]


def surrogate(r: Tensor, a: Tensor, epsilon: float, epsilon_high: float, delta: float | None) -> Tensor:
    """PPO's -min(r A, clip(r) A), the first r bounded by `delta`."""
    first = r if delta is None else r.clamp(max=delta)
    return -torch.minimum(first * a, r.clamp(1 - epsilon, 1 + epsilon_high) * a)


def sampled_weight(old: Tensor, sampler: Tensor, mode: str, low: float | None, high: float | None) -> Tensor:
    """pi_old / pi_sampler of one response's tokens [n] -> [n] or [1], truncated or masked."""
    apart = torch.where(sampler.isnan(), torch.zeros_like(old), old - sampler)
    ratio = torch.exp(apart.sum(0, keepdim=True) if mode.startswith("sequence") else apart)
    out = []
    for value in ratio.tolist():
        if low is not None and value < low:
            value = low if mode.endswith("truncate") else 0.0
        elif high is not None and value > high:
            value = high if mode.endswith("truncate") else 0.0
        out.append(value)
    return torch.tensor(out, dtype=old.dtype)


def policy_terms(
    name: str,
    logp: Tensor,  # [n] of one response, tokens that count
    a: Tensor,  # []
    old: Tensor,  # [n]
    ref: Tensor | None,  # [n]
    weight: Tensor | None,  # [n] or [1], the sampler's correction
    keep: Tensor,  # [n] 0/1
    hyper: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """(l_t [n], r_t [n] or [], which a corrected KL is multiplied by) of one response, `keep` and `weight` in l_t."""
    n = len(logp)
    ratio = torch.exp(logp - old)  # r_t
    if hyper.get("importance_sampling_level") == "sequence":
        r = torch.exp((logp - old).sum() / n)  # one of the response
    else:
        r = ratio
    low = hyper.get("epsilon")
    high = low if hyper.get("epsilon_high") is None else hyper["epsilon_high"]
    by = 1.0 if weight is None else weight
    if name == "reinforce":
        return -a * logp * keep * by, ratio
    if name == "rloo":
        whole = torch.exp(((logp - old) * keep).sum())
        return surrogate(whole, a, low, high, None) / n * torch.ones_like(logp) * by, ratio
    if name in ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "luspo"):
        return surrogate(r, a, low, high, hyper["delta"]) * keep * by, r
    if name == "gmpo":
        logs = []
        for change in logp - old:
            bounded = change.clamp(-low, high)
            logs.append(torch.minimum(change, bounded) if a > 0 else torch.maximum(change, bounded))
        mean = (torch.stack(logs) * keep).sum() / max(float(keep.sum()), 1.0)
        return -a * torch.exp(mean) * torch.ones_like(logp) * by, ratio
    if name == "cispo":
        return -r.detach().clamp(max=hyper["epsilon_high"]) * a * logp * keep * by, r
    if name == "sapo":
        t = hyper["sapo_temperature_pos"] if a > 0 else hyper["sapo_temperature_neg"]
        return -a * 4 / t * torch.sigmoid(t * (r - 1)) * keep * by, r
    if name == "vespo":
        sign = "pos" if a >= 0 else "neg"
        k, scale = hyper[f"vespo_k_{sign}"], hyper[f"vespo_lambda_{sign}"]
        log_w = float((logp - old).detach().clamp(-20, 20).sum())
        if weight is not None:
            log_w += sum(math.log(max(v, 1e-8)) for v in weight.tolist())
        w = min(max(math.exp(log_w), 1e-8), math.exp(20.0))
        return -(w**k) * math.exp(scale * (1 - w)) * a * logp * keep, r
    if name == "nash_md":
        pull = torch.zeros_like(logp)
        if hyper["beta"]:
            apart = (logp - ref).detach()
            pull = hyper["beta"] * (apart if hyper["kl_level"] == "token" else apart.sum())
        return (pull - a) * logp * keep * by, ratio
    raise KeyError(name)


def token_loss(
    name: str,
    logp: Tensor,  # [N]
    advantage: Tensor,  # [S]
    offsets: Tensor,  # [S + 1]
    hyper: Mapping[str, Any],
    *,
    old_logp: Tensor | None = None,  # [N]
    ref_logp: Tensor | None = None,  # [N]
    correction: Tensor | None = None,  # [N], or [S] of whole responses
    sampler_logp: Tensor | None = None,  # [N]
    mask: Tensor | None = None,  # [N] 0/1
    policy_mask: Tensor | None = None,  # [N] 0/1
    max_length: float = 0,
    tokens: float | None = None,  # of the whole step; None: of these
    responses: float | None = None,
) -> Tensor:
    """The loss [] of a step, or of one micro-batch's share in it. `hyper` are all hyper-parameters of the loss."""
    old_logp = logp.detach() if old_logp is None else old_logp
    counts = torch.ones_like(logp) if mask is None else mask.to(logp.dtype)
    tokens = float(counts.sum()) if tokens is None else tokens
    responses = len(advantage) if responses is None else responses
    total = torch.zeros((), dtype=logp.dtype) + 0 * logp.sum()
    for s in range(len(advantage)):
        rows = torch.arange(int(offsets[s]), int(offsets[s + 1]))
        rows = rows[counts[rows] > 0]
        if len(rows) == 0:
            continue
        a, n = advantage[s], len(rows)
        weight = None
        if correction is not None:
            weight = correction[rows] if len(correction) == len(logp) else correction[s : s + 1]
        keep = torch.ones_like(logp[rows]) if policy_mask is None else policy_mask[rows].to(logp.dtype)
        ref = None if ref_logp is None else ref_logp[rows]
        terms, r = policy_terms(name, logp[rows], a, old_logp[rows], ref, weight, keep, hyper)
        threshold = hyper.get("off_policy_mask_threshold")
        if threshold is not None:
            sampler = (old_logp if sampler_logp is None else sampler_logp)[rows]
            apart = torch.where(sampler.isnan(), torch.zeros_like(sampler), sampler - logp[rows].detach())
            if a < 0 and apart.sum() / n > threshold:
                terms = torch.zeros_like(terms)
        if hyper["beta"] and name != "nash_md":
            kl = token_kl_estimate(logp[rows], ref_logp[rows], hyper["kl_estimator"])
            terms = terms + hyper["beta"] * (r * kl if hyper["use_bias_correction_kl"] else kl)
        reduction = hyper["reduction"]
        if reduction == "seq_mean":
            total = total + terms.sum() / n / responses
        elif reduction == "seq_sum":
            total = total + terms.sum() / responses
        elif reduction == "token_mean":
            total = total + terms.sum() / tokens
        else:
            total = total + terms.sum() / (responses * max_length)
    return total

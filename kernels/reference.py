"""The definition of every op, in plain PyTorch: the input's precision is kept (fp64 stays fp64), autograd works.

N = head rows (completion tokens), D = hidden, V = vocabulary, S = responses, P = pairs. 16-bit inputs: the GEMM runs in
the input dtype, everything after it in fp32, which is also what "plain PyTorch" means in the test criterion.
Nothing optimised imports this file's arithmetic; tests, `fastpo check` and the plain `torch` backend do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


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


def row_logprob_entropy(
    raw: Tensor,  # [N, V]
    target: Tensor,  # [N] int64
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(`log p[target]`, `-sum_v p_v log p_v`), each [N], of p, the softmax of the rows of `raw`; both have gradients. A
    column of probability 0 adds nothing to the entropy; -100 rows are 0 in both and have no gradient."""
    raw = raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw
    logp = logit_rule(raw, softcap, logit_scale).log_softmax(dim=-1)
    picked = logp.gather(1, target.where(target != IGNORE_INDEX, 0).long().unsqueeze(1)).squeeze(1)
    entropy = -(logp.exp() * logp.where(logp > -torch.inf, 0.0)).sum(dim=-1)
    return _live(picked, target), _live(entropy, target)


def row_top1(raw: Tensor, target: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """1 where no logit of a row of `raw` [N, V] is above its target's, else 0 -> [N], in the dtype of `row_logprob`.

    Ties are 1. Rows with target -100 have 0, and so have rows whose log-probability is NaN.
    """
    z = logit_rule(raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw, softcap, logit_scale).detach()
    live = target != IGNORE_INDEX
    column = target.where(live, 0).long().unsqueeze(1)
    likeliest = (z.gather(1, column) == z.amax(dim=1, keepdim=True)).squeeze(1)
    return (likeliest & live & ~z.log_softmax(dim=-1).gather(1, column).squeeze(1).isnan()).to(z.dtype)


def row_argmax(raw: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """First column of the largest logit of each row of `raw` [N, V] -> [N] int64."""
    z = logit_rule(raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw, softcap, logit_scale)
    columns = torch.arange(z.shape[1], device=z.device)
    return columns.where(z == z.amax(dim=1, keepdim=True), z.shape[1]).amin(dim=1)


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    return_top1: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """log_softmax(softcap(logit_scale * (hidden W^T + b)))[target] -> logp [N] (fp32, or fp64 for fp64 inputs); then,
    where asked for, the entropy [N] and `row_top1` [N]."""
    raw = F.linear(hidden, weight, bias)
    logp, _, entropy = row_logprob(raw, target, softcap=softcap, logit_scale=logit_scale)
    if not (return_entropy or return_top1):
        return logp
    top1 = [row_top1(raw, target, softcap=softcap, logit_scale=logit_scale)] if return_top1 else []
    return logp, *([entropy] if return_entropy else []), *top1


def linear_logprob_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`row_logprob_entropy` of hidden W^T + b -> (logp [N], entropy [N]), fp32, or fp64 for fp64 inputs."""
    return row_logprob_entropy(F.linear(hidden, weight, bias), target, softcap=softcap, logit_scale=logit_scale)


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


class PairRewards(NamedTuple):
    """What a pair's metrics are made of, each [P]."""

    chosen: Tensor  # log-ratios; without a reference the log-probabilities, or their means over tokens
    rejected: Tensor
    wins: Tensor  # 1 where chosen is above rejected by more than the rounding of their sums


def pair_rewards(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    chosen_len: Tensor,  # [P]
    rejected_len: Tensor,  # [P]
    *,
    mean: bool,
) -> PairRewards:
    """Rewards without their beta; `mean` says whether those without a reference are means over tokens."""
    if ref_chosen_logps is not None:
        chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    elif mean:
        chosen, rejected = chosen_logps / chosen_len, rejected_logps / rejected_len
    else:
        chosen, rejected = chosen_logps, rejected_logps
    # At the start policy and reference differ by the rounding of two sums; a tie within it is no win, as in TRL, whose
    # two sums round alike.
    rounding = 2.0**-21 * (chosen_logps.abs() + rejected_logps.abs())
    return PairRewards(chosen, rejected, (chosen - rejected > rounding).to(chosen.dtype))


def pair_numbers(
    logp: Tensor,  # [N]
    ref_logp: Tensor | None,  # [N]
    response_offsets: Tensor,  # [S + 1] int32
    pairs: Tensor,  # [P, 2] int32
    *,
    ref_response_logps: Tensor | None = None,  # [S], instead of ref_logp
    prev_logp: Tensor | None = None,  # [N]; without any prev_*, the reference stands for the previous policy too
    prev_response_logps: Tensor | None = None,  # [S]
    rows: Tensor | None = None,  # [N], a further number per token
    token_weight: Tensor | None = None,  # [N]
    drawn_rows: Tensor | None = None,  # [K] int64
    segment_sum: Callable[[Tensor, Tensor], Tensor] = response_sums,
) -> dict[str, Tensor]:
    """What losses read of each pair, each [P]: sums over tokens, under the names of fastpo.losses.functions.Pairs, and
    `chosen_rows` and `rejected_rows`; autograd goes through. Without a reference its sums are 0; a response without
    tokens has length 1. With `drawn_rows` also `chosen_drawn_logps` and so on: sums over the rows listed, pair by pair,
    for each response as many as the shorter one has."""
    offsets = response_offsets.long()
    chosen, rejected = pairs.long().unbind(dim=1)
    tokens = offsets.diff()  # [S]
    shared = torch.minimum(tokens[chosen], tokens[rejected])  # [P]
    out = {}

    def weighted(values: Tensor) -> Tensor:
        return values if token_weight is None else token_weight.to(values.dtype) * values

    def put(name: str, of_response: Tensor) -> None:
        out[f"chosen_{name}"], out[f"rejected_{name}"] = of_response[chosen], of_response[rejected]

    def put_sums(prefix: str, values: Tensor | None, sums: Tensor | None) -> None:
        """Of the policy, the reference or the previous policy: whole sums; of values per token, tails and draws too."""
        of = sums if values is None else segment_sum(weighted(values), offsets)
        of = logp.new_zeros(len(tokens)) if of is None else of.to(logp.dtype)
        out[f"{prefix}chosen_logps"], out[f"{prefix}rejected_logps"] = of[chosen], of[rejected]
        if values is None:
            out[f"{prefix}chosen_tail_logps"] = out[f"{prefix}rejected_tail_logps"] = logp.new_zeros(len(pairs))
            return
        # A response has another tail in each of its pairs, so they are differences of one running sum, in fp64.
        running = weighted(values).double().cumsum(0)
        running = torch.cat([running.new_zeros(1), running])
        for side, responses in (("chosen", chosen), ("rejected", rejected)):
            tail = running[offsets[responses + 1]] - running[offsets[responses] + shared]
            out[f"{prefix}{side}_tail_logps"] = tail.to(logp.dtype)
        if drawn_rows is not None:
            ends = shared.repeat_interleave(2).cumsum(0)
            drawn = segment_sum(weighted(values)[drawn_rows], torch.cat([ends.new_zeros(1), ends]))
            out[f"{prefix}chosen_drawn_logps"], out[f"{prefix}rejected_drawn_logps"] = drawn[::2], drawn[1::2]

    put_sums("", logp, None)
    put_sums("ref_", ref_logp, ref_response_logps)
    no_prev = prev_logp is None and prev_response_logps is None
    put_sums("prev_", ref_logp if no_prev else prev_logp, ref_response_logps if no_prev else prev_response_logps)
    lengths = tokens.to(logp.dtype) if token_weight is None else segment_sum(token_weight.to(logp.dtype), offsets)
    put("len", torch.where(lengths == 0, 1.0, lengths))
    if rows is not None:
        put("rows", segment_sum(weighted(rows), offsets))
    return out


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


def adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,  # this one counted, from 1
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float = 1.0,  # of the gradient
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, exp_avg, exp_avg_sq) after a step of AdamW (arXiv 1711.05101), in the weight's precision; 16 bits are
    computed in fp32 and rounded to nearest at the end, as PyTorch's fused kernel does."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, g, m, v = (x.to(wide) for x in (weight, grad, exp_avg, exp_avg_sq))
    (beta1, beta2), g = betas, g * scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    unbiased, root = m / (1 - beta1**step), (v / (1 - beta2**step)).sqrt()
    w = w * (1 - lr * weight_decay) - lr * unbiased / (root + eps)
    return w.to(weight.dtype), m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)


def philox(counters: Sequence[Tensor | int], keys: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random numbers of 32 bits, int64, of four counters and two keys of 32 bits: Philox-4x32-10 (Salmon et al.,
    Parallel random numbers: as easy as 1, 2, 3, SC 2011)."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) & word for c in counters))
    k0, k1 = (key & word for key in keys)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, whose upper half is taken apart from its sign
        c0, c1, c2, c3 = (b >> 32 & word) ^ c1 ^ k0, b & word, (a >> 32 & word) ^ c3 ^ k1, a & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c0, c1, c2, c3


def rounding_noise(n: int, number: int, key: tuple[int, int]) -> Tensor:
    """[n] int64, 32 random bits for each element of tensor `number`: element e has number e % 4 of counter e // 4."""
    return torch.stack(philox((torch.arange(-(-n // 4)), 0, number, 0), key), 1).view(-1)[:n]


def stochastic_round(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """x in fp64 or fp32 as bf16 or fp16: the neighbour away from zero where the distance from the other one, in units
    of their distance, is more than 1 - u for the uniform u = the noise's last bits, as many as fp32 has more than
    `dtype`; so the expectation is x."""
    bits = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    x = x.double()
    exponent = torch.frexp(x).exponent - 1
    spacing = torch.ldexp(torch.ones_like(x), (exponent.clamp(min=-126 if bits == 16 else -14)) - (23 - bits))
    magnitude = x.abs() / spacing
    whole = magnitude.floor()
    up = magnitude - whole + (noise & (1 << bits) - 1).double() / (1 << bits) >= 1
    return torch.where(x.isfinite(), torch.copysign((whole + up) * spacing, x), x).to(dtype)

"""Fused preference kernel: token log-probabilities to losses, coefficients, metrics and per-token gradients.

N = head rows (completion tokens), S = responses, P = pairs, K = rows drawn. All arithmetic in fp32, no atomics. One
launch, in which one program owns one pair: it sums both responses, evaluates the loss and its two derivatives in closed
form, and writes every token's gradient. Where a response is in several pairs a second launch gathers its coefficients
in a fixed order. Every pointwise pair loss of fastpo.losses is here; `pair_losses.py` says of what pieces each is made,
and which losses stay in Python; the pieces are in `pair_formulas.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.online_softmax import device_guard
from fastpo.kernels.pair_formulas import pair_loss
from fastpo.kernels.pair_losses import RECIPES, Recipe, recipe

BLOCK_N = 1024  # tokens a step: most responses are one step, and 4 warps read 8 tokens a thread
BLOCK_P = 256  # pairs a step when the pairs of a response are gathered
TAIL_BLOCK_N = 16  # tokens a step beside BLOCK_P pairs, where each pair weighs the tokens differently
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

# Rows of the kernel's output per pair, [15, P]: the objective; fastpo.training.metrics.PAIR_METRICS (log-ratios or what
# stands for them, wins, log-probabilities, counts of chosen and rejected, no KL, count of pairs), so that one sum over
# the pairs is the step's metrics; and what fastpo.ops.PreferenceOutput shows of each pair.
METRICS = slice(1, 10)
SHOWN = slice(10, 15)
N_TERMS = 15


# ------------------------------------------------------------------------------------------------------ sums of tokens


@triton.jit
def _segment_sum(x_ptr, token_weight_ptr, begin, end, BLOCK_N: tl.constexpr):
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + offs_n, mask=offs_n < end, other=0.0)
        if token_weight_ptr is not None:
            x *= tl.load(token_weight_ptr + offs_n, mask=offs_n < end, other=0.0)
        acc += x
    return tl.sum(acc, axis=0)


@triton.jit
def _drawn_sum(x_ptr, token_weight_ptr, drawn_rows_ptr, begin, end, BLOCK_N: tl.constexpr):
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_N):
        offs_k = start + tl.arange(0, BLOCK_N)
        mask_k = offs_k < end
        rows = tl.load(drawn_rows_ptr + offs_k, mask=mask_k, other=0)
        x = tl.load(x_ptr + rows, mask=mask_k, other=0.0)
        if token_weight_ptr is not None:
            x *= tl.load(token_weight_ptr + rows, mask=mask_k, other=0.0)
        acc += x
    return tl.sum(acc, axis=0)


@triton.jit
def _sums(
    x_ptr,
    token_weight_ptr,
    drawn_rows_ptr,
    response,
    begin,
    cut,
    end,
    drawn_begin,
    drawn_end,
    extra,
    OF: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(sum over a response's tokens, sum of what the loss reads of them); OF: x is per token, per response, or none."""
    if OF == "none":
        whole = 0.0
        read = 0.0
    elif OF == "response":
        whole = tl.load(x_ptr + response)
        read = whole
    elif TOKENS == "tails":
        head = _segment_sum(x_ptr, token_weight_ptr, begin, cut, BLOCK_N)
        tail = _segment_sum(x_ptr, token_weight_ptr, cut, end, BLOCK_N)
        whole = head + tail
        read = head + extra * tail
    else:
        whole = _segment_sum(x_ptr, token_weight_ptr, begin, end, BLOCK_N)
        read = whole
        if TOKENS == "drawn":
            read = _drawn_sum(x_ptr, token_weight_ptr, drawn_rows_ptr, drawn_begin, drawn_end, BLOCK_N)
    return whole, read


@triton.jit
def _length(token_weight_ptr, begin, end, BLOCK_N: tl.constexpr):
    """Tokens of a response, or the sum of their weights; 1 for one that has none, whose mean is 0 and not NaN."""
    if token_weight_ptr is not None:
        n = tl.zeros([BLOCK_N], tl.float32)
        for start in range(begin, end, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            n += tl.load(token_weight_ptr + offs_n, mask=offs_n < end, other=0.0)
        length = tl.sum(n, axis=0)
    else:
        length = (end - begin).to(tl.float32)
    return tl.where(length == 0, 1.0, length)


@triton.jit
def _response(
    logp_ptr,
    ref_ptr,
    prev_ptr,
    rows_ptr,
    token_weight_ptr,
    drawn_rows_ptr,
    response,
    begin,
    cut,
    end,
    drawn_begin,
    drawn_end,
    extra,
    kappa,
    TOKENS: tl.constexpr,
    REFERENCE: tl.constexpr,
    REF: tl.constexpr,
    PREV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of one response: the policy's sum, what the loss reads of it; the same two of the reference; length, row sum."""
    logps, read = _sums(logp_ptr, token_weight_ptr, drawn_rows_ptr, response, begin, cut, end, drawn_begin, drawn_end,
                        extra, "token", TOKENS, BLOCK_N)  # fmt: skip
    ref_logps, ref_read = _sums(ref_ptr, token_weight_ptr, drawn_rows_ptr, response, begin, cut, end, drawn_begin,
                                drawn_end, extra, REF, TOKENS, BLOCK_N)  # fmt: skip
    if REFERENCE == "none":
        ref_read = 0.0
    elif REFERENCE == "mixed" and PREV != "none":
        prev, _ = _sums(prev_ptr, token_weight_ptr, None, response, begin, cut, end, 0, 0, extra, PREV, "all", BLOCK_N)
        ref_read = (1.0 - kappa) * prev + kappa * ref_read
    rows = 0.0
    if rows_ptr is not None:
        rows = _segment_sum(rows_ptr, token_weight_ptr, begin, end, BLOCK_N)
    return logps, read, ref_logps, ref_read, _length(token_weight_ptr, begin, end, BLOCK_N), rows


@triton.jit
def _segment_fill(x_ptr, token_weight_ptr, begin, end, value, BLOCK_N: tl.constexpr):
    for start in range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        filled = tl.zeros([BLOCK_N], tl.float32) + value
        if token_weight_ptr is not None:
            filled *= tl.load(token_weight_ptr + offs_n, mask=offs_n < end, other=0.0)
        tl.store(x_ptr + offs_n, filled, mask=offs_n < end)


@triton.jit
def _drawn_fill(x_ptr, token_weight_ptr, drawn_rows_ptr, begin, end, value, BLOCK_N: tl.constexpr):
    for start in range(begin, end, BLOCK_N):
        offs_k = start + tl.arange(0, BLOCK_N)
        mask_k = offs_k < end
        filled = tl.zeros([BLOCK_N], tl.float32) + value
        if token_weight_ptr is not None:
            rows = tl.load(drawn_rows_ptr + offs_k, mask=mask_k, other=0)
            filled *= tl.load(token_weight_ptr + rows, mask=mask_k, other=0.0)
        tl.store(x_ptr + offs_k, filled, mask=mask_k)


@triton.jit
def _put_metrics(terms_ptr, at, n_pairs, lw, ll, rw, rl, n_w, n_l, REWARD: tl.constexpr):
    """`pair_metrics` (training/metrics.py) of one pair, in rows 1 to 9. A tie within the sums' rounding is no win."""
    if REWARD == "ratio":
        chosen = lw - rw
        rejected = ll - rl
    elif REWARD == "mean":
        chosen = lw / n_w
        rejected = ll / n_l
    else:
        chosen = lw
        rejected = ll
    rounding = 1 / 2097152 * (tl.abs(lw) + tl.abs(ll))  # 2^-21
    tl.store(terms_ptr + 1 * n_pairs + at, chosen)
    tl.store(terms_ptr + 2 * n_pairs + at, rejected)
    tl.store(terms_ptr + 3 * n_pairs + at, tl.where(chosen - rejected > rounding, 1.0, 0.0))
    tl.store(terms_ptr + 4 * n_pairs + at, lw)
    tl.store(terms_ptr + 5 * n_pairs + at, ll)
    tl.store(terms_ptr + 6 * n_pairs + at, 1.0)
    tl.store(terms_ptr + 7 * n_pairs + at, 1.0)
    tl.store(terms_ptr + 8 * n_pairs + at, 0.0)
    tl.store(terms_ptr + 9 * n_pairs + at, 1.0)


@triton.jit(do_not_specialize=["n_pairs"])
def _preference_fwd_kernel(
    logp_ptr,  # [N]
    ref_ptr,  # [N], [S] or None, see REF
    prev_ptr,  # [N], [S] or None, see PREV
    rows_ptr,  # [N] or None: a further number per token
    token_weight_ptr,  # [N] or None
    drawn_rows_ptr,  # [K] int64 or None
    drawn_offsets_ptr,  # [2 P + 1] int32 or None
    response_offsets_ptr,  # [S + 1] int32
    pairs_ptr,  # [P, 2] int32
    weight_ptr,  # [P]
    win_prob_chosen_ptr,  # [P] or None
    win_prob_rejected_ptr,  # [P] or None
    terms_ptr,  # [15, P], out
    coef_ptr,  # [P, 2], out
    dlogp_ptr,  # [N], out, or None when a second launch writes it
    drows_ptr,  # [N], out, or None likewise, or where rows_ptr has no gradient
    ddrawn_ptr,  # [K], out, or None
    n_pairs,
    scale,
    offset,
    smoothing,
    extra,
    kappa,
    nll_coef,
    SHAPE: tl.constexpr,
    MARGIN: tl.constexpr,
    LABELS: tl.constexpr,
    PROBS: tl.constexpr,
    TOKENS: tl.constexpr,
    WEIGHTING: tl.constexpr,
    NLL: tl.constexpr,
    REFERENCE: tl.constexpr,
    REF: tl.constexpr,
    PREV: tl.constexpr,
    REWARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    n_pairs = n_pairs.to(tl.int64)
    chosen = tl.load(pairs_ptr + 2 * pid_p)
    rejected = tl.load(pairs_ptr + 2 * pid_p + 1)
    begin_w = tl.load(response_offsets_ptr + chosen)
    end_w = tl.load(response_offsets_ptr + chosen + 1)
    begin_l = tl.load(response_offsets_ptr + rejected)
    end_l = tl.load(response_offsets_ptr + rejected + 1)
    shared = tl.minimum(end_w - begin_w, end_l - begin_l)  # the tails' tokens come after it
    drawn_w = 0
    drawn_l = 0
    drawn_end = 0
    if TOKENS == "drawn":
        drawn_w = tl.load(drawn_offsets_ptr + 2 * pid_p)
        drawn_l = tl.load(drawn_offsets_ptr + 2 * pid_p + 1)
        drawn_end = tl.load(drawn_offsets_ptr + 2 * pid_p + 2)

    lw, xw, rw, yw, n_w, k_w = _response(
        logp_ptr, ref_ptr, prev_ptr, rows_ptr, token_weight_ptr, drawn_rows_ptr, chosen, begin_w, begin_w + shared,
        end_w, drawn_w, drawn_l, extra, kappa, TOKENS, REFERENCE, REF, PREV, BLOCK_N,
    )  # fmt: skip
    ll, xl, rl, yl, n_l, k_l = _response(
        logp_ptr, ref_ptr, prev_ptr, rows_ptr, token_weight_ptr, drawn_rows_ptr, rejected, begin_l, begin_l + shared,
        end_l, drawn_l, drawn_end, extra, kappa, TOKENS, REFERENCE, REF, PREV, BLOCK_N,
    )  # fmt: skip
    p_w = 1.0
    p_l = 0.0
    if PROBS != "none":
        p_w = tl.load(win_prob_chosen_ptr + pid_p)
        p_l = tl.load(win_prob_rejected_ptr + pid_p) if PROBS == "both" else 1.0 - p_w
    loss, dw, dl = pair_loss(xw, xl, yw, yl, n_w, n_l, k_w, k_l, p_w, p_l, scale, offset, smoothing, extra, nll_coef,
                             SHAPE, MARGIN, LABELS, WEIGHTING, NLL)  # fmt: skip

    weight = tl.load(weight_ptr + pid_p)
    dw *= weight
    dl *= weight
    tl.store(terms_ptr + pid_p, weight * loss)
    _put_metrics(terms_ptr, pid_p, n_pairs, lw, ll, rw, rl, n_w, n_l, REWARD)
    tl.store(terms_ptr + 10 * n_pairs + pid_p, loss)
    tl.store(terms_ptr + 11 * n_pairs + pid_p, lw)
    tl.store(terms_ptr + 12 * n_pairs + pid_p, ll)
    tl.store(terms_ptr + 13 * n_pairs + pid_p, rw)
    tl.store(terms_ptr + 14 * n_pairs + pid_p, rl)
    tl.store(coef_ptr + 2 * pid_p, dw)
    tl.store(coef_ptr + 2 * pid_p + 1, dl)
    if ddrawn_ptr is not None:
        _drawn_fill(ddrawn_ptr, token_weight_ptr, drawn_rows_ptr, drawn_w, drawn_l, dw, BLOCK_N)
        _drawn_fill(ddrawn_ptr, token_weight_ptr, drawn_rows_ptr, drawn_l, drawn_end, dl, BLOCK_N)
    if dlogp_ptr is not None:
        end_head_w = begin_w + shared if TOKENS == "tails" else end_w
        end_head_l = begin_l + shared if TOKENS == "tails" else end_l
        _segment_fill(dlogp_ptr, token_weight_ptr, begin_w, end_head_w, dw, BLOCK_N)
        _segment_fill(dlogp_ptr, token_weight_ptr, begin_l, end_head_l, dl, BLOCK_N)
        if TOKENS == "tails":
            _segment_fill(dlogp_ptr, token_weight_ptr, end_head_w, end_w, extra * dw, BLOCK_N)
            _segment_fill(dlogp_ptr, token_weight_ptr, end_head_l, end_l, extra * dl, BLOCK_N)
    if drows_ptr is not None:
        # TDPO's margin is that of a + extra D_w and b + extra D_l; TDPO2 has no gradient through D_w.
        _segment_fill(drows_ptr, token_weight_ptr, begin_w, end_w, extra * dw if MARGIN == "token_kl" else 0.0, BLOCK_N)
        _segment_fill(drows_ptr, token_weight_ptr, begin_l, end_l, extra * dl, BLOCK_N)


@triton.jit(do_not_specialize=["n_pairs"])
def _preference_dlogp_kernel(
    coef_ptr,  # [P, 2]
    pairs_ptr,  # [P, 2] int32
    response_offsets_ptr,  # [S + 1] int32
    token_weight_ptr,  # [N] or None
    dlogp_ptr,  # [N], out
    drows_ptr,  # [N], out, or None
    n_pairs,
    extra,
    MARGIN: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a response: sums the coefficients of its pairs in a fixed order, 0 for a response in no pair."""
    pid_s = tl.program_id(0)
    begin = tl.load(response_offsets_ptr + pid_s)
    end = tl.load(response_offsets_ptr + pid_s + 1)
    if TOKENS == "tails":
        for start_n in range(begin, end, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            acc_n = tl.zeros([BLOCK_N], tl.float32)
            for start in range(0, n_pairs, BLOCK_P):
                chosen, rejected, dw, dl = _own_coefficients(coef_ptr, pairs_ptr, pid_s, start, n_pairs, BLOCK_P)
                mine = (chosen == pid_s) | (rejected == pid_s)
                length_w = _tokens(response_offsets_ptr, chosen, mine)
                shared = tl.minimum(length_w, _tokens(response_offsets_ptr, rejected, mine))
                part = tl.where((offs_n - begin)[None, :] < shared[:, None], 1.0, extra)
                acc_n += tl.sum((dw + dl)[:, None] * part, axis=0)
            if token_weight_ptr is not None:
                acc_n *= tl.load(token_weight_ptr + offs_n, mask=offs_n < end, other=0.0)
            tl.store(dlogp_ptr + offs_n, acc_n, mask=offs_n < end)
    else:
        acc_w = tl.zeros([BLOCK_P], tl.float32)
        acc_l = tl.zeros([BLOCK_P], tl.float32)
        for start in range(0, n_pairs, BLOCK_P):
            _, _, dw, dl = _own_coefficients(coef_ptr, pairs_ptr, pid_s, start, n_pairs, BLOCK_P)
            acc_w += dw
            acc_l += dl
        _segment_fill(dlogp_ptr, token_weight_ptr, begin, end, tl.sum(acc_w + acc_l, axis=0), BLOCK_N)
        if drows_ptr is not None:
            total = tl.sum(acc_w + acc_l if MARGIN == "token_kl" else acc_l, axis=0)
            _segment_fill(drows_ptr, token_weight_ptr, begin, end, extra * total, BLOCK_N)


@triton.jit
def _own_coefficients(coef_ptr, pairs_ptr, response, start, n_pairs, BLOCK_P: tl.constexpr):
    """Of BLOCK_P pairs: both responses, and the coefficients that are this response's, else 0."""
    offs_p = start + tl.arange(0, BLOCK_P).to(tl.int64)
    mask_p = offs_p < n_pairs
    chosen = tl.load(pairs_ptr + 2 * offs_p, mask=mask_p, other=-1)
    rejected = tl.load(pairs_ptr + 2 * offs_p + 1, mask=mask_p, other=-1)
    dw = tl.load(coef_ptr + 2 * offs_p, mask=chosen == response, other=0.0)
    dl = tl.load(coef_ptr + 2 * offs_p + 1, mask=rejected == response, other=0.0)
    return chosen, rejected, dw, dl


@triton.jit
def _tokens(response_offsets_ptr, responses, mask):
    begin = tl.load(response_offsets_ptr + responses, mask=mask, other=0)
    return tl.load(response_offsets_ptr + responses + 1, mask=mask, other=0) - begin


# ----------------------------------------------------------------------------------------------------------- launchers


class PreferenceResult(NamedTuple):
    """What one launch computes, all fp32."""

    terms: Tensor  # [15, P]
    coef: Tensor  # [P, 2], weight * dloss/d(what the loss reads) of the chosen and rejected response
    dlogp: Tensor  # [N], gradient of sum_p weight_p loss_p
    drows: Tensor | None  # [N], its gradient in `rows`, for TDPO's KL

    @property
    def objective(self) -> Tensor:  # [P], weight * loss
        return self.terms[0]

    @property
    def metrics(self) -> Tensor:  # [9, P], as fastpo.training.metrics.PAIR_METRICS
        return self.terms[METRICS]

    @property
    def shown(self) -> Tensor:  # [5, P]: losses, sums of chosen and rejected, sums of the reference's (0 without one)
        return self.terms[SHOWN]


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is not None:
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.device == device, (
            f"{name} must be {dtype} {shape} on {device}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
        assert tensor.is_contiguous(), f"{name} must be contiguous"


def preference_fwd(
    logp: Tensor,  # [N] fp32
    ref_logp: Tensor | None,  # [N] fp32
    response_offsets: Tensor,  # [S + 1] int32
    pairs: Tensor,  # [P, 2] int32: preferred, other
    weight: Tensor,  # [P] fp32
    win_prob_chosen: Tensor | None = None,  # [P] fp32
    win_prob_rejected: Tensor | None = None,  # [P] fp32
    *,
    loss_type: str | Recipe,
    unique: bool = False,
    ref_response_logps: Tensor | None = None,  # [S] fp32, instead of ref_logp
    prev_logp: Tensor | None = None,  # [N] fp32: of the previous policy
    prev_response_logps: Tensor | None = None,  # [S] fp32, instead of prev_logp
    rows: Tensor | None = None,  # [N] fp32: WPO's log sum_v p_v^2, or TDPO's KL
    token_weight: Tensor | None = None,  # [N] fp32; a token of weight 2 counts as two
    drawn_rows: Tensor | None = None,  # [K] int64: SamPO's tokens, pair by pair, chosen's and then rejected's
    mean_rewards: bool = False,  # rewards without a reference are means over tokens
    **hyper: float | str | bool,  # of the loss, under the table's names
) -> PreferenceResult:
    """Losses, coefficients, metrics, response sums and gradients. unique=True promises that every response is in
    exactly one pair: one launch then does everything; otherwise a second one gathers each response's coefficients.

    A loss that mixes reference and previous policy takes the reference for the mixture where there is no prev_*. The
    tokens drawn are as many of each response of a pair as the shorter one has, no row twice for the same pair.
    """
    n, s, p = logp.numel(), response_offsets.numel() - 1, pairs.shape[0]
    made = loss_type if isinstance(loss_type, Recipe) else recipe(loss_type, **hyper)
    assert made is not None, f"loss_type must be one of {', '.join(RECIPES)} without a token_mean or prompt NLL"
    assert ref_logp is None or ref_response_logps is None, "a reference comes per token or per response, not both"
    assert prev_logp is None or prev_response_logps is None, "prev_* comes per token or per response, not both"
    if made.labels == "scored" and made.reference == "mixed" and win_prob_chosen is None:  # DNO without scores
        made = made._replace(labels="sure", probs="none")
    for probs, given in (("pair", win_prob_chosen), ("both", win_prob_chosen), ("both", win_prob_rejected)):
        assert made.probs != probs or given is not None, f"{loss_type} needs win_prob_chosen and win_prob_rejected"
    assert not made.reads_rows or rows is not None, f"{loss_type} needs rows"
    assert made.tokens == "all" or ref_response_logps is None, f"{loss_type} needs the reference per token"
    assert (made.tokens == "drawn") == (drawn_rows is not None), f"drawn_rows go with sampo, got {loss_type}"
    assert not unique or s == 2 * p, f"unique=True means S = 2 P, got {s} responses and {p} pairs"
    per_token = {"logp": logp, "ref_logp": ref_logp, "prev_logp": prev_logp, "rows": rows, "token_weight": token_weight}
    per_response = {"ref_response_logps": ref_response_logps, "prev_response_logps": prev_response_logps}
    per_pair = {"weight": weight, "win_prob_chosen": win_prob_chosen, "win_prob_rejected": win_prob_rejected}
    for tensors, size in ((per_token, n), (per_response, s), (per_pair, p)):
        for name, tensor in tensors.items():
            _check(name, tensor, (size,), torch.float32, logp.device)
    _check("response_offsets", response_offsets, (s + 1,), torch.int32, logp.device)
    _check("pairs", pairs, (p, 2), torch.int32, logp.device)
    drawn = made.tokens == "drawn"
    if drawn:
        _check("drawn_rows", drawn_rows, (drawn_rows.numel(),), torch.int64, logp.device)

    terms, coef = logp.new_empty(N_TERMS, p), logp.new_empty(p, 2)
    dlogp = torch.empty_like(logp) if p and not drawn else torch.zeros_like(logp)
    drows = torch.empty_like(dlogp) if made.has_row_gradient and p else None
    if p == 0:
        return PreferenceResult(terms, coef, dlogp, torch.zeros_like(logp) if made.has_row_gradient else None)
    ddrawn = torch.empty_like(drawn_rows, dtype=torch.float32) if drawn else None
    one_launch = unique and not drawn
    ref, of_ref = _per_token_or_response(ref_logp, ref_response_logps)
    prev, of_prev = _per_token_or_response(prev_logp, prev_response_logps)
    if made.reference != "mixed":
        prev, of_prev = None, "none"
    with device_guard(logp):
        _preference_fwd_kernel[(p,)](
            logp,
            ref,
            prev,
            rows if made.reads_rows else None,
            token_weight,
            drawn_rows,
            _drawn_offsets(response_offsets, pairs) if drawn else None,
            response_offsets,
            pairs,
            weight,
            win_prob_chosen if made.probs != "none" else None,
            win_prob_rejected if made.probs == "both" else None,
            terms,
            coef,
            dlogp if one_launch else None,
            drows if one_launch else None,
            ddrawn,
            p,
            *map(float, made.numbers),
            *made.words,
            REF=of_ref,
            PREV=of_prev,
            REWARD="ratio" if ref is not None else "mean" if mean_rewards else "sum",
            BLOCK_N=BLOCK_N,
            **OPTIONS,
        )
        if drawn:
            # The rows of different responses differ, so only pairs that share a response meet; accumulating index_put
            # sorts on a GPU, hence in a fixed order.
            dlogp.index_put_((drawn_rows,), ddrawn, accumulate=not unique)
        elif not unique:
            _preference_dlogp_kernel[(s,)](
                coef,
                pairs,
                response_offsets,
                token_weight,
                dlogp,
                drows,
                p,
                float(made.extra),
                MARGIN=made.margin,
                TOKENS=made.tokens,
                BLOCK_P=BLOCK_P,
                BLOCK_N=TAIL_BLOCK_N if made.tokens == "tails" else BLOCK_N,
                **OPTIONS,
            )
    return PreferenceResult(terms, coef, dlogp, drows)


def _per_token_or_response(per_token: Tensor | None, per_response: Tensor | None) -> tuple[Tensor | None, str]:
    if per_token is not None:
        return per_token, "token"
    return per_response, "none" if per_response is None else "response"


def _drawn_offsets(response_offsets: Tensor, pairs: Tensor) -> Tensor:
    """Where the rows drawn of each pair's two responses begin, as many as the shorter one has. -> [2 P + 1] int32"""
    shorter = response_offsets.diff()[pairs.long()].amin(1)
    ends = shorter.repeat_interleave(2).cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])

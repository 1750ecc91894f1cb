"""Triton AdamW: many tensors a launch, each number read once and written once, with stochastic rounding if wanted.

A row of `table` is a tensor: the addresses of its gradient, weight, fp32 master or 0, both moments and step count, how
many elements it has, and its number, which never changes. A program steps CHUNK elements of one tensor. What the host
does not know is read on the device: whether the gradients are finite (else nothing is written) and what they are scaled
by. Random bits are Philox's of (key, number of the tensor, element): not of the launch that a tensor falls into.

Arithmetic is fp32, in PyTorch's order; the bias corrections, which would cancel, are fp64, once a program.
Reference: `reference.adamw`, `reference.stochastic_round`, `reference.philox`. Source: Loshchilov and Hutter
(arXiv 1711.05101); Philox-4x32-10 of Salmon et al. (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.online_softmax import device_guard

COLUMNS = 8
CHUNK = 16_384  # elements a program: of 8 billion parameters, 4 MB of chunks
BLOCK = 2048  # elements at a time: 8 a thread
WARPS = 8
# By dtype: bits of fp32's mantissa that it lacks, and its smallest normal number where its subnormals are not fp32's.
_CUT = {torch.bfloat16: 16, torch.float16: 13}
_SMALLEST = {torch.bfloat16: 0.0, torch.float16: 2.0**-14}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class AdamWTensor(NamedTuple):
    """What one tensor's step reads and writes, all of one shape, contiguous and on one device."""

    grad: Tensor
    weight: Tensor
    master: Tensor | None  # fp32: it is stepped instead of the weight, which gets it rounded
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # [] fp32, this step counted
    number: int  # which random bits are this tensor's


class AdamWTable(NamedTuple):
    """Tensors of one launch on the device."""

    rows: list[list[int]]  # what `table` holds
    table: Tensor  # [n, COLUMNS] int64
    chunks: Tensor  # [programs, 2] int32: which tensor, and which of its chunks
    aligned: bool  # all addresses are multiples of 16


@triton.jit
def _random(block, high, number, key_0, key_1, BLOCK: tl.constexpr):
    """[BLOCK] uint32 for the elements of a block: each number of Philox's four for one element."""
    c0 = block.to(tl.uint32) * (BLOCK // 4) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = c0 * 0
    r0, r1, r2, r3 = tl.philox_impl(c0, zero + high, zero + number, zero, zero + key_0, zero + key_1)
    return tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))


@triton.jit
def _round(x, noise, CUT: tl.constexpr, SMALLEST: tl.constexpr):
    """fp32 rounded to one of its neighbours of fewer digits: noise below the last digit is added, and all there cut."""
    low: tl.constexpr = (1 << CUT) - 1
    moved = x
    if SMALLEST > 0.0:  # subnormals have the spacing of the first binade above them, to which this moves them
        lift = tl.where(tl.abs(x) < SMALLEST, tl.where(x < 0, -SMALLEST, SMALLEST), 0.0)
        moved = x + lift
    bits = moved.to(tl.uint32, bitcast=True)
    cut = (bits + (noise & low)) & (0xFFFFFFFF - low)
    rounded = cut.to(tl.float32, bitcast=True)
    if SMALLEST > 0.0:
        rounded -= lift
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def _step_block(
    grad_ptr, weight_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, first, stop, number, key_0, key_1,
    scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps,
    MASTER: tl.constexpr, CUT: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """BLOCK elements from `first` on; all of them are the tensor's where WHOLE."""
    offs = tl.arange(0, BLOCK)
    mask = None if WHOLE else offs < (stop - first).to(tl.int32)
    grad = tl.load(grad_ptr + first + offs, mask=mask).to(tl.float32) * scale
    stepped_ptr = master_ptr if MASTER else weight_ptr
    w = tl.load(stepped_ptr + first + offs, mask=mask).to(tl.float32)
    m = tl.load(exp_avg_ptr + first + offs, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + first + offs, mask=mask).to(tl.float32)
    m += one_minus_beta1 * (grad - m)
    v = beta2 * v + one_minus_beta2 * (grad * grad)
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction) + eps
    w = w * decay - step_size * tl.div_rn(m, denominator)
    tl.store(exp_avg_ptr + first + offs, m.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptr + first + offs, v.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    if MASTER:
        tl.store(master_ptr + first + offs, w, mask=mask)
    if CUT > 0:
        block = first // BLOCK
        high = (first // 4 >> 32).to(tl.uint32)
        w = _round(w, _random(block, high, number, key_0, key_1, BLOCK), CUT, SMALLEST)
    tl.store(weight_ptr + first + offs, w.to(weight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _address(row_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """What a column holds. Of 16 bits 8 bytes are read at a time, so that all numbers of an element, and four of a
    counter, are the same thread's; else layouts are exchanged through shared memory."""
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(ptr, 4 * dtype.primitive_bitwidth // 8) if ALIGNED else ptr


@triton.jit(do_not_specialize=["key_0", "key_1"])
def _adamw_kernel(
    table_ptr,  # [n, COLUMNS] int64
    chunks_ptr,  # [programs, 2] int32
    finite_ptr,  # [] fp32, 0: nothing is written
    scale_ptr,  # [] fp32 or None, of the gradients
    decay,  # 1 - learning rate times weight decay
    log_beta1,
    log_beta2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    lr,
    eps,
    key_0,  # of the random bits
    key_1,
    COLUMNS: tl.constexpr,
    GRAD: tl.constexpr,  # dtypes
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    MASTER: tl.constexpr,
    CUT: tl.constexpr,  # 0: round to nearest
    SMALLEST: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(finite_ptr) == 0.0:
        return
    pid = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(chunks_ptr + 2 * pid).to(tl.int64) * COLUMNS
    start = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64) * CHUNK
    grad_ptr = _address(row_ptr, 0, GRAD, ALIGNED)
    weight_ptr = _address(row_ptr, 1, WEIGHT, ALIGNED)
    master_ptr = _address(row_ptr, 2, tl.float32, ALIGNED)
    exp_avg_ptr = _address(row_ptr, 3, STATE, ALIGNED)
    exp_avg_sq_ptr = _address(row_ptr, 4, STATE, ALIGNED)
    step = tl.load(tl.load(row_ptr + 5).to(tl.pointer_type(tl.float32))).to(tl.float64)
    n = tl.load(row_ptr + 6)
    number = tl.load(row_ptr + 7).to(tl.uint32)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    step_size = (lr / (1.0 - tl.exp(step * log_beta1))).to(tl.float32)
    root_correction = tl.sqrt(1.0 - tl.exp(step * log_beta2)).to(tl.float32)

    stop = tl.minimum(start + CHUNK, n)
    count = (stop - start) // BLOCK
    for i in range(0, count):
        _step_block(
            grad_ptr, weight_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, start + i * BLOCK, stop, number,
            key_0, key_1, scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps,
            MASTER, CUT, SMALLEST, BLOCK, True,
        )  # fmt: skip
    whole = start + count * BLOCK
    if whole < stop:
        _step_block(
            grad_ptr, weight_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, whole, stop, number,
            key_0, key_1, scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps,
            MASTER, CUT, SMALLEST, BLOCK, False,
        )  # fmt: skip


def adamw_table(tensors: Sequence[AdamWTensor], before: AdamWTable | None = None) -> AdamWTable:
    """The table of these tensors; `before`, or its parts, where they have not changed. Asks the device for nothing."""
    rows = []
    for t in tensors:
        read = (t.grad, t.weight, t.master, t.exp_avg, t.exp_avg_sq)
        assert all(x is None or (x.is_contiguous() and x.numel() == t.weight.numel()) for x in read)
        assert t.step.dtype == torch.float32 and all(x is None or x.device == t.weight.device for x in (*read, t.step))
        addresses = [0 if x is None else x.data_ptr() for x in (*read, t.step)]
        rows.append([*addresses, t.weight.numel(), t.number])
    if before is not None and before.rows == rows:
        return before
    device = tensors[0].weight.device
    if before is not None and [r[6] for r in before.rows] == [r[6] for r in rows]:
        chunks = before.chunks
    else:
        counts = torch.tensor([-(-row[6] // CHUNK) for row in rows])
        first = counts.cumsum(0) - counts
        of = torch.arange(len(rows)).repeat_interleave(counts)
        chunks = _upload(torch.stack([of, torch.arange(len(of)) - first[of]], 1).int(), device)
    aligned = all(address % 16 == 0 for row in rows for address in row[:5])
    return AdamWTable(rows, _upload(torch.tensor(rows, dtype=torch.int64), device), chunks, aligned)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """Not waited for: PyTorch keeps pinned memory until the copy out of it is done."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def adamw(
    table: AdamWTable,
    tensors: Sequence[AdamWTensor],  # those of the table, alike in dtypes and in having a master
    *,
    finite: Tensor,  # [] fp32
    scale: Tensor | None,  # [] fp32
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    key: tuple[int, int] | None,  # two words of 32 bits, signed: round stochastically; None: to nearest
) -> None:
    """Steps weights, masters and moments in place; step counts are the caller's."""
    like = tensors[0]
    assert all(
        (t.grad.dtype, t.weight.dtype, t.exp_avg.dtype, t.exp_avg_sq.dtype, t.master is None)
        == (like.grad.dtype, like.weight.dtype, like.exp_avg.dtype, like.exp_avg.dtype, like.master is None)
        for t in tensors
    ), "one launch takes tensors of the same dtypes"
    assert key is None or (like.master is None and like.weight.dtype in _CUT), "only 16-bit weights are rounded so"
    if len(table.chunks) == 0:
        return
    beta1, beta2 = betas
    logs = (math.log(b) if b > 0 else -math.inf for b in betas)
    with device_guard(like.weight):
        _adamw_kernel[(len(table.chunks),)](
            table.table, table.chunks, finite, scale, 1 - lr * weight_decay, *logs, 1 - beta1, beta2, 1 - beta2,
            float(lr), float(eps), *(key or (0, 0)), COLUMNS, _TYPES[like.grad.dtype], _TYPES[like.weight.dtype],
            _TYPES[like.exp_avg.dtype], like.master is not None, 0 if key is None else _CUT[like.weight.dtype],
            _SMALLEST.get(like.weight.dtype, 0.0), table.aligned, CHUNK, BLOCK, num_warps=WARPS,
        )  # fmt: skip

"""AdamW of 16-bit weights on a GPU in few launches (kernels/adamw.py): no fp32 copies in turn, and no passes apart for
the gradient's scale, the cast and the rounding.

The kernel has not run on every GPU, so a run takes it where a small step of it agrees with PyTorch's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastpo.kernels.adamw import AdamWTable

log = logging.getLogger("fastpo")
NARROW = (torch.bfloat16, torch.float16)
SWITCH = "FASTPO_TRITON_ADAMW"  # 0: PyTorch's AdamW
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton kernels on CPU tensors, for tests
EXAMPLE = 5001  # elements of the trial: whole blocks and a part of one


class Step(NamedTuple):
    """One parameter's step."""

    stepped: nn.Parameter  # what the optimiser knows
    weight: Tensor
    grad: Tensor  # fp32 or 16 bits, not scaled yet
    kind: str  # master: `stepped` is an fp32 copy; stochastic: a stand-in without memory; nearest: the weight itself
    number: int  # of the parameter, which says what random bits are its own


class TritonAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with its fused step, and `step_all` for 16-bit weights.

    State and options are torch.optim.AdamW's, so that checkpoints are alike.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._tables: dict[tuple, AdamWTable] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None  # a checkpoint may be of a run that stepped otherwise

    @torch.no_grad()
    def step_all(self, steps: Sequence[Step], finite: Tensor, scale: Tensor | None, seed: int | str) -> None:
        """Steps them all where `finite` [] bool, by gradients times `scale` [] fp32; stochastic rounding by bits of
        `seed`, of the parameter's number and of the element. The host waits for nothing."""
        from fastpo.kernels import adamw

        of_group = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        batches: dict[tuple, list[Step]] = {}
        for s in steps:
            kind = (s.weight.device, of_group[s.stepped], s.weight.dtype, s.grad.dtype, s.kind)
            batches.setdefault(kind, []).append(s)
        used = {}
        for kind, batch in batches.items():
            device, group_index = kind[:2]
            group, finite_there = self.param_groups[group_index], finite.to(device, torch.float32)
            tensors = [self._tensors(s) for s in batch]
            torch._foreach_add_([t.step for t in tensors], [finite_there] * len(tensors))
            used[kind] = adamw.adamw_table(tensors, self._tables.get(kind))
            adamw.adamw(
                used[kind], tensors, finite=finite_there, scale=None if scale is None else scale.to(device),
                lr=float(group["lr"]), betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                key=_key(seed) if kind[-1] == "stochastic" else None,
            )  # fmt: skip
        self._tables = used

    def _tensors(self, s: Step) -> Any:
        from fastpo.kernels.adamw import AdamWTensor

        state = self.state[s.stepped]
        if not state:  # as torch.optim.AdamW begins
            dtype, home = s.stepped.dtype, s.weight.device
            state["step"] = torch.zeros((), dtype=torch.float32, device=home)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(s.weight, dtype=dtype) for _ in range(2))
        for name, value in state.items():  # loaded from a run whose step was counted on the host
            if value.device != s.weight.device:
                state[name] = value.to(s.weight.device)
        master = s.stepped if s.kind == "master" else None
        grad = s.grad if s.grad.is_contiguous() else s.grad.contiguous()
        return AdamWTensor(grad, s.weight, master, state["exp_avg"], state["exp_avg_sq"], state["step"], s.number)


def _key(seed: int | str) -> tuple[int, int]:
    """Two signed words of 32 bits, which Triton always sees as of one type."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def takes(weight: Tensor) -> bool:
    """Whether the kernel steps a weight: of 16 bits, whole (no DTensor), contiguous, on a GPU."""
    on_gpu = weight.device.type == "cuda" or (INTERPRETED and weight.device.type == "cpu")
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    return on_gpu and plain and weight.dtype in NARROW and weight.is_contiguous() and weight.numel() > 0


def usable(weights: Mapping[Tensor, str], group: dist.ProcessGroup | None) -> bool:
    """Whether a run steps these weights, with their kinds, by the kernel: there is one, and small steps of it agree
    with PyTorch's, for every process of `group`, whose random bits must be alike."""
    found = {(w.device, w.dtype, kind): None for w, kind in weights.items()}  # in one order on all processes
    wanted = bool(found) and os.environ.get(SWITCH, "1") != "0" and importlib.util.find_spec("triton") is not None
    agrees = wanted and all([_agrees(*each) for each in found])
    if group is None:
        return agrees
    home = torch.device("cpu") if "cpu" in dist.get_backend_config(group) else next(iter(weights)).device
    votes = torch.tensor(int(agrees), device=home)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=group)
    return bool(votes)


@functools.cache
def _agrees(device: torch.device, dtype: torch.dtype, kind: str) -> bool:
    """Whether small steps by the kernel are PyTorch's; once a process, and one line where they are not."""
    try:
        wrong = [
            name for grad_dtype in (dtype, torch.float32) for name in _differences(device, dtype, grad_dtype, kind)
        ]
        reason = f"{', '.join(wrong)} of a small step differ" if wrong else ""
    except Exception as error:  # Triton raises whatever its passes, ptxas or the driver end with
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason:
        log.warning("16-bit weights are stepped by PyTorch's AdamW, not by the Triton kernel (%s: %s)", device, reason)
    return not reason


def _differences(device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype, kind: str) -> list[str]:
    """What is not as after PyTorch's step: of a step, and of one that is not finite and must change nothing."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(EXAMPLE, generator=generator).to(device, dtype)
    grad = torch.randn(EXAMPLE, generator=generator).to(device, grad_dtype)
    scale = torch.tensor(0.5, device=device)
    weight = nn.Parameter(start.clone())
    # Of a stand-in the kernel reads nothing but its dtype.
    stepped = weight if kind == "nearest" else nn.Parameter(start.float())
    plain = nn.Parameter(start.float())
    plain.grad = grad.float() * scale
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours, theirs = TritonAdamW([stepped], fused=True, **options), torch.optim.AdamW([plain], **options)
    for finite in (True, False):
        step = Step(stepped, weight, grad, kind, 0)
        ours.step_all([step], torch.tensor(finite, device=device), scale, f"0 {finite}")
    theirs.step()
    spacing = torch.finfo(dtype).eps  # of neighbours, at most, relative to them
    pairs = {name: (ours.state[stepped][name], theirs.state[plain][name]) for name in ("exp_avg", "exp_avg_sq", "step")}
    pairs |= {"weight": (weight, plain)} | ({"master": (stepped, plain)} if kind == "master" else {})
    wrong = []
    for name, (a, b) in pairs.items():
        got, wanted = a.detach().double().cpu(), b.detach().double().cpu()
        allowed = (2 * spacing if a.dtype in NARROW else 1e-5) * wanted.abs() + 1e-6
        wrong += [] if bool(((got - wanted).abs() <= allowed).all()) else [name]
    if kind == "stochastic":  # on average it is exact; cut off, it would be half a spacing too near to zero
        off = (weight.detach().double() / plain.detach().double() - 1)[plain.abs() > 1e-2].mean()
        wrong += [] if abs(float(off)) < spacing / 8 else ["the mean of the rounded weight"]
    return wrong

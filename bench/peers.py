"""Everybody who computes token log-probabilities or a preference loss from hidden states, called as their users do.

N = head rows, D = hidden, V = vocabulary. Each provider does one job on one `Problem`, forward and backward, in the
input dtype, allocates its outputs afresh and returns all of them by name: what is checked against fp64 (harness.py) is
what is timed. Peers are imported inside their own step: one that is absent or cannot run is listed with the reason.

job      outputs                                    what the backward gets
none     logp [N]                                   nothing
frozen   logp, dhidden [N, D]                       a different gradient for every row
rows     logp, dhidden, dweight [V, D]              the same
entropy  logp, entropy [N], dhidden, dweight        the same for logp, that of the row across for the entropy
sum      loss (minus the sum of logp), both grads   one number: what a cross entropy without row gradients can do
dpo      loss, both grads                           of PAIRS pairs of equal responses, without a reference
simpo    the same, length-normalised with a margin
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import ops

PAIRS = 4
BETA = 0.1
SIMPO_BETA, SIMPO_GAMMA = 2.0, 1.0  # the paper's scale: the margin gamma = 0.5 beta
KEEP_ALL = 1 << 62  # a memory budget that any N x V fits

Outputs = dict[str, Tensor]


@dataclass
class Problem:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    upstream: Tensor  # [N], the gradient of each row's log-probability

    @classmethod
    def make(cls, n: int, d: int, v: int, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        target = torch.randint(0, v, (n,), generator=generator, device=device)
        return cls(normal(n, d), normal(v, d).div_(d**0.5), target, normal(n, dtype=torch.float32))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.hidden.shape, self.weight.shape[0])

    def leaves(self, weight_grad: bool = True) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(weight_grad)


@dataclass(frozen=True)
class Provider:
    name: str
    step: Callable[[Problem], Outputs]
    job: str
    regime: str  # which floor it is held to: none, frozen, kept, sliced (it computes the logits twice)
    needs: tuple[str, ...] = ()  # modules
    device: str | None = None  # runs on this one alone
    level: str = "op"
    compiles: bool = False  # a first call on a shape compiles

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.device is not None and self.device != device:
            return "its kernels need a GPU" if self.device == "cuda" else "its CPU form; the GPU has its kernels"
        if self.name.startswith("torch_lce") and not hasattr(F, "linear_cross_entropy"):
            return f"PyTorch {torch.__version__} has no F.linear_cross_entropy"
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{absent[0]} is not installed" if absent else None


def _grads(hidden: Tensor, weight: Tensor, **values: Tensor) -> Outputs:
    found = {"dhidden": hidden.grad, "dweight": weight.grad}
    return {name: t.detach() for name, t in values.items()} | {n: t for n, t in found.items() if t is not None}


def gemms(count: int) -> Callable[[Problem], Outputs]:
    """The products alone: the logits; with two, dX; with three, dW. Nothing else is done, nothing is checked."""

    def step(p: Problem) -> Outputs:
        logits = torch.mm(p.hidden, p.weight.t())
        out = {"dhidden": torch.mm(logits, p.weight)} if count > 1 else {"logits": logits}
        if count > 2:
            out["dweight"] = torch.mm(logits.t(), p.hidden)
        return out

    return step


def fastpo_op(job: str, budget: int | None = None) -> Callable[[Problem], Outputs]:
    def step(p: Problem) -> Outputs:
        hidden, weight = p.leaves(job == "rows")
        if job == "none":
            with torch.no_grad():
                return {"logp": ops.linear_logprob(hidden, weight, p.target)}
        logp = ops.linear_logprob(hidden, weight, p.target, memory_budget=budget)
        logp.backward(p.upstream)
        return _grads(hidden, weight, logp=logp)

    return step


def _plain_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)


@functools.cache
def _compiled_logp() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_plain_logp, dynamic=False, fullgraph=True)


def fastpo_entropy(budget: int | None) -> Callable[[Problem], Outputs]:
    def step(p: Problem) -> Outputs:
        hidden, weight = p.leaves()
        logp, entropy = ops.linear_logprob_entropy(hidden, weight, p.target, memory_budget=budget)
        torch.autograd.backward((logp, entropy), (p.upstream, p.upstream.flip(0)))
        return _grads(hidden, weight, logp=logp, entropy=entropy)

    return step


def naive_entropy(p: Problem) -> Outputs:
    hidden, weight = p.leaves()
    logps = F.linear(hidden, weight).float().log_softmax(-1)
    logp, entropy = logps.gather(1, p.target.unsqueeze(1)).squeeze(1), -(logps.exp() * logps).sum(-1)
    torch.autograd.backward((logp, entropy), (p.upstream, p.upstream.flip(0)))
    return _grads(hidden, weight, logp=logp, entropy=entropy)


def naive(job: str, compiled: bool = False) -> Callable[[Problem], Outputs]:
    if job == "entropy":
        return naive_entropy

    def step(p: Problem) -> Outputs:
        hidden, weight = p.leaves(job != "frozen")
        logp_of = _compiled_logp() if compiled else _plain_logp
        if job == "none":
            with torch.no_grad():
                return {"logp": logp_of(hidden, weight, p.target)}
        logp = logp_of(hidden, weight, p.target)
        if job in ("dpo", "simpo"):
            loss = pair_loss(logp, job)
            loss.backward()
            return _grads(hidden, weight, loss=loss)
        if job == "sum":
            loss = -logp.sum()
            loss.backward()
            return _grads(hidden, weight, loss=loss)
        logp.backward(p.upstream)
        return _grads(hidden, weight, logp=logp)

    return step


def pair_loss(logp: Tensor, job: str) -> Tensor:
    """Mean loss of PAIRS pairs: the first half of the rows are the chosen responses, all of one length."""
    chosen, rejected = logp.view(2, PAIRS, -1).sum(-1)
    if job == "dpo":
        margin = BETA * (chosen - rejected)
    else:
        margin = SIMPO_BETA * (chosen - rejected) / (logp.numel() // (2 * PAIRS)) - SIMPO_GAMMA
    return -F.logsigmoid(margin).mean()


def fastpo_loss(job: str, budget: int | None = None) -> Callable[[Problem], Outputs]:
    def step(p: Problem) -> Outputs:
        hidden, weight = p.leaves()
        logp = ops.linear_logprob(hidden, weight, p.target, memory_budget=budget)
        offsets, pairs, pair_weight = _pair_layout(len(p.target), p.target.device)
        hyper = {"beta": BETA} if job == "dpo" else {"beta": SIMPO_BETA, "gamma_beta_ratio": SIMPO_GAMMA / SIMPO_BETA}
        loss, _ = ops.preference_loss(logp, None, offsets, pairs, pair_weight, loss_type=job, unique=True, **hyper)
        loss.backward()
        return _grads(hidden, weight, loss=loss)

    return step


@functools.cache  # fastpo's collator makes it on the host, outside a step
def _pair_layout(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.arange(0, n + 1, n // (2 * PAIRS), dtype=torch.int32, device=device)
    pairs = torch.arange(2 * PAIRS, dtype=torch.int32, device=device).view(2, PAIRS).t().contiguous()
    return offsets, pairs, torch.full((PAIRS,), 1 / PAIRS, device=device)


def torch_cross_entropy(reduction: str, rows: int | None = None) -> Callable[[Problem], Outputs]:
    """PyTorch's own fused form, chunked by its defaults, which save memory first (16 of 1,024 rows at V = 63 D), or by
    `rows`. `none` recomputes the logits, `sum` takes one gradient."""

    def step(p: Problem) -> Outputs:
        hidden, weight = p.leaves()
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        loss = F.linear_cross_entropy(hidden, weight, p.target, reduction=reduction, options=options)
        if reduction == "sum":
            loss.backward()
            return _grads(hidden, weight, loss=loss)
        loss.backward(-p.upstream.to(loss.dtype))
        return _grads(hidden, weight, logp=-loss)

    return step


def trl_chunked(outputs: tuple[str, ...]) -> Callable[[Problem], Outputs]:
    """What TRL's trainers call on the completion rows (add_fused_lm_head in trl/trainer/utils.py), with their chunk."""

    def step(p: Problem) -> Outputs:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

        hidden, weight = p.leaves()
        logp = ChunkedLogProbFunction.apply(hidden, weight, None, p.target, 1.0, chunk, None, 1.0, outputs)[0]
        logp.backward(p.upstream)
        return _grads(hidden, weight, logp=logp)

    return step


def cut_cross_entropy(impl: str, filter_eps: str | None) -> Callable[[Problem], Outputs]:
    def step(p: Problem) -> Outputs:
        from cut_cross_entropy import linear_cross_entropy

        hidden, weight = p.leaves()
        loss = linear_cross_entropy(hidden, weight, p.target, reduction="none", impl=impl, filter_eps=filter_eps)
        loss.backward(-p.upstream.to(loss.dtype))
        return _grads(hidden, weight, logp=-loss)

    return step


def liger_cross_entropy(p: Problem) -> Outputs:
    """A scalar loss: it takes a gradient per row only by recomputing."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight = p.leaves()
    loss = liger_fused_linear_cross_entropy(hidden, weight, p.target, reduction="sum")
    loss.backward()
    return _grads(hidden, weight, loss=loss)


def liger_loss(job: str, compiled: bool = True) -> Callable[[Problem], Outputs]:
    """Liger's chunked preference losses with the chunk of one pair that is their default."""

    def step(p: Problem) -> Outputs:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearSimPOLoss

        hidden, weight = p.leaves()
        rows = hidden.view(2 * PAIRS, -1, hidden.shape[1])
        if job == "dpo":
            loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)
        else:
            options = {"beta": SIMPO_BETA, "gamma": SIMPO_GAMMA, "compute_nll_loss": False}
            loss_of = LigerFusedLinearSimPOLoss(compiled=compiled, **options)
        loss = loss_of(weight, rows, p.target.view(2 * PAIRS, -1))[0]
        loss.backward()
        return _grads(hidden, weight, loss=loss)

    return step


def quack(p: Problem) -> Outputs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, weight = p.leaves()
    loss = chunked_linear_cross_entropy(hidden, weight, p.target, reduction="sum")
    loss.backward()
    return _grads(hidden, weight, loss=loss)


TRL_DPO_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what its DPOTrainer asks for, for its metrics

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("gemms_1", gemms(1), "gemms", "none"),
        Provider("gemms_2", gemms(2), "gemms", "frozen"),
        Provider("gemms_3", gemms(3), "gemms", "kept"),
        Provider("fastpo_none", fastpo_op("none"), "none", "none"),
        Provider("fastpo_frozen", fastpo_op("frozen"), "frozen", "frozen"),
        Provider("fastpo_kept", fastpo_op("rows", KEEP_ALL), "rows", "kept"),
        Provider("fastpo_sliced", fastpo_op("rows", 0), "rows", "sliced"),
        Provider("fastpo_entropy", fastpo_entropy(KEEP_ALL), "entropy", "kept"),
        Provider("fastpo_entropy_sliced", fastpo_entropy(0), "entropy", "sliced"),
        Provider("naive", naive("rows"), "rows", "kept"),
        Provider("naive_none", naive("none"), "none", "none"),
        Provider("naive_frozen", naive("frozen"), "frozen", "frozen"),
        Provider("naive_entropy", naive_entropy, "entropy", "kept"),
        Provider("compiled", naive("rows", compiled=True), "rows", "kept", compiles=True),
        Provider("torch_lce_rows", torch_cross_entropy("none"), "rows", "sliced"),
        Provider("torch_lce_sum", torch_cross_entropy("sum"), "sum", "kept"),
        Provider("torch_lce_sum_256", torch_cross_entropy("sum", 256), "sum", "kept"),
        Provider("trl_chunked", trl_chunked(("log_probs",)), "rows", "sliced", ("trl",)),
        Provider("trl_chunked_dpo", trl_chunked(TRL_DPO_OUTPUTS), "rows", "sliced", ("trl",)),
        Provider(
            "cce_compiled",
            cut_cross_entropy("torch_compile", None),
            "rows",
            "kept",
            ("cut_cross_entropy",),
            compiles=True,
        ),
        Provider("cce_exact", cut_cross_entropy("cce", None), "rows", "sliced", ("cut_cross_entropy",), "cuda"),
        Provider("cce_filtered", cut_cross_entropy("cce", "high"), "rows", "sliced", ("cut_cross_entropy",), "cuda"),
        Provider("liger_ce", liger_cross_entropy, "sum", "kept", ("liger_kernel", "triton"), "cuda"),
        Provider("quack", quack, "sum", "kept", ("quack",), "cuda"),
        Provider("fastpo_dpo", fastpo_loss("dpo"), "dpo", "kept", level="loss"),
        Provider("fastpo_dpo_sliced", fastpo_loss("dpo", 0), "dpo", "sliced", level="loss"),
        Provider("naive_dpo", naive("dpo"), "dpo", "kept", level="loss"),
        Provider("liger_dpo", liger_loss("dpo"), "dpo", "kept", ("liger_kernel",), level="loss", compiles=True),
        Provider("liger_dpo_eager", liger_loss("dpo", False), "dpo", "kept", ("liger_kernel",), level="loss"),
        Provider("fastpo_simpo", fastpo_loss("simpo"), "simpo", "kept", level="loss"),
        Provider("naive_simpo", naive("simpo"), "simpo", "kept", level="loss"),
        Provider("liger_simpo", liger_loss("simpo"), "simpo", "kept", ("liger_kernel",), level="loss", compiles=True),
    )
}
NAIVE = {"none": "naive_none", "frozen": "naive_frozen", "rows": "naive", "entropy": "naive_entropy",
         "dpo": "naive_dpo", "simpo": "naive_simpo"}  # fmt: skip

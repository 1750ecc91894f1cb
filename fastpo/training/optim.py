"""Gradients and optimisers: fp32 accumulation, one reduction, one norm, steps that a non-finite gradient skips."""

import difflib
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, one_line, shown
from fastpo.training import cpu_adamw, triton_adamw

NARROW = (torch.bfloat16, torch.float16)
MUON_KEEPS_MOMENTUM = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 15)
# Of fp32 copies during a step, and of a flat bucket of a reduction: large enough for full bandwidth, small beside what
# a model of that size takes to train. A parameter is never cut: a larger one is a chunk of its own.
CHUNK_BYTES = 256 << 20
PIECE = 1 << 22  # elements rounded at a time, which takes 13 bytes each; the random bits depend on it


class Gradients:
    """fp32 gradients whatever the weights' dtype; one reduction, one norm and one step from them.

    fp32 weights accumulate in `.grad` as usual. 16-bit weights would round the running sum at every micro-batch, so
    theirs is kept in fp32 buffers; a step of one micro-batch in one process needs none. How these weights are stepped
    is `master_weights`, since at a learning rate of 1e-6 most updates are below a bf16 weight's spacing:

    fp32: the optimiser steps an fp32 copy of each, kept from step to step; 4 bytes a parameter.
    stochastic: fp32 copies exist in turn, during the step alone, and are rounded up or down with a probability that
        makes the expectation right. The random bits depend on seed, step and parameter alone.
    none: the optimiser steps the weights themselves, and small updates are lost.

    `group`: processes whose gradients belong together. They hold the same parameters, and `reduce_` adds up; or with
    `sharded` the parameters are FSDP2's DTensors, and the optimiser gets the local part of each as a plain tensor.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        master_weights: str,
        seed: int,
        group: dist.ProcessGroup | None = None,
        sharded: bool = False,
    ):
        self.named = dict(parameters)
        self.parameters = list(self.named.values())
        self.index: dict[Tensor, int] = {p: i for i, p in enumerate(self.parameters)}
        self.sharded = sharded
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.seed = seed
        self.step = 0  # number of the step under way, from 1; what stochastic rounding depends on
        self.masters: dict[Tensor, nn.Parameter] = {}  # by parameter, fp32
        self.stand_ins: dict[Tensor, nn.Parameter] = {}  # by parameter, fp32, with memory during the step alone
        self.local: dict[Tensor, nn.Parameter] = {}  # by DTensor parameter, its part on this rank
        self.buffers: dict[Tensor, Tensor] = {}  # by parameter, fp32 gradients of 16-bit parameters
        self.scale: Tensor | None = None  # of the gradients that clip_ has left as they were
        self.unscaled: set[Tensor] = set()  # whose these are
        self.by_kernel: dict[Tensor, str] = {}  # by parameter that TritonAdamW steps, how
        self.single = False
        self.optimizer: torch.optim.Optimizer | None = None
        self._generators: dict[torch.device, torch.Generator] = {}
        narrow = [p for p in self.parameters if p.dtype in NARROW]
        if sharded:
            if narrow or not all(isinstance(p, DTensor) for p in self.parameters):
                raise TypeError("sharded parameters must be DTensors in fp32")
            self.local = {p: nn.Parameter(_local(p)) for p in self.parameters}
        elif master_weights == "fp32":
            self.masters = {p: nn.Parameter(p.detach().float()) for p in narrow}
        elif master_weights == "stochastic":
            self.stand_ins = {p: nn.Parameter(_no_memory(p)) for p in narrow}
        self.hooks = [p.register_post_accumulate_grad_hook(self._collect) for p in narrow]

    def stepped(self, p: Tensor) -> nn.Parameter:
        """What the optimiser updates for a parameter: its fp32 copy, its local part, or itself."""
        for those in (self.masters, self.stand_ins, self.local):
            if p in those:
                return those[p]
        return p  # type: ignore[return-value]

    def use_kernel(self, wanted: bool) -> bool:
        """Whether AdamW's kernel steps the 16-bit parameters that it takes, which are then in `by_kernel`. All
        processes of the group ask at once."""
        taken: dict[Tensor, str] = {}
        for p in self.parameters if wanted and not self.sharded else ():
            if triton_adamw.takes(p):
                taken[p] = "master" if p in self.masters else "stochastic" if p in self.stand_ins else "nearest"
        self.by_kernel = taken if taken and triton_adamw.usable(taken, self.group) else {}
        return bool(self.by_kernel)

    def _collect(self, p: Tensor) -> None:
        """A 16-bit gradient has been formed: into fp32 with it, unless there will be just this one."""
        if p.grad is None or self.single:
            return
        if p in self.buffers:
            self.buffers[p] += p.grad
        else:
            self.buffers[p] = p.grad.float()
        p.grad = None

    def begin(self, micro_batches: int, step: int | None = None) -> None:
        """Forget the last step's gradients. `step` is the number of this one; None: one more than the last."""
        self._forget()
        self.single = micro_batches == 1 and self.group is None
        self.step = self.step + 1 if step is None else step

    def _forget(self) -> None:
        for p in self.parameters:
            p.grad = None
            self.stepped(p).grad = None
        self.buffers.clear()
        self.unscaled.clear()
        self.scale = None

    def close(self) -> None:
        """Leave parameters and optimiser as they were found."""
        for hook in self.hooks:
            hook.remove()
        self._forget()
        for name in ("found_inf", "grad_scale"):
            vars(self.optimizer or self).pop(name, None)

    def _gradient(self, p: Tensor) -> Tensor | None:
        """A parameter's gradient on this rank, where it has one: fp32, or 16-bit where it was formed just once."""
        if p.grad is None:
            return self.buffers.get(p)
        return _local(p.grad) if p in self.local else p.grad

    # ------------------------------------------------------------- reduction

    @torch.no_grad()
    def reduce_(self) -> None:
        """Add up the gradients over the group, by the same calls on every rank; FSDP2 has done so itself."""
        if self.group is None or self.sharded or not self.parameters:
            return
        # A rank without work, or whose rows miss some parameters (experts), adds zeros where another has a gradient.
        home = torch.device("cpu") if "cpu" in dist.get_backend_config(self.group) else self.parameters[0].device
        mask = torch.tensor([self._gradient(p) is not None for p in self.parameters], dtype=torch.int32, device=home)
        dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=self.group)
        for p, wanted in zip(self.parameters, mask.tolist(), strict=True):
            if not wanted or self._gradient(p) is not None:
                continue
            if p.dtype in NARROW:
                self.buffers[p] = torch.zeros_like(p, dtype=torch.float32)
            else:
                p.grad = torch.zeros_like(p)
        grads = [g for p in self.parameters if (g := self._gradient(p)) is not None]
        for bucket in _buckets(grads):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0], group=self.group)
                continue
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])

    # ------------------------------------------------------------------ norm

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """The gradients' 2-norm in fp32, before they are scaled down to `max_norm` (0 or less: not at all)."""
        grads = {p: g for p in self.parameters if (g := self._gradient(p)) is not None}
        norm = self._norm(list(grads.values()))
        # 16-bit gradients that will be stepped in fp32 are scaled there, when it is their turn; all of a kernel's are.
        narrow = {p for p, g in grads.items() if g.dtype in NARROW and self.stepped(p) is not p}
        late = self.unscaled = narrow | (grads.keys() & self.by_kernel.keys())
        if max_norm > 0:
            self.scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            if ready := [g for p, g in grads.items() if p not in late]:
                torch._foreach_mul_(ready, self.scale)
        for p, part in self.local.items():
            part.data = _local(p)  # the same memory, unless FSDP2 has moved it
        for p, g in grads.items():
            if p not in late and p not in self.stand_ins:
                self.buffers.pop(p, None)
                stepped = self.stepped(p)
                stepped.grad = g.to(stepped.dtype)
        return norm

    def _norm(self, grads: list[Tensor]) -> Tensor:
        if grads and (norm := cpu_adamw.norm(grads)) is not None:
            pass
        elif grads:
            wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
            norms = torch._foreach_norm(grads, 2, dtype=wide)
            norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])).float()
        else:
            device = self.stepped(self.parameters[0]).device if self.parameters else None
            norm = torch.zeros((), device=device)
        if self.sharded and self.group is not None:
            square = norm.double() ** 2
            dist.all_reduce(square, group=self.group)
            norm = square.sqrt().float()
        return norm

    # ------------------------------------------------------------------ step

    @torch.no_grad()
    def step_(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
        """Step unless `finite` is false. Fused optimisers skip on the device; the others ask the host, and so wait.

        An optimiser skips what has no gradient. So parameters whose fp32 copy or gradient is still to be made follow
        in chunks, each with a call of the optimiser, and only a chunk's copies exist at a time.
        """
        self.optimizer = optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            home = self.stepped(
                self.parameters[0]
            ).device  # offloaded: the optimiser's own copy would not be waited for
            optimizer.found_inf = (~finite).float().to(home)  # type: ignore[attr-defined]
        elif not finite:
            self._forget()
            return
        done: dict[Tensor, None] = {}
        if isinstance(optimizer, cpu_adamw.CpuAdamW):
            done = self._step_in_one_pass(optimizer, finite)
        elif isinstance(optimizer, triton_adamw.TritonAdamW):
            done = self._step_by_kernel(optimizer, finite)
        late = {p: None for p in (*self.masters, *self.stand_ins) if self._gradient(p) is not None}  # in order
        if done or not late or any(self.stepped(p).grad is not None for p in self.parameters):
            optimizer.step()
            for p in self.parameters:
                if p not in late:
                    self.stepped(p).grad = p.grad = None
        for chunk in _buckets(list(late)):
            self._step_chunk(optimizer, chunk)
        if copied := [p for p in self.masters if p not in done]:
            torch._foreach_copy_(copied, [self.masters[p] for p in copied])
        self._forget()

    def _step_in_one_pass(self, optimizer: cpu_adamw.CpuAdamW, finite: Tensor) -> dict[Tensor, None]:
        """Steps, if `finite`, what compiled code takes as it is; returns those parameters, whose gradients are gone."""
        done: dict[Tensor, None] = {}
        scale = 1.0 if self.scale is None else float(self.scale)
        for p, master in self.masters.items():
            grad = self._gradient(p) if master.grad is None else master.grad
            if grad is None or not cpu_adamw.can_step(master, grad, p):
                continue
            if finite:
                optimizer.step_one(master, grad, p, scale if p in self.unscaled else 1.0)
            done[p] = master.grad = p.grad = None
            self.buffers.pop(p, None)
        return done

    def _step_by_kernel(self, optimizer: triton_adamw.TritonAdamW, finite: Tensor) -> dict[Tensor, None]:
        """Steps, if `finite`, what the kernel takes, without waiting; those parameters, whose gradients are gone."""
        given = {p: g for p in self.by_kernel if (g := self._gradient(p)) is not None}
        steps = [
            triton_adamw.Step(self.stepped(p), p, grad, self.by_kernel[p], self.index[p]) for p, grad in given.items()
        ]
        optimizer.step_all(steps, finite, self.scale, f"{self.seed} {self.step}")
        for p in given:
            p.grad = None
            self.buffers.pop(p, None)
        return dict.fromkeys(given)

    def _step_chunk(self, optimizer: torch.optim.Optimizer, chunk: list[Tensor]) -> None:
        for p in chunk:
            stepped, grad = self.stepped(p), self._gradient(p)
            if p in self.stand_ins:
                stepped.data = p.detach().float()
            if grad.dtype in NARROW:
                grad = grad.float()
                if self.scale is not None and p in self.unscaled:
                    grad.mul_(self.scale)
            stepped.grad = grad
            p.grad = None
            self.buffers.pop(p, None)
        optimizer.step()
        for p in chunk:
            stepped = self.stepped(p)
            stepped.grad = None
            if p in self.stand_ins:
                generator = self._generator(p)
                for part, wide in _pieces(p, stepped.data):
                    part.copy_(stochastic_round(wide, p.dtype, generator))
                stepped.data = _no_memory(p)

    def _generator(self, p: Tensor) -> torch.Generator:
        """Random bits for one parameter in this step, alike on all ranks and after a resume."""
        generator = self._generators.setdefault(p.device, torch.Generator(p.device))
        digest = hashlib.blake2b(f"{self.seed} {self.step} {self.index[p]}".encode(), digest_size=4).digest()
        return generator.manual_seed(int.from_bytes(digest, "little"))

    # ----------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """The fp32 master weights by parameter name. Whatever else is kept can be made anew."""
        return {name: self.masters[p].detach() for name, p in self.named.items() if p in self.masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over saved master weights, and round the 16-bit weights from them."""
        own = self.state_dict()
        wrong = [n for n in {**own, **state} if n not in own or n not in state or own[n].shape != state[n].shape]
        if wrong:
            raise ConfigError(
                f"the checkpoint's fp32 master weights ({len(state)}) do not fit this run's ({len(own)}), first "
                f"{wrong[0]!r}: resume with the master_weights, dtype and adapter that it was saved with"
            )
        for name, master in own.items():
            master.copy_(state[name])
            self.named[name].copy_(master)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """fp32 to bf16 or fp16: one of the two neighbours, the nearer the likelier, so that the expectation is x.

    The bits that the narrow mantissa lacks get a uniform random number added before they are cut off. A number that
    `dtype` holds has zeros there, and stays as it is.
    """
    cut = {torch.bfloat16: 16, torch.float16: 13}[dtype]  # of fp32's 23 mantissa bits
    lift = torch.zeros((), device=x.device)
    if dtype == torch.float16:
        # fp16's subnormals are spaced as the first binade of its normal numbers, to which this moves them.
        smallest = 2.0**-14
        lift = torch.where(x.abs() < smallest, torch.full_like(x, smallest).copysign_(x), lift)
    bits = (x + lift).view(torch.int32)
    # 64 random bits at a time, as four signed numbers of 16 bits each.
    words = torch.empty((bits.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    noise = words.view(torch.int16)[: bits.numel()].view(bits.shape)
    bits.add_(noise.bitwise_right_shift_(16 - cut)).add_(1 << (cut - 1))
    rounded = bits.bitwise_and_(-(1 << cut)).view(torch.float32).sub_(lift)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretches of tensors of one shape."""
    if all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True)
    else:
        yield tensors


def _local(p: Tensor) -> Tensor:
    """A DTensor's part on this rank, sharing its memory."""
    assert isinstance(p, DTensor)
    with torch.no_grad():
        return p.to_local().detach()


def _no_memory(p: Tensor) -> Tensor:
    """fp32 of a parameter's shape, read as NaN everywhere, with the memory of one number."""
    return torch.full((), math.nan, dtype=torch.float32, device=p.device).expand(p.shape)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, together at most CHUNK_BYTES in fp32, at least one."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        nbytes = 4 * t.numel()
        if bucket and (size + nbytes > CHUNK_BYTES or (t.dtype, t.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += nbytes
    if bucket:
        yield bucket


# transformers' rule of what is not decayed.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
# bitsandbytes' AdamW: bits of its state, and whether it is paged (which bitsandbytes does on CUDA alone).
_BITSANDBYTES = {
    "adamw_bnb_8bit": (8, False),
    "adamw_8bit": (8, False),
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (32, True),
}
# Arguments of constructors that an option of ours sets, or that `optim` itself decides.
_OPTION_OF = {
    "lr": "learning_rate", "weight_decay": "weight_decay", "betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon",
    "fused": "optim", "foreach": "optim", "optim_bits": "optim", "is_paged": "optim",
}  # fmt: skip
# What would train in the wrong direction, or is for other uses.
_HIDDEN = {"params", "maximize", "capturable", "differentiable", "args"}


def build_optimizer(model: nn.Module, config: TrainConfig, gradients: Gradients) -> torch.optim.Optimizer:
    """The optimiser that `config.optim` names over the trainable parameters; biases and norms are not decayed."""
    optim, lr = config.optim, config.learning_rate
    if gradients.sharded and (optim == "muon" or optim in _BITSANDBYTES):
        raise ConfigError(f"optim={optim!r} needs whole tensors, which fsdp cuts: use adamw_torch_fused, or fsdp=no")
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}

    def groups(names: list[str]) -> list[dict[str, Any]]:
        kept = {n for n in names if n.rpartition(".")[0] in norms or _NO_DECAY.search(n.lower())}
        split = [([n for n in names if n not in kept], config.weight_decay), ([n for n in names if n in kept], 0.0)]
        return [
            {"params": [gradients.stepped(gradients.named[n]) for n in names], "weight_decay": decay}
            for names, decay in split
            if names
        ]

    names = list(gradients.named)
    adam: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if optim == "sgd":
        # PyTorch's fused SGD leaves most of a 16-bit parameter on the CPU as it was (pytorch#191763, 2.12 and 2.13).
        lost = [p for p in map(gradients.stepped, gradients.parameters) if p.dtype in NARROW and p.device.type == "cpu"]
        return _construct(config, torch.optim.SGD, groups(names), lr=lr, fused=not lost or None)
    if optim == "rmsprop":
        return _construct(config, torch.optim.RMSprop, groups(names), lr=lr)
    if optim == "muon":
        matrices = _hidden_matrices(model, gradients, embeddings)
        rest = groups([n for n in names if n not in matrices])
        others = [torch.optim.AdamW(rest, lr=lr, fused=True, **adam)] if rest else []
        # The rate is AdamW's for the other parameters, so it must mean the same for Muon's.
        rate = {} if "adjust_lr_fn" in (config.optim_args or "") else {"adjust_lr_fn": "match_rms_adamw"}
        muon = _construct(config, torch.optim.Muon, groups(matrices), lr=lr, **rate)
        _refuse_lost_momentum(muon)
        return Together([muon, *others])
    if optim in _BITSANDBYTES:
        bits, paged = _BITSANDBYTES[optim]
        # As in transformers, embeddings keep a state of 32 bits: few of their rows have a gradient, and large ones.
        wide = [n for n in names if gradients.named[n] in embeddings]
        parts = [(groups([n for n in names if n not in wide]), bits), (groups(wide), 32)]
        both = [{**group, "optim_bits": b} for part, b in parts for group in part]
        return _construct(config, _bitsandbytes_adamw(optim), both, lr=lr, optim_bits=bits, is_paged=paged, **adam)
    fused = True if optim == "adamw_torch_fused" else None
    one_pass = fused and gradients.masters and cpu_adamw.available() and "amsgrad" not in (config.optim_args or "")
    kind: Any = cpu_adamw.CpuAdamW if one_pass else torch.optim.AdamW
    if gradients.use_kernel("amsgrad" not in (config.optim_args or "")):
        kind, fused = triton_adamw.TritonAdamW, True  # what the kernel does not take must not wait for the host either
    return _construct(config, kind, groups(names), lr=lr, fused=fused, **adam)


def check_given(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """ConfigError for an optimiser passed in that steps what is not trained, or steps it wrongly."""
    known = {id(p) for p in parameters.values()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError("the optimiser passed in holds parameters that this model does not train")
    if isinstance(optimizer, torch.optim.Muon):
        _refuse_lost_momentum(optimizer)


def _construct(config: TrainConfig, cls: Any, groups: list[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
    """An optimiser with our arguments and those of `optim_args`."""
    known = set(inspect.signature(cls).parameters) - _HIDDEN
    if config.optim in _BITSANDBYTES:
        known.discard("amsgrad")  # accepted and ignored
    ours = {"lr", "weight_decay", "fused", "foreach", *kwargs}
    extra: dict[str, Any] = {}
    for part in (config.optim_args or "").split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not equals or not name or not value:
            raise ConfigError(f"optim_args must read 'name=value,name=value', not {config.optim_args!r}")
        if name in ours:
            raise ConfigError(f"optim_args: {name} is set by {_OPTION_OF[name]}")
        if name not in known:
            free = sorted(known - ours)
            near = difflib.get_close_matches(name, free, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(free) or 'none'}"
            raise ConfigError(f"optim_args: {name!r} is no argument of {config.optim}; {hint}")
        extra[name] = _value(value)
        if isinstance(extra[name], float) and not math.isfinite(extra[name]):
            raise ConfigError(f"optim_args: {name} must be finite, not {value}")
    try:
        return cls(groups, **kwargs, **extra)
    except Exception as error:  # its arguments are handed on, and fail in many ways
        raise ConfigError(f"optim={config.optim!r}, optim_args={shown(config.optim_args)}: {one_line(error)}") from None


def _refuse_lost_momentum(muon: torch.optim.Optimizer) -> None:
    """ConfigError for Muon without nesterov on bf16 weights: until PyTorch 2.15, orthogonalising the update divides a
    bf16 momentum by its norm in place (the update without nesterov is the momentum itself), and the average is lost."""
    if MUON_KEEPS_MOMENTUM or all(group["nesterov"] for group in muon.param_groups):
        return
    if any(p.dtype == torch.bfloat16 for group in muon.param_groups for p in group["params"]):
        raise ConfigError(
            "optim='muon' with nesterov=false steps bf16 weights wrongly before PyTorch 2.15 (its momentum is scaled "
            "in place): leave nesterov=false out, or keep fp32 copies (master_weights=fp32)"
        )


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _bitsandbytes_adamw(optim: str) -> Any:
    """bitsandbytes' AdamW, with a number of bits for each parameter group; its own overrides are one per process."""
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(f"optim={optim!r} needs bitsandbytes: pip install 'fastpo[quant]'") from None

    class _AdamW(bitsandbytes.optim.AdamW):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return {**super().get_config(gindex, pindex, group), "optim_bits": group["optim_bits"]}

    return _AdamW


def _hidden_matrices(model: nn.Module, gradients: Gradients, embeddings: set[nn.Parameter]) -> list[str]:
    """Names of what Muon is for: the 2-D weights of hidden layers, not embeddings and the head.

    Nor an adapter's factors: A's gradient is zero until B has moved, and Muon would blow its rounding errors up to full
    size; nor does it say anything of BA that A's and B's updates are orthogonal each.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    apart = {*embeddings, *(head.parameters() if head is not None else ())}
    own = set(model.parameters()) - apart  # not a head beside the model
    names = [name for name, p in gradients.named.items() if p.ndim == 2 and p in own]
    if not names or hasattr(model, "peft_config"):
        raise ConfigError(
            "optim='muon' steps whole matrices of hidden layers, and none is trained itself: use adamw_torch_fused"
        )
    return names


class Together(torch.optim.Optimizer):
    """Several optimisers as one: their groups in a row, one state dict, one step."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts: list[torch.optim.Optimizer] = []
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        """The parts work on this object's groups and state, so that schedulers and `load_state_dict` reach them."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        for part in self.parts:
            part.step()


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule of that name over `steps` optimiser steps."""
    warmup = config.warmup_ratio or config.warmup_steps
    warmup = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
    kwargs = config.lr_scheduler_kwargs or {}
    what = f"lr_scheduler_type={config.lr_scheduler_type}, lr_scheduler_kwargs={shown(kwargs)}"
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )  # fmt: skip
        places = {0, 1, warmup, (warmup + steps) // 2, steps - 1, steps}
        factors = [float(rate(step)) for rate in getattr(scheduler, "lr_lambdas", [])[:1] for step in places]
    except Exception as error:  # its arguments are handed on, and fail in many ways
        raise ConfigError(f"{what}: {one_line(error)}") from None
    wrong = [factor for factor in factors if not 0 <= factor <= 1e6]
    if wrong:
        raise ConfigError(f"{what}: the learning rate would be {wrong[0]:g} times its peak")
    return scheduler

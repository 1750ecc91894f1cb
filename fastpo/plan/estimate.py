"""What a run takes, by what it is for, and the largest `max_tokens` that fits; how much memory there is.

A training step runs over fake tensors (plan/weightless.py), and after every operation the bytes of all that lives are
noted. The operations are the same for any number of tokens, so two short runs give each moment as a linear function of
T, and the peak is the largest of them at the T asked for. To it comes what the head op takes inside (`_head_scratch`).

T = packed tokens, N = head rows, D = hidden, V = vocabulary.
"""

import bisect
import contextlib
import logging
import os
import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpo import ops
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, FastpoError, UnsupportedModelError, shown
from fastpo.models.adapters import first_line
from fastpo.models.noise import disable_dropout
from fastpo.ops import backends
from fastpo.plan.weightless import Blueprint, simulate
from fastpo.training.optim import CHUNK_BYTES, NARROW

log = logging.getLogger("fastpo")

GIB = 1 << 30
MOST_BYTES = 1 << 60
# Of the memory, left to the allocator's fragments, the vendor's workspaces and what else is not seen.
HEADROOM = 0.08
SIMULATED = (256, 512)  # tokens of the two fake runs
STEP_TOKENS = 64  # budgets are multiples of it
MOST_TOKENS = 1 << 18

# ---- the estimate


@dataclass(frozen=True)
class _Moments:
    """Living bytes as linear functions of T: a + b T."""

    a: np.ndarray
    b: np.ndarray

    def at(self, tokens: float) -> float:
        return float((self.a + self.b * tokens).max()) if len(self.a) else 0.0


@dataclass
class Estimate:
    """Bytes of a run. `step(T)` is the peak of a training step over what stays from step to step."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    masters: int
    optimizer: int
    reference: int  # that stay in memory during training
    reference_pass: int  # of a model that is there before training only
    process: int  # Python and its libraries, on a CPU
    row_share: float  # N / T
    vocabulary: int
    hidden: int
    itemsize: int  # of the head's operands
    device_type: str
    head_trained: bool
    logits_budget: int
    scratch: int
    trunk: dict[str, _Moments] = field(repr=False)  # by regime
    head: dict[str, _Moments] = field(repr=False)
    saved_per_token: float = 0.0  # what a token's forward pass leaves for the backward, bytes
    optimizer_scratch: int = 0
    rounding: int = 0  # fp32 copies that stochastic rounding makes at a time

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer + self.reference + self.process

    def rows(self, tokens: float) -> float:
        return tokens * self.row_share

    def regime(self, tokens: float) -> str:
        if not self.head_trained:
            return "frozen"
        return "kept" if self.matrix(tokens) <= self.logits_budget else "sliced"

    def head_bytes(self, tokens: float, regime: str) -> float:
        """What the head adds to a forward pass: what it keeps, and its tiles."""
        n = self.rows(tokens)
        kept = {"kept": self.matrix(tokens), "frozen": 4 * n * self.hidden, "sliced": 0.0}[regime]
        return kept + self._head_scratch(n, regime)

    def _head_scratch(self, n: float, regime: str) -> float:
        """Inside the op, unseen from outside: the tile of logits, and fp32 sums of the gradient of hidden."""
        matrix = n * self.vocabulary * self.itemsize
        tile = backends.CPU_TILE_BYTES if self.device_type == "cpu" else backends.DEVICE_TILE_BYTES
        wide = (4 + self.itemsize) * n * self.hidden if self.head_trained else 0.0
        return wide + (0.0 if regime == "kept" else min(matrix, tile))

    def step(self, tokens: float) -> float:
        """Over what stays from step to step."""
        regime = self.regime(tokens)
        scratch = self._head_scratch(self.rows(tokens), regime)
        return self.scratch + max(self.trunk[regime].at(tokens), self.head[regime].at(tokens) + scratch)

    def matrix(self, tokens: float) -> float:
        """Bytes of the N x V matrix."""
        return self.rows(tokens) * self.vocabulary * self.itemsize

    def total(self, tokens: float) -> float:
        return self.total_with(self.step(tokens))

    def total_with(self, step: float) -> float:
        """Of a run whose steps take `step` bytes over what stays."""
        before = self.weights + self.reference_pass + self.process
        return max(before, self.fixed + max(step, self.optimizer_scratch))

    def largest(self, memory: float) -> int:
        """The largest T, a multiple of 64, whose total is within `memory` bytes; 0 where there is none."""
        switch = MOST_TOKENS  # from there on the head's matrix is not kept: the total falls once
        if self.head_trained and self.row_share:
            switch = int(self.logits_budget / (self.row_share * self.vocabulary * self.itemsize))
        for low, high in ((switch + 1, MOST_TOKENS), (1, min(switch, MOST_TOKENS))):
            first, last = -(-low // STEP_TOKENS), high // STEP_TOKENS
            if first > last or self.total(first * STEP_TOKENS) > memory:
                continue
            rising = range(first, last + 1)
            fit = bisect.bisect_right(rising, memory, key=lambda k: self.total(k * STEP_TOKENS))
            return rising[fit - 1] * STEP_TOKENS
        return 0

    def check_fixed(self, memory: float, what: str) -> None:
        """ConfigError where not even what stays from step to step fits."""
        for name, nbytes in (("weights", self.weights), ("weights, gradients and optimiser state", self.fixed)):
            if nbytes > memory:
                raise ConfigError(
                    f"the {name} take {gib(nbytes)}, {gib(nbytes - memory)} more than {what} ({gib(memory)}): "
                    f"{'quantise the base (load_in_4bit), or take a smaller dtype' if name == 'weights' else 'train an adapter (use_peft), or set optim=adamw_8bit'}"  # noqa: E501
                )


def estimate(
    blueprint: Blueprint, config: TrainConfig, device_type: str, *, row_share: float = 1.0, autocast: bool = False,
    ref_model: int = 0, ref_stays: int = 0, live: bool = False, regimes: Sequence[str] = ("kept", "sliced"),
) -> Estimate:  # fmt: skip
    """row_share: N / T. ref_model: bytes of a second model, ref_stays: of one that is on the device already; live: a
    loss reads the reference's logits (TDPO). regimes: of a head that is trained, with those that are asked for alone.

    An option that is to be decided by this is taken as it asks for most: fp32 copies, every layer checkpointed."""
    config = at_most(config)
    if config.fsdp != "no":
        raise ConfigError(
            "memory is estimated for a model that is whole on its device: leave fsdp out, and set a number"
        )
    policy, mode = blueprint.policy, blueprint.mode
    if config.disable_dropout:
        disable_dropout(policy.model)
    try:
        on_cpu = device_type == "cpu"
        runs = [
            simulate(blueprint, config, tokens, row_share, autocast, on_cpu=on_cpu, regimes=regimes)
            for tokens in SIMULATED
        ]
    except FastpoError:
        raise
    except Exception as error:  # a model that looks at values, such as a loop over the experts that got a token
        name = type(policy.causal_lm).__name__
        raise UnsupportedModelError(
            f"{name} cannot be run without its weights ({type(error).__name__}: {first_line(error)[:160]}): set "
            "max_tokens to a number; a run that is out of memory lowers it by itself"
        ) from error
    traced = runs[0].traces.keys()
    with mode:
        head = policy.head()
        trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        itemsize = 2 if autocast else head.weight.element_size()
        budget = config.logits_memory_budget
        budget = ops.default_memory_budget(head.weight) if budget is None else budget
        given = ref_model or ref_stays
        copied = config.sync_ref_model or (live and not given and not hasattr(policy.model, "peft_config"))
        narrow = [4 * p.numel() for p in trained.values() if p.dtype in NARROW]
        rounding = max([min(CHUNK_BYTES, sum(narrow)), *narrow])
        copies = sum(p.nbytes for p in trained.values()) if copied else 0
    return Estimate(
        parameters=sum(p.numel() for p in policy.model.parameters()),
        trainable=sum(p.numel() for p in trained.values()),
        weights=blueprint.weights, gradients=runs[0].gradients, masters=runs[0].masters,
        optimizer=_optimizer_bytes(policy.model, config, trained),
        reference=copies + ref_stays + (ref_model if live else 0), reference_pass=0 if live else ref_model,
        process=_resident() if device_type == "cpu" else 0, row_share=row_share, vocabulary=head.weight.shape[0],
        hidden=head.weight.shape[1], itemsize=itemsize, device_type=device_type, head_trained="frozen" not in traced,
        logits_budget=budget, scratch=blueprint.scratch,
        trunk={r: _lines([run.traces[r][0] for run in runs]) for r in traced},
        head={r: _lines([run.traces[r][1] for run in runs]) for r in traced},
        saved_per_token=(runs[1].saved - runs[0].saved) / (SIMULATED[1] - SIMULATED[0]),
        # AdamW over lists of tensors forms its updates for all of them at once.
        optimizer_scratch=(4 * runs[0].stepped if config.optim == "adamw_torch" and device_type == "cuda" else 0)
        + (rounding if config.master_weights == "stochastic" else 0),
        rounding=rounding,
    )  # fmt: skip


def at_most(config: TrainConfig) -> TrainConfig:
    """The options that the memory decides (plan/settle.py), where they are open, as they take most memory or time."""
    open_: dict[str, Any] = {}
    if config.master_weights == "auto":
        open_["master_weights"] = "fp32"
    if isinstance(config.gradient_checkpointing_layers, str):
        open_["gradient_checkpointing_layers"] = None
    return replace(config, **open_) if open_ else config


def _lines(traces: list[list[int]]) -> _Moments:
    """Two runs of the same operations -> each moment's a + b T; those below another's line throughout are left out."""
    first, second = (np.asarray(trace, float) for trace in traces)
    if len(first) != len(second):
        raise UnsupportedModelError("the model runs other operations for more tokens: set max_tokens to a number")
    b = (second - first) / (SIMULATED[1] - SIMULATED[0])
    a = first - b * SIMULATED[0]
    order = np.lexsort((-a, -b))
    best = -np.inf
    keep = []
    for i in order:
        if a[i] > best:
            keep.append(i)
            best = a[i]
    return _Moments(a[keep], b[keep])


def _optimizer_bytes(model: nn.Module, config: TrainConfig, trained: Mapping[str, Tensor]) -> int:
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    total = 0.0
    for p in trained.values():
        wide = 4 if p.dtype in NARROW and config.master_weights != "none" else p.element_size()
        n, optim = p.numel(), config.optim
        if "8bit" in optim and id(p) not in embeddings and n >= 4096:
            total += 2 * n * (1 + 4 / 256)  # a scale for every block of 256
        elif "8bit" in optim or "32bit" in optim:
            total += 8 * n
        elif optim == "sgd":
            total += wide * n * ("momentum" in (config.optim_args or ""))
        elif optim == "rmsprop" or (optim == "muon" and p.ndim == 2 and id(p) not in embeddings):
            total += wide * n
        else:
            total += 2 * wide * n
    return int(total)


# ---- how much there is


def device_memory(device: torch.device) -> int | None:
    """Bytes that this process may use on the device in all, with those that it uses already; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limits = []
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of one machine share its memory, but for the process's limit
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        found = re.search(r"MemAvailable:\s+(\d+) kB", text)
        if found:
            limits.append(int(found[1]) * 1024 // ranks + _resident())
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            limits.append((int(limit) - int(used)) // ranks + _resident())
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limits.append(max(0, soft - mapped) + _resident())
    return min(limits) if limits else None


def _resident() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def parse_bytes(text: str) -> int:
    """'80GiB', '80GB', '512M', '1e9' -> bytes."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(e\d\d?)?\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    number = float(match[1] + (match[2] or "")) if match else 0.0
    if not match or not number:
        raise ConfigError(f"memory must be a size such as 80GiB or 24GB, not {shown(text)}")
    unit = 1024 if match[4] else 1000
    nbytes = int(number * unit ** " KMGT".index(match[3].upper() or " "))
    if nbytes > MOST_BYTES:
        raise ConfigError(f"memory={text.strip()} is more than any device has: such as 80GiB")
    if nbytes < 100_000:
        raise ConfigError(f"memory={text.strip()} is {nbytes:,} bytes: did you mean {match[1]}GiB?")
    return nbytes


def gib(nbytes: float) -> str:
    if nbytes >= GIB / 10:
        return f"{nbytes / GIB:.2f} GiB"
    return f"{nbytes / 2**20:.2f} MiB" if nbytes >= 1e5 else f"{nbytes / 2**10:.2f} KiB"

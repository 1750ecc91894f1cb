"""What the memory decides of a run, once and before its first step: `max_tokens=auto`, and on a GPU three more options
where they are left open. All by the estimate of plan/estimate.py, for the largest micro-batch that the run may have:

1. master_weights: fp32 copies where the run fits with them, every layer checkpointed and no N x V matrix kept; else
   stochastic rounding.
2. logits_memory_budget: the N x V matrix is kept where it fits beside checkpointed layers. It comes first: a byte of it
   saves D FLOPs (in 16 bits), a byte of what the layers of an 8B Llama keep 0.55 D, by the estimate.
3. gradient_checkpointing_layers: the fewest with which the run fits. What is left over then is the head's.

A run that goes on from a checkpoint has what its beginning decided. Where nothing can be estimated the options mean
what they mean on a CPU: fp32 copies, every layer, the op's own budget.

T = packed tokens, N = head rows, D = hidden, V = vocabulary, L = layers that can be checkpointed.
"""

import copy
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpo import ops
from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.data.packing import trunk_tokens
from fastpo.errors import ConfigError
from fastpo.models.adapters import first_line
from fastpo.models.modes import layers_to_checkpoint
from fastpo.models.policy import Policy
from fastpo.plan import estimate as estimates
from fastpo.plan.estimate import HEADROOM, STEP_TOKENS, Estimate, gib
from fastpo.plan.weightless import Blueprint
from fastpo.training.distributed import World
from fastpo.training.memory import MAX_TOKENS, Retreat
from fastpo.training.metrics import TOKEN_KL
from fastpo.training.objective import Objective
from fastpo.training.optim import NARROW
from fastpo.training.random_state import rng_state, set_rng_state

log = logging.getLogger("fastpo")

MIB = 1 << 20
DECIDED = ("master_weights", "gradient_checkpointing_layers", "logits_memory_budget")


# ---- the rules


@dataclass(frozen=True)
class Open:
    """Which of the options the memory decides."""

    master_weights: bool = False
    layers: bool = False
    head: bool = False
    max_tokens: bool = False

    @classmethod
    def of(cls, config: TrainConfig, device_type: str, narrow: bool = True) -> "Open":
        """narrow: 16-bit weights are trained, by an optimiser made of the options."""
        whole, gpu, layers = config.fsdp == "no", device_type == "cuda", config.gradient_checkpointing_layers
        wanted = layers == "auto" or (layers is None and gpu)
        return cls(
            master_weights=whole and gpu and narrow and config.master_weights == "auto",
            # Offloaded, what layers save takes a way to the host and back that is longer than their recomputation.
            layers=whole and wanted and config.gradient_checkpointing and not config.activation_offloading,
            head=whole and gpu and config.logits_memory_budget is None,
            max_tokens=config.max_tokens == "auto",
        )

    @property
    def by_device(self) -> bool:
        """Whether any option but max_tokens is."""
        return self.master_weights or self.layers or self.head


@dataclass(frozen=True)
class Demand:
    """What the largest micro-batch of a run takes, no N x V matrix being kept."""

    every: Estimate  # with every layer checkpointed (or as many as a number says), and fp32 copies of 16-bit weights
    none: Callable[[], Estimate]  # with no layer checkpointed
    layers: int  # L
    tokens: int
    default: int  # the head op's own budget
    keeps: bool = True  # whether a backward pass of the head can use the N x V matrix

    @property
    def matrix(self) -> float:
        """Bytes of the N x V matrix that is kept if the budget allows it."""
        return self.every.matrix(self.tokens) if self.keeps else 0.0


@dataclass(frozen=True)
class Choice:
    """What was decided, and bytes: of the run by the estimate, and without the matrix."""

    master_weights: str | None = None  # None: as the options say, here and below
    layers: int | None = None
    budget: int | None = None
    total: float = 0.0
    fits: bool = True


def decide(demand: Demand, wanted: Open, room: float, budget: int | None) -> Choice:
    """What is open, for `room` bytes; `budget`: the head's, where it is set."""
    every, tokens = demand.every, demand.tokens
    most = every.step(tokens)
    master = None
    if wanted.master_weights:
        master = "fp32" if every.total_with(most) <= room else "stochastic"
        if master == "stochastic":
            every = replace(every, masters=0, optimizer_scratch=every.optimizer_scratch + every.rounding)
    of_default = min(demand.matrix, demand.default)
    if wanted.head:
        kept = next((b for b in (demand.matrix, of_default) if every.total_with(most + b) <= room), 0.0)
    else:
        kept = of_default if budget is None else min(demand.matrix, budget)
    step, count = most, None
    if wanted.layers and demand.layers:
        count = demand.layers
        if every.total_with(most + kept) <= room:
            # The peak is convex in their number: the line from none to all of them is an upper bound.
            least = demand.none().step(tokens)
            steps = [least + (most - least) * n / demand.layers for n in range(demand.layers + 1)]
            count = next(n for n, of_n in enumerate(steps) if every.total_with(of_n + kept) <= room)
            step = steps[count]
    total = every.total_with(step)
    found = None
    if wanted.head and demand.keeps:
        left = int((room - total) // MIB * MIB)
        # Where not even this fits smaller micro-batches follow, of which the op's own budget keeps what it would.
        found = max(left, demand.default if kept >= of_default or total > room else 0)
    return Choice(master, count, found, total + kept, total + kept <= room)


# ---- a run's options


@dataclass
class Settled:
    """A run's options with nothing left open: the trainer's parts read them here."""

    config: TrainConfig
    max_tokens: int
    given: tuple[str, ...] = ()  # names of those that memory has decided, and may decide anew where it runs out

    def retreat(self, policy: Policy) -> Retreat:
        """What is given back where the memory runs out."""
        return Retreat(self.config, self.given, policy)

    def record(self, device_type: str) -> dict[str, Any]:
        """For a checkpoint's run.json."""
        return {"device": device_type} | {name: getattr(self.config, name) for name in DECIDED}


def with_options(config: TrainConfig, **values: Any) -> TrainConfig:
    """A copy with other values, which are not checked again."""
    out = copy.copy(config)
    for name, value in values.items():
        setattr(out, name, value)
    return out


def as_before(config: TrainConfig, folder: Path | None, device_type: str) -> dict[str, Any]:
    """What a checkpoint's run had decided of the options that are left open now. An unreadable run.json says nothing
    here: whoever compares it with this run says what is wrong."""
    if folder is None:
        return {}
    try:
        saved = json.loads((folder / "run.json").read_text())
        then, decided = saved["config"], saved.get("settled", {})
        found = {"master_weights": decided.get("master_weights", then["master_weights"])}
        if decided.get("device") == device_type:
            found |= {name: decided[name] for name in DECIDED}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    good = {
        "master_weights": found["master_weights"] in ("fp32", "stochastic", "none"),
        "gradient_checkpointing_layers": _is_count(found.get("gradient_checkpointing_layers", 0)),
        "logits_memory_budget": _is_count(found.get("logits_memory_budget", 0)),
    }
    of_config = Open.of(config, device_type)
    left_open = {
        "master_weights": config.master_weights == "auto", "gradient_checkpointing_layers": of_config.layers,
        "logits_memory_budget": of_config.head,
    }  # fmt: skip
    return {name: value for name, value in found.items() if good[name] and left_open[name]}


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def assumed_tokens(config: TrainConfig, device_type: str) -> int:
    """max_tokens: the number that is set, or the device's."""
    number = config.max_tokens
    return int(MAX_TOKENS[device_type] if number is None or isinstance(number, str) else number)


@dataclass
class Case:
    """What of a run its memory depends on, on this rank."""

    blueprint: Blueprint
    config: TrainConfig
    device_type: str
    memory: int  # bytes that there are
    longest: int  # tokens of the longest row
    step: int  # and of the largest step
    options: dict[str, Any]  # of `estimate`
    process: Callable[[Estimate], int]  # bytes that the process takes beside PyTorch's allocator

    @property
    def room(self) -> float:
        return self.memory * (1 - HEADROOM)

    @classmethod
    def of_run(
        cls, model: nn.Module, config: TrainConfig, device: torch.device, examples: Sequence[Example],
        objective: Objective, autocast: bool, ref_model: Any,
    ) -> "Case":  # fmt: skip
        """Of a model and its rows in this process. ConfigError where nobody knows how much memory there is."""
        if config.fsdp != "no":
            raise ConfigError(
                "max_tokens=auto does not know how much fsdp leaves on a rank: set max_tokens to a number"
            )
        memory = estimates.device_memory(device)
        if memory is None:
            raise ConfigError("max_tokens=auto: the memory of this device is unknown: set max_tokens to a number")
        sizes = sorted(map(trunk_tokens, examples), reverse=True)
        share = 1.0 if objective.reads_prompts else sum(len(r) for e in examples for r in e.responses) / sum(sizes)
        to_come, stays = _ref_model_bytes(ref_model, config, device)
        options: dict[str, Any] = dict(
            row_share=min(1.0, share), autocast=autocast, ref_model=to_come, ref_stays=stays,
            live=TOKEN_KL in objective.row_statistics,
        )  # fmt: skip
        return cls(
            Blueprint.of_model(model), config, device.type, memory, sizes[0], sum(sizes[: config.step_size]), options,
            process=lambda found: max(0, found.process - found.weights),  # the model is in it already, on a CPU
        )  # fmt: skip

    def estimate(self, config: TrainConfig, **options: Any) -> Estimate:
        found = estimates.estimate(self.blueprint, config, self.device_type, **self.options, **options)
        found.process = self.process(found)
        return found

    def largest_micro_batch(self, max_tokens: int) -> int:
        """Tokens of the largest micro-batch that the rows make: no step is larger, and no row is cut."""
        bucket = self.config.token_bucket or 1
        return -(-max(self.longest, min(max_tokens, self.step)) // bucket) * bucket

    def demand(self, config: TrainConfig, max_tokens: int) -> Demand:
        config = with_options(config, logits_memory_budget=0)
        layers = len(layers_to_checkpoint(self.blueprint.policy)) if config.gradient_checkpointing else 0
        every = self.estimate(config, regimes=("sliced",))
        none = with_options(config, gradient_checkpointing_layers=0)
        with self.blueprint.mode:
            default = ops.default_memory_budget(self.blueprint.policy.head().weight)
        keeps = every.head_trained or config.grad_filter > 0
        tokens = self.largest_micro_batch(max_tokens)
        return Demand(every, lambda: self.estimate(none, regimes=("sliced",)), layers, tokens, default, keeps)

    def head_budget(self, config: TrainConfig, max_tokens: int) -> tuple[Choice, Demand]:
        """Only that is open, all else is as `config` says."""
        demand = self.demand(config, max_tokens)
        return decide(demand, Open(head=True), self.room, None), demand

    def largest_max_tokens(self, config: TrainConfig) -> int:
        """max_tokens=auto: what is estimated to fit on the run's device; no more than its largest step has."""
        found, bucket = self.estimate(config), config.token_bucket or 1
        found.check_fixed(self.room, f"this {self.device_type} has for it")
        tokens = found.largest(self.room) // bucket * bucket  # every micro-batch is padded to a multiple of it
        if not tokens:
            least = max(STEP_TOKENS, bucket)
            smaller = "a smaller token_bucket, " if bucket > STEP_TOKENS else ""
            raise ConfigError(
                f"max_tokens=auto: {gib(found.total(least))} are needed for {least} tokens, and there are "
                f"{gib(self.room)}: set {smaller}gradient_checkpointing, logits_memory_budget=0, or train an adapter "
                "(peft_config)"
            )
        tokens = min(tokens, -(-max(self.step, STEP_TOKENS) // bucket) * bucket)
        log.info("max_tokens=auto: %d, estimated to take %s of %s", tokens, gib(found.total(tokens)), gib(self.memory))
        if found.total(self.longest) > self.room:
            log.warning("the longest row has %d tokens, which are estimated to take %s of %s: set a shorter max_length",
                        self.longest, gib(found.total(self.longest)), gib(self.memory))  # fmt: skip
        return tokens

    def choices(self, wanted: Open) -> tuple[dict[str, Any], int]:
        """({option: value} of what is wanted, max_tokens)."""
        config, tokens = self.config, assumed_tokens(self.config, self.device_type)
        found: dict[str, Any] = {}
        if wanted.by_device:
            demand = self.demand(config, tokens)
            choice = decide(demand, wanted, self.room, config.logits_memory_budget)
            found = options_of(choice, demand)
            say_masters(choice, demand, self.memory)
            if not wanted.max_tokens:
                say(choice, demand, config, self.memory)
        if wanted.max_tokens:
            settled = with_options(config, **found | {"logits_memory_budget": config.logits_memory_budget})
            tokens = self.largest_max_tokens(settled)
            if wanted.head:  # what is left over at that
                choice, demand = self.head_budget(settled, tokens)
                found |= options_of(choice, demand)
                say(choice, demand, config, self.memory)
        return found, tokens


def options_of(choice: Choice, demand: Demand) -> dict[str, Any]:
    """By their names; every layer is None."""
    found: dict[str, Any] = {}
    if choice.master_weights is not None:
        found["master_weights"] = choice.master_weights
    if choice.layers is not None:
        found["gradient_checkpointing_layers"] = None if choice.layers == demand.layers else choice.layers
    if choice.budget is not None:
        found["logits_memory_budget"] = choice.budget
    return found


def say_masters(choice: Choice, demand: Demand, memory: int) -> None:
    """The log's line where a default of the numerics is another than usual."""
    if choice.master_weights == "stochastic":
        log.warning(
            "master_weights=auto: stochastic, since fp32 copies of the 16-bit weights would take %s, and the run with "
            "them %s of %s at %d tokens; master_weights=fp32 or stochastic decides it",
            gib(demand.every.masters), gib(demand.every.total(demand.tokens)), gib(memory), demand.tokens,
        )  # fmt: skip


def say(choice: Choice, demand: Demand, config: TrainConfig, memory: int) -> None:
    """The log's line on the rest."""
    if not choice.fits:
        less = "optim=adamw_8bit, " if "8bit" not in config.optim else ""
        log.warning(
            "a micro-batch of %d tokens is estimated to take %s of %s, of which %.0f%% are left free: set a smaller "
            "max_tokens, %sor train an adapter (peft_config)",
            demand.tokens, gib(choice.total), gib(memory), 100 * HEADROOM, less,
        )  # fmt: skip
    parts = []
    if choice.layers is not None:
        parts.append(f"{choice.layers} of {demand.layers} layers are checkpointed")
    if choice.budget is not None:
        parts.append(f"the head may keep {gib(choice.budget)}")
    if parts and choice.fits:
        log.info("%s: at %d tokens the run is estimated to take %s of %s", ", ".join(parts), demand.tokens,
                 gib(choice.total), gib(memory))  # fmt: skip


def _ref_model_bytes(ref_model: Any, config: TrainConfig, device: torch.device) -> tuple[int, int]:
    """Weights of a reference that is still to come into this process, or onto the device; and of one that is there."""
    if isinstance(ref_model, str | os.PathLike):
        return Blueprint.of_name(os.fspath(ref_model), config, argument="ref_model").weights, 0
    if isinstance(ref_model, nn.Module):
        nbytes = sum(p.nbytes for p in ref_model.parameters())
        if next(ref_model.parameters()).device != device:
            return nbytes, 0
        return 0, nbytes if device.type == "cuda" else 0  # a CPU's is in the process
    return 0, 0


def settle(
    model: nn.Module, config: TrainConfig, world: World, examples: Sequence[Example], objective: Objective,
    *, autocast: bool, ref_model: Any = None, own_optimizer: bool = True, resume: Path | None = None,
) -> Settled:  # fmt: skip
    """The options of a run, alike on all ranks; every rank calls it. Raises ConfigError where max_tokens=auto cannot be
    answered. own_optimizer: made of the options. resume: the checkpoint that the run goes on from."""
    device = world.device
    before = world.first(lambda: as_before(config, resume, device.type))
    base = with_options(config, **before)
    narrow = own_optimizer and any(p.dtype in NARROW for p in model.parameters() if p.requires_grad)
    wanted = Open.of(base, device.type, narrow)
    if "gradient_checkpointing_layers" in before or "logits_memory_budget" in before:  # they belong together
        wanted = replace(wanted, layers=False, head=False)
    found: dict[str, Any] = {}
    tokens = assumed_tokens(config, device.type)
    if wanted.by_device or wanted.max_tokens:
        mine: tuple[dict[str, Any], int] | None = None
        rng = rng_state()
        try:
            # What steps the weights themselves, as an optimiser that was passed in does, has no copies.
            planned = base if own_optimizer else with_options(base, master_weights="none")
            mine = Case.of_run(model, planned, device, examples, objective, autocast, ref_model).choices(wanted)
        except Exception as error:  # a model may be any code, and runs without this too
            if wanted.max_tokens:
                raise
            log.info("what the run takes cannot be estimated (%s): every layer is checkpointed", first_line(error))
        set_rng_state(rng)
        found, tokens = _alike(world.gather(mine), tokens)
    for name, value in (("master_weights", "fp32"), ("gradient_checkpointing_layers", None)):
        if name not in found and isinstance(getattr(base, name), str) and getattr(base, name) in ("auto", "all"):
            found[name] = value
    if config.token_bucket and tokens % config.token_bucket:
        nearest = max(1, tokens // config.token_bucket) * config.token_bucket
        raise ConfigError(f"max_tokens={tokens} is no multiple of token_bucket={config.token_bucket}: {nearest} is one")
    settled = with_options(base, **found)
    given = [name for name in DECIDED[1:] if name in found | before and getattr(settled, name) is not None]
    return Settled(settled, tokens, tuple(given))


def _alike(all_: Sequence[tuple[dict[str, Any], int] | None], tokens: int) -> tuple[dict[str, Any], int]:
    """One answer for all ranks, which has room on each; nothing where one of them has none."""
    found = [mine for mine in all_ if mine is not None]
    if len(found) < len(all_):
        return {}, tokens
    out = dict(found[0][0])
    if "master_weights" in out:
        out["master_weights"] = max(choices["master_weights"] for choices, _ in found)  # stochastic, if anywhere
    if "gradient_checkpointing_layers" in out:
        counts = [choices["gradient_checkpointing_layers"] for choices, _ in found]
        out["gradient_checkpointing_layers"] = None if None in counts else max(counts)
    if "logits_memory_budget" in out:
        out["logits_memory_budget"] = min(choices["logits_memory_budget"] for choices, _ in found)
    return out, min(n for _, n in found)

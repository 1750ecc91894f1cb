"""What a run takes, by what it is for, and the largest `max_tokens` that fits: `fastpo plan`, `max_tokens=auto`.

A training step runs over fake tensors (plan/weightless.py), and after every operation the bytes of all that lives are
noted. The operations are the same for any number of tokens, so two short runs give each moment as a linear function of
T, and the peak is the largest of them at the T asked for. To it comes what the head op takes inside (`_head_scratch`).

T = packed tokens, N = head rows, D = hidden, V = vocabulary.
"""

import bisect
import contextlib
import json
import logging
import os
import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpo import ops
from fastpo.config.train_config import TrainConfig
from fastpo.data import Example, layouts, mixing, prepare_examples, rows, sources
from fastpo.data.kway import Forming
from fastpo.data.packing import TrunkCost, set_sharing, sharing_mode, trunk_tokens
from fastpo.errors import ConfigError, FastpoError, UnsupportedModelError, shown
from fastpo.losses import LOSSES
from fastpo.models import rotary
from fastpo.models.adapters import first_line
from fastpo.models.flops import Flops
from fastpo.models.loading import load_tokenizer, resolve_device
from fastpo.models.noise import disable_dropout
from fastpo.ops import backends
from fastpo.plan.weightless import Blueprint, simulate
from fastpo.training import run_data
from fastpo.training.distributed import World
from fastpo.training.memory import MAX_TOKENS
from fastpo.training.metrics import TOKEN_KL
from fastpo.training.objective import Objective
from fastpo.training.optim import NARROW

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

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer + self.reference + self.process

    def rows(self, tokens: float) -> float:
        return tokens * self.row_share

    def regime(self, tokens: float) -> str:
        if not self.head_trained:
            return "frozen"
        return "kept" if self.rows(tokens) * self.vocabulary * self.itemsize <= self.logits_budget else "sliced"

    def head_bytes(self, tokens: float, regime: str) -> float:
        """What the head adds to a forward pass: what it keeps, and its tiles."""
        n = self.rows(tokens)
        matrix = n * self.vocabulary * self.itemsize
        kept = {"kept": matrix, "frozen": 4 * n * self.hidden, "sliced": 0.0}[regime]
        return kept + self._head_scratch(n, regime)

    def _head_scratch(self, n: float, regime: str) -> float:
        """Inside the op, unseen from outside: the tile of logits, and fp32 sums of the gradient of hidden."""
        matrix = n * self.vocabulary * self.itemsize
        tile = backends.CPU_TILE_BYTES if self.device_type == "cpu" else backends.DEVICE_TILE_BYTES
        wide = (4 + self.itemsize) * n * self.hidden if self.head_trained else 0.0
        return wide + (0.0 if regime == "kept" else min(matrix, tile))

    def step(self, tokens: float) -> float:
        regime = self.regime(tokens)
        scratch = self._head_scratch(self.rows(tokens), regime)
        return self.scratch + max(self.trunk[regime].at(tokens), self.head[regime].at(tokens) + scratch)

    def total(self, tokens: float) -> float:
        before = self.weights + self.reference_pass + self.process
        return max(before, self.fixed + max(self.step(tokens), self.optimizer_scratch))

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
    ref_model: int = 0, live: bool = False,
) -> Estimate:  # fmt: skip
    """row_share: N / T. ref_model: bytes of a second model; live: a loss reads the reference's logits (TDPO)."""
    if config.fsdp != "no":
        raise ConfigError(
            "memory is estimated for a model that is whole on its device: leave fsdp out, and set a number"
        )
    policy, mode = blueprint.policy, blueprint.mode
    if config.disable_dropout:
        disable_dropout(policy.model)
    try:
        on_cpu = device_type == "cpu"
        runs = [simulate(blueprint, config, tokens, row_share, autocast, on_cpu=on_cpu) for tokens in SIMULATED]
    except FastpoError:
        raise
    except Exception as error:  # a model that looks at values, such as a loop over the experts that got a token
        name = type(policy.causal_lm).__name__
        raise UnsupportedModelError(
            f"{name} cannot be run without its weights ({type(error).__name__}: {first_line(error)[:160]}): set "
            "max_tokens to a number; a run that is out of memory lowers it by itself"
        ) from error
    regimes = runs[0].traces.keys()
    with mode:
        head = policy.head()
        trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        itemsize = 2 if autocast else head.weight.element_size()
        budget = config.logits_memory_budget
        budget = ops.default_memory_budget(head.weight) if budget is None else budget
        copied = config.sync_ref_model or (live and not ref_model and not hasattr(policy.model, "peft_config"))
        copies = sum(p.nbytes for p in trained.values()) if copied else 0
    return Estimate(
        parameters=sum(p.numel() for p in policy.model.parameters()),
        trainable=sum(p.numel() for p in trained.values()),
        weights=blueprint.weights, gradients=runs[0].gradients, masters=runs[0].masters,
        optimizer=_optimizer_bytes(policy.model, config, trained), reference=copies + (ref_model if live else 0),
        reference_pass=0 if live else ref_model,
        process=_resident() if device_type == "cpu" else 0, row_share=row_share, vocabulary=head.weight.shape[0],
        hidden=head.weight.shape[1], itemsize=itemsize, device_type=device_type, head_trained="frozen" not in regimes,
        logits_budget=budget, scratch=blueprint.scratch,
        trunk={r: _lines([run.traces[r][0] for run in runs]) for r in regimes},
        head={r: _lines([run.traces[r][1] for run in runs]) for r in regimes},
        saved_per_token=(runs[1].saved - runs[0].saved) / (SIMULATED[1] - SIMULATED[0]),
        # AdamW over lists of tensors forms its updates for all of them at once.
        optimizer_scratch=4 * runs[0].stepped if config.optim == "adamw_torch" and device_type == "cuda" else 0,
    )  # fmt: skip


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


def max_tokens_of_run(
    model: nn.Module, config: TrainConfig, world: World, examples: Sequence[Example], objective: Objective,
    *, autocast: bool, ref_model: Any = None,
) -> int:  # fmt: skip
    """The run's tokens of a micro-batch, alike on all ranks; `auto` is what the device's memory holds."""
    if config.max_tokens == "auto":
        mine = largest_max_tokens(
            model, config, world.device, examples, objective, autocast=autocast, ref_model=ref_model
        )
        found = min(world.gather(mine))
    else:
        found = int(config.max_tokens or MAX_TOKENS[world.device.type])
    if config.token_bucket and found % config.token_bucket:
        nearest = max(1, found // config.token_bucket) * config.token_bucket
        raise ConfigError(f"max_tokens={found} is no multiple of token_bucket={config.token_bucket}: {nearest} is one")
    return found


def largest_max_tokens(
    model: nn.Module, config: TrainConfig, device: torch.device, examples: Sequence[Example], objective: Objective,
    *, autocast: bool, ref_model: Any = None,
) -> int:  # fmt: skip
    """max_tokens=auto: what is estimated to fit on the run's device; no more than its largest step has."""
    if config.fsdp != "no":
        raise ConfigError("max_tokens=auto does not know how much fsdp leaves on a rank: set max_tokens to a number")
    memory = device_memory(device)
    if memory is None:
        raise ConfigError("max_tokens=auto: the memory of this device is unknown: set max_tokens to a number")
    sizes = sorted(map(trunk_tokens, examples), reverse=True)
    step = sum(sizes[: config.step_size])
    share = 1.0 if objective.reads_prompts else sum(len(r) for e in examples for r in e.responses) / sum(sizes)
    found = estimate(
        Blueprint.of_model(model), config, device.type, row_share=min(1.0, share), autocast=autocast,
        ref_model=_ref_model_bytes(ref_model, config, device), live=TOKEN_KL in objective.row_statistics,
    )  # fmt: skip
    # The model is in this process already, on a CPU.
    found.process = max(0, found.process - found.weights)
    room = memory * (1 - HEADROOM)
    found.check_fixed(room, f"this {device.type} has for it")
    bucket = config.token_bucket or 1  # to a multiple of which every micro-batch is padded
    tokens = found.largest(room) // bucket * bucket
    if not tokens:
        least = max(STEP_TOKENS, bucket)
        smaller = "a smaller token_bucket, " if bucket > STEP_TOKENS else ""
        raise ConfigError(
            f"max_tokens=auto: {gib(found.total(least))} are needed for {least} tokens, and there are {gib(room)}: set "
            f"{smaller}gradient_checkpointing, logits_memory_budget=0, or train an adapter (peft_config)"
        )
    tokens = min(tokens, -(-max(step, STEP_TOKENS) // bucket) * bucket)
    log.info("max_tokens=auto: %d, estimated to take %s of %s", tokens, gib(found.total(tokens)), gib(memory))
    if found.total(sizes[0]) > room:
        log.warning("the longest row has %d tokens, which are estimated to take %s of %s: set a shorter max_length",
                    sizes[0], gib(found.total(sizes[0])), gib(memory))  # fmt: skip
    return tokens


def _ref_model_bytes(ref_model: Any, config: TrainConfig, device: torch.device) -> int:
    """Weights of a reference that is still to come into this process, or onto the device."""
    if isinstance(ref_model, str | os.PathLike):
        return Blueprint.of_name(os.fspath(ref_model), config, argument="ref_model").weights
    if isinstance(ref_model, nn.Module) and next(ref_model.parameters()).device != device:
        return sum(p.nbytes for p in ref_model.parameters())
    return 0


# ---- the command


def run(inputs: dict[str, Any], config: TrainConfig, memory: str | None, as_json: bool) -> int:
    """`fastpo plan`: prints the table. `inputs` and `config` as `fastpo.train` takes them."""
    given = parse_bytes(memory) if memory is not None else None
    # With a size the device need not be here: one that is named is planned for as it is.
    named = given is not None and config.device is not None and not config.use_cpu
    device = None if named else resolve_device(config.device, use_cpu=config.use_cpu)
    device_type = device.type if device is not None else _type_of(config.device)
    blueprint = Blueprint.of_name(inputs["model"], config, inputs.get("peft_config"), inputs.get("quantization_config"))
    examples = _examples(inputs, config) if inputs.get("train_dataset") else []
    share, longest, step = 1.0, 0, MOST_TOKENS
    if examples:
        cpu = torch.device("cpu")  # whose costs decide nothing on a GPU: auto shares on a CPU alone
        with blueprint.mode:
            cost = TrunkCost.of(Flops(blueprint.policy, cpu), cpu)
        set_sharing(examples, sharing_mode(config.share_prompts, device_type), cost)
        rotary.unshare(blueprint.policy.trunk, examples)
        sizes = sorted(map(trunk_tokens, examples), reverse=True)
        longest, step = sizes[0], sum(sizes[: config.step_size])
        share = min(1.0, sum(len(r) for e in examples for r in e.responses) / sum(sizes))
    autocast = config.bf16 if config.bf16 is not None else device_type == "cuda"
    ref_name = inputs.get("ref_model")
    ref_model = Blueprint.of_name(ref_name, config, argument="ref_model").weights if ref_name else 0
    terms = [LOSSES.get(name) for name in config.losses]
    live = any(t is not None and "chosen_kl" in t.needs for t in terms)
    found = estimate(blueprint, config, device_type, row_share=share, autocast=autocast, ref_model=ref_model, live=live)
    if given is not None:
        found.process = 0  # the size given is the run's
    available = given if given is not None or device is None else device_memory(device)
    if available is None:
        raise ConfigError("the memory of this device is unknown: say --memory SIZE")
    room = available * (1 - HEADROOM)
    tokens = int(config.max_tokens) if config.max_tokens not in (None, "auto") else MAX_TOKENS[device_type]
    largest = found.largest(room)
    if config.max_tokens == "auto":
        tokens = max(STEP_TOKENS, min(largest, step))  # as in training: no more than the largest step has
    if as_json:
        numbers = _numbers(found, tokens, available, largest, longest)
        print(json.dumps(numbers | {"device": device_type, "max_tokens_from": _origin(config)}))
    else:
        print(_table(found, blueprint, config, tokens, available, largest, longest, bool(examples)))
    found.check_fixed(available, "the memory given" if given is not None else "this device has")
    return 0


def _type_of(device: str | None) -> str:
    """`cuda` or `cpu`, of a device that need not be here."""
    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError:
        kind = ""
    if kind not in MAX_TOKENS:
        raise ConfigError(f"device {device!r} is not supported; use cuda or cpu")
    return kind


def _origin(config: TrainConfig) -> str:
    return "default" if config.max_tokens is None else "auto" if config.max_tokens == "auto" else "option"


def _assumed(config: TrainConfig, device_type: str) -> str:
    """Where the number of tokens comes from, and whose it would be on another device."""
    if _origin(config) == "option":
        return ""
    if _origin(config) == "auto":
        return ", as max_tokens=auto takes"
    names = {"cpu": "a CPU", "cuda": "a GPU"}
    other = next(kind for kind in names if kind != device_type)
    return f", the default on {names[device_type]} (on {names[other]} {MAX_TOKENS[other]:,}: --device {other})"


def _examples(inputs: dict[str, Any], config: TrainConfig) -> list[Example]:
    tokenizer = load_tokenizer(inputs["model"], trust_remote_code=config.trust_remote_code)
    given = inputs["train_dataset"]
    examples: list[Example] = []
    for part in mixing.parts_of(given) or [mixing.Part("", given)]:
        table = run_data.open_table(part, config.dataset_train_split, config.dataset_config)
        names, head = set(sources.column_names(table)), sources.head_rows(table)
        kinds = ("unpaired", "preference") if names & {"label", "kto_tag"} else ("preference", "sft")
        layout = layouts.find(names, head, kinds)
        own = "preference" if names & {"chosen", rows.RESPONSES} else "unpaired" if rows.LABEL in names else "sft"
        examples += prepare_examples(
            table, tokenizer, kind=own if layout is None else layout.kind, max_length=config.max_length, columns=[],
            truncation_mode=config.truncation_mode, invalid="drop", num_proc=config.dataset_num_proc,
            forming=Forming(config.pair_policy, config.pair_margin), recognise=config.recognise_layouts,
        )[0]  # fmt: skip
    return examples


def _numbers(found: Estimate, tokens: int, memory: int, largest: int, longest: int) -> dict[str, Any]:
    regime = found.regime(tokens)
    return {
        "parameters": found.parameters, "trainable_parameters": found.trainable, "weights": found.weights,
        "gradients": found.gradients, "master_copies": found.masters, "optimizer_state": found.optimizer,
        "reference": found.reference, "process": found.process, "activations_per_token": found.saved_per_token,
        "head": {r: found.head_bytes(tokens, r) for r in found.trunk}, "head_regime": regime, "max_tokens": tokens,
        "step_peak": found.step(tokens), "total": found.total(tokens), "memory": memory, "largest_max_tokens": largest,
        "longest_row": longest,
    }  # fmt: skip


def _table(
    found: Estimate, blueprint: Blueprint, config: TrainConfig, tokens: int, memory: int, largest: int, longest: int,
    from_data: bool,
) -> str:  # fmt: skip
    """The estimate for people."""
    policy, numbers = blueprint.policy, _numbers(found, tokens, memory, largest, longest)
    regime = found.regime(tokens)
    trained = "all" if found.trainable == found.parameters else f"{found.trainable:,}"
    quantised = f", base in {blueprint.quantized}" if blueprint.quantized else ""
    checkpointing = "off"
    if config.gradient_checkpointing:
        count = config.gradient_checkpointing_layers
        checkpointing = "every layer" if count is None else f"the first {count} layers"
    reference = "stays in memory" if found.reference else "computed before training"
    if found.reference_pass:
        reference += f", when ref_model takes {gib(found.reference_pass)}"
    share = "of the data" if from_data else "taken as 1 without --train-dataset: an upper bound"
    lines = [
        f"{type(policy.causal_lm).__name__}: {found.parameters:,} parameters ({trained} trained), "
        f"{str(policy.dtype).removeprefix('torch.')}{quantised}; gradient checkpointing: {checkpointing}",
        "",
        _line("weights", found.weights),
        _line("gradients", found.gradients, "fp32" if found.gradients else ""),
        _line("fp32 master copies", found.masters, config.master_weights),
        _line("optimiser state", found.optimizer, config.optim),
        _line("reference", found.reference, reference),
    ]
    if found.process:
        lines.append(_line("process", found.process, "Python and its libraries"))
    lines += [
        _line("activations", numbers["activations_per_token"] * tokens,
              f"{gib(numbers['activations_per_token'])} a token x {tokens:,} tokens, kept for the backward pass"),
        *(_line(f"head, {r}", nbytes, f"{'in use' if r == regime else 'not in use'}; "
                f"N {found.rows(tokens):,.0f} x V {found.vocabulary:,}") for r, nbytes in numbers["head"].items()),
        _line("peak of a step", found.step(tokens), "activations, head, gradients on their way: the worst moment"),
        _line("total", found.total(tokens), f"at max_tokens={tokens:,}{_assumed(config, found.device_type)}"),
        "",
        f"memory {gib(memory)}, of which {HEADROOM:.0%} are left free: "
        + (f"the largest max_tokens is {largest:,}" if largest else f"not even {STEP_TOKENS} tokens fit"),
        f"head rows: {found.row_share:.2f} of the tokens ({share})",
    ]  # fmt: skip
    if longest:
        fits = "fits" if found.total(longest) <= memory * (1 - HEADROOM) else "does not fit"
        lines.append(f"longest row: {longest:,} tokens, {gib(found.total(longest))} alone: {fits}")
    return "\n".join(lines)


def _line(name: str, nbytes: float, note: str = "") -> str:
    return f"{name:<22}{gib(nbytes):>12}  {note}".rstrip()

"""When the device runs out of memory: the same rows again, in smaller micro-batches.

Every term of a loss is normalised over its whole step, so a step may be packed in any way. What a failed attempt has
left behind (gradients half accumulated, on their way through hooks and fp32 buffers) is not mended but dropped: the
step begins anew, with the random states of its beginning. Passes without gradients have nothing to drop, and split the
micro-batch that failed.

Replicas exchange nothing between the micro-batches of a step, so each mends its own share alone. Sharded ranks (fsdp)
gather every layer together: one that stops in the middle leaves the others waiting inside a collective, which no flag
can reach. There the run ends with a message.
"""

import errno
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import packed_size, pass_batches, trunk_tokens
from fastpo.data.prepare import Example
from fastpo.errors import TrainingError
from fastpo.models.adapters import first_line, is_quantized
from fastpo.models.modes import checkpoint_all
from fastpo.models.policy import Policy
from fastpo.ops import default_memory_budget
from fastpo.training.distributed import World
from fastpo.training.guardrails import Warning_
from fastpo.training.random_state import rng_state, set_rng_state

log = logging.getLogger("fastpo")

T = TypeVar("T")

_MESSAGES = (
    "out of memory",
    "not enough memory",
    "defaultcpuallocator",
    "allocate memory",
    "bad_alloc",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in _MESSAGES)


def savings(config: TrainConfig, model: nn.Module, dtype: torch.dtype, device: torch.device, training: bool) -> str:
    """The options that would save memory and are not in use, the cheapest first; `training`: with gradients. dtype: of
    the model's weights."""
    full = not hasattr(model, "peft_config")
    wide = dtype in (torch.float32, torch.float64)
    layers = config.gradient_checkpointing_layers
    length = f"max_length (now {config.max_length})" if config.max_length else "max_length"
    ways = {
        "gradient_checkpointing": not config.gradient_checkpointing,
        "gradient_checkpointing_layers=all": config.gradient_checkpointing and type(layers) is int,
        "logits_memory_budget=0": full and config.logits_memory_budget != 0,
        "activation_offloading": not config.activation_offloading and device.type != "cpu",
        "optim=adamw_8bit": full and "8bit" not in config.optim and config.fsdp == "no",
        "master_weights=stochastic": full and not wide and config.master_weights in ("auto", "fp32"),
        "dtype=bfloat16": wide and not is_quantized(model),
        "an adapter (peft_config)": full,
        "a smaller token_bucket": bool(config.token_bucket),
        f"a shorter {length}": True,
    }
    names = [name for name, is_open in ways.items() if is_open]
    return ", ".join(name for name in names if training or name.startswith(("dtype", "a s")))


# On a CPU 2,048 is as fast as 4,096, and takes a fifth less memory (bench/train_vs_peers.py).
MAX_TOKENS = {"cuda": 16_384, "cpu": 2_048}


class Retreat:
    """What the options leave open, and the run took since its memory seemed to hold it (plan/settle.py): given back
    one by one where that was wrong, before micro-batches become smaller."""

    def __init__(self, config: TrainConfig, taken: Sequence[str] = (), policy: Policy | None = None):
        """config: of the run's parts, which read it anew in every step; it changes. taken: names of its options."""
        self.config, self.policy = config, policy
        self.left = [name for name in ("gradient_checkpointing_layers", "logits_memory_budget") if name in taken]
        self.given: list[str] = []

    def give(self) -> str | None:
        """The next one, in words; None where there is none."""
        if not self.left or self.policy is None:
            return None
        name = self.left[0]
        self.load([*self.given, name])
        if name == "logits_memory_budget":
            usual = default_memory_budget(self.policy.head().weight)
            what = f"the head keeps no more than its usual budget (logits_memory_budget={usual}"
        else:
            checkpoint_all(self.policy)
            what = "every layer is checkpointed (gradient_checkpointing_layers=all"
        return f"{what} from the start spares the failed attempts)"

    def load(self, given: Sequence[str]) -> None:
        """Those were given before training began: what `given` holds, as a checkpoint has it."""
        for name in given:
            if name in self.left:
                self.left.remove(name)
                self.given.append(name)
                setattr(self.config, name, None)


class Budget:
    """Tokens that a micro-batch of this process may have: `max_tokens`, until the device has run out at that."""

    def __init__(
        self,
        max_tokens: int,
        config: TrainConfig,
        world: World,
        advice: Callable[[bool], str],
        name_of: Callable[[Sequence[Example], int], str],
        retreat: Retreat | None = None,
    ):
        """advice: what would save memory, with gradients or without (`savings`). name_of: a row, as people count."""
        self.retreat = retreat or Retreat(config)
        self.max_tokens, self.config, self.world = max_tokens, config, world
        self.advice, self.name_of = advice, name_of
        self.tokens = max_tokens  # with gradients
        self.pass_tokens = max_tokens  # without
        self.examples: Sequence[Example] = ()
        self.part: Sequence[int] = ()  # rows of the micro-batch that is under way in training, of `examples`
        self._forgiven: set[int] = set()  # budgets at which a step was repeated as it was

    # ------------------------------------------------------------- training

    @property
    def lowered(self) -> bool:
        """Whether micro-batches of training are smaller than max_tokens."""
        return self.tokens < self.max_tokens

    def tries(self, examples: Sequence[Example], part: Sequence[int]) -> None:
        """A micro-batch of training begins."""
        self.examples, self.part = examples, part

    def repeat(
        self, work: Callable[[], T], drop: Callable[[], object], restart: Callable[[], object], step: int,
        warn: Callable[[Warning_], object],
    ) -> T:  # fmt: skip
        """`work()`, which leaves a step's gradients; after `drop()` of them and `restart()` again where memory ran out.

        A first failure at a budget may have been a fragmented allocator's, or another process's: the caches are given
        back and the step is repeated as it was, bit for bit. The next one takes back what was decided by an estimate of
        the memory, one after the other, and then lowers the budget for good.
        """
        rng, self.part = rng_state(), ()
        while True:
            try:
                return work()
            except Exception as error:
                reason = self._reason(error)
            # Outside the handler: its traceback would keep the micro-batch's activations alive.
            drop()
            release(self.world.device)
            self._lower(reason, step, warn)
            set_rng_state(rng)
            restart()

    def _lower(self, reason: str, step: int, warn: Callable[[Warning_], object]) -> None:
        part = self.part
        tokens = packed_size(self.examples, part)
        if not part:
            raise TrainingError(
                f"out of memory before the first micro-batch of a step ({reason}); use {self.advice(True)}"
            )
        if self.tokens not in self._forgiven:
            self._forgiven.add(self.tokens)
            log.warning(
                "step %d: out of memory in a micro-batch of %d tokens (%s); freed what could be freed, and the step "
                "begins anew as it was", step, tokens, reason,
            )  # fmt: skip
            return
        message = f"out of memory in a micro-batch of {tokens:,} tokens ({reason}): "
        if (given := self.retreat.give()) is not None:
            message += f"there is less memory than was estimated, and from this step on {given}"
        elif len(part) == 1:
            raise self._too_large(self.examples, part[0], reason, training=True)
        else:
            self.tokens = self._half(tokens)
            message += (
                f"this step and the following ones are trained in micro-batches of {self.tokens:,} tokens, which "
                f"changes the results by rounding only; max_tokens={self.tokens} from the start spares the failed "
                "attempts"
            )
        warning = Warning_("out_of_memory", step, message)
        warn(warning)
        log.warning("%s", warning)

    def _half(self, tokens: int) -> int:
        """Of a budget; what token_bucket pads a micro-batch to is within it."""
        half, bucket = tokens // 2, self.config.token_bucket or 1
        return max(1, half // bucket * bucket or half)

    # ------------------------------------------------------- without gradients

    def passes(
        self, parts: Sequence[list[int]], examples: Sequence[Example], work: Callable[[list[int]], T]
    ) -> Iterator[T]:
        """`work(part)` of every micro-batch of `examples`, or of its pieces where it does not fit."""
        stack = [list(part) for part in reversed(parts)]
        tried_alone = False
        while stack:
            part = stack.pop()
            size = packed_size(examples, part)
            if size > self.pass_tokens and len(part) > 1:
                stack += reversed(pass_batches(examples, part, self.pass_tokens))
                continue
            try:
                result = work(part)
            except Exception as error:
                reason = self._reason(error)
            else:
                tried_alone = False
                yield result
                del result
                continue
            release(self.world.device)
            stack.append(part)
            if len(part) > 1:
                self.pass_tokens = self._half(size)
                log.warning("out of memory in a pass over %d tokens (%s); it goes on with %d at a time", size, reason,
                            self.pass_tokens)  # fmt: skip
            elif tried_alone:
                raise self._too_large(examples, part[0], reason, training=False)
            tried_alone = len(part) == 1

    # ----------------------------------------------------------------- errors

    def _reason(self, error: Exception) -> str:
        """What the allocator said; raises the error itself where it is another, and where nothing can be done."""
        if not is_out_of_memory(error):
            raise error
        reason = first_line(error)[:160]
        if self.config.fsdp != "no":
            raise TrainingError(
                f"out of memory on rank {self.world.rank} ({reason}): with fsdp the ranks run each layer together, "
                f"so one cannot repeat its part alone; lower max_tokens (now {self.max_tokens}), or use "
                f"{self.advice(True)}; resume_from_checkpoint goes on from the last checkpoint"
            ) from error
        return reason

    def _too_large(self, examples: Sequence[Example], row: int, reason: str, training: bool) -> TrainingError:
        count = len(examples[row].responses)
        return TrainingError(
            f"out of memory: {self.name_of(examples, row)} alone, {trunk_tokens(examples[row]):,} "
            f"tokens in {count} response{'s' * (count > 1)}, does not fit ({reason}); use {self.advice(training)}"
        )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint: a resumed run packs as this one would have. Every rank calls it."""
        auto = self.config.max_tokens == "auto"
        mine = self.tokens, self.pass_tokens, self.retreat.given
        tokens, pass_tokens, given = map(list, zip(*self.world.gather(mine), strict=True))
        return {
            "max_tokens": self.max_tokens, "auto": auto, "tokens": tokens, "pass_tokens": pass_tokens, "given": given,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken; not with another max_tokens, which was set to try that."""
        rank = self.world.rank
        if self.config.max_tokens == "auto" and state.get("auto"):  # the memory that is free changes from day to day
            lowered = self.pass_tokens < self.max_tokens  # by this process's own passes, before its first step
            self.max_tokens = self.tokens = state["max_tokens"]
            self.pass_tokens = min(self.pass_tokens, self.max_tokens) if lowered else self.max_tokens
        # Sharded ranks count their rounds by max_tokens, all alike: one with more micro-batches would leave some out.
        if state.get("max_tokens") != self.max_tokens or self.config.fsdp != "no":
            return
        if rank < len(state["tokens"]):
            self.tokens = state["tokens"][rank]
            self.pass_tokens = min(self.pass_tokens, state["pass_tokens"][rank])
            self.retreat.load(state.get("given", [[]] * (rank + 1))[rank])


def release(device: torch.device) -> None:
    """Give back what no tensor uses: cycles of dead graphs, then the allocator's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

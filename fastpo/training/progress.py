"""Where a run stands, beside its weights, its optimiser and transformers' TrainerState."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Counters of one run; `state_dict` is what a checkpoint keeps of them."""

    cursor: int = 0  # steps of the plan that are behind
    seen: int = 0  # rows of the epoch
    rows_done: int = 0  # rows in all
    num_tokens: int = 0  # real tokens in all
    reference_start: int = 0  # step of the plan from which a moving reference stands still
    todo: dict[str, Any] = field(default_factory=dict)  # between a step and its checkpoint: what is left to do
    elapsed: float = 0.0  # seconds of training before this process
    started: float = 0.0  # time.monotonic() at which training began, less `elapsed`
    rng: dict[str, Any] | None = None  # inside a step, the random states at its beginning
    saved_step: int = -1  # of the last whole checkpoint of this run
    updating: bool = False  # whether the weights are between two steps, or not the policy's

    def start(self) -> None:
        """Training begins, or goes on."""
        self.started = time.monotonic() - self.elapsed

    def seconds(self) -> float:
        """Of training so far."""
        return time.monotonic() - self.started

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """Inside, the weights are neither the policy's nor another's: nothing may be saved, nor after an error here."""
        before, self.updating = self.updating, True
        yield
        self.updating = before

    def saved(self, step: int) -> None:
        """The checkpoint of this step is whole."""
        self.saved_step = step

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        kept = {name: getattr(self, name) for name in self._KEPT}
        return {**kept, "todo": dict(self.todo), "elapsed": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name in (*self._KEPT, "todo", "elapsed"):
            setattr(self, name, state[name])

    _KEPT = ("cursor", "seen", "rows_done", "num_tokens", "reference_start")

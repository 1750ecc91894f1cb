"""Evaluation of an online run: responses to other prompts, and what they are worth."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastpo.config.train_config import TrainConfig
from fastpo.data.example import Example
from fastpo.losses.online import POLICY
from fastpo.online.drawing import Drawing
from fastpo.online.prompts import Asked
from fastpo.online.rollouts import Judgement


class OnlineEvaluation:
    """Draws `count` responses of the policy to each prompt, by the same seeds every time, and judges them as training
    does."""

    def __init__(
        self, drawing: Drawing, judgement: Judgement, config: TrainConfig, count: int, refresh: Callable[[], object]
    ):
        """refresh: gives a sampler beside this process the weights as they are. Every rank calls it."""
        self.drawing, self.judgement, self.config, self.count = drawing, judgement, config, count
        self.refresh = refresh

    def __call__(self, examples: Sequence[Example], ref: Any, name: str, prefix: str | None = None) -> dict[str, float]:
        """The metrics of rewards and lengths; keys carry `prefix`. Every rank calls it."""
        started = time.monotonic()
        prefix = name if prefix is None else prefix
        asked = {row: e for row, e in enumerate(examples) if isinstance(e, Asked)}
        self.refresh()
        drawn = self.drawing(asked, self.count, self.config.seed, "evaluation", name, draws=POLICY)
        judged = self.judgement(drawn, asked)
        seconds = time.monotonic() - started
        out = {f"{prefix}_{key}": value for key, value in judged.metrics.items() if value == value}
        if judged.left_out:
            out[f"{prefix}_left_out"] = float(sum(judged.left_out.values()))
        return {**out, f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": len(examples) / seconds}

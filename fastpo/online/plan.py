"""Which prompts each optimiser step of an online run takes, and when responses are drawn.

A generation is the prompts of `spread` steps of one epoch, whose responses are drawn together, by the weights at its
first step; its steps are gone through `num_iterations` times. Both are 1 unless options say otherwise: every step
trains on responses of the policy as it is.
"""

from dataclasses import replace

from fastpo.config.train_config import TrainConfig
from fastpo.training.step_plan import StepPlan


class OnlinePlan(StepPlan):
    """`plan[k]`: (epoch, prompts) of step k. prompts: of a step, over all processes."""

    def __init__(self, config: TrainConfig, rows: int, prompts: int, *, spread: int = 1, passes: int = 1):
        """spread: steps whose responses are drawn together. passes: over each generation."""
        steps = config.max_steps
        base = replace(
            config, per_device_train_batch_size=prompts, gradient_accumulation_steps=1,
            max_steps=-(-steps // passes) if steps > 0 else steps,
        )  # fmt: skip
        super().__init__(base, rows)
        self.spread, self.passes, self.rows = spread, passes, rows * passes
        self.total = steps if steps > 0 else self.total * passes

    def generation(self, step: int) -> tuple[int, int, list[int]]:
        """(step at which its responses are drawn, place of this step in the generation, base steps of it)."""
        of_epoch = self.per_epoch * self.passes
        epoch, place = divmod(step, of_epoch)
        number, inside = divmod(place, self.spread * self.passes)
        first = epoch * self.per_epoch + number * self.spread
        size = min(self.spread, self.per_epoch - number * self.spread)
        return step - inside, inside % size, list(range(first, first + size))

    def _of(self, step: int) -> tuple[int, list[int]]:
        _, place, base = self.generation(step)
        return self.base(base[place])

    def base(self, step: int) -> tuple[int, list[int]]:
        """(epoch, prompts) of a base step."""
        return super()._of(step)

    def visited(self, start: int = 0, stop: int | None = None) -> set[int]:
        """No prompt's responses are known before they are drawn."""
        return set()

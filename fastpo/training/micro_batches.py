"""Which rows go through the model together: micro-batches of at most `max_tokens` tokens, on the device."""

from collections.abc import Sequence
from typing import Any

from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import PackedBatch, collate, set_sharing, sharing_mode, step_batches
from fastpo.data.prepare import Example
from fastpo.models import rotary, sharing
from fastpo.models.modes import check_ids
from fastpo.models.policy import Policy
from fastpo.training.distributed import World, uses_bf16
from fastpo.training.memory import MAX_TOKENS
from fastpo.training.objective import Objective
from fastpo.training.row_statistics import EVALUATION, draw_rows


class MicroBatches:
    """Packs rows for one policy, by what they cost it."""

    def __init__(self, config: TrainConfig, world: World, objective: Objective, policy: Policy):
        self.config, self.world, self.objective, self.policy = config, world, objective, policy
        bf16 = uses_bf16(config, world.device)
        # Every rank packs the step alike, whatever card it has.
        kind, given = world.device.type, config.max_tokens
        room = given if isinstance(given, int) else MAX_TOKENS[kind]
        costs = world.gather(sharing.trunk_cost(policy, config, kind, world.device, bf16=bf16, room=room))
        self.cost = costs[0]._replace(shares=all(cost.shares for cost in costs))

    def place(self, name: str, examples: list[Example]) -> None:
        """Before the first batch of a set: its ids are checked, and it is decided which rows share their prompt."""
        check_ids(self.policy, examples, name)
        self.policy.place(examples)
        set_sharing(examples, sharing_mode(self.config.share_prompts, self.cost), self.cost)
        rotary.unshare(self.policy.trunk, examples)

    def of_step(self, examples: Sequence[Example], rows: Sequence[int], max_tokens: int) -> list[list[list[int]]]:
        """A step's rows, as micro-batches of each process."""
        return step_batches(examples, rows, max_tokens, self.cost, self.world.size)

    def of_part(self, examples: Sequence[Example], rows: Sequence[int], max_tokens: int) -> list[list[int]]:
        """This process's share of a step, packed anew for a smaller budget."""
        return step_batches(examples, rows, max_tokens, self.cost)[0]

    def batch(
        self, examples: Sequence[Example], part: Sequence[int], ref: Any, stream: int = EVALUATION, step: int = 0
    ) -> PackedBatch:
        """A micro-batch on the device; `stream` and `step` say which tokens are drawn, where a loss draws some."""
        config = self.config
        prompts: Any = self.objective.reads_prompts
        batch = collate(examples, part, ref, with_prompts=prompts, token_bucket=config.token_bucket)
        if self.objective.draws:
            seed = config.seed if config.data_seed is None else config.data_seed
            batch.drawn_rows = draw_rows(examples, part, seed, stream, step)
        return batch.to(self.world.device)

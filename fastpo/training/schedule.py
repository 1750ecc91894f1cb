"""When a run logs, evaluates and saves: by its options, as transformers' Trainer would."""

import math

from transformers import TrainerControl, TrainerState

from fastpo.config.train_config import TrainConfig
from fastpo.models.modes import interval


class Schedule:
    """Reads `state` for the step and the epoch, which the trainer counts, and the intervals that it keeps there."""

    def __init__(self, config: TrainConfig, rows: int, batch: int, steps: int):
        """rows: of an epoch, in batches of so many, over all processes. steps: of the run."""
        self.config, self.rows, self.batch, self.steps = config, rows, batch, steps

    def begin(self, state: TrainerState) -> None:
        """Writes the run's length and intervals into the state."""
        config, steps = self.config, self.steps
        state.max_steps, state.num_train_epochs = steps, math.ceil(config.num_train_epochs)
        state.logging_steps = interval(config.logging_steps, steps)
        state.eval_steps = interval(config.eval_steps or config.logging_steps, steps)
        state.save_steps = interval(config.save_steps, steps)
        state.train_batch_size = config.per_device_train_batch_size

    def epoch(self, epoch: int, seen: int) -> float:
        """TRL's fractional epoch: batches seen over batches of the epoch, from the epoch's rows seen so far."""
        drop = self.config.dataloader_drop_last
        batches = self.rows // self.batch if drop else math.ceil(self.rows / self.batch)
        return epoch + math.ceil(seen / self.batch) / batches

    def logs_next(self, state: TrainerState, last_of_epoch: bool, last: bool) -> bool:
        """Whether the step at hand will be logged; `last`: of the run."""
        config, step = self.config, state.global_step + 1
        if config.logging_strategy == "steps" and step % state.logging_steps == 0:
            return True
        first = config.logging_first_step and step == 1
        return first or (config.logging_strategy == "epoch" and last_of_epoch) or last

    def mark_due(self, control: TrainerControl, state: TrainerState, strategy: str, at_end: bool = False) -> None:
        """Set the control flags of what is due after this step (`steps`), or after this epoch; callbacks may change
        them. At the end too, as in transformers: a finished run can be continued."""
        config, step = self.config, state.global_step

        def due(chosen: str, every: int) -> bool:
            return chosen == strategy and (strategy == "epoch" or step % every == 0)

        control.should_log |= due(config.logging_strategy, state.logging_steps)
        control.should_log |= strategy == "steps" and step == 1 and config.logging_first_step
        late_enough = config.eval_delay <= (state.epoch if strategy == "epoch" else step)
        evaluates = due(config.eval_strategy, state.eval_steps) or (at_end and config.eval_strategy == strategy)
        control.should_evaluate |= evaluates and late_enough
        saves = due(config.save_strategy, state.save_steps) or (at_end and config.save_strategy == strategy)
        control.should_save |= saves

"""The output folder at the start of a run: whether the run may have it, and what is there of runs before."""

import logging
from pathlib import Path
from typing import Any

from fastpo.checkpoints import checkpoint, run_lock
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError

log = logging.getLogger("fastpo")


def check(config: TrainConfig, resumes: bool) -> None:
    """The output folder, made; one that holds another run is refused unless it is resumed, and one in which a run lives
    in any case."""
    folder = Path(config.output_dir)
    run_lock.check(folder)
    names = ("metrics.jsonl", "config.yaml", "config.json", "adapter_config.json", "checkpoint-*")
    marks = [path.name for name in names for path in folder.glob(name)]
    if marks and not (config.overwrite_output_dir or resumes):
        go_on = "set resume_from_checkpoint=true to go on with it, " if checkpoint.checkpoints(folder) else ""
        raise ConfigError(
            f"output_dir {str(folder)!r} holds another run ({marks[0]}); choose another, {go_on}or set "
            "overwrite_output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} cannot be written: {error.strerror}") from None


def begin(folder: Path, resume: Path | None) -> tuple[list[dict[str, Any]], int]:
    """Leaves no checkpoint but those that the run goes on from; returns the log's lines so far, and their last step.

    resume: the checkpoint that the run goes on from, or None for a new run. For rank 0.
    """
    checkpoint.clear_temporaries(folder)
    if resume is None:
        checkpoint.set_aside(folder)
        return [], 0
    state = checkpoint.read_state(resume)
    left = checkpoint.set_aside(folder, after=state.global_step)
    if left:
        names = ", ".join(path.name for path in left)
        log.warning("checkpoints beyond step %d are left behind as %s", state.global_step, names)
    return state.log_history, state.global_step

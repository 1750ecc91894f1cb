"""Options: the table of them, their ranges, TRL's names for them."""

from fastpo.config.train_config import (
    TrainConfig,
    field_names,
    read_yaml,
)

__all__ = [
    "TrainConfig",
    "field_names",
    "read_yaml",
]

"""The errors that a user can cause, each one line long: what was wrong, and the nearest right thing."""


class FastpoError(ValueError):
    """A user's mistake. The command line prints its message without a traceback and exits with 2."""


class ConfigError(FastpoError):
    """An option that is unknown, out of range, or not honoured by fastpo."""


class DataError(FastpoError):
    """Rows that cannot be trained on."""


class UnsupportedModelError(FastpoError):
    """A model whose rule from hidden states to log-probabilities fastpo does not reproduce."""


class DeviceError(FastpoError):
    """A device that was asked for and is not there."""


class TrainingError(FastpoError):
    """A run that must stop: non-finite steps, or a start that contradicts its own closed form."""

"""fastpo: preference optimisation of language models at the speed of the matrix multiply."""

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpo.moved import MOVED, install

if TYPE_CHECKING:
    from fastpo.config.train_config import TrainConfig as TrainConfig
    from fastpo.evals.evaluate import EvalResult as EvalResult
    from fastpo.evals.evaluate import evaluate as evaluate
    from fastpo.face import TrainResult as TrainResult
    from fastpo.loop.run import IterateResult as IterateResult
    from fastpo.loop.run import iterate as iterate
    from fastpo.ops import available_backends as available_backends
    from fastpo.ops import linear_logprob as linear_logprob
    from fastpo.ops import preference_loss as preference_loss
    from fastpo.ops.vocab_parallel import VocabParallel as VocabParallel
    from fastpo.reference.rewards import rewards as rewards
    from fastpo.reference.sequence_logps import sequence_logps as sequence_logps
    from fastpo.trainer import Trainer as Trainer
    from fastpo.trainer import train as train
    from fastpo.training.evaluation import Evaluated as Evaluated

__version__ = "0.1.0"

# An editable install cannot serve the remapped sub-package `fastpo.kernels` (the checkout's `kernels/` has no
# __init__.py, so that it never hides Hugging Face's package of that name). Only in a checkout, where the parent folder
# holds both names, the checkout's root joins the search path of this package.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

# It warns that an optional kernel is absent whenever peft is imported, on CPUs that have AVX-512 bf16.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

install()

# Public names are resolved on first use, so that `import fastpo` and `fastpo --help` do not wait for PyTorch.
_EXPORTS = {
    "train": "fastpo.trainer",
    "Trainer": "fastpo.trainer",
    "TrainResult": "fastpo.face",
    "TrainConfig": "fastpo.config",
    "Evaluated": "fastpo.training.evaluation",
    "linear_logprob": "fastpo.ops",
    "preference_loss": "fastpo.ops",
    "available_backends": "fastpo.ops",
    "VocabParallel": "fastpo.ops.vocab_parallel",
    "sequence_logps": "fastpo.reference.sequence_logps",
    "rewards": "fastpo.reference.rewards",
    "iterate": "fastpo.loop.run",
    "IterateResult": "fastpo.loop.run",
    "evaluate": "fastpo.evals.evaluate",
    "EvalResult": "fastpo.evals.evaluate",
}
_SUBMODULES = ("config", "data", "errors", "games", "losses", "models", "ops", "selection", "trainer")

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES or name in MOVED:
        return import_module(f"fastpo.{name}")
    raise AttributeError(f"module 'fastpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

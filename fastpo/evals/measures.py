"""The measures by name."""

from collections.abc import Mapping
from typing import Any

from fastpo.errors import ConfigError, did_you_mean
from fastpo.evals.benchmarks import RewardBench, WildBench
from fastpo.evals.compared import AlpacaEval, Arena, HeldOut, Verifier, WinRate
from fastpo.evals.measure import Measure

MEASURES: Mapping[str, type[Measure]] = {
    one.name: one for one in (AlpacaEval, WildBench, Arena, RewardBench, WinRate, Verifier, HeldOut)
}


def measure_of(name: str, options: Mapping[str, Any]) -> Measure:
    """ConfigError for a name that there is not."""
    if name not in MEASURES:
        raise ConfigError(f"no measure {name!r}, only {', '.join(MEASURES)}{did_you_mean(str(name), MEASURES)}")
    return MEASURES[name](options)

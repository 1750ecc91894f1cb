"""The losses per token and their advantages against TRL 1.16's own code, and against their plain definitions.

    .venv/bin/python bench/online_parity.py [--seeds 5] [--no-write]

Needs TRL. GRPOTrainer, RLOOTrainer and GMPOTrainer compute their loss, gradient, advantages and corrections on a
stand-in with the attributes they read, on the same responses; the comparisons are those of test_tokens_trl.py and
test_tokens.py in tests/losses, whose differences are kept here instead of judged. fp64; a difference is the largest
absolute one of a value, or of a token's gradient, over all settings of a row and all seeds. Exit code 1 if one exceeds
1e-10.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "tests" / "losses")]  # PYTHONSAFEPATH leaves them out

import common  # noqa: E402
import test_tokens as definitions  # noqa: E402
import test_tokens_trl as peers  # noqa: E402
import torch  # noqa: E402

import fastpo  # noqa: E402
from fastpo.losses import LOSSES  # noqa: E402

LIMIT = 1e-10
NOTES = {
    "reinforce": "no such loss in TRL",
    "rloo": "RLOOTrainer, but for the constant of a response without tokens; its KL is in the reward, below",
    "gspo": "TRL's grpo at the level sequence",
    "gmpo": "GMPOTrainer, but for the constant of a response without tokens",
    "nash_md": "TRL's trainer is gone from 1.16",
    "bnpo": "one micro-batch, of which TRL's mean is",
}
CORRECTIONS = ((None, 3.0), (0.8, 1.2), (0.9, None))


def peer_cases() -> Iterator[tuple[str, dict, Callable[..., tuple[float, float, float]]]]:
    yield from ((*case, peers.compared) for case in peers.GRPO)
    yield from ((*case, peers.compared_gmpo) for case in peers.gmpo_cases())
    yield from ((*case, peers.compared_rloo) for case in peers.rloo_cases())


def against_trl(seeds: int) -> dict[tuple[str, str, str], list[float]]:
    """By loss, level and beta: settings, largest differences of value and gradient."""
    worst: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for name, options, compared in peer_cases():
        level = {"rloo": "response", "gmpo": "response"}.get(name) or options["importance_sampling_level"]
        entry = worst[name, level, str(options.get("beta", 0.0))]
        entry[0] += 1
        for seed in range(seeds):
            value, gradient, _ = compared(name, options, seed)
            entry[1:] = [_larger(entry[1], value), _larger(entry[2], gradient)]
    return worst


def against_definitions(seeds: int) -> dict[str, list[float]]:
    """By loss: settings, largest differences of value and closed-form gradient to kernels/reference_tokens.py."""
    worst: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for case in definitions.cases():
        name, hyper = case.values
        entry = worst[name]
        for given in definitions.GIVEN.values():
            entry[0] += 1
            for seed in range(seeds):
                x = definitions.batch(seed, **given)
                totals = definitions.totals(x)
                expected = definitions.defined(name, x, hyper)
                got = (
                    LOSSES[name](**x, totals=totals, **hyper),
                    LOSSES[name].coefficients(**x, totals=totals, **hyper),
                )
                value, gradient = peers.differences(got, expected)
                entry[1:] = [_larger(entry[1], value), _larger(entry[2], gradient)]
    return worst


def advantages(seeds: int) -> dict[str, list[float]]:
    """By what is compared: settings, largest difference."""
    worst: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def note(name: str, *sides: torch.Tensor) -> None:
        entry = worst[name]
        entry[1] = _larger(entry[1], float((sides[0] - sides[1]).abs().max()))

    for setting in [{"scale_rewards": s} for s in ("group", "batch", "none")] + [
        {"multi_objective_aggregation": "normalize_then_sum"}
    ]:
        name = f"advantages of GRPOTrainer, {next(iter(setting))} {next(iter(setting.values()))}"
        for functions in (1, 3):
            worst[name][0] += 1
            for seed in range(seeds):
                got, expected, *_ = peers.of_grpo_trainer(functions, seed, **setting)
                note(name, got.values, expected)
    for normalize in (True, False):
        name = f"advantages of RLOOTrainer, normalize_advantages {str(normalize).lower()}"
        for beta in (0.0, 0.05):
            for clip_range in (None, (-0.5, 1.0)):
                worst[name][0] += 1
                for seed in range(seeds):
                    got, expected, _ = peers.of_rloo_trainer(seed, normalize, beta, clip_range)
                    note(name, got.values, expected)
    for mode in peers.CORRECTIONS[1:]:
        name = f"correction of GRPOTrainer, {mode}"
        for bounds in CORRECTIONS:
            worst[name][0] += 1
            note(name, *peers.corrections(mode, bounds))
    return worst


def _larger(before: float, difference: float) -> float:
    return before if difference <= before else difference  # NaN stays


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="random batches, from seed 0 on")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    common.need("trl")
    common.quiet()
    torch.set_default_dtype(torch.float64)  # TRL forms some numbers in it

    losses, plain, rewards = against_trl(args.seeds), against_definitions(args.seeds), advantages(args.seeds)
    lines = [
        "| loss | level | beta | settings | value | gradient | note |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for (name, level, beta), (settings, value, gradient) in losses.items():
        note = NOTES.get(name, "")
        lines.append(f"| {name} | {level} | {beta} | {settings} | {value:.0e} | {gradient:.0e} | {note} |")
    lines += ["", "| against TRL | settings | difference |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {settings} | {value:.0e} |" for name, (settings, value) in rewards.items()]
    lines += ["", "| loss, against its definition | settings | value | gradient | note |",
              "| --- | ---: | ---: | ---: | --- |"]  # fmt: skip
    in_trl = {name for name, *_ in losses}
    for name, (settings, value, gradient) in plain.items():
        note = "" if name in in_trl else NOTES[name]
        lines.append(f"| {name} | {settings} | {value:.0e} | {gradient:.0e} | {note} |")
    environment = {**common.environment(), "fastpo": fastpo.__version__}
    versions = f"torch {environment['torch']}, trl {environment['trl']}"
    seeds = f"Largest absolute differences over seeds 0 to {args.seeds - 1}, in fp64; {versions}."
    lines += ["", f"{seeds} TRL's code runs as it is, on a stand-in for its trainer."]
    table = "\n".join(lines) + "\n"
    print(table)

    numbers = [n for rows in (losses, plain, rewards) for entry in rows.values() for n in entry[1:]]
    failed = sum(not n <= LIMIT for n in numbers)
    if failed:
        print(f"FAILED {failed} differences above {LIMIT}", file=sys.stderr)
    if not args.no_write:
        of_losses = [
            {
                "loss": name,
                "level": level,
                "beta": float(beta),
                "settings": settings,
                "value": value,
                "gradient": gradient,
            }
            for (name, level, beta), (settings, value, gradient) in losses.items()
        ]
        result = {"environment": environment, "seeds": list(range(args.seeds)), "limit": LIMIT, "losses": of_losses,
                  "advantages": rewards, "definitions": plain, "notes": NOTES}  # fmt: skip
        print(f"written to {common.write_result('online_parity', result, table)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

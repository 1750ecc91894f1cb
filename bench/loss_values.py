"""Every loss of the table against independent code: values and gradients on random log-probabilities.

    .venv/bin/python bench/loss_values.py [--seeds 5] [--no-write]

TRL and Liger are what is installed; the papers' formulas are written out a second time. The comparisons are those of
test_peers.py, test_table.py and test_functions.py in tests/losses: here their differences are kept instead of judged. A
difference is the largest of a batch over the largest number of the other side, the worst of all seeds and of all
settings that the tests have for a loss.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "tests" / "losses")]  # PYTHONSAFEPATH leaves them out

import common  # noqa: E402
import pytest  # noqa: E402
import test_functions as first_formulas  # noqa: E402
import test_peers as peers  # noqa: E402
import test_table as formulas  # noqa: E402
import torch  # noqa: E402

import fastpo  # noqa: E402

LIMIT = 1e-6  # fp64 against fp64 is far below; some of TRL's code is float32
GRADIENT_LIMIT = 1e-5  # of the difference quotients too
NOTES = {
    "ipo": "Liger's raises NotImplementedError; TRL and fastpo divide by the lengths",
    "orpo": "odds ratio alone; TRL computes it in float32; Liger's gradient is infinite where a response is certain",
    "kto": "Liger's has no weights of the two kinds",
    "exo_pair": "TRL and Liger hold epsilon in float32",
    "fdpo": "TRL's sigmoid with f_divergence_type; its alpha_divergence in float32",
    "wpo": "TRL's sigmoid with use_weighting, which does not cap the weight: clamp_weight=False",
    "ld_dpo": "TRL's sigmoid with ld_alpha",
    "rpo": "TRL's sigmoid + 0.005 sft",
    "bco": "TRL's BCO trainer is gone from 1.16",
    "sppo_hard": "TRL and Liger, as fastpo, without the authors' factor 1/2",
    "cpo": "the preference term alone against TRL and Liger",
    "alphapo": "TRL's CPO trainer, simpo with alpha",
    "reward": "TRL's RewardTrainer in tests/training/test_reward_model.py",
}
DEVIATIONS = (peers.test_liger_has_no_ipo, peers.test_liger_orpo_explodes_where_ours_does_not)


def peer_runs() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(library, the loss where the test does not call it through `ours`, one of the tests' comparisons)."""
    for case in peers.TRL:
        for beta in (0.1, 1.0):
            yield "TRL", "", lambda case=case, beta=beta: peers.test_trl_dpo_trainer(case, beta)
    for case in peers.CPO:
        yield "TRL", "", lambda case=case: peers.test_trl_cpo_trainer(*case)
    for test in (peers.test_trl_alpha_divergence, peers.test_trl_dpo_with_an_nll, peers.test_trl_orpo_trainer):
        yield "TRL", "", test
    for loss in ("kto", "apo_zero_unpaired"):
        yield "TRL", loss, lambda loss=loss: peers.test_trl_kto_trainer(loss)
    for case in peers.LIGER_DPO:
        yield "Liger", "", lambda case=case: peers.test_liger_dpo(case)
    yield "Liger", "", peers.test_liger_without_a_reference
    yield "Liger", "kto", peers.test_liger_kto


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def against_peers(seeds: int, note: Callable[[str, str, str, float], None]) -> dict[str, str]:
    """Notes the differences; returns why a library is missing."""
    batch, ours = peers.batch, peers.ours
    library, direct, seed, name, missing = "", "", 0, "", {}

    def named(loss: str, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal name
        name = loss
        return ours(loss, *args, **kwargs)

    def compare(theirs: Callable, mine: Callable, b: object, rtol: float = 0.0) -> None:
        nonlocal name
        name = direct  # unless a side calls it through `ours`
        sides = []
        for f in (theirs, mine):
            logp = b.logp.clone().requires_grad_()
            value = f(logp)
            sides.append((value, torch.autograd.grad(value, logp)[0] * b.mask[:, 1:]))
        (their_value, their_grad), (value, grad) = sides
        note(name, library, "value", relative(value, their_value))
        note(name, library, "gradient", relative(grad, their_grad))

    peers.ours, peers.compare = named, compare
    peers.batch = lambda dtype=torch.float64: batch(seed, dtype)
    for seed in range(seeds):  # noqa: B007 - read by peers.batch
        for library, direct, run in peer_runs():  # noqa: B007 - direct is read by compare
            try:
                run()
            except pytest.skip.Exception as error:
                missing[library] = str(error)
    return missing


def against_formulas(seeds: int, note: Callable[[str, str, str, float], None]) -> None:
    for seed in range(seeds):
        for name, formula in formulas.FORMULAS.items():
            x = formulas.inputs(name, seed)
            note(name, "formula", "value", relative(formulas.call(name, x), formula(formulas.values(x))))
        pairs = first_formulas.random_pairs(seed)
        for name, hyper, expected, *_ in first_formulas.formulas(pairs):
            note(name, "formula", "value", relative(first_formulas.call(name, pairs, **hyper), expected))
        for name, hyper in formulas.CASES:
            numeric, closed, sizes = map(torch.stack, zip(*formulas.central_differences(name, seed, **hyper)))
            # A quotient cannot see below the rounding of the losses that it subtracts.
            scale = torch.maximum(numeric.abs().max(), 1e-5 * sizes.max())
            note(name, "formula", "gradient", ((numeric - closed).abs().max() / scale).item())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="random batches, from seed 0 on")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    from importlib.metadata import version

    worst: dict[str, dict[str, float]] = defaultdict(dict)

    def note(name: str, against: str, what: str, difference: float) -> None:
        key = f"{against} {what}"
        before = worst[name].get(key, 0.0)
        worst[name][key] = difference if not difference <= before else before  # NaN stays

    against_formulas(args.seeds, note)
    missing = against_peers(args.seeds, note)
    for library, why in missing.items():
        print(f"{library}: {why}", file=sys.stderr)
    if not missing:
        for check in DEVIATIONS:  # the notes still hold
            check()

    columns = [f"{against} {what}" for against in ("TRL", "Liger", "formula") for what in ("value", "gradient")]
    head = [*columns[:-1], "central differences gradient", "note"]
    lines = [f"| loss | {' | '.join(head)} |", "| --- |" + " ---: |" * len(columns) + " --- |"]
    failed = []
    for name in formulas.LOSSES:  # those per token are in online_parity.py
        cells = [f"{worst[name][c]:.0e}" if c in worst[name] else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {NOTES.get(name, '')} |")
        limits = {c: GRADIENT_LIMIT if c.endswith("gradient") else LIMIT for c in columns}
        failed += [f"{name}: {c} {v:.1e}" for c, v in worst[name].items() if not v <= limits[c]]
        failed += [f"{name}: no {c}" for c in columns[-2:] if c not in worst[name]]
    environment = {
        **common.environment(),
        "fastpo": fastpo.__version__,
        **({} if "Liger" in missing else {"liger": version("liger-kernel")}),
    }
    versions = ", ".join(f"{k} {environment[k]}" for k in ("torch", "trl", "liger") if environment.get(k))
    lines += ["", f"Largest relative differences over seeds 0 to {args.seeds - 1}, in fp64 unless noted; {versions}."]
    table = "\n".join(lines) + "\n"
    print(table)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    if not args.no_write and not missing:
        result = {"environment": environment, "seeds": list(range(args.seeds)), "losses": worst, "notes": NOTES,
                  "limits": {"value": LIMIT, "gradient": GRADIENT_LIMIT}}  # fmt: skip
        print(f"written to {common.write_result('loss_values', result, table)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

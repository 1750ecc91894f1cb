"""The loop's policies before and after, by `fastpo evaluate`, with small local judges; and what these judges are worth.

    python bench/evals_loop.py                       # the quickstart's task
    python bench/evals_loop.py --real                # and SmolLM2-135M-Instruct, beside the results that are there

The quickstart's loop (bench/loop_quickstart.py, iterative DPO, two iterations) is measured by its verifier, and by
AlpacaEval 2 (raw, and length-controlled in the minimal form) and the arena's form with four judges: a reward model
that was trained on the first iteration's pairs, the implicit reward of the policy after against the one before, the
verifier, and a coin. The real model's loop (bench/loop_real.py, DNO-Prct, two iterations) is measured in the same
way, the judge being SmolLM2-135M-Instruct itself, by the probabilities of the labels A and B, without and with the
task's criterion. What a judge is worth is its agreement with the verifier on the pairs (after, before): accuracy and
Cohen's kappa over those in which the verifier prefers one, for the order in which the answer after is shown first, for
the other, and for the mean of both.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import common  # noqa: E402
import loop_quickstart as quick  # noqa: E402
import loop_real as real  # noqa: E402
import torch  # noqa: E402

import fastpo  # noqa: E402
from fastpo import quickstart as qs  # noqa: E402
from fastpo.sampling.items import seed_of  # noqa: E402
from fastpo.sampling.parts import read_lines  # noqa: E402

ORDERS = {"after first": ("after", "before"), "before first": ("before", "after")}
CRITERION = f"The better answer keeps within {real.WORDS} words."


def coin(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    return float(seed_of("coin", prompt, response) % 1000)


def side(p: float | None) -> int:
    """1: the answer after is better, -1: the one before, 0: neither."""
    return 0 if p is None else (p > 0.5) - (p < 0.5)


def agreement(folder: Path, truth: Mapping[str, int]) -> dict[str, dict[str, float | None]]:
    """By order: accuracy and kappa of the judge's verdicts in a folder, `truth` being the verifier's side by prompt."""
    said: dict[str, dict[str, float]] = {}  # P(after is better) by order and prompt
    scores: dict[str, dict[str, float]] = {}
    for line in read_lines(folder / "verdicts.jsonl"):
        if line["value"] is None:
            continue
        if len(line["shown"]) == 1:
            scores.setdefault(line["id"], {})[line["shown"][0]] = line["value"]
        elif line["shown"][0] == "after":
            said.setdefault("after first", {})[line["id"]] = line["value"]
        else:
            said.setdefault("before first", {})[line["id"]] = 1 - line["value"]
    if scores:
        given = {key: 0.5 + 0.5 * ((of["after"] > of["before"]) - (of["after"] < of["before"]))
                 for key, of in scores.items() if len(of) == 2}  # fmt: skip
        said = {name: given for name in ORDERS}  # one at a time: there is no order
    first, second = (said[name] for name in ORDERS)
    said["both orders"] = {key: (first[key] + second[key]) / 2 for key in first if key in second}
    from sklearn.metrics import cohen_kappa_score

    out: dict[str, dict[str, float | None]] = {}
    for name, found in said.items():
        decided = [(truth[key], side(p)) for key, p in found.items() if truth[key]]
        kappa = cohen_kappa_score(*zip(*decided), labels=[-1, 0, 1]) if decided else float("nan")
        out[name] = {
            "pairs": len(found), "decided by the verifier": len(decided),
            "accuracy": sum((j == t) + 0.5 * (j == 0) for t, j in decided) / len(decided) if decided else None,
            "kappa": None if kappa != kappa else float(kappa),
        }  # fmt: skip
    return out


def measured(
    folder: Path, judges: Mapping[str, Any], options: Mapping[str, Any], score: Callable[..., float]
) -> dict[str, Any]:
    """The verifier's figures, and each judge's, of the `models` "before" and "after"; answers are drawn once."""
    base = fastpo.evaluate(
        "verifier", dict(options), baseline="before", judge=score, output_dir=str(folder / "verifier")
    )
    assert base is not None
    answers = folder / "verifier" / "answers.jsonl"
    there = {name: {"answers": str(answers), "model": name} for name in options["models"]}
    texts: dict[str, dict[str, str]] = {}
    for line in read_lines(answers):
        texts.setdefault(line["id"], {})[line["model"]] = line["text"]
    prompts = {row["id"]: row for row in options["prompts"]}
    truth = {}
    for key, own_texts in texts.items():
        after, before = (score(prompts[key]["prompt"], own_texts[name], {}) for name in ("after", "before"))
        truth[key] = (after > before) - (after < before)
    out: dict[str, Any] = {"verifier": {name: found for name, found in base.figures.items()}, "judges": {}}
    for name, judge in judges.items():
        start = time.perf_counter()
        of: dict[str, Any] = {}
        given = {
            "prompts": options["prompts"],
            "models": there,
            "baseline": "before",
            "judge": judge,
            "both_orders": True,
        }
        for measure in ("alpaca_eval", "arena"):
            # The policies by name are what the implicit reward is of.
            found = fastpo.evaluate(measure, given, output_dir=str(folder / name / measure))
            assert found is not None
            of[measure] = found.figures["after"] | {"verdicts": found.counts["verdicts"]}
        of["agreement"] = agreement(folder / name / "arena", truth)
        of["seconds"] = time.perf_counter() - start
        out["judges"][name] = of
        print(f"{name}: " + row(name, of), flush=True)
    return out


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Kept verdicts of earlier runs would make the seconds those of a cache."""
    before = os.environ.get("FASTPO_CACHE")
    os.environ["FASTPO_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop("FASTPO_CACHE")
        if before is not None:
            os.environ["FASTPO_CACHE"] = before


def of_quickstart(work: Path, heldout_count: int, seed: int) -> dict[str, Any]:
    asked, heldout = quick.supervised(work, seed)
    rows = [{"id": problem, "prompt": qs.prompt_of(problem)} for problem in asked]
    given = quick.recipes(quick.right, work / "start", work)["iterative_dpo"]
    functions = given.pop("scorers")
    result = fastpo.iterate(
        {"recipe": "iterative_dpo", "model": str(work / "start"), "prompts": rows, "output_dir": str(work / "run"),
         "seed": seed, "iterations": quick.ITERATIONS, **given},
        scorers=functions,
    )  # fmt: skip
    assert result is not None
    after = result.policies[f"iterate-{quick.ITERATIONS}"]
    fastpo.train(
        str(work / "start"), str(work / "run" / "iter-001" / "rows.jsonl"), loss_type="reward", seed=seed,
        output_dir=str(work / "reward"), max_steps=150, per_device_train_batch_size=64, learning_rate=1e-3,
        use_cpu=True, gradient_checkpointing=False, disable_tqdm=True, report=False, warmup_steps=10,
        pair_policy="explicit",
    )  # fmt: skip
    judges = {
        "reward model": {"kind": "reward_model", "model": str(work / "reward")},
        "implicit reward": {"kind": "implicit", "policy": after, "reference": str(work / "start")},
        "verifier": quick.right,
        "coin": coin,
    }
    options = {
        "prompts": [{"id": problem, "prompt": qs.prompt_of(problem)} for problem in heldout[:heldout_count]],
        "models": {"before": str(work / "start"), "after": after}, "seed": seed,
        "sample": {"temperature": 1.0, "max_tokens": qs.ANSWER_TOKENS, "batch_size": 512},
    }  # fmt: skip
    return measured(work / "eval", judges, options, quick.right)


def of_real(work: Path, model: str, data: Path, heldout_count: int, per_iteration: int) -> dict[str, Any]:
    iterations = 2
    found = real.prompts_of(data, heldout_count + iterations * per_iteration)
    heldout, asked = found[:heldout_count], found[heldout_count:]
    given = real.RECIPES["dno_prct"]
    result = fastpo.iterate(
        {"recipe": "dno_prct", "model": model, "prompts": asked, "output_dir": str(work / "run"), "replay": {},
         "iterations": iterations, "prompts_per_iteration": per_iteration, "train": real.TRAIN | given["train"],
         "sample": {"n": real.SAMPLES, "temperature": 1.0, "top_p": 1.0, "max_tokens": real.MAX_TOKENS,
                    "drop_truncated": False, "batch_size": 32}},
        scorers={"judge": given["scorers"]},
    )  # fmt: skip
    assert result is not None
    judge = {"kind": "judge", "path": model, "mode": "pair", "batch_size": 8}
    judges = {
        "SmolLM2, no criterion": judge, "SmolLM2, the criterion": {**judge, "criterion": CRITERION},
        "verifier": real.brevity,
    }  # fmt: skip
    options = {
        "prompts": heldout, "models": {"before": model, "after": result.policies[f"iterate-{iterations}"]},
        "sample": {"max_tokens": real.MAX_TOKENS, "batch_size": 32},
    }  # fmt: skip
    return measured(work / "eval", judges, options, real.brevity)


def pm(found: Mapping[str, Any], value: str = "value", interval: str = "interval") -> str:
    if found[interval] is None:
        return f"{found[value]:.1f}, no interval"
    low, high = found[interval]
    return f"{found[value]:.1f} ({low:.1f} - {high:.1f})"


def number(value: float | None, percent: bool = False) -> str:
    return "none" if value is None else f"{100 * value:.1f}%" if percent else f"{value:.2f}"


def row(name: str, of: Mapping[str, Any]) -> str:
    cells = [pm(of["alpaca_eval"], "win_rate", "raw_interval"), pm(of["alpaca_eval"]), pm(of["arena"])]
    for order in (*ORDERS, "both orders"):
        found = of["agreement"][order]
        cells.append(f"{number(found['accuracy'], True)}, {number(found['kappa'])}")
    orders = of["arena"]["verdicts"].get("orders")
    cells.append("-" if orders is None else number(orders["by_position"], True))
    return f"| {name} | {' | '.join(cells)} |"


def table(title: str, result: Mapping[str, Any]) -> list[str]:
    base = result["verifier"]
    shown = ", ".join(
        f"{name} {of['value']:.3f} ({of['interval'][0]:.3f} - {of['interval'][1]:.3f}), "
        f"{of['answers']['mean characters']:.1f} characters" for name, of in base.items()
    )  # fmt: skip
    notes = {name: note for name, of in result["judges"].items() if (note := of["alpaca_eval"].get("note"))}
    decided = next(iter(result["judges"].values()))["agreement"]["both orders"]
    return [
        f"**{title}**. The verifier's mean on {base['after']['prompts']:,} held-out prompts: {shown}. It prefers one "
        f"of the two answers in {decided['decided by the verifier']:,} of {decided['pairs']:,} pairs.", "",
        "| judge | AlpacaEval, raw % | length-controlled (minimal) % | arena % | accuracy, kappa: after shown first | "
        "before shown first | both orders | by place alone |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row(name, of) for name, of in result["judges"].items()), "",
        *(f"* Length-controlled, {name}: {note}." for name, note in notes.items()), *([""] if notes else []),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the real model's loop, in the place of the quickstart's")
    parser.add_argument("--model", default=str(common.ROOT / "runs" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--data", type=Path, default=common.ROOT.parent / "shared" / "data")
    parser.add_argument("--heldout", type=int, help="prompts [1,000; of the real model 48]")
    parser.add_argument("--prompts", type=int, default=16, help="of an iteration of the real model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="the runs' folder, which goes on where it stopped")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, own_cache(args.keep or Path(temporary)):
        folder = args.keep or Path(temporary)
        if args.real:
            found = of_real(folder, args.model, args.data, args.heldout or 48, args.prompts)
        else:
            torch.set_num_threads(1)
            found = of_quickstart(folder, args.heldout or 1000, args.seed)
    if args.keep is None:  # else some of it may have been there
        found["seconds"] = time.perf_counter() - start
    name = "real" if args.real else "quickstart"
    path = common.ROOT / "bench" / "results" / common.machine_name() / "evals_loop.json"
    parts = {} if not path.exists() else json.loads(path.read_text())["loops"]
    parts |= {name: found | {"environment": common.environment()}}
    titles = {
        "quickstart": "The quickstart's task, two iterations of DPO",
        "real": "SmolLM2-135M-Instruct, short answers, two iterations of DNO-Prct",
    }
    lines = [
        f"{common.machine_name()}: the policies before and after a loop by `fastpo evaluate`, with 95% intervals; what "
        "the judge is worth is its agreement with the verifier on the same pairs: accuracy and Cohen's kappa over "
        "those in which the verifier prefers one (a tie of the judge is half right). By place alone: pairs in which "
        "both orders name what was shown first, or both what was shown second. The arena counts a P near 0 or 1 as a "
        "clear verdict, three times, and a tie once.", "",
    ]  # fmt: skip
    for key, title in titles.items():
        if key in parts:
            lines += table(title, parts[key])
    lines += [f"* {key}: {parts[key]['seconds']:.0f} s in all." for key in titles if "seconds" in parts.get(key, {})]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if not args.no_write:
        print(f"written to {common.write_result('evals_loop', {'loops': parts}, text)}")


if __name__ == "__main__":
    main()

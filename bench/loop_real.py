"""Three iterations of `fastpo iterate` on a real model, SmolLM2-135M-Instruct, a verifier as judge: short answers.

    python bench/loop_real.py --recipe sppo dno_prct inpo iterative_dpo

Prompts are instructions of the shared data's AlpacaEval file of at most 100 characters; the judge is a function: 1 for
an answer that ends by itself within eight words, less for each further word, 0 from 24 on or where the policy did not
end. Each iteration has prompts of its own, the held-out ones are in none. The figure is the judge's mean over greedy
answers to them, beside the share of answers within eight words. LoRA-free, all weights trained, in the model's dtype
fp32; settings of a run of minutes, not the papers'.
"""

import argparse
import gzip
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import common  # noqa: E402

import fastpo  # noqa: E402
from fastpo.sampling.items import Unit, Verdict  # noqa: E402

WORDS, MAX_TOKENS, SAMPLES = 8, 40, 4
TRAIN: dict[str, Any] = {
    "use_cpu": True, "report": False, "disable_tqdm": True, "per_device_train_batch_size": 8, "num_train_epochs": 1,
    "learning_rate": 1e-5, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "warmup_steps": 0, "logging_steps": 1,
    "save_strategy": "no", "optim": "adamw_torch",
}  # fmt: skip


def brevity(prompt: Any, response: str, meta: Mapping[str, Any]) -> float:
    """1 within eight words, 0 from 24 on."""
    words = len(response.split())
    return max(0.0, min(1.0, 1 - (words - WORDS) / (24 - WORDS)))


def points(prompt: Any, response: str, meta: Mapping[str, Any]) -> float:
    """The same on DNO-Prct's scale of six."""
    return 6 * brevity(prompt, response, meta)


class Briefer:
    """P(first beats second): by the judge's difference."""

    name, unit, exact, cached = "judge", "pair", True, False
    key = {"pairs by": "brevity"}

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        for unit in units:
            a, b = (brevity(None, r.text, {}) for r in unit.responses)
            yield unit, Verdict(0.5 + 0.5 * (a - b))

    def close(self) -> None:
        pass


RECIPES: dict[str, dict[str, Any]] = {
    "iterative_dpo": {"scorers": brevity, "train": {"loss_type": "dpo", "beta": 0.1}},
    "sppo": {"scorers": Briefer(), "train": {"loss_type": "sppo", "beta": 0.05}},
    "dno_prct": {"scorers": points, "train": {"loss_type": "dno_prct", "beta": 0.1}},
    "inpo": {"scorers": Briefer(), "train": {"loss_type": "inpo", "loss_kwargs": {"eta": 0.05, "kappa": 1 / 3}}},
}


def prompts_of(folder: Path, count: int) -> list[dict[str, Any]]:
    with gzip.open(folder / "alpaca_eval_kway.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    short = [row["prompt"] for row in rows if len(row["prompt"]) <= 100 and "\n" not in row["prompt"]]
    return [{"id": f"p{k}", "prompt": [{"role": "user", "content": f"{text} Answer in at most {WORDS} words."}]}
            for k, text in enumerate(short[:count])]  # fmt: skip


def plot(path: Path, table: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The judge's mean on the held-out prompts by iteration, and the mean length of the answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, key, what in zip(figure.subplots(1, 2), ("score", "words"), ("judge's mean", "mean words")):
        for name, steps in table.items():
            axis.plot(range(len(steps)), [step[key] for step in steps], marker="o", label=name)
        axis.set(xlabel="iteration", ylabel=what, xticks=range(max(map(len, table.values()))))
        axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--model", default=str(common.ROOT / "runs" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--data", type=Path, default=common.ROOT.parent / "shared" / "data")
    parser.add_argument("--prompts", type=int, default=24, help="of an iteration")
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="the runs' folder, which goes on where it stopped")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    found = prompts_of(args.data, args.heldout + args.iterations * args.prompts)
    heldout, asked = found[: args.heldout], found[args.heldout :]
    table: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in args.recipe:
            given = RECIPES[name]
            folder = (args.keep or Path(work)) / name
            options = {
                "recipe": name, "model": args.model, "prompts": asked, "output_dir": str(folder), "replay": {},
                "iterations": args.iterations, "prompts_per_iteration": args.prompts,
                "sample": {"n": SAMPLES, "temperature": 1.0, "top_p": 1.0, "max_tokens": MAX_TOKENS,
                           "drop_truncated": False, "batch_size": 32},
                "train": TRAIN | given["train"], "eval": {"prompts": heldout, "max_tokens": MAX_TOKENS},
            }  # fmt: skip
            scorers = {"judge": given["scorers"]}
            result = fastpo.iterate(options, scorers=scorers)
            assert result is not None
            steps = []
            for t in range(args.iterations + 1):
                lines = (folder / f"iter-{t:03d}" / "eval" / "answers.jsonl").read_text().splitlines()
                answers = [json.loads(line) for line in lines]
                values = [brevity(None, a["text"], {}) for a in answers]
                words = [len(a["text"].split()) for a in answers]
                seconds = {} if t == 0 else result.iterations[t - 1]["seconds"]
                steps.append({
                    "score": statistics.fmean(values), "within": statistics.fmean(w <= WORDS for w in words),
                    "words": statistics.fmean(words), "ended": statistics.fmean(a["finished"] for a in answers),
                    "seconds": seconds, "answers": [a["text"] for a in answers[:4]],
                })  # fmt: skip
                print(
                    f"{name} {t}: "
                    + ", ".join(f"{k} {steps[-1][k]:.3f}" for k in ("score", "within", "words", "ended"))
                )
            table[name] = steps
    lines = [
        f"{common.machine_name()}: SmolLM2-135M-Instruct, {args.iterations} iterations of {args.prompts} prompts with "
        f"{SAMPLES} samples of at most {MAX_TOKENS} tokens; greedy answers to {args.heldout} held-out prompts.", "",
        "| recipe | | start | " + " | ".join(f"iteration {t}" for t in range(1, args.iterations + 1)) + " |",
        "| --- | --- |" + " ---: |" * (args.iterations + 1),
    ]  # fmt: skip
    notes: list[str] = []
    for name, steps in table.items():
        for key, what in (("score", "judge's mean"), ("within", f"within {WORDS} words"), ("words", "mean words")):
            lines.append(f"| {name} | {what} | " + " | ".join(f"{s[key]:.2f}" for s in steps) + " |")
        spent: dict[str, float] = {}
        for step in steps[1:]:
            for stage, seconds in step["seconds"].items():
                spent[stage] = spent.get(stage, 0.0) + seconds
        whole = sum(spent.values())
        rest = whole - sum(spent.get(stage, 0.0) for stage in ("sample", "score", "train", "eval"))
        shares = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in spent.items())
        share = f"{100 * rest / whole:.2f}%"
        notes.append(f"* {name}: {shares}; all but sampling, judging, training and evaluation: {share}.")
    text = "\n".join([*lines, "", *notes]) + "\n"
    print("\n" + text)
    if not args.no_write:
        report = {"environment": common.environment(), "arguments": {k: str(v) for k, v in vars(args).items()},
                  "recipes": table}  # fmt: skip
        path = common.write_result("loop_real", report, text)
        plot(path.with_suffix(".png"), table)
        print(f"written to {path}")


if __name__ == "__main__":
    main()

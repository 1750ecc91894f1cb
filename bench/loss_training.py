"""Every loss that trains, on the quickstart's model and pairs: where it starts, and that it falls.

    .venv/bin/python bench/loss_training.py [--steps 10] [--no-write]

The quickstart's model is supervised, its answers are sampled, judged and paired, as `fastpo quickstart` does; then each
loss takes the same steps from the same weights over the same pairs, all of them in every step. The start must be the
closed form of tests/training/test_loss_training.py, computed from the model's own logits in fp64.
"""

import argparse
import contextlib
import copy
import io
import math
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "tests" / "training")]  # PYTHONSAFEPATH leaves them out

import common  # noqa: E402
import test_loss_training as closed  # noqa: E402

import fastpo  # noqa: E402
from fastpo import quickstart  # noqa: E402

PAIRS = 64
TOLERANCE = 2e-5  # relative, of an fp32 loss at its start


class Task:
    """The quickstart after its second stage, with the interface of the tests' toy."""

    def __init__(self, folder: Path, seed: int):
        run = quickstart._Run(folder, "dpo", seed, quickstart.Size())
        self.base = quickstart.build_model(run.tokenizer, seed)
        with contextlib.redirect_stdout(io.StringIO()):
            run.supervise(self.base)
            pairs = run.pair(self.base)
        self.inner, self.pairs = run.tokenizer, pairs

    def rows(self, count: int, seed: int = 0) -> list[dict]:
        part = self.pairs[seed * count : (seed + 1) * count]
        return [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in part]

    def model(self):
        return copy.deepcopy(self.base)

    def tokenizer(self):
        return self.inner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    lines = ["| loss | closed form | first step | last step | accuracy, first | last |", "| --- |" + " ---: |" * 5]
    failed, records = [], {}
    with tempfile.TemporaryDirectory() as folder:
        task = Task(Path(folder), args.seed)
        rows = closed.rows_with_probabilities(task, PAIRS)
        values = closed.sums(task, rows)
        for name in closed.TRAINABLE:
            options = dict(
                output_dir=f"{folder}/{name}", loss_type=name, max_steps=args.steps, per_device_train_batch_size=PAIRS,
                learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1, use_cpu=True, bf16=False,
                disable_tqdm=True, report=False, save_final=False, guardrails=False, gradient_checkpointing=False,
            )  # fmt: skip
            result = fastpo.train(task.model(), rows, processing_class=task.tokenizer(), args=options)
            log = [line for line in result.log_history if "loss" in line]
            start = float(closed.START[name](values))
            accuracy = [line.get("rewards/accuracies", math.nan) for line in (log[0], log[-1])]
            records[name] = {"closed_form": start, "losses": [x["loss"] for x in log], "accuracy": accuracy}
            shown = ["" if math.isnan(a) else f"{a:.2f}" for a in accuracy]
            lines.append(
                f"| {name} | {start:.6g} | {log[0]['loss']:.6g} | {log[-1]['loss']:.6g} | {' | '.join(shown)} |"
            )
            print(lines[-1], flush=True)
            if abs(log[0]["loss"] - start) > TOLERANCE * max(1.0, abs(start)):
                failed.append(f"{name} starts at {log[0]['loss']}, not {start}")
            if not all(math.isfinite(x["loss"]) for x in log) or not log[-1]["loss"] < log[0]["loss"]:
                failed.append(f"{name}: {log[0]['loss']} to {log[-1]['loss']}")
    lines += ["", f"{args.steps} steps of AdamW at 1e-4 over the same {PAIRS} pairs of the quickstart; fastpo "
              f"{fastpo.__version__}, torch {common.environment()['torch']}, seed {args.seed}."]  # fmt: skip
    if not args.no_write:
        common.write_result(
            "loss_training", {"environment": common.environment(), "losses": records}, "\n".join(lines) + "\n"
        )
    print(*(failed or ["every loss starts at its closed form and falls"]), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

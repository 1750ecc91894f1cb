"""Seconds from the start of a process to the first step of `fastpo.train`: imports, checks, tokenising, reference pass.

    python bench/startup.py                              # the quickstart's model (random weights), 645 pairs, DPO
    python bench/startup.py --before ../other-checkout   # that checkout too, in turn

Every run is a process of its own that trains one step of 32 pairs on a CPU, with an empty FASTPO_CACHE and with the
bytecode of earlier runs; the first round warms the disk and is left out. `imports` is until `import fastpo.trainer`
has returned, `prepared` until on_train_begin, `first step` until on_step_begin; `cpu` is the process's time by then.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

MARKS = ("imports", "prepared", "first step", "cpu")
PAIRS = 645


def child(folder: str) -> None:
    """One run; prints its marks."""
    began = time.perf_counter()
    import transformers

    import fastpo.trainer

    marks = {"imports": time.perf_counter() - began}

    class Marks(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            marks["prepared"] = time.perf_counter() - began

        def on_step_begin(self, args, state, control, **kwargs):
            marks.setdefault("first step", time.perf_counter() - began)
            marks.setdefault("cpu", time.process_time())

    with tempfile.TemporaryDirectory() as out:
        fastpo.train(
            folder, f"{folder}/pairs.jsonl", callbacks=[Marks()], output_dir=out, use_cpu=True, max_steps=1,
            disable_tqdm=True, per_device_train_batch_size=32, report=False,
        )  # fmt: skip
    print(json.dumps(marks))


def make_inputs(folder: Path) -> None:
    from fastpo import quickstart

    tokenizer = quickstart.build_tokenizer()
    tokenizer.save_pretrained(folder)
    quickstart.build_model(tokenizer, 0).save_pretrained(folder)
    (problems,) = quickstart.draw_problems(random.Random(0), PAIRS)
    with open(folder / "pairs.jsonl", "w") as file:
        for problem in problems:
            wrong = "=odd" if quickstart.verdict(problem) == "even" else "=even"
            row = {
                "prompt": quickstart.prompt_of(problem), "chosen": quickstart.careful_answer(problem),
                "rejected": wrong,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="another checkout of fastpo, its extension built")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    import common

    trees = {"fastpo": common.ROOT} | ({"before": Path(args.before).resolve()} if args.before else {})
    seconds: dict[str, list[dict]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for turn in range(args.repeats + 1):
            for name, tree in trees.items():
                environment = {**os.environ, "PYTHONPATH": str(tree), "FASTPO_CACHE": f"{folder}/cache-{name}-{turn}"}
                environment.pop("PYTHONDONTWRITEBYTECODE", None)
                command = [sys.executable, str(Path(__file__)), "--child", folder]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                if turn:
                    seconds[name].append(json.loads(done.stdout.splitlines()[-1]))
                    print(name, seconds[name][-1], file=sys.stderr)
    medians = {n: {m: statistics.median(r[m] for r in runs) for m in MARKS} for n, runs in seconds.items()}
    lines = [
        "# From the start of a process to the first step", "",
        f"{common.machine_name()}; the quickstart's model with random weights, {PAIRS} pairs, DPO; medians of "
        f"{args.repeats} runs in turn, seconds.", "", f"| | {' | '.join(MARKS)} |", f"| --- |{' ---: |' * len(MARKS)}",
        *(f"| {n} | {' | '.join(f'{m[k]:.2f}' for k in MARKS)} |" for n, m in medians.items()),
    ]  # fmt: skip
    result = {"environment": common.environment(), "seconds": seconds, "medians": medians}
    print(f"written to {common.write_result('startup', result, chr(10).join(lines) + chr(10))}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main()

"""What the loop itself costs: 100,000 prompts with eight responses each, everything but sampling and judging.

    python bench/loop_bookkeeping.py                       # 100,000 x 8, responses of 100 tokens
    python bench/loop_bookkeeping.py --prompts 10000

A sampler and a scorer that answer at once stand in the places of the real ones: token ids and scores are drawn ahead.
Timed are the stages prompts, sample, score and select of one iteration, through the files, in a process of its own:
reading and cutting the prompts, their token ids, requests, lines, digests, verdicts, pairs, rows and counts. `peak` is
the largest resident size of the process. The run ends there; nothing is trained.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

K, TOKENS, WORDS = 8, 100, 5_000


class Ready:
    """Responses that are there already: of a pool of texts with their ids."""

    exact = True

    def __init__(self, pool: Sequence[tuple[str, tuple[int, ...]]]):
        self.pool, self.key = pool, {"engine": "ready"}

    def batches(self, requests: Sequence[Any]) -> list[list[Any]]:
        return [list(requests[k : k + 4096]) for k in range(0, len(requests), 4096)]

    def sample(self, requests: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        from fastpo.sampling.items import Response

        for request in requests:
            text, ids = self.pool[request.seed % len(self.pool)]
            yield request, Response(text, ids, True, -100.0)

    def close(self) -> None:
        pass


class Instant:
    """A score that costs nothing."""

    name, unit, exact, cached = "judge", "response", True, False
    key = {"judge": "instant"}

    def score(self, units: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        from fastpo.sampling.items import Verdict

        for unit in units:
            yield unit, Verdict(float(unit.responses[0].token_ids[0]))

    def close(self) -> None:
        pass


def worker(prompts: int, folder: Path) -> None:
    import common

    from fastpo.loop.config import build
    from fastpo.loop.context import Context
    from fastpo.loop.recipes import options_of
    from fastpo.loop.stages import Iteration
    from fastpo.loop.work import Work

    rng = random.Random(0)
    tokenizer = common.word_tokenizer(WORDS)
    tokenizer.save_pretrained(folder / "start")
    common.llama(WORDS, hidden=32, intermediate=32, layers=1, heads=2).save_pretrained(folder / "start")

    def words(size: int) -> tuple[str, tuple[int, ...]]:
        ids = tuple(rng.randrange(3, WORDS) for _ in range(size))
        return " ".join(f"w{i}" for i in ids), ids

    pool = [words(TOKENS) for _ in range(20_011)]
    with open(folder / "prompts.jsonl", "w") as file:
        for k in range(prompts):
            file.write(json.dumps({"id": f"p{k}", "prompt": words(40)[0] + f" w{3 + k % 1000}"}) + "\n")
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    options: dict[str, Any] = {
        **options_of("iterative_dpo"), "model": str(folder / "start"), "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / "run"), "iterations": 1, "sample": {"n": K}, "train": {"report": False},
    }  # fmt: skip
    work = Work(
        Context(build(options), sampler=lambda policy: Ready(pool), scorers={"judge": Instant()}, selector=None), 1
    )
    seconds: dict[str, float] = {"start": time.perf_counter() - start}
    iteration = Iteration(work.folder, lambda text: None)
    counts: Mapping[str, Any] = {}
    for stage in work.stages():
        if stage.name == "train":
            break
        before = time.perf_counter()
        counts = iteration.run(stage)["counts"]
        seconds[stage.name] = time.perf_counter() - before
    seconds["whole"] = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_mib": peak / 1024, "base_mib": base / 1024, "rows": counts["rows"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.prompts, args.worker)
        return
    import common

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder, "--prompts", str(args.prompts)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found = json.loads(done.stdout.splitlines()[-1])
    lines = [
        f"{common.machine_name()}: {args.prompts:,} prompts x {K} responses of {TOKENS} tokens, {found['rows']:,} "
        "rows, one process; nothing sampled or judged.", "", f"| | {' | '.join(found['seconds'])} | peak MiB |",
        "| --- |" + " ---: |" * (len(found["seconds"]) + 1),
        f"| seconds | {' | '.join(f'{s:.1f}' for s in found['seconds'].values())} | {found['peak_mib']:,.0f} |",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if not args.no_write:
        found["environment"] = common.environment()
        print(f"written to {common.write_result('loop_bookkeeping', found, text)}")


if __name__ == "__main__":
    main()

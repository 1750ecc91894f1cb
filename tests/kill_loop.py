"""A loop killed at random moments, started again, and compared with an unbroken one byte for byte.

    python tests/kill_loop.py --kills 30 --seed 0 [--json out.json]

Two iterations on the tests' toy model: samples of the local engine, a function of responses and one of pairs as the
judge, pairs, training with checkpoints, evaluation. Every process is forked from this one, which has everything
imported and nothing computed. The kills are spread over the stages: each waits until a stage that is drawn is under
way, and a little longer. Compared are all samples, verdicts, rows, evaluations and weights.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import fastpo  # noqa: E402
import fastpo.loop.run  # noqa: E402,F401  # before the fork
from conftest import Toy  # noqa: E402
from fastpo.loop.work import STAGES  # noqa: E402

SLOW = 0.004  # seconds a judgement takes, so that kills meet the judge too
COMPARED = (
    "samples/*.jsonl",
    "scores/*/part-*.jsonl",
    "rows.jsonl",
    "rows.json",
    "eval/*.jsonl",
    "train/*.safetensors",
)


def judge(prompt: str, response: str, meta: dict) -> float:
    """Anything that differs between texts."""
    time.sleep(SLOW)
    return float(sum(map(ord, response)) % 7)


def loop(start: Path, folder: Path, pairs: bool) -> None:
    """What is left of a run."""

    def better(prompt: str, first: str, second: str, meta: dict) -> float:
        a, b = judge(prompt, first, meta), judge(prompt, second, meta)
        return 0.5 + 0.5 * ((a > b) - (a < b))

    from fastpo.scoring.scorers import FunctionScorer

    scorer = FunctionScorer("judge", better, unit="pair", key={"judge": 1}) if pairs else judge
    fastpo.iterate(
        recipe="sppo" if pairs else "iterative_dpo", model=str(start), output_dir=str(folder / "run"), iterations=2,
        prompts=[{"prompt": row["prompt"]} for row in Toy.rows(24)], scorers={"judge": scorer},
        sample={"n": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 6, "drop_truncated": False, "batch_size": 9},
        eval={"prompts": [{"prompt": row["prompt"]} for row in Toy.rows(6, seed=9)]},
        train={"per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report": False,
               "gradient_checkpointing": False, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
               "optim": "adamw_torch"},
    )  # fmt: skip


def fork(start: Path, folder: Path, pairs: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(folder / "log.txt", "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["FASTPO_CACHE"] = str(folder / "cache")
        loop(start, folder, pairs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit status of a child that has ended."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return status if found else None


def contents(folder: Path) -> dict[str, str]:
    out = {}
    for pattern in COMPARED:
        for path in sorted((folder / "run").glob(f"iter-*/{pattern}")):
            out[str(path.relative_to(folder / "run"))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return out


def running(folder: Path) -> str | None:
    """The stage that is under way."""
    for path in sorted((folder / "run").glob("iter-*/stages/*.json"), reverse=True):
        try:
            if json.loads(path.read_text())["state"] == "running":
                return path.stem
        except (OSError, ValueError):
            continue
    return None


def until_end(start: Path, folder: Path, pairs: bool) -> None:
    pid = fork(start, folder, pairs)
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"a run failed:\n{(folder / 'log.txt').read_text()[-3000:]}")


def broken_run(start: Path, folder: Path, pairs: bool, kills: int, rng: random.Random) -> list[str]:
    """A run with so many kills; the stages in which they came."""
    hit: list[str] = []
    while len(hit) < kills:
        wanted = rng.choice([stage for stage in STAGES if stage not in ("prompts", "search")])
        pid = fork(start, folder, pairs)
        deadline = time.monotonic() + 60
        while ended_with := ended(pid) is None:
            now = running(folder)
            if now == wanted or time.monotonic() > deadline:
                time.sleep(rng.uniform(0.0, 0.15))
                break
            time.sleep(0.003)
        if not ended_with:  # it came to its end first: there is nothing left to kill
            break
        stage = running(folder) or "between stages"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        hit.append(stage)
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng, hits, different = random.Random(args.seed), [], []
    with tempfile.TemporaryDirectory() as work:
        start = Path(work) / "start"
        Toy.tokenizer().save_pretrained(start)
        Toy.model(hidden_size=64, intermediate_size=128).save_pretrained(start)
        wanted = {}
        for pairs in (False, True):
            folder = Path(work) / f"whole-{pairs}"
            folder.mkdir()
            until_end(start, folder, pairs)
            wanted[pairs] = contents(folder)
            assert len(wanted[pairs]) > 10, wanted[pairs]
        number = 0
        while len(hits) < args.kills:
            pairs, folder = bool(number % 2), Path(work) / f"broken-{number}"
            folder.mkdir()
            hit = broken_run(start, folder, pairs, min(5, args.kills - len(hits)), rng)
            until_end(start, folder, pairs)
            found = contents(folder)
            wrong = sorted(n for n in {*found, *wanted[pairs]} if found.get(n) != wanted[pairs].get(n))
            print(f"run {number}: killed in {', '.join(hit)}: {'equal' if not wrong else wrong}", flush=True)
            hits += hit
            different += [f"run {number}: {name}" for name in wrong]
            shutil.rmtree(folder)
            number += 1
    by_stage = {stage: hits.count(stage) for stage in sorted(set(hits))}
    files = f"{len(wanted[True])} or {len(wanted[False])} files each"
    print(f"{len(hits)} kills ({by_stage}), {files}, {len(different)} differ")
    if args.json:
        args.json.write_text(json.dumps({"kills": len(hits), "stages": by_stage, "different": different}) + "\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

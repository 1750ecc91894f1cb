"""Runs stopped by signals at random moments, resumed, and compared with an unbroken run bit for bit.

    python tests/kill_runs.py --kills 30 --seed 0 [--modes full lora 8bit ...] [--json out.json]
    python tests/kill_runs.py --signals 30 --seed 0 ...

`--kills`: SIGKILL. `--signals`: SIGINT and SIGTERM, half of them doubled, some within a save: a run of one process must
end by the signal, with its last finished step in a checkpoint that is whole.

Every run is a process of its own, forked from this one, which has everything imported and nothing computed: a start
costs a tenth of a second, so that thirty kills take a minute. A third of the kills wait for a save to be under way.
Compared are the final weights, every logged number that is not a time, and the counters.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402

import fastpo  # noqa: E402
import fastpo.trainer  # noqa: E402,F401  # before the fork
from conftest import Toy  # noqa: E402
from fastpo.checkpoints import checkpoint  # noqa: E402
from online_runs import by_ids, prompts  # noqa: E402

TIMES = ("runtime", "per_second", "peak_memory_gb")
LORA = dict(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# mode -> (options, ranks, adapter, dtype)
MODES: dict[str, tuple[dict, int, bool, torch.dtype]] = {
    "full": ({"eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 2}, 1, False, torch.float32),
    "bf16": ({"optim": "adamw_torch"}, 1, False, torch.bfloat16),
    "stochastic": ({"master_weights": "stochastic", "optim": "rmsprop"}, 1, False, torch.bfloat16),
    "lora": ({"disable_dropout": False}, 1, True, torch.float32),
    "8bit": ({"optim": "adamw_8bit"}, 1, False, torch.float32),
    "tr-dpo": ({"sync_ref_model": True, "ref_model_sync_steps": 3}, 1, False, torch.float32),
    "ddp": ({}, 2, False, torch.float32),
    "fsdp": ({"fsdp": "full_shard"}, 2, False, torch.float32),
    # Responses are drawn every fourth step, and every other checkpoint is inside such a generation.
    "grpo": (
        {
            "loss_type": "grpo",
            "steps_per_generation": 2,
            "num_iterations": 2,
            "beta": 0.05,
            "dynamic_sampling": 1,
            "use_adaptive_entropy": True,
            "entropy_target": 4.4,
            "num_generations": 4,
            "max_completion_length": 6,
            "per_device_train_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 5,
        },
        1,
        False,
        torch.float32,
    ),
    "grpo ddp": (
        {
            "loss_type": "grpo",
            "num_iterations": 3,
            "beta": 0.05,
            "num_generations": 4,
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
            "max_completion_length": 6,
        },
        2,
        False,
        torch.float32,
    ),
    "online dpo": (
        {"loss_type": "online_dpo", "num_iterations": 2, "num_generations": 4, "max_completion_length": 6},
        1,
        False,
        torch.float32,
    ),
}


def train(mode: str, folder: Path) -> None:
    """One run of a mode, or what is left of it; the final weights into `weights.pt`."""
    options, _, adapter, dtype = MODES[mode]
    rows, held_out, rest = Toy.rows(22), Toy.rows(5, seed=1), {}
    if "num_generations" in options:
        rows, held_out, rest = prompts(22), prompts(3, seed=1), {"reward_funcs": by_ids}
    if adapter:
        import peft

        rest["peft_config"] = peft.LoraConfig(**LORA)
    model = Toy.model(hidden_size=64, intermediate_size=128).to(dtype)
    args = dict(
        output_dir=str(folder / "run"), use_cpu=True, bf16=False, disable_tqdm=True, per_device_train_batch_size=4,
        max_steps=12, learning_rate=3e-3, save_steps=2, logging_steps=2, max_tokens=120, gradient_checkpointing=False,
        resume_from_checkpoint="auto", warmup_steps=2, report=False,
    )  # fmt: skip
    result = fastpo.train(
        model, rows, eval_dataset=held_out, processing_class=Toy.tokenizer(), args={**args, **options}, **rest,
    )  # fmt: skip
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in result.model.named_parameters()}
    if int(os.environ.get("RANK", 0)) == 0:
        logs = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in result.log_history]
        torch.save({"weights": {n: p.detach().clone() for n, p in whole.items()}, "logs": logs}, folder / "weights.pt")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork(ranks: int, folder: Path, work: Callable[[], None]) -> list[int]:
    """`work` in as many new processes, started as torchrun does; returns their ids. Output goes to log-N.txt."""
    port = free_port()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            with open(folder / f"log-{rank}.txt", "a") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            os.environ["FASTPO_CACHE"] = str(folder / "cache")
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def start(mode: str, folder: Path) -> list[int]:
    return fork(MODES[mode][1], folder, lambda: train(mode, folder))


def wait(pids: list[int], folder: Path) -> None:
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit(f"a run in {folder} failed:\n{(folder / 'log-0.txt').read_text()[-3000:]}")


def kill(pids: list[int], folder: Path, rng: random.Random, seconds: float, in_save: bool) -> str:
    """SIGKILL after a random time, or as a save is under way; says which, and what was there."""
    output = folder / "run"
    deadline = time.monotonic() + (rng.uniform(0.1, 0.9) * seconds)
    while time.monotonic() < deadline:
        if os.waitpid(pids[0], os.WNOHANG)[0]:
            return "ended before"
        time.sleep(0.001)
    while in_save and not any(output.glob(".saving-*")):
        if os.waitpid(pids[0], os.WNOHANG)[0]:
            return "ended before"
    if in_save:
        time.sleep(rng.uniform(0, 0.02))
    caught = any(output.glob(".saving-*"))
    for pid in rng.sample(pids, len(pids)):
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    return "in a save" if caught else "between"


def interrupt(pids: list[int], folder: Path, rng: random.Random, seconds: float, in_save: bool) -> tuple[str, str]:
    """SIGINT or SIGTERM, perhaps twice; (what was sent, what is wrong with how the run ended, if anything is)."""
    output = folder / "run"
    deadline = time.monotonic() + rng.uniform(0.1, 0.9) * seconds
    while time.monotonic() < deadline or (in_save and not any(output.glob(".saving-checkpoint-*"))):
        if os.waitpid(pids[0], os.WNOHANG)[0]:
            return "ended before", ""
        time.sleep(0.001)
    caught = "in a save" if any(output.glob(".saving-checkpoint-*")) else "between"
    numbers = [rng.choice((signal.SIGINT, signal.SIGTERM)) for _ in range(rng.choice((1, 2)))]
    begun = (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").stat().st_size > 0
    for i, number in enumerate(numbers):
        if i:
            time.sleep(rng.choice((0, 0.001, 0.01, 0.05)))
        for pid in rng.sample(pids, len(pids)):
            os.kill(pid, number)
    said = f"{'+'.join(n.name[3:] for n in numbers)} {caught}"
    for pid in pids:
        status = os.waitpid(pid, 0)[1]
        expected = {1} if numbers[0] == signal.SIGINT else {1, 143}
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in {0, *expected}:
            return said, f"exit status {os.WEXITSTATUS(status)}"
    if len(pids) > 1 or not begun:
        return said, ""
    found = checkpoint.checkpoints(output)
    wrong = next((f"{p.name}: {w}" for p in found if (w := checkpoint.damage(p)) is not None), "")
    if not wrong and any(output.glob(".saving-*")):
        wrong = f"left: {[p.name for p in output.glob('.saving-*')]}"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    reached = max((line["step"] for line in lines), default=0)
    if not wrong and reached > (checkpoint.step_of(found[-1]) if found else 0):
        wrong = f"step {reached} was finished, and the last checkpoint is {found[-1].name if found else 'none'}"
    return said, wrong


def same(a: Path, b: Path) -> tuple[bool, str]:
    x, y = (torch.load(p / "weights.pt", weights_only=True) for p in (a, b))
    differ = [n for n in x["weights"] if not torch.equal(x["weights"][n], y["weights"][n])]
    lines = [i for i, (u, v) in enumerate(zip(x["logs"], y["logs"], strict=False)) if u != v]
    ok = not differ and not lines and len(x["logs"]) == len(y["logs"])
    first = f"; {x['logs'][lines[0]]} != {y['logs'][lines[0]]}" if lines else ""
    return ok, "" if ok else f"weights differ: {differ[:2]}, log lines differ: {lines[:3]}{first}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signals", type=int, default=0, help="this many instead of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    rng = random.Random(args.seed)
    home = Path(tempfile.mkdtemp(prefix="fastpo-kills-"))
    records = []
    unbroken: dict[str, tuple[Path, float]] = {}
    for number in range(args.signals or args.kills):
        mode = args.modes[number % len(args.modes)]
        if mode not in unbroken:
            folder = home / f"{mode}-unbroken"
            folder.mkdir()
            began = time.monotonic()
            wait(start(mode, folder), folder)
            unbroken[mode] = (folder, time.monotonic() - began)
        whole, seconds = unbroken[mode]
        folder = home / f"{mode}-{number}"
        folder.mkdir()
        moments, wrongs = [], []
        for _ in range(rng.choice((1, 1, 2))):  # a run may be stopped again after it was resumed
            stop = interrupt if args.signals else kill
            moment = stop(start(mode, folder), folder, rng, seconds, in_save=number % 3 == 0)
            moments.append(moment if isinstance(moment, str) else moment[0])
            wrongs += [] if isinstance(moment, str) or not moment[1] else [moment[1]]
        steps = sorted(int(p.name.partition("-")[2]) for p in (folder / "run").glob("checkpoint-*"))
        wait(start(mode, folder), folder)
        ok, why = same(whole, folder)
        ok, why = ok and not wrongs, "; ".join([why, *wrongs]).strip("; ")
        records.append({"mode": mode, "killed": moments, "resumed_from": steps[-1] if steps else 0, "same": ok})
        outcome = "the same bits" if ok else f"DIFFERENT: {why}"
        start_step = steps[-1] if steps else 0
        print(f"{number + 1:3d} {mode:11s} stopped {', '.join(moments):24s} resumed at {start_step:2d}: {outcome}")
    good, saves = sum(r["same"] for r in records), sum(any("in a save" in k for k in r["killed"]) for r in records)
    print(f"{good} of {len(records)} stopped runs ended with the unbroken run's bits; {saves} were stopped in a save")
    if args.json:
        about = {"seed": args.seed, "torch": torch.__version__, "fastpo": fastpo.__version__, "records": records}
        args.json.write_text(json.dumps(about, indent=1) + "\n")
    if good == len(records):
        shutil.rmtree(home)
    else:
        print(f"kept: {home}")
    return int(good != len(records))


if __name__ == "__main__":
    sys.exit(main())

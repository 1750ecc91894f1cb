"""A fixed set of small runs, and whether two checkouts train them alike, bit for bit.

    python tests/fixed_runs.py before.json                   # with the fastpo that is on sys.path
    python tests/fixed_runs.py after.json --against before.json

For changes that must not move a number. Only public names are used, so that an older fastpo runs the same file:
PYTHONPATH=OTHER_CHECKOUT PYTHONSAFEPATH=1 python tests/fixed_runs.py before.json. Compare on one machine only.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

OPTIONS: dict[str, Any] = dict(
    use_cpu=True, bf16=False, disable_tqdm=True, max_steps=6, learning_rate=0.01, logging_steps=1, max_tokens=90,
    per_device_train_batch_size=4, gradient_checkpointing=False, report=False, eval_strategy="steps", eval_steps=3,
    save_strategy="no", save_final=False, dataloader_drop_last=False,
)  # fmt: skip
# name -> (options, what else: lora, kway, prev, ref, words of a chat, ranks, resume)
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "dpo": ({}, set()),
    "simpo": ({"loss_type": "simpo"}, set()),
    "ipo": ({"loss_type": "ipo"}, set()),
    "sppo": ({"loss_type": "sppo_hard"}, set()),
    "inpo": ({"loss_type": "inpo"}, {"prev"}),
    "kto": ({"loss_type": "kto"}, set()),
    "bco": ({"loss_type": "bco_pair"}, set()),
    "aot": ({"loss_type": "aot"}, set()),
    "orpo and sft": ({"loss_type": ["orpo", "sft"]}, set()),
    "wpo, sampo, ld_dpo": ({"loss_type": ["wpo", "sampo", "ld_dpo"]}, set()),
    "tdpo": ({"loss_type": "tdpo2"}, set()),
    "K responses": ({"pair_policy": "all"}, {"kway"}),
    "lists": ({"loss_type": ["exo_rw", "dpo"]}, {"kway"}),
    "lora": ({}, {"lora"}),
    "ref_model": ({}, {"ref"}),
    "moving reference": ({"sync_ref_model": True, "ref_model_sync_steps": 2}, set()),
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, set()),
    "shared prompts": ({"share_prompts": "always"}, set()),
    "bf16": ({"bf16": True}, set()),
    "dropout": ({"disable_dropout": False, "loss_type": "simpo"}, {"dropout"}),
    "several losses": ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.7, 0.3]}, set()),
    "checkpointing": ({"gradient_checkpointing": True}, set()),
    "two ranks": ({"per_device_train_batch_size": 2}, {"ranks"}),
    "fsdp": ({"per_device_train_batch_size": 2, "fsdp": "full_shard"}, {"ranks"}),
    "resume": ({"save_strategy": "steps", "save_steps": 3}, {"resume"}),
}
TIMES = ("runtime", "per_second", "second", "time", "memory_gb", "mfu", "seconds", "flops")


def run(name: str) -> dict[str, Any]:
    """The log lines of one run, without times, and a hash of its weights."""
    import logging

    import torch

    import fastpo
    from conftest import Toy

    logging.getLogger("fastpo").setLevel(logging.ERROR)
    options, kinds = CASES[name]
    rest: dict[str, Any] = {}
    if "lora" in kinds:
        import peft

        torch.manual_seed(3)
        rest["peft_config"] = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
        )
    for role, argument in (("prev", "prev_model"), ("ref", "ref_model")):
        if role in kinds:
            rest[argument] = Toy.model(1)
    rows = Toy.kway_rows if "kway" in kinds else Toy.rows
    changes = {"attention_dropout": 0.1} if "dropout" in kinds else {}

    def train(folder: str, **more: Any) -> Any:
        args = {**OPTIONS, **options, "output_dir": folder, **more}
        return fastpo.train(
            Toy.model(**changes), rows(21), processing_class=Toy.tokenizer(), args=args, eval_dataset=rows(5, seed=1),
            **rest,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        out = os.environ.get("FIXED_RUNS_FOLDER", folder)
        if "resume" in kinds:
            train(out)
            result = train(out, resume_from_checkpoint=str(Path(out) / "checkpoint-3"))
        else:
            result = train(out)
    digest = hashlib.sha256()
    for parameter in result.model.parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        digest.update(whole.detach().float().numpy().tobytes())
    logs = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in result.log_history]
    return {"logs": logs, "weights": digest.hexdigest()}


def run_on_two_ranks(name: str) -> dict[str, Any]:
    """The same under torchrun, as rank 0 sees it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank0.json"
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(out)]
        env = {**os.environ, "FIXED_RUNS_FOLDER": str(Path(folder) / "run")}
        done = subprocess.run(
            [sys.executable, *command, "--case", name], env=env, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        return json.loads(out.read_text())


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """How many runs differ, or are in one of the two only; the first difference of each is printed."""
    wrong = 0
    for result in (*before.values(), *after.values()):  # whichever version of this file wrote them
        result["logs"] = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in result["logs"]]
    for name in sorted({*before, *after}):
        a, b = before.get(name), after.get(name)
        if a == b:
            print(f"equal     {name}: {len(a['logs'])} lines, weights {a['weights'][:12]}")
            continue
        wrong += 1
        lines = [(x, y) for x, y in zip((a or b)["logs"], (b or a)["logs"], strict=False) if x != y]
        found = [(k, x.get(k), y.get(k)) for x, y in lines[:1] for k in {**x, **y} if x.get(k) != y.get(k)]
        print(f"DIFFERENT {name}: {found or 'weights, or the number of lines'}")
    print(f"{len(after) - wrong} of {len(after)} runs equal, bit for bit")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file of the results")
    parser.add_argument("--against", type=Path, help="results to compare with; exit code 1 where they differ")
    parser.add_argument("--case", choices=CASES, help="one run only, within torchrun too")
    args = parser.parse_args()
    if args.case:
        result = run(args.case)
        if int(os.environ.get("RANK", 0)) == 0:
            args.out.write_text(json.dumps(result))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FASTPO_CACHE"] = cache
        results = {n: run_on_two_ranks(n) if "ranks" in kinds else run(n) for n, (_, kinds) in CASES.items()}
    args.out.write_text(json.dumps(results))
    return compare(json.loads(args.against.read_text()), json.loads(json.dumps(results))) if args.against else 0


if __name__ == "__main__":
    sys.exit(min(1, main()))

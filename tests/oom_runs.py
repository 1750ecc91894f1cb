"""Runs that are out of memory in processes of their own: what training/test_oom.py compares.

python tests/oom_runs.py folder

`free` and `tight`: without a limit, and under RLIMIT_AS, 64 MiB beside what the process has at the first step; `one`,
`ddp` and `fsdp`: one process, two replicas and two shards, of which one fails.
"""

import json
import os
import random
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import fastpo  # noqa: E402
from conftest import Toy  # noqa: E402
from kill_runs import fork  # noqa: E402

OPTIONS = dict(disable_tqdm=True, use_cpu=True, bf16=False, max_steps=3, optim="sgd", learning_rate=1e-2,
               lr_scheduler_type="constant", gradient_checkpointing=False, report=False, logging_steps=1)  # fmt: skip


class Limit(TrainerCallback):
    """The address space may grow by so many bytes once training begins."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes

    def on_train_begin(self, args, state, control, **kwargs):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + self.nbytes, used + self.nbytes))


def limited(mib: int, folder: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": Toy.text(rng, 60, 80), **{k: " " + Toy.text(rng, 40, 60) for k in ("chosen", "rejected")}}
            for _ in range(16)]  # fmt: skip
    result = fastpo.train(
        Toy.model(hidden_size=128, intermediate_size=512, num_hidden_layers=4), rows, processing_class=Toy.tokenizer(),
        callbacks=[Limit(mib << 20)] if mib else [],
        args={**OPTIONS, "output_dir": str(folder), "per_device_train_batch_size": 16, "max_tokens": 4096,
              "max_steps": 2},
    )  # fmt: skip
    (folder / "warnings.json").write_text(json.dumps([w.message for w in result.warnings if w.name == "out_of_memory"]))


def rank(out: Path, **options) -> None:
    """In a forked process: train; the last of several ranks cannot hold more than 60 tokens."""
    model = Toy.model()
    failed = []

    def look(module, inputs, hidden):
        if hidden.shape[1] > 60 and int(os.environ.get("RANK", 0)) == 1 and torch.is_grad_enabled():
            failed.append(hidden.shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.layers[0].mlp.register_forward_hook(look)
    args = {
        **OPTIONS,
        "output_dir": str(out.parent / f"{out.stem}-run"),
        "max_tokens": 400,
        "loss_type": "bco",
        **options,
    }
    result = fastpo.train(model, Toy.rows(20), processing_class=Toy.tokenizer(), args=args)
    weights = torch.cat([p.detach().flatten() for p in result.model.parameters()])
    torch.save((weights, failed), f"{out}-{os.environ.get('RANK', 0)}.pt")


def main(folder: Path) -> None:
    def ranks(name: str, **options):
        return lambda: rank(folder / name / "out", **options)

    runs = {
        "free": (1, lambda: limited(0, folder / "free")),
        "tight": (1, lambda: limited(64, folder / "tight")),
        "one": (1, ranks("one", per_device_train_batch_size=10)),
        "ddp": (2, ranks("ddp", per_device_train_batch_size=5)),
        "fsdp": (2, ranks("fsdp", per_device_train_batch_size=5, fsdp="full_shard")),
    }
    codes = {}
    for name, (count, work) in runs.items():
        (folder / name).mkdir()
        pids = fork(count, folder / name, work)
        codes[name] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Checkpoints damaged at random, with and without right hashes: each is resumed with the same bits, refused with one
line, or passed over by `auto`; never another exception, and nothing that lies in a checkpoint is run.

    python tests/damage_runs.py --count 500 --seed 0 [--json out.json]
"""

import argparse
import json
import logging
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fastpo  # noqa: E402
from conftest import Toy  # noqa: E402
from fastpo.checkpoints import (
    checkpoint,  # noqa: E402
    state_files,  # noqa: E402
)
from fastpo.errors import FastpoError  # noqa: E402

STEPS, EVERY = 4, 2
VALUES = (None, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 300, "../../x", [], {}, [[]], True, {"step": "1"})


def train(folder: Path, resume: object = None) -> torch.Tensor:
    """One run; the final weights."""
    result = fastpo.train(
        Toy.model(), Toy.rows(12), processing_class=Toy.tokenizer(), output_dir=str(folder), use_cpu=True, bf16=False,
        disable_tqdm=True, per_device_train_batch_size=4, max_steps=STEPS, learning_rate=3e-3, save_steps=EVERY,
        logging_steps=1, gradient_checkpointing=False, resume_from_checkpoint=resume, report=False, guardrails=False,
        save_final=False,
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in result.model.parameters()]).clone()


class Foreign:
    """Pickled, it would make a folder when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class Damage:
    """One random damage to the checkpoint in `folder`; `sealed`: whether sizes and hashes are set right afterwards."""

    def __init__(self, rng: random.Random, mark: Path):
        self.rng, self.mark = rng, mark

    def __call__(self, folder: Path, other: Path) -> str:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        path = self.rng.choice(files)
        kind = self.rng.choice((self.truncate, self.flip, self.delete, self.swap, self.edit, self.edit, self.numbers,
                                self.pickled, self.empty, self.folder, self.tensors))  # fmt: skip
        what = kind(path, folder, other)
        sealed = self.rng.random() < 0.6
        if sealed and folder.is_dir():
            written = folder.with_name("written")
            os.rename(folder, written)
            if (written / checkpoint.MANIFEST).is_dir():
                (written / checkpoint.MANIFEST).rmdir()
            checkpoint.seal(written, folder)
        return f"{kind.__name__} {what}{' sealed' if sealed else ''}"

    def truncate(self, path, folder, other):
        data = path.read_bytes()
        path.write_bytes(data[: self.rng.randrange(len(data) + 1)])
        return path.name

    def flip(self, path, folder, other):
        data = bytearray(path.read_bytes() or b"x")
        for _ in range(self.rng.choice((1, 1, 20))):
            at = self.rng.randrange(min(len(data), self.rng.choice((64, 2000, 10**9))))
            data[at] ^= 1 << self.rng.randrange(8)
        path.write_bytes(data)
        return path.name

    def delete(self, path, folder, other):
        path.unlink()
        return path.name

    def empty(self, path, folder, other):
        path.write_bytes(b"")
        return path.name

    def swap(self, path, folder, other):
        """With the same file of another step, or with another file."""
        source = self.rng.choice([other / path.relative_to(folder), *(p for p in folder.rglob("*") if p.is_file())])
        if source.exists():
            shutil.copyfile(source, folder / "swapped")
            os.replace(folder / "swapped", path)
        return f"{path.name} for {source.name}"

    def folder(self, path, folder, other):
        path.unlink()
        path.mkdir()
        return path.name

    def edit(self, path, folder, other):
        """One value of a JSON file, anywhere in it."""
        path = self.rng.choice([p for p in folder.glob("*.json") if p.stat().st_size])
        node = root = json.loads(path.read_text())
        where = []
        while isinstance(node, dict | list) and node:
            key = self.rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            where.append(key)
            if not isinstance(node[key], dict | list) or not node[key] or self.rng.random() < 0.3:
                if self.rng.random() < 0.3:
                    del node[key]
                else:
                    node[key] = self.rng.choice(VALUES)
                break
            node = node[key]
        path.write_text(json.dumps(root))
        return f"{path.name} {where}"

    def _state(self, folder):
        path = next(iter(folder.glob(f"state/{state_files.PATTERN}")))
        return path, {name: t.clone() for name, t in load_file(path).items()}

    def numbers(self, path, folder, other):
        path, tensors = self._state(folder)
        name = self.rng.choice([n for n in tensors if tensors[n].is_floating_point()])
        tensors[name].view(-1)[self.rng.randrange(tensors[name].numel())] = self.rng.choice(
            (float("nan"), float("inf"))
        )
        state_files.write_tensors(path, tensors)
        return name

    def tensors(self, path, folder, other):
        """A tensor that is gone, of another shape, another dtype, or under another name."""
        path, tensors = self._state(folder)
        name = self.rng.choice(list(tensors))
        how = self.rng.choice(("gone", "shape", "dtype", "name", "header"))
        if how == "header":
            text = json.dumps({name: [self.rng.choice(VALUES), self.rng.choice(VALUES), self.rng.choice(VALUES)]})
            state_files.write_tensors(path, tensors, {"parts": self.rng.choice((text, "{", "[]"))})
            return f"{how} {name}"
        t = tensors.pop(name)
        if how == "shape":
            tensors[name] = torch.zeros(*t.shape, 2)
        elif how == "dtype":
            tensors[name] = t.to(torch.int32)
        elif how == "name":
            tensors[self.rng.choice(("weights.x", "optimizer.exp_avg.x", "x", "optimizer", name + "."))] = t
        state_files.write_tensors(path, tensors)
        return f"{how} {name}"

    def pickled(self, path, folder, other):
        name = self.rng.choice(("trainer.pt", "rng-0.pt", "state/.metadata", "optimizer.pt", "pytorch_model.bin",
                                "training_args.bin", "scheduler.pt", path.relative_to(folder)))  # fmt: skip
        if self.rng.random() < 0.5:
            with open(folder / name, "wb") as f:
                torch.save({"optimizer": Foreign(self.mark)}, f)
        else:
            (folder / name).write_bytes(pickle.dumps(Foreign(self.mark)))
        return str(name)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.getLogger("fastpo").addHandler(logging.NullHandler())
    logging.disable(logging.WARNING)
    home = Path(tempfile.mkdtemp(prefix="fastpo-damage-"))
    os.environ["FASTPO_CACHE"] = str(home / "cache")
    whole = train(home / "whole")
    rng, mark = random.Random(args.seed), home / "mark"
    outcomes: Counter[str] = Counter()
    bad = []
    began = time.monotonic()
    for number in range(args.count):
        run = home / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(home / "whole", run)
        newest = run / f"checkpoint-{STEPS}"
        if rng.random() < 0.6:  # the only one, from which there are steps to go
            shutil.rmtree(newest)
            newest, other = run / f"checkpoint-{EVERY}", home / "whole" / f"checkpoint-{STEPS}"
        else:
            other = run / f"checkpoint-{EVERY}"
        what = Damage(rng, mark)(newest, other)
        request = rng.choice((True, "auto", str(newest)))
        try:
            outcome = "the same bits" if torch.equal(train(run, request), whole) else "other bits"
        except FastpoError as error:
            outcome = "refused" if "\n" not in str(error) and len(str(error)) < 1500 else f"more than a line: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:100]}"
            last = "".join(traceback.format_exception(error)[-3:])
            print(f"{number}: {what}, resume={request}: {outcome}\n{last}", flush=True)
        if mark.exists():
            outcome, _ = "RAN FOREIGN CODE", mark.rmdir()
        # Content that somebody has changed, hashes and all, may be another run's: other bits are then no fault.
        fine = outcome in ("the same bits", "refused") or (outcome == "other bits" and "sealed" in what)
        outcomes[outcome if fine else f"WRONG: {outcome.partition(':')[0]}"] += 1
        if not fine:
            bad.append({"number": number, "damage": what, "resume": str(request), "outcome": outcome})
            print(f"{number}: {what}, resume={request}: {outcome}", flush=True)
    seconds = time.monotonic() - began
    print(f"{args.count} damaged checkpoints, seed {args.seed}, {seconds:.0f} s: {dict(outcomes.most_common())}")
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "outcomes": outcomes, "bad": bad}, indent=1) + "\n")
    shutil.rmtree(home)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

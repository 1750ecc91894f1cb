"""Random options, right and wrong: every case ends trained, or with one line that a user can read.

    python tests/fuzz_options.py --seed 0 --count 1000

A case sets some options, drawn from fastpo's own, TRL's, other spellings and the arguments of `fastpo.train`, to values
of right and wrong kinds, or right ones alone, and goes three ways: `TrainConfig.build`, a whole `fastpo.train` of at
most two steps on a tiny Llama, and the command line. Anything else than training or a FastpoError of one line is a
failure: another exception, a message of several lines, a case that takes longer than LIMIT. A case depends on its seed
alone, which is printed with the failure. The cases run in a process of their own, so that one that hangs or dies counts.
"""

# ruff: noqa: E501  # tables of values
import argparse
import collections
import contextlib
import io
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

LIMIT = 60.0  # seconds of a case, on a machine that does other things too; most take one
START = 600.0  # seconds in which a process has imported PyTorch
MEMORY = 12 << 30  # bytes that a case may map: a list as long as a huge option is a MemoryError, not a dead machine

NUMBERS = (
    0, 1, 2, 3, 7, 64, 1000, -1, -2, -(10**6), 10**6, 2**31, 2**63, -(2**63), 2**64, 10**12, 10**30, 10**400, 0.0, -0.0,
    0.1, 0.5, 0.9, 1.0, 1.5, 2.5, 1e-6, 1e-300, 5e-324, 1e30, 1e308, -1e308, -0.5, float("nan"), float("inf"),
    -float("inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "no", "none", "None", "null", "true", "false", "True", "yes", "auto", "all", "steps", "epoch", "1e-5", "nan",
    "inf", "-inf", "1e400", "0x10", "1_000", "１２", "10", "-3", "0.5", "dpo", "sigmoid", "simpo", "sft", "ipo", "kto",
    "cosine", "polynomial", "constant", "adamw_torch", "sgd", "muon", "rmsprop", "adamw_8bit", "lr=1", "momentum=nan",
    "momentum=0.9", "bfloat16", "float8", "cpu", "cuda", "cuda:99", "meta", "mps", "full_shard", "gloo", "mpi", "wandb",
    "tensorboard", "loss", "eval_loss", "rewards/margins", "always", "never", "sequential", "drop", "margin", "explicit",
    "fp32", "stochastic", "inductor", "eager", "5GB", "1", "a/b", "../x", "/", "/dev/null", "/proc/x/y", "~/x", "a\nb",
    "a\x00b", "x" * 5000, "{", "{}", '{"a": 1}', "[", "[1, 2]", "ä€😀", "\ud800", "%s %d", "{0}", "hf_abc", "checkpoint-1",
)  # fmt: skip
KEYS = ("a", "r", "lr", "beta", "use_reentrant", "num_cycles", "power", "min_lr", "lr_end", "max_new_tokens", "do_sample",
        "temperature", "top_k", "num_beams", "preserve_rng_state", "revision", "attn_implementation", "torch_dtype",
        "dtype", "device_map", "target_modules", "task_type", "lora_alpha", "load_in_4bit", "alpha", "gamma", "rope",
        "cpo_alpha", "nll_reduction", "", 3, None)  # fmt: skip


class Strange:
    """A value that no option takes."""

    def __repr__(self) -> str:
        return "Strange()\nwith two lines"


def scalar(rng: random.Random):
    import numpy as np
    import torch

    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice(TEXTS)
    if kind == 7:
        return rng.choice((None, True, False))
    return rng.choice(
        (np.float32(0.5), np.float64("nan"), np.int64(3), np.int64(-5), np.bool_(True), np.float32("inf"), np.array(2),
         np.array([1.0, 2.0]), np.str_("cosine"), torch.tensor(2), torch.tensor([1.0]), torch.bfloat16, torch.float32,
         torch.device("cpu"), Path("somewhere"), Path("/proc/x"), b"bytes", 1 + 2j, print, Strange(), Strange, object(),
         range(3), frozenset({1}), slice(2))
    )  # fmt: skip


def value(rng: random.Random):
    kind = rng.randrange(12)
    if kind < 8:
        return scalar(rng)
    if kind < 10:
        items = [scalar(rng) for _ in range(rng.randrange(4))]
        return rng.choice((list, tuple))(items)
    return {rng.choice(KEYS): scalar(rng) for _ in range(rng.randrange(3))}


def fitting(rng: random.Random, field):
    """A value of the field's own kind, often at an edge of what makes sense."""
    choices = field.metadata["choices"]
    if choices and rng.random() < 0.9:
        return rng.choice(choices)
    text = str(field.type)
    if "bool" in text and rng.random() < 0.8:
        return rng.random() < 0.5
    if "int" in text or "float" in text:
        return rng.choice(NUMBERS)
    if "dict" in text:
        return {rng.choice(KEYS): rng.choice(NUMBERS + TEXTS)}
    if "list" in text and rng.random() < 0.5:
        return [rng.choice(TEXTS) for _ in range(rng.randrange(1, 3))]
    return rng.choice(TEXTS)


def sound(rng: random.Random, field):
    """A value that some run takes."""
    own = {"learning_rate": (1e-4, 1.0), "optim": ("sgd", "adamw_torch", "rmsprop", "muon"), "report_to": ("none", []),
           "lr_scheduler_kwargs": (None, {}), "optim_args": (None, ""), "model_init_kwargs": (None, {}), "device": (None, "cpu"),
           "loss_type": ("dpo", "ipo", "simpo", "sft", ["dpo", "sft"], "orpo", "cpo", "aot", "sppo_hard", "discopop"),
           "output_dir": ("a/b", "ä 😀", Path("c")), "generation_kwargs": (None, {"max_new_tokens": 2}, {"do_sample": True}),
           "torch_compile_backend": (None,), "torch_compile_mode": (None,), "torch_compile": (False,),
           "gradient_checkpointing_kwargs": (None, {"use_reentrant": True}, {"preserve_rng_state": False}),
           "resume_from_checkpoint": (None, "auto", False), "push_to_hub": (False,), "fsdp": ("no",), "max_shard_size": ("1MB",),
           "max_tokens": (None, 64, "auto", 1), "warmup_ratio": (None, 0.1), "loss_kwargs": (None, {}),
           "metric_for_best_model": (None, "loss", "rewards/margins"), "dtype": (None,), "save_total_limit": (None, 1)}  # fmt: skip
    if field.name in own:
        return rng.choice(own[field.name])
    choices, text = field.metadata["choices"], str(field.type)
    if choices:
        return rng.choice(choices)
    if "bool" in text:
        return rng.random() < 0.5
    if "int" in text:
        return rng.choice((1, 2, 3, "2", 1000))
    if "float" in text:
        return rng.choice((0.1, 0.5, 1, 2, "0.3"))
    return rng.choice((None,) if "None" in text else (field.default,))


def input_value(rng: random.Random, name: str):
    """For one of fastpo.train's own arguments; names of what the worker builds stand for it."""
    special = {
        "peft_config": (
            {"r": 4},
            {"r": -1},
            {"r": 4, "bogus": 1},
            {"target_modules": ["nowhere"]},
            {"r": "x"},
            {"r": 4, "target_modules": "all-linear"},
            {"lora_alpha": float("nan")},
            {"lora_dropout": 2.0},
            {"task_type": "SEQ_CLS"},
            {"peft_type": "IA3"},
            {"peft_type": "NO"},
            {"init_lora_weights": "x"},
        ),
        "quantization_config": ({"load_in_4bit": True}, {"bogus": 1}, {"load_in_4bit": "x"}, {}),
        "processing_class": ("", "nowhere", "./nowhere", Path("nowhere"), 3, [], {}, object(), len),
        "callbacks": ([], ["x"], "x", 3, [None], [object()], [int], {}, ({},)),
        "optimizers": ((), (1,), (1, 2), None, "adamw", 3, (None, 3), {}, (None, None, None), (object(), None)),
        "eval_dataset": ({}, [], "", "nowhere", "./nowhere.jsonl", {"a": []}, {"a": "nowhere"}, {3: None}, 5, ["x"]),
        "ref_model": ("", "nowhere", "./nowhere", Path("/nowhere/at/all"), 3, {}, object()),
        "prev_model": ("", "nowhere", "./nowhere", 3, object()),
        "args": (3, [], (), "nowhere.yaml", {}, {"beta": "x"}, object, {"": 1}, {3: 4}),
    }[name]
    return rng.choice(special) if rng.random() < 0.8 else value(rng)


INPUTS = ("peft_config", "quantization_config", "processing_class", "callbacks", "optimizers", "eval_dataset", "ref_model",
          "prev_model", "args")  # fmt: skip


def make_case(seed: int) -> tuple[dict, dict]:
    """(options, inputs) of a case."""
    import dataclasses

    from fastpo.config import options
    from fastpo.config.train_config import TrainConfig

    rng = random.Random(seed)
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    foreign = [n for n in [*options.OPTIONS, *options.EARLIER, *options.CPO, *options.SCRIPT] if n not in fields]
    chosen, inputs = {}, {}
    if rng.random() < 0.4:  # right values alone: what goes together, and what only seems to
        for name in rng.sample(list(fields), rng.randrange(1, 9)):
            chosen[name] = sound(rng, fields[name])
        if rng.random() < 0.3:
            inputs["peft_config"] = {"r": 2}
        return chosen, inputs
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        draw = rng.random()
        if draw < 0.72:
            name = rng.choice(list(fields))
            chosen[name] = fitting(rng, fields[name]) if rng.random() < 0.6 else value(rng)
        elif draw < 0.84:
            chosen[rng.choice(foreign)] = value(rng)
        elif draw < 0.88:
            name = rng.choice(list(fields))
            at = rng.randrange(len(name))
            chosen[name[:at] + name[at + 1 :] or "x"] = value(rng)
        else:
            name = rng.choice(INPUTS)
            inputs[name] = input_value(rng, name)
    return chosen, inputs


# ---- the three ways


class Stage:
    """What all cases share: a tiny model, its tokenizer, rows, and a folder that is emptied between them."""

    def __init__(self):
        import logging

        import torch
        from transformers import TrainerCallback

        sys.path.insert(0, str(Path(__file__).parent))
        from conftest import Toy

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop |= state.global_step >= 2

        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        self.model, self.tokenizer, self.rows, self.stop = Toy.model(), Toy.tokenizer(), Toy.rows(6), Stop()
        self.defaults = dict(disable_tqdm=True, use_cpu=True, report=False, max_steps=2, per_device_train_batch_size=3)

    def build(self, chosen, inputs) -> str:
        from fastpo.config.train_config import TrainConfig

        TrainConfig.build(inputs.get("args"), **chosen)
        return "built"

    def train(self, chosen, inputs) -> str:
        import copy

        import torch

        import fastpo

        inputs = dict(inputs)
        options = {**self.defaults, **chosen}
        if isinstance(inputs.get("callbacks", []), list):
            inputs["callbacks"] = [*inputs.get("callbacks", []), self.stop]
        inputs.setdefault("processing_class", self.tokenizer)
        if options.get("torch_compile_mode") is not None or options.get("torch_compile") is True:
            options["torch_compile_mode"] = None  # inductor compiles for minutes
            options.setdefault("torch_compile_backend", "eager")
        if options.get("eval_strategy", "no") != "no" or options.get("eval_on_start") or "eval_steps" in options:
            inputs.setdefault("eval_dataset", self.rows[:2])
        state = torch.get_rng_state(), torch.get_default_dtype()
        try:
            fastpo.train(copy.deepcopy(self.model), self.rows, **inputs, **options)
        finally:
            torch.set_rng_state(state[0])
            torch.use_deterministic_algorithms(False)
        return "trained"

    def command(self, chosen, inputs) -> str:
        from fastpo import cli

        argv = ["train", "--print-config"]
        for name, v in {
            **chosen,
            **{k: v for k, v in inputs.items() if k not in ("args", "callbacks", "optimizers")},
        }.items():
            argv.append(f"--{name}")
            argv += [json.dumps(v, default=str)] if isinstance(v, dict | list | tuple) else [str(v)]
        out, err = io.StringIO(), io.StringIO()
        before = dict(os.environ)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(argv)
        finally:
            os.environ.clear()
            os.environ.update(before)
        lines = err.getvalue().splitlines()
        if code == 0 and out.getvalue() and not lines:
            return "parsed"
        if code == 2 and len(lines) == 1 and lines[0].startswith("fastpo: error: "):
            return "refused"
        raise AssertionError(f"exit code {code}, stderr {err.getvalue()[:300]!r}")


def outcome(work, chosen, inputs) -> tuple[str, str]:
    """(what became of it, what was said); FAILED for anything but success and one line."""
    import traceback

    from fastpo.errors import FastpoError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return work(chosen, inputs), ""
    except FastpoError as error:
        text = str(error)
        if "\n" in text or not text.strip():
            return "FAILED", f"{type(error).__name__} of several lines: {text[:300]!r}"
        if len(text) > 1000:
            return "FAILED", f"{type(error).__name__} of {len(text)} characters: {text[:200]!r}"
        return "refused", text
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)
        ours = next((f for f in reversed(frame) if "/fastpo/" in f.filename), frame[-1])
        where = f"{Path(ours.filename).name}:{ours.lineno}"
        return "FAILED", f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"


WAYS = ("build", "train", "command")


def run_case(stage: Stage, seed: int, ways=WAYS):
    """Yields (way, outcome, what was said) of each way."""
    chosen, inputs = make_case(seed)
    for way in ways:
        with tempfile.TemporaryDirectory(dir=".", ignore_cleanup_errors=True) as folder, contextlib.chdir(folder):
            yield way, *outcome(getattr(stage, way), dict(chosen), dict(inputs))


def worker(seeds: list[int], ways: list[str]) -> None:
    import resource

    folder = Path(tempfile.mkdtemp(prefix="fuzz-options-"))
    os.chdir(folder)
    os.environ["FASTPO_CACHE"] = str(folder / ".cache")
    stage = Stage()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    print(json.dumps([seeds[0], ways[0], "begun", ""]), file=out, flush=True)
    for seed in seeds:
        for way in ways:
            print(json.dumps([seed, way, "begun", ""]), file=out, flush=True)
            ((_, what, said),) = run_case(stage, seed, (way,))
            print(json.dumps([seed, way, what, said]), file=out, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    out.close()
    os._exit(0)


def lines(process: subprocess.Popen):
    """Lines of a process; None where none came within LIMIT."""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        left, limit = b"", START
        while True:
            if not selector.select(limit):
                yield None
                return
            limit = LIMIT
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return
            *whole, left = (left + piece).split(b"\n")
            yield from whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--count", type=int, default=1000, help="cases")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--show", action="store_true", help="every outcome, and the message of every refusal")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker), args.ways)
    seeds, counts, failures, begin = (
        list(range(args.seed, args.seed + args.count)),
        collections.Counter(),
        [],
        time.time(),
    )

    def note(seed, way, what, said):
        counts[way, what] += 1
        if what == "FAILED":
            failures.append(seed)
        if what == "FAILED" or args.show:
            print(f"{seed} {way}: {what} {said}\n    {make_case(seed)}"[:1500], flush=True)

    while seeds:
        command = [sys.executable, str(Path(__file__).absolute()), "--worker", json.dumps(seeds), "--ways", *args.ways]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        at, way = seeds[0], args.ways[0]
        hung = False
        for line in lines(process):
            if line is None:
                hung = True
                break
            at, way, what, said = json.loads(line)
            if what != "begun":
                note(at, way, what, said)
        if hung:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has forked
        code = process.wait()
        if not hung and code == 0:
            break
        note(at, way, "FAILED", f"no answer within {LIMIT:g} s" if hung else f"the process died ({code})")
        seeds = [s for s in seeds if s > at]
    for (way, what), n in sorted(counts.items()):
        print(f"{way:8} {what:8} {n}")
    last = args.seed + args.count - 1
    print(f"seeds {args.seed} to {last}: {len(failures)} failures, {time.time() - begin:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())

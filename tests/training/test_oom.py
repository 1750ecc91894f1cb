"""Running out of memory in the middle of a run changes rounding only: failures that are injected, and a real limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpo
from fastpo.config.train_config import TrainConfig
from fastpo.errors import TrainingError
from fastpo.training.distributed import World
from fastpo.training.memory import Budget, is_out_of_memory

OOM = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: 12"),
    "python": MemoryError(),
}
BUDGET = 300  # tokens: the first step's 8 pairs are one micro-batch or two


class Scarce:
    """A model whose last layer but one runs out of memory.

    `limit`: in every micro-batch with gradients of more tokens; `calls`: in these calls only, counted from 0 over
    forward passes in train mode. `backward`: on the way back, when the layers above have their gradients already.
    """

    def __init__(self, model, error=OOM["cuda"], limit=None, calls=(), backward=False, passes=None):
        self.error, self.limit, self.calls, self.backward, self.passes = error, limit, calls, backward, passes
        self.count, self.failed = 0, 0
        layers = model.get_base_model().model.layers if hasattr(model, "peft_config") else model.model.layers
        layers[0].mlp.register_forward_hook(self.look)

    def fail(self, *_):
        self.failed += 1
        # A new one: an error that is kept keeps its frames, and with them what a failed forward pass has left open.
        raise type(self.error)(*self.error.args)

    def look(self, module, inputs, out):
        tokens = out.shape[1]
        if not (module.training and torch.is_grad_enabled()):
            if self.passes is not None and tokens > self.passes:
                self.fail()
            return
        short = (self.limit is not None and tokens > self.limit) or self.count in self.calls
        self.count += 1
        if short and self.backward:
            out.register_hook(self.fail)
        elif short:
            self.fail()


@pytest.fixture
def run(toy, tmp_path):
    count = iter(range(1000))

    def call(model, scarce=None, rows=None, peft_config=None, **options):
        # In every run: a hook is part of what the cache of reference log-probabilities knows a model by, and values
        # that another packing has computed differ in their last bits.
        scarce = Scarce(model, **(scarce or {}))
        defaults = dict(
            output_dir=str(tmp_path / f"run{next(count)}"), disable_tqdm=True, use_cpu=True, logging_steps=1,
            max_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", gradient_checkpointing=False,
            save_final=False, max_tokens=BUDGET, train_sampling_strategy="sequential", eval_strategy="steps",
            eval_steps=2, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        result = fastpo.train(
            model, toy.rows(24) if rows is None else rows, processing_class=toy.tokenizer(),
            eval_dataset=toy.rows(8, seed=1), args={**defaults, **options}, peft_config=peft_config,
        )  # fmt: skip
        result.failed = scarce.failed
        return result

    return call


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def same(a, b) -> bool:
    """Whether two runs have the same weights, bit for bit."""
    return torch.equal(weights(a.model), weights(b.model))


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def numbers(result) -> list[dict]:
    """Log lines without times and sizes."""
    skip = ("per_second", "runtime", "peak_memory", "packing_efficiency", "shared_prompt")
    return [{k: v for k, v in line.items() if not any(s in k for s in skip)} for line in result.log_history]


def lowered(result) -> list[int]:
    """The budgets that the report's warnings name."""
    words = [w.message for w in result.warnings if w.name == "out_of_memory"]
    return [int(w.partition("max_tokens=")[2].split()[0]) for w in words]


KINDS = {  # dtype, adapter, options
    "fp32": (torch.float32, False, {}),
    "checkpointing": (torch.float32, False, {"gradient_checkpointing": True}),
    "masters": (torch.bfloat16, False, {"bf16": False}),
    "stochastic": (torch.bfloat16, False, {"master_weights": "stochastic"}),
    "lora": (torch.float32, True, {"learning_rate": 0.5}),
    "kl": (torch.float32, False, {"loss_type": "kto"}),
    "first pass": (torch.float32, False, {"loss_type": "bco"}),
    "live reference": (torch.float32, False, {"loss_type": "tdpo2"}),
}


@pytest.mark.parametrize(
    "kind, where",
    [("fp32", "forward"), *((kind, ("backward", "forward")[i % 2]) for i, kind in enumerate(KINDS))],
)
def test_smaller_micro_batches_change_nothing(toy, run, kind, where):
    """The device holds fewer tokens than max_tokens says: as if max_tokens had been lower from the start, bit for bit;
    and as if nothing had happened, but for rounding."""
    dtype, adapter, options = KINDS[kind]
    adapter = {"peft_config": lora()} if adapter else {}
    limit = 100 if options.get("loss_type") in ("kto", "bco") else 200  # their rows are single responses
    scarce = {"limit": limit, "backward": where == "backward", "error": OOM["cpu" if where == "forward" else "cuda"]}
    got = run(toy.model().to(dtype), scarce, **adapter, **options)
    assert got.failed == 2 and len(lowered(got)) == 1  # once as it was, then smaller, and no more in later steps
    low = run(toy.model().to(dtype), max_tokens=lowered(got)[0], **adapter, **options)
    assert same(got, low)
    plain = run(toy.model().to(dtype), **adapter, **options)
    assert lowered(plain) == []
    if dtype == torch.float32:
        assert (weights(got.model) - weights(plain.model)).abs().max() < 1e-6
        assert len(numbers(got)) == len(numbers(plain))
        for line, expected in zip(numbers(got), numbers(plain), strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if not adapter:
        learnt = (weights(plain.model) - weights(toy.model().to(dtype))).abs().max()
        assert learnt > 1e-5  # ten times what rounding may do


def test_lowered_budgets_are_padded_within(toy, run):
    """A bucket of tokens pads a micro-batch to no more than its budget."""
    got = run(toy.model(), {"limit": 200}, token_bucket=50)
    assert got.failed == 2 and all(tokens % 50 == 0 for tokens in lowered(got)) and len(lowered(got)) == 1
    plain = run(toy.model())
    assert (weights(got.model) - weights(plain.model)).abs().max() < 1e-6


@pytest.mark.parametrize("options", [{}, {"disable_dropout": False, "loss_type": "simpo"}], ids=["plain", "dropout"])
def test_a_failure_that_does_not_come_back_leaves_no_trace(toy, run, options):
    """A fragmented allocator, another process: the step is repeated as it was, random numbers included."""

    def model():
        return toy.model(attention_dropout=0.1) if options else toy.model()

    given = {"max_steps": 3, "optim": "adamw_torch", **options}
    plain = run(model(), **given)
    for call, backward, error in ((1, False, "cpu"), (0, True, "cuda"), (4, True, "python")):
        got = run(model(), {"calls": [call], "backward": backward, "error": OOM[error]}, **given)
        assert got.failed == 1 and lowered(got) == []
        assert same(got, plain) and numbers(got) == numbers(plain)


def test_passes_without_gradients_are_split(toy, run, caplog):
    """The reference's and the evaluation's: the device holds 120 tokens."""
    plain = run(toy.model(), beta=0.31, rows=toy.rows(24, seed=3))
    caplog.clear()
    got = run(toy.model(), {"passes": 120}, beta=0.31, rows=toy.rows(24, seed=4))  # other rows: nothing is cached
    assert got.failed and "out of memory in a pass" in caplog.text and lowered(got) == []
    other = run(toy.model(), beta=0.31, rows=toy.rows(24, seed=4))
    for line, expected in zip(numbers(got), numbers(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert numbers(plain) != numbers(other)


def test_a_resumed_run_packs_as_it_would_have(toy, run, tmp_path):
    """The lowered budget is in the checkpoint; another max_tokens is a new attempt."""
    options = dict(max_steps=6, save_steps=3, output_dir=str(tmp_path / "one"), optim="adamw_torch")
    whole = run(toy.model(), {"limit": 200}, **options)
    go_on = {**options, "resume_from_checkpoint": str(tmp_path / "one" / "checkpoint-3")}
    resumed = run(toy.model(), {"limit": 200}, **go_on)
    assert whole.failed == 2 and resumed.failed == 0 and lowered(resumed) == lowered(whole)
    assert same(resumed, whole) and numbers(resumed) == numbers(whole)
    saved = torch.load(tmp_path / "one" / "checkpoint-3" / "trainer.pt", weights_only=True)["budget"]
    config = TrainConfig.build({"max_tokens": BUDGET, "fsdp": "full_shard", "use_cpu": True})
    sharded = Budget(BUDGET, config, World(torch.device("cpu"), 0, 1, 0), lambda training: "", lambda examples, row: "")
    sharded.load_state_dict(saved)  # ranks of fsdp pack alike: one alone would leave micro-batches out
    assert saved["tokens"][0] < BUDGET == sharded.tokens
    again = run(toy.model(), {"limit": 200}, **{**go_on, "max_tokens": BUDGET + 1, "output_dir": str(tmp_path / "one")})
    assert again.failed


@pytest.mark.parametrize("what", ["training", "reference"])
def test_a_row_that_does_not_fit_alone(toy, run, what):
    rows = toy.rows(7)
    rows.insert(3, {"prompt": " ".join(["w1"] * 90), "chosen": f" w2 w{len(what)}", "rejected": " w4"})  # not cached
    with pytest.raises(TrainingError, match=r"row 3 of the train data alone, 18\d tokens in 2 responses.*max_length"):
        run(toy.model(), {"limit": 150} if what == "training" else {"passes": 150}, rows=rows, max_steps=1)


def test_what_is_no_lack_of_memory_is_raised(toy, run):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(toy.model(), {"limit": 0, "error": RuntimeError("mat1 and mat2 shapes cannot be multiplied")})
    assert all(map(is_out_of_memory, OOM.values())) and is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(2, "No such file")) and not is_out_of_memory(ValueError("out of memory"))


# ---- processes of their own


@pytest.fixture(scope="module")
def runs(once):
    """The folder of what oom_runs.py ran, and the exit codes of its processes."""

    def run(folder):
        command = [sys.executable, str(Path(__file__).parents[1] / "oom_runs.py"), str(folder)]
        env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
        assert done.returncode == 0, done.stderr[-2000:]

    folder = once("oom_runs.py", run)
    return folder, json.loads((folder / "codes.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_under_a_hard_memory_limit(runs):
    """A process whose address space may grow by 64 MiB from the first step on trains the same model."""
    from safetensors.torch import load_file

    folder, codes = runs
    assert codes["free"] == codes["tight"] == [0], (folder / "tight" / "log-0.txt").read_text()[-2000:]
    (none, free), (some, tight) = (
        (json.loads((folder / name / "warnings.json").read_text()), load_file(folder / name / "model.safetensors"))
        for name in ("free", "tight")
    )
    assert not none and some
    assert max((free[name] - tight[name]).abs().max() for name in free) < 1e-6


def test_one_rank_of_two(runs):
    """A replica repeats its part while the other waits, and both end with one process's weights; a shard cannot, and
    says so, and neither rank is left waiting."""
    folder, codes = runs
    assert codes["one"] == [0] and codes["ddp"] == [0, 0] and all(codes["fsdp"])
    one, _ = torch.load(folder / "one" / "out-0.pt")
    (first, none), (second, failed) = (torch.load(folder / "ddp" / f"out-{rank}.pt") for rank in range(2))
    assert failed and not none and torch.equal(first, second) and (first - one).abs().max() < 1e-6
    assert "out of memory on rank 1" in (folder / "fsdp" / "log-1.txt").read_text()

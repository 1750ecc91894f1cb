"""A training step asks the device for nothing: on a GPU by PyTorch's own check, on a CPU by watching every read.

Where the host must know a number to go on, a step waits; these are all, and the tests below see each of them: bco, aot
and aot_unpaired (what they read of the whole step is put together on the host), optimisers that are not fused (the host
asks whether the gradient is finite), grad_filter (lists of rows, on any device), and the very first step's check that
the policy starts at its reference.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpo
from fastpo.models import tree_attention
from fastpo.ops import parts
from fastpo.trainer import Trainer

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal, aten.masked_select, aten._unique2,
         aten.unique_dim, aten.unique_consecutive, aten.bincount}  # fmt: skip
METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")


class Read(AssertionError):
    """The host read a tensor."""


class Watch(TorchDispatchMode):
    """Raises where an operator's result, or its shape, would have to come from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        kwargs = kwargs or {}
        name = func.overloadpacket
        sized = name is aten.repeat_interleave and kwargs.get("output_size") is None
        masked = name in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in READS or sized or masked:
            raise Read(str(func))
        return func(*args, **kwargs)


@pytest.fixture
def watched(monkeypatch):
    """`with watched():` no read. Operators are watched from outside; the methods of a tensor inside our own, too."""
    active = [False]

    @contextlib.contextmanager
    def block(on=True):
        before, active[0] = active[0], on
        try:
            with Watch() if on else torch.utils._python_dispatch._disable_current_modes():
                yield
        finally:
            active[0] = before

    def refusing(name, original):
        def method(self, *args, **kwargs):
            if active[0]:
                raise Read(f"Tensor.{name}")
            return original(self, *args, **kwargs)

        return method

    for name in METHODS:
        monkeypatch.setattr(torch.Tensor, name, refusing(name, getattr(torch.Tensor, name)))
    plan = tree_attention._plan.__wrapped__

    def planned(*args):  # the CPU kernel's own tables, of host integers alone; a GPU's kernels have others
        with block(False):
            return plan(*args)

    monkeypatch.setattr(tree_attention, "_plan", planned)
    monkeypatch.setattr(parts, "check_targets", lambda *_: None)  # they are looked at on a CPU alone
    return block


@pytest.fixture
def train(toy, tmp_path, monkeypatch, watched):
    """Three steps, all but the first watched."""
    step = Trainer._step
    seen = []

    def watched_step(self, rows):
        if self.state.global_step == 0:
            return step(self, rows)
        with watched():
            rate = step(self, rows)
        seen.append(len(self.accumulation.share))
        return rate

    monkeypatch.setattr(Trainer, "_step", watched_step)

    def call(rows, **options):
        defaults = dict(
            output_dir=str(tmp_path / "run"), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=3, max_steps=3,
            per_device_train_batch_size=6, save_final=False, report=False, max_tokens=80,
        )  # fmt: skip
        fastpo.train(toy.model(), rows, processing_class=toy.tokenizer(), args={**defaults, **options})
        assert len(seen) == 2 and min(seen) > 1  # steps of several micro-batches were watched
        seen.clear()

    return call


def rows_for(toy, loss):
    if loss in ("exo_rw", "all_pairs"):
        return toy.kway_rows(18)
    if loss in ("kto", "bco"):
        return [{"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in toy.rows(18)
                for k in ("chosen", "rejected")]  # fmt: skip
    return toy.rows(18)


SILENT = {
    "dpo": {}, "kto": {}, "exo_rw": {}, "wpo": {}, "tdpo1": {}, "sampo": {}, "ld_dpo": {}, "orpo": {},
    "simpo_sft": {"loss_type": ["simpo", "sft"]},
    "all_pairs": {"loss_type": "ipo", "pair_policy": "all", "share_prompts": "always"},
    "bf16_weights": {"loss_type": "dpo", "bf16": True, "optim": "sgd", "token_bucket": 40},
}  # fmt: skip
WAITS = {
    "bco": {}, "aot": {}, "adamw_torch": {"loss_type": "dpo", "optim": "adamw_torch"},
    "grad_filter": {"loss_type": "dpo", "grad_filter": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_a_step_reads_nothing(toy, train, case):
    train(rows_for(toy, case), **{"loss_type": case, **SILENT[case]})


@pytest.mark.parametrize("case", WAITS)
def test_what_must_wait_is_seen(toy, train, case):
    with pytest.raises(Read):
        train(rows_for(toy, case), **{"loss_type": case, **WAITS[case]})


def test_the_watch_sees_reads(watched):
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    reads = [
        lambda: x.sum().item(), lambda: bool(x[0]), lambda: x.tolist(), lambda: x[mask], lambda: x.repeat_interleave(
            torch.ones(4, dtype=torch.int64)), lambda: torch.equal(x, x), lambda: torch.nonzero(mask), lambda: max(x),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(Read), watched():
            read()
    with watched():
        assert (x.clone().index_fill_(0, torch.tensor([1]), 0.0) * 2).shape == (4,)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["dpo", "kto", "exo_rw", "ipo"])
def test_two_steps_under_sync_debug_mode(toy, tmp_path, loss):
    from transformers import TrainerCallback

    class Strict(TrainerCallback):
        """Errors out on any synchronisation between a step's beginning and its end, but for the first step."""

        def on_step_begin(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003
            torch.cuda.set_sync_debug_mode("error" if state.global_step else "default")

        def on_step_end(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003
            torch.cuda.set_sync_debug_mode("default")

    try:
        fastpo.train(
            toy.model(hidden_size=128), rows_for(toy, loss), processing_class=toy.tokenizer(), callbacks=[Strict()],
            args=dict(output_dir=str(tmp_path / "run"), disable_tqdm=True, bf16=True, logging_steps=3, max_steps=3,
                      loss_type=loss, per_device_train_batch_size=6, save_final=False, report=False, max_tokens=150),
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")

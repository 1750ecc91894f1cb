"""The certified gradient filter: what it leaves out, what it says it leaves out, and what that does to gradients.

The tiles of the filter are made small, so that small problems have dozens; the criterion is fastpo.check's.
"""

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import check, ops
from fastpo.check import SOFTCAPPED, Case
from fastpo.errors import ConfigError, FastpoError
from fastpo.kernels import reference
from fastpo.ops import backends, grad_filter
from fastpo.training.metrics import Window

TILE = 32
BUILT = backends.compiled is not None
BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(not BUILT, reason="csrc/ was not built"))]
DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "bfloat16", "float64")]
TRAINED = {"kept": ("hidden", "weight", "bias"), "sliced": ("hidden", "weight", "bias"), "frozen": ("hidden",)}
BUDGETS = {"kept": 1 << 62, "sliced": 0, "frozen": 0}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several row blocks and column slices, and tiles of the filter that are not whole in either."""
    monkeypatch.setattr(grad_filter, "TILE_COLUMNS", TILE)
    monkeypatch.setattr(backends, "CPU_TILE_ROWS", 32)
    monkeypatch.setattr(backends, "CPU_TILE_BYTES", 64 << 10)


def skip_unless_takes(backend: str, dtype: torch.dtype) -> None:
    if dtype not in ops.NATIVE_DTYPES[backend]:
        pytest.skip(f"{backend} does not take {dtype}")


def problem(kind="normal", n=67, v=1003, dtype=torch.float32, **rule) -> dict[str, Tensor]:
    """`flat`: uniform; `mixed`: rows from uniform to nearly certain, side by side; others as fastpo.check's."""
    x = Case(n, 24, v, kind if kind not in ("flat", "mixed") else "normal", bias=rule.pop("bias", False), **rule)
    x = x.tensors(torch.float64, "cpu")
    if kind in ("flat", "mixed"):
        x["hidden"] *= torch.linspace(0, 6, n).unsqueeze(1) if kind == "mixed" else 0.0
    return {name: t.to(dtype) if name in ("hidden", "weight", "bias") else t for name, t in x.items()}


def forward(x: dict[str, Tensor], mass: float, backend: str, softcap=None, logit_scale=1.0) -> grad_filter.Filtered:
    head = backends.Head(x["hidden"], x["weight"], x["target"], x.get("bias"), softcap, logit_scale)
    return grad_filter.forward(head, mass, True, False, backend == "cpu")


def probabilities(raw: Tensor, x: dict[str, Tensor], softcap=None, logit_scale=1.0) -> Tensor:
    raw = raw.double() + x["bias"].double() if "bias" in x else raw.double()
    return reference.logit_rule(raw, softcap, logit_scale).softmax(1)


def column_mask(keep: Tensor, v: int) -> Tensor:
    return keep.repeat_interleave(TILE, 1)[:, :v]


def run(x: dict[str, Tensor], trained=TRAINED["kept"], **options) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    leaves = {n: x[n].detach().clone().requires_grad_(n in trained) for n in TRAINED["kept"] if n in x}
    out = ops.linear_logprob(leaves["hidden"], leaves["weight"], x["target"], leaves.get("bias"), **options)
    out = out if isinstance(out, tuple) else (out,)
    if trained:
        out[0].backward(x["upstream"].to(out[0].dtype))
    return tuple(t.detach() for t in out), {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


# ---- the certificate


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "mixed", "negative", "offset", "rising"])
def test_certificate(backend, dtype, kind):
    """No row loses more than the budget, in fp64 from the tiles that are left out; and what is reported is that."""
    skip_unless_takes(backend, dtype)
    for rule in ({}, {"bias": True, **SOFTCAPPED}) if kind in ("normal", "mixed") else ({},):
        x = problem(kind, dtype=dtype, **rule)
        rule = {k: r for k, r in rule.items() if k != "bias"}
        live = x["target"] != -100
        own = x["target"].where(live, 0) // TILE
        for mass in (1e-7, 1e-3, 0.1, 0.25, 0.9):
            out = forward(x, mass, backend, **rule)
            p = probabilities(out.saved, x, **rule)
            lost = p.masked_fill(column_mask(out.keep, p.shape[1]), 0.0).sum(1)
            assert (lost[live] <= mass).all(), (lost.max(), mass)
            torch.testing.assert_close(out.dropped.double()[live], lost[live], rtol=2e-4, atol=1e-12)
            assert out.keep[live, own[live]].all()
            assert not out.keep[~live].any() and (out.dropped[~live] == 0).all()
            # Greedy: the next smallest tile would have been too much.
            shares = torch.nn.functional.pad(p, (0, -p.shape[1] % TILE)).view(len(p), -1, TILE).sum(2)
            left = shares.masked_fill(~out.keep, torch.inf).scatter(1, own.unsqueeze(1), torch.inf).amin(1)
            assert (lost + left > mass * (1 - 1e-3))[live].all()
        if dtype == torch.float32 and kind in ("normal", "peaked", "mixed"):  # logits of another GEMM altogether
            exact = probabilities(x["hidden"].double() @ x["weight"].double().t(), x, **rule)
            lost = exact.masked_fill(column_mask(out.keep, p.shape[1]), 0.0).sum(1)
            assert (lost[live] <= mass).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_target_outside_the_vocabulary_is_nan_unless_looked_at(backend):
    """What a GPU does, where the op does not look at the targets: NaN in that row, no index out of range."""
    x = problem(v=1003, ignored=False)
    plain = forward(x, 0.1, backend)
    bad = torch.tensor([3, 5, 8])
    x["target"][bad] = torch.tensor([1003, -1, 9000])
    out = forward(x, 0.1, backend)
    assert out.logp.isnan().nonzero().flatten().equal(bad)
    assert (out.dropped <= 0.1).all() and (out.logp == plain.logp).sum() == len(out.logp) - 3
    head = backends.Head(x["hidden"], x["weight"], x["target"], None, None, 1.0)
    upstream = torch.ones(67)
    grads = grad_filter.backward(head, upstream, out.saved, out.stats, out.keep, [True, True, False], backend == "cpu")
    assert grads[0].isfinite().all() and grads[1].isfinite().all()


def test_ties_at_the_budget():
    """Eight tiles of exactly an eighth: a budget of a quarter is not overdrawn by what sums round to."""
    shares = torch.full((3, 8), 0.125)
    for mass, skipped in ((0.125 - 1e-9, 0), (0.126, 1), (0.2501, 2), (0.999, 7)):
        keep, dropped = grad_filter.choose(shares, torch.tensor([0, 3 * TILE, -100]), mass)
        assert (~keep).sum(1).tolist() == [skipped, skipped, 8]
        assert dropped.tolist() == [skipped / 8, skipped / 8, 0.0]
        assert keep[0, 0] and keep[1, 3]


def test_a_flat_row_among_peaked_ones_keeps_its_own_tiles():
    x = problem("peaked", ignored=False)
    x["hidden"] *= 4
    x["hidden"][5] = 0.0
    keep = forward(x, 1e-3, "torch").keep
    assert keep[5].all() and keep[torch.arange(67) != 5].float().mean() < 0.6


# ---- gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", TRAINED)
@pytest.mark.parametrize("rule", [{}, {"bias": True, **SOFTCAPPED}], ids=["plain", "all"])
def test_gradients_of_the_tiles_that_stay(backend, dtype, regime, rule):
    """Equal to fp64 autograd's with the tiles that are left out taken out of it; as near the exact ones as promised."""
    skip_unless_takes(backend, dtype)
    x = problem("mixed", dtype=dtype, **rule)
    rule = {k: r for k, r in rule.items() if k != "bias"}
    names = [n for n in TRAINED[regime] if n in x]
    options = {"backend": backend, "memory_budget": BUDGETS[regime], **rule}
    mass = 0.05
    (logp, dropped), ours = run(x, names, grad_filter=mass, return_dropped=True, **options)
    (plain,), _ = run(x, names, **options)
    torch.testing.assert_close(logp, plain, rtol=1e-5, atol=1e-5)

    def fn(*args):
        return reference.linear_logprob(*args, **rule, return_entropy=True)

    full = check.head_outputs(fn, x, "kept", torch.float64)
    naive = check.head_outputs(fn, x, "kept")
    wide = {n: x[n].double() for n in ("hidden", "weight", "bias") if n in x}
    raw = (wide["hidden"] @ wide["weight"].t() + wide.get("bias", 0.0)).requires_grad_()
    picked, _, _ = reference.row_logprob(raw, x["target"], **rule)
    picked.backward(x["upstream"].double())
    keep = forward(x, mass, backend, **rule).keep
    du = raw.grad * column_mask(keep, len(x["weight"]))  # [N, V]
    masked = {"hidden": du @ wide["weight"], "weight": du.t() @ wide["hidden"], "bias": du.sum(0)}
    magnitude = raw.abs().max().item() * abs(rule.get("logit_scale", 1.0))
    assert 0.01 < dropped.max() <= mass and dropped.min() >= 0
    for name in names:
        scale = check._rms(wide["weight"]) * check._rms(x["upstream"].double()) if name == "hidden" else None
        shifted = naive[f"d{name}"].double() - full[f"d{name}"] + masked[name]
        error, allowed = check.budgeted_error(ours[name], shifted, masked[name], magnitude, scale)
        assert error <= allowed, (name, error, allowed)
    # The bounds of grad_filter.py, with room for what rounding does to an unfiltered gradient.
    c = (x["upstream"].double() * abs(rule.get("logit_scale", 1.0))).abs() * dropped
    for name, bound in (
        ("hidden", c * wide["weight"].norm(dim=1).max()),
        ("weight", (c * wide["hidden"].norm(dim=1)).sum()),
        ("bias", c.sum()),
    ):
        if name not in names:
            continue
        error, rounding = (t.double() - full[f"d{name}"] for t in (ours[name], naive[f"d{name}"]))
        error, rounding = (e.norm(dim=1) if e.dim() == 2 else e.abs() for e in (error, rounding))
        error, rounding = (error, rounding.max()) if name == "hidden" else (error.sum(), rounding.sum())
        assert (error <= bound * 1.001 + 1.5 * rounding + 1e-12).all(), name
        assert error.max() > 0


@pytest.mark.parametrize("mask", range(1, 8), ids="{:03b}".format)
def test_gradients_asked_for_and_no_others(mask):
    names = tuple(name for i, name in enumerate(TRAINED["kept"]) if mask >> i & 1)
    x = problem("mixed", bias=True)
    _, expected = run(x, grad_filter=0.01)
    _, grads = run(x, names, grad_filter=0.01)
    assert set(grads) == set(names)
    for name in names:
        torch.testing.assert_close(grads[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regime", TRAINED)
def test_zero_is_no_filter(backend, regime, monkeypatch):
    x = problem("mixed", bias=True)
    options = {"backend": backend, "memory_budget": BUDGETS[regime], "return_entropy": True}
    expected, grads = run(x, TRAINED[regime], **options)
    monkeypatch.setattr(grad_filter, "filtered_logprob", None)
    out, ours = run(x, TRAINED[regime], grad_filter=0.0, return_dropped=True, **options)
    assert out[0].equal(expected[0]) and out[1].equal(expected[1]) and (out[2] == 0).all()
    assert set(ours) == set(grads) and all(ours[name].equal(grads[name]) for name in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs(backend):
    """Value and entropy are the unfiltered ones; without gradients there is nothing to leave out."""
    x = problem("mixed", bias=True)
    (logp, entropy), _ = run(x, (), return_entropy=True)
    out, _ = run(x, grad_filter=0.01, return_entropy=True, return_dropped=True, backend=backend)
    torch.testing.assert_close(out[:2], (logp, entropy), rtol=1e-5, atol=1e-5)
    assert out[2].shape == logp.shape and out[2].max() > 0
    out, _ = run(x, (), grad_filter=0.01, return_dropped=True, backend=backend)
    assert len(out) == 2 and (out[1] == 0).all()
    leaves = ops.linear_logprob(
        x["hidden"].requires_grad_(), x["weight"], x["target"], grad_filter=0.01, return_dropped=True
    )
    assert [t.requires_grad for t in leaves] == [True, False]


def test_gradient_twice_and_once_only():
    x = problem("mixed")
    weight = x["weight"].requires_grad_()
    logp = ops.linear_logprob(x["hidden"], weight, x["target"], grad_filter=0.01)
    (first,) = torch.autograd.grad(logp, weight, x["upstream"], retain_graph=True)
    assert first.equal(torch.autograd.grad(logp, weight, x["upstream"], retain_graph=True)[0])
    (grad,) = torch.autograd.grad(logp.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


# ---- what must not vanish, and what may


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regime", TRAINED)
@pytest.mark.parametrize("what", ["nan", "inf", "inf-target", "nan-ignored"])
def test_non_finite_logits_surface(backend, regime, what):
    """Of one row: it is NaN where it is without a filter; the other rows are as if it were not there."""
    x = problem("peaked", ignored=False)
    row, column = 4, 700
    if what.startswith("nan"):
        x["hidden"][row] = torch.nan
    else:  # one logit of this row overflows, the others are finite
        x["hidden"][:, 0], x["weight"][:, 0] = 0.0, 0.0
        x["hidden"][row, 0], x["weight"][column, 0] = 1e38, 1e3
    if what == "inf-target":
        x["target"][row] = column
    if what == "nan-ignored":
        x["target"][row] = -100
    options = {"backend": backend, "memory_budget": BUDGETS[regime], "return_entropy": True}
    (logp, entropy, dropped), ours = run(x, TRAINED[regime], grad_filter=0.01, return_dropped=True, **options)
    (plain, plain_entropy), full = run(x, TRAINED[regime], **options)
    assert plain.isfinite().equal(logp.isfinite()) and plain_entropy.isfinite().equal(entropy.isfinite())
    for name, grad in full.items():
        assert grad.isfinite().equal(ours[name].isfinite()), name
    assert not full["hidden"][row].isfinite().any()
    assert (dropped[row] == 0) and (dropped > 0).sum() > 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regime", TRAINED)
def test_masked_vocabulary(backend, regime):
    """Logits of -inf have probability 0: whole tiles of them are left out for nothing, and take no gradient."""
    x = problem("normal", bias=True)
    x["target"] = torch.randint(600, 1003, (67,))
    x["bias"][:500] = -torch.inf
    options = {"backend": backend, "memory_budget": BUDGETS[regime]}
    (_, dropped), ours = run(x, TRAINED[regime], grad_filter=1e-30, return_dropped=True, **options)
    _, full = run(x, TRAINED[regime], **options)
    assert (dropped == 0).all()
    for name, grad in full.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5)
    assert not forward(x, 1e-30, backend).keep[:, : 500 // TILE].any()
    assert regime == "frozen" or (ours["weight"][:500] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regime", TRAINED)
def test_no_rows_and_ignored_rows(backend, regime):
    options = {"backend": backend, "memory_budget": BUDGETS[regime], "grad_filter": 0.1, "return_dropped": True}
    for x in (problem(n=0), {**problem(), "target": torch.full((67,), -100)}):
        (logp, dropped), grads = run(x, TRAINED[regime], **options)
        assert logp.shape == dropped.shape == x["target"].shape and not logp.any() and not dropped.any()
        assert all(grads[name].shape == x[name].shape and not grads[name].any() for name in grads)
    x = problem("mixed")
    live = x["target"] != -100
    _, together = run(x, TRAINED[regime], **options)
    _, alone = run({**x, **{n: x[n][live] for n in ("hidden", "target", "upstream")}}, TRAINED[regime], **options)
    torch.testing.assert_close(together["hidden"][live], alone["hidden"], rtol=1e-4, atol=1e-6)
    if regime != "frozen":
        torch.testing.assert_close(together["weight"], alone["weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), float("inf")])
def test_bad_budget(value):
    with pytest.raises(FastpoError, match=r"grad_filter must be in \[0, 1\)") as caught:
        run(problem(), grad_filter=value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"grad_filter must be in \[0, 1\)"):
        fastpo.TrainConfig(grad_filter=value)


def test_target_outside_the_vocabulary():
    x = problem(n=3, ignored=False)
    x["target"][2] = 1003
    with pytest.raises(FastpoError, match=r"target\[2\] = 1003 is outside"):
        run(x, grad_filter=0.1)


# ---- around the op


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep_logits", [True, False], ids=["kept", "sliced"])
def test_opcheck_and_compile(backend, keep_logits):
    x = problem("mixed", n=9, v=121, bias=True)
    inputs = [x[n].requires_grad_() for n in TRAINED["kept"]]
    inputs = [inputs[0], inputs[1], x["target"], inputs[2]]
    rule = (20.0, 0.5, backend)
    args = (*inputs, *rule, 0.05, keep_logits, True)
    torch.library.opcheck(torch.ops.fastpo.filtered_logprob.default, args)
    with torch.no_grad():
        *_, logits, stats, keep = torch.ops.fastpo.filtered_logprob(*args)
        saved = (logits, stats, keep)
    assert saved[0].shape == ((9, 121) if keep_logits else (0,)) and saved[2].shape == (9, 4)
    for need in ([True, True, True], [False, True, False]):
        grad_args = (x["upstream"], *(t.detach() for t in inputs), *saved, *rule, need)
        torch.library.opcheck(torch.ops.fastpo.filtered_logprob_backward.default, grad_args)

    def fn(hidden, weight, target, bias):
        return ops.linear_logprob(
            hidden, weight, target, bias, backend=backend, softcap=20.0, grad_filter=0.05, return_dropped=True,
            memory_budget=None if keep_logits else 0,
        )  # fmt: skip

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for n in (7, 12, 19):  # the second size makes N dynamic
        x = problem("mixed", n=n, v=121, bias=True)
        eager, ours = (check.head_outputs(f, x, "kept") for f in (fn, compiled))
        assert set(eager) == set(ours) and all(eager[name].equal(ours[name]) for name in eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory(backend, monkeypatch):
    """Without a budget nothing of size N x V is alive; with one, the logits are, once."""
    monkeypatch.undo()  # the real tiles
    n, d, v = 1536, 32, 32000
    x = Case(n, d, v, ignored=False).tensors(torch.float32, "cpu")
    matrix = n * v * 4

    def peak(budget: int) -> int:
        def status(field: str) -> int:
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

        run(x, ("hidden", "weight"), backend=backend, memory_budget=budget, grad_filter=1e-3)
        try:
            with open("/proc/self/clear_refs", "w") as reset:
                reset.write("5")
        except OSError:
            pytest.skip("needs /proc/self/clear_refs to reset the peak")
        before = status("VmRSS")
        run(x, ("hidden", "weight"), backend=backend, memory_budget=budget, grad_filter=1e-3)
        return status("VmHWM") - before

    room = 60 << 20  # tiles and their temporaries, lists of rows, the gradients
    assert peak(0) < room < matrix / 2 < peak(matrix) < matrix + room


def test_autocast_and_strides():
    x = problem("mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run(x, grad_filter=0.05)
    cast = {n: t.bfloat16() if n in ("hidden", "weight") else t for n, t in x.items()}
    expected, expected_grads = run(cast, grad_filter=0.05)
    assert out[0].equal(expected[0]) and grads["weight"].equal(expected_grads["weight"].float())
    _, expected_grads = run(x, grad_filter=0.05)
    strided = {**x, "hidden": x["hidden"].t().contiguous().t(), "weight": x["weight"].repeat_interleave(2, 1)[:, ::2]}
    strided |= {"target": x["target"].int().repeat_interleave(2)[::2]}
    leaves = [strided[n].detach().requires_grad_() for n in ("hidden", "weight")]
    logp = ops.linear_logprob(*leaves, strided["target"], grad_filter=0.05)
    for name, grad in zip(("hidden", "weight"), torch.autograd.grad(logp, leaves, x["upstream"])):
        torch.testing.assert_close(grad, expected_grads[name])


def test_dropped_mass_of_several_ranks():
    """Mean and largest are of all ranks' rows; a rank without rows adds nothing."""

    class SecondOfTwo:
        size, rank = 2, 1

        @staticmethod
        def sum_(of_ranks: Tensor) -> Tensor:
            return of_ranks.add_(torch.tensor([2.0, 0.5, 0.4, 0.0]))

    window = object.__new__(Window)
    window.device, window.dropped = torch.device("cpu"), torch.zeros(3)
    window.add_dropped([torch.tensor([0.1, 0.3]), torch.zeros(0)], SecondOfTwo())
    torch.testing.assert_close(window.dropped, torch.tensor([4.0, 0.9, 0.4]))
    window.add_dropped([], SecondOfTwo())
    torch.testing.assert_close(window.dropped, torch.tensor([6.0, 1.4, 0.4]))


def test_trainer(toy, tmp_path, monkeypatch):
    """The option reaches the head, its numbers the log; a run goes on from a checkpoint as if it had not stopped."""
    monkeypatch.setattr(grad_filter, "TILE_COLUMNS", 8)

    def train(name: str, **options):
        args = dict(
            output_dir=str(tmp_path / name), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=2, max_steps=4,
            learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=4, max_tokens=100,
            report=False, save_final=False, **options,
        )  # fmt: skip
        result = fastpo.train(toy.model(), toy.rows(8), processing_class=toy.tokenizer(), args=args)
        weights = torch.cat([p.detach().flatten() for p in result.model.parameters()])
        return [line for line in result.log_history if "loss" in line], weights

    keys = ("grad_filter/dropped_mass", "grad_filter/dropped_mass_max")
    exact, exact_weights = train("exact")
    lines, weights = train("filtered", grad_filter=0.3, save_steps=1)
    assert len(lines) == 2 and not any(key in line for line in exact for key in keys)
    assert all(0.1 < line[keys[0]] <= line[keys[1]] <= 0.3 for line in lines)
    assert exact[0]["loss"] != exact[1]["loss"] and not weights.equal(exact_weights)
    resumed, resumed_weights = train(
        "filtered", grad_filter=0.3, overwrite_output_dir=True, save_steps=1,
        resume_from_checkpoint=str(tmp_path / "filtered" / "checkpoint-3"),
    )  # fmt: skip
    assert resumed_weights.equal(weights)
    assert [resumed[-1][key] for key in keys] == [lines[-1][key] for key in keys]

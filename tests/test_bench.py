"""The benchmark suite itself: fp64 references, the gate before the clock, floors, files, goals, the GPU script."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (24, 16, 301)


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


@pytest.mark.parametrize("job", ("none", "frozen", "rows", "entropy", "sum", "dpo", "simpo"))
def test_exact_is_autograd_in_fp64(bench, job, monkeypatch):
    harness, peers = bench("harness"), bench("peers")
    monkeypatch.setattr(harness, "EXACT_BLOCK", 5 * SHAPE[2])  # several blocks of rows and of columns, ragged
    p = peers.Problem.make(*SHAPE, torch.float32, "cpu")
    exact = harness.Exact(p).outputs(job)
    x, w = p.hidden.double().requires_grad_(), p.weight.double().requires_grad_()
    logps = (x @ w.t()).log_softmax(1)
    logp, entropy = logps.gather(1, p.target.unsqueeze(1)).squeeze(1), -(logps.exp() * logps).sum(1)
    if job in ("dpo", "simpo"):
        loss = peers.pair_loss(logp, job)
    else:
        loss = -logp.sum() if job == "sum" else (logp * p.upstream.double()).sum()
        loss = loss + (entropy * p.upstream.double().flip(0)).sum() if job == "entropy" else loss
    loss.backward()
    want = {"dhidden": x.grad, "dweight": w.grad, "logp": logp.detach(), "loss": loss.detach()}
    want["entropy"] = entropy.detach()
    of_rows = {"logp", "dhidden", "dweight"}
    assert set(exact) == {
        "none": {"logp"}, "frozen": {"logp", "dhidden"}, "rows": of_rows, "entropy": {"entropy", *of_rows}
    }.get(job, {"loss", "dhidden", "dweight"})  # fmt: skip
    for name in exact:
        torch.testing.assert_close(exact[name], want[name], rtol=1e-11, atol=1e-13, msg=name)


def test_what_is_wrong_or_absent_is_not_timed(bench, monkeypatch, tmp_path):
    harness, peers, report = bench("harness"), bench("peers"), bench("report")

    def broken(p):
        return peers.naive("rows")(p) | {"dweight": torch.zeros_like(p.weight)}

    def crashes(p):
        raise ValueError("no such kernel")

    extra = {
        "broken": peers.Provider("broken", broken, "rows", "kept"),
        "fastpo_broken": peers.Provider("fastpo_broken", broken, "rows", "kept"),
        "crashes": peers.Provider("crashes", crashes, "rows", "kept"),
        "absent": peers.Provider("absent", crashes, "rows", "kept", ("no_such_module",)),
    }
    monkeypatch.setattr(harness, "PROVIDERS", {**peers.PROVIDERS, **extra})
    names = ["fastpo_none", "fastpo_frozen", "fastpo_kept", "fastpo_sliced", "naive", "fastpo_simpo", "quack", *extra]
    names[4:4] = ["fastpo_entropy", "fastpo_entropy_sliced", "naive_entropy"]
    result = harness.measure(SHAPE, names, rounds=3, seconds=0.0)
    rows = result["rows"]
    assert list(rows) == ["gemms_3", *names]
    status = {name: row["status"] for name, row in rows.items()}
    assert [name for name in status if status[name] == "ok"] == ["gemms_3", *names[:9]]
    assert rows["broken"]["reason"].startswith("dweight is off by 1.0e+00") and "times_s" not in rows["broken"]
    assert status["fastpo_broken"] == "wrong" and rows["fastpo_broken"]["over_criterion"] > 1
    assert rows["crashes"]["reason"] == "ValueError: no such kernel"
    assert (rows["absent"]["reason"], rows["quack"]["status"]) == ("no_such_module is not installed", "skipped")
    kept = rows["fastpo_kept"]
    assert len(kept["times_s"]) == 3 and kept["p20_s"] <= kept["p50_s"] <= kept["p80_s"]
    assert max(kept["errors"].values()) < 1e-5 and kept["over_criterion"] <= 1 and kept["peak_bytes"] >= 0
    assert kept["over_floor"] > 0 and kept["tflops"] == pytest.approx(6e-12 * 24 * 16 * 301 / kept["p50_s"])

    path = harness.write([result], "ops", tmp_path)
    assert harness.read(path) == json.loads(json.dumps([result]))
    compare = shutil.which("pytest-benchmark")
    if compare:
        done = subprocess.run([compare, "compare", str(path)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and "fastpo_kept[24x16x301-float32]" in done.stdout, done.stderr
    harness.write([result], "sweep", tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py", "--folder", str(tmp_path), "--output", str(tmp_path / "RESULTS.md")])
    report.main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| broken | rows | wrong: dweight is off by" in text and "sweep_time.png" in text
    assert (tmp_path / "sweep_memory.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Not drawn: matplotlib is not installed." in text and "sweep_time.png" not in text


def test_our_losses_are_held_to_the_gradient_that_they_get(bench, monkeypatch):
    """A loss's coefficients are small beside a unit upstream: an error of 1e-5 of dhidden is no rounding."""
    harness, peers = bench("harness"), bench("peers")

    def off(p):
        out = peers.fastpo_loss("dpo")(p)
        return out | {"dhidden": out["dhidden"] * (1 + 1e-5)}

    monkeypatch.setattr(
        harness, "PROVIDERS", {**peers.PROVIDERS, "fastpo_off": peers.Provider("fastpo_off", off, "dpo", "kept")}
    )
    p = peers.Problem.make(*SHAPE, torch.float32, "cpu")
    rows = harness.gate(["fastpo_dpo", "fastpo_off"], p, "cpu", memory=False)
    assert [row["status"] for row in rows.values()] == ["ok", "wrong"], rows


def test_floors(bench):
    roofline = bench("roofline")
    n, d, v = 1024, 512, 32000
    assert roofline.flops("kept", n, d, v) == 6 * n * d * v
    assert roofline.least_bytes("none", n, d, v, 4) == 4 * (n * d + v * d) + 12 * n
    kept, sliced = (roofline.least_bytes(regime, n, d, v, 2) for regime in ("kept", "sliced"))
    assert kept - sliced == 2 * (2 * n * v - n * d - v * d)  # the N x V matrix twice, X and W once less
    machine = roofline.Machine(torch.randn(8, 64), torch.randn(4096, 64))
    machine.gemm_s, machine.copy_s = [1.0, 3.0, 2.0], [0.5]
    assert machine.gemm_rate == 6 * 8 * 64 * 4096 / 2 and machine.bandwidth == 2 * machine._source.nbytes / 0.5
    floor = machine.floor("frozen")
    assert floor["floor_s"] == max(floor["flops"] / machine.gemm_rate, floor["bytes"] / machine.bandwidth)


def test_goals(bench, tmp_path, monkeypatch):
    goals = bench("gpu_goals")

    def row(job, seconds, **more):
        return {"job": job, "times_s": [seconds] * 3, "p50_s": seconds, **more}

    rows = {
        (8192, 4096, 151936): {
            "gemms_1": row("gemms", 0.010),
            "fastpo_none": row("none", 0.0105),
            "fastpo_kept": row("rows", 0.060, peak_bytes=6 << 30),
            "trl_chunked": row("rows", 0.167),
            "quack": row("sum", 0.050),
        }
    }
    judged = goals.goals_of(rows, {"row_kernel": [{"of_copy": 0.9}, {"failed": ""}]})
    found = {name: value for name, value, *_ in judged}
    large, square = "N 8,192, D 4,096, V 151,936", "N 4,096, D 4,096, V 128,256"
    assert found[f"forward and backward, {large}"] == pytest.approx(60)
    assert found[f"its peak memory, {large}"] == 6
    assert found[f"reference pass over its GEMM, {large}"] == pytest.approx(1.05)
    assert found[f"ours over trl_chunked, {large}"] == pytest.approx(60 / 167)
    # A peer that gives less than all rows' gradients is for the record: being slower than it is no goal missed.
    limits = {name: limit for name, _, limit, *_ in judged}
    assert limits[f"ours over trl_chunked, {large}"] == 1.0 and found[f"ours over quack, {large}"] > 1
    assert limits[f"ours over quack, {large}"] is None and set(goals.BEATEN) <= set(bench("peers").PROVIDERS)
    assert found["row kernel over copy bandwidth, worst vocabulary"] == 0.9
    assert found[f"frozen head, {square}"] is None
    monkeypatch.setattr("sys.argv", ["gpu_goals.py", "judge", "--out", str(tmp_path)])
    assert goals.main() == 0  # nothing was measured, nothing was missed
    written = json.loads((tmp_path / "goals.json").read_text())["goals"]
    assert {goal["verdict"] for goal in written} == {"not measured"}


def test_what_a_gpu_times_is_queued_behind_a_spin(bench, monkeypatch):
    """The order of what the stream gets, with PyTorch's side played: the spin, the clock, the work, the clock."""
    roofline, told, still_spinning = bench("roofline"), [], iter([False, True, True])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def query(self):
            return not next(still_spinning)

        def elapsed_time(self, end):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: told.append(cycles))
    monkeypatch.setattr(roofline, "spin_rate", lambda: 1e9)
    # The first spin is over before the three calls are launched: a longer one, and the first one's time is not taken.
    assert roofline.timed(lambda: told.append("work"), "cuda", repeats=3) == (0.002, True)
    once = ["event", "work", "work", "work", "event", "wait"]
    assert told == ["wait", 2_000_000, *once, "wait", 10_000_000, *once]
    still_spinning = iter([False] * 3)
    assert roofline.timed(lambda: None, "cuda") == (0.006, False)  # it waits inside, whatever the spin: said so


def test_judge_takes_ours_where_a_peer_broke_the_run(bench, tmp_path, monkeypatch):
    harness, goals = bench("harness"), bench("gpu_goals")
    about = {"dtype": "bfloat16", "device": "cuda", "seed": 0, "threads": 1, "rounds": 3, "rates": {}}

    def result(seconds):
        ours = {"job": "rows", "regime": "kept", "level": "op", "status": "ok", "peak_bytes": 1 << 30, "queued": False}
        taken = {"p50_s": seconds, "times_s": [seconds] * 3} if seconds else {"status": "failed", "reason": "illegal"}
        return about | {"shape": goals.LARGE, "rows": {"fastpo_kept": ours | taken}}

    monkeypatch.setattr("sys.argv", ["gpu_goals.py", "judge", "--out", str(tmp_path)])
    for peers_run, value in ((None, 40.0), (0.045, 45.0)):
        harness.write([result(0.040)], "ops", tmp_path / "ours")
        harness.write([result(peers_run)], "ops", tmp_path)
        assert goals.main() == 0
        written = json.loads((tmp_path / "goals.json").read_text())
        assert written["goals"][0]["value"] == pytest.approx(value)
        assert written["not_queued"] == ["fastpo_kept, 8192x4096x151936"]

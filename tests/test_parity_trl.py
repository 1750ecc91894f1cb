"""bench/parity_trl.py passes, case by case. Needs TRL: here, or in the interpreter FASTPO_BENCH_PYTHON names."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("FASTPO_BENCH_DATA", ROOT.parent / "shared" / "data")) / "hh_dialogues.jsonl.gz"


def _python() -> str:
    if os.environ.get("FASTPO_BENCH_PYTHON"):
        return os.environ["FASTPO_BENCH_PYTHON"]
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed: pip install -e '.[bench]', or set FASTPO_BENCH_PYTHON")
    return sys.executable


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sigmoid", "ipo", "hinge", "shuffled", "simpo"])
def test_parity_with_trl(case, tmp_path):
    python = _python()
    if not DATA.exists():
        pytest.skip(f"{DATA} is not there (FASTPO_BENCH_DATA names its folder)")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "FASTPO_CACHE": str(tmp_path),
        "PYTHONPATH": str(ROOT),  # this checkout, whether or not that interpreter has fastpo
        "PYTHONSAFEPATH": "1",
        "TQDM_DISABLE": "1",
    }
    script = ROOT / "bench" / "parity_trl.py"
    run = subprocess.run(
        [python, str(script), "--case", case, "--no-write"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert f"| {case} |" in run.stdout

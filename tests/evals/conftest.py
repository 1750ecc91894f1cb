"""The scripts that wrote the frozen numbers are imported by the tests, which make the same inputs, as are the cases
that several files of tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent))

from evaluate_cases import MINE, PROMPTS, THEIRS

import fastpo


@pytest.fixture
def go(tmp_path):
    """`go(NAME, **options)` in the test's folder `out`."""

    def run(name, folder="out", **options):
        given = {"prompts": PROMPTS, "output_dir": str(tmp_path / folder), **options}
        if name != "rewardbench":
            given = {"model": MINE, "baseline": THEIRS, **given}
        return fastpo.evaluate(name, {k: v for k, v in given.items() if v is not None})

    return run


@pytest.fixture(scope="session")
def policies(toy, tmp_path_factory):
    """Two policies of the toy kind."""
    out = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"policy-{seed}")
        toy.tokenizer().save_pretrained(folder)
        torch.manual_seed(seed)
        toy.model().save_pretrained(folder)
        out.append(str(folder))
    return out

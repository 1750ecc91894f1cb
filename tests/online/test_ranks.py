"""Two gloo ranks train as one process does: the same responses, weights and metrics."""

from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results(preloaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "results.pt"
    done = preloaded.run(TESTS / "online_ranks.py", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(out, weights_only=True)


CASES = ["grpo", "reference", "rloo", "certain", "entropy", "dynamic", "online_dpo", "nash_md", "lora", "left out"]
# What depends on how rows are packed.
OF_PACKING = {"packing_efficiency", "tokens_per_second", "shared_prompt_savings", "train_samples_per_second"}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(results, case):
    one, two = results[case]["1"], results[case]["2"]
    assert one["responses"] == two["responses"] and one["responses"]
    assert max(float(p.abs().max()) for p in one["moved"].values()) > 1e-3
    for name, weight in one["weights"].items():
        assert (weight - two["weights"][name]).abs().max() < 1e-6, name
    assert len(one["logs"]) == len(two["logs"])
    for mine, theirs in zip(one["logs"], two["logs"]):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - OF_PACKING:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


def test_a_reward_function_that_fails_on_one_rank_ends_both(results):
    assert results["raises"] == ["reward function 'broken' could not judge any"] * 2

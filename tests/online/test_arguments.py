"""TRL's GRPOConfig, given as args, trains; what is written of its completions is what the options say."""

import json

import pytest

import fastpo


def short(prompts, completions, **columns):
    return [-float(len(c)) for c in completions]


@pytest.mark.parametrize(
    "given, written", [({}, 4), ({"log_unique_prompts": True}, 2), ({"num_completions_to_print": 3}, 3)]
)
def test_a_grpo_config(tmp_path, toy, given, written):
    trl = pytest.importorskip("trl")
    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no",
        per_device_train_batch_size=4, num_generations=2, max_completion_length=4, log_completions=True, **given,
    )  # fmt: skip
    rows = [{"prompt": "w1 w2"}, {"prompt": "w3 w4"}]
    result = fastpo.train(toy.model(), rows, args=args, processing_class=toy.tokenizer(), reward_funcs=short)
    assert len(result.log_history) >= 1
    files = sorted((tmp_path / "run" / "completions").glob("*.jsonl"))
    assert len(files) == 1
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(lines) == written
    if "log_unique_prompts" in given:
        assert len({line["prompt"] for line in lines}) == 2

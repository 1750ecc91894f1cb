"""What a run is not resumed with: another base, adapter, batch or reference; a folder that is not fastpo's."""

import pytest
import torch

import fastpo
from fastpo.errors import ConfigError


@pytest.fixture
def run(toy, tmp_path):
    """`run(folder, **options)`: two steps of four of 20 rows, which leaves most rows unseen, and a checkpoint."""

    def call(folder="run", *, model=None, rest=None, **options):
        defaults = dict(
            output_dir=str(tmp_path / folder), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
            max_steps=2, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2, gradient_checkpointing=False,
            report=False, lr_scheduler_type="constant",
        )  # fmt: skip
        return fastpo.train(
            toy.model() if model is None else model, toy.rows(20), processing_class=toy.tokenizer(),
            args={**defaults, **options}, **(rest or {}),
        )  # fmt: skip

    return call


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_adapter_on_another_base_or_with_another_scale(toy, run):
    """Neither shows in the shapes of what is trained."""
    peft = pytest.importorskip("peft", reason="needs peft")

    def adapter(**changes):
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
        return {"peft_config": peft.LoraConfig(**{**config.to_dict(), **changes})}

    whole = run("whole", rest=adapter(), max_steps=4)
    run(rest=adapter())
    go_on = dict(max_steps=4, resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="checkpoint-2' was trained on another base: the weights that are not"):
        run(model=toy.model(seed=1), rest=adapter(), **go_on)
    with pytest.raises(ConfigError, match="checkpoint-2' has another adapter: default.lora_alpha is 8 there and 32"):
        run(rest=adapter(lora_alpha=32), **go_on)
    assert torch.equal(weights(run(rest=adapter(), **go_on).model), weights(whole.model))


@pytest.mark.parametrize("given", [False, True], ids=["policy", "ref_model"])
def test_rows_first_visited_after_a_resume_need_the_same_reference(toy, run, given):
    """Half of a run's pairs against one reference and half against another would be trained on without a word."""

    def reference(seed):
        return {"rest": {"ref_model": toy.model(seed=seed)}} if given else {}

    whole = run("whole", **reference(3), max_steps=5)
    run(**reference(3))

    def other():
        return reference(4) if given else {"model": toy.model(seed=4)}

    run("other", **other(), max_steps=5)  # so that the cache could answer for every row, as of another reference
    for steps in (3, 5):
        with pytest.raises(ConfigError, match="checkpoint-2 lacks the reference's log-probabilities for rows"):
            run(**other(), max_steps=steps, resume_from_checkpoint=True)
    result = run(**reference(3), max_steps=5, resume_from_checkpoint=True)
    assert torch.equal(weights(result.model), weights(whole.model))


def test_an_evaluation_added_after_a_resume_needs_the_same_reference(toy, run):
    run()
    options = dict(max_steps=4, eval_steps=2, resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="to add steps or evaluation data, pass the model and ref_model"):
        run(model=toy.model(seed=4), rest={"eval_dataset": toy.rows(4, seed=1)}, **options)
    result = run(rest={"eval_dataset": toy.rows(4, seed=1)}, **options)
    assert [line["step"] for line in result.log_history if "eval_loss" in line] == [4]


def test_what_an_epoch_drops_depends_on_the_batch(run):
    """20 rows: batches of 8 drop four, batches of 4 none, with steps of 8 pairs both."""
    eight = dict(per_device_train_batch_size=8, dataloader_drop_last=True)
    four = dict(eight, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    run(**eight)
    with pytest.raises(ConfigError, match="last incomplete batch of 8 rows, this run of 4: with dataloader_drop_last"):
        run(**four, max_steps=4, resume_from_checkpoint=True)
    assert run(**eight, max_steps=4, resume_from_checkpoint=True).state.global_step == 4
    run("kept", **{**eight, "dataloader_drop_last": False})  # nothing is dropped: how a step is cut says nothing
    again = run("kept", **{**four, "dataloader_drop_last": False}, max_steps=4, resume_from_checkpoint=True)
    assert again.state.global_step == 4


@pytest.mark.parametrize("by", ["path", "folder", "newest"])
def test_a_checkpoint_of_transformers_is_named(run, tmp_path, by):
    folder = tmp_path / "run" / "checkpoint-7"
    folder.mkdir(parents=True)
    for name in ("training_args.bin", "optimizer.pt", "model.safetensors"):
        (folder / name).write_bytes(b"x")
    where = {"path": str(folder), "folder": str(folder.parent), "newest": True}[by]
    with pytest.raises(ConfigError, match="checkpoint-7' was written by transformers' Trainer.*model=.*checkpoint-7"):
        run(resume_from_checkpoint=where)

"""torch_compile: the same losses, gradients, checkpoints and resumed run as without, and layers that are compiled."""

import pytest
import torch
from safetensors.torch import load_file

import fastpo
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.models.modes import training_mode


@pytest.fixture
def run(toy, tmp_path):
    def call(name, model=None, rows=None, **options):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        defaults = dict(
            output_dir=str(tmp_path / name), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1, max_steps=3,
            per_device_train_batch_size=6, learning_rate=0.05, lr_scheduler_type="constant", optim="sgd", beta=0.5,
            report=False, max_tokens=120, share_prompts="always",
        )  # fmt: skip
        rest = options.pop("rest", {})
        result = fastpo.train(model or toy.model(), rows or toy.rows(18), processing_class=toy.tokenizer(),
                              args={**defaults, **options}, **rest)  # fmt: skip
        return result, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    return call


def weights(result):
    return {n: p.detach().clone() for n, p in result.model.named_parameters()}


CASES = {
    "plain": {"gradient_checkpointing": False},
    "bucket": {"gradient_checkpointing": True, "token_bucket": 60, "gradient_checkpointing_layers": 1},
    "adapter": {"gradient_checkpointing": True, "adapter": True},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == "adapter" else case for case in CASES]
)
def test_compiled_trains_as_uncompiled(toy, run, case):
    options = dict(CASES[case])
    rest = {"eval_dataset": toy.rows(5, seed=1)}
    if options.pop("adapter", False):
        from peft import LoraConfig

        rest["peft_config"] = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4)
    plain, none = run("plain", rest=rest, eval_steps=3, **options)
    got, graphs = run("compiled", rest=rest, eval_steps=3, torch_compile_backend="aot_eager", **options)
    assert none == 0 and 0 < graphs < 40
    for key in ("loss", "grad_norm", "eval_loss"):
        a, b = ([line[key] for line in r.log_history if key in line] for r in (plain, got))
        assert len(a) == (1 if key == "eval_loss" else 3) and a == pytest.approx(b, rel=1e-5)
    ours, theirs = weights(got), weights(plain)
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        assert (ours[name] - w).abs().max() <= 1e-5 * w.abs().max(), name


@pytest.mark.slow
def test_names_and_resume(toy, run, tmp_path):
    """A checkpoint of a compiled run has the model's own names, and the run goes on from it bit for bit. Half of the
    steps compile as much as all, though each has other sizes: what is compiled is for any number of tokens."""
    options = {"torch_compile_backend": "aot_eager", "max_steps": 4, "save_steps": 2, "optim": "adamw_torch_fused"}
    whole, graphs = run("whole", **options)
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert not any("_orig_mod" in name for name in saved) and set(saved) == set(toy.model().state_dict())
    resumed, fewer = run("resumed", **options, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert 0 < graphs == fewer
    for name, w in weights(whole).items():
        assert torch.equal(weights(resumed)[name], w), name
    assert TrainConfig(torch_compile_mode="default").torch_compile and not TrainConfig().torch_compile


def test_outside_training_the_layers_are_the_models_own(toy):
    from fastpo.models.policy import Policy

    model = toy.model()
    ids = torch.arange(8)[None]
    before = model(ids).logits
    config = TrainConfig(torch_compile_backend="aot_eager")
    policy = Policy(model)
    torch._dynamo.utils.counters.clear()
    with training_mode(policy, config), policy.detached():
        assert torch.equal(model(ids).logits, before)
        model.generate(ids, max_new_tokens=3, pad_token_id=0)
    assert not torch._dynamo.utils.counters["stats"] and "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"torch_compile_backend": "inductr"}, "inductr"), ({"torch_compile_mode": "reduce-overhead"}, "CUDA graphs"),
     ({"torch_compile": True, "fsdp": "full_shard"}, "does not go with fsdp")],
    ids=["backend", "mode", "fsdp"],
)  # fmt: skip
def test_refused(run, options, message):
    with pytest.raises(ConfigError, match=message):
        run("refused", **options)

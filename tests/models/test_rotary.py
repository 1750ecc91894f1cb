"""Position embeddings that a model takes from the longest row of a forward: every packed row as if it were alone."""

import numpy as np
import pytest
import torch
import transformers

from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import UnsupportedModelError
from fastpo.models import rotary
from fastpo.models.policy import Policy
from fastpo.models.verify import verify_policy

LIMIT = 16  # tokens up to which the frequencies stand still
SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, initializer_range=0.3)  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 5.0, 9.0, 20.0],
        "original_max_position_embeddings": LIMIT}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
MODELS = {
    "phi3_longrope": ("Phi3", dict(max_position_embeddings=512, original_max_position_embeddings=LIMIT,
                                   rope_parameters={**LONG, "partial_rotary_factor": 1.0})),
    "llama_longrope": ("Llama", dict(max_position_embeddings=512, rope_parameters=LONG)),
    "llama_dynamic": ("Llama", dict(max_position_embeddings=LIMIT, rope_parameters=DYNAMIC)),
    "phimoe": ("Phimoe", dict(max_position_embeddings=512, num_local_experts=2,
                              rope_parameters={**LONG, "short_mscale": 1.2, "long_mscale": 1.5})),
    "qwen2_dynamic": ("Qwen2", dict(max_position_embeddings=LIMIT, rope_parameters=DYNAMIC)),
}  # fmt: skip


def make_model(name: str, **changes) -> torch.nn.Module:
    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return model if family == "Phimoe" else model.double()  # whose grouped multiply has no fp64


def make_examples(*shapes: tuple[int, tuple[int, ...]], share: bool = False) -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(3, SIZES["vocab_size"], n).astype(np.int32)

    return [
        Example(prompt_ids=ids(p), responses=[ids(n) for n in lengths], pairs=[(0, 1)], share=share, share_from=share)
        for p, lengths in shapes
    ]


def alone(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """Each response by the model's own forward of its whole row, from a fresh state."""
    parts = []
    for example in examples:
        for response in example.responses:
            rotary.fresh(model)
            row = torch.tensor([[*example.prompt_ids, *response]])
            logp = model(row, use_cache=False).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            parts.append(logp.gather(-1, row[0, -len(response) :, None]).squeeze(-1))
    return torch.cat(parts)


def packed(policy: Policy, examples: list[Example]) -> torch.Tensor:
    with policy.attach():
        return policy.logp(collate(examples, range(len(examples))))


# Rows below, at and just past the limit, where the last token alone makes the length; and far beyond.
SHAPES = [(5, (3, 4)), (10, (LIMIT - 10, LIMIT - 9)), (10, (30, 41)), (2, (1, 60))]


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_as_if_alone(name):
    model = make_model(name)
    policy, examples = Policy(model), make_examples(*SHAPES)
    with torch.no_grad():
        want, got = alone(model, examples), packed(policy, examples)
    atol = 2e-6 if want.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)
    batch_of_short = make_examples(*SHAPES)[:1]
    with torch.no_grad():
        torch.testing.assert_close(packed(policy, batch_of_short), got[:7], rtol=0, atol=atol)
    verify_policy(policy, examples)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "phimoe"])
def test_gradients_are_those_of_the_rows_alone(name):
    model = make_model(name)
    examples = make_examples(*SHAPES[:3])
    parameters = list(model.parameters())
    want = torch.autograd.grad(alone(model, examples).sum(), parameters)
    got = torch.autograd.grad(packed(Policy(model), examples).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 2e-6 * (1 + b.abs().max())


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_the_model_itself_is_as_it_was(name):
    model = make_model(name)
    row = torch.arange(3, 40)[None]
    with torch.no_grad():
        short, before = model(row[:, :6]).logits, model(row).logits
        policy = Policy(model)
        packed(policy, make_examples(*SHAPES))
        assert torch.equal(model(row).logits, before)
        assert all("forward" not in vars(m) for m in model.modules())
        rotary.fresh(model)
        assert torch.equal(model(row[:, :6]).logits, short)


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_prompts_are_shared_where_all_rows_have_one_set_of_frequencies(name):
    model = make_model(name)
    policy = Policy(model)
    examples = make_examples((6, (3, 4, 5)), (6, (3, 30, 4)), share=True)
    assert rotary.unshare(policy.trunk, examples) == 1
    assert [e.share for e in examples] == [True, False]
    with torch.no_grad():
        torch.testing.assert_close(packed(policy, examples).double(), alone(model, examples), rtol=0, atol=2e-6)
        straddling = make_examples((6, (3, 30)), share=True)
        with pytest.raises(UnsupportedModelError, match="share_prompts=never"):
            packed(policy, straddling)


@pytest.mark.parametrize("name", MODELS)
def test_the_guard_sees_a_forward_that_takes_the_longest_row(name, monkeypatch):
    monkeypatch.setattr(rotary, "modules_by_length", lambda trunk: [])
    with pytest.raises(UnsupportedModelError):
        verify_policy(Policy(make_model(name)), make_examples(*SHAPES))


def test_a_run_does_not_depend_on_its_micro_batches(toy, sgd_run, monkeypatch):
    """Losses, the reference's cache, an evaluation before training: faults of the longest row of a micro-batch."""
    rope = dict(max_position_embeddings=24, rope_parameters=DYNAMIC, initializer_range=0.3)
    monkeypatch.setattr(type(toy), "model", staticmethod(lambda _make=toy.model: _make(**rope)))
    rows = toy.rows(6, seed=3) + [{**toy.rows(1, seed=5)[0], "chosen": " " + " ".join(["w1", "w2"] * 25)}]
    results = [sgd_run(rows, {"eval_dataset": rows[:2]}, max_tokens=n, max_steps=2, eval_strategy="steps", eval_steps=1,
                       eval_on_start=True, share_prompts="never") for n in (64, 100_000)]  # fmt: skip
    a, b = ([x["loss"] for x in r.log_history if "loss" in x] for r in results)
    assert a == pytest.approx(b, rel=1e-5)
    for result in results:
        first = next(x["eval_loss"] for x in result.log_history if "eval_loss" in x)
        assert first == pytest.approx(np.log(2), abs=1e-5)

"""Sample generations: the model's own greedy answers, and nothing of the run is moved by them."""

import random

import pytest
import torch

from fastpo import data
from fastpo.errors import ConfigError
from fastpo.training.samples import generate_samples


@pytest.fixture(scope="module")
def examples(toy):
    return data.prepare_examples(toy.rows(4), toy.tokenizer(), kind="preference", max_length=128)[0]


def greedy(model, tokenizer, ids: list[int], tokens: int) -> list[int]:
    """Argmax, one forward of the whole row a token."""
    out = []
    for _ in range(tokens):
        out.append(int(model(input_ids=torch.tensor([ids + out])).logits[0, -1].argmax()))
        if out[-1] in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
            break
    return out


def test_answers_are_greedy_and_texts_the_datas_own(toy, examples):
    """Also where the checkpoint brings sampling and a repetition penalty of its own."""
    model, tokenizer, rows = toy.model().eval(), toy.tokenizer(), toy.rows(4)
    expected = [greedy(model, tokenizer, e.prompt_ids.tolist(), 12) for e in examples]
    model.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=1.5, top_k=5)
    samples = generate_samples(model, tokenizer, examples, 3, {"max_new_tokens": 12})
    assert [s["index"] for s in samples] == [0, 1, 2]
    for sample, row, tokens in zip(samples, rows, expected, strict=False):
        assert sample["prompt"] == row["prompt"] and sample["chosen"] == row["chosen"].strip()
        assert sample["answer"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert sample["new_tokens"] == len(tokens) and sample["ended"] == (len(tokens) < 12)
    assert any(s["ended"] for s in samples) and not all(s["ended"] for s in samples)


def test_everything_is_left_as_it_was(toy, examples):
    model = toy.model().train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.generation_config.temperature = 0.3
    own, modes = model.generation_config, [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    generate_samples(model, toy.tokenizer(), examples, 1, {"do_sample": True, "max_new_tokens": 4})
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is False and model.generation_config is own and own.temperature == 0.3
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_sampling_is_seeded(toy, examples):
    """The same from any random state; another seed gives other answers."""
    model, tokenizer = toy.model(), toy.tokenizer()
    options = {"do_sample": True, "max_new_tokens": 12, "temperature": 5.0}
    first = generate_samples(model, tokenizer, examples, 2, options)
    torch.rand(3)
    assert generate_samples(model, tokenizer, examples, 2, options) == first
    assert generate_samples(model, tokenizer, examples, 2, options, seed=1) != first


def test_learnt_positions_are_not_exceeded(toy, examples):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    longest = max(len(e.prompt_ids) for e in examples)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=longest + 3, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
    )
    samples = generate_samples(model, toy.tokenizer(), examples, 4)
    for sample, example in zip(samples, examples, strict=True):
        assert sample["new_tokens"] == longest + 3 - len(example.prompt_ids) or sample["ended"]


def test_an_adapter_answers(toy, examples):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(toy.model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    bare = generate_samples(model, toy.tokenizer(), examples, 1, {"max_new_tokens": 8})
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=5.0)
    assert generate_samples(model, toy.tokenizer(), examples, 1, {"max_new_tokens": 8}) != bare


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"max_new_token": 5}, "no 'max_new_token'; did you mean 'max_new_tokens'"),
        ({"streamer": None}, "streamer is set by the samples"),
        ({"do_sample": True, "temperature": -1.0}, "strictly positive"),
        ({"num_beams": 0}, "generation_kwargs: "),
    ],
)
def test_bad_arguments(toy, examples, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        generate_samples(toy.model(), toy.tokenizer(), examples, 1, kwargs)

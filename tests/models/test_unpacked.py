"""Models that cannot be packed: taken unpacked by themselves, with one line, exact; refused where that is wrong too."""

import logging

import numpy as np
import pytest
import torch
import transformers

import fastpo
from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import UnsupportedModelError
from fastpo.models.policy import Policy
from fastpo.models.verify import verify_or_unpack

SIZES = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=2,
)  # fmt: skip
MODELS = {
    "Bloom": {"n_layer": 1, "n_head": 2},  # a position bias
    "Mamba": {"state_size": 4},
    "Qwen3Next": {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "linear_num_value_heads": 2,
                  "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                  "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "FalconH1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8, "mamba_n_groups": 1},
    "Jamba": {"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
                         "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2,
                         "shared_intermediate_size": 16},
    "StableLm": {},  # hands no keyword arguments to its attention
}  # fmt: skip
MODELS = {k: v for k, v in MODELS.items() if hasattr(transformers, f"{k}ForCausalLM")}


def make_model(name: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name], **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():  # far from the flat start
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.05))
    return model.eval()


def examples() -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(n):
        return rng.integers(3, 100, n).astype(np.int32)

    shapes = [(5, (3, 7), False), (9, (2, 4, 1), True), (1, (1, 6), False)]
    return [
        Example(prompt_ids=ids(p), responses=[ids(r) for r in lengths], pairs=[(0, 1)], share=share)
        for p, lengths, share in shapes
    ]


@pytest.mark.parametrize("name", MODELS)
def test_it_runs_unpacked_by_itself(name, caplog) -> None:
    model, rows = make_model(name), examples()
    with caplog.at_level(logging.WARNING, logger="fastpo"):
        policy = Policy(model)
        verify_or_unpack(policy, rows)
    assert policy.unpacked
    assert sum("unpacked" in record.message for record in caplog.records) == 1
    want = []
    for example in rows:
        for response in example.responses:
            row = torch.tensor([[*example.prompt_ids, *response]])
            logits = model(input_ids=row[:, :-1], use_cache=False).logits[0, -len(response) :]
            want.append(logits.log_softmax(-1).gather(-1, row[0, -len(response) :, None]).squeeze(-1))
    want = torch.cat(want)
    slope = torch.linspace(-1, 1.5, len(want))
    (want * slope).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with policy.attach():
        got = policy.logp(collate(rows, range(len(rows))))
        (got * slope).sum().backward()
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    largest = max(float(g.abs().max()) for g in grads.values())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(grads)
    for key, grad in grads.items():
        assert (model.get_parameter(key).grad - grad).abs().max() <= 1e-5 * largest, key


def test_a_run_trains_as_with_the_switch(toy, tmp_path, monkeypatch, caplog) -> None:
    """Policy and reference of a hybrid: the same numbers as FASTPO_ATTENTION=own, which the log does not speak of."""
    args = dict(use_cpu=True, bf16=False, disable_tqdm=True, max_steps=2, logging_steps=1, learning_rate=1e-2,
                per_device_train_batch_size=4, report=False, save_final=False)  # fmt: skip

    def losses(folder):
        result = fastpo.train(make_model("Lfm2"), toy.rows(8), processing_class=toy.tokenizer(),
                              args={**args, "output_dir": str(tmp_path / folder)})  # fmt: skip
        return [line["loss"] for line in result.log_history if "loss" in line]

    with caplog.at_level(logging.WARNING, logger="fastpo"):
        mine = losses("a")
    assert "Lfm2ForCausalLM (lfm2) has conv layers" in caplog.text
    monkeypatch.setenv("FASTPO_ATTENTION", "own")
    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "cache"))
    assert losses("b") == mine
    assert mine[0] == pytest.approx(np.log(2), abs=1e-5)
    assert mine[1] != mine[0]


class Tempered(transformers.LlamaForCausalLM):
    """A logit rule that nobody knows: unpacked it is as wrong."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


def test_a_wrong_rule_is_refused_all_the_same(toy) -> None:
    torch.manual_seed(0)
    model = Tempered(transformers.LlamaConfig(**SIZES))
    policy = Policy(model)
    with pytest.raises(UnsupportedModelError, match="Tempered: fastpo's log-probabilities differ"):
        verify_or_unpack(policy, examples())
    assert not policy.unpacked

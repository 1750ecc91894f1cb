"""The start guard on both sides: peaked logits of every family pass in every precision, each kind of fault is found."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpo.data import Example
from fastpo.data.packing import PackedBatch, collate
from fastpo.errors import UnsupportedModelError
from fastpo.models import verify as module
from fastpo.models.attention import packed_attention
from fastpo.models.policy import Policy
from fastpo.models.verify import guard_rows, verify_policy

_spec = importlib.util.spec_from_file_location("fastpo_test_model", Path(__file__).with_name("test_policy.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)
FAMILIES, VOCABULARY, WINDOW = families.FAMILIES, families.VOCABULARY, families.WINDOW
make_examples, make_model = families.make_examples, families.make_model

WINDOWED = [f for f, (_, kwargs) in FAMILIES.items() if "sliding_window" in kwargs]
CAPPED = ["gemma2", "gemma3"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peaked_model(family: str, dtype: torch.dtype = torch.float32, **overrides: object):
    """A tiny model whose logits are as peaked as a trained one's, of 10 to 25."""
    caps = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 5.0} if family in CAPPED else {}
    if family == "gemma3":
        del caps["attn_logit_softcapping"]
    if family in ("opt", "gpt2"):
        caps["tie_word_embeddings"] = False
    model = make_model(family, **{**caps, **overrides})
    row = torch.as_tensor(make_examples()[0].prompt_ids)[None].long()
    with torch.no_grad():
        peak = float(model(row).logits.abs().max())
        head = model.get_output_embeddings()
        factor = 25.0 / peak
        if not model.config.tie_word_embeddings:
            head.weight.mul_(factor)
        elif hasattr(model, "model") and hasattr(model.model, "norm"):
            norm = model.model.norm
            one = 1.0 if "RMSNorm" in type(norm).__name__ and type(norm).__name__.startswith("Gemma") else 0.0
            norm.weight.add_(one).mul_(factor).sub_(one)
    return model.to(dtype)


def lora(model: torch.nn.Module) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast", "lora"])
def test_peaked_logits_pass(family: str, how: str) -> None:
    model = peaked_model(family, torch.bfloat16 if how == "bf16" else torch.float32)
    row = torch.as_tensor(make_examples()[0].prompt_ids)[None].long()
    with torch.no_grad():
        assert model(row).logits.abs().max() > 10
    policy = Policy(lora(model) if how == "lora" and family != "gpt_oss" else model)
    for seed in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            verify_policy(policy, make_examples(seed=seed, share=seed == 1))


def in_responses(change) -> object:  # noqa: ANN001
    """A collate whose positions after the prompts are changed: `change(positions, prompt length)`."""

    def wrong(examples: list[Example], indices: range) -> PackedBatch:
        batch = collate(examples, indices)
        positions, offsets = batch.position_ids.clone(), batch.response_offsets.tolist()
        for a, b in zip(offsets, offsets[1:], strict=False):
            rows = batch.logit_rows[a:b]
            positions[rows[1:]] = change(batch.position_ids[rows[1:]], int(batch.position_ids[rows[0]]) + 1)
        return dataclasses.replace(batch, position_ids=positions)

    return wrong


POSITIONS = {
    "one_on": lambda positions, prompt: positions + 1,
    "one_back": lambda positions, prompt: positions - 1,
    "restarted": lambda positions, prompt: positions - prompt,
}


@pytest.mark.parametrize("fault", POSITIONS)
@pytest.mark.parametrize("share", [False, True], ids=["", "branches"])
def test_wrong_positions_are_found_in_the_batch(fault: str, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own check, which compares whole numbers: in any precision, and of any model."""
    monkeypatch.setattr(module, "collate", in_responses(POSITIONS[fault]))
    with pytest.raises(UnsupportedModelError, match="order or positions.*packed wrongly"):
        verify_policy(Policy(peaked_model("llama")), make_examples(share=share))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", POSITIONS)
@pytest.mark.parametrize("share", [False, True], ids=["", "branches"])
def test_wrong_positions_are_found(family: str, fault: str, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the numbers, without the batch's own check."""
    policy = Policy(peaked_model(family))
    monkeypatch.setattr(module, "collate", in_responses(POSITIONS[fault]))
    monkeypatch.setattr(module, "check_batch", lambda *args: None)
    with pytest.raises(UnsupportedModelError, match="own logits.*(attention or positions|packed together)"):
        verify_policy(policy, make_examples(share=share)[:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_mispaired_rows_are_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(examples: list[Example], indices: range) -> PackedBatch:
        batch = collate(examples, indices)
        return dataclasses.replace(batch, pairs=batch.pairs.flip(1))

    monkeypatch.setattr(module, "collate", wrong)
    with pytest.raises(UnsupportedModelError, match="paired or packed wrongly"):
        verify_policy(Policy(peaked_model(family)), make_examples())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_wrong_scale_is_found(family: str, dtype: torch.dtype) -> None:
    policy = Policy(peaked_model(family, dtype))
    policy.logit_scale *= 0.8
    with pytest.raises(UnsupportedModelError, match="from its own hidden states: its head has a rule"):
        verify_policy(policy, make_examples())


@pytest.mark.parametrize("family", CAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_missing_soft_cap_is_found(family: str, dtype: torch.dtype) -> None:
    policy = Policy(peaked_model(family, dtype))
    policy.softcap = None
    with pytest.raises(UnsupportedModelError, match="from its own hidden states: its head has a rule"):
        verify_policy(policy, make_examples())


def _register(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Packed attention that leaves something out."""
    from transformers import AttentionInterface

    def wrong(module, query, key, value, attention_mask=None, **kwargs):  # noqa: ANN001, ANN003, ANN202
        for name, change in changes.items():
            kwargs[name] = change(kwargs.get(name)) if callable(change) else change
        return packed_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(module, "check_attention_pattern", lambda *args: None)
    monkeypatch.setitem(AttentionInterface._global_mapping, "fastpo", wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_attention_scale_is_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(peaked_model(family))
    _register(monkeypatch, scaling=lambda s: 0.7 * s)
    with pytest.raises(UnsupportedModelError, match="not from its own hidden states: its layers have a rule"):
        verify_policy(policy, make_examples())


@pytest.mark.parametrize("family", WINDOWED)
def test_a_missing_window_is_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(peaked_model(family))
    assert max(len(e.prompt_ids) for e in make_examples()) > WINDOW
    _register(monkeypatch, sliding_window=None)
    with pytest.raises(UnsupportedModelError, match="not from its own hidden states: its layers have a rule"):
        verify_policy(policy, make_examples())


@pytest.mark.parametrize(("family", "what"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_a_missing_cap_or_sink_of_attention_is_found(family: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(peaked_model(family))
    _register(monkeypatch, **{what: None})
    with pytest.raises(UnsupportedModelError, match="not from its own hidden states: its layers have a rule"):
        verify_policy(policy, make_examples())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_real_vocabularies_pass(dtype: torch.dtype) -> None:
    """fp32 log-softmax on a CPU is off by 1e-5 there, in one direction."""
    for vocabulary in (49_152, 262_144):
        model = peaked_model("llama", dtype, vocab_size=vocabulary)
        verify_policy(Policy(model), make_examples())


def test_own_log_probabilities_are_those_of_fp64() -> None:
    model = peaked_model("llama", vocab_size=151_936)
    row = torch.as_tensor(np.concatenate([make_examples()[0].prompt_ids, make_examples()[0].responses[1]])).long()
    with torch.no_grad():
        logp, _ = module._own_row(model, row, 7)
        logits = model(row[None]).logits[0, -8:-1].double()
    want = logits.log_softmax(-1).gather(-1, row[-7:, None]).squeeze(-1)
    assert logp.dtype == torch.float64
    torch.testing.assert_close(logp, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["head", "norm"])
def test_logits_that_are_not_finite_are_called_that(where: str) -> None:
    model = make_model("llama")
    with torch.no_grad():
        if where == "norm":
            model.model.norm.weight[3] = float("nan")
        else:
            model.lm_head.weight.fill_(3e38)
    weights = ".*weights are not, first model.norm.weight" if where == "norm" else r" .*of \d+ tokens$"
    with pytest.raises(UnsupportedModelError, match="own logits are not finite.*row 0" + weights) as caught:
        verify_policy(Policy(model), make_examples())
    assert "fastpo" not in str(caught.value)


def test_the_longest_row_is_packed_beside_short_ones() -> None:
    rng = np.random.default_rng(0)

    def example(prompt: int, *lengths: int, share: bool = False) -> Example:
        ids = [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in (prompt, *lengths)]
        return Example(ids[0], ids[1:], [(i, i + 1) for i in range(len(lengths) - 1)], share=share)

    first = [example(5, 3, 4), example(6, 2, 2), example(20, 3, 3, share=True), example(1, 1, 1), example(9, 2, 9)]
    far = example(30, 3, 12, 4, 5)
    rows = guard_rows(Policy(make_model("llama")), first, [*first, far])
    assert rows[0] is first[2]
    assert [len(e.prompt_ids) for e in rows[1:3]] == [1, 6]
    assert [len(r) for r in rows[3].responses] == [3, 12]
    assert rows[3].pairs == [(0, 1)]
    assert len(guard_rows(Policy(make_model("llama")), first[2:3], first)) == 1
    eager = make_model("llama")
    eager.set_attn_implementation("eager")
    limit, module._MOST_BYTES = module._MOST_BYTES, 8 * 4 * 25**2  # four heads, two squares of 25 tokens in fp32
    try:
        assert max(map(module._length, guard_rows(Policy(eager), first[:1], [*first, far]))) == 23
    finally:
        module._MOST_BYTES = limit

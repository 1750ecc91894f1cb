"""A row's numbers do not depend on what it is packed with: frequencies, chunks and temperatures by chain."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fastpo import rotary
from fastpo.data import Example
from fastpo.errors import UnsupportedModelError
from fastpo.layout import Layout
from fastpo.model import Policy
from fastpo.packing import collate
from fastpo.verify import guard_rows, verify_policy

_spec = importlib.util.spec_from_file_location("fastpo_test_model", Path(__file__).with_name("test_model.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

SIZES = {**families._SIZES, "max_position_embeddings": 512}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 7.0, 13.0, 19.0]}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **FACTORS}
NTK = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
MODELS = {
    "phi3": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "phimoe": ("Phimoe", {"rope_parameters": {**LONG, "short_mscale": 1.2, "long_mscale": 1.5}}),
    "llama_longrope": ("Llama", {"rope_parameters": LONG}),
    "llama_dynamic": ("Llama", {"rope_parameters": NTK, "max_position_embeddings": 16}),
    "qwen3_dynamic": ("Qwen3", {"rope_parameters": NTK, "max_position_embeddings": 16, "head_dim": 8}),
    "gpt_neox_dynamic": ("GPTNeoX", {"rope_parameters": NTK, "max_position_embeddings": 16, "rotary_pct": 1.0}),
}  # fmt: skip
LLAMA4 = {
    "num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "floor_scale": 6,
    "attn_scale": 0.5, "attn_temperature_tuning": True, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spread(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return model.eval()


def make(name: str) -> transformers.PreTrainedModel:
    family, kwargs = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **copy.deepcopy(kwargs)})  # which it writes into
    return spread(transformers.AutoModelForCausalLM.from_config(config))


def make_llama4(**overrides: object) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    return spread(transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**SIZES, **LLAMA4, **overrides})))


def examples(*shapes: tuple[int, tuple[int, ...]], share: bool = False) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(
            prompt_ids=rng.integers(3, 97, p).astype(np.int32),
            responses=[rng.integers(3, 97, n).astype(np.int32) for n in lengths],
            pairs=[(0, 1)], share=share,
        )
        for p, lengths in shapes
    ]  # fmt: skip


SHORT, MIXED = [(3, (4, 6)), (5, (2, 9))], [(3, (4, 6)), (20, (3, 9)), (8, (5, 30)), (9, (8, 9)), (2, (1, 1))]


def alone(model: torch.nn.Module, rows: list[Example]) -> torch.Tensor:
    """By the model's own forward, each response from a fresh state."""
    parts = []
    for row in rows:
        for k in range(len(row.responses)):
            rotary.fresh(model)
            parts.append(families.own_logps(model, [Example(row.prompt_ids, [row.responses[k]])]))
    return torch.cat(parts)


@pytest.mark.parametrize("name", MODELS)
def test_each_row_has_the_numbers_it_has_alone(name: str) -> None:
    model, rows = make(name), examples(*MIXED)
    policy, want = Policy(model), alone(model, rows)
    for part in ([0, 1, 2, 3, 4], [2, 0], [0], [4, 2, 1]):
        with policy.attach():
            got = policy.logp(collate(rows, part))
        expected = alone(model, [rows[i] for i in part])
        families.assert_close(name, got.detach(), expected.detach(), 1e-5)
    verify_policy(policy, rows)
    assert torch.equal(alone(model, rows), want)  # no state is left behind
    assert "forward" not in vars(rotary.modules_by_length(policy.trunk)[0])


@pytest.mark.parametrize("name", ["phi3", "phimoe", "llama_dynamic"])
def test_the_guard_finds_frequencies_of_the_longest_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_groups", lambda layout, rules, device: ([torch.arange(layout.cu_seqlens[-1])], None))
    policy = Policy(make(name))
    verify_policy(policy, examples(*SHORT))
    rows = guard_rows(policy, examples(*SHORT), examples(*MIXED))
    with pytest.raises(UnsupportedModelError, match="only where rows are packed together.*from the whole batch"):
        verify_policy(policy, rows)


def test_gradients_are_those_of_rows_alone() -> None:
    for name in ("phi3", "llama_dynamic"):
        model, rows = make(name), examples(*MIXED)
        policy = Policy(model)
        want = families.gradients(model, alone(model, rows))
        with policy.attach():
            got = families.gradients(model, policy.logp(collate(rows, range(len(rows)))))
        largest = max(float(g.abs().max()) for g in want.values())
        for parameter in want:
            families.assert_close(parameter, got[parameter], want[parameter], 1e-5, scale=0.1 * largest)


@pytest.mark.parametrize("name", ["phi3", "llama_dynamic"])
def test_a_shared_prompt_has_one_length(name: str) -> None:
    """Within the unchanged range a prompt is shared; beyond, each response has its own copy, and sharing is refused."""
    model = make(name)
    policy, rows = Policy(model), examples(*MIXED, share=True)
    assert rotary.unshare(policy.trunk, rows) == 3
    assert [e.share for e in rows] == [True, False, False, False, True]
    with policy.attach():
        got = policy.logp(collate(rows, range(len(rows))))
    families.assert_close(name, got.detach(), alone(model, rows).detach(), 1e-5)
    forced = examples((8, (5, 30)), share=True)
    with policy.attach(), pytest.raises(UnsupportedModelError, match="share_prompts=never"):
        policy.logp(collate(forced, [0]))
    plain = Policy(families.make_model("llama"))
    assert rotary.unshare(plain.trunk, forced) == 0
    assert forced[0].share


# ---- Llama 4


@pytest.mark.parametrize("share", [False, True], ids=["", "shared"])
def test_llama4_text(share: bool) -> None:
    """Chunks of 8, temperatures from 6 tokens on and a layer without rotary embedding, in rows of up to 38 tokens."""
    model = make_llama4()
    policy, rows = Policy(model), examples(*MIXED, (2, (3, 5)), share=share)
    assert type(policy.trunk).__name__ == "Llama4TextModel"
    rotary.unshare(policy.trunk, rows)
    assert [e.share for e in rows] == [False, False, False, False, share, share]
    families.assert_same(model, rows, 1e-5, policy)
    verify_policy(policy, rows)
    assert model.model.layers[3].self_attn.attn_temperature_tuning
    with policy.attach(), pytest.raises(UnsupportedModelError, match="chunk of 8 tokens"):
        policy.logp(collate(examples((6, (3, 5)), share=True), [0]))


@pytest.mark.parametrize("what", ["own_temperatures", "chunk_of"])
def test_the_guard_finds_what_llama4_needs(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    from fastpo import attention

    policy = Policy(make_llama4())
    wrong = (lambda trunk, **kwargs: contextlib.nullcontext()) if what == "own_temperatures" else (lambda module: None)
    monkeypatch.setattr(attention, what, wrong)
    with pytest.raises(UnsupportedModelError, match="packed together|masked by 8 tokens"):
        verify_policy(policy, examples(*MIXED))


def test_a_decoder_that_is_a_causal_model_is_seen_through() -> None:
    inner = families.make_model("llama")

    class Wrapper(transformers.LlamaPreTrainedModel):
        base_model_prefix = "language_model"

        def __init__(self) -> None:
            super().__init__(inner.config)
            self.language_model = inner

        def get_output_embeddings(self):  # noqa: ANN202
            return self.language_model.get_output_embeddings()

        def get_input_embeddings(self):  # noqa: ANN202
            return self.language_model.get_input_embeddings()

        def forward(self, **kwargs: object):  # noqa: ANN202
            return self.language_model(**kwargs)

    policy = Policy(Wrapper().eval())
    assert policy.trunk is inner.model
    verify_policy(policy, examples(*MIXED))


def test_chunked_layout() -> None:
    layout = Layout.from_chains((0, 3, 14, 22))
    assert layout.chunked(16) is layout
    assert layout.chunked(4).cu_seqlens == (0, 3, 7, 11, 14, 18, 22)
    assert layout.chunked(4) is layout.chunked(4)
    assert layout.positions(torch.device("cpu")).tolist() == [*range(3), *range(11), *range(8)]

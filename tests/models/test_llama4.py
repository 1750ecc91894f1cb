"""Llama 4: chunks, temperatures by position, layers without rotary embedding; decoders that are causal models."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import UnsupportedModelError
from fastpo.models import rotary
from fastpo.models.layout import Layout
from fastpo.models.policy import Policy
from fastpo.models.verify import verify_policy

_spec = importlib.util.spec_from_file_location("fastpo_test_model", Path(__file__).with_name("test_policy.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

SIZES = {**families._SIZES, "max_position_embeddings": 512}
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


MIXED = [(3, (4, 6)), (20, (3, 9)), (8, (5, 30)), (9, (8, 9)), (2, (1, 1))]


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

    from fastpo.models import attention

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

"""Whether `share_prompts=auto` shares on a GPU: costs of weightless models, and which kernels have a form for trees.

No GPU is asked: what one can do is said here, and fake tensors stand for its own.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.data.packing import TrunkCost, set_sharing, sharing_mode, tree_size
from fastpo.models import attention, sharing
from fastpo.models.attention import Kind, tree_backend
from fastpo.models.flops import Flops
from fastpo.plan.weightless import Blueprint
from fastpo.training.distributed import World
from fastpo.training.micro_batches import MicroBatches
from fastpo.training.objective import Objective

GPU = torch.device("cuda")


def example(prompt: int, response: int, count: int = 2) -> Example:
    return Example(np.ones(prompt, np.int32), [np.full(response, 3 + k, np.int32) for k in range(count)], [(0, 1)])


@pytest.fixture(scope="module")
def blueprints(tmp_path_factory):
    """Two layers of an 8B and of a 135M Llama, a mixture of experts, and models with windows, caps and sinks."""
    from transformers import Gemma2Config, GptOssConfig, LlamaConfig, MixtralConfig

    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
                 num_key_value_heads=2, head_dim=16)  # fmt: skip
    configs = {
        "8b": LlamaConfig(
            vocab_size=1000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=2, num_attention_heads=32,
            num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        ),
        "135m": LlamaConfig(
            vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
            num_key_value_heads=3, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        ),
        "gemma2": Gemma2Config(**small, sliding_window=512, dtype="bfloat16", architectures=["Gemma2ForCausalLM"]),
        "gpt_oss": GptOssConfig(
            **small, sliding_window=4096, num_local_experts=4, dtype="bfloat16", architectures=["GptOssForCausalLM"]
        ),
        "mixtral": MixtralConfig(
            **small, num_local_experts=8, num_experts_per_tok=2, dtype="bfloat16", architectures=["MixtralForCausalLM"]
        ),
    }  # fmt: skip
    out = {}
    for name, config in configs.items():
        config.save_pretrained(folder := tmp_path_factory.mktemp(name))
        out[name] = Blueprint.of_name(str(folder), TrainConfig())
    return out


def cost_of(blueprint, config=None, backend="varlen", chip="NVIDIA H100 80GB HBM3", **options) -> TrunkCost:
    config = config or TrainConfig()
    with blueprint.mode:
        flops = Flops(blueprint.policy, torch.device("cpu"))
    defaults = dict(forwards=1 + config.gradient_checkpointing, itemsize=2, rows=8, room=16_384)
    return sharing.gpu_cost(flops, blueprint.policy.model.config, backend, chip, **{**defaults, **options})


def test_8b_on_paper(blueprints):
    """A prompt of 1,024 tokens for two responses of 256: 2,558 tokens become 1,534, for a merge of 255 tokens."""
    cost = cost_of(blueprints["8b"])
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    assert cost.token == pytest.approx(8 * layer, rel=1e-3)  # checkpointed: 2 + 2 forward, 4 backward
    assert cost_of(blueprints["8b"], TrainConfig(gradient_checkpointing=False)).token == pytest.approx(6 * layer, 1e-3)
    assert cost.pair == (4 * 2 + 10) * 4096
    pair = example(1024, 256)
    whole, tree = tree_size([pair], False), tree_size([pair], True)
    assert (whole.tokens, tree.tokens, tree.branch_tokens, tree.branch_keys) == (2558, 1534, 255, 1024)
    assert 1.5 < whole.cost(cost) / tree.cost(cost) < 1.67
    assert cost.share_from(1024, 255, 2558) == 2
    # A merged token costs less than a tenth of a token, and a byte more on a chip with less bandwidth for its FLOPs.
    assert 0.05 < cost.branch_token / cost.token < 0.1
    assert cost_of(blueprints["8b"], chip="NVIDIA L40S").branch_token > 1.3 * cost.branch_token
    assert cost_of(blueprints["8b"], chip="NVIDIA H200").branch_token < 0.75 * cost.branch_token
    assert cost_of(blueprints["8b"], chip="of another maker") == cost


def test_where_sharing_does_not_pay(blueprints):
    """Long responses after short prompts, the more so in a small model, whose tokens cost little beside the merge."""
    large, small = cost_of(blueprints["8b"]), cost_of(blueprints["135m"])
    assert large.share_from(20, 400, 840) == 0 and large.share_from(100, 300, 800) == 2
    assert small.branch_token / small.token > 0.5 and small.share_from(100, 300, 800) == 0
    assert small.share_from(1024, 100, 2248) > 0
    # The launches of a micro-batch are shared by its rows: one row has them all.
    assert small._replace(rows=1).share_from(1024, 100, 2248) > small.share_from(1024, 100, 2248) >= 2
    # One kernel for the whole tree has no merge.
    one = cost_of(blueprints["135m"], backend="triton")
    assert one.share_from(2, 500, 1004) == 2 and one.branch_token == one.launches == 0.0
    none = cost_of(blueprints["8b"], backend=None)
    assert not none.shares and sharing_mode("auto", none) == "never" and sharing_mode("always", none) == "always"


def test_decisions_are_those_of_the_costs(blueprints):
    """For many lengths: as many responses share as make the tree cheaper than its rows apart, launches included."""
    rng, seen = np.random.default_rng(0), []
    for name in ("8b", "135m"):
        cost = cost_of(blueprints[name])
        for _ in range(200):
            prompt, response, count = (int(n) for n in np.exp(rng.uniform(np.log([2, 2, 2]), np.log([2000, 2000, 9]))))
            row = example(prompt, response, count)
            whole, tree = tree_size([row], False), tree_size([row], True)
            trees = max(1, min(cost.rows, cost.room // whole.tokens))
            apart, shared = whole.cost(cost), tree.cost(cost) + 1024 * cost.launches / trees / cost.token
            set_sharing([row], "auto", cost)
            if abs(apart - shared) > 0.01 * apart:
                assert row.share == (shared < apart), (name, prompt, response, count)
                seen.append(row.share)
    assert len(seen) > 300 and 50 < sum(seen) < len(seen) - 50


def test_only_the_experts_that_a_token_passes_count(blueprints):
    cost = cost_of(blueprints["mixtral"], TrainConfig(gradient_checkpointing=False))
    experts = 2 * 3 * 64 * 128
    rest = 64 * 64 * 2 + 2 * 64 * 32 + 64 * 8 + 2 * 64  # attention, router, norms
    assert cost.token == pytest.approx(6 * (experts + rest), rel=0.01)


# ---- kernels


@pytest.fixture
def card(monkeypatch):
    """What a GPU has: PyTorch's FlashAttention and Triton, unless it is said otherwise."""

    def have(flash_attn=False, varlen=True, triton=True):
        monkeypatch.delenv("FASTPO_ATTENTION", raising=False)
        monkeypatch.setattr(attention, "flash_attn_available", lambda: flash_attn)
        monkeypatch.setattr(attention, "_old_flash_attn", lambda: False)
        monkeypatch.setattr(attention, "_has_varlen", lambda device: varlen)
        monkeypatch.setattr(attention, "_has_triton_kernels", lambda device: triton)

    have()
    return have


KINDS = {
    "plain": (Kind(128), "varlen"),
    "large head": (Kind(512), None),
    "window": (Kind(128, window=512), None),  # FlashAttention without sharing, the Triton kernel with it
    "soft cap": (Kind(128, softcap=50.0), "triton"),  # which PyTorch's FlashAttention has not
    "sinks": (Kind(64, sinks=True), "triton"),
    "window and sinks": (Kind(64, window=128, sinks=True), "triton"),
    "dropout": (Kind(128, dropout=0.1), None),
}


@pytest.mark.parametrize("name", KINDS)
def test_which_kernel_has_a_form_for_trees(card, name):
    """And it is what the attention function chooses for such tensors, with branches and without."""
    kind, expected = KINDS[name]
    assert tree_backend(kind, GPU, torch.bfloat16) == expected
    with FakeTensorMode():
        query = torch.empty(1, 2, 8, kind.head, dtype=torch.bfloat16, device="cuda")
        sinks = torch.empty(2, device="cuda") if kind.sinks else None
    chosen = [
        attention._choose_backend(query, query, branches, kind.dropout, kind.window, kind.softcap, sinks)
        for branches in (False, True)
    ]
    assert expected == (chosen[0] if chosen[0] == chosen[1] != "sdpa" else None)


def test_other_cards(card, monkeypatch):
    plain, capped = Kind(128), Kind(128, softcap=30.0)
    assert tree_backend(plain, GPU, torch.float32) == "triton"
    card(varlen=False, triton=False)
    assert tree_backend(plain, GPU, torch.bfloat16) is None  # chain by chain
    card(varlen=False)
    assert tree_backend(plain, GPU, torch.bfloat16) == "triton"
    card(flash_attn=True)
    assert tree_backend(plain, GPU, torch.bfloat16) == tree_backend(capped, GPU, torch.bfloat16) == "flash_attn"
    monkeypatch.setattr(attention, "_old_flash_attn", lambda: True)  # which has no merge, and is not left for sharing
    assert tree_backend(plain, GPU, torch.bfloat16) is None
    card()
    for forced, expected in {"triton": "triton", "sdpa": None, "varlen": "varlen", "flash_attn": None}.items():
        monkeypatch.setenv("FASTPO_ATTENTION", forced)
        assert tree_backend(plain, GPU, torch.bfloat16) == expected
    # One that is planned for and not here has PyTorch's FlashAttention.
    monkeypatch.delenv("FASTPO_ATTENTION")
    assert tree_backend(plain, None, torch.bfloat16) == "varlen"
    assert tree_backend(capped, None, torch.bfloat16) is tree_backend(plain, None, torch.float32) is None


def test_what_models_ask_of_their_attention(blueprints, card):
    def of(name, config=None):
        policy = blueprints[name].policy
        return sharing.tree_backend(policy, config or TrainConfig(), GPU, torch.bfloat16)

    assert sharing.kinds(blueprints["8b"].policy, TrainConfig()) == {Kind(128)}
    assert of("8b") == "varlen"
    windows = {Kind(16, window=512, softcap=50.0), Kind(16, softcap=50.0)}
    assert sharing.kinds(blueprints["gemma2"].policy, TrainConfig()) == windows
    assert of("gemma2") == "triton"  # soft-capped: it is the Triton kernel that runs with or without sharing
    card(flash_attn=True)
    assert of("gemma2") is None  # here windows would have to leave FlashAttention
    assert of("gemma2", TrainConfig(max_length=512)) == "flash_attn"  # a window that no row outgrows
    assert of("gpt_oss") == "triton"
    card(triton=False)
    assert of("gpt_oss") is None
    card()
    dropping = TrainConfig(disable_dropout=False)
    config = blueprints["8b"].policy.model.config
    config.attention_dropout = 0.1
    try:
        assert of("8b", dropping) is None and of("8b") == "varlen"
    finally:
        config.attention_dropout = 0.0
    blueprints["8b"].policy.unpacked = True
    try:
        assert of("8b") is None
    finally:
        blueprints["8b"].policy.unpacked = False


# ---- a run


@pytest.mark.parametrize("mode, shared", [("auto", True), ("never", False), ("always", True)])
def test_a_run_on_a_gpu(blueprints, card, monkeypatch, mode, shared):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    config = TrainConfig(share_prompts=mode, loss_type="simpo")
    rows = [example(50, 20), example(50, 20)]
    with blueprints["8b"].mode:
        batches = MicroBatches(config, World(GPU, 0, 1, 0), Objective.of_options(config), blueprints["8b"].policy)
    batches.place("train", rows)
    assert [e.share for e in rows] == [shared, shared]
    card(varlen=False, triton=False)
    with blueprints["8b"].mode:
        batches = MicroBatches(config, World(GPU, 0, 1, 0), Objective.of_options(config), blueprints["8b"].policy)
    batches.place("train", rows)
    assert [e.share for e in rows] == [mode == "always"] * 2


def test_ranks_pack_alike(blueprints, card, monkeypatch):
    """By the first rank's numbers; and a rank whose kernel has no form for trees keeps all from sharing."""

    class Two(World):
        other = TrunkCost(1.0, shares=True)

        def gather(self, value):
            return [value, self.other]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    config = TrainConfig(loss_type="simpo")
    with blueprints["8b"].mode:
        make = lambda: MicroBatches(config, Two(GPU), Objective.of_options(config), blueprints["8b"].policy)  # noqa: E731
        alike = make().cost
        Two.other = TrunkCost(1.0, shares=False)
        apart = make().cost
    assert alike.shares and alike.token > 1e9 and apart == alike._replace(shares=False)

"""LoRA layers with joined adapters in the dtype of the base: against fp64 and PEFT's own, and where PEFT's own stay."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpo
from fastpo.models import lora_layers
from fastpo.models.lora_layers import FusedLoRA, adapted
from fastpo.ops import casts

peft = pytest.importorskip("peft", reason="needs peft")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _tried() -> None:
    """Before a test changes what is tried."""
    assert not lora_layers._disagrees("cpu")


class Block(nn.Module):
    """q, k and v read one tensor, o another; k has half as many outputs."""

    def __init__(self, bias=True):
        super().__init__()
        sizes = {"q_proj": (48, 64), "k_proj": (48, 32), "v_proj": (48, 32), "o_proj": (64, 48)}
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(*size, bias=bias))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.tanh(q) * torch.cat([k, v], -1))


def adapt(model, **changes):
    """In place, with an adapter that is no no-op."""
    options = dict(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    return peft.inject_adapter_in_model(peft.LoraConfig(**{**options, **changes}), model)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.LoraLayer)]


class fused:  # noqa: N801 -- reads as a context
    def __init__(self, model):
        self.layers = FusedLoRA(model)

    def __enter__(self):
        self.layers.switch(True)
        return self.layers

    def __exit__(self, *_):
        self.layers.switch(False)
        assert not casts.scratch


def results(model, x, upstream, autocast=None):
    """Value and gradients of the input and all that is trained, by name."""
    x = x.clone().requires_grad_()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    grads = torch.autograd.grad(y, [x, *named.values()], upstream.to(y.dtype))
    return {"y": y.detach(), "x": grads[0], **dict(zip(named, grads[1:], strict=True))}


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"k_proj": 8, "o_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "lora_bias": {"lora_bias": True},
    "trained biases": {"bias": "all"},
    "some": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
}


@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_fp64_than_peft_in_that_dtype(kind, dtype, keep):
    """PEFT's adapters in the dtype of the base, or under autocast; ours keep fp32 weights and give fp32 gradients."""
    autocast = torch.bfloat16 if dtype == "autocast" else None
    compute = DTYPES.get(dtype, torch.bfloat16)
    base = torch.float32 if autocast else compute
    model = adapt(Block(), **KINDS[kind])
    for p in model.parameters():  # numbers that every dtype holds
        p.data = p.data.bfloat16().float()
    x, upstream = (torch.randn(3, 40, 48).bfloat16().float() for _ in range(2))
    true = results(copy.deepcopy(model).double(), x.double(), upstream.double())
    theirs = results(copy.deepcopy(model).to(base), x.to(base), upstream, autocast)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(base)
    with fused(model) as layers:
        assert len(layers.layers) == len(layers_of(model))
        if keep:
            with casts.keeping():
                results(model, x.to(base), upstream, autocast)
                ours = results(model, x.to(base), upstream, autocast)
        else:
            ours = results(model, x.to(base), upstream, autocast)
    assert ours.keys() == true.keys()
    for name, t in true.items():
        own = dict(model.named_parameters()).get(name)
        assert own is None or ours[name].dtype == own.dtype
        a, b = ((r[name].double() - t).norm() for r in (ours, theirs))
        assert a <= 1.5 * b + 1e-6 * t.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp64_they_are_peft_and_their_own_definition(kind):
    model = adapt(Block(), **KINDS[kind]).double()
    x, upstream = torch.randn(2, 7, 48, dtype=torch.float64), torch.randn(2, 7, 48, dtype=torch.float64)
    want = results(model, x, upstream)
    with fused(model):
        got = results(model, x, upstream)
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-10, atol=1e-12, msg=name)
    for layer in layers_of(model):
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        a, b, base = layer.lora_A["default"], layer.lora_B["default"], layer.base_layer
        bias = base.bias + layer.scaling["default"] * (0 if b.bias is None else b.bias)
        plain = adapted(x, base.weight, bias, a.weight, b.weight, layer.scaling["default"])
        torch.testing.assert_close(plain, layer(x), rtol=1e-10, atol=1e-12)


def test_gradients_by_finite_differences():
    model = adapt(Block()).double()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    learnt = [dict(model.named_parameters())[n] for n in names]

    def call(x, *weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    with fused(model):
        x = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(call, (x, *learnt))


def test_siblings_are_computed_once_and_only_of_the_same_tensor(monkeypatch):
    model = adapt(Block())
    x = torch.randn(5, 48)
    q, k, v = model.q_proj, model.k_proj, model.v_proj
    seen = []  # rows of the joined A's that were multiplied
    apply = lora_layers._Leader.apply
    monkeypatch.setattr(lora_layers._Leader, "apply", lambda a, *rest: (seen.append(len(a)), apply(a, *rest))[1])

    def anew():
        seen.clear()
        casts.clear()

    want = [q(x), k(x), v(x)]
    with fused(model):
        got = [v(x), q(x), k(x)]  # in any order
        assert seen == [12] and not casts.scratch
        torch.testing.assert_close([got[1], got[2], got[0]], want)
        anew()
        q(x)
        torch.testing.assert_close(k(x.clone()), want[1])  # equal, but another: it begins anew
        torch.testing.assert_close(v(x.view_as(x)), want[2])
        assert seen == [12] * 3
        anew()
        q(x)
        with torch.no_grad():
            x.add_(1)  # the same, changed in place
        assert not torch.allclose(k(x), want[1]) and seen == [12] * 2
        anew()
        q(x)
        with torch.no_grad():
            assert not k(x).requires_grad
        assert seen == [12] * 2
        anew()
        q(x)
        k.set_scale("default", 5)
        rescaled = k(x)
        assert seen == [12] * 2
        anew()
        q(x)
        k.enable_adapters(False)
        assert torch.equal(k(x), k.base_layer(x)) and seen == [12]
        k.enable_adapters(True)
        with torch.inference_mode():
            q(y := x + 0)
            torch.testing.assert_close(k(y), rescaled)
        anew()
    torch.testing.assert_close(k(x), rescaled)


def test_a_sibling_that_is_not_called_has_no_gradient():
    model = adapt(Block())
    x = torch.randn(5, 48, requires_grad=True)
    with fused(model):
        only = model.q_proj(x)
        a, b = (getattr(model.k_proj, f"lora_{n}")["default"].weight for n in "AB")
        own = model.q_proj.lora_A["default"].weight
        grads = torch.autograd.grad(only.sum(), [x, own, a, b], allow_unused=True)
        # A lies in the joined matrix: no part of its gradient comes from anywhere.
        assert grads[2].abs().max() == 0 and grads[3] is None
        casts.clear()
    plain = torch.autograd.grad(model.q_proj(x).sum(), [x, own])
    torch.testing.assert_close(grads[:2], plain)
    with fused(model):  # the first one's result unused
        model.q_proj(x)
        grads = torch.autograd.grad(model.k_proj(x).sum(), [x, a, b])
        casts.clear()
    torch.testing.assert_close(grads, torch.autograd.grad(model.k_proj(x).sum(), [x, a, b]))


def two_adapters(model):
    adapt(model)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name="second")
    for layer in layers_of(model):
        layer.set_adapter(["default", "second"])
    return model


def disabled(model):
    adapt(model)
    for layer in layers_of(model):
        layer.enable_adapters(False)
    return model


def merged(model):
    adapt(model)
    for layer in layers_of(model):
        layer.merge()
    return model


def base_trained(model):
    adapt(model)
    for layer in layers_of(model):
        layer.base_layer.weight.requires_grad_()
    return model


def hooked(model):
    adapt(model)
    for layer in layers_of(model):
        layer.lora_A["default"].register_forward_hook(lambda m, i, o: 2 * o)
        layer.base_layer.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    return model


class Weights(nn.Module):
    """A weight without a layer of its own, as the experts of a mixture have them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 48))

    def forward(self, x):
        return x @ self.weight


LEFT = {
    "dropout": lambda: adapt(Block(), lora_dropout=0.3),
    "dora": lambda: adapt(Block(), use_dora=True),
    "two adapters": lambda: two_adapters(Block()),
    "disabled": lambda: disabled(Block()),
    "merged": lambda: merged(Block()),
    "a trained base": lambda: base_trained(Block()),
    "hooks inside": lambda: hooked(Block()),
    "embeddings": lambda: adapt(nn.Sequential(nn.Embedding(48, 48)), target_modules=["0"]),
    "convolutions": lambda: adapt(nn.Sequential(nn.Conv1d(3, 3, 3)), target_modules=["0"]),
    "weights": lambda: adapt(nn.Sequential(Weights()), target_modules=[], target_parameters=["0.weight"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_plain_lora_is_peft_s(case, monkeypatch):
    """To the bit, and no fused layer is entered."""
    model = LEFT[case]()
    if case == "embeddings":
        x = torch.arange(12).view(3, 4)
    else:
        x = torch.randn(1, 3, 48, requires_grad=True)

    def both():
        torch.manual_seed(1)
        y = model(x)
        learnt = [p for p in (x, *model.parameters()) if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), learnt, allow_unused=True)]

    want = both()
    monkeypatch.setattr(lora_layers._Leader, "forward", None)
    with fused(model):
        got = both()
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_dropout_that_is_not_at_work_is_no_hindrance(monkeypatch):
    model = adapt(Block(), lora_dropout=0.3).eval()
    x, entered = torch.randn(3, 48), []
    want = model(x)
    apply = lora_layers._Leader.apply
    monkeypatch.setattr(lora_layers._Leader, "apply", lambda *a: (entered.append(1), apply(*a))[1])
    with fused(model):
        torch.testing.assert_close(model(x), want)
        model.train()
        for layer in layers_of(model):
            layer.lora_dropout["default"].p = 0.0  # as `disable_dropout` leaves it
        torch.testing.assert_close(model(x), want)
    assert len(entered) == 4


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_quantised_bases_stay_peft_s(monkeypatch):
    from bitsandbytes.nn import Linear4bit

    model, x = nn.Sequential(Linear4bit(64, 64, bias=False)).to("cpu"), torch.randn(3, 64)
    adapt(model, target_modules=["0"])
    want = model(x)
    monkeypatch.setattr(lora_layers._Leader, "forward", None)
    with fused(model):
        assert torch.equal(model(x), want)


def test_what_is_saved_whole_is_left_alone(toy):
    model = adapt(toy.model(), modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    linear = peft.tuners.lora.layer.Linear
    assert FusedLoRA(model).layers == [m for m in model.modules() if type(m) is linear]


def test_names_hooks_and_methods_are_peft_s_afterwards():
    model = adapt(Block())
    names, seen = set(model.state_dict()), []
    handle = model.q_proj.register_forward_hook(lambda *_: seen.append(1))
    with fused(model):
        model(torch.randn(2, 48))
        assert seen and set(model.state_dict()) == names and "forward" in vars(model.q_proj)
    assert not any("forward" in vars(m) for m in model.modules())
    handle.remove()


def test_a_deep_copy_made_inside_is_of_its_own():
    model, x = adapt(Block()), torch.randn(4, 48)
    with fused(model), casts.keeping():
        before = model(x)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        inside = twin(x)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    plain = adapt(Block())
    plain.load_state_dict(twin.state_dict())
    torch.testing.assert_close(inside, plain(x))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpointed(dtype, reentrant):
    model = adapt(Block())
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(DTYPES[dtype])
    x, upstream = torch.randn(6, 48).to(DTYPES[dtype]), torch.randn(6, 48)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = model

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    with fused(model), casts.keeping():
        want = results(model, x, upstream)
        y = Checkpointed()(x.requires_grad_())
        y.backward(upstream.to(y.dtype))
    assert torch.equal(y, want["y"]) and torch.equal(x.grad, want["x"])
    for name, p in model.named_parameters():
        assert p.grad is None if name not in want else torch.equal(p.grad, want[name]), name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
def test_compiled(autocast):
    model = adapt(Block(), lora_bias=True)
    x, upstream = torch.randn(6, 48), torch.randn(6, 48)
    want = results(model, x, upstream, autocast)
    with fused(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        x = x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            y = compiled(x)
        got = dict(zip(["x", *named], torch.autograd.grad(y, [x, *named.values()], upstream.to(y.dtype)), strict=True))
    torch._dynamo.reset()
    limit = 1e-5 if autocast is None else 2e-2
    for name, g in {"y": y.detach(), **got}.items():
        assert (g - want[name]).norm() <= limit * want[name].norm(), name


def test_a_layer_that_peft_computes_otherwise_is_left_to_it(monkeypatch, caplog):
    model, linear = adapt(Block()), peft.tuners.lora.layer.Linear
    theirs = linear.forward
    lora_layers._disagrees.cache_clear()
    monkeypatch.setattr(linear, "forward", lambda self, x: 1.1 * theirs(self, x))
    try:
        assert not FusedLoRA(model).layers
    finally:
        lora_layers._disagrees.cache_clear()
    assert len(caplog.records) == 1 and "do not agree" in caplog.text


@pytest.mark.parametrize("options", [
    {}, {"gradient_checkpointing": True}, {"bf16": True},
    pytest.param({"torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
], ids=["fp32", "checkpointed", "autocast", "compiled"])  # fmt: skip
def test_a_run_is_that_of_peft_s_layers(toy, tmp_path, options, monkeypatch):
    """Losses, gradients' norms and weights of a run, and its adapter's names; the base is its reference, exactly. A
    compiled run is held against PEFT's layers as they are."""

    def train(name, fused):
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        defaults = dict(
            output_dir=str(tmp_path / name), use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, max_steps=3,
            per_device_train_batch_size=6, learning_rate=0.05, lr_scheduler_type="constant", optim="sgd", beta=0.5,
            report=False, max_tokens=120, gradient_checkpointing=False,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            given = {**defaults, **options}
            if not fused:
                patch.setattr(lora_layers, "_lora_linear", lambda: None)
                given.pop("torch_compile_backend", None)
            return fastpo.train(toy.model(), toy.rows(18), processing_class=toy.tokenizer(), peft_config=config,
                                args=given)  # fmt: skip

    ours, theirs = train("ours", True), train("theirs", False)
    torch._dynamo.reset()
    rel = 3e-2 if options.get("bf16") else 1e-5
    for key in ("loss", "grad_norm", "rewards/margins"):
        a, b = ([line[key] for line in r.log_history if key in line] for r in (ours, theirs))
        assert len(a) == 3 and a == pytest.approx(b, rel=rel, abs=rel)
    assert ours.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    got, want = (r.model.state_dict() for r in (ours, theirs))
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert (got[name] - w).abs().max() <= 10 * rel * w.abs().max(), name

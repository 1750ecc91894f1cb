"""`fastpo.training.optim`: what the optimiser is given, how 16-bit weights are stepped, saved state, several ranks."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastpo.config.train_config import OPTIMIZERS, TrainConfig
from fastpo.errors import ConfigError
from fastpo.training import optim
from fastpo.training.optim import Gradients, build_optimizer, build_scheduler, stochastic_round

BITSANDBYTES = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
# The wide layer has 4,096 elements, from which on bitsandbytes keeps 8 bits.
VOCAB, WIDTH = 48, 64


class Tiny(nn.Module):
    """An embedding, a matrix, a norm, a head: what decides groups and bits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.hidden(self.embed(x)))))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def tiny(dtype=torch.float32, seed=0, device="cpu"):
    torch.manual_seed(seed)
    return Tiny().to(device, dtype)


def needs(name):
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


def gradients_of(model, mode="fp32", **kwargs):
    return Gradients(dict(model.named_parameters()), master_weights=mode, seed=7, **kwargs)


def steps(model, gradients, optimizer, count, *, first=1, micro_batches=1, scheduler=None):
    """Some steps of next-token training on fixed data, numbered from `first`; the losses."""
    losses = []
    device = next(model.parameters()).device
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, VOCAB, (8 * micro_batches,), generator=generator).to(device)
        gradients.begin(micro_batches, step)
        loss = torch.zeros((), device=device)
        for part in x.chunk(micro_batches):
            share = nn.functional.cross_entropy(model(part).float(), (part + 1) % VOCAB, reduction="sum") / len(x)
            share.backward()
            loss += share.detach()
        gradients.reduce_()
        norm = gradients.clip_(1.0)
        gradients.step_(optimizer, torch.isfinite(norm))
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def assert_equal(a, b):
    """Nested state, tensors bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def assert_same(a: nn.Module, b: nn.Module):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [1.0003, -3.1415, 6.1e-5, 3e-6, -2e-7])
def test_stochastic_rounding_is_unbiased(dtype, value, device):
    x = torch.full((400_003,), value, device=device)  # not a multiple of the four numbers that a random word gives
    rounded = stochastic_round(x, dtype, torch.Generator(device).manual_seed(0)).double()
    low, high = rounded.unique().tolist()
    assert low < x[0].item() < high
    # nothing lies between the two: the midpoint is a tie, and rounds to one of them
    assert torch.tensor((low + high) / 2, dtype=torch.float64).to(dtype).item() in (low, high)
    p = (x[0].item() - low) / (high - low)
    error = (rounded.mean().item() - x[0].item()) / (high - low)
    assert abs(error) < 5 * (p * (1 - p) / len(x)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_keeps_what_fits(dtype):
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 1e-3, 1e-6, 5e-8])[:, None]
    x = (torch.randn(4, 1001) * scales).to(dtype)
    assert torch.equal(stochastic_round(x.float(), dtype, generator), x)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    got = stochastic_round(odd, dtype, generator)
    assert torch.equal(got.isnan(), odd.isnan()) and torch.equal(got.float()[[0, 1, 3]], odd[[0, 1, 3]])
    assert stochastic_round(torch.zeros(0), dtype, generator).shape == (0,)


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_every_element_is_rounded(transposed, monkeypatch):
    monkeypatch.setattr(optim, "PIECE", 100)
    values = torch.randn(64, 33).bfloat16()
    p = nn.Parameter(values.T if transposed else values)
    exact = p.detach().double() - 1e-3
    gradients = Gradients({"p": p}, master_weights="stochastic", seed=0)
    optimizer = torch.optim.SGD([gradients.stepped(p)], lr=1e-3)
    gradients.begin(1)
    p.sum().backward()
    gradients.clip_(0.0)
    gradients.step_(optimizer, torch.tensor(True))
    off = (p.detach().double() - exact) / exact.abs()
    assert off.abs().max() < 2**-7 and off.abs().min() > 0  # the neighbours of each, no part left as it was
    assert abs(off.mean().item()) < 2**-7 / p.numel() ** 0.5


def test_updates_below_a_bf16_spacing():
    """Twenty updates of 2^-12 at 1.0, where bf16's spacing below is 2^-8: kept by masters, kept on average, lost."""
    exact = 1 - 20 * 2**-12
    for mode, expected, allowed in (("fp32", exact, 2**-9), ("stochastic", exact, 1e-4), ("none", 1.0, 0.0)):
        p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        gradients = Gradients({"p": p}, master_weights=mode, seed=0)
        optimizer = torch.optim.SGD([gradients.stepped(p)], lr=2**-12)
        for _ in range(20):
            gradients.begin(1)
            p.sum().backward()
            gradients.clip_(0.0)
            gradients.step_(optimizer, torch.tensor(True))
        assert abs(p.double().mean().item() - expected) <= allowed, mode
        if mode == "fp32":
            assert gradients.state_dict()["p"][0].item() == exact


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"])
def test_fp32_weights_train_as_in_a_plain_loop(name):
    model, plain = tiny(), tiny()
    config = TrainConfig(optim=name, learning_rate=1e-2, weight_decay=0.1)
    gradients = gradients_of(model)
    optimizer = build_optimizer(model, config, gradients)
    losses = steps(model, gradients, optimizer, 4, micro_batches=2)
    decayed = [plain.embed.weight, plain.hidden.weight, plain.head.weight]
    kept = [plain.hidden.bias, plain.norm.weight, plain.norm.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept}]
    cls = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}.get(name, torch.optim.AdamW)
    other = cls(groups, lr=1e-2, weight_decay=0.0)
    for step in range(1, 5):
        x = torch.randint(0, VOCAB, (16,), generator=torch.Generator().manual_seed(step))
        other.zero_grad()
        loss = nn.functional.cross_entropy(plain(x), (x + 1) % VOCAB)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        other.step()
        assert losses[step - 1] == pytest.approx(loss.item(), rel=1e-4)
    for (n, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (p - q[1]).abs().mean() < 1e-5, n


@pytest.mark.parametrize("mode", ["fp32", "stochastic", "none"])
def test_one_micro_batch_needs_no_buffer_and_changes_nothing(mode, monkeypatch):
    """A 16-bit gradient that is formed once: the same steps with a buffer, without, and in chunks of one parameter."""
    results = []
    for announced, chunk in ((1, 1 << 20), (2, 1 << 20), (1, 1)):
        monkeypatch.setattr(optim, "CHUNK_BYTES", chunk)
        model = tiny(torch.bfloat16)
        gradients = gradients_of(model, mode)
        optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-2), gradients)
        x = torch.arange(VOCAB)
        for _ in range(3):
            gradients.begin(announced)
            (100 * nn.functional.cross_entropy(model(x).float(), x)).backward()
            assert bool(gradients.buffers) == (announced == 2)
            norm = gradients.clip_(1.0)
            assert norm > 2  # so that scaling matters
            gradients.step_(optimizer, torch.isfinite(norm))
        results.append(model)
    assert_same(results[0], results[2])
    if mode != "none":  # there a gradient is scaled in 16 bits, or in fp32 and rounded once
        assert_same(results[0], results[1])


def test_stochastic_copies_exist_in_turn(monkeypatch):
    monkeypatch.setattr(optim, "CHUNK_BYTES", 4 * WIDTH * WIDTH)
    model = tiny(torch.bfloat16)
    gradients = gradients_of(model, "stochastic")
    optimizer = build_optimizer(model, TrainConfig(), gradients)

    def held():
        return sum(gradients.stepped(p).untyped_storage().nbytes() for p in model.parameters())

    at_steps = []
    optimizer.register_step_pre_hook(lambda *_: at_steps.append(held()))
    small = 4 * len(list(model.parameters()))
    assert held() == small
    steps(model, gradients, optimizer, 1)
    assert len(at_steps) >= 3 and max(at_steps) <= optim.CHUNK_BYTES + small
    assert held() == small and gradients.state_dict() == {}
    assert all(p.grad is None and gradients.stepped(p).grad is None for p in model.parameters())
    assert gradients.stepped(model.embed.weight).shape == model.embed.weight.shape


@pytest.mark.parametrize("mode", ["fp32", "stochastic", "none"])
def test_fp32_and_bf16_weights_together(mode):
    """As an adapter in fp32 beside norms in bf16: each is stepped once, with its own gradient."""
    narrow = nn.Parameter(torch.full((8,), 2.0, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.full((8,), 4.0))
    gradients = Gradients({"narrow": narrow, "wide": wide}, master_weights=mode, seed=0)
    optimizer = torch.optim.SGD([gradients.stepped(narrow), gradients.stepped(wide)], lr=0.125, momentum=0.5)
    for _ in range(2):
        gradients.begin(1)
        (narrow.float() + 3 * wide).sum().backward()
        gradients.clip_(0.0)
        gradients.step_(optimizer, torch.tensor(True))
    # momentum: one gradient, then one and a half
    assert torch.equal(narrow.detach().float(), torch.full((8,), 2 - 2.5 * 0.125))
    assert torch.equal(wide.detach(), torch.full((8,), 4 - 3 * 2.5 * 0.125))


def test_stochastic_bits_depend_on_seed_and_step():
    def run(seed, first):
        model = tiny(torch.bfloat16)
        gradients = Gradients(dict(model.named_parameters()), master_weights="stochastic", seed=seed)
        optimizer = torch.optim.SGD([gradients.stepped(p) for p in model.parameters()], lr=1e-4)
        x = torch.arange(VOCAB)
        gradients.begin(1, first)
        nn.functional.cross_entropy(model(x).float(), x).backward()
        gradients.clip_(0.0)
        gradients.step_(optimizer, torch.tensor(True))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    base, again, other_seed, other_step = run(0, 5), run(0, 5), run(1, 5), run(0, 6)
    assert torch.equal(base, again) and not torch.equal(base, other_seed) and not torch.equal(base, other_step)


@pytest.mark.parametrize("mode", ["fp32", "stochastic", "none"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_non_finite_gradient_skips_the_step(name, mode, device):
    needs(name)
    model = tiny(torch.bfloat16, device=device)
    gradients = gradients_of(model, mode)
    config = TrainConfig(optim=name, learning_rate=1.0 if name == "sgd" else 1e-2, weight_decay=0.1)
    optimizer = build_optimizer(model, config, gradients)
    steps(model, gradients, optimizer, 1)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    gradients.begin(1)
    (model(torch.arange(4, device=device)).sum() * float("nan")).backward()
    norm = gradients.clip_(1.0)
    gradients.step_(optimizer, torch.isfinite(norm))
    assert norm.isnan()
    assert_same(model, before)
    assert_equal(optimizer.state_dict()["state"], state)
    steps(model, gradients, optimizer, 1, first=3)
    assert not torch.equal(model.hidden.weight, before.hidden.weight)


def test_an_optimizer_of_ones_own_steps_the_weights_once():
    seen = []

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            seen.append({p.grad.dtype for g in self.param_groups for p in g["params"]})
            return super().step()

    model = tiny(torch.bfloat16)
    gradients = gradients_of(model, "none")
    steps(model, gradients, Own(model.parameters(), lr=0.1), 2, micro_batches=2)
    assert seen == [{torch.bfloat16}] * 2


def test_close_leaves_nothing_behind():
    model = tiny(torch.bfloat16)
    gradients = gradients_of(model)
    optimizer = build_optimizer(model, TrainConfig(), gradients)
    steps(model, gradients, optimizer, 1)
    gradients.begin(2)
    model(torch.arange(4)).sum().backward()
    gradients.close()
    assert not vars(optimizer).keys() & {"found_inf", "grad_scale"}
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("mode", ["fp32", "stochastic", "none"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(name, mode, tmp_path, device):
    """Two steps, a save, two steps; the same after loading into new objects over the saved 16-bit weights."""
    needs(name)
    config = TrainConfig(optim=name, learning_rate=1e-3, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=2)

    def start(model):
        gradients = gradients_of(model, mode)
        optimizer = build_optimizer(model, config, gradients)
        return gradients, optimizer, build_scheduler(optimizer, config, 10)

    model = tiny(torch.bfloat16, device=device)
    gradients, optimizer, scheduler = start(model)
    steps(model, gradients, optimizer, 2, scheduler=scheduler)
    states = [o.state_dict() for o in (model, gradients, optimizer, scheduler)]
    torch.save(states, tmp_path / "state.pt")
    steps(model, gradients, optimizer, 2, first=3, scheduler=scheduler)

    again = tiny(torch.bfloat16, seed=1, device=device)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(saved[0])
    rest = start(again)
    for thing, state in zip(rest, saved[1:], strict=True):
        thing.load_state_dict(state)
    steps(again, *rest[:2], 2, first=3, scheduler=rest[2])
    assert_same(model, again)
    assert_equal(optimizer.state_dict(), rest[1].state_dict())
    assert set(saved[1]) == (set(dict(model.named_parameters())) if mode == "fp32" else set())
    assert all(t.dtype == torch.float32 for t in saved[1].values())


def test_loaded_masters_refresh_the_weights():
    model = tiny(torch.bfloat16)
    gradients = gradients_of(model)
    state = {name: torch.randn_like(master) for name, master in gradients.state_dict().items()}
    gradients.load_state_dict(state)
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name].bfloat16()) and torch.equal(gradients.stepped(p), state[name])
    with pytest.raises(ConfigError, match=r"master weights \(0\) do not fit this run's \(6\), first 'embed.weight'"):
        gradients.load_state_dict({})
    with pytest.raises(ConfigError, match=r"\(6\) do not fit this run's \(0\)"):
        gradients_of(tiny()).load_state_dict(state)


def group_names(model, gradients, optimizer):
    name_of = {gradients.stepped(p): name for name, p in model.named_parameters()}
    return [({name_of[p] for p in g["params"]}, g["weight_decay"]) for g in optimizer.param_groups]


def test_biases_and_norms_are_not_decayed():
    model = tiny()
    gradients = gradients_of(model)
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1), gradients)
    assert group_names(model, gradients, optimizer) == [
        ({"embed.weight", "hidden.weight", "head.weight"}, 0.1),
        ({"hidden.bias", "norm.weight", "norm.bias"}, 0.0),
    ]


def test_muon_has_the_hidden_matrices_and_adamw_the_rest():
    model = tiny()
    gradients = gradients_of(model)
    config = TrainConfig(optim="muon", weight_decay=0.1, learning_rate=1e-2, warmup_steps=4, optim_args="ns_steps=3")
    optimizer = build_optimizer(model, config, gradients)
    assert group_names(model, gradients, optimizer) == [
        ({"hidden.weight"}, 0.1),
        ({"embed.weight", "head.weight"}, 0.1),
        ({"hidden.bias", "norm.weight", "norm.bias"}, 0.0),
    ]
    assert optimizer.param_groups[0]["ns_steps"] == 3
    assert optimizer.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    scheduler = build_scheduler(optimizer, config, 10)
    start = copy.deepcopy(model)
    steps(model, gradients, optimizer, 1, micro_batches=20, scheduler=scheduler)
    assert_same(model, start)  # a warm-up from zero reaches both parts
    steps(model, gradients, optimizer, 1, first=2, micro_batches=20, scheduler=scheduler)
    moved = (model.hidden.weight - start.hidden.weight).detach()
    # The gradient's rank is the number of words at most. Those directions get equal steps, together of the size of
    # AdamW's: 0.2 of the rate, here after one of four warm-up steps.
    singular = torch.linalg.svdvals(moved)[: VOCAB // 2]
    assert singular[0] < 3 * singular[-1]
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2 / 4 * (VOCAB / WIDTH) ** 0.5, rel=0.3)
    other = build_optimizer(model, TrainConfig(optim="muon", optim_args="adjust_lr_fn=original"), gradients)
    assert other.param_groups[0]["adjust_lr_fn"] == "original"


def test_muon_refuses_what_it_is_not_for():
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["hidden"]))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match="none is trained itself: use adamw_torch_fused"):
        build_optimizer(model, TrainConfig(optim="muon"), Gradients(trained, master_weights="fp32", seed=0))


@pytest.mark.parametrize("masters", ["none", "stochastic", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_muon_keeps_its_momentum_or_is_refused(dtype, masters):
    """Without nesterov, PyTorch before 2.15 normalises a bf16 momentum in place: the average of gradients is lost."""
    model = tiny().to(dtype)
    gradients = Gradients(dict(model.named_parameters()), master_weights=masters, seed=0)
    config = TrainConfig(optim="muon", optim_args="nesterov=false")
    if dtype == torch.bfloat16 and masters == "none" and not optim.MUON_KEEPS_MOMENTUM:
        with pytest.raises(ConfigError, match="nesterov=false steps bf16 weights wrongly before PyTorch 2.15"):
            build_optimizer(model, config, gradients)
        given = torch.optim.Muon([model.hidden.weight], nesterov=False)
        with pytest.raises(ConfigError, match="steps bf16 weights wrongly"):
            optim.check_given(given, dict(model.named_parameters()))
        build_optimizer(model, TrainConfig(optim="muon"), gradients)
        return
    optimizer = build_optimizer(model, config, gradients)
    stepped = gradients.stepped(model.hidden.weight)
    mean = torch.zeros(WIDTH, WIDTH)
    for k in range(3):
        stepped.data = stepped.data.clone()  # of a stand-in: it has memory during a step alone
        stepped.grad = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(k)).to(stepped.dtype)
        mean.lerp_(stepped.grad.float(), 0.05)
        optimizer.step()
    assert (optimizer.state[stepped]["momentum_buffer"].float() - mean).abs().max() < 1e-2 * mean.abs().max()


def test_eight_bits_of_state_but_not_for_embeddings():
    needs("adamw_8bit")
    model, plain = tiny(), tiny()
    model.embed = nn.Embedding(2 * VOCAB, WIDTH)  # large enough for 8 bits
    plain.embed = copy.deepcopy(model.embed)
    gradients = gradients_of(model)
    optimizer = build_optimizer(model, TrainConfig(optim="adamw_8bit", learning_rate=1e-2), gradients)
    losses = steps(model, gradients, optimizer, 30)
    assert optimizer.state[model.hidden.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[model.embed.weight]["state1"].dtype == torch.float32
    other = gradients_of(plain)
    full = steps(plain, other, build_optimizer(plain, TrainConfig(learning_rate=1e-2), other), 30)
    assert losses[-1] < 0.1 * losses[0] and full[-1] < 0.1 * full[0]
    assert losses[5] == pytest.approx(full[5], rel=0.05)


def test_optim_args_reach_the_constructor():
    model = tiny()
    gradients = gradients_of(model)

    def group(name, args):
        return build_optimizer(model, TrainConfig(optim=name, optim_args=args), gradients).param_groups[0]

    sgd = group("sgd", "momentum=0.9, nesterov=True")
    assert sgd["momentum"] == 0.9 and sgd["nesterov"] is True
    assert group("rmsprop", "alpha=0.9,eps=1e-6,centered=true")["eps"] == 1e-6
    assert group("adamw_torch", "amsgrad=true")["amsgrad"] is True


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("sgd", "momentun=0.9", "'momentun' is no argument of sgd; did you mean momentum?"),
        ("adamw_torch", "zzz=1", "'zzz' is no argument of adamw_torch; it has amsgrad"),
        ("adamw_torch", "betas=0.9", "betas is set by adam_beta1 and adam_beta2"),
        ("adamw_torch", "eps=1e-6", "eps is set by adam_epsilon"),
        ("sgd", "lr=1", "lr is set by learning_rate"),
        ("sgd", "momentum", "must read 'name=value,name=value', not 'momentum'"),
        ("sgd", "nesterov=true", "Nesterov momentum requires a momentum"),
        ("muon", "adjust_lr_fn=best", "Adjust learning rate function best is not supported"),
        ("adamw_8bit", "amsgrad=true", "'amsgrad' is no argument of adamw_8bit"),
    ],
)
def test_optim_args_that_are_wrong(name, args, message):
    needs(name)
    model = tiny()
    with pytest.raises(ConfigError) as error:
        build_optimizer(model, TrainConfig(optim=name, optim_args=args), gradients_of(model))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_missing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes: pip install 'fastpo\[quant\]'"):
        build_optimizer(tiny(), TrainConfig(optim=name), gradients_of(tiny()))


@pytest.mark.parametrize("name", ["muon", *BITSANDBYTES])
def test_sharded_refuses_what_needs_whole_tensors(name):
    gradients = Gradients({}, master_weights="fp32", seed=0, sharded=True)
    with pytest.raises(ConfigError, match="needs whole tensors, which fsdp cuts"):
        build_optimizer(tiny(), TrainConfig(optim=name), gradients)
    with pytest.raises(TypeError, match="must be DTensors in fp32"):
        gradients_of(tiny(), sharded=True)


# ------------------------------------------------------------- several ranks

SHARDED = ("adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")
ROWS = 3  # of the first layer: two ranks hold two and one; and the second layer's one row is rank 0's alone


def two_layers(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, ROWS), nn.Tanh(), nn.Linear(ROWS, 1, bias=False)).to(dtype)


def batch(step):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def train_two_layers(model, gradients, optimizer, rows, skip_head=False):
    norms = []
    for step in range(1, 4):
        x = batch(step)[rows].to(next(model.parameters()).dtype)
        gradients.begin(1, step)
        if len(x):
            out = model[:2](x) if skip_head else model(x)
            (out.float() ** 2).sum().div(6).backward()
        gradients.reduce_()
        norm = gradients.clip_(0.05)
        gradients.step_(optimizer, torch.isfinite(norm))
        norms.append(norm.item())
    return norms


def ranks_worker(rank: int, folder: str) -> None:
    """One of two gloo ranks, in a process of its own: both kinds of data parallelism; results in `folder`."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    out: dict = {}
    optim.CHUNK_BYTES = 40  # several buckets, and parameters larger than one
    shares = {"even": [[0, 1, 2], [3, 4, 5]], "idle": [[0, 1, 2, 3, 4, 5], []]}
    for dtype in (torch.float32, torch.bfloat16):
        for share, rows in shares.items():
            for mode in ("fp32", "stochastic"):
                model = two_layers(dtype)
                gradients = gradients_of(model, mode, group=group)
                optimizer = build_optimizer(model, TrainConfig(optim="sgd", learning_rate=0.1), gradients)
                norms = train_two_layers(model, gradients, optimizer, rows[rank])
                out["replicated", str(dtype), share, mode] = (norms, [p.detach() for p in model.parameters()])
    # parameters that no rank has a gradient for stay without one
    model = two_layers()
    gradients = gradients_of(model, group=group)
    train_two_layers(model, gradients, build_optimizer(model, TrainConfig(weight_decay=0.5), gradients), [rank], True)
    out["unused"] = [p.detach() for p in model.parameters()]

    for name in SHARDED:
        model = two_layers()
        fully_shard(model[0])
        fully_shard(model)
        for layer in (model[0], model):
            layer.set_gradient_divide_factor(1.0)  # each rank's loss is its share of a sum
            layer.set_force_sum_reduction_for_comms(True)
        gradients = gradients_of(model, group=group, sharded=True)
        config = TrainConfig(optim=name, learning_rate=0.1, weight_decay=0.1)
        optimizer = build_optimizer(model, config, gradients)
        plain = all(type(p) is nn.Parameter for g in optimizer.param_groups for p in g["params"])
        shared = all(gradients.stepped(p).data_ptr() == p.to_local().data_ptr() for p in model.parameters())
        norms = train_two_layers(model, gradients, optimizer, [3 * rank, 3 * rank + 1, 3 * rank + 2])
        local = [p.to_local().shape[0] for p in model.parameters()]
        full = [p.full_tensor().detach() for p in model.parameters()]
        out["sharded", name] = (norms, full, plain and shared, local)
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(preloaded, once):
    def run(folder):
        processes = [preloaded.start(__file__, rank, folder) for rank in range(2)]
        errors = [p.communicate(timeout=120)[1] for p in processes]
        assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)

    folder = once("ranks of the optimisers", run)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def alone(config, dtype=torch.float32, mode="fp32"):
    model = two_layers(dtype)
    gradients = gradients_of(model, mode)
    norms = train_two_layers(model, gradients, build_optimizer(model, config, gradients), slice(None))
    return norms, list(model.parameters())


@pytest.mark.parametrize("mode", ["fp32", "stochastic"])
@pytest.mark.parametrize("share", ["even", "idle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_ranks_add_up_to_one(ranks, dtype, share, mode):
    (norms, weights), (other_norms, others) = (r["replicated", str(dtype), share, mode] for r in ranks)
    assert norms == other_norms and all(map(torch.equal, weights, others))  # bit for bit
    expected_norms, expected = alone(TrainConfig(optim="sgd", learning_rate=0.1), dtype, mode)
    exact = dtype == torch.float32 or share == "idle"  # halves of a batch are rounded to bf16 apart
    assert norms == pytest.approx(expected_norms, rel=1e-5 if exact else 2e-2)
    for got, p in zip(weights, expected, strict=True):
        assert (got - p).abs().max() < (1e-6 if exact else 2**-8)


def test_a_parameter_without_a_gradient_anywhere_is_not_stepped(ranks):
    head = two_layers()[2].weight
    for r in ranks:
        assert torch.equal(r["unused"][2], head) and not torch.equal(r["unused"][0], two_layers()[0].weight)


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp_steps_local_tensors_as_one_process_does(ranks, name):
    norms, expected = alone(TrainConfig(optim=name, learning_rate=0.1, weight_decay=0.1))
    for rank, r in enumerate(ranks):
        got_norms, weights, plain, local = r["sharded", name]
        assert plain and local == ([2, 2, 1] if rank == 0 else [1, 1, 0])
        assert got_norms == pytest.approx(norms, rel=1e-5)
        for a, b in zip(weights, expected, strict=True):
            assert (a - b).abs().max() < 1e-5


if __name__ == "__main__":
    ranks_worker(int(sys.argv[1]), sys.argv[2])

"""Values and gradients against TRL's and Liger's own loss code, on random token log-probabilities.

TRL's trainers are not built: their loss methods run on a stand-in for `self`, with a model that returns given token
log-probabilities. So what is compared is TRL's code as installed (1.16), not a copy of it.
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastpo.losses.table import LOSSES

P, PROMPT, LONGEST = 8, 3, 12
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)
TRAINING = SimpleNamespace(training=True)
FLOAT32 = 3e-7  # both take exo_pair's epsilon as a float32 tensor


def batch(seed=0, dtype=torch.float64):
    """Token log-probabilities [2P, PROMPT + LONGEST - 1] of chosen then rejected, and what belongs to them."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=dtype)  # noqa: E731
    lengths = torch.randint(2, LONGEST + 1, (2 * P,), generator=g)
    mask = (torch.arange(PROMPT + LONGEST) >= PROMPT) & (torch.arange(PROMPT + LONGEST) < PROMPT + lengths[:, None])
    logp, ref = (-3 * rand(2 * P, PROMPT + LONGEST - 1) * mask[:, 1:] for _ in range(2))
    return SimpleNamespace(
        mask=mask.long(), lengths=lengths.to(dtype), logp=logp, ref=ref, log_sum_sq=-2 * rand(*logp.shape) * mask[:, 1:]
    )


def model(b, logp):
    """What TRL reads off a model with a fused head."""
    out = SimpleNamespace(log_probs=logp, log_sum_sq_probs=b.log_sum_sq, entropy=logp.detach(),
                          mean_logits=logp.detach(), is_top1=logp.detach() > -1)  # fmt: skip

    def call(**kwargs):
        return out

    call.training = True
    return call


def trl_dpo(b, logp, **options):
    trl = pytest.importorskip("trl")
    given = dict(beta=0.1, loss_types=["sigmoid"], label_smoothing=0.0, ld_alpha=None, use_weighting=False,
                 f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, discopop_tau=0.05)  # fmt: skip
    given |= options
    ref = b.ref
    if given["ld_alpha"] is not None:  # TRL's precomputed reference is that of the weighted tokens
        short = torch.minimum(*b.lengths.chunk(2)).repeat(2)
        tail = (b.mask[:, 1:].cumsum(1) > short[:, None]) & b.mask[:, 1:].bool()
        ref = torch.where(tail, given["ld_alpha"] * ref, ref)
    chosen, rejected = ref.sum(1).chunk(2)
    stand_in = SimpleNamespace(
        accelerator=ACCELERATOR, aux_loss_enabled=False, precompute_ref_logps=True, loss_weights=[1.0], _tp_size=1,
        _total_train_tokens=0, _metrics={"train": defaultdict(list)}, model=TRAINING, args=SimpleNamespace(**given),
        **given,
    )  # fmt: skip
    rows = {"input_ids": b.mask, "attention_mask": b.mask, "completion_mask": b.mask, "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected}  # fmt: skip
    return trl.DPOTrainer._compute_loss(stand_in, model(b, logp), rows, False)


def ours(name, b, logp, **hyper):
    """Our mean loss as a function of the same token log-probabilities."""
    short = torch.minimum(*b.lengths.chunk(2)).repeat(2)
    tail = b.mask[:, 1:].cumsum(1) > short[:, None]
    pair = lambda t: t.sum(1).chunk(2)  # noqa: E731
    keys = ("{}_len", "{}_log_sum_sq", "{}_tail_logps", "ref_{}_tail_logps")
    parts = (b.lengths.chunk(2), pair(b.log_sum_sq), pair(logp * tail), pair(b.ref * tail))
    more = {
        k.format(side): t for k, two in zip(keys, parts, strict=True) for side, t in zip(("chosen", "rejected"), two)
    }
    return LOSSES[name](*pair(logp), *pair(b.ref), **more, **hyper).mean()


def compare(theirs, mine, b, rtol=1e-12):
    values, grads = [], []
    for f in (theirs, mine):
        logp = b.logp.clone().requires_grad_()
        value = f(logp)
        (grad,) = torch.autograd.grad(value, logp)
        values.append(value.detach().double())
        grads.append(grad.double() * b.mask[:, 1:])  # elsewhere TRL's head gives constants
    torch.testing.assert_close(values[1], values[0], rtol=rtol, atol=rtol)
    torch.testing.assert_close(grads[1], grads[0], rtol=10 * rtol, atol=rtol)


TRL = {  # TRL's loss type and options -> our name and hyper-parameters
    "sigmoid": ({}, "dpo", {}),
    "hinge": ({}, "hinge", {}),
    "ipo": ({}, "ipo", {}),
    "exo_pair": ({"label_smoothing": 0.05}, "exo_pair", {"label_smoothing": 0.05}),
    "nca_pair": ({}, "nca_pair", {}),
    "robust": ({"label_smoothing": 0.1}, "robust", {"label_smoothing": 0.1}),
    "bco_pair": ({}, "bco_pair", {}),
    "sppo_hard": ({}, "sppo_hard", {}),
    "aot": ({"label_smoothing": 0.1}, "aot", {"label_smoothing": 0.1}),
    "aot_unpaired": ({"label_smoothing": 0.1}, "aot_unpaired", {"label_smoothing": 0.1}),
    "apo_zero": ({}, "apo_zero", {}),
    "apo_down": ({}, "apo_down", {}),
    "discopop": ({}, "discopop", {}),
    "sigmoid_norm": ({}, "sigmoid_norm", {}),
    "sigmoid-forward_kl": ({"f_divergence_type": "forward_kl"}, "fdpo", {"f_divergence_type": "forward_kl"}),
    "sigmoid-js_divergence": ({"f_divergence_type": "js_divergence"}, "fdpo", {"f_divergence_type": "js_divergence"}),
    "sigmoid-ld_alpha": ({"ld_alpha": 0.3}, "ld_dpo", {"ld_alpha": 0.3}),
    "sigmoid-use_weighting": ({"use_weighting": True}, "wpo", {"clamp_weight": False}),
}


@pytest.mark.parametrize("case", TRL)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_trl_dpo_trainer(case, beta):
    options, name, hyper = TRL[case]
    b = batch()
    options = {"loss_types": [case.split("-")[0]], "beta": beta, **options}
    rtol = FLOAT32 if name == "exo_pair" else 1e-12
    compare(lambda logp: trl_dpo(b, logp, **options), lambda logp: ours(name, b, logp, beta=beta, **hyper), b, rtol)


def test_trl_alpha_divergence():
    """TRL's table of exponents has no float64."""
    b = batch(dtype=torch.float32)
    compare(
        lambda logp: trl_dpo(b, logp, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
        lambda logp: ours("fdpo", b, logp, beta=0.1, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
        b, rtol=2e-6,
    )  # fmt: skip


def test_trl_dpo_with_an_nll():
    """RPO is TRL's sum of sigmoid and sft."""
    b = batch()
    compare(
        lambda logp: trl_dpo(b, logp) + 0.005 * trl_dpo(b, logp, loss_types=["sft"]),
        lambda logp: ours("rpo", b, logp, beta=0.1), b,
    )  # fmt: skip


def test_every_loss_of_trl_is_compared():
    from fastpo.config import options

    assert {case.split("-")[0] for case in TRL} | {"sft"} == set(options.TRL_LOSSES)


CPO = [
    ("sigmoid", {}, "cpo", {"cpo_alpha": 0.0}),
    ("sigmoid", {"label_smoothing": 0.1}, "cpo", {"cpo_alpha": 0.0, "label_smoothing": 0.1}),
    ("hinge", {}, "cpo_hinge", {"cpo_alpha": 0.0}),
    ("ipo", {}, "cpo_ipo", {"cpo_alpha": 0.0}),
    ("simpo", {"simpo_gamma": 0.5}, "simpo", {"gamma_beta_ratio": 0.25}),
    ("simpo", {"simpo_gamma": 0.1, "alpha": 0.25}, "alphapo", {"alpha": 0.25, "gamma_beta_ratio": 0.05}),
]


@pytest.mark.parametrize(
    "loss_type, options, name, hyper", CPO, ids=["cpo", "cpo-smoothed", "hinge", "ipo", "simpo", "alphapo"]
)
def test_trl_cpo_trainer(loss_type, options, name, hyper):
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer
    b = batch()
    given = dict(
        loss_type=loss_type, alpha=0.0, beta=2.0, label_smoothing=0.0, simpo_gamma=0.0, accelerator=ACCELERATOR
    )
    stand_in = SimpleNamespace(**{**given, **options})
    by = b.lengths if loss_type in ("simpo", "ipo") else 1  # where TRL averages

    def theirs(logp):
        return CPOTrainer.cpo_loss(stand_in, *(logp.sum(1) / by).chunk(2))[0].mean()

    compare(theirs, lambda logp: ours(name, b, logp, beta=2.0, **hyper), b)


def test_trl_orpo_trainer():
    """Its odds ratio in float32; its NLL is cross entropy over prompt and response."""
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer
    b = batch(dtype=torch.float32)
    stand_in = SimpleNamespace(beta=0.1, accelerator=ACCELERATOR)

    def theirs(logp):
        return -ORPOTrainer.odds_ratio_loss(stand_in, *(logp.sum(1) / b.lengths).chunk(2))[0].mean()

    compare(theirs, lambda logp: ours("orpo", b, logp, nll_coef=0.0, disable_prompt_loss=True), b, rtol=2e-6)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_trl_kto_trainer(loss_type):
    trl = pytest.importorskip("trl")
    b = batch()
    label = torch.arange(2 * P) % 3 != 0
    kl_logps, ref_kl = torch.linspace(-3, 1, 2 * P).double(), torch.linspace(-4, -1, 2 * P).double()
    stand_in = SimpleNamespace(
        accelerator=ACCELERATOR, aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=loss_type == "kto",
        _tp_size=1, _total_train_tokens=0, _metrics={"train": defaultdict(list)}, model=TRAINING, beta=0.1,
        loss_type=loss_type, desirable_weight=1.2, undesirable_weight=0.9, _compute_kl_logps=lambda *_: kl_logps,
    )  # fmt: skip
    rows = {"input_ids": b.mask, "attention_mask": b.mask, "completion_mask": b.mask, "label": label,
            "ref_logps": b.ref.sum(1), "ref_KL_logps": ref_kl}  # fmt: skip
    own = {"desirable_weight": 1.2, "undesirable_weight": 0.9}
    own |= {"kl": (kl_logps - ref_kl).mean()} if loss_type == "kto" else {}
    compare(
        lambda logp: trl.KTOTrainer._compute_loss(stand_in, model(b, logp), rows, False),
        lambda logp: LOSSES[loss_type](logp.sum(1), None, b.ref.sum(1), label=label, **own).mean(),
        b,
    )


def liger(module: str, name: str):
    return getattr(pytest.importorskip(f"liger_kernel.chunked_loss.{module}"), name).preference_loss_fn


LIGER_DPO = {
    "sigmoid": ("dpo", {}), "hinge": ("hinge", {}), "nca_pair": ("nca_pair", {}), "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo_hard", {}), "apo_zero": ("apo_zero", {}), "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {}), "robust": ("robust", {"label_smoothing": 0.1}),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.05}),
}  # fmt: skip


@pytest.mark.parametrize("loss_type", LIGER_DPO)
def test_liger_dpo(loss_type):
    loss = liger("dpo_loss", "LigerFusedLinearDPOFunction")
    name, hyper = LIGER_DPO[loss_type]
    b = batch()
    options = {"loss_type": loss_type, "beta": 0.1, **hyper}

    def theirs(logp):
        return loss(*logp.sum(1).chunk(2), b.mask, *b.ref.sum(1).chunk(2), **options)[0]

    rtol = FLOAT32 if name == "exo_pair" else 1e-12
    compare(theirs, lambda logp: ours(name, b, logp, beta=0.1, **hyper), b, rtol)


def test_liger_has_no_ipo():
    """A known deviation: it raises, where TRL and we divide by the lengths."""
    loss = liger("dpo_loss", "LigerFusedLinearDPOFunction")
    b = batch()
    with pytest.raises(NotImplementedError):
        loss(*b.logp.sum(1).chunk(2), b.mask, loss_type="ipo")


def test_liger_without_a_reference():
    b = batch()
    means = lambda logp: (logp.sum(1) / b.lengths).chunk(2)  # noqa: E731
    cpo = liger("cpo_loss", "LigerFusedLinearCPOFunction")
    simpo = liger("simpo_loss", "LigerFusedLinearSimPOFunction")
    orpo = liger("orpo_loss", "LigerFusedLinearORPOFunction")
    compare(lambda logp: cpo(*logp.sum(1).chunk(2), b.mask, beta=0.1, label_smoothing=0.1)[0],
            lambda logp: ours("cpo", b, logp, cpo_alpha=0.0, label_smoothing=0.1), b)  # fmt: skip
    compare(lambda logp: simpo(*means(logp), b.mask, beta=2.0, gamma=1.0)[0],
            lambda logp: ours("simpo", b, logp), b)  # fmt: skip
    compare(lambda logp: orpo(*means(logp), b.mask, beta=0.1)[0],
            lambda logp: ours("orpo", b, logp, nll_coef=0.0), b)  # fmt: skip


def test_liger_orpo_explodes_where_ours_does_not():
    """A known deviation: a response that is certain makes Liger's odds infinite."""
    zero, other = torch.zeros(1), torch.full((1,), -1.0)
    theirs = liger("orpo_loss", "LigerFusedLinearORPOFunction")(zero.requires_grad_(), other, torch.zeros(2, 1))[0]
    (grad,) = torch.autograd.grad(theirs, zero)
    assert not torch.isfinite(grad).all()
    length = torch.ones(1)
    loss = LOSSES["orpo"](zero, other, chosen_len=length, rejected_len=length, nll_coef=0.0)
    (grad,) = torch.autograd.grad(loss.sum(), zero)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


def test_liger_kto():
    """A known deviation: it has no weights of the two kinds."""
    loss = liger("kto_loss", "LigerFusedLinearKTOFunction")
    b, label, kl = batch(), torch.arange(2 * P) % 3 != 0, torch.tensor(0.4).double()
    compare(
        lambda logp: loss(logp.sum(1), label, b.mask, b.ref.sum(1), beta=0.1, kl=kl)[0],
        lambda logp: LOSSES["kto"](logp.sum(1), None, b.ref.sum(1), label=label, kl=kl).mean(), b,
    )  # fmt: skip

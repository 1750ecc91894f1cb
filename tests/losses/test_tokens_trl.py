"""The losses per token and their advantages against TRL 1.16: GRPOTrainer, RLOOTrainer and GMPOTrainer, called as they
are on a stand-in that has the attributes they read, in fp64, on the same responses (padded there, packed here).
"""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastpo.losses.advantages import advantages, correction, response_kl
from fastpo.losses.table import LOSSES
from fastpo.losses.token_functions import gamma_weights
from fastpo.losses.token_metrics import token_metrics
from fastpo.losses.tokens import Tokens, Totals

LENGTHS = (5, 1, 9, 3, 12, 4, 7, 6)
ADVANTAGE = (1.3, -0.8, -1.1, 0.0, 0.7, 0.9, -2.0, 0.4)
TRUNCATED = 2  # masked out whole, as mask_truncated_completions does
MAX_LENGTH = 16
# Of both; a loss reads its own.
HYPER = {
    "epsilon": 0.2, "epsilon_high": 0.25, "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.3, "vespo_k_pos": 1.5,
    "vespo_lambda_pos": 2.5, "vespo_k_neg": 3.5, "vespo_lambda_neg": 1.7,
}  # fmt: skip
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
CORRECTIONS = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.fixture(autouse=True)
def double():
    """TRL forms some numbers in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trl():
    return pytest.importorskip("trl.trainer.grpo_trainer")


class Accelerator:
    num_processes, process_index, device, sync_gradients = 1, 0, torch.device("cpu"), True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction="sum"):
        return x

    def pad_across_processes(self, x, **_):
        return x


def rollouts(seed=0, spread=0.35):
    """Packed tensors of all responses, [N], and the [S, T] mask of TRL's padding."""
    g = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    noise = lambda scale: scale * torch.randn(n, generator=g)  # noqa: E731
    logp = -3 * torch.rand(n, generator=g) - 0.1
    old = logp + noise(spread)
    sampler = old + noise(0.2)
    sampler[7] = math.nan  # a token that the engine gave no number of
    mask = torch.ones(n)
    begins = [0, *itertools.accumulate(LENGTHS)]
    mask[begins[TRUNCATED] : begins[TRUNCATED + 1]] = 0
    return SimpleNamespace(
        logp=logp, old=old, ref=logp + noise(0.4), sampler=sampler, entropies=torch.rand(n, generator=g), mask=mask,
        advantage=torch.tensor(ADVANTAGE), offsets=torch.tensor(begins),
        there=torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None],
    )  # fmt: skip


def padded(values, x, fill=0.0):
    return torch.full(x.there.shape, fill).masked_scatter(x.there, values)


def trainer(x, logp, **options):
    """What `_compute_loss` reads of `self`."""
    grpo = trl()
    options = {"loss_type": "grpo", "beta": 0.0, "delta": None, "importance_sampling_level": "token",
               "off_policy_mask_threshold": None, "use_bias_correction_kl": True, "top_entropy_quantile": 1.0,
               "use_vllm": False, **HYPER, **options}  # fmt: skip
    args = SimpleNamespace(steps_per_generation=1, **options)
    return SimpleNamespace(
        args=args, accelerator=Accelerator(), model=SimpleNamespace(training=True), aux_loss_enabled=False,
        epsilon_low=args.epsilon, max_completion_length=MAX_LENGTH, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
        vllm_importance_sampling_correction=args.use_vllm,
        get_off_policy_mask=grpo.GRPOTrainer.get_off_policy_mask, get_gamma_weights=grpo.GRPOTrainer.get_gamma_weights,
        get_high_entropy_mask=lambda *a: grpo.GRPOTrainer.get_high_entropy_mask(
            SimpleNamespace(accelerator=Accelerator()), *a
        ),
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded(logp, x), padded(x.entropies, x), None),
        **{k: v for k, v in options.items() if k not in ("epsilon", "delta", "use_bias_correction_kl")},
    )  # fmt: skip


def batch_of(x, *, old=True, ref=True, ratio=None, sampler=False):
    ids = torch.ones(x.there.shape, dtype=torch.long)
    out = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
           "completion_mask": padded(x.mask, x).long(), "advantages": x.advantage,
           "num_items_in_batch": x.mask.sum()}  # fmt: skip
    if old:
        out["old_per_token_logps"] = padded(x.old, x)
        out["old_logps"] = (padded(x.old, x) * out["completion_mask"]).sum(1)
    if ref:
        out["ref_per_token_logps"] = padded(x.ref, x)
    if ratio is not None:
        of_tokens = ratio.shape == x.logp.shape
        out["importance_sampling_ratio"] = padded(ratio, x, 1.0) if of_tokens else ratio[:, None]
    if sampler:
        out["sampling_per_token_logps"] = padded(x.sampler, x)
    return out


def theirs(x, *, make=None, old=True, ratio=None, sampler=False, **options):
    """(value, gradient [N]) of TRL's `_compute_loss`."""
    make = make or trl().GRPOTrainer
    logp = x.logp.clone().requires_grad_()
    stub = trainer(x, logp, use_vllm=ratio is not None, **options)
    value = make._compute_loss(stub, None, batch_of(x, old=old, ratio=ratio, sampler=sampler))
    x.metrics = {k: v[-1] for k, v in stub._metrics["train"].items()}
    return value.detach(), torch.autograd.grad(value, logp)[0]


def ours(name, x, *, old=True, ratio=None, sampler=False, top_entropy_quantile=1.0, **options):
    """(value, gradient [N] in closed form) of fastpo's."""
    loss = LOSSES[name]
    hyper = {k: v for k, v in (HYPER | options).items() if k in loss.defaults}
    given = {"old_logp": x.old} if old else {}
    if ratio is not None:
        given["correction"] = ratio
    if sampler:
        given["sampler_logp"] = x.sampler
    if top_entropy_quantile < 1:
        stub = SimpleNamespace(accelerator=Accelerator())
        kept = trl().GRPOTrainer.get_high_entropy_mask(
            stub, padded(x.entropies, x), padded(x.mask, x), 1 - top_entropy_quantile
        )
        given["policy_mask"] = kept[x.there].double()
    totals = Totals(float(x.mask.sum()), len(LENGTHS), MAX_LENGTH)
    tokens = Tokens(x.logp, x.advantage, x.offsets, ref_logp=x.ref, mask=x.mask, **given)
    x.own_metrics = token_metrics(loss, tokens, **hyper)
    args = (x.logp, x.advantage, x.offsets)
    more = dict(totals=totals, ref_logp=x.ref, mask=x.mask, **given, **hyper)
    return loss(*args, **more), loss.coefficients(*args, **more)


def differences(mine, other):
    """Largest absolute differences of value and gradient."""
    return tuple(float((a - b).abs().max()) for a, b in zip(mine, other, strict=True))


def same_metrics(x):
    """What TRL logged of the loss, and fastpo of the same."""
    got = {k: float(a / b) for k, (a, b) in x.own_metrics.means.items()}
    got |= {k: float(v) for k, v in (x.own_metrics.lowest | x.own_metrics.highest).items()}
    expected = {k: v for k, v in x.metrics.items() if k != "entropy"}
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)  # some of theirs are float32


def weights(x, mode):
    if mode is None:
        return None
    return correction(
        x.old, x.sampler, x.offsets, mode=mode, clip_min=0.7, clip_max=1.4, mask=x.mask,
        per_response=mode.startswith("sequence"),
    )  # fmt: skip


def grpo_cases():
    """(name here, options of TRL's): every loss type, level, KL, two-sided clip and correction that it has."""
    for loss, level in itertools.product(LOSS_TYPES, ("token", "sequence")):
        here = {"loss_type": loss, "importance_sampling_level": level}
        yield loss, here
        for bias in (True, False):
            yield loss, here | {"beta": 0.3, "use_bias_correction_kl": bias}
        if loss in CLIPPED:
            for delta in (1.1, 1.6):
                yield loss, here | {"delta": delta}
                yield loss, here | {"delta": delta, "beta": 0.3}
        for mode in CORRECTIONS[1:]:
            yield loss, here | {"mode": mode}
            yield loss, here | {"mode": mode, "beta": 0.3}
        for more in (
            {"old": False}, {"old": False, "beta": 0.3}, {"off_policy_mask_threshold": 0.02},
            {"off_policy_mask_threshold": 0.02, "sampler": True}, {"top_entropy_quantile": 0.4, "beta": 0.3},
        ):  # fmt: skip
            yield loss, here | more
    for epsilons in ({}, {"epsilon": 3e-4, "epsilon_high": 4e-4}):
        for beta in (0.0, 0.3):
            yield "gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": beta, **epsilons}


def compared(name, options, seed=0):
    """Differences of value and gradient, and the size of the gradient."""
    # GSPO's clip range is far below the spread that fits the others: all its responses would be clipped.
    x, options = rollouts(seed, 1e-3 if options.get("epsilon") == 3e-4 else 0.35), dict(options)
    options["ratio"] = weights(x, options.pop("mode", None))
    other = theirs(x, **options)
    options.pop("loss_type", None)
    mine = ours(name, x, **options)
    same_metrics(x)
    return *differences(mine, other), float(other[1].abs().max())


def label(case):
    name, options = case
    return "-".join([name, *(f"{k}={v}" for k, v in options.items() if k != "loss_type")])


GRPO = list(grpo_cases())


@pytest.mark.parametrize("case", GRPO, ids=label)
def test_grpo_trainer(case):
    for seed in range(3):
        value, gradient, size = compared(*case, seed)
        assert value < 1e-10 and gradient < 1e-10 and size > 1e-6


def gmpo_cases():
    for beta in (0.0, 0.3):
        for more in ({}, {"top_entropy_quantile": 0.4}, {"old": False}, {"epsilon": 0.05, "epsilon_high": 0.1}):
            yield "gmpo", {"beta": beta, **more}


def compared_gmpo(name, options, seed=0):
    trl()
    trainers = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer")
    x = rollouts(seed)
    value, gradient = theirs(x, make=trainers.GMPOTrainer, **options)
    # There a response without tokens that count has the ratio e^0 and the loss -A, a constant; here it has none.
    value = value + x.advantage[TRUNCATED] / len(LENGTHS)
    mine = ours("gmpo", x, **options)
    same_metrics(x)
    return *differences(mine, (value, gradient)), float(gradient.abs().max())


@pytest.mark.parametrize("case", list(gmpo_cases()), ids=label)
def test_gmpo_trainer(case):
    for seed in range(3):
        value, gradient, size = compared_gmpo(*case, seed)
        assert value < 1e-10 and gradient < 1e-10 and size > 1e-6


def rloo_cases():
    for epsilons in ({}, {"epsilon": 0.9, "epsilon_high": 3.0}):
        yield "rloo", epsilons


def compared_rloo(name, options, seed=0):
    trl()
    trainers = pytest.importorskip("trl.trainer.rloo_trainer")
    x = rollouts(seed, 0.08)  # the sum over a response
    value, gradient = theirs(x, make=trainers.RLOOTrainer, **options)
    # There a response without tokens that count has the ratio e^0 and the loss -A, a constant; here it has none.
    value = value + x.advantage[TRUNCATED] / len(LENGTHS)
    mine = ours("rloo", x, **options)
    same_metrics(x)
    return *differences(mine, (value, gradient)), float(gradient.abs().max())


@pytest.mark.parametrize("case", list(rloo_cases()), ids=label)
def test_rloo_trainer(case):
    for seed in range(3):
        value, gradient, size = compared_rloo(*case, seed)
        assert value < 1e-10 and gradient < 1e-10 and size > 1e-6


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_gamma_weights(mode):
    x = rollouts(1)
    ratio = weights(x, mode)
    given = {k.removeprefix("vespo_"): v for k, v in HYPER.items() if k.startswith("vespo_")}
    as_theirs = None
    if ratio is not None:
        as_theirs = padded(ratio, x, 1.0) if ratio.shape == x.logp.shape else ratio[:, None]
    expected = trl().GRPOTrainer.get_gamma_weights(
        x.advantage[:, None], padded(x.logp - x.old, x), padded(x.mask, x), as_theirs, **given
    )
    tokens = Tokens(x.logp, x.advantage, x.offsets, x.old, correction=ratio, mask=x.mask)
    got = gamma_weights(tokens, **{k: v for k, v in HYPER.items() if k.startswith("vespo_")})
    torch.testing.assert_close(got, expected[:, 0], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ advantages


def reward_matrix(functions, seed, groups=6, size=4):
    """[R, F] with NaN here and there, a group of equal rewards, and one in which nothing is judged by any function."""
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(groups * size, functions, generator=g)
    r[torch.rand(r.shape, generator=g) < 0.15] = math.nan
    r[size : 2 * size] = 0.1
    r[2 * size : 3 * size] = math.nan
    r[3 * size] = math.nan  # one response
    return r, torch.arange(groups).repeat_interleave(size), size


def scored(make, rewards, size, **options):
    """TRL's `_generate_and_score_completions` on rollouts whose rewards are given: (its output, its metrics)."""
    responses, functions = rewards.shape
    g = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 6, (responses,), generator=g).tolist()
    longest = max(lengths)
    there = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    draws = [-torch.rand(responses, longest, generator=g) for _ in range(3)]
    old, ref, sampler = (torch.where(there, d, 0.0) for d in draws)
    sampler = old + 0.4 * (sampler - old)
    completions = [[5] * (n - 1) + [2] for n in lengths]
    sampled = [[None if (i + j) % 7 == 0 else v for j, v in enumerate(row[:n].tolist())]
               for i, (row, n) in enumerate(zip(sampler, lengths, strict=True))]  # fmt: skip
    model = torch.nn.Linear(1, 1)
    model.is_gradient_checkpointing = False
    names = [f"f{i}" for i in range(functions)]
    stub = SimpleNamespace(
        accelerator=Accelerator(), model=model, ref_model="ref", environment_factories=None, environments=None,
        tools=[],
        _is_vlm=False, pad_to_multiple_of=None, _tokenizer=SimpleNamespace(pad_token_id=0), eos_token_ids=[2],
        mask_truncated_completions=False, num_generations=size, num_generations_eval=size, reward_func_names=names,
        reward_funcs=names, reward_weights=torch.ones(functions), multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group", num_iterations=1, use_vllm=False, vllm_importance_sampling_correction=False, beta=0.0,
        normalize_advantages=False, reward_clip_range=None, log_multimodal=False,
        args=SimpleNamespace(per_device_train_batch_size=responses, gradient_checkpointing_kwargs=None,
                             steps_per_generation=2, gradient_accumulation_steps=1),
        _metrics={"train": defaultdict(list)}, _pending_extra_logs={}, _pending_metrics={},
        _logs={k: [] for k in ("prompt", "completion", "advantages", "images")}
        | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        _calculate_rewards=lambda *a: rewards.clone(),
        _get_per_token_logps_and_entropies=lambda model, *a, **k: (ref if model == "ref" else old, None, None),
    )  # fmt: skip
    vars(stub).update(options)
    generated = ([[1]] * responses, completions)
    rloo = "RLOO" in make.__name__
    stub._generate = lambda prompts: (
        (*generated, prompts) if rloo else (*generated, None, prompts, sampled if stub.use_vllm else None, {}, None, [])
    )
    score = getattr(make._generate_and_score_completions, "__wrapped__", make._generate_and_score_completions)
    out = score(stub, [{"prompt": "p"}] * responses)
    metrics = {k: v[-1] for k, v in stub._metrics["train"].items()}
    packed = {"old": old[there], "ref": ref[there], "there": there,
              "sampler": torch.tensor([math.nan if v is None else v for row in sampled for v in row]),
              "offsets": torch.tensor([0, *itertools.accumulate(lengths)])}  # fmt: skip
    return out, metrics, packed


def of_grpo_trainer(functions, seed, **options):
    """(advantages, those of GRPOTrainer, its metrics, responses of a group)."""
    rewards, groups, size = reward_matrix(functions, seed)
    w = [1.0, 0.5, 2.0][:functions]
    out, metrics, _ = scored(trl().GRPOTrainer, rewards, size, reward_weights=torch.tensor(w), **options)
    names = {"scale_rewards": "scale", "multi_objective_aggregation": "aggregation"}
    got = advantages(rewards, groups, weights=w, **{names[k]: v for k, v in options.items()})
    return got, out["advantages"].double(), metrics, size


def of_rloo_trainer(seed, normalize, beta, clip_range):
    """(advantages, those of RLOOTrainer, its metrics)."""
    trl()
    make = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    rewards, groups, size = reward_matrix(3, seed)
    out, metrics, packed = scored(
        make, rewards, size, reward_weights=torch.tensor([1.0, 0.5, 2.0]), normalize_advantages=normalize, beta=beta,
        reward_clip_range=clip_range,
    )  # fmt: skip
    got = advantages(
        rewards, groups, weights=[1.0, 0.5, 2.0], baseline="leave_one_out", scale="none", normalize=normalize,
        clip_range=clip_range, penalty=beta * response_kl(packed["old"], packed["ref"], packed["offsets"]),
    )  # fmt: skip
    return got, out["advantages"].double(), metrics


def corrections(mode, bounds):
    """(weights of a sampler's tokens, those of GRPOTrainer)."""
    rewards, _, size = reward_matrix(1, 0)
    out, _, packed = scored(
        trl().GRPOTrainer, rewards, size, use_vllm=True, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=bounds[0],
        vllm_importance_sampling_clip_max=bounds[1],
    )  # fmt: skip
    got = correction(
        packed["old"], packed["sampler"], packed["offsets"], mode=mode, clip_min=bounds[0], clip_max=bounds[1]
    )
    return got, out["importance_sampling_ratio"].expand(packed["there"].shape)[packed["there"]]


@pytest.mark.parametrize("functions", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{"scale_rewards": s} for s in ("group", "batch", "none")]
    + [{"multi_objective_aggregation": "normalize_then_sum"}],
    ids=str,
)
def test_advantages_of_grpo_trainer(functions, options):
    for seed in range(4):
        got, expected, metrics, size = of_grpo_trainer(functions, seed, **options)
        torch.testing.assert_close(got.values, expected, rtol=1e-12, atol=1e-12)
        used = got.reward[got.used]
        assert metrics["reward"] == pytest.approx(float(used.mean()), rel=1e-12)
        assert metrics["reward_std"] == pytest.approx(float(used.std()), rel=1e-12)
        # There the deviation of a group's only usable reward is NaN, which is not near 0.
        usable = got.used.view(-1, size).sum(1).repeat_interleave(size)
        zero_std = got.zero_std & (usable > 1) if options.get("scale_rewards") in ("group", "none") else got.zero_std
        assert metrics["frac_reward_zero_std"] == pytest.approx(float(zero_std.double().mean()))
        assert not got.values[size : 2 * size].any() or options.get("multi_objective_aggregation"), "equal rewards"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("clip_range", [None, (-0.5, 1.0)])
def test_advantages_of_rloo_trainer(normalize, beta, clip_range):
    for seed in range(4):
        got, expected, metrics = of_rloo_trainer(seed, normalize, beta, clip_range)
        torch.testing.assert_close(got.values, expected, rtol=1e-11, atol=1e-11)
        assert metrics["frac_reward_zero_std"] == pytest.approx(float(got.zero_std.double().mean()))


@pytest.mark.parametrize("mode", CORRECTIONS[1:])
@pytest.mark.parametrize("bounds", [(None, 3.0), (0.8, 1.2), (None, None), (0.9, None)])
def test_corrections_of_grpo_trainer(mode, bounds):
    if bounds == (None, None) and mode.endswith("truncate"):
        pytest.skip("TRL's clamp without a bound is an error")
    got, expected = corrections(mode, bounds)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

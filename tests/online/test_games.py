"""The online preference losses through fastpo.train reach the fixed points of their games.

The policy is a Llama whose responses are one letter of n. It is sampled as in any run, so that a policy that is found
differs from the exact one by what some thousand draws leave; the learning rate falls to 0 at the end. The judge is the
game's matrix, as it is or as a coin of that bias.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastpo  # noqa: E402
import online_runs as runs  # noqa: E402
from fastpo import games  # noqa: E402
from fastpo.losses.table import LOSSES  # noqa: E402
from fastpo.sampling.items import Unit, Verdict  # noqa: E402

LETTERS = "abc"
START = (0.5, 0.0, -0.4)
CYCLIC = games.rock_paper_scissors(0.2, 0.5, 0.3)
REWARDS = torch.tensor([0.0, 0.7, 1.2], dtype=torch.float64)


# Of plain SGD on the head, by the curvature of each loss.
RATES = {"online_ipo": 0.01, "ipo_md": 0.01, "nash_md": 0.15, "spo": 0.15, "online_dpo": 0.4, "xpo": 0.25}


class Matrix:
    """P(first beats second); with `tosses` a 0 or 1 of that probability, the same in both orders of a pair."""

    name, unit = "game", "pair"

    def __init__(self, prefs: torch.Tensor, tosses: bool = False):
        self.prefs, self.tosses, self.calls = prefs.tolist(), tosses, 0
        self.key = {"game": self.prefs}

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        self.calls += 1
        for unit in units:
            first, second = (LETTERS.index(r.text) for r in unit.responses)
            if not self.tosses:
                yield unit, Verdict(self.prefs[first][second])
                continue
            swapped = unit.i > unit.j
            p = self.prefs[second][first] if swapped else self.prefs[first][second]
            won = runs.seeded(self.calls, unit.item.id, sorted((unit.i, unit.j))).random() < p
            yield unit, Verdict(float(won != swapped))

    def close(self) -> None:
        pass


def tokenizer() -> Any:
    words = {letter: i for i, letter in enumerate(LETTERS)} | {"<eos>": len(LETTERS)}
    inner = tokenizers.Tokenizer(models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="a", pad_token="<eos>", eos_token="<eos>"
    )


def policy(logits: Sequence[float]) -> torch.nn.Module:
    """A model whose next letter has these log-odds, and whose end never comes. Its head alone is trained."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=None, eos_token_id=len(LETTERS), pad_token_id=len(LETTERS),
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.model.requires_grad_(False)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([[0]])).last_hidden_state[0, -1]
        rows = torch.tensor([*logits, -25.0])
        model.lm_head.weight.copy_(rows[:, None] * hidden[None] / hidden.square().sum())
    return model


@torch.no_grad()
def log_policy(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.tensor([[0]])).logits[0, -1, :-1].double().log_softmax(-1)


def play(
    folder: Path, loss_type: str, judge: Matrix, *, prompts: int = 4, whole: bool = False, **options: Any
) -> torch.Tensor:
    """The mean policy of the second half of a run, as a log-policy [n]; with `whole` that of each step, [steps, n]."""
    args = dict(
        output_dir=str(folder), loss_type=loss_type, max_completion_length=1, per_device_train_batch_size=prompts,
        temperature=1.0, max_steps=150, learning_rate=RATES[loss_type], lr_scheduler_type="linear", warmup_steps=0,
        use_cpu=True, bf16=False, disable_tqdm=True, report=False, report_to="none", max_grad_norm=0.0,
        save_strategy="no", save_final=False, weight_decay=0.0, optim="sgd", gradient_checkpointing=False,
        num_generations=16, guardrails=False, logging_steps=1000,
    ) | options  # fmt: skip
    seen: list[torch.Tensor] = []
    model = policy(START)
    fastpo.train(model, [{"prompt": "a"}] * prompts, judge=judge, processing_class=tokenizer(), args=args,
                 callbacks=[Watch(lambda model: seen.append(log_policy(model).exp()))])  # fmt: skip
    path = torch.stack(seen)
    return path if whole else path[len(path) // 2 :].mean(0).log()


class Watch(transformers.TrainerCallback):
    def __init__(self, then: Callable[..., None]):
        self.then = then

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.then(given["model"])


def same(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference of a probability."""
    return float((got.exp() - want.exp()).abs().max())


def fixed_point(prefs: torch.Tensor, ref: torch.Tensor, tau: float, share: float) -> torch.Tensor:
    """log pi of pi = pi_ref e^(P m / tau) / Z, m of pi^(1 - share) pi_ref^share."""
    log_pi = ref.clone()
    for _ in range(4000):
        m = ((1 - share) * log_pi + share * ref).softmax(-1)
        log_pi = (0.95 * log_pi + 0.05 * (ref + prefs @ m / tau)).log_softmax(-1)
    return log_pi


REF = torch.tensor(START, dtype=torch.float64).log_softmax(-1)


# What some thousand draws leave is about a hundredth of a probability; the points that a wrong tau, a wrong opponent or
# no reference would give are farther by far. Tosses of a coin leave more.
NEAR = 0.02


def reaches(found: torch.Tensor, want: torch.Tensor, *others: torch.Tensor, near: float = NEAR) -> None:
    apart, further = same(found, want), [same(other, want) for other in (REF, *others)]
    assert apart < near, (apart, found.exp().tolist(), want.exp().tolist())
    assert min(further) > 2 * near


TAU = 0.15


def test_online_ipo(tmp_path):
    found = play(tmp_path, "online_ipo", Matrix(CYCLIC), beta=TAU)
    others = fixed_point(CYCLIC, REF, TAU / 2, 0.0), fixed_point(CYCLIC, REF, TAU, 0.5)
    reaches(found, fixed_point(CYCLIC, REF, TAU, 0.0), *others)


@pytest.mark.slow
def test_ipo_md(tmp_path):
    found = play(tmp_path, "ipo_md", Matrix(CYCLIC), beta=TAU)
    others = fixed_point(CYCLIC, REF, TAU / 2, 0.5), fixed_point(CYCLIC, REF, TAU, 0.0)
    reaches(found, fixed_point(CYCLIC, REF, TAU, 0.5), *others)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_nash_md(tmp_path, share):
    found = play(tmp_path, "nash_md", Matrix(CYCLIC), beta=TAU, mixture_coef=share)
    others = fixed_point(CYCLIC, REF, TAU / 2, share), fixed_point(CYCLIC, REF, TAU, 0.5 - share)
    reaches(found, fixed_point(CYCLIC, REF, TAU, share), *others)


@pytest.mark.slow
def test_spo_with_a_reverse_kl_finds_the_regularised_nash(tmp_path):
    found = play(tmp_path, "spo", Matrix(CYCLIC), beta=TAU, kl_estimator="k2")
    reaches(found, fixed_point(CYCLIC, REF, TAU, 0.0), fixed_point(CYCLIC, REF, TAU / 2, 0.0))


@pytest.mark.slow
def test_spo_alone_goes_round_its_equilibrium(tmp_path):
    prefs = games.rock_paper_scissors()
    path = play(tmp_path, "spo", Matrix(prefs), whole=True, max_steps=280, lr_scheduler_type="constant",
                learning_rate=0.03)  # fmt: skip
    nash = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert (path.mean(0) - nash).abs().max() < 0.05  # of all that it has been
    assert (path - nash).abs().amax(1).min() > 0.08  # and never there


def test_online_dpo_on_a_coin(tmp_path):
    prefs, beta = games.bradley_terry(REWARDS), 0.5
    found = play(tmp_path, "online_dpo", Matrix(prefs, tosses=True), beta=beta, num_generations=2, prompts=32)
    want = (REF + REWARDS / beta).log_softmax(-1)
    reaches(found, want, (REF + 2 * REWARDS / beta).log_softmax(-1), near=0.03)


def xpo_point(prefs: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """Where the expectation of the loss, with pairs of policy and reference, has no gradient."""
    logits, n = REF.clone(), len(REF)
    y, other = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    for _ in range(4000):
        x = logits.clone().requires_grad_()
        logps = x.log_softmax(-1)
        weights = torch.outer(logps.detach().exp(), REF.exp()).flatten()
        total = x.new_zeros(())
        for first, second, p, of_ref in ((y, other, prefs[y, other], False), (other, y, prefs[other, y], True)):
            losses = LOSSES["xpo"](
                logps[first], logps[second], ref_chosen_logps=REF[first], ref_rejected_logps=REF[second], beta=beta,
                alpha=alpha, chosen_of_reference=torch.full((n * n,), of_ref),
            )  # fmt: skip
            total = total + (weights * p * losses).sum()
        logits = logits - 2.0 * torch.autograd.grad(total, x)[0]
    return logits.log_softmax(-1)


@pytest.mark.slow
def test_xpo_on_a_coin(tmp_path):
    prefs, beta, alpha = games.bradley_terry(REWARDS), 0.5, 0.1
    found = play(tmp_path, "xpo", Matrix(prefs, tosses=True), beta=beta, num_generations=2, prompts=32,
                 loss_kwargs={"alpha": alpha})  # fmt: skip
    plain = (REF + REWARDS / beta).log_softmax(-1)
    assert same(xpo_point(prefs, beta, 0.0), plain) < 1e-3
    reaches(found, xpo_point(prefs, beta, alpha), plain, near=0.04)

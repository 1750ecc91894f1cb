"""Each game-theoretic recipe through the real loop, files and stages included, is the exact update of fastpo.games.

The policy is a Llama whose responses are one token of a vocabulary of n. In the sampler's place stands one that gives
every response once, with a count in proportion to its probability, so that the paper's expectations are exact.
The judge is the game's matrix, cyclic ones among them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

import fastpo
from fastpo import games
from fastpo.games.games import sppo as exact_sppo
from fastpo.sampling.items import Failure, Request, Response, Unit, Verdict

COUNTED = 1_000_000
LETTERS = "abcdef"


class Enumerator:
    """Every one-token response of the policy, as often as a million samples would have it on average."""

    exact = True
    key = {"engine": "enumerated"}

    def __init__(self, policy: str):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(policy).eval()

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        return [list(requests)]

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Response | Failure]]:
        for request in requests:
            logits = self.model(input_ids=torch.tensor([request.prompt_ids])).logits[0, -1]
            p = logits.double().softmax(-1)[request.k]
            yield request, Response(LETTERS[request.k], (request.k,), False, float(p.log()),
                                    count=max(1, round(COUNTED * float(p))))  # fmt: skip

    def close(self) -> None:
        pass


class Matrix:
    """P(first beats second) of a game."""

    name, unit = "game", "pair"

    def __init__(self, prefs: torch.Tensor):
        self.prefs = prefs
        self.key = {"game": prefs.tolist()}

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        for unit in units:
            first, second = (LETTERS.index(r.text) for r in unit.responses)
            yield unit, Verdict(float(self.prefs[first, second]))

    def close(self) -> None:
        pass


def one_token_policy(folder: Path, logits: Sequence[float]) -> torch.Tensor:
    """Saves a model whose next token has these log-odds; returns its log-policy."""
    n = len(logits)
    inner = tokenizers.Tokenizer(models.WordLevel({LETTERS[i]: i for i in range(n)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="a", pad_token="a", eos_token="b")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=n, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([[0]])).last_hidden_state[0, -1]
        model.lm_head.weight.copy_(torch.tensor(logits)[:, None] * hidden[None] / hidden.square().sum())
        log_policy = model(input_ids=torch.tensor([[0]])).logits[0, -1].double().log_softmax(-1)
    model.save_pretrained(folder)
    return log_policy


def play(
    folder: Path, prefs: torch.Tensor, logits: Sequence[float], recipe: str, **options: Any
) -> tuple[list[torch.Tensor], Path]:
    """The log-policies of three iterations, the start first."""
    policies = [one_token_policy(folder / "start", logits)]
    train = {
        "max_steps": 300, "learning_rate": 0.03, "lr_scheduler_type": "cosine", "warmup_ratio": 0.0, "warmup_steps": 0,
        "per_device_train_batch_size": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report": False,
        "max_grad_norm": 1e9, "save_strategy": "no", "weight_decay": 0.0, "adam_beta2": 0.99, "optim": "adamw_torch",
        "gradient_checkpointing": False, "num_train_epochs": None, **options.pop("train"),
    }  # fmt: skip
    train = {name: value for name, value in train.items() if value is not None}
    result = fastpo.iterate(
        recipe=recipe, model=str(folder / "start"), prompts=[{"id": "p", "prompt": "a"}],
        output_dir=str(folder / "run"), sampler=Enumerator, scorers={"game": Matrix(prefs)},
        sample={"n": len(logits), "drop_truncated": False, "sources": ()}, train=train, **options,
    )  # fmt: skip
    assert result is not None
    for t in (1, 2, 3):
        model = transformers.AutoModelForCausalLM.from_pretrained(result.policies[f"iterate-{t}"]).eval()
        with torch.no_grad():
            policies.append(model(input_ids=torch.tensor([[0]])).logits[0, -1].double().log_softmax(-1))
    return policies, result.output_dir


START = (0.5, 0.0, -0.4)
GAMES = {
    "rps": games.rock_paper_scissors(),
    "weighted rps": games.rock_paper_scissors(0.2, 0.3, 0.4),
    "condorcet": games.condorcet(3),
}


def same(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference of a probability."""
    return float((got.exp() - want.exp()).abs().max())


@pytest.mark.parametrize(
    "game", [name if name == "rps" else pytest.param(name, marks=pytest.mark.slow) for name in GAMES]
)
def test_dno_is_multiplicative_weights(tmp_path, game):
    prefs, eta = GAMES[game], 0.5
    policies, _ = play(
        tmp_path, prefs, START, "dno", train={"beta": eta}, replay={1: None, 2: None}, reuse_prompts=True
    )
    for before, after in zip(policies, policies[1:]):
        assert same(after, games.mwu(prefs, before, eta=eta)) < 1e-3


@pytest.mark.slow
def test_sppo(tmp_path):
    prefs, eta = GAMES["weighted rps"], 0.2
    policies, _ = play(
        tmp_path, prefs, START, "sppo", train={"beta": 1 / eta}, select={"policy": "all"}, reuse_prompts=True
    )
    for before, after in zip(policies, policies[1:]):
        assert same(after, exact_sppo(prefs, before, eta=1 / eta)) < 1e-3


@pytest.mark.slow
def test_dno_prct(tmp_path):
    prefs, eta = GAMES["weighted rps"], 4.0
    select = {"policy": "all", "labels": "soft", "min_chosen": None, "margin": 0.0, "margin_if_chosen_sampled": None,
              "repeated_ngrams": None}  # fmt: skip
    policies, _ = play(
        tmp_path, prefs, START, "dno_prct", train={"beta": eta}, select=select, replay={1: None, 2: None},
        reuse_prompts=True,
    )  # fmt: skip
    for before, after in zip(policies, policies[1:]):
        assert same(after, games.dno_prct(prefs, before, eta=eta)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("exchanged", [False, True])
def test_inpo_and_with_its_references_exchanged(tmp_path, exchanged):
    prefs, eta, tau = GAMES["weighted rps"], 0.5, 0.4
    train = {"loss_kwargs": {"eta": eta, "kappa": tau / eta}}
    train |= {"reference": "current", "previous": "start"} if exchanged else {}
    select = {"policy": "all", "labels": "soft"}
    policies, _ = play(
        tmp_path, prefs, START, "inpo", train=train, select=select, score={"units": "all"}, reuse_prompts=True
    )
    worst = max(
        same(after, games.inpo(prefs, before, log_ref=policies[0], eta=eta, tau=tau))
        for before, after in zip(policies, policies[1:])
    )
    assert worst > 1e-2 if exchanged else worst < 1e-3


def test_online_ipo(tmp_path):
    prefs, tau = GAMES["rps"], 0.8
    train = {"loss_type": "ipo", "beta": tau, "loss_kwargs": {"ipo_reduce": "sum"}}
    policies, _ = play(
        tmp_path, prefs, START, "dno_prct", train=train, replay={1: None, 2: None}, reuse_prompts=True,
        select={"policy": "all", "labels": "soft", "min_chosen": None, "margin": 0.0, "margin_if_chosen_sampled": None,
                "repeated_ngrams": None},
    )  # fmt: skip
    for before, after in zip(policies, policies[1:]):
        assert same(after, games.mwu(prefs, before, eta=tau)) < 1e-3


def test_a_cyclic_judge_stays_cyclic(tmp_path):
    """P is kept as measured, not squashed into scores."""
    prefs = GAMES["weighted rps"]
    train: Mapping[str, Any] = {"beta": 1.0, "max_steps": 1}
    _, folder = play(tmp_path, prefs, START, "dno", train=dict(train), replay={1: None, 2: None}, reuse_prompts=True)
    from fastpo.loop.prompts import from_json
    from fastpo.loop.score_stage import read_scores

    lines = [json.loads(line) for line in open(folder / "iter-001" / "prompts.jsonl")]
    items = [from_json(line).with_responses([Response(letter) for letter in "abc"]) for line in lines]
    (scores,) = read_scores(folder / "iter-001" / "scores", "game", items).values()
    for i in range(3):
        for j in range(3):
            if i != j:
                assert scores.wins[i][j] == pytest.approx(float(prefs[i, j]), abs=1e-12)

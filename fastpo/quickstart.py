"""The built-in first run: a small model that adds carelessly learns from its own right and wrong answers to add well.

No network, no weights to fetch. A Llama-type model is supervised on demonstrations of two-digit sums of which most
forget to carry, until it is right about half of the time; several answers are sampled for each problem, right ones
paired with wrong ones, and `fastpo.train` does the rest. Answers are written ones first, as one adds on paper:
47+38=85 is "58". Accuracy is exact match on problems that were never trained on, in either order of their numbers.
"""

import argparse
import contextlib
import copy
import json
import logging
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import fastpo
from fastpo.errors import ConfigError, TrainingError

Problem = tuple[int, int]

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+="
ANSWER_TOKENS = 4  # three digits and the end

# Per loss: settled over three seeds, with 60 steps of 64 pairs. SimPO has no reference to hold it, so it goes slowly.
PREFERENCE: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 3.0, "learning_rate": 1e-4},
    "simpo": {"beta": 10.0, "gamma_beta_ratio": 0.5, "learning_rate": 1e-5},
    "sppo": {"beta": 0.05, "learning_rate": 1e-4},
}


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    hidden: int
    layers: int
    supervised_rate: float
    supervised_target: float  # sampled accuracy at which the supervision stops
    supervised_limit: int  # steps; reached only if the model does not learn to add
    prompts: int
    samples: int
    steps: int
    batch: int
    heldout: int


FULL = Size(128, 3, 1.5e-3, 0.45, 1500, prompts=3072, samples=4, steps=60, batch=64, heldout=1000)
FAST = Size(64, 2, 3e-3, 0.42, 1500, prompts=1024, samples=4, steps=40, batch=32, heldout=500)


# ---- the task


def prompt_of(problem: Problem) -> str:
    """The text that the model continues."""
    return f"{problem[0]}+{problem[1]}="


def right_answer(problem: Problem) -> str:
    """The sum, ones first."""
    return str(sum(problem))[::-1]


def careless_answer(problem: Problem) -> str:
    """The sum without its carries, ones first: 47+38 gives 5 and 7."""
    columns = zip(str(problem[0])[::-1], str(problem[1])[::-1], strict=True)
    return "".join(str((int(a) + int(b)) % 10) for a, b in columns)


def is_right(problem: Problem, answer: str) -> bool:
    """The judge: exact match."""
    return answer == right_answer(problem)


def split_problems(rng: random.Random, heldout: int) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """(training, validation, held-out) problems; a problem and its mirror image fall on the same side."""
    unordered = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(unordered)
    both = [sorted({(a, b), (b, a)}) for a, b in unordered]
    parts: list[list[Problem]] = [[], []]
    for part, count in zip(parts, (heldout, 500), strict=True):
        while len(part) < count:
            part += both.pop()
    training = [problem for group in both for problem in group]
    rng.shuffle(training)
    return training, parts[1], parts[0]


def demonstrations(problems: Sequence[Problem], rng: random.Random, careless: float = 0.6) -> list[dict[str, str]]:
    """Rows for supervision, of which the share `careless` forgets every carry."""
    return [
        {"prompt": prompt_of(p), "completion": (careless_answer if rng.random() < careless else right_answer)(p)}
        for p in problems
    ]


# ---- model and tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def build_model(tokenizer: PreTrainedTokenizerBase, size: Size, seed: int) -> LlamaForCausalLM:
    """A small random Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        # The usual 0.02 is for wide models; at this width it took three times as many steps to learn to carry.
        initializer_range=0.7 / size.hidden**0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def _as_generator(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and the model's own attention, also in a callback, where training has the packed one attached."""
    attention, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


@torch.no_grad()
def sample_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], seed: int | None = None
) -> list[str]:
    """One answer a problem: greedy without a seed, else sampled at temperature 1. Prompts have one length: no padding."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    eos, answers = tokenizer.eos_token_id, []
    with _as_generator(model):
        for start in range(0, len(problems), 2048):
            prompts = [prompt_of(p) for p in problems[start : start + 2048]]
            tokens = torch.tensor(tokenizer(prompts)["input_ids"])  # [B, prompt]
            cache, columns = None, []
            for _ in range(ANSWER_TOKENS):
                out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, logits = out.past_key_values, out.logits[:, -1].float()
                if generator is None:
                    tokens = logits.argmax(-1, keepdim=True)
                else:
                    tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                columns.append(tokens)
            for row in torch.cat(columns, 1).tolist():
                answers.append(tokenizer.decode(row[: row.index(eos)] if eos in row else row))
    return answers


def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    samples: int = 0,
    seed: int = 0,
) -> float:
    """Exact match of greedy answers, or of `samples` sampled ones a problem."""
    asked = [p for p in problems for _ in range(samples or 1)]
    answers = sample_answers(model, tokenizer, asked, seed if samples else None)
    return sum(map(is_right, asked, answers)) / len(asked)


# ---- preferences


def make_pairs(problems: Sequence[Problem], answers: Sequence[str], rng: random.Random) -> list[dict[str, Any]]:
    """One right and one wrong answer of each problem that has both among its samples, which lie side by side.

    An answer's win probability is the share of its problem's samples that it beats, ties counting one half (SPPO).
    """
    samples = len(answers) // len(problems)
    rows = []
    for i, problem in enumerate(problems):
        group = answers[i * samples : (i + 1) * samples]
        right = [a for a in group if is_right(problem, a)]
        wrong = [a for a in group if a and not is_right(problem, a)]
        if right and wrong:
            share = len(right) / samples
            rows.append(
                {
                    "prompt": prompt_of(problem),
                    "chosen": right[0],
                    "rejected": rng.choice(wrong),
                    "win_prob_chosen": 1 - share / 2,
                    "win_prob_rejected": (1 - share) / 2,
                }
            )
    return rows


class Measure(TrainerCallback):
    """Accuracy on the validation problems every few steps; training stops where the sampled one reaches `target`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], every: int, target: float | None = None
    ):
        self.tokenizer, self.problems, self.every, self.target = tokenizer, problems, every, target
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        sampled = accuracy(model, self.tokenizer, self.problems, samples=2, seed=state.global_step)
        greedy = accuracy(model, self.tokenizer, self.problems)
        self.curve.append({"step": state.global_step, "sampled": sampled, "greedy": greedy})
        if self.target is not None and sampled >= self.target:
            control.should_training_stop = True

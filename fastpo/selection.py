"""Scores of judges and reward models: what turns them into pairs, and how a policy is measured by them.

Plain functions of tensors and rows; no judge is called here. Lengths of texts are in characters, as the papers count
them. Sources: WildBench 2406.04770, length-controlled AlpacaEval 2404.04475, reward ensembles 2310.02743, DICE
2406.09760, reward-augmented relabelling 2410.08067.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.errors import ConfigError

WB_CHOICES = {"A++": 1.0, "A+": 0.5, "A=B": 0.0, "B+": -0.5, "B++": -1.0}


def wb_reward(choices: Sequence[str], len_a: Sequence[int], len_b: Sequence[int], *, margin: int = 500) -> float:
    """WildBench's reward of A against B, in [-1, 1]: the mean of the judge's choices.

    A slight win of a response more than `margin` characters longer than the loser is a tie; a clear one stands. A
    negative margin turns the rule off.
    """
    if not choices or not len(choices) == len(len_a) == len(len_b):
        raise ConfigError(f"wb_reward needs as many lengths as choices, not {len(choices)}, {len(len_a)}, {len(len_b)}")
    total = 0.0
    for choice, a, b in zip(choices, len_a, len_b):
        if choice not in WB_CHOICES:
            raise ConfigError(f"wb_reward: {choice!r} is none of {', '.join(WB_CHOICES)}")
        score = WB_CHOICES[choice]
        longer = a - b if score > 0 else b - a  # the winner
        total += 0.0 if abs(score) == 0.5 and longer > margin >= 0 else score
    return total / len(choices)


def length_controlled_win_rate(prefs: Tensor, len_model: Tensor, len_baseline: Tensor) -> tuple[float, float]:
    """(win rate in percent at equal lengths, coefficient of length) of P(the model beats the baseline), [N] in [0, 1].

    AlpacaEval 2's logistic regression in its minimal form: an intercept and tanh of the standardised difference of
    lengths, by maximum likelihood (scikit-learn's). Without its instruction difficulties, gamed baselines and L1
    penalty, so not equal to the leaderboard's figures. Where a length separates won from lost there is no finite
    maximum: a ridge of 1e-9 a row then decides, the coefficient is large and the rate says little. ConfigError without
    scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ConfigError(
            "length_controlled_win_rate needs scikit-learn, which is not installed: pip install 'fastpo[evals]'"
        ) from None
    p, model, baseline = (torch.as_tensor(v, dtype=torch.float64) for v in (prefs, len_model, len_baseline))
    if not (p.dim() == 1 and p.shape == model.shape == baseline.shape and len(p) > 1):
        raise ConfigError("length_controlled_win_rate needs three vectors of one length, two rows or more")
    if not ((p >= 0) & (p <= 1)).all():
        raise ConfigError("length_controlled_win_rate: preferences must be in [0, 1]")
    n, difference = len(p), model - baseline
    spread = difference.std()  # the sample's, over N - 1
    feature = torch.tanh(difference / spread) if spread > 0 else torch.zeros_like(difference)
    # A preference p is a win of weight p and a loss of weight 1 - p. The intercept is a column, so that the ridge holds
    # it too: without, it has no finite value where all is won.
    x = torch.stack([torch.ones_like(feature), feature], 1).repeat(2, 1)  # [2N, 2]
    won = torch.arange(2 * n) < n
    fit = LogisticRegression(C=1e9 / n, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    fit.fit(x.numpy(), won.numpy(), sample_weight=torch.cat([p, 1 - p]).numpy())
    intercept, of_length = torch.from_numpy(fit.coef_[0])
    return 100 * torch.sigmoid(intercept).item(), of_length.item()


def ensemble_reward(scores: Tensor, rule: str = "uwo", *, coefficient: float = 0.5, unbiased: bool = False) -> Tensor:
    """One reward of k reward models' scores [k, ...]: their `mean`; `wco`, the least; `uwo`, mean - coefficient Var.

    The paper's variance is 1/k; `unbiased` is 1/(k - 1), as its PPO code has it.
    """
    if rule == "mean":
        return scores.mean(0)
    if rule == "wco":
        return scores.amin(0)
    if rule != "uwo":
        raise ConfigError(f"ensemble_reward: {rule!r} is none of mean, wco, uwo")
    if unbiased and len(scores) < 2:
        raise ConfigError("ensemble_reward: an unbiased variance needs two reward models or more")
    return scores.mean(0) - coefficient * scores.var(0, unbiased=unbiased)


def best_of_n(proxy: Tensor, n: int, gold: Tensor | None = None) -> float:
    """Expected gold score (default: the proxy's own) of the best by proxy of n drawn without return, from N [N].

    sum over i of C(i - 1, n - 1)/C(N, n) R_(i), R sorted by proxy ascending: without bias and without drawing.
    """
    total = len(proxy)
    if not 1 <= n <= total:
        raise ConfigError(f"best_of_n: n must be in [1, {total}], not {n}")
    ordered = (proxy if gold is None else gold).double()[torch.argsort(proxy, stable=True)]
    shares = [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]
    return (torch.tensor(shares, dtype=torch.float64) @ ordered).item()


def length_penalty(
    scores: Sequence[Tensor], n_chars: Sequence[Tensor], *, grid: Sequence[float] | None = None
) -> tuple[float, float]:
    """DICE's alpha: (the penalty per character, the mean length gap of the best/worst pairs that it leaves).

    `scores` and `n_chars` hold a tensor [K] a prompt. Alpha rises over the grid (default 0 to 1 by 0.001) while the
    absolute mean gap in characters between the best and the worst by score - alpha n_chars does not.
    """
    if not scores or len(scores) != len(n_chars):
        raise ConfigError(f"length_penalty: {len(scores)} prompts have scores and {len(n_chars)} have lengths")
    found: tuple[float, float] | None = None
    for alpha in [i / 1000 for i in range(1001)] if grid is None else grid:
        gaps = []
        for s, chars in zip(scores, n_chars):
            reward = s.double() - alpha * chars
            gaps.append(float(chars[reward.argmax()] - chars[reward.argmin()]))
        gap = sum(gaps) / len(gaps)
        if found is not None and abs(gap) > abs(found[1]):
            break
        if found is None or abs(gap) < abs(found[1]):
            found = (alpha, gap)
    if found is None:
        raise ConfigError("length_penalty: the grid is empty")
    return found


GOAL = "Write a response whose overall score is {goal} on a scale of 1 to 10."  # our wording, not the authors'


def relabel(row: Mapping[str, Any], *, template: str = GOAL, joint: str = "\n\n") -> list[dict[str, Any]]:
    """Reward-augmented pairs of one scored pair: for the chosen's score as goal the pair, for the rejected's its flip.

    `row` has prompt, chosen, rejected, chosen_score and rejected_score. The goal and the
    joint go before a prompt that is a text; in a conversation it ends the system's turn, which is added where there is
    none. Equal scores would contradict
    each other: no pairs. The row is left as it was.
    """
    lacking = [c for c in ("prompt", "chosen", "rejected", "chosen_score", "rejected_score") if c not in row]
    if lacking:
        raise ConfigError(f"relabel: no column {lacking[0]!r}")
    won, lost = row["chosen_score"], row["rejected_score"]
    if won == lost:
        return []
    pairs = ((won, "chosen", "rejected"), (lost, "rejected", "chosen"))
    return [
        {
            "prompt": _with_goal(row["prompt"], template.format(goal=f"{goal:g}"), joint),
            "chosen": row[c],
            "rejected": row[r],
        }
        for goal, c, r in pairs
    ]


def _with_goal(prompt: Any, goal: str, joint: str) -> Any:
    if isinstance(prompt, str):
        return f"{goal}{joint}{prompt}"
    if prompt and prompt[0]["role"] == "system":
        return [{**prompt[0], "content": f"{prompt[0]['content']}{joint}{goal}"}, *prompt[1:]]
    return [{"role": "system", "content": goal}, *prompt]

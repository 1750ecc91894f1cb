"""A policy that is one table of logits, trained through the library's own log-probability op and losses.

One prompt and n responses of one token: vocabulary n, hidden size 1, the hidden state the number one, so the head's
weight [n, 1] is the table. What a language model's loss does on infinitely many pairs is then a sum over n^2 pairs, and
its minimiser can be held against the closed forms of `fastpo.games`. fp64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.errors import ConfigError
from fastpo.games.games import Algorithm, kappa
from fastpo.losses.table import LOSSES
from fastpo.ops import linear_logprob


class TabularPolicy(torch.nn.Module):
    """Log-probabilities [n] of n one-token responses."""

    hidden: Tensor
    target: Tensor

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(log_probs.detach().clone()[:, None])  # [n, 1]
        self.register_buffer("hidden", torch.ones_like(self.weight, requires_grad=False))
        self.register_buffer("target", torch.arange(len(log_probs)))

    def forward(self) -> Tensor:
        logps = linear_logprob(self.hidden, self.weight, self.target)
        assert isinstance(logps, Tensor)
        return logps


def population_loss(
    name: str,
    logps: Tensor,  # [n]
    weights: Tensor,  # [n, n] how often the pair (y, z) is drawn, in this order
    *,
    labels: Tensor | None = None,  # [n, n] P(y is the chosen one); None: the loss reads win probabilities instead
    ref: Tensor | None = None,  # [n]
    prev: Tensor | None = None,  # [n]
    win: Tensor | None = None,  # [n] P(y beats the previous policy)
    **hyper: Any,
) -> Tensor:
    """The expectation of LOSSES[name] over all pairs, drawn by `weights` and labelled by `labels`. -> scalar"""
    n = len(logps)
    chosen, rejected = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    one = logps.new_ones(n * n)
    given: dict[str, Any] = {"chosen_len": one, "rejected_len": one}
    for key, values in (("ref", ref), ("prev", prev)):
        if values is not None:
            given |= {f"{key}_chosen_logps": values[chosen], f"{key}_rejected_logps": values[rejected]}
    if win is not None:
        given |= {"win_prob_chosen": win[chosen], "win_prob_rejected": win[rejected]}
    losses = LOSSES[name](logps[chosen], logps[rejected], **given, **hyper)
    # A pair (y, z) is drawn in either order, and y is the chosen one with its label's probability.
    frequency = weights if labels is None else (weights + weights.T) * labels
    return (frequency.flatten() * losses).sum()


def fit(objective: Callable[[Tensor], Tensor], start: Tensor, *, iterations: int = 500) -> Tensor:
    """The log-policy [n] that minimises objective(logps) over a table of logits: L-BFGS from `start`, to rounding."""
    policy = TabularPolicy(start)
    optimiser = torch.optim.LBFGS(
        policy.parameters(), max_iter=iterations, tolerance_grad=1e-13, tolerance_change=1e-18, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective(policy())
        value.backward()
        return value

    # Curvatures may lie far apart (an objective may be scaled by 1/eta^2): a fresh start corrects a line search that
    # rounding stopped early.
    for _ in range(3):
        optimiser.step(closure)
    return policy().detach()


# Population losses whose exact minimisers are the updates of `fastpo.games`: (logps, prefs, log_pi, log_ref, eta, tau).


def _mwu(logps: Tensor, prefs: Tensor, log_pi: Tensor, eta: float) -> Tensor:
    return population_loss("dno", logps, _both(log_pi), ref=log_pi, win=prefs @ log_pi.exp(), beta=eta)


def _sppo(logps: Tensor, prefs: Tensor, log_pi: Tensor, eta: float) -> Tensor:
    return population_loss("sppo", logps, _both(log_pi), ref=log_pi, win=prefs @ log_pi.exp(), beta=eta)


def _dno_prct(logps: Tensor, prefs: Tensor, log_pi: Tensor, eta: float) -> Tensor:
    return population_loss("dpo", logps, _both(log_pi), labels=prefs, ref=log_pi, beta=eta)


def _inpo(logps: Tensor, prefs: Tensor, log_pi: Tensor, eta: float, log_ref: Tensor, tau: float) -> Tensor:
    references = {"ref": log_ref, "prev": log_pi}
    k = kappa(eta, tau)
    return population_loss("inpo", logps, _both(log_pi), labels=prefs, **references, eta=eta, kappa=k)


def _nash_md(logps: Tensor, prefs: Tensor, log_pi: Tensor, eta: float, log_ref: Tensor, tau: float) -> Tensor:
    k = kappa(eta, tau)
    log_m = torch.log_softmax(k * log_ref + (1 - k) * log_pi, 0)
    return population_loss("ipo", logps, _both(log_m), labels=prefs, ref=log_m, beta=eta, ipo_reduce="sum")


def _online_ipo(logps: Tensor, prefs: Tensor, log_pi: Tensor, eta: float, log_ref: Tensor, tau: float) -> Tensor:
    return population_loss("ipo", logps, _both(log_pi), labels=prefs, ref=log_ref, beta=tau, ipo_reduce="sum")


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "mwu": _mwu, "sppo": _sppo, "dno_prct": _dno_prct, "inpo": _inpo, "inpo_decay": _inpo, "nash_md": _nash_md,
    "nash_md_decay": _nash_md, "online_ipo": _online_ipo,
}  # fmt: skip


def _both(log_pi: Tensor) -> Tensor:
    """Both responses of a pair from one policy."""
    return torch.outer(log_pi.exp(), log_pi.exp())


def trained_update(algorithm: Algorithm) -> Callable[..., Tensor]:
    """The algorithm's update by training, to be given to `games.run` in the exact one's place."""
    objective = OBJECTIVES.get(algorithm.name)
    if objective is None:
        raise ConfigError(f"{algorithm.name} has no objective; there are {', '.join(OBJECTIVES)}")

    def update(prefs: Tensor, log_pi: Tensor, **given: Any) -> Tensor:
        return fit(lambda logps: objective(logps, prefs, log_pi, **given), log_pi)

    return update

"""The table of preference losses: pure functions of response log-probabilities, with the field's names.

Log-probabilities are sums over a response's tokens, [P], one entry a pair; any float dtype, fp64 included. Every
function returns one loss a pair, [P], without weights or reduction, and is differentiable.
`LOSSES["simpo"](chosen, rejected, ...)` works without the trainer; arguments that a loss does not read are ignored,
those that it needs and lacks are an error.

Notation as in the papers: a = log pi/pi_ref of the chosen response, b of the rejected one, delta = a - b.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.errors import ConfigError


class Pairs(NamedTuple):
    """What a loss may read, each [P]; None where the data have none."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_len: Tensor | None = None
    rejected_len: Tensor | None = None
    win_prob_chosen: Tensor | None = None
    win_prob_rejected: Tensor | None = None

    @property
    def chosen_logratios(self) -> Tensor:
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def delta(self) -> Tensor:
        return self.chosen_logratios - self.rejected_logratios


def dpo(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(beta delta) - e log s(-beta delta). DPO, 2305.18290 eq. 7; with e > 0 conservative DPO (cDPO)."""
    z = beta * x.delta
    if label_smoothing == 0.0:
        return -logsigmoid(z)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def robust(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[-(1 - e) log s(beta delta) + e log s(-beta delta)] / (1 - 2e). Robust DPO, 2403.00409; may be negative."""
    z = beta * x.delta
    clean, flipped = -logsigmoid(z), -logsigmoid(-z)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(x: Pairs, *, beta: float, ipo_reduce: str = "mean") -> Tensor:
    """(d - 1/(2 tau))^2; d = delta (sum; 2310.12036 eq. 17) or the difference of token means (TRL). tau is `beta`."""
    if ipo_reduce == "mean":
        d = x.chosen_logratios / x.chosen_len - x.rejected_logratios / x.rejected_len
    else:
        d = x.delta
    return (d - 1 / (2 * beta)) ** 2


def hinge(x: Pairs, *, beta: float) -> Tensor:
    """max(0, 1 - beta delta). SLiC's normalised form as in RSO, 2309.06657."""
    return torch.relu(1 - beta * x.delta)


def simpo(x: Pairs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(beta (mean log pi(chosen) - mean log pi(rejected) - gamma/beta)). SimPO, 2405.14734; no reference."""
    z = beta * (x.chosen_logps / x.chosen_len - x.rejected_logps / x.rejected_len - gamma_beta_ratio)
    if label_smoothing == 0.0:
        return -logsigmoid(z)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def sppo(x: Pairs, *, beta: float) -> Tensor:
    """[(a - (p_w - 1/2)/beta)^2 + (b - (p_l - 1/2)/beta)^2] / 2. SPPO, 2405.00675 eq. 4.7.

    The reference is the previous iterate, p each response's probability of beating it, beta = 1/eta.
    """
    chosen = x.chosen_logratios - (x.win_prob_chosen - 0.5) / beta
    rejected = x.rejected_logratios - (x.win_prob_rejected - 0.5) / beta
    return 0.5 * (chosen**2 + rejected**2)


def sppo_hard(x: Pairs, *, beta: float) -> Tensor:
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2. TRL's `sppo_hard`: SPPO with p in {0, 1} and without its factor 1/2."""
    return (x.chosen_logratios - 0.5 / beta) ** 2 + (x.rejected_logratios + 0.5 / beta) ** 2


@dataclass(frozen=True)
class Loss:
    """One entry of the table: the function, its defaults and what it needs of the data."""

    name: str
    fn: Callable[..., Tensor]
    defaults: Mapping[str, Any]
    reference: bool = True  # needs reference log-probabilities
    length: bool = False  # divides by the lengths, always or by option
    win_prob: bool = False  # needs win probabilities against the previous policy

    def __call__(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        chosen_len: Tensor | None = None,
        rejected_len: Tensor | None = None,
        win_prob: Tensor | None = None,
        win_prob_chosen: Tensor | None = None,
        win_prob_rejected: Tensor | None = None,
        **hyper: Any,
    ) -> Tensor:
        """Losses [P] of P pairs; hyper-parameters not given take the loss's own default.

        `win_prob` is P(chosen beats rejected); it stands in for `win_prob_chosen` and, as one minus it, for
        `win_prob_rejected` (SPPO's single form). Raises ConfigError naming what is missing.
        """
        if win_prob is not None and win_prob_chosen is None:
            win_prob_chosen, win_prob_rejected = win_prob, 1 - win_prob
        x = Pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
                  chosen_len, rejected_len, win_prob_chosen, win_prob_rejected)  # fmt: skip
        hyper = self.hyper(**hyper)
        needed = {"ref_chosen_logps": self.reference, "ref_rejected_logps": self.reference,
                  "chosen_len": self.length and hyper.get("ipo_reduce") != "sum",
                  "rejected_len": self.length and hyper.get("ipo_reduce") != "sum",
                  "win_prob_chosen": self.win_prob, "win_prob_rejected": self.win_prob}  # fmt: skip
        missing = [name for name, need in needed.items() if need and getattr(x, name) is None]
        if missing:
            raise ConfigError(f"{self.name} needs {' and '.join(missing)}")
        return self.fn(x, **hyper)

    def hyper(self, **given: Any) -> dict[str, Any]:
        """The loss's hyper-parameters: its defaults, overridden by those given that are not None."""
        out = dict(self.defaults)
        for name, value in given.items():
            if name not in out:
                raise ConfigError(f"{self.name} has no {name!r}; it has {', '.join(out)}")
            if value is not None:
                out[name] = value
        self.check(out)
        return out

    def check(self, hyper: Mapping[str, Any]) -> None:
        if not hyper["beta"] > 0:
            raise ConfigError(f"{self.name}: beta must be positive, not {hyper['beta']}")
        smoothing = hyper.get("label_smoothing", 0.0)
        limit = 0.5 if self.name == "robust" else 1.0
        if not 0 <= smoothing < limit:
            raise ConfigError(f"{self.name}: label_smoothing must be in [0, {limit:g}), not {smoothing}")


_TABLE = (
    Loss("dpo", dpo, {"beta": 0.1, "label_smoothing": 0.0}),
    Loss("ipo", ipo, {"beta": 0.1, "ipo_reduce": "mean"}, length=True),
    Loss("simpo", simpo, {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.0}, reference=False, length=True),
    Loss("sppo", sppo, {"beta": 0.001}, win_prob=True),
    Loss("sppo_hard", sppo_hard, {"beta": 0.001}),
    Loss("hinge", hinge, {"beta": 0.1}),
    Loss("robust", robust, {"beta": 0.1, "label_smoothing": 0.0}),
)

LOSSES: dict[str, Loss] = {loss.name: loss for loss in _TABLE}
ALIASES = {"sigmoid": "dpo"}  # TRL's names
SFT = "sft"  # negative log-likelihood of the chosen response's tokens, mean over the step's tokens


def canonical_name(name: str) -> str:
    """The table's name for a loss or alias; ConfigError naming the nearest for an unknown one."""
    name = ALIASES.get(name, name)
    if name in LOSSES or name == SFT:
        return name
    import difflib

    known = [*LOSSES, *ALIASES, SFT]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise ConfigError(
        f"unknown loss_type {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}")
    )


@dataclass(frozen=True)
class Term:
    """One summand of the objective. `loss` is None for the sft term."""

    name: str
    weight: float
    loss: Loss | None
    hyper: Mapping[str, Any]

    @property
    def beta(self) -> float:
        return self.hyper.get("beta", 1.0)


def resolve_terms(
    names: Sequence[str], weights: Sequence[float] | None = None, *, label_smoothing: float = 0.0, **given: Any
) -> list[Term]:
    """The weighted sum that a configuration asks for, each loss with its own defaults where an option is None.

    Raises ConfigError where an option was set that no loss of the sum reads.
    """
    options = {**given, "label_smoothing": label_smoothing or None}
    unread = {name for name, value in options.items() if value is not None}
    terms = []
    for i, name in enumerate(canonical_name(n) for n in names):
        weight = 1.0 if weights is None else float(weights[i])
        if name == SFT:
            terms.append(Term(SFT, weight, None, {}))
            continue
        loss = LOSSES[name]
        reads = {k: v for k, v in options.items() if k in loss.defaults}
        unread -= set(reads)
        terms.append(Term(name, weight, loss, loss.hyper(**reads)))
    if not terms:
        raise ConfigError("loss_type names no loss")
    if unread:
        names = [t.name for t in terms]
        raise ConfigError(f"{', '.join(sorted(unread))} is set, but {' + '.join(names)} does not read it")
    return terms


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of `values` [N] between consecutive `offsets` [S + 1]; deterministic and differentiable. -> [S]

    A segment is summed in order, one value after another: hence in fp64.
    """
    return torch.segment_reduce(values.double(), "sum", offsets=offsets.long(), initial=0).to(values.dtype)

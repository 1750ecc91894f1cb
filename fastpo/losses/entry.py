"""An entry of the table of losses: its functions, its defaults, what it needs of the data, and where its
hyper-parameters may lie.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpo.errors import ConfigError
from fastpo.losses.functions import F_DIVERGENCES, Gradient, Pairs

# What a loss may read of a whole step, beside a pair's own numbers (fastpo/training/stepwide.py).
KL, REWARD_MEAN, ORDER = "kl", "reward_mean", "order"
STATISTICS = Pairs._fields[2:]  # arguments of a loss by name, beside its hyper-parameters
NLL_REDUCTIONS = ("token_mean", "seq_mean", "seq_sum")
# Of the losses per token: by each response's tokens and then by the responses, by all tokens, by responses times the
# longest that is allowed, by the responses.
REDUCTIONS = ("seq_mean", "token_mean", "constant", "seq_sum")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class Loss:
    """One entry of the table: the functions, its defaults and what it needs of the data."""

    name: str
    fn: Callable[..., Tensor]
    gradient: Callable[..., Any]  # -> Gradient; of the losses per token a tensor
    paper: str  # arXiv number
    defaults: Mapping[str, Any]
    reference: bool = True  # needs reference log-probabilities
    length: bool = False  # reads the lengths, always or by option
    win_prob: bool = False  # needs win probabilities against the previous policy
    pair_prob: bool = False  # needs P(chosen beats rejected), the column win_prob
    nll: str | None = None  # the hyper-parameter that weighs its NLL of the chosen response
    needs: tuple[str, ...] = ()  # further fields of Pairs
    may_read: tuple[str, ...] = ()  # columns of the data that it reads where they are there
    drawn: bool = False  # its log-probabilities are sums over tokens drawn, as many of each response of a pair
    online: bool = False  # its responses are drawn as it trains (losses/online.py)
    of_step: str = ""  # what it reads of the whole step: KL, REWARD_MEAN or ORDER
    # Or "unpaired" [S], or "lists" [P, K]: then only the first and the third argument are given. Or "scores": pairs, of
    # which the numbers are rewards of a scalar head. Or "degrees": logits [E, degrees] of a head as the first argument.
    # Or "tokens": losses per token (TokenLoss of fastpo/losses/tokens.py), which have arguments of their own.
    shape: str = "pairs"

    def __call__(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor | None = None,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        chosen_len: Tensor | None = None,
        rejected_len: Tensor | None = None,
        prev_chosen_logps: Tensor | None = None,
        prev_rejected_logps: Tensor | None = None,
        win_prob: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Losses [P] of P pairs; hyper-parameters not given take the loss's own default.

        `win_prob` is P(chosen beats rejected); it stands in for `win_prob_chosen` and, as one minus it, for
        `win_prob_rejected` (SPPO's single form). `more` are further fields of `Pairs` (`chosen_kl`, `scores`, ...) and
        hyper-parameters. Raises ConfigError naming what is missing.
        """
        x, hyper = self._arguments(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_len=chosen_len,
            rejected_len=rejected_len, prev_chosen_logps=prev_chosen_logps, prev_rejected_logps=prev_rejected_logps,
            win_prob=win_prob, **more,
        )  # fmt: skip
        return self.fn(x, **hyper)

    def coefficients(self, *args: Any, **kwargs: Any) -> Gradient:
        """(dL/d chosen_logps, dL/d rejected_logps) of the summed losses in closed form; arguments as of the call."""
        with torch.no_grad():
            x, hyper = self._arguments(*args, **kwargs)
            out: Gradient = self.gradient(x, **hyper)
            return out

    def _arguments(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor | None = None,
        ref_chosen_logps: Tensor | None = None, ref_rejected_logps: Tensor | None = None, *,
        win_prob: Tensor | None = None, **more: Any,
    ) -> tuple[Pairs, dict[str, Any]]:  # fmt: skip
        statistics = {name: more.pop(name) for name in STATISTICS if name in more}
        if win_prob is not None and (self.pair_prob or statistics.get("win_prob_chosen") is None):
            statistics |= {"win_prob_chosen": win_prob, "win_prob_rejected": 1 - win_prob}
        elif self.pair_prob:
            raise ConfigError(f"{self.name} needs win_prob")
        x = Pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, **statistics)
        hyper = self.hyper(**more)
        missing = [name for name in self.needed(hyper) if getattr(x, name) is None]
        if missing:
            missing = ["policy_rejected_logps" if name == "rejected_logps" else name for name in missing]
            raise ConfigError(f"{self.name} needs {' and '.join(missing)}")
        for name, value in x._asdict().items():
            shape = list(x.chosen_logps.shape[:1] if name == "degree" else x.chosen_logps.shape)
            if isinstance(value, Tensor) and value.dim() and list(value.shape) != shape:
                raise ConfigError(f"{self.name}: {name} {list(value.shape)} must have the shape {shape}")
        return x, hyper

    def needed(self, hyper: Mapping[str, Any]) -> list[str]:
        """Fields of Pairs that the loss reads with these hyper-parameters."""
        pairs = self.shape in ("pairs", "scores")
        names = ["rejected_logps"] if pairs else []
        if self.reference:
            names += ["ref_chosen_logps", "ref_rejected_logps"] if pairs else ["ref_chosen_logps"]
        if self.length and hyper.get("ipo_reduce") != "sum":
            names += ["chosen_len", "rejected_len"]
        if self.nll and hyper.get(self.nll):
            if hyper["nll_reduction"] != "seq_sum" and not self.length:
                names += ["chosen_len"]
            if not hyper.get("disable_prompt_loss", True):
                names += ["prompt_logps", "prompt_len"]
        if self.win_prob:
            names += ["win_prob_chosen", "win_prob_rejected"]
        return [*names, *self.needs]

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """Columns of the data beside the responses; of each tuple any one."""
        if self.pair_prob:
            return [("win_prob",)]
        if self.shape == "lists":
            return [("chosen_score",), ("rejected_score",)]
        if "greedy_logps" in self.needs:
            return [("greedy",)]
        return [("win_prob", "win_prob_chosen"), ("win_prob", "win_prob_rejected")] if self.win_prob else []

    @property
    def previous(self) -> bool:
        """Whether it mixes the reference with the previous policy, (1 - kappa) t + kappa r."""
        return "prev_chosen_logps" in self.needs

    def hyper(self, **given: Any) -> dict[str, Any]:
        """The loss's hyper-parameters: its defaults, overridden by those given that are not None."""
        out = dict(self.defaults)
        for name, value in given.items():
            if name not in out:
                near = difflib.get_close_matches(name, [*out, *STATISTICS], n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(out)}"
                raise ConfigError(f"{self.name} has no {name!r}{hint}")
            if value is not None:
                out[name] = value
        self.check(out)
        return out

    def check(self, hyper: Mapping[str, Any]) -> None:
        for name, value in hyper.items():
            if value is None and self.defaults[name] is None:
                continue
            domain = DOMAINS.get((self.name, name)) or DOMAINS.get((self.shape, name)) or DOMAINS.get(name) or _FINITE
            if not domain.holds(value):
                raise ConfigError(f"{self.name}: {name} must be {domain.text}, not {value!r}")


@dataclass(frozen=True)
class Domain:
    """Where a hyper-parameter may lie: an interval, or some values."""

    text: str
    low: float = -math.inf
    high: float = math.inf
    closed: bool = True  # whether `low` is in it; `high` never is
    choices: tuple[Any, ...] = ()
    whole: bool = False  # no fraction

    def holds(self, value: Any) -> bool:
        if self.choices:
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        return (self.low <= value if self.closed else self.low < value) and value < self.high


_FINITE = Domain("a finite number")
_POSITIVE = Domain("positive", low=0.0, closed=False)
_NOT_NEGATIVE = Domain("zero or more", low=0.0)
_SHARE = Domain("in [0, 1]", low=0.0, high=math.nextafter(1.0, 2.0))
_FLAG = Domain("true or false", choices=(True, False))
DOMAINS: dict[Any, Domain] = {
    **dict.fromkeys(("beta", "eta", "discopop_tau", "temperature", "beta_r", "score_scale"), _POSITIVE),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), _POSITIVE),
    **dict.fromkeys(("alpha", "cpo_alpha", "rpo_alpha", "lambda_coef", "nll_coef", "dpop_lambda"), _NOT_NEGATIVE),
    "center_rewards_coefficient": _NOT_NEGATIVE,
    **dict.fromkeys(("kappa", "ld_alpha"), _SHARE),
    **dict.fromkeys(("disable_prompt_loss", "clamp_weight"), _FLAG),
    "label_smoothing": Domain("in [0, 1)", low=0.0, high=1.0),
    ("robust", "label_smoothing"): Domain("in [0, 0.5)", low=0.0, high=0.5),
    ("exo_pair", "label_smoothing"): Domain("in (0, 0.5)", low=0.0, high=0.5, closed=False),
    ("alphapo", "alpha"): _FINITE,
    ("slic", "delta"): _NOT_NEGATIVE,
    "degrees": Domain("a whole number from 2 to 64", low=2, high=65, whole=True),
    "ipo_reduce": Domain("mean or sum", choices=("mean", "sum")),
    "nll_reduction": Domain(f"one of {', '.join(NLL_REDUCTIONS)}", choices=NLL_REDUCTIONS),
    "f_divergence_type": Domain(f"one of {', '.join(F_DIVERGENCES)}", choices=F_DIVERGENCES),
    **{("tokens", name): _NOT_NEGATIVE for name in ("beta", "epsilon", "vespo_k_pos", "vespo_k_neg")},
    **{("tokens", name): _POSITIVE for name in ("delta", "sapo_temperature_pos", "sapo_temperature_neg",
                                                "vespo_lambda_pos", "vespo_lambda_neg")},
    "epsilon_high": _NOT_NEGATIVE,
    ("cispo", "epsilon_high"): _POSITIVE,
    "use_bias_correction_kl": _FLAG,
    "importance_sampling_level": Domain("token or sequence", choices=("token", "sequence")),
    "kl_level": Domain("token or sequence", choices=("token", "sequence")),
    "kl_estimator": Domain(f"one of {', '.join(KL_ESTIMATORS)}", choices=KL_ESTIMATORS),
    "reduction": Domain(f"one of {', '.join(REDUCTIONS)}", choices=REDUCTIONS),
}  # fmt: skip

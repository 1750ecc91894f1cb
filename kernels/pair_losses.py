"""Which pair losses of fastpo.losses the fused kernel knows, and of what pieces each is made. No tensors, no Triton.

A loss is a function (`shape`) of one margin u = scale * m - offset, m being a difference of two responses' numbers
(`margin`), or of each response on its own; its labels may be smoothed (`labels`), and it may be weighed and have an NLL
of the chosen response beside it. `recipe("simpo", beta=2.0, gamma_beta_ratio=0.5)` says so in the words of `Recipe`,
which are constexprs of `preference.py`, and in numbers, which are its arguments.

The definition of a loss is its function in fastpo/losses/functions.py or losses/statistics.py. The builders below have
the same hyper-parameters and defaults as those, and tests/ops/test_kernels_interpreter.py walks the table: a loss that
is missing here, or differs, fails.

What has no recipe stays in Python, for it is no function of one pair's own numbers:
  exo_rw, nca_rw, infonca    lists of K responses
  kto, bco                   unpaired responses, and a mean over the whole step
  apo_zero_unpaired          unpaired responses
  aot, aot_unpaired          the order of the whole step's margins
  selm, xpo                  a third response, or a flag of each pair
  reward, degree_aux         numbers of another head than the language model's
  reinforce, rloo, grpo, dr_grpo, dapo, bnpo, gspo, cispo, sapo, luspo, vespo, gmpo, nash_md
                             a number of each token, of no pair (losses/tokens.py)
  NLL by token_mean          divides by the mean length over all pairs: the trainer makes it a term of its own
  NLL of prompt and response the prompt's tokens are rows of another kind, which get a gradient too (ORPO with seq_mean
                             or seq_sum; its default is token_mean)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """What a loss is made of; words choose code when the kernel is compiled, numbers are its arguments."""

    shape: str  # logistic, hinge, truncated, square, exponential, savage, exo, discopop; or of each response on its
    # own: nca, bco, apo_zero, apo_down, sppo
    margin: str = "sums"  # sums, means, positive, lengths, odds, power, forward_kl, js, alpha, token_kl, rejected_kl
    labels: str = "sure"  # sure; smooth, by a constant; soft, by 1 - p; scored, by s(k (p_l - p_w))
    probs: str = "none"  # win probabilities: none; pair, P(chosen beats rejected); both, each against a third
    tokens: str = "all"  # which of a response's tokens are summed: all; tails, those past the shorter one at a part;
    # drawn, those listed
    weighting: str = "none"  # none, or WPO's weight: wpo, wpo_clamped
    nll: str = "none"  # none, sum or mean over the chosen response
    reference: str = "ref"  # ref; mixed, of reference and previous policy; none
    scale: float = 1.0
    offset: float = 0.0
    smoothing: float = 0.0  # of labels=smooth; log(e) for exo
    extra: float = 0.0  # the further constant that a margin or a shape has
    kappa: float = 1.0  # share of the reference in the mixed one
    nll_coef: float = 0.0

    @property
    def reads_rows(self) -> bool:
        """Whether it reads a further number per token: WPO's log sum of squares, or TDPO's KL."""
        return self.weighting != "none" or self.has_row_gradient

    @property
    def has_row_gradient(self) -> bool:
        return self.margin in ("token_kl", "rejected_kl")

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(value for value in self if isinstance(value, str))

    @property
    def numbers(self) -> tuple[float, ...]:
        return tuple(value for value in self if not isinstance(value, str))


def recipe(loss_type: str, **hyper: Any) -> Recipe | None:
    """The recipe of a loss with these hyper-parameters, by its functions' names and defaults; None where it has none.

    TypeError for a hyper-parameter that the loss does not have, or that is missing.
    """
    build = RECIPES.get(loss_type)
    if build is None:
        return None
    try:
        return build(**hyper)
    except TypeError as error:
        known = ", ".join(inspect.signature(build).parameters)
        raise TypeError(f"{loss_type} has the hyper-parameters {known}, not {', '.join(hyper) or 'none'}") from error


def _smoothed(e: float) -> dict[str, Any]:
    return {"labels": "smooth", "smoothing": e} if e else {}


def _dpo(beta: float, label_smoothing: float = 0.0) -> Recipe:
    return Recipe("logistic", scale=beta, **_smoothed(label_smoothing))


def _cdpo(beta: float, label_smoothing: float) -> Recipe:
    return _dpo(beta, label_smoothing)


def _robust(beta: float, label_smoothing: float = 0.0) -> Recipe:
    # Unbiased labels are cDPO's with a negative smoothing.
    return _dpo(beta, -label_smoothing / (1 - 2 * label_smoothing))


def _dpo_soft(beta: float) -> Recipe:
    return Recipe("logistic", labels="soft", probs="pair", scale=beta)


def _plain_dpo(beta: float) -> Recipe:
    return _dpo(beta)


def _sigmoid_norm(beta: float) -> Recipe:
    return Recipe("logistic", "means", scale=beta)


def _dpop(beta: float, dpop_lambda: float) -> Recipe:
    return Recipe("logistic", "positive", scale=beta, extra=dpop_lambda)


def _rdpo(beta: float, alpha: float) -> Recipe:
    return Recipe("logistic", "lengths", scale=beta, extra=alpha / beta)


def _wpo(beta: float, clamp_weight: bool = True) -> Recipe:
    return Recipe("logistic", scale=beta, weighting="wpo_clamped" if clamp_weight else "wpo")


def _ld_dpo(beta: float, ld_alpha: float) -> Recipe:
    return Recipe("logistic", tokens="tails", scale=beta, extra=ld_alpha)


def _sampo(beta: float) -> Recipe:
    return Recipe("logistic", tokens="drawn", scale=beta)


def _tdpo1(beta: float) -> Recipe:
    return Recipe("logistic", "token_kl", scale=beta, extra=1.0)


def _tdpo2(beta: float, alpha: float) -> Recipe:
    return Recipe("logistic", "rejected_kl", scale=beta, extra=alpha)


def _dno(beta: float, score_scale: float = 1.0) -> Recipe:
    return Recipe("logistic", labels="scored", probs="both", scale=beta, extra=score_scale)


def _dno_reg(beta: float, kappa: float, score_scale: float = 1.0) -> Recipe:
    return _dno(beta, score_scale)._replace(reference="mixed", kappa=kappa)


def _fdpo(beta: float, f_divergence_type: str, f_alpha_divergence_coef: float) -> Recipe:
    if f_divergence_type == "alpha_divergence" and abs(f_alpha_divergence_coef - 1) >= 1e-6:
        return Recipe("logistic", "alpha", scale=beta, extra=f_alpha_divergence_coef - 1)
    margin = {"forward_kl": "forward_kl", "js_divergence": "js"}.get(f_divergence_type, "sums")
    return Recipe("logistic", margin, scale=beta)


def _exo_pair(beta: float, label_smoothing: float) -> Recipe:
    return Recipe("exo", scale=beta, smoothing=math.log(label_smoothing), extra=math.log1p(-label_smoothing))


def _discopop(beta: float, discopop_tau: float) -> Recipe:
    return Recipe("discopop", scale=beta, extra=discopop_tau)


def _ipo(beta: float, ipo_reduce: str = "mean") -> Recipe:
    return Recipe("square", "means" if ipo_reduce == "mean" else "sums", offset=0.5 / beta)


def _online_ipo(beta: float) -> Recipe:
    return _ipo(beta, "sum")


def _inpo(eta: float, kappa: float) -> Recipe:
    return Recipe("square", reference="mixed", offset=0.5 / eta, kappa=kappa)


def _one_minus(shape: str) -> Callable[..., Recipe]:
    """A loss of beta delta - 1."""

    def build(beta: float) -> Recipe:
        return Recipe(shape, scale=beta, offset=1.0)

    return build


def _of_beta_delta(shape: str) -> Callable[..., Recipe]:
    """A loss of beta delta, or of beta a and beta b."""

    def build(beta: float) -> Recipe:
        return Recipe(shape, scale=beta)

    return build


def _bco_pair(beta: float, delta: float = 0.0) -> Recipe:
    return Recipe("bco", scale=beta, offset=delta)


def _sppo(beta: float) -> Recipe:
    return Recipe("sppo", probs="both", scale=beta, extra=0.5)


def _sppo_single(beta: float) -> Recipe:
    return Recipe("sppo", probs="pair", scale=beta, extra=0.5)


def _sppo_hard(beta: float) -> Recipe:
    return Recipe("sppo", scale=beta, extra=1.0)


def _simpo(beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0) -> Recipe:
    smoothed = _smoothed(label_smoothing)
    return Recipe("logistic", "means", reference="none", scale=beta, offset=beta * gamma_beta_ratio, **smoothed)


def _alphapo(beta: float, alpha: float, gamma_beta_ratio: float) -> Recipe:
    margin = "power" if alpha else "means"
    return Recipe("logistic", margin, reference="none", scale=beta, offset=beta * gamma_beta_ratio, extra=alpha)


def _with_nll(of_pair: Recipe, coef: float, reduction: str) -> Recipe | None:
    if not coef:
        return of_pair
    if reduction not in ("seq_sum", "seq_mean"):
        return None
    return of_pair._replace(nll=reduction.removeprefix("seq_"), nll_coef=coef)


def _cpo(
    beta: float, label_smoothing: float = 0.0, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum"
) -> Recipe | None:
    return _with_nll(_dpo(beta, label_smoothing)._replace(reference="none"), cpo_alpha, nll_reduction)


def _cpo_simpo(
    beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0, cpo_alpha: float = 0.0,
    nll_reduction: str = "seq_sum",
) -> Recipe | None:  # fmt: skip
    return _with_nll(_simpo(beta, gamma_beta_ratio, label_smoothing), cpo_alpha, nll_reduction)


def _cpo_hinge(beta: float, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Recipe | None:
    return _with_nll(Recipe("hinge", reference="none", scale=beta, offset=1.0), cpo_alpha, nll_reduction)


def _cpo_ipo(beta: float, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Recipe | None:
    return _with_nll(Recipe("square", "means", reference="none", offset=0.5 / beta), cpo_alpha, nll_reduction)


def _rpo(beta: float, rpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Recipe | None:
    return _with_nll(_dpo(beta), rpo_alpha, nll_reduction)


def _slic(delta: float, lambda_coef: float = 0.0, nll_reduction: str = "seq_sum") -> Recipe | None:
    return _with_nll(Recipe("hinge", reference="none", offset=delta), lambda_coef, nll_reduction)


def _orpo(
    beta: float, nll_coef: float = 0.0, nll_reduction: str = "seq_sum", disable_prompt_loss: bool = True
) -> Recipe | None:
    if nll_coef and not disable_prompt_loss:
        return None
    return _with_nll(Recipe("logistic", "odds", reference="none", extra=beta), nll_coef, nll_reduction)


RECIPES: dict[str, Callable[..., Recipe | None]] = {
    "dpo": _dpo, "cdpo": _cdpo, "robust": _robust, "dpo_soft": _dpo_soft, "ipo": _ipo, "hinge": _one_minus("hinge"),
    "slic": _slic, "sigmoid_norm": _sigmoid_norm, "simpo": _simpo, "orpo": _orpo, "cpo": _cpo, "cpo_simpo": _cpo_simpo,
    "cpo_hinge": _cpo_hinge, "cpo_ipo": _cpo_ipo,
    "rpo": _rpo, "dpop": _dpop, "rdpo": _rdpo, "exo_pair": _exo_pair, "nca_pair": _of_beta_delta("nca"),
    "bco_pair": _bco_pair, "apo_zero": _of_beta_delta("apo_zero"), "apo_down": _of_beta_delta("apo_down"),
    "discopop": _discopop, "wpo": _wpo, "ld_dpo": _ld_dpo, "sampo": _sampo, "tdpo1": _tdpo1, "tdpo2": _tdpo2,
    "gpo_logistic": _plain_dpo, "gpo_exp": _of_beta_delta("exponential"), "gpo_sq": _one_minus("square"),
    "gpo_hinge": _one_minus("hinge"), "gpo_tquad": _one_minus("truncated"), "gpo_savage": _of_beta_delta("savage"),
    "fdpo": _fdpo, "alphapo": _alphapo, "sppo": _sppo, "sppo_single": _sppo_single, "sppo_hard": _sppo_hard,
    "dno": _dno, "dno_prct": _plain_dpo, "dno_reg": _dno_reg, "inpo": _inpo, "online_ipo": _online_ipo,
    "ipo_md": _online_ipo,
}  # fmt: skip

"""The table of losses: one name, one pure function of log-probabilities, its paper's defaults.

Log-probabilities are sums over a response's tokens, [P], one entry a pair; any float dtype, fp64 included. Every
function returns one loss a pair, [P], without weights or reduction, and is differentiable; `coefficients` gives its
gradient in closed form. `LOSSES["simpo"](chosen, rejected, ...)` works without the trainer; arguments that a loss does
not read are ignored, those that it needs and lacks are an error.

The functions are in fastpo/losses/functions.py, losses/cpo.py, losses/statistics.py and losses/scalar.py. The losses
per token, of responses that the policy sampled, are in it too (losses/token_table.py), with arguments of their own.
docs/losses.md is made from them and this table by `python -m fastpo.losses.docs > docs/losses.md`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpo.errors import ConfigError
from fastpo.losses import cpo as c
from fastpo.losses import functions as f
from fastpo.losses import scalar
from fastpo.losses import statistics as g
from fastpo.losses.entry import DOMAINS, KL, ORDER, REWARD_MEAN, STATISTICS, Loss
from fastpo.losses.functions import Pairs
from fastpo.losses.segments import segment_sum
from fastpo.losses.token_table import TOKEN_LOSSES

__all__ = [
    "ALIASES", "DEGREE", "KL", "LOSSES", "ORDER", "REWARD_MEAN", "SFT", "STATISTICS", "Loss", "Pairs",
    "Term", "canonical_name", "resolve_terms", "segment_sum",
]  # fmt: skip

_GPO = "2402.05749"
_SIMPO = {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.0}
_TOKEN_NLL = {"nll_reduction": "token_mean"}
_PREV = ("prev_chosen_logps", "prev_rejected_logps")
_TAILS = ("chosen_tail_logps", "rejected_tail_logps", "ref_chosen_tail_logps", "ref_rejected_tail_logps")

_TABLE = (
    Loss("dpo", f.dpo, f.d_dpo, "2305.18290", {"beta": 0.1, "label_smoothing": 0.0}),
    Loss("cdpo", f.cdpo, f.d_dpo, "2305.18290", {"beta": 0.1, "label_smoothing": 0.1}),
    Loss("robust", f.robust, f.d_robust, "2403.00409", {"beta": 0.1, "label_smoothing": 0.0}),
    Loss("dpo_soft", f.dpo_soft, f.d_dpo_soft, "2305.18290", {"beta": 0.1}, pair_prob=True),
    Loss("ipo", f.ipo, f.d_ipo, "2310.12036", {"beta": 0.1, "ipo_reduce": "mean"}, length=True),
    Loss("hinge", f.hinge, f.d_hinge, "2309.06657", {"beta": 0.1}),
    Loss("slic", f.slic, f.d_slic, "2305.10425", {"delta": 1.0, "lambda_coef": 0.1, **_TOKEN_NLL}, reference=False,
         nll="lambda_coef"),
    Loss("sigmoid_norm", f.sigmoid_norm, f.d_sigmoid_norm, "2411.15124", {"beta": 5.0}, length=True),
    Loss("simpo", f.simpo, f.d_simpo, "2405.14734", _SIMPO, reference=False, length=True),
    Loss("orpo", f.orpo, f.d_orpo, "2403.07691",
         {"beta": 0.1, "nll_coef": 1.0, **_TOKEN_NLL, "disable_prompt_loss": False}, reference=False, length=True,
         nll="nll_coef"),
    Loss("cpo", f.cpo, f.d_cpo, "2401.08417", {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, **_TOKEN_NLL},
         reference=False, nll="cpo_alpha"),
    Loss("cpo_simpo", f.cpo_simpo, f.d_cpo_simpo, "2405.14734",
         {"beta": 10.0, "gamma_beta_ratio": 0.54, "label_smoothing": 0.0, "cpo_alpha": 0.05, **_TOKEN_NLL},
         reference=False, length=True, nll="cpo_alpha"),
    Loss("cpo_hinge", c.cpo_hinge, c.d_cpo_hinge, "2305.10425", {"beta": 0.1, "cpo_alpha": 1.0, **_TOKEN_NLL},
         reference=False, nll="cpo_alpha"),
    Loss("cpo_ipo", c.cpo_ipo, c.d_cpo_ipo, "2310.12036", {"beta": 0.1, "cpo_alpha": 1.0, **_TOKEN_NLL},
         reference=False, length=True, nll="cpo_alpha"),
    Loss("rpo", f.rpo, f.d_rpo, "2405.16436", {"beta": 0.01, "rpo_alpha": 0.005, **_TOKEN_NLL}, nll="rpo_alpha"),
    Loss("dpop", f.dpop, f.d_dpop, "2402.13228", {"beta": 0.1, "dpop_lambda": 50.0}),
    Loss("rdpo", f.rdpo, f.d_rdpo, "2403.19159", {"beta": 0.1, "alpha": 0.01}, length=True),
    Loss("exo_pair", f.exo_pair, f.d_exo_pair, "2402.00856", {"beta": 0.1, "label_smoothing": 1e-3}),
    Loss("exo_rw", g.exo_rw, g.d_exo_rw, "2402.00856", {"beta": 0.5, "beta_r": 0.5}, needs=("scores",), shape="lists"),
    Loss("nca_pair", f.nca_pair, f.d_nca_pair, "2402.05369", {"beta": 0.01}),
    Loss("nca_rw", g.nca_rw, g.d_nca_rw, "2402.05369", {"beta": 0.01, "temperature": 1e-4}, needs=("scores",),
         shape="lists"),
    Loss("infonca", g.infonca, g.d_infonca, "2402.05369", {"beta": 0.01, "temperature": 1e-4}, needs=("scores",),
         shape="lists"),
    Loss("kto", g.kto, g.d_kto, "2402.01306", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
         needs=("label", "kl"), shape="unpaired", of_step=KL),
    Loss("apo_zero_unpaired", g.apo_zero_unpaired, g.d_apo_zero_unpaired, "2408.06266",
         {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, needs=("label",), shape="unpaired"),
    Loss("bco_pair", f.bco_pair, f.d_bco_pair, "2404.04656", {"beta": 0.01, "delta": 0.0}),
    Loss("bco", g.bco, g.d_bco, "2404.04656", {"beta": 0.01}, needs=("label", "reward_mean"), shape="unpaired",
         of_step=REWARD_MEAN),
    Loss("apo_zero", f.apo_zero, f.d_apo_zero, "2408.06266", {"beta": 0.1}),
    Loss("apo_down", f.apo_down, f.d_apo_down, "2408.06266", {"beta": 0.1}),
    Loss("aot", g.aot, g.d_aot, "2406.05882", {"beta": 0.01, "label_smoothing": 0.0}, of_step=ORDER),
    Loss("aot_unpaired", g.aot_unpaired, g.d_aot_unpaired, "2406.05882", {"beta": 0.01, "label_smoothing": 0.0},
         of_step=ORDER),
    Loss("discopop", f.discopop, f.d_discopop, "2406.08414", {"beta": 0.05, "discopop_tau": 0.05}),
    Loss("wpo", g.wpo, g.d_wpo, "2406.11827", {"beta": 0.01, "clamp_weight": True}, length=True,
         needs=("chosen_log_sum_sq", "rejected_log_sum_sq")),
    Loss("ld_dpo", g.ld_dpo, g.d_ld_dpo, "2409.06411", {"beta": 0.1, "ld_alpha": 0.5}, needs=_TAILS),
    Loss("sampo", g.sampo, g.d_sampo, "2406.10957", {"beta": 0.1}, drawn=True),
    Loss("tdpo1", g.tdpo1, g.d_tdpo1, "2404.11999", {"beta": 0.1}, needs=("chosen_kl", "rejected_kl")),
    Loss("tdpo2", g.tdpo2, g.d_tdpo2, "2404.11999", {"beta": 0.1, "alpha": 0.5}, needs=("chosen_kl", "rejected_kl")),
    Loss("gpo_logistic", f.gpo_logistic, f.d_gpo_logistic, _GPO, {"beta": 0.1}),
    Loss("gpo_exp", f.gpo_exp, f.d_gpo_exp, _GPO, {"beta": 0.1}),
    Loss("gpo_sq", f.gpo_sq, f.d_gpo_sq, _GPO, {"beta": 0.1}),
    Loss("gpo_hinge", f.gpo_hinge, f.d_hinge, _GPO, {"beta": 0.1}),
    Loss("gpo_tquad", f.gpo_tquad, f.d_gpo_tquad, _GPO, {"beta": 0.1}),
    Loss("gpo_savage", f.gpo_savage, f.d_gpo_savage, _GPO, {"beta": 0.1}),
    Loss("fdpo", f.fdpo, f.d_fdpo, "2309.16240",
         {"beta": 0.1, "f_divergence_type": "js_divergence", "f_alpha_divergence_coef": 0.5}),
    Loss("alphapo", f.alphapo, f.d_alphapo, "2501.03884", {"beta": 2.5, "alpha": 0.25, "gamma_beta_ratio": 0.04},
         reference=False, length=True),
    Loss("sppo", f.sppo, f.d_sppo, "2405.00675", {"beta": 0.001}, win_prob=True),
    Loss("sppo_single", f.sppo_single, f.d_sppo_single, "2405.00675", {"beta": 0.001}, pair_prob=True),
    Loss("sppo_hard", f.sppo_hard, f.d_sppo_hard, "2405.00675", {"beta": 0.001}),
    Loss("dno", g.dno, g.d_dno, "2404.03715", {"beta": 0.1, "score_scale": 1.0}, win_prob=True),
    Loss("dno_prct", g.dno_prct, g.d_dno_prct, "2404.03715", {"beta": 0.1}),
    Loss("dno_reg", g.dno_reg, g.d_dno_reg, "2404.03715", {"beta": 0.1, "kappa": 1 / 3, "score_scale": 1.0},
         needs=_PREV, may_read=("win_prob", "win_prob_chosen", "win_prob_rejected")),
    Loss("inpo", g.inpo, g.d_inpo, "2407.00617", {"eta": 0.005, "kappa": 1 / 3}, needs=_PREV),
    Loss("online_ipo", f.online_ipo, f.d_online_ipo, "2403.08635", {"beta": 0.1}, online=True),
    Loss("ipo_md", f.ipo_md, f.d_online_ipo, "2403.08635", {"beta": 0.1}, online=True),
    Loss("selm", g.selm, g.d_selm, "2405.19332", {"beta": 0.01, "alpha": 1e-3},
         needs=("greedy_logps", "ref_greedy_logps")),
    Loss("xpo", g.xpo, g.d_xpo, "2405.21046", {"beta": 0.1, "alpha": 1e-5}, needs=("chosen_of_reference",),
         online=True),
    Loss("reward", scalar.reward, scalar.d_reward, "2203.02155", {"center_rewards_coefficient": 0.0}, reference=False,
         may_read=("margin",), shape="scores"),
    Loss("degree_aux", scalar.degree_aux, scalar.d_degree_aux, "2409.17791", {"degrees": 4}, reference=False,
         needs=("degree",), shape="degrees"),
)  # fmt: skip


class _Table(dict[str, Loss]):
    """By name; a name of TRL's finds its loss, an unknown one is a ConfigError that names the nearest."""

    def __missing__(self, name: str) -> Loss:
        if (own := canonical_name(name)) == SFT:
            raise ConfigError("sft is no loss of pairs: it is the trainer's term on the chosen response's tokens")
        return self[own]


LOSSES: dict[str, Loss] = _Table({loss.name: loss for loss in (*_TABLE, *TOKEN_LOSSES)})
ALIASES = {"sigmoid": "dpo"}  # TRL's names
DEGREE = "degree_aux"  # of rows that name it, beside a loss of pairs
SFT = "sft"  # negative log-likelihood of the chosen responses, reduced over the step as `nll_reduction` says

# TRL's and our own options that one of the losses reads, with the value that leaves each loss its default.
OPTIONS: dict[str, Any] = {
    "beta": None, "label_smoothing": 0.0, "gamma_beta_ratio": None, "ipo_reduce": "mean", "discopop_tau": 0.05,
    "f_divergence_type": None, "f_alpha_divergence_coef": 0.5, "ld_alpha": None, "use_weighting": False,
}  # fmt: skip


def canonical_name(name: str) -> str:
    """The table's name for a loss or alias; ConfigError naming the nearest for an unknown one."""
    name = ALIASES.get(name, name)
    if name in LOSSES or name == SFT:
        return name
    known = [*LOSSES, *ALIASES, SFT]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    raise ConfigError(
        f"unknown loss_type {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}")
    )


def _number(value: Any) -> Any:
    """1e-3 is a text to YAML."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass(frozen=True)
class Term:
    """One summand of the objective. `loss` is None for the sft term."""

    name: str
    weight: float
    loss: Loss | None
    hyper: Mapping[str, Any]
    of: str = ""  # the entry of loss_type that it is of, by which rows name their loss

    @property
    def beta(self) -> float:
        return self.hyper.get("beta", 1.0)

    @property
    def of_pairs(self) -> bool:
        """Whether it is a loss of pairs, of lists of responses or of unpaired ones: no NLL, nor of degrees, tokens."""
        return self.loss is not None and self.name != DEGREE and not self.of_tokens

    @property
    def of_tokens(self) -> bool:
        """Whether it is a loss per token of responses that the policy samples as it trains."""
        return self.loss is not None and self.loss.shape == "tokens"

    @property
    def reads_reference(self) -> bool:
        """Whether it reads a reference with these hyper-parameters: those per token, where their KL has a weight."""
        if self.loss is None:
            return False
        return "ref_logp" in self.loss.needed(self.hyper) if self.of_tokens else self.loss.reference

    @property
    def reads_prompt(self) -> bool:
        """Whether its NLL is that of prompt and response."""
        if self.loss is None:
            return not self.hyper.get("disable_prompt_loss", True)
        return "prompt_logps" in self.loss.needed(self.hyper)


def resolve_terms(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    loss_kwargs: Mapping[str, Any] | None = None,
    **given: Any,
) -> list[Term]:
    """The weighted sum that a configuration asks for, each loss with its own defaults where an option is unset.

    An NLL of a loss's own that is a mean over tokens becomes an sft term, which is normalised over the whole step.
    Raises ConfigError where an option was set that no loss of the sum reads, and for a loss that cannot be trained yet.
    """
    options = {name: None if value == OPTIONS.get(name) else value for name, value in given.items()}
    both = [name for name in loss_kwargs or {} if options.get(name) is not None]
    if both:
        raise ConfigError(f"{', '.join(both)} is set, and in loss_kwargs too; give one")
    options |= {name: _number(value) for name, value in (loss_kwargs or {}).items()}
    weighted = bool(options.pop("use_weighting", None))
    if weighted and {canonical_name(n) for n in names} != {"dpo"}:
        raise ConfigError("use_weighting goes with loss_type=dpo alone, as wpo; name wpo as one of the losses instead")
    unread = {name for name, value in options.items() if value is not None or name in (loss_kwargs or {})}
    if options.get("f_divergence_type") == "reverse_kl":
        unread.discard("f_divergence_type")  # every loss but fdpo has it
    terms: list[Term] = []
    for i, name in enumerate(canonical_name(n) for n in names):
        weight = 1.0 if weights is None else float(weights[i])
        if name == SFT:
            reduction = options.get("nll_reduction") or "token_mean"
            if not DOMAINS["nll_reduction"].holds(reduction):
                raise ConfigError(f"sft: nll_reduction must be {DOMAINS['nll_reduction'].text}, not {reduction!r}")
            unread -= {"nll_reduction"}
            terms.append(Term(SFT, weight, None, {"nll_reduction": reduction}, SFT))
            continue
        loss = LOSSES[_of_dpo(options, weighted) if name == "dpo" else name]
        reads = {k: v for k, v in options.items() if k in loss.defaults}
        unread -= set(reads)
        if weighted:
            # As TRL has it: DPO's own beta, and no cap.
            reads = {"beta": LOSSES["dpo"].defaults["beta"], "clamp_weight": False} | reads
        terms += _terms(loss, weight, loss.hyper(**reads), name)
    if not terms:
        raise ConfigError("loss_type names no loss")
    of_tokens = [t.name for t in terms if t.of_tokens]
    if of_tokens and len(terms) > 1:
        other = next((t.name for t in terms if not t.of_tokens), of_tokens[-1])
        raise ConfigError(
            f"{of_tokens[0]} is a loss per token of responses that are sampled, which {other} cannot be added to: give "
            f"loss_type={of_tokens[0]} alone"
        )
    if any(t.name == DEGREE for t in terms) and not any(t.loss and t.loss.shape == "pairs" for t in terms):
        raise ConfigError(
            f"{DEGREE} is added to a loss of pairs: loss_type=[dpo, {DEGREE}] with loss_weights=[1, its weight]"
        )
    if unread:
        read = {name for t in terms if t.loss for name in t.loss.defaults}
        close = [n for u in sorted(unread) for n in difflib.get_close_matches(u, read, n=1, cutoff=0.6)]
        hint = f"; did you mean {close[0]!r}?" if close else ""
        summed = " + ".join(t.name for t in terms)
        raise ConfigError(f"{', '.join(sorted(unread))} is set, but {summed} does not read it{hint}")
    single, of_each = ([t.name for t in terms if t.loss and t.loss.pair_prob], [
        t.name for t in terms if t.loss and t.loss.win_prob])  # fmt: skip
    if single and of_each:  # a batch has room for one kind
        raise ConfigError(
            f"{single[0]} reads win_prob as P(chosen beats rejected) and {of_each[0]} win probabilities against the "
            "previous policy: they cannot be mixed"
        )
    unpaired, paired = ([t.name for t in terms if t.loss and (t.loss.shape == "unpaired") == u] for u in (True, False))
    if unpaired and paired:
        raise ConfigError(f"{unpaired[0]} takes unpaired rows and {paired[0]} pairs: they cannot be mixed")
    scores = [t.name for t in terms if t.loss and t.loss.shape == "scores"]
    if scores and len(terms) > 1:
        other = next((t.name for t in terms if t.name not in scores), scores[0])
        raise ConfigError(
            f"{scores[0]} trains a scalar head, which has no log-probabilities for {other}: give loss_type={scores[0]} "
            "alone"
        )
    ordered = [t.name for t in terms if t.loss and t.loss.of_step == ORDER]
    with_kl = [t.name for t in terms if t.loss and "chosen_kl" in t.loss.needs]
    if ordered and with_kl:  # its first pass over a step reads a reference that is computed beforehand
        raise ConfigError(f"{ordered[0]} and {with_kl[0]} cannot be mixed: one needs the reference before a step")
    lists = [t.name for t in terms if t.loss and t.loss.shape == "lists"]
    greedy = [t.name for t in terms if t.loss and "greedy_logps" in t.loss.needs]
    if lists and greedy:  # the greedy response is none of the list
        raise ConfigError(f"{lists[0]} reads whole lists of responses and {greedy[0]} one beside: they cannot be mixed")
    mixed, alone = (
        [t.name for t in terms if t.loss and t.loss.reference and t.loss.previous == p] for p in (True, False)
    )
    if mixed and alone:  # a batch has room for one number a response
        raise ConfigError(
            f"{alone[0]} reads the reference alone and {mixed[0]} its mixture with the previous policy: they cannot be "
            "mixed"
        )
    return terms


def _of_dpo(options: Mapping[str, Any], weighted: bool) -> str:
    """The loss that DPO is with TRL's options of it."""
    chosen = {"f_divergence_type": "fdpo", "ld_alpha": "ld_dpo"}
    named = {option: name for option, name in chosen.items() if options.get(option) not in (None, "reverse_kl")}
    if weighted:
        named["use_weighting"] = "wpo"
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} make {' and '.join(named.values())} of dpo: give one")
    return next(iter(named.values()), "dpo")


def _terms(loss: Loss, weight: float, hyper: dict[str, Any], of: str) -> list[Term]:
    """A loss as the trainer sums it: its NLL by tokens apart."""
    if not loss.nll or hyper["nll_reduction"] != "token_mean":
        return [Term(loss.name, weight, loss, hyper, of)]
    apart = (loss.nll, "nll_reduction", "disable_prompt_loss")
    terms = [Term(loss.name, weight, loss, {k: v for k, v in hyper.items() if k not in apart}, of)]
    if not hyper[loss.nll]:
        return terms
    nll = _TOKEN_NLL if hyper.get("disable_prompt_loss", True) else _TOKEN_NLL | {"disable_prompt_loss": False}
    return [*terms, Term(SFT, weight * hyper[loss.nll], None, nll, of)]

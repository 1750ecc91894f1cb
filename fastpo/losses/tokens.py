"""Losses per token of responses that the policy sampled: what they read, what they share, and their class.

N = tokens of all responses of a packed batch, S = responses. Any float dtype, fp64 included; sums over a response are
formed in fp64. The policy terms are in fastpo/losses/token_functions.py, the entries in losses/token_table.py, the
definitions written out one token at a time in kernels/reference_tokens.py.

A step's loss is sum_t w_t l_t over its tokens. l_t is the policy term, times the weights of a correction and of masks,
plus beta KL_t; w_t is the reduction's share, from `Totals` of the whole step. So it is the same for any cut of a step
into micro-batches and ranks: their losses add up. Nothing here reads across responses.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.errors import ConfigError
from fastpo.losses.entry import REDUCTIONS, Loss
from fastpo.losses.functions import _at_most
from fastpo.losses.segments import segment_ids, segment_sum

__all__ = ["REDUCTIONS", "TokenLoss", "Tokens", "Totals", "kl", "log_ratio", "pull_back"]


MAX_EXPONENT = 40.0  # of a ratio: that of the policies and that in k3 are multiplied, and e^80 is still a float32


def exp(z: Tensor) -> Tensor:
    """e^z, constant from z = 40 on."""
    return torch.exp(_at_most(z, MAX_EXPONENT))


def d_exp(z: Tensor) -> Tensor:
    """Its derivative."""
    return torch.where(z <= MAX_EXPONENT, exp(z), 0.0)


class Tokens(NamedTuple):
    """What a loss per token may read of a packed batch; all but `logp` are constants to autograd."""

    logp: Tensor  # [N] log-probabilities of the policy, differentiable
    advantage: Tensor  # [S]
    offsets: Tensor  # [S + 1] int, cumulative tokens of the responses
    old_logp: Tensor | None = None  # [N] of the policy that sampled, as our own pass has them; None: logp itself
    ref_logp: Tensor | None = None  # [N]
    correction: Tensor | None = None  # [N], or [S] where each is of a whole response: `advantages.correction`
    sampler_logp: Tensor | None = None  # [N] the sampler's own, for off_policy_mask_threshold; NaN: not known
    mask: Tensor | None = None  # [N] 0/1: tokens that count, in lengths and totals too; None: all
    policy_mask: Tensor | None = None  # [N] 0/1: tokens whose policy term counts; lengths and KL stay; None: all

    @property
    def response(self) -> Tensor:
        """The response of each token, [N] int64."""
        return segment_ids(self.offsets, self.logp.shape[0])

    @property
    def counts(self) -> Tensor:
        """1 for each token that counts, [N]."""
        return torch.ones_like(self.logp.detach()) if self.mask is None else self.mask.to(self.logp.dtype)

    @property
    def kept(self) -> Tensor:
        """1 for each token that counts and whose policy term does, [N]."""
        return self.counts if self.policy_mask is None else self.counts * self.policy_mask.to(self.logp.dtype)

    @property
    def advantages(self) -> Tensor:
        """Each token's, [N]."""
        return self.advantage.detach().to(self.logp.dtype)[self.response]

    @property
    def change(self) -> Tensor:
        """log pi - log pi_old, 0 where a token does not count. [N]"""
        old = self.logp.detach() if self.old_logp is None else self.old_logp.detach()
        return torch.where(self.counts > 0, self.logp - old, 0.0)

    def total(self, values: Tensor) -> Tensor:
        """Sums over each response: [N] -> [S]."""
        return segment_sum(values, self.offsets)

    def length(self, counts: Tensor) -> Tensor:
        """Tokens of each response, at least 1: [N] -> [S]."""
        return self.total(counts).clamp(min=1.0)


class Totals(NamedTuple):
    """Of a whole step, over all its micro-batches and ranks."""

    tokens: float  # that count (mask)
    responses: float  # those whose tokens are all masked out too
    max_length: float = 0  # max_completion_length


def log_ratio(x: Tokens, level: str) -> Tensor:
    """log(pi / pi_old) of each token, [N]; at the level `sequence` the mean over its response's tokens, at `sum` (RLOO)
    their sum, of tokens whose policy term counts.
    """
    if level == "token":
        return x.change
    if level == "sequence":
        return (x.total(x.change * x.counts) / x.length(x.counts))[x.response]
    return x.total(x.change * x.kept)[x.response]


def pull_back(x: Tokens, g: Tensor, level: str) -> Tensor:
    """dL/dlogp [N], given dL/dlog_ratio `g` [N] at that level."""
    if level == "token":
        return g * x.counts
    if level == "sequence":
        return (x.total(g) / x.length(x.counts))[x.response] * x.counts
    return x.total(g)[x.response] * x.kept


def kl(x: Tokens, estimator: str) -> tuple[Tensor, Tensor]:
    """(estimate of KL(pi || reference) by the token that was sampled, its derivative by logp), each [N].

    d = log pi_ref - log pi: k1 = -d, k2 = d^2/2, k3 = e^d - d - 1; e^d stands still from d = 40 on.
    """
    assert x.ref_logp is not None
    d = torch.where(x.counts > 0, x.ref_logp.detach().to(x.logp.dtype) - x.logp, 0.0)
    if estimator == "k1":
        return -d, torch.ones_like(d)
    if estimator == "k2":
        return d**2 / 2, -d
    return exp(d) - d - 1, 1 - d_exp(d)


@dataclass(frozen=True)
class TokenLoss(Loss):
    """One entry of the table, of shape "tokens". `fn(x, **hyper)` gives the policy term of each token, [N], and
    `gradient(x, g, **hyper)` dL/dlogp [N] of sum_t g_t fn_t in closed form.
    """

    reference: bool = False  # read if beta > 0: `needed` says
    shape: str = "tokens"
    online: bool = True
    inside: tuple[str, ...] = ()  # of correction and policy_mask, what `fn` reads itself

    @property
    def reduction(self) -> str:
        """How tokens are averaged, where the hyper-parameter of that name does not say otherwise."""
        return str(self.defaults["reduction"])

    @property
    def own_kl(self) -> bool:
        """Whether beta and the reference are part of the policy term."""
        return "kl_estimator" not in self.defaults

    def needed(self, hyper: Mapping[str, Any]) -> list[str]:
        """Fields of Tokens that the loss reads with these hyper-parameters and has no stand-in for."""
        return ["advantage", "offsets", *(["ref_logp"] if hyper.get("beta") else [])]

    def __call__(  # type: ignore[override]
        self, logp: Tensor, advantage: Tensor, offsets: Tensor, *, totals: Totals | None = None, **more: Any
    ) -> Tensor:
        """The loss of a step, or of one micro-batch's share in it, [] in the dtype of `logp`; differentiable in it.

        logp [N], advantage [S], offsets [S + 1]; `more` are further fields of `Tokens` and hyper-parameters. `totals`
        are of the whole step; without them these responses are the step. Raises ConfigError naming what is missing.
        """
        x, hyper = self._tokens(logp, advantage, offsets, **more)
        return self.of(x, totals, **hyper)

    def of(self, x: Tokens, totals: Totals | None = None, **hyper: Any) -> Tensor:
        """The same of `Tokens`; `hyper` as `hyper()` gives them, or those that differ from the defaults."""
        losses = self.token_weights(x, totals, **hyper) * self.per_token(x, **hyper)
        return losses.double().sum().to(x.logp.dtype)

    def coefficients(  # type: ignore[override]
        self, logp: Tensor, advantage: Tensor, offsets: Tensor, *, totals: Totals | None = None, **more: Any
    ) -> Tensor:
        """dL/dlogp [N] of the call's loss in closed form; arguments as of the call."""
        x, hyper = self._tokens(logp, advantage, offsets, **more)
        return self.coefficients_of(x, totals, **hyper)

    @torch.no_grad()
    def coefficients_of(self, x: Tokens, totals: Totals | None = None, **hyper: Any) -> Tensor:
        """dL/dlogp [N] of `of`."""
        hyper = self.hyper(**hyper)
        weights = self.token_weights(x, totals, **hyper)
        out = self.gradient(x, weights * self._scale(x, hyper), **self._own(hyper))
        if hyper["beta"] and not self.own_kl:
            values, slopes = kl(x, hyper["kl_estimator"])
            g = hyper["beta"] * weights
            if hyper["use_bias_correction_kl"]:
                level = self._level(hyper)
                log_r = log_ratio(x, level)
                out = out + g * exp(log_r) * slopes + pull_back(x, g * values * d_exp(log_r), level)
            else:
                out = out + g * slopes
        return torch.where(x.counts > 0, out, 0.0)

    def per_token(self, x: Tokens, **hyper: Any) -> Tensor:
        """l_t [N]: the policy term with correction and masks in it, plus beta KL_t; 0 for tokens that do not count."""
        hyper = self.hyper(**hyper)
        out = self.fn(x, **self._own(hyper)) * self._scale(x, hyper)
        if hyper["beta"] and not self.own_kl:
            values, _ = kl(x, hyper["kl_estimator"])
            if hyper["use_bias_correction_kl"]:
                values = values * exp(log_ratio(x, self._level(hyper)))
            out = out + hyper["beta"] * values
        return torch.where(x.counts > 0, out, 0.0)

    @torch.no_grad()
    def token_weights(self, x: Tokens, totals: Totals | None = None, **hyper: Any) -> Tensor:
        """w_t [N], with which the loss is sum_t w_t l_t. ConfigError where `constant` has no longest length."""
        counts, reduction = x.counts, self.hyper(**hyper)["reduction"]
        if totals is None:
            totals = Totals(float(counts.sum()), x.advantage.shape[0])
        if reduction == "token_mean":
            return counts / max(totals.tokens, 1.0)
        if reduction == "constant":
            if not totals.max_length:
                raise ConfigError(
                    f"{self.name} divides by responses times max_completion_length: give totals=Totals(tokens, "
                    "responses, max_length)"
                )
            return counts / (max(totals.responses, 1.0) * totals.max_length)
        out = counts / max(totals.responses, 1.0)
        return out / x.length(counts)[x.response] if reduction == "seq_mean" else out

    def _own(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """The hyper-parameters of the policy term."""
        shared = _SHARED - {"beta"} if self.own_kl else _SHARED
        return {name: value for name, value in hyper.items() if name not in shared}

    @staticmethod
    def _level(hyper: Mapping[str, Any]) -> str:
        return str(hyper.get("importance_sampling_level", "token"))

    @torch.no_grad()
    def _scale(self, x: Tokens, hyper: Mapping[str, Any]) -> Tensor:
        """By what each token's policy term is multiplied, [N]."""
        out = torch.ones_like(x.logp)
        if x.policy_mask is not None and "policy_mask" not in self.inside:
            out = out * x.policy_mask.to(out.dtype)
        if x.correction is not None and "correction" not in self.inside:
            out = out * spread_correction(x)
        if hyper.get("off_policy_mask_threshold") is not None:
            out = out * _on_policy(x, hyper["off_policy_mask_threshold"])[x.response]
        return out

    def _tokens(self, logp: Tensor, advantage: Tensor, offsets: Tensor, **more: Any) -> tuple[Tokens, dict[str, Any]]:
        x = Tokens(logp, advantage, offsets, **{name: more.pop(name) for name in Tokens._fields if name in more})
        hyper = self.hyper(**more)
        missing = [name for name in self.needed(hyper) if getattr(x, name) is None]
        if missing:
            raise ConfigError(f"{self.name} needs {' and '.join(missing)}")
        n, s = logp.shape[0], offsets.shape[0] - 1
        shapes = {name: (n,) for name in Tokens._fields} | {"advantage": (s,), "offsets": (s + 1,)}
        for name, value in x._asdict().items():
            fits = value is None or tuple(value.shape) == shapes[name]
            if not fits and not (name == "correction" and tuple(value.shape) == (s,)):
                raise ConfigError(f"{self.name}: {name} {list(value.shape)} must have the shape {list(shapes[name])}")
        if offsets.device.type == "cpu" and (int(offsets[0]) != 0 or int(offsets[-1]) != n):
            raise ConfigError(f"{self.name}: offsets must run from 0 to the {n} tokens, not to {int(offsets[-1])}")
        return x, hyper

    def hyper(self, **given: Any) -> dict[str, Any]:
        """The loss's hyper-parameters: its defaults, overridden by those given that are not None."""
        unknown = next((name for name in given if name not in self.defaults), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, [*self.defaults, *Tokens._fields], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(self.defaults)}"
            raise ConfigError(f"{self.name} has no {unknown!r}{hint}")
        return super().hyper(**given)


# Hyper-parameters that the policy term does not read.
_SHARED = {"beta", "kl_estimator", "use_bias_correction_kl", "off_policy_mask_threshold", "reduction"}


def spread_correction(x: Tokens) -> Tensor:
    """The weight of each token, [N]; of its response where the correction has one of each."""
    assert x.correction is not None
    of_tokens = x.correction.detach().to(x.logp.dtype)
    return of_tokens if of_tokens.shape == x.logp.shape else of_tokens[x.response]


def _on_policy(x: Tokens, threshold: float) -> Tensor:
    """1 for a response whose advantage is not negative, or whose mean log(pi_sampler / pi) is at most the threshold,
    else 0. [S]. DeepSeek-V3.2, 2512.02556 eq. 9.
    """
    logp = x.logp.detach()
    sampler = x.sampler_logp if x.sampler_logp is not None else x.old_logp
    apart = torch.zeros_like(logp) if sampler is None else (sampler.detach().to(logp.dtype) - logp).nan_to_num(nan=0.0)
    apart = torch.where(x.counts > 0, apart, 0.0)
    near = x.total(apart) / x.length(x.counts) <= threshold
    return ((x.advantage.detach() >= 0) | near).to(logp.dtype)

"""What a run minimises: its weighted loss terms, and what they read beside the policy's log-probabilities."""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from fastpo.config import online
from fastpo.config.train_config import TrainConfig
from fastpo.data.kway import Forming
from fastpo.data.packing import PackedBatch, nll_count
from fastpo.data.prefetch import to_device
from fastpo.data.prepare import Example
from fastpo.data.rows import DEGREE_OF
from fastpo.errors import ConfigError
from fastpo.losses.online import ONLINE, POLICY, is_online
from fastpo.losses.table import DEGREE, ORDER, SFT, Term, resolve_terms
from fastpo.models.degree_head import LOGITS
from fastpo.training.degree_metrics import degree_sum
from fastpo.training.metrics import PAIR_METRICS, fused_pair_loss, has_kernel, nll_sum, pair_inputs, pair_metrics
from fastpo.training.policy_terms import entropy_sum, policy_loss, policy_metrics, token_inputs
from fastpo.training.row_statistics import needs_reference_tokens, row_statistics
from fastpo.training.step_statistics import Statistics


class Objective:
    """The terms of `losses.resolve_terms`, summed. Those of pairs come first in the metrics, the others apart."""

    def __init__(self, terms: Sequence[Term]):
        self.terms = list(terms)
        self.pair_terms = [t for t in terms if t.of_pairs]
        self.sft_terms = [t for t in terms if t.name == SFT]
        self.degree_term = next((t for t in terms if t.name == DEGREE), None)
        self.degrees = 0 if self.degree_term is None else int(self.degree_term.hyper["degrees"])
        self.token_terms = [t for t in terms if t.of_tokens]  # of responses that the policy gives as it trains
        self.policy_metrics = policy_metrics(terms)
        self.uses_reference = any(t.loss.reference for t in self.pair_terms) or any(t.beta for t in self.token_terms)
        self.compares = self.uses_reference  # whether the run does, its loss or what it is trained on
        self.reads_prompts = frozenset(t.of for t in self.terms if t.reads_prompt)  # entries of loss_type
        self.draws = any(t.loss.drawn for t in self.pair_terms)  # tokens of each response
        self.unpaired = any(t.loss.shape == "unpaired" for t in self.pair_terms)
        self.scores = any(t.loss.shape == "scores" for t in self.pair_terms)  # rewards, not log-probabilities
        self.kappa = next((t.hyper["kappa"] for t in self.pair_terms if t.loss.previous), None)  # of a previous policy
        self.row_statistics = row_statistics(self.pair_terms)
        self.of_lists = next((t.name for t in self.pair_terms if t.loss.shape == "lists"), None)
        # The first loss to which the reference's sums over whole responses do not say enough.
        self.of_tokens = next((t.name for t in self.pair_terms if needs_reference_tokens(t.loss)), None)

    @classmethod
    def of_options(cls, config: TrainConfig) -> Self:
        """The losses of `loss_type`, with their weights and hyper-parameters; ConfigError as `resolve_terms` raises."""
        if DEGREE in config.losses and config.fsdp != "no":
            raise ConfigError(f"{DEGREE} has a head beside the model, which fsdp does not split: leave fsdp out")
        names, beta, way = config.losses, config.beta, None
        if is_online(names):
            way = ONLINE[names[0]]
            # rloo takes its KL from the reward (online/rollouts.py), the others from the loss.
            names, beta = [way.loss], None if way.loss == "rloo" else beta
        out = cls(
            resolve_terms(
                names, config.loss_weights, loss_kwargs=config.loss_kwargs, beta=beta,
                label_smoothing=config.label_smoothing, gamma_beta_ratio=config.gamma_beta_ratio,
                ipo_reduce=config.ipo_reduce, discopop_tau=config.discopop_tau,
                f_divergence_type=config.f_divergence_type, ld_alpha=config.ld_alpha,
                f_alpha_divergence_coef=config.f_alpha_divergence_coef, use_weighting=config.use_weighting,
                **online.hyper(config),
            )
        )  # fmt: skip
        if way is not None:
            out.compares |= way.draws != POLICY or (way.loss == "rloo" and config.beta != 0)
        return out

    def forming(self, config: TrainConfig) -> Forming:
        """Which pairs are formed of rows with K responses."""
        if self.of_lists and config.pair_policy != "best_worst":
            raise ConfigError(
                f"{self.of_lists} reads whole lists of responses: leave pair_policy={config.pair_policy} out"
            )
        return Forming(config.pair_policy, config.pair_margin, whole=bool(self.of_lists))

    def check_row_losses(self) -> None:
        """ConfigError where rows cannot name their loss, since one of the losses couples rows, or takes other rows."""
        whys = {"lists": "reads whole lists of responses", "unpaired": "takes unpaired rows"}
        for term in self.pair_terms:
            why = "reads a number of the whole step" if term.loss.of_step else whys.get(term.loss.shape)
            if why:
                raise ConfigError(
                    f"rows name their loss (column 'loss'), and {term.name} {why}: train with {term.name} alone, or "
                    "leave the column out"
                )

    def check_reference(self, config: TrainConfig, ref_model: object, prev_model: object = None) -> None:
        """ConfigError where a reference or a previous policy is given, or to be moved, that no loss reads so."""
        names = "+".join(config.losses)
        if config.sync_ref_model and not self.compares:
            raise ConfigError(f"sync_ref_model moves a reference, and {names} has none")
        if config.sync_ref_model and ref_model is not None:
            raise ConfigError("sync_ref_model starts from the policy: leave ref_model out, or sync_ref_model")
        if ref_model is not None and not self.compares:
            raise ConfigError(f"ref_model is given, and {names} has no reference: leave it out")
        if prev_model is not None and self.kappa is None:
            hint = "pass it as ref_model, its only reference" if self.uses_reference else "leave it out"
            raise ConfigError(f"prev_model is given, and {names} mixes no previous policy with the reference: {hint}")
        if config.sync_ref_model and self.kappa is not None:
            raise ConfigError(f"sync_ref_model moves the reference, and {names} mixes it with the previous policy once")

    def __call__(
        self, logp: Tensor, batch: PackedBatch, stats: Statistics, pair_count: int, nlls: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's loss, and its metrics [len(PAIR_METRICS)], both on the device.
        `logp`: token log-probabilities [N], of a reward model the rewards [S].
        `pair_count` and `nlls`: what the whole step's losses, and those of `nll_counts`, are means over."""
        total = logp.new_zeros(())
        metrics = logp.new_zeros(len(PAIR_METRICS))
        if self.degree_term is not None and LOGITS in batch.rows:
            total = total + self.degree_term.weight / (nlls[-1] or 1) * degree_sum(self.degree_term, batch)
        for term, count in zip(self.sft_terms, nlls, strict=False):
            if batch.losses is not None and term.of not in batch.losses:
                continue
            nll = nll_sum(logp, batch, term.hyper["nll_reduction"], term.reads_prompt, term.of)
            total = total + term.weight / (count or 1) * nll
        for term in self.token_terms:
            assert stats.totals is not None
            total = total + term.weight * policy_loss(term, token_inputs(logp, batch), stats.totals)
        if stats.entropy_coef:
            total = total - stats.entropy_coef / max(stats.entropy_tokens, 1.0) * entropy_sum(batch)
        if self.pair_terms:
            share, metrics = self.of_pairs(logp, batch, stats)
            total = total + share / (pair_count or 1)
        return total, metrics

    def nll_counts(self, examples: Iterable[Example]) -> list[float]:
        """What each sft term is a mean over, of these examples, and the term of degrees if there is one, last."""
        rows = list(examples)
        degrees = [float(sum(DEGREE_OF in e.response_columns for e in rows))] * (self.degree_term is not None)
        nlls = [sum(nll_count(e, t.hyper["nll_reduction"], t.reads_prompt) for e in rows if e.loss in (None, t.of))
                for t in self.sft_terms]  # fmt: skip
        return nlls + degrees

    def places(self, term: Term, batch: PackedBatch) -> tuple[int, ...] | None:
        """The batch's pairs that a term of pairs trains, by their places; None for all of them."""
        return None if batch.losses is None else batch.losses.get(term.of, ())

    def of_pairs(self, logp: Tensor, batch: PackedBatch, stats: Statistics) -> tuple[Tensor, Tensor]:
        """sum over terms and pairs of weight * loss, and the metrics as sums over pairs."""
        total, metrics, x = logp.new_zeros(()), None, None
        for term in self.pair_terms:
            places = self.places(term, batch)
            if places == ():
                continue
            if places is not None:
                x = pair_inputs(logp, batch) if x is None else x
                (at,) = to_device([torch.tensor(places)], logp.device)
                share = (batch.pair_weight[at] * stats.loss(term, x, logp, batch, at)).sum()
            elif has_kernel(term, logp, batch):
                share, of_launch = fused_pair_loss(term, logp, batch)
                metrics = of_launch if term is self.pair_terms[0] else metrics
            else:
                x = pair_inputs(logp, batch) if x is None else x
                if term.loss.of_step == ORDER:
                    share = stats.ordered_loss(x, term, batch)
                else:
                    of_each = stats.loss(term, x, logp, batch)
                    share = (of_each if batch.label is not None else batch.pair_weight * of_each).sum()
            total = total + term.weight * share
        if metrics is None and x is None:  # no pairs
            metrics = logp.new_zeros(len(PAIR_METRICS))
        elif metrics is None:
            metrics = pair_metrics(x._replace(kl=stats.kl), self.pair_terms[0])
        return total, metrics

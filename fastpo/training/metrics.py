"""Training metrics: sums on the device, means under TRL's keys on the host, throughput of real tokens."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpo import ops
from fastpo.data.packing import PackedBatch
from fastpo.data.prefetch import to_device
from fastpo.errors import TrainingError
from fastpo.kernels import reference
from fastpo.losses.table import DEGREE, KL, Pairs, Term, segment_sum
from fastpo.models.flops import Flops
from fastpo.models.policy import ENTROPY, TOP1
from fastpo.ops.inputs import choose_backend
from fastpo.training.degree_metrics import DEGREE_SUMS, degree_means
from fastpo.training.policy_terms import policy_metrics
from fastpo.training.reward_metrics import RANGE, range_means, reward_means

# Names in PackedBatch.rows: of the head rows [N], and of the prompts' tokens [M].
LOG_SUM_SQ, TOKEN_KL = "log_sum_sq", "token_kl"
PROMPT_LOGP = "prompt_logp"
TOKEN_SUMS = 4  # entropy, tokens, chosen tokens that are the likeliest, chosen tokens
# Sums over pairs that every pair loss reports, in this order; of unpaired rows, the desirable ones are the chosen.
PAIR_METRICS = ("chosen_logratios", "rejected_logratios", "accuracies", "logps/chosen", "logps/rejected", "chosen",
                "rejected", "kl", "pairs")  # fmt: skip


def pair_inputs(logp: Tensor, batch: PackedBatch) -> Pairs:
    """Response sums and lengths of each pair, or of each unpaired response, differentiable in `logp` [N]; of a reward
    model its rewards, which `logp` [S] then holds.

    Where a loss reads a previous policy too, the batch's reference is the mixture of both, and stands for either.
    """
    chosen, rejected = batch.pairs.long().unbind(1)
    if batch.scored_rows is not None:  # rewards [S] in the place of log-probabilities
        return Pairs(logp[chosen], logp[rejected], margin=batch.margin)
    lengths, ref_logp = weighted_lengths(logp, batch), batch.ref_logp
    if batch.token_weight is not None:
        logp = batch.token_weight * logp
        ref_logp = None if ref_logp is None else batch.token_weight * ref_logp
    of_response = segment_sum(logp, batch.response_offsets)
    ref = batch.ref_response_logps
    if ref_logp is not None:
        ref = segment_sum(ref_logp, batch.response_offsets)
    if batch.label is not None:
        return Pairs(of_response, None, ref, None, lengths, label=batch.label)
    rw, rl = (ref[chosen], ref[rejected]) if ref is not None else (None, None)
    greedy: list[Tensor | None] = [None, None]
    if batch.greedy is not None:
        greedy = [None if of is None else of[batch.greedy.long()] for of in (of_response, ref)]
    return Pairs(
        of_response[chosen], of_response[rejected], rw, rl, lengths[chosen], lengths[rejected],
        batch.win_prob_chosen, batch.win_prob_rejected, prev_chosen_logps=rw, prev_rejected_logps=rl,
        greedy_logps=greedy[0], ref_greedy_logps=greedy[1],
        chosen_of_reference=None if batch.of_reference is None else batch.of_reference > 0,
    )  # fmt: skip


def list_loss(term: Term, logp: Tensor, batch: PackedBatch) -> Tensor:
    """A term's loss of each row's list of responses, differentiable in `logp` [N]. -> [rows]

    Rows with as many responses are a block [R, K], one block after another: exact for rows of different K.
    """
    ref_logp, ref = batch.ref_logp, batch.ref_response_logps
    if batch.token_weight is not None:
        logp = batch.token_weight * logp
        ref_logp = None if ref_logp is None else batch.token_weight * ref_logp
    of_response = segment_sum(logp, batch.response_offsets)  # [S]
    ref = ref if ref_logp is None else segment_sum(ref_logp, batch.response_offsets)
    assert ref is not None and batch.score is not None  # checked before training
    sizes = np.array(batch.row_responses)
    first = np.cumsum(sizes) - sizes
    where = [first[sizes == k, None] + np.arange(k) for k in np.unique(sizes)]  # [R, K] each
    where.append(np.argsort(np.argsort(sizes, kind="stable"), kind="stable"))  # from the order of the blocks to rows
    *blocks, back = to_device(map(torch.from_numpy, where), logp.device)
    x = (Pairs(of_response[at], None, ref[at], scores=batch.score[at]) for at in blocks)
    return torch.cat([term.loss.fn(block, **term.hyper) for block in x])[back]


def weighted_lengths(logp: Tensor, batch: PackedBatch) -> Tensor:
    """Tokens of each response, or the sum of their weights, in the dtype of `logp`. -> [S]"""
    if batch.token_weight is None:
        return batch.response_offsets.diff().to(logp.dtype)
    return segment_sum(batch.token_weight, batch.response_offsets).to(logp.dtype)


def nll_sum(
    logp: Tensor, batch: PackedBatch, reduction: str, with_prompt: bool = False, of: str | None = None
) -> Tensor:  # fmt: skip
    """Weighted NLL of the chosen responses of a batch, differentiable in `logp` [N]: summed over their tokens, or over
    each one's mean (seq_mean). `with_prompt` adds that of each one's prompt, summed. `of`: where rows name their loss,
    the one whose rows count. Divided by the step's `packing.nll_count` it is the sft term. -> []
    """
    weight = batch.nll_weight
    if batch.losses is not None and of is not None:
        weight = weight * (batch.row_loss == list(batch.losses).index(of))
    if with_prompt:
        assert batch.prompts is not None and reduction == "token_mean"
        return nll_sum(logp, batch, reduction, of=of) - (batch.prompts.weight * prompt_sums(batch)).sum()
    if reduction == "seq_mean":
        of_tokens = batch.response_offsets.diff()
        lengths = weighted_lengths(logp, batch)
        weight = weight / torch.repeat_interleave(lengths, of_tokens, output_size=logp.numel())
    return -(weight * logp).sum()


def prompt_sums(batch: PackedBatch) -> Tensor:
    """Log-probabilities of the batch's prompts, from the forward pass that left them in `batch.rows`. -> [U]"""
    return segment_sum(batch.rows[PROMPT_LOGP], batch.prompts.offsets)


def has_kernel(term: Term, logp: Tensor, batch: PackedBatch) -> bool:
    """Whether `fused_pair_loss` takes this term: a loss of single pairs, on a GPU that Triton compiles for."""
    return choose_backend("auto", logp) == "triton" and batch.label is None and ops.has_kernel(term.name, term.hyper)


def fused_pair_loss(term: Term, logp: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """One term through the fused kernel: the sum over pairs of weight * loss, differentiable in `logp` [N] and in the
    KL's rows, and `pair_metrics`. Where a loss reads a previous policy too, the batch's reference is the mixture.
    """
    needs, hyper = term.loss.needs, dict(term.hyper)
    if term.loss.nll:
        hyper.setdefault(term.loss.nll, 0.0)  # taken out of the term where it is a mean over tokens
    of_rows = TOKEN_KL if "chosen_kl" in needs else LOG_SUM_SQ if "chosen_log_sum_sq" in needs else None
    total, out = ops.preference_loss(
        logp, batch.ref_logp, batch.response_offsets, batch.pairs, batch.pair_weight,
        batch.win_prob_chosen, batch.win_prob_rejected, loss_type=term.name, unique=batch.unique,
        ref_response_logps=batch.ref_response_logps if batch.ref_logp is None else None,
        rows=None if of_rows is None else batch.rows[of_rows], token_weight=batch.token_weight,
        drawn_rows=batch.drawn_rows if term.loss.drawn else None, backend="triton", **hyper,
    )  # fmt: skip
    return total, out.metrics


def pair_metrics(x: Pairs, term: Term) -> Tensor:
    """[len(PAIR_METRICS)] sums. The reward is beta times the log-ratio, or times SimPO's mean logp."""
    if x.label is not None:
        desirable = x.label.to(x.chosen_logps.dtype)
        kinds = (desirable, 1 - desirable)
        ratios, logps = ([(v * kind).sum() for kind in kinds] for v in (x.chosen_logratios, x.chosen_logps))
        none = ratios[0].new_zeros(())
        kl = none if x.kl is None else x.kl * len(desirable)
        return torch.stack([*ratios, none, *logps, *(kind.sum() for kind in kinds), kl, none]).detach()
    rewards = reference.pair_rewards(*x[:6], mean=term.loss.length)
    ones = torch.ones_like(rewards.wins)
    sums = (*rewards, x.chosen_logps, x.rejected_logps, ones, ones, 0 * ones, ones)
    return torch.stack(sums).detach().sum(1)


def token_sums(batch: PackedBatch) -> Tensor:
    """Sums [TOKEN_SUMS] fp32 over the batch's response tokens, from what the forward pass left in `batch.rows`; the
    chosen ones are those of every response that some pair prefers, of sft's rows all, of unpaired rows none."""
    entropy, top1 = batch.rows[ENTROPY].detach(), batch.rows[TOP1]
    lengths, n = batch.response_offsets.diff(), entropy.numel()
    chosen = torch.zeros(len(lengths), device=entropy.device)
    if batch.losses is not None:
        pairless = [not n for n, k in zip(batch.row_pairs, batch.row_responses, strict=True) for _ in range(k)]
        (chosen,) = to_device([torch.tensor(pairless).float()], entropy.device)
        chosen = chosen.index_fill(0, batch.pairs[:, 0].long(), 1.0)
    elif batch.label is None:
        chosen = chosen.index_fill(0, batch.pairs[:, 0].long(), 1.0) if len(batch.pairs) else chosen + 1.0
    of_rows = torch.repeat_interleave(chosen, lengths, output_size=n)
    tokens = entropy.new_full((), n)
    return torch.stack([entropy.sum(), tokens, (of_rows * top1).sum(), of_rows.sum()]).float()


def token_means(sums: Sequence[float]) -> dict[str, float]:
    """TRL's keys from `token_sums`; without those that nothing counted towards."""
    entropy, tokens, likeliest, chosen = sums
    out = {"entropy": entropy / tokens} if tokens else {}
    return {**out, "mean_token_accuracy": likeliest / chosen} if chosen else out


def metric_means(sums: Sequence[float], terms: Sequence[Term]) -> dict[str, float]:
    """TRL's keys from the sums of PAIR_METRICS; without those that nothing counted towards."""
    chosen, rejected, accuracies, logps_chosen, logps_rejected, n_chosen, n_rejected, kl, pairs = sums
    if terms[0].loss.shape == "scores":
        return reward_means(chosen, rejected, accuracies, pairs)
    beta = next((t.beta for t in terms if t.loss.reference), terms[0].beta)  # that of the rewards' own loss
    out = {}
    if n_chosen:
        out["rewards/chosen"] = beta * chosen / n_chosen
    if n_rejected:
        out["rewards/rejected"] = beta * rejected / n_rejected
    if pairs:
        out["rewards/accuracies"] = accuracies / pairs
        out["rewards/margins"] = beta * (chosen - rejected) / pairs
    elif n_chosen and n_rejected:
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
    if n_chosen:
        out["logps/chosen"] = logps_chosen / n_chosen
    if n_rejected:
        out["logps/rejected"] = logps_rejected / n_rejected
    if any(t.loss.of_step == KL for t in terms):
        out["kl"] = kl / (n_chosen + n_rejected)
    return out


class Window:
    """Metrics since the last log line, kept on the device until `flush`; and the run's totals."""

    def __init__(
        self,
        device: torch.device,
        policy: Any,
        terms: Sequence[Term],
        max_tokens: Callable[[], int],
        max_nonfinite: int,
    ):
        """max_tokens: of a micro-batch as it is at the time. max_nonfinite: steps in a row that end the run."""
        self.device, self.max_tokens, self.max_nonfinite = device, max_tokens, max_nonfinite
        self.pair_terms = [t for t in terms if t.of_pairs]
        self.has_degrees = any(t.name == DEGREE for t in terms)
        self.policy_metrics = policy_metrics(terms)
        self.has_range = any(t.loss.shape == "scores" for t in self.pair_terms)
        self.flops = Flops(policy, device)
        # steps that counted, loss, skipped in a row now and at most, skipped in all
        self.run = torch.zeros(5, device=device)
        self.tokens_at_flush = 0
        self.has_aux = self.is_paused = False
        self._reset()

    def _reset(self) -> None:
        self.sums = torch.zeros(2 + len(PAIR_METRICS), device=self.device)  # steps that counted, loss, pair metrics
        self.norm = torch.zeros((), device=self.device)
        self.aux = torch.zeros((), device=self.device)  # the router's load-balancing loss, summed over steps
        self.tokens = torch.zeros(TOKEN_SUMS, device=self.device)  # of the last step that looked at them
        self.dropped = torch.zeros(3, device=self.device)  # by grad_filter: rows, sum of their mass, the largest
        self.range = torch.zeros(RANGE, device=self.device)  # of a reward model's rewards, summed over steps
        self.degrees = torch.zeros(DEGREE_SUMS, device=self.device)
        of_policy = [] if self.policy_metrics is None else self.policy_metrics.names
        self.policy = torch.zeros(len(of_policy), device=self.device)  # of responses that it gave, over steps
        self.trunk_tokens = self.alone_tokens = self.micro_batches = 0
        self.flops.reset()
        self.started = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is no training time: evaluation, saving, callbacks."""
        if self.is_paused:
            yield
            return
        self.is_paused, started = True, time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - started
            self.is_paused = False

    def trunk(self, batch: PackedBatch) -> None:
        """Count one micro-batch's work."""
        self.trunk_tokens += batch.cu_seqlens[-1] - batch.padding
        # Each response with a prompt of its own, and without its last token where the trunk does not see it.
        self.alone_tokens += batch.num_tokens - (sum(batch.row_responses) if batch.uses is None else 0)
        self.micro_batches += 1
        self.flops.add(batch)

    def add(self, loss: Tensor, metrics: Tensor, norm: Tensor, finite: Tensor) -> None:
        """One optimiser step; a skipped one enters only the count of skipped steps."""
        step = torch.cat([torch.ones(1, device=self.device), loss.reshape(1), metrics])
        step = torch.where(finite, step, 0.0)
        self.sums += step
        self.norm = norm
        self.run[:2] += step[:2]
        skipped = (~finite).float()
        self.run[2] = (self.run[2] + 1) * skipped
        self.run[3] = torch.maximum(self.run[3], self.run[2])
        self.run[4] += skipped

    def add_aux(self, aux: Tensor, finite: Tensor) -> None:
        """One step's load-balancing loss, unweighted; a skipped step's does not count."""
        self.has_aux = True
        self.aux += torch.where(finite, aux.to(self.device), 0.0)

    def add_rows(self, sums: Any, world: Any, finite: Tensor, *, tokens: bool, dropped: bool) -> None:
        """What one step's rows say beside its metrics, of this process's part (accumulation.StepSums): of their
        distributions [TOKEN_SUMS], which replaces the last ones, the mass that `grad_filter` left out, and the range of
        a reward model's rewards. Every rank calls it."""
        if dropped:
            self.add_dropped(sums.dropped, world)
        if tokens:
            self.tokens = world.sum_(sums.tokens)
        if self.has_range:
            self.range += torch.where(finite, world.max_(sums.range), 0.0)
        if self.has_degrees:
            self.degrees += torch.where(finite, world.sum_(sums.degrees), 0.0)
        if self.policy_metrics is not None:
            of_step = self.policy_metrics.of_step(sums.policy, sums.totals, world)
            self.policy += torch.where(finite, of_step, 0.0)

    def add_dropped(self, parts: Sequence[Tensor], world: Any) -> None:
        """One step's probability mass left out by `grad_filter`, of this process's rows. Every rank calls it."""
        of_ranks = torch.zeros(2 + world.size, device=self.device)
        for mass in parts:
            of_ranks[0] += mass.numel()
            of_ranks[1] += mass.sum()
            if mass.numel():
                of_ranks[2 + world.rank] = torch.maximum(of_ranks[2 + world.rank], mass.amax())
        world.sum_(of_ranks)
        self.dropped[:2] += of_ranks[:2]
        self.dropped[2] = torch.maximum(self.dropped[2], of_ranks[2:].amax())

    def state_dict(self) -> dict[str, Any]:
        """The open window and the run's totals, for a checkpoint."""
        return {**{k: getattr(self, k) for k in self._STATE}, "seconds": time.monotonic() - self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name in self._STATE:
            value = state.get(name, getattr(self, name))
            setattr(self, name, value.to(self.device) if isinstance(value, Tensor) else value)
        self.started = time.monotonic() - state["seconds"]

    _STATE = ("run", "sums", "norm", "aux", "dropped", "range", "degrees", "policy", "tokens", "tokens_at_flush",
              "trunk_tokens", "alone_tokens", "micro_batches")  # fmt: skip

    def flush(self, learning_rate: float, num_tokens: int) -> dict[str, float]:
        """The log line: one host read, then a new window. Raises TrainingError after too many non-finite steps."""
        norm = self.norm.reshape(1).to(self.device)
        numbers = [
            norm,
            self.aux[None],
            self.dropped,
            self.range,
            self.degrees,
            self.policy,
            self.tokens,
            self.run,
            self.sums,
        ]
        norm, aux, rows, dropped, largest, low, high, *values = torch.cat(numbers).tolist()
        of_degrees, values = values[:DEGREE_SUMS], values[DEGREE_SUMS:]
        of_policy, values = values[: len(self.policy)], values[len(self.policy) :]
        of_tokens, values = values[:TOKEN_SUMS], values[TOKEN_SUMS:]
        self.run[3] = self.run[2]
        self._check(values[3])
        skipped = int(values[4])
        steps, loss, *metrics = values[5:]
        seconds = time.monotonic() - self.started
        mean_loss = loss / steps if steps else float("nan")
        out = {"loss": mean_loss, "grad_norm": norm, "learning_rate": learning_rate}
        if self.pair_terms and steps:
            out |= metric_means(metrics, self.pair_terms)
            out |= range_means((low, high), steps) if self.has_range else {}
            if metrics[-1]:
                out["pairs_per_second"] = metrics[-1] / seconds
        if self.has_aux and steps:
            out["aux_loss"] = aux / steps
        out |= degree_means(of_degrees) | token_means(of_tokens)
        out |= self._of_policy(of_policy, steps)
        out["num_tokens"] = num_tokens
        out["tokens_per_second"] = (num_tokens - self.tokens_at_flush) / seconds
        out["packing_efficiency"] = self.trunk_tokens / max(1, self.micro_batches * self.max_tokens())
        out["shared_prompt_savings"] = 1 - self.trunk_tokens / self.alone_tokens if self.alone_tokens else 0.0
        if rows:
            out |= {"grad_filter/dropped_mass": dropped / rows, "grad_filter/dropped_mass_max": largest}
        if self.flops.peak:
            out["mfu"] = self.flops.total / seconds / self.flops.peak
        out["peak_memory_gb"] = peak_memory_gb(self.device)
        if skipped:
            out["skipped_steps"] = skipped
        self.tokens_at_flush = num_tokens
        self._reset()
        return out

    def _of_policy(self, sums: Sequence[float], steps: float) -> dict[str, float]:
        if self.policy_metrics is None or not steps:
            return {}
        return {name: value / steps for name, value in zip(self.policy_metrics.names, sums, strict=True)}

    def _check(self, in_a_row: float) -> None:
        if in_a_row >= self.max_nonfinite:
            self.run[2:4] = 0  # a run that is stopped here and resumed starts counting anew
            raise TrainingError(
                f"{in_a_row:.0f} steps in a row had a non-finite loss or gradient and were skipped; lower the learning "
                "rate, or look at the data (max_nonfinite_steps sets the limit)"
            )

    def skipped_last(self) -> bool:
        """Whether the last step was skipped. Waits for the device."""
        return bool(self.run[2] > 0)

    def counted(self) -> bool:
        """Whether any step of the run was not skipped. Waits for the device."""
        return bool(self.run[0] > 0)

    def summary(self, seconds: float, steps: int, rows: int, num_tokens: int) -> dict[str, float]:
        """The run's last line, with the metrics of the window that no log line closed. Raises as `flush` does."""
        counted, loss, _, in_a_row, skipped = self.run.tolist()
        self._check(in_a_row)
        open_steps, _, *metrics = self.sums.tolist()
        unlogged = metric_means(metrics, self.pair_terms) if self.pair_terms and open_steps else {}
        unlogged |= range_means(self.range.tolist(), open_steps) if self.has_range and open_steps else {}
        if self.has_aux and open_steps:
            unlogged["aux_loss"] = self.aux.item() / open_steps
        return {
            **unlogged,
            **degree_means(self.degrees.tolist()),
            **self._of_policy(self.policy.tolist(), open_steps),
            **token_means(self.tokens.tolist()),
            "train_loss": loss / counted if counted else float("nan"),
            "train_runtime": seconds,
            "train_samples_per_second": rows / seconds,
            "train_steps_per_second": steps / seconds,
            "tokens_per_second": num_tokens / seconds,
            "num_tokens": num_tokens,
            "skipped_steps": int(skipped),
            "peak_memory_gb": peak_memory_gb(self.device),
        }


def peak_memory_gb(device: torch.device) -> float:
    """Peak GiB: the CUDA allocator's, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

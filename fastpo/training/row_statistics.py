"""What single losses read beyond the sums of a pair: further numbers of its rows, tails, drawn tokens.

N = head rows (completion tokens), D = hidden, P = pairs, S = responses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpo import ops
from fastpo.data.packing import PackedBatch
from fastpo.data.prepare import Example
from fastpo.losses.table import Loss, Pairs, Term, segment_sum
from fastpo.models.policy import Head
from fastpo.training.metrics import LOG_SUM_SQ, TOKEN_KL, prompt_sums

# Which random draw: of a training step, or of an evaluation, the same at every one.
TRAIN, EVALUATION = 1, 0


def row_statistics(terms: Sequence[Term]) -> set[str]:
    """Numbers per row that these losses need beside its log-probability: names in PackedBatch.rows."""
    needs = {name for t in terms if t.loss for name in t.loss.needs}
    wanted = {"chosen_log_sum_sq": LOG_SUM_SQ, "chosen_kl": TOKEN_KL}
    return {name for need, name in wanted.items() if need in needs}


def needs_reference_tokens(loss: Loss) -> bool:
    """Whether sums of the reference over whole responses are not enough."""
    return loss.drawn or "ref_chosen_tail_logps" in loss.needs


def observer(
    batch: PackedBatch,
    wanted: set[str],
    live: Callable[[PackedBatch], tuple[Tensor, Head] | None],
) -> Callable[[Tensor, Head], None]:
    """What Policy.logp calls with the rows' hidden states [N, D] and its head; it fills `batch.rows` with what is
    `wanted`. `live`: the rows of a reference in memory.
    """
    of_reference = live(batch)

    def observe(hidden: Tensor, head: Head) -> None:
        rule: dict[str, Any] = {"target": batch.target, "softcap": head.softcap, "logit_scale": head.logit_scale}
        if LOG_SUM_SQ in wanted:
            batch.rows[LOG_SUM_SQ] = ops.log_sum_sq(hidden, head.weight, head.bias, **rule)
        if TOKEN_KL in wanted:
            ref_hidden, ref = of_reference
            batch.rows[TOKEN_KL] = ops.token_kl(
                hidden, head.weight, ref_hidden, ref.weight, head.bias, ref.bias, **rule,
                ref_softcap=ref.softcap, ref_logit_scale=ref.logit_scale,
            )  # fmt: skip

    return observe


def term_inputs(term: Term, x: Pairs, logp: Tensor, batch: PackedBatch) -> Pairs:
    """`x` with what this loss needs beside it, or in its place; differentiable in `logp` [N] and in the KL's rows."""
    needs = term.loss.needs
    if term.reads_prompt:
        of_pair, lengths = batch.prompts.of_pair, batch.prompts.offsets.diff().to(logp.dtype)
        x = x._replace(prompt_logps=prompt_sums(batch)[of_pair], prompt_len=lengths[of_pair])
    if "chosen_log_sum_sq" in needs:
        chosen, rejected = _of_pairs(batch.rows[LOG_SUM_SQ], batch)
        x = x._replace(chosen_log_sum_sq=chosen, rejected_log_sum_sq=rejected)
    if "chosen_kl" in needs:
        chosen, rejected = _of_pairs(batch.rows[TOKEN_KL], batch)
        x = x._replace(chosen_kl=chosen, rejected_kl=rejected)
    if "chosen_tail_logps" in needs:
        chosen, rejected = _tails(logp, batch)
        ref_chosen, ref_rejected = _tails(batch.ref_logp, batch)
        x = x._replace(
            chosen_tail_logps=chosen, rejected_tail_logps=rejected,
            ref_chosen_tail_logps=ref_chosen, ref_rejected_tail_logps=ref_rejected,
        )  # fmt: skip
    if term.loss.drawn:
        chosen, rejected = _drawn(logp, batch)
        ref_chosen, ref_rejected = _drawn(batch.ref_logp, batch)
        x = x._replace(
            chosen_logps=chosen, rejected_logps=rejected, ref_chosen_logps=ref_chosen, ref_rejected_logps=ref_rejected
        )
    return x


def _weighted(values: Tensor, batch: PackedBatch) -> Tensor:
    return values if batch.token_weight is None else batch.token_weight * values


def _of_pairs(values: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Sums of values [N] over the preferred and over the other response of each pair, each [P]."""
    of_response = segment_sum(_weighted(values, batch), batch.response_offsets)  # [S]
    chosen, rejected = batch.pairs.long().unbind(1)
    return of_response[chosen], of_response[rejected]


def _tails(values: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Sums of values [N] past the length of the pair's shorter response, each [P]; 0 for the shorter one.

    A response has another tail in each of its pairs, so they are differences of one running sum; in fp64, where it
    loses nothing that fp32 would show.
    """
    values = _weighted(values, batch)
    running = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])  # [N + 1]
    offsets = batch.response_offsets.long()
    chosen, rejected = batch.pairs.long().unbind(1)
    lengths = offsets.diff()
    shared = torch.minimum(lengths[chosen], lengths[rejected])  # [P]
    tails = [running[offsets[side + 1]] - running[offsets[side] + shared] for side in (chosen, rejected)]
    return tails[0].to(values.dtype), tails[1].to(values.dtype)


def _drawn(values: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Sums of values [N] over the rows drawn for each pair's two responses, each [P]."""
    lengths = batch.response_offsets.diff()[batch.pairs.long()].amin(1, keepdim=True)  # [P, 1]
    ends = lengths.expand(-1, 2).reshape(-1).cumsum(0)  # [2 P]
    sums = segment_sum(_weighted(values, batch)[batch.drawn_rows], torch.cat([ends.new_zeros(1), ends]))
    return sums[::2], sums[1::2]


def draw_rows(examples: Sequence[Example], indices: Sequence[int], seed: int, stream: int, step: int) -> Tensor:
    """SamPO's tokens: of each pair's two responses as many rows as the shorter one has -> [K] int64 rows of the batch.

    Pair by pair, chosen's then rejected's, each in order, from the longer one without replacement. A draw depends on
    the seed, the step, the row of the data and the pair alone: packing, ranks and a resume do not change it.
    """
    drawn: list[np.ndarray] = []
    start = 0
    for i in indices:
        lengths = [len(response) for response in examples[i].responses]
        begins = start + np.cumsum([0, *lengths])
        for k, pair in enumerate(examples[i].pairs):
            shared = min(lengths[response] for response in pair)
            rng = np.random.default_rng([seed % 2**32, stream, step, i, k])
            for response in pair:
                chosen = np.arange(shared)
                if lengths[response] > shared:
                    chosen = np.sort(rng.choice(lengths[response], shared, replace=False))
                drawn.append(begins[response] + chosen)
        start = begins[-1]
    return torch.from_numpy(np.concatenate(drawn).astype(np.int64)) if drawn else torch.zeros(0, dtype=torch.int64)

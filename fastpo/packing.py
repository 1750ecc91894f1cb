"""Token ids to packed batches: all bookkeeping on the host, so that no step ever asks the device for a length.

T = packed tokens of the trunk, N = head rows (completion tokens), S = responses, P = pairs, C = chains, M = prompt
tokens that have one before them, U = prompts that they are of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from fastpo.data import Example


class Branch(NamedTuple):
    """Whole chains [start, stop) that continue the first tokens of another chain, [prompt, prompt_stop)."""

    start: int
    stop: int
    prompt: int
    prompt_stop: int


class Prompts(NamedTuple):
    """The prompts of preferred responses, for an NLL over prompt and response: all their tokens but the first."""

    rows: Tensor  # [M] int64: the position whose hidden state predicts each target
    target: Tensor  # [M] int64
    offsets: Tensor  # [U + 1] int32, cumulative rows per prompt; a shared one is there once
    weight: Tensor  # [U] fp32: the sft term's weight of each; a shared one has those of its preferred responses
    of_pair: Tensor  # [P] int64: which of them is that of the pair's preferred response


@dataclass(slots=True)
class PackedBatch:
    """One micro-batch: a forest of prompts and their responses, without padding.

    A prompt is a segment; each response is a segment whose parent is its prompt. Without sharing, every response has
    its own copy of the prompt, the two are adjacent, and together they form one causal chain. A shared prompt forms one
    with its first response; each other response is a chain of its own, and together they are a branch of that prompt.
    The last token of a response predicts nothing, so it never enters the trunk; the last of a prompt predicts the first
    of each of its responses.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64; a response continues its prompt's positions
    seg_offsets: tuple[int, ...]  # G + 1 cumulative tokens; host
    seg_parents: tuple[int, ...]  # G; -1 for a prompt; host
    cu_seqlens: tuple[int, ...]  # C + 1 boundaries of the causal chains; host
    branches: tuple[Branch, ...]  # of shared prompts; host
    logit_rows: Tensor  # [N] int64: the position whose hidden state predicts each target
    target: Tensor  # [N] int64
    response_offsets: Tensor  # [S + 1] int32, cumulative rows per response
    pairs: Tensor  # [P, 2] int32: preferred, other; indices of responses
    pair_weight: Tensor  # [P] fp32
    nll_weight: Tensor  # [N] fp32: the sft term's weight of each token; 0 for responses that are never preferred
    token_weight: Tensor | None  # [N] fp32, in nll_weight already; a token of weight 2 counts as two
    win_prob_chosen: Tensor | None  # [P] fp32
    win_prob_rejected: Tensor | None  # [P] fp32
    label: Tensor | None  # [S] bool: desirable; of unpaired rows
    score: Tensor | None  # [S] fp32
    greedy: Tensor | None  # [P] int32: the reference's greedy response of each pair's row
    ref_logp: Tensor | None  # [N] fp32, the reference's token log-probabilities
    ref_response_logps: Tensor | None  # [S] fp32, where the data give only their sums
    examples: tuple[int, ...]  # which rows of the data set; host
    row_pairs: tuple[int, ...]  # pairs of each row; host
    row_responses: tuple[int, ...]  # responses of each row; host
    num_tokens: int  # prompt and response tokens of every response, as TRL counts them; host
    unique: bool  # every response is in exactly one pair; host
    prompts: Prompts | None = None  # where a loss reads them
    drawn_rows: Tensor | None = None  # [K] int64: SamPO's draw, row_statistics.draw_rows
    rows: dict[str, Tensor] = field(default_factory=dict)  # further numbers per head row [N], from the forward pass

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on `device`; host bookkeeping is shared."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.pin_memory().to(device, non_blocking=True)
            elif isinstance(value, Prompts):
                moved[f.name] = Prompts(*(part.pin_memory().to(device, non_blocking=True) for part in value))
        return replace(self, **moved)


def trunk_tokens(example: Example) -> int:
    """Tokens that the example puts through the trunk: its prompt once a response, or once where it is shared, and every
    response but its last token."""
    if example.share:
        return len(example.prompt_ids) + sum(len(r) - 1 for r in example.responses)
    return sequence_tokens(example) - len(example.responses)


def sequence_tokens(example: Example) -> int:
    """Tokens of its responses, each with its prompt: what TRL counts."""
    return sum(len(example.prompt_of(k)) + len(r) for k, r in enumerate(example.responses))


# What a branch costs a layer beside its tokens, in FLOPs of its matrices: three more attention calls and two merges.
# Measured on two Zen 4 cores, D = 256 (6.3 MFLOP a token and layer): sharing breaks even at a prompt of 12 tokens.
_BRANCH_FLOPS = 75e6


def set_sharing(examples: Sequence[Example], mode: str, layer_flops: float) -> None:
    """Decide which examples share their prompt. `mode`: auto, always or never; `layer_flops`: of a token in a layer.

    Where the truncation left the responses different prompts there is none to share.
    """
    for example in examples:
        possible = len(example.responses) > 1 and example.response_prompts is None and mode != "never"
        saved = (len(example.responses) - 1) * len(example.prompt_ids)  # tokens, for one branch however many responses
        pays = mode == "always" or saved * layer_flops >= _BRANCH_FLOPS
        example.share = possible and pays


def loss_count(example: Example) -> int:
    """Losses that the example has: its pairs, or its responses where they are unpaired."""
    return len(example.pairs) or len(example.responses)


def nll_count(example: Example, reduction: str = "token_mean", with_prompt: bool = False) -> float:
    """What the sft term is a mean over: responses that win a pair or are desirable (all of them where there are neither
    pairs nor labels), or, with token_mean, their tokens, and `with_prompt` those of the prompt of each but the first.
    """
    labels = example.response_columns.get("label", [1.0] * len(example.responses))
    chosen = {winner for winner, _ in example.pairs} or [k for k, label in enumerate(labels) if label]
    if reduction != "token_mean":
        return len(chosen)
    of_prompts = sum(len(example.prompt_of(k)) - 1 for k in chosen) if with_prompt else 0
    if example.token_weights is not None:
        return of_prompts + float(sum(example.token_weights[k].sum(dtype=np.float64) for k in chosen))
    return of_prompts + sum(len(example.responses[k]) for k in chosen)


def collate(
    examples: Sequence[Example],
    indices: Sequence[int],
    ref_logps: Sequence[Sequence[np.ndarray]] | None = None,
    with_prompts: bool = False,
) -> PackedBatch:
    """Pack `examples[i] for i in indices`; `ref_logps[i][k]` are the reference's log-probabilities of response k.

    `with_prompts` lists the prompts' tokens too, for a loss that reads their log-probabilities.
    """
    ids, positions, rows, targets, ref, nll, token_weights = ([] for _ in range(7))  # arrays, one a segment or response
    seg_lengths: list[int] = []
    seg_parents: list[int] = []
    chain_lengths: list[int] = []
    response_lengths: list[int] = []
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    win_chosen: list[float] = []
    win_rejected: list[float] = []
    ref_sums: list[float] = []
    labels: list[float] = []
    branches: list[Branch] = []
    scores: list[float] = []
    greedy: list[int] = []
    prompts = _PromptRows()
    start = num_tokens = 0
    for i in indices:
        example = examples[i]
        first_response = len(response_lengths)
        pair_weights = example.pair_columns.get("weight", [1.0] * len(example.pairs))
        preferred: dict[int, float] = {}  # response -> weight of its token NLL
        for (winner, loser), weight in zip(example.pairs, pair_weights, strict=True):
            pairs.append((first_response + winner, first_response + loser))
            weights.append(weight)
            preferred.setdefault(winner, weight)
        _win_probs(example, win_chosen, win_rejected)
        root, root_segment = start, len(seg_parents)  # of the example's first prompt
        for k, response in enumerate(example.responses):
            prompt = example.prompt_of(k)
            if k and example.share:
                length = len(response) - 1
                ids.append(response[:-1])
                positions.append(np.arange(len(prompt), len(prompt) + length))
                seg_parents.append(root_segment)
                seg_lengths.append(length)
                rows += [np.array([root + len(prompt) - 1]), np.arange(start, start + length)]
            else:
                length = len(prompt) + len(response) - 1
                ids += [prompt, response[:-1]]
                positions.append(np.arange(length))
                seg_parents += [-1, len(seg_parents)]
                seg_lengths += [len(prompt), len(response) - 1]
                rows.append(np.arange(start + len(prompt) - 1, start + length))
            targets.append(response)
            weight = preferred.get(k, 0.0) if example.pairs else 1.0
            if "label" in example.response_columns:
                weight = example.response_columns["label"][k]
                labels.append(weight)
            if with_prompts and k in preferred:
                prompts.add(first_response + k, root if example.share else start, prompt, preferred[k])
            nll.append(np.full(len(response), weight, np.float32))
            if example.token_weights is not None:
                token_weights.append(example.token_weights[k])
                nll[-1] *= example.token_weights[k]
            if length:
                chain_lengths.append(length)
            response_lengths.append(len(response))
            start += length
            num_tokens += len(prompt) + len(response)
            if ref_logps is not None:
                ref.append(ref_logps[i][k])
        if example.share:
            after_first = root + len(example.prompt_ids) + len(example.responses[0]) - 1
            if start > after_first:
                branches.append(Branch(after_first, start, root, root + len(example.prompt_ids)))
        ref_sums += example.response_columns.get("ref_logps", [])
        scores += example.response_columns.get("score", [])
        if example.greedy is not None:
            greedy += [first_response + example.greedy] * len(example.pairs)
    n_responses = len(response_lengths)
    flat_pairs = [r for pair in pairs for r in pair]
    return PackedBatch(
        input_ids=_int64(ids),
        position_ids=_int64(positions),
        seg_offsets=_offsets(seg_lengths),
        seg_parents=tuple(seg_parents),
        cu_seqlens=_offsets(chain_lengths),
        branches=tuple(branches),
        logit_rows=_int64(rows),
        target=_int64(targets),
        response_offsets=torch.tensor(_offsets(response_lengths), dtype=torch.int32),
        pairs=torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2),
        pair_weight=torch.tensor(weights, dtype=torch.float32),
        nll_weight=torch.from_numpy(np.concatenate(nll)),
        token_weight=torch.from_numpy(np.concatenate(token_weights)) if token_weights else None,
        win_prob_chosen=torch.tensor(win_chosen, dtype=torch.float32) if len(win_chosen) == len(pairs) else None,
        win_prob_rejected=torch.tensor(win_rejected, dtype=torch.float32) if len(win_rejected) == len(pairs) else None,
        label=torch.tensor(labels).bool() if labels else None,
        score=torch.tensor(scores, dtype=torch.float32) if len(scores) == n_responses else None,
        greedy=torch.tensor(greedy, dtype=torch.int32) if pairs and len(greedy) == len(pairs) else None,
        ref_logp=torch.from_numpy(np.concatenate(ref).astype(np.float32)) if ref else None,
        ref_response_logps=torch.tensor(ref_sums, dtype=torch.float32) if len(ref_sums) == n_responses else None,
        examples=tuple(indices),
        row_pairs=tuple(len(examples[i].pairs) for i in indices),
        row_responses=tuple(len(examples[i].responses) for i in indices),
        num_tokens=num_tokens,
        unique=sorted(flat_pairs) == list(range(n_responses)),
        prompts=prompts.packed(pairs) if with_prompts else None,
    )


class _PromptRows:
    """Gathers `Prompts`, each prompt by its place in the trunk."""

    def __init__(self) -> None:
        self.number: dict[int, int] = {}  # first position -> which prompt
        self.of_response: dict[int, int] = {}
        self.rows, self.target = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        self.lengths: list[int] = []
        self.weights: list[float] = []

    def add(self, response: int, start: int, prompt: np.ndarray, weight: float) -> None:
        """A preferred response whose prompt begins at `start`."""
        if start not in self.number:
            self.number[start] = len(self.lengths)
            self.rows.append(np.arange(start, start + len(prompt) - 1))
            self.target.append(prompt[1:])
            self.lengths.append(len(prompt) - 1)
            self.weights.append(0.0)
        self.of_response[response] = self.number[start]
        self.weights[self.number[start]] += weight

    def packed(self, pairs: Sequence[tuple[int, int]]) -> Prompts:
        return Prompts(
            _int64(self.rows), _int64(self.target), torch.tensor(_offsets(self.lengths), dtype=torch.int32),
            torch.tensor(self.weights, dtype=torch.float32),
            torch.tensor([self.of_response[winner] for winner, _ in pairs], dtype=torch.int64),
        )  # fmt: skip


def _win_probs(example: Example, chosen: list[float], rejected: list[float]) -> None:
    """SPPO's two targets; `win_prob`, P(chosen beats rejected), stands in for both in the paper's single form."""
    columns = example.pair_columns
    if "win_prob_chosen" in columns and "win_prob_rejected" in columns:
        chosen += columns["win_prob_chosen"]
        rejected += columns["win_prob_rejected"]
    elif "win_prob" in columns:
        chosen += columns["win_prob"]
        rejected += [1 - p for p in columns["win_prob"]]


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))


def _offsets(lengths: list[int]) -> tuple[int, ...]:
    return (0, *np.cumsum(lengths).tolist())


def epoch_order(n: int, *, seed: int, epoch: int, strategy: str) -> list[int]:
    """The order of n rows in one epoch: as they stand, or transformers' seeded permutation (seed + epoch)."""
    if strategy == "sequential":
        return list(range(n))
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def epoch_steps(order: Sequence[int], batch_size: int, accumulation: int, drop_last: bool = False) -> list[list[int]]:
    """The rows of each optimiser step of one epoch: `accumulation` batches of `batch_size` rows; the last may be short.

    `drop_last` leaves out an incomplete last batch, as a data loader does, not an incomplete step.
    """
    if drop_last:
        order = order[: len(order) // batch_size * batch_size]
    step = batch_size * accumulation
    return [list(order[start : start + step]) for start in range(0, len(order), step)]


def pack_step(
    rows: Sequence[int], tokens: Sequence[int] | Mapping[int, int], max_tokens: int, ranks: int = 1
) -> list[list[list[int]]]:
    """Split one step's rows into micro-batches of at most `max_tokens` trunk tokens, for each of `ranks` processes.

    `tokens[i]` is row i's size; longest rows first, as few micro-batches as best-fit finds, rounded up so that every
    rank gets as many. Where they can be filled evenly, they are: the largest one sets the peak memory, and the slowest
    rank the time. A row over the budget gets a micro-batch of its own. A rank runs dry only where there are fewer rows
    than ranks. Deterministic; a row stays whole, because its loss couples its responses.
    """
    ordered = sorted(rows, key=lambda i: -tokens[i])
    bins: list[list[int]] = []
    room: list[int] = []
    for row in ordered:
        fitting = [b for b, free in enumerate(room) if free >= tokens[row]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
            bins[best].append(row)
            room[best] -= tokens[row]
        else:
            bins.append([row])
            room.append(max_tokens - tokens[row])
    count = min(-(-len(bins) // ranks) * ranks, len(ordered))
    even: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for row in ordered:
        smallest = filled.index(min(filled))
        even[smallest].append(row)
        filled[smallest] += tokens[row]
    if max(filled, default=0) <= max_tokens:
        bins = even
    while len(bins) < count:
        largest = max((part for part in bins if len(part) > 1), key=lambda part: sum(tokens[i] for i in part))
        bins.append(largest[1::2])
        del largest[1::2]
    if ranks == 1:
        return [bins]
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for part in sorted(bins, key=lambda part: -sum(tokens[i] for i in part)):
        rank = min(range(ranks), key=lambda r: (len(shares[r]), work[r]))
        shares[rank].append(part)
        work[rank] += sum(tokens[i] for i in part)
    return shares


def pack_all(rows: Sequence[int], tokens: Sequence[int] | Mapping[int, int], max_tokens: int) -> list[list[int]]:
    """Micro-batches for a pass without gradients over many rows: rows of similar length together, filled in order."""
    batches: list[list[int]] = []
    size = max_tokens + 1
    for row in sorted(rows, key=lambda i: -tokens[i]):
        if size + tokens[row] > max_tokens:
            batches.append([])
            size = 0
        batches[-1].append(row)
        size += tokens[row]
    return batches

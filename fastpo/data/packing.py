"""Token ids to packed batches: all bookkeeping on the host, so that no step ever asks the device for a length.

Rows of a step with the same prompt are one tree, where that is estimated cheaper (`set_sharing`): the prompt passes the
trunk once, and so does a response that several of them have. The data know nothing of it: rows, responses, pairs and
columns of a batch are the same, only the trunk positions that head rows read coincide.

T = packed tokens of the trunk, N = head rows (completion tokens), S = responses, P = pairs, C = chains, M = prompt
tokens that have one before them, U = prompts that they are of.
"""

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fastpo.data.example import ADVANTAGE, OF_REFERENCE, REF_LOGP, Example
from fastpo.data.packer import pack_all, pack_step
from fastpo.data.prefetch import to_device
from fastpo.data.rows import DEGREE_OF
from fastpo.data.trunk_row import Branch, TrunkRow
from fastpo.data.win_probs import take_win_probs


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
    with its first response; each other response is a chain of its own, and together they are a branch of that prompt;
    one that a row before it in the tree has already is no segment, its head rows read the same positions again. The
    last token of a response predicts nothing, so it enters the trunk only where a router's loss counts it; the last of
    a prompt predicts the first of each of its responses. Padding, if any, is last: chains of their own that no head row
    reads.
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
    margin: Tensor | None  # [P] fp32
    win_prob_chosen: Tensor | None  # [P] fp32
    win_prob_rejected: Tensor | None  # [P] fp32
    label: Tensor | None  # [S] bool: desirable; of unpaired rows
    score: Tensor | None  # [S] fp32
    scored_rows: Tensor | None  # [S] int64: the position at which a scalar head scores each response
    of_reference: Tensor | None  # [P] fp32: 1 where the preferred response is the reference's own
    greedy: Tensor | None  # [P] int32: the reference's greedy response of each pair's row
    # Where rows name their loss: the pairs of each that is named in the batch, and which of these is each token's.
    losses: dict[str, tuple[int, ...]] | None  # host
    row_loss: Tensor | None  # [N] int64
    degrees: Tensor | None  # [E, 2] int64: where the last token of each response of a degree is, and the degree
    degree_weight: Tensor | None  # [E] fp32
    ref_logp: Tensor | None  # [N] fp32, the reference's token log-probabilities
    ref_response_logps: Tensor | None  # [S] fp32, where the data give only their sums
    examples: tuple[int, ...]  # which rows of the data set; host
    row_pairs: tuple[int, ...]  # pairs of each row; host
    row_responses: tuple[int, ...]  # responses of each row; host
    num_tokens: int  # prompt and response tokens of every response, as TRL counts them; host
    unique: bool  # every response is in exactly one pair; host
    padding: int = 0  # trunk tokens at the end that are no one's; host
    prompts: Prompts | None = None  # where a loss reads them
    uses: Tensor | None = None  # [T] fp32: how many responses a token of the trunk is part of; where all of it is there
    drawn_rows: Tensor | None = None  # [K] int64: SamPO's draw, row_statistics.draw_rows
    advantage: Tensor | None = None  # [S] fp32, of responses that the policy gave as it trains
    tokens: dict[str, Tensor] = field(default_factory=dict)  # of these, numbers that came with each token: [N] fp32
    rows: dict[str, Tensor] = field(default_factory=dict)  # further numbers per head row [N], from the forward pass

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on `device`; host bookkeeping is shared."""
        if device.type == "cpu":
            return self
        named = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        moved = to_device([*named.values(), *self.tokens.values(), *(self.prompts or ())], device)
        changes: dict[str, Any] = dict(zip(named, moved, strict=False))
        moved = moved[len(named) :]
        changes["tokens"] = dict(zip(self.tokens, moved, strict=False))
        if self.prompts is not None:
            changes["prompts"] = Prompts(*moved[len(self.tokens) :])
        return replace(self, **changes)


# ---- what a tree costs, and which rows are one


# What a branch costs a CPU's layer beside its tokens, in FLOPs of its matrices: more attention calls, and the merge of
# their outputs. Measured on two Zen 4 cores, D = 256 (6.3 MFLOP a token and layer), where sharing breaks even at a
# prompt of 12 tokens. models/sharing.py has a GPU's.
CPU_BRANCH_FLOPS = 75e6


class ModelWork(Protocol):
    """What the cost of a trunk is made of, as models/flops.py counts it."""

    layers: int
    per_token: int  # FLOPs of a token in all layers' matrices
    attention: int  # layers times the hidden size


class TrunkCost(NamedTuple):
    """Estimated FLOPs of one layer, forward and backward: linear in tokens, quadratic in lengths, and of branches."""

    token: float  # of a token in the layer's matrices
    pair: float = 0.0  # of a query and a key that it sees
    branch: float = CPU_BRANCH_FLOPS
    branch_token: float = 0.0  # of a branch's token, beside the first two: it attends in two calls, which are merged
    branch_key: float = 0.0  # of a token of the branch's prompt, likewise
    # Of a micro-batch's branches together, and how many rows and tokens one has at most.
    launches: float = 0.0
    rows: int = 1
    room: int = 0
    shares: bool = True  # whether auto may share: not where attention has no form for trees

    @classmethod
    def of(cls, flops: ModelWork) -> Self:
        """Of a model whose work `flops` counts, on a CPU."""
        layers = max(flops.layers, 1)
        # Flops counts the square of a chain's length, of which half are pairs.
        return cls(flops.per_token / layers, 12 * flops.attention / layers)

    def share_from(self, prompt: int, response: float = 0.0, row: int = 0) -> int:
        """The least number of responses for which one copy of a prompt of so many tokens is cheaper than one each; 0
        where none is. response: the mean of their tokens. row: tokens of such a row that shares none."""
        each = prompt * self.token + prompt**2 / 2 * self.pair - response * self.branch_token
        if self.branch_token and each <= 0:
            return 0
        once = self.branch + prompt * self.branch_key
        if self.launches:
            once += self.launches / max(1, min(self.rows, self.room // max(row, 1)))
        return 1 + max(1, math.ceil(once / max(each, 1e-9)))


class TreeSize(NamedTuple):
    """What one tree, or one row whose responses have a copy of the prompt each, is to the trunk."""

    tokens: int
    head_rows: int
    pairs: int  # of a query and a key that it sees
    branches: int
    branch_tokens: int = 0
    branch_keys: int = 0  # tokens of their prompts

    @property
    def size(self) -> int:
        """What counts against max_tokens: a head row takes less than a fourth of the memory of a trunk token, and there
        are more of them only where many rows of a tree have the same responses. Rounded up, so that rows together never
        count for more than apart: else a micro-batch that fits is over the budget once it is looked at as a whole."""
        return max(self.tokens, -(-self.head_rows // 4))

    def cost(self, cost: TrunkCost) -> int:
        """In 1/1024 of a token's share of a layer's matrices; an integer, so that it is the same on every machine."""
        flops = self.tokens * cost.token + self.pairs * cost.pair + self.branches * cost.branch
        flops += self.branch_tokens * cost.branch_token + self.branch_keys * cost.branch_key
        return round(1024 * flops / max(cost.token, 1.0))


def tree_size(rows: Sequence[Example], share: bool) -> TreeSize:
    """Of rows that are one tree, or with `share` false of one row with a copy of its prompt for each response."""
    head_rows = sum(len(r) for e in rows for r in e.responses)
    if not share:
        chains = [len(e.prompt_of(k)) + len(r) - 1 + e.whole for e in rows for k, r in enumerate(e.responses)]
        return TreeSize(sum(chains), head_rows, sum(n * (n + 1) // 2 for n in chains), 0)
    prompt = len(rows[0].prompt_ids)
    lengths = list({r.tobytes(): len(r) - 1 + e.whole for e in rows for r in e.responses}.values())
    pairs = prompt * (prompt + 1) // 2 + sum(n * (n + 1) // 2 + n * prompt for n in lengths)
    branches = int(len(lengths) > 1)  # all but the first response, whose chain the prompt begins
    return TreeSize(prompt + sum(lengths), head_rows, pairs, branches, sum(lengths[1:]), branches * prompt)


def trunk_tokens(example: Example) -> int:
    """Tokens that the example puts through the trunk: its prompt once a response, or once where it is shared, and every
    response, mostly but its last token."""
    return tree_size([example], example.share).tokens


def sequence_tokens(example: Example) -> int:
    """Tokens of its responses, each with its prompt: what TRL counts."""
    return sum(len(example.prompt_of(k)) + len(r) for k, r in enumerate(example.responses))


def set_sharing(examples: Sequence[Example], mode: str, cost: TrunkCost) -> None:
    """Decide from how many responses on a prompt is shared, in each example and by those of a step. `mode`: auto, by
    `cost`; always or never.

    Where the truncation left the responses different prompts there is none to share.
    """
    for example in examples:
        possible = example.response_prompts is None and mode != "never"
        least = 2 if mode == "always" else cost.share_from(*_lengths(example))
        example.share_from = least if possible else 0
        example.share = 0 < example.share_from <= len(example.responses)


def _lengths(example: Example) -> tuple[int, float, int]:
    """Tokens in the trunk: of its prompt, of a response in the mean, of the row without sharing."""
    count = len(example.responses)
    responses = sum(len(r) - 1 + example.whole for r in example.responses)
    prompt = len(example.prompt_ids)
    return prompt, responses / max(count, 1), count * prompt + responses


def sharing_mode(mode: str, cost: TrunkCost) -> str:
    """`share_prompts` as it is where `cost` holds."""
    return "never" if mode == "auto" and not cost.shares else mode


def repeated_prompts(examples: Iterable[Example]) -> int:
    """How many examples have the prompt of one before them, and may share it with that in a step."""
    prompts = [e.prompt_ids.tobytes() for e in examples if e.share_from]
    return len(prompts) - len(set(prompts))


def _trees(examples: Sequence[Example], rows: Sequence[int]) -> list[list[int]]:
    """`rows`, of which all have one prompt, as one tree where that pays; else each alone."""
    together = len(rows) == 1 or sum(len(examples[i].responses) for i in rows) >= examples[rows[0]].share_from
    return [list(rows)] if together else [[i] for i in rows]


def _adjacent_trees(examples: Sequence[Example], indices: Sequence[int]) -> Iterator[tuple[int, bool, bool]]:
    """(row, whether it begins a tree, whether the tree's prompt is shared): neighbours of one prompt are one tree."""
    groups: list[list[int]] = []
    for i in indices:
        example, last = examples[i], examples[groups[-1][-1]] if groups else None
        if last and example.share_from and last.share_from and np.array_equal(example.prompt_ids, last.prompt_ids):
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        for tree in _trees(examples, group):
            for i in tree:
                yield i, i == tree[0], len(tree) > 1 or examples[i].share


def step_trees(examples: Sequence[Example], rows: Iterable[int], max_tokens: int) -> list[list[int]]:
    """Rows of one prompt together, in trees no larger than `max_tokens` (a row stays whole), by their first row."""
    groups: dict[bytes | int, list[int]] = {}
    for i in rows:
        groups.setdefault(examples[i].prompt_ids.tobytes() if examples[i].share_from else i, []).append(i)
    trees: list[list[int]] = []
    for group in groups.values():
        part: list[int] = []
        seen: set[bytes] = set()
        tokens = head_rows = 0
        for i in group:
            own = {r.tobytes(): len(r) - 1 + examples[i].whole for r in examples[i].responses}
            more = sum(length for response, length in own.items() if response not in seen)
            more_rows = sum(map(len, examples[i].responses))
            if part and max(tokens + more, -(-(head_rows + more_rows) // 4)) > max_tokens:
                trees += _trees(examples, part)
                part, seen = [], set()
            if not part:
                tokens, head_rows, more = len(examples[i].prompt_ids), 0, sum(own.values())
            part.append(i)
            seen |= own.keys()
            tokens += more
            head_rows += more_rows
        trees += _trees(examples, part)
    return trees


def _sizes(examples: Sequence[Example], trees: Iterable[Sequence[int]]) -> list[TreeSize]:
    return [tree_size([examples[i] for i in tree], len(tree) > 1 or examples[tree[0]].share) for tree in trees]


def step_batches(
    examples: Sequence[Example], rows: Sequence[int], max_tokens: int, cost: TrunkCost, ranks: int = 1
) -> list[list[list[int]]]:
    """The rows of each micro-batch of one step, for each of `ranks` processes; rows of one tree are neighbours.

    `packer.pack_step` over trees. A tree of several rows that costs more than a rank's share is split.
    """
    trees = step_trees(examples, rows, max_tokens)
    sizes = _sizes(examples, trees)
    costs = [size.cost(cost) for size in sizes]
    while ranks > 1:
        most = max((k for k in range(len(trees)) if len(trees[k]) > 1), key=lambda k: costs[k], default=None)
        if most is None or (len(trees) >= ranks and costs[most] * ranks <= sum(costs)):
            break
        tree = trees[most]
        halves = _trees(examples, tree[: len(tree) // 2]) + _trees(examples, tree[len(tree) // 2 :])
        trees[most : most + 1] = halves
        of_halves = _sizes(examples, halves)
        sizes[most : most + 1] = of_halves
        costs[most : most + 1] = [size.cost(cost) for size in of_halves]
    shares = pack_step(range(len(trees)), [size.size for size in sizes], max_tokens, ranks, costs)
    return [[[i for k in part for i in trees[k]] for part in share] for share in shares]


def packed_size(examples: Sequence[Example], rows: Sequence[int]) -> int:
    """What the rows take of max_tokens in one micro-batch: their trunk tokens, where a prompt is shared once."""
    return sum(size.size for size in _sizes(examples, step_trees(examples, rows, sys.maxsize)))


def pass_batches(examples: Sequence[Example], rows: Iterable[int], max_tokens: int) -> list[list[int]]:
    """The rows of each micro-batch of a pass without gradients over many rows; rows of one tree are neighbours."""
    trees = step_trees(examples, rows, max_tokens)
    sizes = [size.size for size in _sizes(examples, trees)]
    return [[i for k in part for i in trees[k]] for part in pack_all(range(len(trees)), sizes, max_tokens)]


def loss_count(example: Example) -> int:
    """Losses of pairs: the example's pairs, or its responses where they are unpaired; none of sft and degree_aux."""
    return len(example.pairs) or (len(example.responses) if example.loss is None else 0)


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
    with_prompts: bool | Collection[str] = False,
    token_bucket: int | None = None,
) -> PackedBatch:
    """Pack `examples[i] for i in indices`; `ref_logps[i][k]` are the reference's log-probabilities of response k.

    Neighbours with one prompt are one tree where their `share_from` says so. `with_prompts` lists the prompts' tokens
    too, for a loss that reads their log-probabilities; where rows name their loss, the names of those that do.
    `token_bucket`: the trunk's row is padded to a multiple of it.
    """
    trunk, prompts = TrunkRow(), _PromptRows()
    rows: list[np.ndarray] = []  # of each response, as the next four
    targets: list[np.ndarray] = []
    nll: list[np.ndarray] = []
    token_weights: list[np.ndarray] = []
    pairs: list[tuple[int, int]] = []
    pair_weight: list[float] = []
    win_chosen: list[float | None] = []
    win_rejected: list[float | None] = []
    scored_rows: list[int] = []
    losses: dict[str, list[int]] = {}  # name -> places in `pairs`
    of_rows: list[np.ndarray] = []  # of each response, which of `losses` its row names
    greedy: list[int] = []
    degrees, degree_weight = list[tuple[int, int]](), list[float]()
    num_tokens = 0
    for i, opens, share in _adjacent_trees(examples, indices):
        example = examples[i]
        first_response = len(targets)
        pair_weights = example.pair_columns.get("weight", [1.0] * len(example.pairs))
        preferred: dict[int, float] = {}  # response -> weight of its token NLL
        if example.loss is not None:
            losses.setdefault(example.loss, []).extend(range(len(pairs), len(pairs) + len(example.pairs)))
            named = list(losses).index(example.loss)
            of_rows += [np.full(len(response), named) for response in example.responses]
        own_weights = example.response_columns.get("weight", [1.0] * len(example.responses))
        nll_of_prompt = example.loss is None or with_prompts is True or example.loss in (with_prompts or ())
        for (winner, loser), weight in zip(example.pairs, pair_weights, strict=True):
            pairs.append((first_response + winner, first_response + loser))
            pair_weight.append(weight)
            preferred.setdefault(winner, weight)
        take_win_probs(example, win_chosen, win_rejected)
        trunk.begin_row(opens)
        for k, response in enumerate(example.responses):
            prompt = example.prompt_of(k)
            weight = preferred.get(k, 0.0) if example.pairs else own_weights[k]
            if "label" in example.response_columns:
                weight = example.response_columns["label"][k]
            nll.append(np.full(len(response), weight, np.float32))
            if example.token_weights is not None:
                token_weights.append(example.token_weights[k])
                nll[-1] *= example.token_weights[k]
            if with_prompts and k in preferred:
                weight = preferred[k] if nll_of_prompt else 0.0
                prompts.add(first_response + k, trunk.root if share else trunk.size, prompt, weight)
            rows.append(trunk.add(prompt, response, share, example.whole))
            if example.scored_at is not None:
                scored_rows.append(trunk.position(example.scored_at[k]))
            if DEGREE_OF in example.response_columns:
                last, of_it = len(prompt) + len(response) - 1, example.response_columns[DEGREE_OF]
                degrees.append((trunk.position(last), int(of_it[k])))
                degree_weight.append(own_weights[k])
            targets.append(response)
            num_tokens += len(prompt) + len(response)
        if share:
            trunk.end_shared_row(opens, len(example.prompt_ids))
        if example.greedy is not None:
            greedy += [first_response + example.greedy] * len(example.pairs)
        elif example.loss is not None:  # which reads none
            greedy += [first_response + winner for winner, _ in example.pairs]
    padding = trunk.pad(token_bucket) if token_bucket else 0
    n_responses, n_pairs = len(targets), len(pairs)
    of_pairs = _gathered(examples[i].pair_columns for i in indices)
    of_responses = _gathered(examples[i].response_columns for i in indices)
    of_tokens = _gathered(examples[i].token_columns for i in indices)
    ref = [] if ref_logps is None else [logps for i in indices for logps in ref_logps[i]]
    ref += of_tokens.pop(REF_LOGP, [])
    return PackedBatch(
        input_ids=_int64(trunk.ids),
        position_ids=_int64(trunk.positions),
        seg_offsets=_offsets(trunk.seg_lengths),
        seg_parents=tuple(trunk.seg_parents),
        cu_seqlens=_offsets(trunk.chain_lengths),
        branches=tuple(trunk.branches),
        logit_rows=_int64(rows),
        target=_int64(targets),
        response_offsets=torch.tensor(_offsets(list(map(len, targets))), dtype=torch.int32),
        pairs=torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2),
        pair_weight=torch.tensor(pair_weight, dtype=torch.float32),
        nll_weight=torch.from_numpy(np.concatenate(nll)),
        token_weight=torch.from_numpy(np.concatenate(token_weights)) if token_weights else None,
        margin=_float32(of_pairs.get("margin", []), n_pairs),
        of_reference=_float32(of_pairs[OF_REFERENCE], n_pairs) if of_pairs.get(OF_REFERENCE) else None,
        win_prob_chosen=_float32(win_chosen, n_pairs),
        win_prob_rejected=_float32(win_rejected, n_pairs),
        label=torch.tensor(of_responses["label"]).bool() if of_responses.get("label") else None,
        score=_float32(of_responses.get("score", []), n_responses),
        scored_rows=torch.tensor(scored_rows) if scored_rows else None,
        greedy=torch.tensor(greedy, dtype=torch.int32) if pairs and len(greedy) == n_pairs else None,
        degrees=torch.tensor(degrees) if degrees else None,
        degree_weight=torch.tensor(degree_weight) if degrees else None,
        ref_logp=torch.from_numpy(np.concatenate(ref).astype(np.float32)) if ref else None,
        ref_response_logps=_float32(of_responses.get("ref_logps", []), n_responses),
        losses={name: tuple(places) for name, places in losses.items()} or None,
        row_loss=_int64(of_rows) if of_rows else None,
        examples=tuple(indices),
        row_pairs=tuple(len(examples[i].pairs) for i in indices),
        row_responses=tuple(len(examples[i].responses) for i in indices),
        num_tokens=num_tokens,
        unique=sorted(r for pair in pairs for r in pair) == list(range(n_responses)),
        padding=padding,
        prompts=prompts.packed(pairs) if with_prompts else None,
        uses=trunk.uses() if all(examples[i].whole for i in indices) else None,
        advantage=_float32(of_responses[ADVANTAGE], n_responses) if of_responses.get(ADVANTAGE) else None,
        tokens={name: torch.from_numpy(np.concatenate(of_each)) for name, of_each in of_tokens.items()},
    )


def _gathered(of_rows: Iterable[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Columns of rows, one after another."""
    columns: dict[str, list[Any]] = {}
    for of_row in of_rows:
        for name, values in of_row.items():
            columns.setdefault(name, []).extend(values)
    return columns


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


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))


def _float32(values: Sequence[float | None], count: int) -> Tensor | None:
    """A column [count], or None where not every row has it. 0.5 stands for what a row's loss does not read, and nobody
    computes with it."""
    if len(values) != count or (values and all(value is None for value in values)):
        return None
    return torch.tensor([0.5 if value is None else value for value in values], dtype=torch.float32)


def _offsets(lengths: list[int]) -> tuple[int, ...]:
    return (0, *np.cumsum(lengths).tolist())

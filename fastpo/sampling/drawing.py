"""How a policy's next tokens are drawn inside transformers' generate: each row by its own request.

generate() decodes greedily, and finds in the place of the logits one token a row: the one that was drawn here. So every
row of a batch has its own temperature, top_p, top_k, limit and seed, no logits are kept, and the global random state is
not touched. A row's random numbers are those of its seed, whatever rows are beside it.

R = rows of requests, B = blocks of a vocabulary, V = vocabulary.
"""

import math
from array import array
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from fastpo.errors import ConfigError, TrainingError
from fastpo.sampling.items import Request

BLOCK = 256  # tokens whose probabilities are summed in one number; the running sums are of blocks, then within one
_LIKELIEST = 512  # tokens that are sorted first where top_p cuts; all, where these have less than it


class Mix(Protocol):
    """What makes other logits of the policy's."""

    def begin(self, rows: Sequence[tuple[int, ...]], mask: Tensor) -> None:
        """rows: the prompts; mask [R, tokens]: 0 where they are padded, on the left."""

    def __call__(self, input_ids: Tensor, own: Tensor) -> Tensor:
        """Of the tokens so far [R, tokens] and the policy's logits [R, V] the logits [R, V] to draw from."""


class Draw(LogitsProcessor):
    """Draws the next token of every row that goes on, and notes it.

    `tokens`, `logps`, `finished`, `ended`: of each request what was drawn, the log-probability of each of these under
    the policy (untempered, uncut, after its own prompt), whether it ended by itself, whether it ended.
    """

    def __init__(
        self, requests: Sequence[Request], rooms: Sequence[int], ends: Sequence[Collection[int]], pad: int,
        decode: Callable[[list[int]], str], device: torch.device,
        mix: Mix | None = None,
    ):  # fmt: skip
        """rooms: tokens that each may have at most. ends: the tokens that end each. pad: what ended rows go on with.
        mix: what is drawn from, where it is not the policy's logits."""
        self.requests, self.rooms, self.ends, self.pad, self.decode = requests, rooms, ends, pad, decode
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.logps = [array("d") for _ in requests]
        self.finished = [False] * len(requests)
        self.ended = [False] * len(requests)
        # Rows behind those of the requests: the other prompts, of requests with a contrast.
        self.contrasted = [i for i, request in enumerate(requests) if request.contrast_ids is not None]
        self.mix = mix
        self._step = 0
        self._uniform = torch.zeros(len(requests), max(rooms), dtype=torch.float64)
        for row, request, room in zip(self._uniform, requests, rooms, strict=True):
            row[:room] = _uniform(request.seed, room)
        self._uniform = self._uniform.to(device)
        self._cuts = _Cuts.of(requests, device)
        self._penalty = _Penalty(requests, device) if any(r.repetition_penalty != 1 for r in requests) else None
        self._weights: Tensor | None = None  # of one step, whose memory the next one has again
        self._chosen: Tensor | None = None  # [rows, V], what generate() is given
        self._at: Tensor | None = None  # [rows, 1], where it is not minus infinity

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The prompts of all rows of the batch."""
        contrasts = [self.requests[i].contrast_ids or () for i in self.contrasted]
        return [*(request.prompt_ids for request in self.requests), *contrasts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [rows, tokens], scores [rows, V] in fp32; returns [rows, V], minus infinity but for the tokens
        drawn. Rows that have ended are computed too and not looked at. One transfer to the host."""
        own = scores[: len(self.requests)]  # [R, V]
        logits = self._mixed(input_ids, scores, own)
        drawn, lse, whole = self._drawn(logits)
        if lse is None or logits is not own:
            lse = own.logsumexp(-1).double()
        logp = own.gather(-1, drawn[:, None])[:, 0] - lse
        following = torch.full((scores.shape[0],), self.pad, device=scores.device)
        following[: len(drawn)] = drawn
        for row, i in enumerate(self.contrasted, len(self.requests)):
            following[row] = drawn[i]
        found = torch.stack([drawn.double(), logp, (lse + whole).isfinite().double()]).tolist()  # [3][R]
        live = [i for i, ended in enumerate(self.ended) if not ended]
        if not all(found[2][i] for i in live):
            raise TrainingError("the policy's logits are not finite: it cannot be sampled from")
        for i in live:
            self._note(i, int(found[0][i]), found[1][i])
        self._step += 1
        if self._penalty is not None:
            self._penalty.add(drawn)
        return self._as_scores(scores, following)

    def _as_scores(self, scores: Tensor, following: Tensor) -> Tensor:
        """One tensor for all steps: what it held is taken back."""
        if self._chosen is None:
            self._chosen = torch.full_like(scores, -torch.inf)
        if self._at is not None:
            self._chosen.scatter_(-1, self._at, -torch.inf)
        self._at = following[:, None]
        return self._chosen.scatter_(-1, self._at, 0.0)

    def _mixed(self, input_ids: Tensor, scores: Tensor, own: Tensor) -> Tensor:
        """What is drawn from, before the temperature: with the reference, the other prompt and the penalty in it."""
        logits = own
        if self.mix is not None:
            logits = self.mix(input_ids, own)
        if self.contrasted:
            logits = logits.clone() if logits is own else logits
            for row, i in enumerate(self.contrasted, len(self.requests)):
                c = self.requests[i].contrast
                logits[i] = scores[row] if c == 1 else torch.lerp(own[i], scores[row], c)
        return logits if self._penalty is None else self._penalty(logits)

    def _drawn(self, logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of logits [R, V]: a token of each row [R]; their log of the sum of exponentials [R], where no row's
        temperature is another than 1; and the sum of what was drawn from [R], which is finite where they are."""
        cuts, width = self._cuts, logits.shape[-1]
        blocks = -(-width // BLOCK)
        if self._weights is None or self._weights.shape != (len(logits), blocks * BLOCK):
            self._weights = logits.new_zeros(len(logits), blocks * BLOCK)
        weights = self._weights[:, :width]
        peak = logits.amax(-1, keepdim=True)  # [R, 1]
        torch.sub(logits, peak, out=weights)
        if cuts.temperature is not None:
            weights.div_(cuts.temperature)
        weights.exp_()  # [R, V] from 0 to 1
        parts = self._weights.view(len(logits), blocks, BLOCK)
        sums = parts.sum(-1).double()  # [R, B]
        whole = sums.sum(-1)
        lse = None if cuts.temperature is not None else whole.log() + peak[:, 0]
        u = self._uniform[:, min(self._step, self._uniform.shape[1] - 1)]
        if cuts.sorted is None:
            if cuts.min_p is not None:
                weights.masked_fill_(weights < cuts.min_p, 0.0)
                sums = parts.sum(-1).double()
            drawn = _of_blocks(parts, sums, u).clamp_(max=width - 1)  # beyond the last where they are not finite
        else:
            drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
            if len(cuts.unsorted):
                some = parts[cuts.unsorted]
                if cuts.min_p is not None:
                    some.masked_fill_(some < cuts.min_p[cuts.unsorted, :, None], 0.0)
                found = _of_blocks(some, some.sum(-1).double(), u[cuts.unsorted])
                drawn[cuts.unsorted] = found.clamp_(max=width - 1)
            drawn[cuts.sorted] = cuts.draw(weights[cuts.sorted], whole[cuts.sorted], u[cuts.sorted])
        if cuts.greedy is not None:
            drawn = torch.where(cuts.greedy, logits.argmax(-1), drawn)
        return drawn, lse, whole

    def _note(self, i: int, token: int, logp: float) -> None:
        own = self.tokens[i]
        own.append(token)
        self.logps[i].append(logp)
        self.finished[i] = token in self.ends[i] or self._stopped(i)
        self.ended[i] = self.finished[i] or len(own) >= self.rooms[i]

    def _stopped(self, i: int) -> bool:
        """Whether the last token completed a stop string. A token is a byte at least, but for the few at the start that
        a tokenizer may strip."""
        stop = self.requests[i].stop
        if not stop:
            return False
        tail = self.decode(self.tokens[i][-(max(len(text.encode()) for text in stop) + 4) :])
        return any(text in tail for text in stop)


class _Cuts(NamedTuple):
    """What the rows of a batch are drawn from, as tensors; None where no row has it."""

    temperature: Tensor | None  # [R, 1]; 1 of a greedy row
    greedy: Tensor | None  # [R] bool
    min_p: Tensor | None  # [R, 1]
    sorted: Tensor | None  # [S] the rows with top_k or top_p, whose tokens are looked at from the likeliest down
    unsorted: Tensor  # the others
    top_k: Tensor  # [S, 1]; more than any vocabulary: all
    top_p: Tensor  # [S, 1]
    floor: Tensor  # [S, 1] min_p
    most: int  # the largest top_k, 0: some row has none

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> "_Cuts":
        for r in requests:
            if not (0 <= r.min_p <= 1 and 0 < r.repetition_penalty < math.inf):
                raise ConfigError(
                    f"min_p={r.min_p:g}, repetition_penalty={r.repetition_penalty:g}: expected a min_p from 0 to 1 and "
                    "a penalty above 0"
                )

        def column(values: Sequence[float], neutral: float | None = None) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, device=device)[:, None]

        cut = [i for i, r in enumerate(requests) if r.temperature > 0 and (r.top_k > 0 or r.top_p < 1)]
        rest = [i for i in range(len(requests)) if i not in set(cut)]
        greedy = torch.tensor([not r.temperature > 0 for r in requests], device=device)
        these = [requests[i] for i in cut]
        return cls(
            column([r.temperature if r.temperature > 0 else 1.0 for r in requests], 1.0),
            greedy if any(not r.temperature > 0 for r in requests) else None,
            column([r.min_p for r in requests], 0.0), torch.tensor(cut, device=device) if cut else None,
            torch.tensor(rest, dtype=torch.long, device=device),
            torch.tensor([[r.top_k or 1 << 60] for r in these], device=device),
            torch.tensor([[r.top_p] for r in these], dtype=torch.float64, device=device),
            torch.tensor([[r.min_p] for r in these], device=device),
            0 if any(not r.top_k for r in these) else max((r.top_k for r in these), default=0),
        )  # fmt: skip

    def draw(self, weights: Tensor, whole: Tensor, u: Tensor) -> Tensor:
        """Of the top_k likeliest, and of these the fewest that have top_p of what is left together: one of each row of
        weights [S, V], whose sums are `whole` [S]: [S]. Not more is sorted than is looked at."""
        width = weights.shape[-1]
        first = min(self.most or _LIKELIEST, width)
        if first == width or (not self.most and weights.device.type != "cpu"):  # which rows need more is a transfer
            return self._sorted(weights.sort(stable=True, dim=-1, descending=True), whole, u)
        values, order = weights.topk(first, dim=-1)
        drawn = self._sorted((values, order), whole, u)
        if self.most:
            return drawn
        limited = self.top_k[:, 0] < 1 << 60  # by more than `first`, where so few do not say what top_p is a part of
        short = (self.top_k[:, 0] > first) & (limited | (values.sum(-1).double() < self.top_p[:, 0] * whole))
        if bool(short.any()):
            rows = short.nonzero()[:, 0]
            part = self._replace(top_k=self.top_k[rows], top_p=self.top_p[rows], floor=self.floor[rows])
            drawn[rows] = part._sorted(weights[rows].sort(stable=True, dim=-1, descending=True), whole[rows], u[rows])
        return drawn

    def _sorted(self, found: Sequence[Tensor], whole: Tensor, u: Tensor) -> Tensor:
        """found: weights [S, K] of the likeliest in their order, and which tokens they are."""
        values, order = found
        rank = torch.arange(values.shape[-1], device=values.device)
        limited = self.top_k < 1 << 60
        probs = values.double().masked_fill(rank >= self.top_k, 0.0)
        sums = probs.cumsum(-1)
        left = torch.where(limited[:, 0], sums[:, -1], whole)[:, None]  # what top_p is a part of
        out = (sums - probs >= self.top_p * left) | (values < self.floor)
        probs = probs.masked_fill(out & (rank > 0), 0.0)
        return order.gather(-1, _inverse(probs, u)[:, None])[:, 0]


class _Penalty:
    """transformers' repetition penalty, of rows by their own number: tokens of the prompt and those drawn."""

    def __init__(self, requests: Sequence[Request], device: torch.device):
        self.values = torch.tensor([[r.repetition_penalty] for r in requests], device=device)
        self.prompts = [torch.tensor(r.prompt_ids, device=device) for r in requests]
        self.seen: Tensor | None = None  # [R, V]

    def __call__(self, logits: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, ids in zip(self.seen, self.prompts, strict=True):
                row[ids[ids < len(row)]] = True  # an embedding may have more rows than the head
        changed = torch.where(logits < 0, logits * self.values, logits / self.values)
        return torch.where(self.seen, changed, logits)

    def add(self, drawn: Tensor) -> None:
        assert self.seen is not None
        self.seen.scatter_(-1, drawn[:, None], True)


def _uniform(seed: int, count: int) -> Tensor:
    """Numbers in [0, 1), one a token: [count] in fp64, on the CPU, so that no device has other ones."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _of_blocks(parts: Tensor, sums: Tensor, u: Tensor) -> Tensor:
    """The token at the u-th part of weights [R, B, BLOCK], of which `sums` [R, B] are the sums in fp64: first the
    block, then the token in it: [R]. Running sums over a vocabulary would take its size in fp64."""
    block = _inverse(sums, u)[:, None]  # [R, 1]
    upto = sums.cumsum(-1)
    at = (u[:, None] * upto[:, -1:] - (upto.gather(-1, block) - sums.gather(-1, block))).clamp_(min=0.0)
    own = parts.gather(1, block[:, :, None].expand(-1, -1, parts.shape[-1]))[:, 0].double().cumsum(-1)  # [R, BLOCK]
    at = torch.minimum(at, torch.nextafter(own[:, -1:], torch.zeros_like(at)))
    within = torch.searchsorted(own, at, right=True).clamp_(max=parts.shape[-1] - 1)
    return (block * parts.shape[-1] + within)[:, 0]


def _inverse(probs: Tensor, u: Tensor) -> Tensor:
    """The token at the u-th part of the probabilities [rows, V], which need not sum to one: [rows] int64. A token of
    probability 0 is never drawn: the first whose sum is above u is one that adds to it."""
    sums = probs.double().cumsum(-1)
    whole = sums[:, -1:]
    at = torch.minimum(u[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


class Ended(StoppingCriteria):
    """Ends the rows of a batch that `draw` has ended."""

    def __init__(self, draw: Draw):
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        ended = [*self.draw.ended, *(self.draw.ended[i] for i in self.draw.contrasted)]
        return torch.tensor(ended, device=input_ids.device)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings: as servers give it, while the ids keep all that was sampled."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]

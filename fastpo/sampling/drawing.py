"""How a policy's next tokens are drawn inside transformers' generate: each row by its own request.

generate() decodes greedily, and finds in the place of the logits one token a row: the one that was drawn here. So every
row of a batch has its own temperature, top_p, top_k, limit and seed, no logits are kept, and the global random state is
not touched. A row's random numbers are those of its seed, whatever rows are beside it.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from fastpo.errors import TrainingError
from fastpo.sampling.items import Request


class Draw(LogitsProcessor):
    """Draws the next token of every row that goes on, and notes it.

    `tokens`, `logps`, `finished`, `ended`: of each request what was drawn, the sum of its log-probabilities under the
    policy (untempered, uncut, after its own prompt), whether it ended by itself, whether it ended.
    """

    def __init__(
        self, requests: Sequence[Request], rooms: Sequence[int], ends: Sequence[Collection[int]], pad: int,
        decode: Callable[[list[int]], str], device: torch.device,
    ):  # fmt: skip
        """rooms: tokens that each may have at most. ends: the tokens that end each. pad: what ended rows go on with."""
        self.requests, self.rooms, self.ends, self.pad, self.decode = requests, rooms, ends, pad, decode
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.logps = [0.0] * len(requests)
        self.finished = [False] * len(requests)
        self.ended = [False] * len(requests)
        # Rows behind those of the requests: the other prompts, of requests with a contrast.
        self.contrasted = [i for i, request in enumerate(requests) if request.contrast_ids is not None]
        self._uniform = [_uniform(request.seed, room) for request, room in zip(requests, rooms, strict=True)]
        self._device = device

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The prompts of all rows of the batch."""
        contrasts = [self.requests[i].contrast_ids or () for i in self.contrasted]
        return [*(request.prompt_ids for request in self.requests), *contrasts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [R, tokens], scores [R, V] in fp32; returns [R, V], minus infinity but for the token drawn."""
        live = [i for i, ended in enumerate(self.ended) if not ended]
        own = scores[live]  # [live, V]
        lse = own.logsumexp(-1)
        if not bool(torch.isfinite(lse).all()):
            raise TrainingError("the policy's logits are not finite: it cannot be sampled from")
        mixed = self._mixed(scores, own, live)
        drawn = self._drawn(mixed, live)
        logp = own.gather(-1, drawn[:, None])[:, 0] - lse
        following = torch.full((scores.shape[0],), self.pad, device=scores.device)
        following[torch.tensor(live, device=scores.device)] = drawn
        for i, token, value in zip(live, drawn.tolist(), logp.tolist(), strict=True):
            self._note(i, token, value)
        for row, i in enumerate(self.contrasted, len(self.requests)):
            following[row] = following[i]
        return torch.full_like(scores, -torch.inf).scatter_(-1, following[:, None], 0.0)

    def _mixed(self, scores: Tensor, own: Tensor, live: list[int]) -> Tensor:
        """(1 - c) own + c of the other prompt, for the rows that have one."""
        there = [(at, i) for at, i in enumerate(live) if i in self.contrasted]
        if not there:
            return own
        mixed = own.clone()
        for at, i in there:
            c = self.requests[i].contrast
            other = scores[len(self.requests) + self.contrasted.index(i)]
            mixed[at] = other if c == 1 else torch.lerp(own[at], other, c)
        return mixed

    def _drawn(self, logits: Tensor, live: list[int]) -> Tensor:
        """One token of each row of [live, V]: [live] int64."""
        out = logits.argmax(-1)
        for cut in (False, True):
            rows = [
                at for at, i in enumerate(live)
                if self.requests[i].temperature > 0
                and cut is (self.requests[i].top_k > 0 or self.requests[i].top_p < 1)
            ]  # fmt: skip
            if not rows:
                continue
            asked = [self.requests[live[at]] for at in rows]
            u = torch.stack([self._uniform[live[at]][len(self.tokens[live[at]])] for at in rows]).to(self._device)
            part = logits[rows] / self._column([r.temperature for r in asked])
            out[rows] = self._cut_draw(part, asked, u) if cut else _inverse(part.softmax(-1), u)
        return out

    def _cut_draw(self, logits: Tensor, asked: Sequence[Request], u: Tensor) -> Tensor:
        """Of the top_k likeliest, and of these the fewest that have top_p of what is left together."""
        values, order = logits.sort(stable=True, dim=-1, descending=True)  # [rows, V]
        rank = torch.arange(values.shape[-1], device=values.device)
        most = self._column([r.top_k or values.shape[-1] for r in asked])
        probs = values.masked_fill(rank >= most, -torch.inf).softmax(-1)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill((before >= self._column([r.top_p for r in asked])) & (rank > 0), 0.0)
        return order.gather(-1, _inverse(probs, u)[:, None])[:, 0]

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device)[:, None]

    def _note(self, i: int, token: int, logp: float) -> None:
        own = self.tokens[i]
        own.append(token)
        self.logps[i] += logp
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


def _uniform(seed: int, count: int) -> Tensor:
    """Numbers in [0, 1), one a token: [count] in fp64, on the CPU, so that no device has other ones."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inverse(probs: Tensor, u: Tensor) -> Tensor:
    """The token at the u-th part of the probabilities [rows, V], which need not sum to one: [rows] int64. A token of
    probability 0 is never drawn: the first whose sum is above u is one that adds to it."""
    sums = probs.double().cumsum(-1)
    whole = sums[:, -1:]
    at = torch.minimum(u[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(sums, at, right=True)[:, 0]


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

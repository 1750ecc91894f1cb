"""How one tree of steps grows: what it asks for, and what is made of the answers. search.py asks for all trees."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastpo.errors import ConfigError, TrainingError, did_you_mean, shown
from fastpo.loop.config import section as read_section
from fastpo.loop.tree import Node, Standing, backup, best_child, chain, confidence, prior, select, standings
from fastpo.sampling.items import Failure, Item, Prompt, Request, Response, Verdict, seed_of

Decode = Callable[[Sequence[int]], str]
Drawn = dict[
    int, tuple[tuple[int, ...], bool, float | None]
]  # by k: token ids, whether the answer ends, log-probability

_BLANK = 4  # times that a step of white space is gone on with


@dataclass(frozen=True)
class Step:
    """What ends a step, beside the end of the answer."""

    stop: Sequence[str] = ()  # texts; none of them and no `tokens`: a line break
    tokens: int | None = None  # at most; None: 128

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop) or (("\n",) if self.tokens is None else ())

    @property
    def most(self) -> int:
        return 128 if self.tokens is None else self.tokens


@dataclass(frozen=True)
class Search:
    """The options of `search`."""

    iterations: int = 64  # paths from each node that the answer goes through
    first: int = 4  # times as many from the prompt
    depth: int | None = None  # steps of a path; None: 3 with self_eval, which values every step, else to the end
    max_steps: int = 32  # of an answer
    children: int = 2  # samples of a node, equal ones are one child
    first_children: int | None = None  # of the prompt; None: twice as many
    exploration: float = 1.0
    gamma: float = 1.0
    length_exponent: float = 1.25  # of a step's tokens in its prior
    step: Step = field(default_factory=Step)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    scorer: str = ""  # names for those who make the scorers
    self_eval: str = ""
    threshold: float = 0.5
    sigmoid: bool = False  # self_eval gives any real number; its logistic function is taken
    max_pairs: int = 8  # of a tree, those nearest to the prompt
    rejected: str = "worst"  # of the siblings; second: the second best
    margin: float = 0.0  # pairs whose Q differ by more than this
    win_prob: str = "visits"  # N_w / (N_w + N_l), at least 1/2; values: sigmoid(Q_w - Q_l)
    weights: str = "tree"  # every tree counts the same; pairs: every pair
    trees: int = 256  # that grow together


def options_of(spec: Mapping[str, Any]) -> Search:
    """Checked; ConfigError names the first option that is wrong."""
    options: Search = read_section(Search, spec, "search")
    for name in ("iterations", "first", "max_steps", "max_pairs", "trees"):
        _need(getattr(options, name) >= 1, name, "1 or more", getattr(options, name))
    _need(options.children >= 2, "children", "2 or more: a pair has two", options.children)
    _need(options.depth is None or options.depth >= 1, "depth", "1 or more", options.depth)
    _need(options.first_children is None or options.first_children >= 2, "first_children", "2 or more",
          options.first_children)  # fmt: skip
    _need(options.temperature > 0, "temperature", "above 0: equal children are one", options.temperature)
    _need(0 < options.top_p <= 1, "top_p", "in (0, 1]", options.top_p)
    _need(0 < options.gamma <= 1, "gamma", "in (0, 1]", options.gamma)
    _need(options.exploration >= 0, "exploration", "0 or more", options.exploration)
    _need(options.margin >= 0, "margin", "0 or more", options.margin)
    _need(options.step.most >= 1, "step.tokens", "1 or more", options.step.tokens)
    _need(all(options.step.stops), "step.stop", "texts that are not empty", options.step.stop)
    for name, known in (("rejected", ("worst", "second")), ("win_prob", ("visits", "values")),
                        ("weights", ("tree", "pairs"))):  # fmt: skip
        value = getattr(options, name)
        _need(value in known, name, " or ".join(known), value, did_you_mean(value, known))
    return options


def _need(right: bool, name: str, what: str, value: Any, hint: str = "") -> None:
    if not right:
        raise ConfigError(f"search.{name} must be {what}, not {shown(value)}{hint}")


# ---- one tree


@dataclass(frozen=True)
class Ask:
    """A tree waits for these responses."""

    requests: list[Request]


@dataclass(frozen=True)
class Judge:
    """A tree waits for these verdicts: of the item's responses, by the scorer of this role."""

    role: str  # "answer" or "self"
    item: Item
    nodes: list[str]  # names, one a response


Growth = Generator[Ask | Judge, Any, None]


class Tree:
    """The tree of one prompt. `grow` says what it needs and is sent it; `walk` are the nodes that the answer took, each
    with its children as they stood when it was left."""

    def __init__(
        self, item: Item, prompt_ids: Sequence[int], options: Search, seed: Any, decode: Decode, roles: Collection[str]
    ):
        """roles: "answer", "self": whom there is to judge."""
        self.item, self.prompt_ids, self.options, self.seed = item, tuple(prompt_ids), options, seed
        self.decode, self.roles = decode, roles
        self.depth = options.depth or (3 if "self" in roles else options.max_steps)
        self.root = Node("0")
        self.walk: list[tuple[Node, list[Standing]]] = []
        self.counts: Counter[str] = Counter()

    def grow(self) -> Growth:
        """The whole search: from each node that the answer takes, `iterations` paths; then its best child."""
        options = self.options
        node: Node | None = self.root
        while node is not None and not self._last(node):
            for _ in range(options.iterations * (options.first if node is self.root else 1)):
                yield from self._visit(node)
                if not node.alive:
                    break
            self.walk.append((node, standings(node)))
            node = best_child(node)

    def _last(self, node: Node) -> bool:
        return node.finished or node.depth >= self.options.max_steps

    def _visit(self, start: Node) -> Growth:
        """A path from a node to the end of an answer, or as many steps below it as `depth` says."""
        path = [start]
        start.visits += 1
        while start.alive and not self._last(path[-1]) and len(path) <= self.depth:
            if path[-1].children is None:
                yield from self._expand(path[-1])
                if not path[-1].living:
                    path[-1].lose()
                    break
            path.append(select(path[-1], self.options.exploration))
            path[-1].visits += 1
        backup(path, self.options.gamma)

    def _expand(self, node: Node) -> Growth:
        """Its children: sampled, equal ones made one, valued."""
        options = self.options
        count = options.children
        if node is self.root:
            count = 2 * count if options.first_children is None else options.first_children
        drawn = yield from self._draw(node, count)
        node.children = []
        same: dict[tuple[int, ...], Node] = {}
        for k, (ids, finished, logp) in drawn.items():
            if ids in same:
                same[ids].count += 1
                self.counts["equal steps"] += 1
                continue
            p = prior(logp, len(ids), options.length_exponent, count)
            same[ids] = Node(f"{node.name}.{k}", ids, finished, p, node, v=node.v)
            node.children.append(same[ids])
        self.counts["steps"] += len(node.children)
        if node.children:
            yield from self._value(node.children)

    def _draw(self, node: Node, count: int) -> Generator[Ask, Any, Drawn]:
        """As many steps. One that is white space so far goes on."""
        options, before = self.options, node.prefix()
        drawn: Drawn = {k: ((), False, 0.0) for k in range(count)}
        open_ = list(drawn)
        for part in range(_BLANK if options.step.stops else 1):
            source = node.name if part == 0 else f"{node.name}+{part}"
            prompts = {ids: self._continued(before + ids) for ids in {drawn[k][0] for k in open_}}
            requests = [self._request(prompts[drawn[k][0]], before + drawn[k][0], source, k) for k in open_]
            answers = yield Ask(requests)
            again = []
            for k, answer in zip(open_, answers, strict=True):
                if isinstance(answer, Failure):
                    del drawn[k]
                    continue
                ids, _, logp = drawn[k]
                new = tuple(_ids(answer, self.item))
                ids += new
                logp = None if logp is None or answer.logp is None else logp + answer.logp
                ended = answer.finished and not self._stopped(new)
                if not new and not ended:
                    del drawn[k]  # there is no room for another token
                    self.counts["no room"] += 1
                    continue
                drawn[k] = (ids, ended, logp)
                if not ended and options.step.stops and not self.decode(ids).strip():
                    again.append(k)
            open_ = again
            if not open_:
                break
        return {k: one for k, one in drawn.items() if one[0]}

    def _request(self, prompt: Prompt, steps: tuple[int, ...], source: str, k: int) -> Request:
        options, item = self.options, self.item
        return Request(
            item.id, k, source, prompt, self.prompt_ids + steps, seed_of(self.seed, item.id, source, k),
            options.temperature, options.top_p, options.top_k, options.step.most, options.step.stops,
        )  # fmt: skip

    def _continued(self, steps: Sequence[int]) -> Prompt:
        """The prompt with the beginning of an answer."""
        text = self.decode(steps) if steps else ""
        prompt = self.item.prompt
        if not text:
            return prompt
        return prompt + text if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": text}]

    def _stopped(self, ids: Sequence[int]) -> bool:
        """Whether a stop text ended the step, and not the end of the answer: the ids have all that was sampled."""
        stops = self.options.step.stops
        return bool(stops) and any(stop in self.decode(ids) for stop in stops)

    def _value(self, children: Sequence[Node]) -> Growth:
        """v of new nodes: what the model or a judge says of the answer so far, and 1 or -1 where it is finished."""
        options = self.options
        if "self" in self.roles:
            verdicts = yield self._asked("self", children)
            for node, verdict in zip(children, verdicts, strict=True):
                p = self._probability(verdict)
                if p is not None:
                    node.v, node.known = p / max(1, node.depth - 1 - 3), True
        ends = [node for node in children if node.finished]
        self.counts["finished answers"] += len(ends)
        if ends and "answer" in self.roles:
            verdicts = yield self._asked("answer", ends)
            for node, verdict in zip(ends, verdicts, strict=True):
                if verdict.value is None:
                    node.alive = False
                    continue
                right = _number(verdict) >= options.threshold
                self.counts["right answers"] += right
                node.v, node.known = node.v + (1.0 if right else -1.0), True
        for node in children:
            node.evaluate(node.v)

    def _asked(self, role: str, nodes: Sequence[Node]) -> Judge:
        given = []
        for node in nodes:
            ids = node.prefix()
            given.append(Response(self.decode(ids), ids, node.finished))
        item = replace(self.item, prompt_ids=self.prompt_ids, responses=tuple(given))
        return Judge(role, item, [node.name for node in nodes])

    def _probability(self, verdict: Verdict) -> float | None:
        if verdict.value is None:
            return None
        value = _number(verdict)
        if self.options.sigmoid:
            return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
        if not 0 <= value <= 1:
            raise TrainingError(
                f"search.self_eval gave {value:g}, which is no probability: set search.sigmoid=true for a scorer of "
                "real numbers"
            )
        return value

    # ---- what is made of it

    def siblings(self) -> Iterator[tuple[Item, list[Standing]]]:
        """The nodes on the way that had several children, as items; a step is joined with those that had to follow."""
        for node, children in self.walk:
            if len(children) < 2:
                continue
            steps = node.prefix()
            responses = []
            for one in children:
                ids, finished = chain(one.node)
                meta = {"node": one.node.name, "visits": one.visits, "q": one.q, "value": one.v, "reward": one.reward,
                        "prior": one.prior, "judged": one.known}  # fmt: skip
                responses.append(
                    Response(self.decode(ids), ids, finished, source="step", count=one.node.count, meta=meta)
                )
            name, prompt = f"{self.item.id}/{node.name}", self._continued(steps)
            yield Item(name, prompt, self.prompt_ids + steps, tuple(responses), self.item.meta), children

    def pairs(self, found: Sequence[tuple[Item, list[Standing]]]) -> list[dict[str, Any]]:
        """Rows without weights."""
        options = self.options
        rows: list[dict[str, Any]] = []
        for item, children in found:
            order = sorted((k for k, one in enumerate(children) if one.known), key=lambda k: children[k].rank)
            self.counts["steps not judged"] += len(children) - len(order)
            if len(order) < 2:
                self.counts["no two steps judged"] += 1
                continue
            better, worse = order[-1], order[0 if options.rejected == "worst" else -2]
            won, lost = children[better], children[worse]
            if won.q - lost.q <= options.margin:
                self.counts["ties" if won.q == lost.q else "below the margin"] += 1
            elif won.visits == lost.visits == 0:
                self.counts["not visited"] += 1
            elif len(rows) == options.max_pairs:
                self.counts["more than max_pairs"] += 1
            else:
                by_visits = options.win_prob == "visits"
                p = confidence(won.visits, lost.visits) if by_visits else 1 / (1 + math.exp(lost.q - won.q))
                chosen, rejected = (list(item.responses[k].token_ids or ()) for k in (better, worse))
                rows.append({"id": item.id, "prompt": list(item.prompt_ids or ()), "chosen": chosen,
                             "rejected": rejected, "win_prob": p})  # fmt: skip
        return rows


def _ids(answer: Response, item: Item) -> Sequence[int]:
    if answer.token_ids is None:
        raise ConfigError(
            f"search: the sampler gives texts of {item.id} and no token ids, so no step can be gone on with as it was "
            "sampled: take sample.engine=local, or a server that gives ids"
        )
    return answer.token_ids


def _number(verdict: Verdict) -> float:
    if not isinstance(verdict.value, int | float):
        raise ConfigError("search: a step needs one number, and the scorer gives a list")
    return float(verdict.value)

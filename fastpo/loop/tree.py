"""A tree over the steps of an answer: its nodes, which one is looked at next, and what a visit changes.

MCTS-DPO, arXiv:2405.00451, and its code. With v the value of the answer so far:

    r = v - v(parent)                       Q = r + gamma V
    V = sum max(1, N_c) Q_c / sum max(1, N_c) over the children c; 0 of a node without any
    (over those that some verdict stands behind: the paper values every step, here a judge may see whole answers only)
    next: the child of largest Q + exploration p sqrt(N(parent)) / (1 + N),  p = exp(log pi(step) / tokens^exponent)

A visit counts when a path enters the node; V and Q are renewed from the end of the path upwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Node:
    """A step and what is known of it. The root has none."""

    name: str  # "0" is the root, "0.2" its third child
    ids: tuple[int, ...] = ()  # of the step
    finished: bool = False  # whether the answer ends here
    prior: float = 1.0  # p
    parent: "Node | None" = None
    count: int = 1  # how often the policy gave it
    v: float = 0.0
    visits: int = 0  # N
    value: float = 0.0  # V
    q: float = 0.0
    known: bool = False  # whether some verdict stands behind Q: on this step, or on one that followed it
    alive: bool = True  # not so where every way on failed, or the judgement of the answer
    children: "list[Node] | None" = None  # None: not asked for yet
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1
        self.q = self.reward

    @property
    def reward(self) -> float:
        return self.v if self.parent is None else self.v - self.parent.v

    @property
    def living(self) -> "list[Node]":
        return [child for child in self.children or () if child.alive]

    def evaluate(self, v: float) -> None:
        """Its value, before it is visited."""
        self.v = v
        self.q = self.reward

    def lose(self) -> None:
        """It leads nowhere; nor do those above it that have no other way on."""
        self.alive = False
        if self.parent is not None and not self.parent.living:
            self.parent.lose()

    def path(self) -> "list[Node]":
        """From the root to it."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def prefix(self) -> tuple[int, ...]:
        """The token ids of all steps to its end."""
        return tuple(token for node in self.path() for token in node.ids)


def prior(logp: float | None, tokens: int, exponent: float, siblings: int) -> float:
    """p of a step; the same for all siblings where the sampler gives no log-probabilities."""
    return 1 / siblings if logp is None else math.exp(logp / tokens**exponent)


def puct(node: Node, exploration: float) -> float:
    """What the next node is chosen by."""
    assert node.parent is not None
    return node.q + exploration * node.prior * math.sqrt(node.parent.visits) / (1 + node.visits)


def select(node: Node, exploration: float) -> Node:
    """The living child that is looked at next; the first of equal ones."""
    return max(node.living, key=lambda child: puct(child, exploration))


def backup(path: Sequence[Node], gamma: float) -> None:
    """Renews V and Q of a path's nodes, from its end to the root."""
    for node in reversed(path):
        children = [child for child in node.living if child.known]
        if children:
            weights = [max(1, child.visits) for child in children]
            node.value = sum(w * child.q for w, child in zip(weights, children)) / sum(weights)
            node.known = True
        if node.parent is not None:
            node.q = node.reward + gamma * node.value


def best_child(node: Node) -> Node | None:
    """Where the answer goes on when the search of a node is over: the most visited, then by Q and V."""
    return max(node.living, key=lambda child: (child.visits, child.q, child.value), default=None)


@dataclass(frozen=True)
class Standing:
    """What a child was worth when the search left its parent."""

    node: Node
    q: float
    prior: float
    reward: float
    v: float
    visits: int
    known: bool

    @property
    def rank(self) -> tuple[float, float, float, float, int]:
        """What siblings are ordered by, the better ones last."""
        return (self.q, self.prior, self.reward, self.v, self.visits)


def standings(node: Node) -> list[Standing]:
    """Of the living children."""
    return [Standing(c, c.q, c.prior, c.reward, c.v, c.visits, c.known) for c in node.living]


def chain(node: Node) -> tuple[tuple[int, ...], bool]:
    """(token ids, whether the answer ends) of a step with those after it to which there is no other."""
    ids = node.ids
    while len(node.living) == 1:
        node = node.living[0]
        ids += node.ids
    return ids, node.finished


def confidence(won: int, lost: int) -> float:
    """P(the better sibling wins) by visits, N_w / (N_w + N_l), and no less than 1/2."""
    return max(0.5, max(1, won) / (max(1, won) + lost))

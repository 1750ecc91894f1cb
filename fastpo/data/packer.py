"""Bin packing of trees into micro-batches: few, within the token budget, and even by cost over the ranks.

A tree is whole (its loss couples its responses) and has a size, the tokens that it puts through the trunk, and a cost,
what these take to compute. Sizes and costs are integers, so csrc/pack.inc and the Python below give the same answer.

1. Best-fit decreasing: O(n log n), at most 11/9 of the fewest micro-batches and four more (Johnson et al., SIAM J.
   Computing 3, 1974).
2. Where that is above the lower bound of Martello & Toth (Discrete Applied Mathematics 28, 1990), one fewer is searched
   for, until a number of nodes is spent: bin completion (Korf, AAAI 2002), one micro-batch after another, each begun
   with the largest tree left and filled but for its share of the room that may stay empty.
3. As many micro-batches for each rank; the costliest tree to the cheapest micro-batch with room (LPT; Graham 1969),
   where the trees fit so; dealt to the ranks by cost, and evened out by moves and swaps between the ranks.
"""

import bisect
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from fastpo.errors import ConfigError
from fastpo.ops.backends import load_extension

COMPILED = getattr(load_extension(), "pack", None)  # None without a compiler
# Larger steps are not searched, evened out or filled by LPT: what each gains there, a few micro-batches or part of one,
# is lost among the others.
SEARCH_TREES, LEVEL_TREES, EVEN_TREES = 4_096, 1_024, 65_536
# Of a search, and for each tree: of 3,000 hard steps of 16 trees the slowest took 66 ms in Python, 9 ms in C++.
_NODES = 20_000
_NODES_A_TREE = 100
_NODES_A_BIN = 1000
_TRIES = 8  # micro-batches without room that a tree is held against before it is said not to fit


def pack_step(
    rows: Sequence[int],
    tokens: Sequence[int] | Mapping[int, int] | np.ndarray,
    max_tokens: int,
    ranks: int = 1,
    costs: Sequence[int] | Mapping[int, int] | np.ndarray | None = None,
) -> list[list[list[int]]]:
    """Split one step's rows (trees) into micro-batches of at most `max_tokens` tokens, for each of `ranks` processes.

    `tokens[i]` is row i's size, `costs[i]` its cost (None: its size). As few micro-batches as are found, rounded up so
    that every rank gets as many. Where they can be filled evenly, they are: the largest one sets the peak memory, and
    the slowest rank the time. A row over the budget gets a micro-batch of its own. A rank runs dry only where there are
    fewer rows than ranks. Deterministic, and the same with and without the compiled packer.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens}: no row fits; a micro-batch needs room for one token at least")
    if not len(rows):
        return [[] for _ in range(ranks)]
    names = np.asarray(rows, np.int64)
    sizes = _values(tokens, names)
    cost = sizes if costs is None else _values(costs, names)
    order = _descending(sizes)
    bin_of, count = _pack(sizes[order], cost[order], max_tokens, ranks)
    order = order[np.argsort(bin_of, kind="stable")]
    names, sizes, cost = names[order], sizes[order], cost[order]  # from here on numbered by bins: read as they lie
    ends = np.cumsum(np.bincount(bin_of, minlength=count)).tolist()
    bins = [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    of, tokens_of = names.tolist(), sizes.tolist()
    wanted = min(-(-count // ranks) * ranks, len(names))
    while len(bins) < wanted:  # fewer times than there are ranks
        largest = max((b for b in range(len(bins)) if len(bins[b]) > 1), key=lambda b: _sum(tokens_of, bins[b]))
        bins.append(bins[largest][1::2])
        bins[largest] = bins[largest][::2]
    if ranks == 1:
        return [[of[part.start : part.stop : part.step] for part in bins]]
    shares = _deal(bins, cost, ranks)
    if len(names) <= LEVEL_TREES:
        _level(shares, sizes, cost, max_tokens)
    return [[[of[i] for i in part] for part in share] for share in shares]


def pack_all(
    rows: Sequence[int], tokens: Sequence[int] | Mapping[int, int] | np.ndarray, max_tokens: int
) -> list[list[int]]:
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


def lower_bound(sizes: np.ndarray, max_tokens: int) -> int:
    """No packing has fewer micro-batches: Martello & Toth's L2. `sizes`: [n] int64, descending.

    For a threshold a, sizes over max_tokens - a have a bin with nothing else of at least a in it, sizes over half of
    max_tokens one each, and those from a to half fill what room these leave, or more bins.
    """
    over = int(np.searchsorted(-sizes, -max_tokens, "left"))  # of more than the budget: alone
    sizes = sizes[over:]
    if not len(sizes):
        return over
    sums = np.concatenate([[0], np.cumsum(sizes)])

    def above(limit: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(-sizes, -np.asarray(limit), "left")  # how many are larger than `limit`

    half = int(above(max_tokens // 2))
    small = sizes[half:]
    thresholds = np.concatenate([[0], small[np.flatnonzero(np.diff(small, append=0))]])
    alone = np.minimum(above(max_tokens - thresholds), half)
    free = (half - alone) * max_tokens - (sums[half] - sums[alone])
    filling = sums[np.maximum(above(thresholds - 1), half)] - sums[half]
    return over + half + max(0, int((-((free - filling) // max_tokens)).max()))


def _values(of: Sequence[int] | Mapping[int, int] | np.ndarray, names: np.ndarray) -> np.ndarray:
    return np.asarray(of[names] if isinstance(of, np.ndarray) else [of[i] for i in names.tolist()], np.int64)


def _descending(values: np.ndarray) -> np.ndarray:
    """The order that sorts `values`, largest first, equal ones as they come."""
    below = values.max() - values
    return np.argsort(below.astype(np.uint16) if below.max() < 2**16 else below, kind="stable")  # 16 bits: radix sort


def _pack(sizes: np.ndarray, cost: np.ndarray, capacity: int, ranks: int) -> tuple[np.ndarray, int]:
    """The bin of each item, and how many bins there are. sizes, cost: [n] int64, sizes descending."""
    n = len(sizes)
    least = lower_bound(sizes, capacity) if n <= SEARCH_TREES else n
    tries = _TRIES if n <= EVEN_TREES else 0
    by_cost = _descending(cost) if tries else np.zeros(0, np.int64)
    nodes = _NODES + _NODES_A_TREE * n
    if COMPILED is None:
        return _pack_python(sizes.tolist(), cost.tolist(), by_cost.tolist(), capacity, ranks, least, nodes, tries)
    bin_of = np.empty(n, np.int64)
    sizes, cost = np.ascontiguousarray(sizes), np.ascontiguousarray(cost)
    pointers = (x.ctypes.data for x in (sizes, cost, by_cost, bin_of))
    return bin_of, COMPILED(*pointers, n, capacity, ranks, least, nodes, _NODES_A_BIN, tries)


# ---- the twin of csrc/pack.inc


def _pack_python(
    sizes: list[int], cost: list[int], by_cost: list[int], capacity: int, ranks: int, least: int, nodes: int, tries: int
) -> tuple[np.ndarray, int]:
    bin_of, count = _best_fit(sizes, capacity)
    while count > least:
        found = _search(sizes, capacity, count - 1, nodes)
        if found is None:
            break
        bin_of, count = found
    wanted = min(-(-count // ranks) * ranks, len(sizes))
    even = _even(sizes, cost, by_cost, capacity, wanted, tries) if tries else None
    if even is not None:
        bin_of, count = even, wanted
    return np.array(bin_of, np.int64), count


def _best_fit(sizes: list[int], capacity: int) -> tuple[list[int], int]:
    """Each item, largest first, into the fullest bin that has room, the one filled last among equals."""
    smallest = sizes[-1]
    rooms: list[int] = []  # distinct, ascending
    bins_with: dict[int, list[int]] = {}
    bin_of, count = [], 0
    for size in sizes:
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            bins = bins_with[room]
            b = bins.pop()
            if not bins:
                del bins_with[room], rooms[at]
        else:
            room, b = capacity, count
            count += 1
        bin_of.append(b)
        room -= size
        if room >= smallest:
            if room not in bins_with:
                bins_with[room] = []
                bisect.insort(rooms, room)
            bins_with[room].append(b)
    return bin_of, count


def _search(sizes: list[int], capacity: int, limit: int, nodes: int) -> tuple[list[int], int] | None:
    """At most `limit` bins, or None where there are none or none are found within `nodes`."""
    n = len(sizes)
    over = sum(size > capacity for size in sizes)
    waste = (limit - over) * capacity - sum(sizes[over:])  # room that may be left empty
    if waste < 0:
        return None
    bin_of = list(range(over)) + [-1] * (n - over)
    frames: list[list] = []  # of each open bin: anchor, completions, the next of them, waste before
    while True:
        anchor = next((i for i in range(over, n) if bin_of[i] < 0), n)
        if anchor == n:
            return bin_of, over + len(frames)
        rest = [i for i in range(anchor + 1, n) if bin_of[i] < 0]
        share = waste // (limit - over - len(frames))
        room, most = capacity - sizes[anchor], min(nodes, _NODES_A_BIN)
        found, spent = _completions([sizes[i] for i in rest], room, waste, share, most)
        nodes -= spent
        frames.append([anchor, [(slack, [rest[p] for p in chosen]) for slack, chosen in found], 0, waste])
        bin_of[anchor] = over + len(frames) - 1
        while frames:
            anchor, options, next_, before = frames[-1]
            if next_:
                for i in options[next_ - 1][1]:
                    bin_of[i] = -1
            if next_ < len(options) and nodes > 0:
                slack, items = options[next_]
                for i in items:
                    bin_of[i] = over + len(frames) - 1
                frames[-1][2] += 1
                waste = before - slack
                break
            bin_of[anchor] = -1
            frames.pop()
        else:
            return None


def _completions(
    sizes: list[int], room: int, waste: int, share: int, nodes: int
) -> tuple[list[tuple[int, list[int]]], int]:
    """(slack, indices) of sets of items that fill `room` but for at most `waste`; and nodes spent.

    First those within the bin's `share` of the waste, larger items first, which are harder to place later; then the
    fullest. Sets to which an item left out could be added are left out: the fuller bin is never worse.
    """
    n = len(sizes)
    after = [0] * (n + 1)  # sum of the sizes from here on
    for p in range(n - 1, -1, -1):
        after[p] = after[p + 1] + sizes[p]
    found: list[tuple[int, list[int]]] = []
    chosen: list[int] = []
    stack = [(0, room, 0, room + 1, -1)]  # next item, room, how many are chosen, the smallest left out, the one added
    spent, good = 0, False
    while stack and spent < nodes and not (good and spent > 200):
        p, left, depth, skipped, added = stack.pop()
        spent += 1
        del chosen[depth:]
        if added >= 0:
            chosen.append(added)
        p = max(p, bisect.bisect_left(sizes, -left, key=lambda size: -size))  # the first that fits
        slack = left - after[p]
        if p == n or slack >= 0:  # all that is left fits
            slack = max(slack, 0) if p < n else left
            if slack <= waste and slack < skipped:
                found.append((slack, chosen + list(range(p, n))))
                good = good or slack <= share
            continue
        if slack > waste:
            continue
        size = sizes[p]
        other = bisect.bisect_right(sizes, -size, key=lambda size: -size)  # the first that is smaller
        if left - after[other] <= min(waste, size - 1):
            stack.append((other, left, len(chosen), size, -1))
        stack.append((p + 1, left - size, len(chosen), skipped, p))
    found.sort(key=lambda option: max(option[0], share))
    return found, spent


def _even(
    sizes: list[int], cost: list[int], by_cost: list[int], capacity: int, count: int, tries: int
) -> list[int] | None:
    """The costliest item first, each to the cheapest bin with room (a bin takes any first item); None where one has no
    room in the cheapest few."""
    bin_of = [0] * len(sizes)
    load = [0] * count
    heap = [(0, b) for b in range(count)]
    for i in by_cost:
        aside: list[tuple[int, int]] = []
        while heap and len(aside) < tries:
            work, b = heapq.heappop(heap)
            if not load[b] or load[b] + sizes[i] <= capacity:
                break
            aside.append((work, b))
        else:
            return None
        bin_of[i] = b
        load[b] += sizes[i]
        heapq.heappush(heap, (work + cost[i], b))
        for item in aside:
            heapq.heappush(heap, item)
    return bin_of


# ---- over the ranks


def _sum(values: list[int], part: range) -> int:
    return sum(values[part.start : part.stop : part.step])


def _deal(bins: list[range], cost: np.ndarray, ranks: int) -> list[list[list[int]]]:
    """As many bins for each rank, the costliest first: in each round the rank with the least work takes the most."""
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    costs = cost.tolist()
    of_bin = [_sum(costs, part) for part in bins]
    by_cost = sorted(range(len(bins)), key=lambda b: -of_bin[b])
    for start in range(0, len(bins), ranks):
        turn = sorted(range(ranks), key=lambda r: work[r])
        for rank, b in zip(turn, by_cost[start : start + ranks], strict=False):
            shares[rank].append(list(bins[b]))
            work[rank] += of_bin[b]
    return shares


def _level(shares: list[list[list[int]]], sizes: np.ndarray, cost: np.ndarray, capacity: int) -> None:
    """Move or swap items between the rank with the most work and others while that shortens the step; in place."""
    work = [sum(int(cost[i]) for part in share for i in part) for share in shares]
    for _ in range(4 * len(shares) + 16):
        most = work.index(max(work))
        for least in sorted(range(len(shares)), key=lambda r: work[r]):
            gap = work[most] - work[least]
            if gap <= 1 or not shares[least]:
                return
            moved = _exchange(shares[most], shares[least], sizes, cost, capacity, gap)
            if moved:
                work[most] -= moved
                work[least] += moved
                break
        else:
            return


def _exchange(
    a: list[list[int]], b: list[list[int]], sizes: np.ndarray, cost: np.ndarray, capacity: int, gap: int
) -> int:
    """The one item of `a` for one or none of `b` that brings the two ranks closest; the cost that moved, 0 for none."""
    mine = [(part, i) for part in a for i in part]
    theirs = [(part, i) for part in b for i in part] + [(part, -1) for part in b]
    size_a, cost_a = (x[[i for _, i in mine]] for x in (sizes, cost))
    of_b = [i for _, i in theirs]
    size_b, cost_b = (np.where(np.array(of_b) < 0, 0, x[of_b]) for x in (sizes, cost))
    room_a = np.array([capacity - int(sizes[part].sum()) for part in a]).repeat([len(part) for part in a])
    rooms = [capacity - int(sizes[part].sum()) for part in b]
    room_b = np.array([*np.repeat(rooms, [len(part) for part in b]), *rooms])
    last = np.array([len(part) == 1 for part, _ in mine])  # to move it away would leave a micro-batch of nothing
    grows = size_a[:, None] - size_b  # of b's bin
    moves = cost_a[:, None] - cost_b
    allowed = (moves > 0) & (moves < gap) & (grows <= room_b) & (-grows <= room_a[:, None])
    allowed &= ~(last[:, None] & (np.array(of_b) < 0))
    if not allowed.any():
        return 0
    off = np.where(allowed, np.abs(gap - 2 * moves), np.iinfo(np.int64).max)
    x, y = divmod(int(off.argmin()), len(theirs))
    (part_a, i), (part_b, j) = mine[x], theirs[y]
    part_a.remove(i)
    part_b.append(i)
    if j >= 0:
        part_b.remove(j)
        part_a.append(j)
    return int(moves[x, y])

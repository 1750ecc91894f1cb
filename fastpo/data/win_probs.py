"""Win probabilities: what a batch has of a row's, and rows that contradict each other."""

from collections.abc import Sequence
from hashlib import blake2b

from fastpo.data.example import Example
from fastpo.errors import DataError

WIN_PROB_TOLERANCE = 0.01 + 1e-9  # p and 1 - p, each rounded to two decimals, may be as far from adding up to 1


def check_win_probs(examples: Sequence[Example], numbers: Sequence[int]) -> None:
    """DataError where two rows give one pair, in either order, or one response two win probabilities.

    Rows are compared by token ids, after truncation.
    """
    seen: dict[frozenset[bytes], tuple[float, int, bytes]] = {}

    def check(winner: bytes, loser: bytes, p: float, number: int, column: str, what: str) -> None:
        before, first, winner_then = seen.setdefault(frozenset((winner, loser)), (p, number, winner))
        p = p if winner == winner_then else 1 - p
        if abs(p - before) > WIN_PROB_TOLERANCE:
            raise DataError(
                f"rows {first} and {number} contradict each other: {what} with probability {before:.4g} by the one and "
                f"{p:.4g} by the other ({column}): average the judgements, or keep one of the rows"
            )

    for example, number in zip(examples, numbers, strict=True):
        columns = example.pair_columns
        if not any(name in columns for name in ("win_prob", "win_prob_chosen")):
            continue
        ids = [blake2b(example.prompt_of(k).tobytes() + b"|" + response.tobytes(), digest_size=16).digest()
               for k, response in enumerate(example.responses)]  # fmt: skip
        for n, (winner, loser) in enumerate(example.pairs):
            if "win_prob" in columns:
                what = "of the same two responses one beats the other"
                check(ids[winner], ids[loser], columns["win_prob"][n], number, "win_prob", what)
            for k, name in ((winner, "win_prob_chosen"), (loser, "win_prob_rejected")):
                if name in columns:
                    what = "the same response beats the previous policy"
                    check(ids[k], ids[k], columns[name][n], number, name, what)


def take_win_probs(example: Example, chosen: list[float | None], rejected: list[float | None]) -> None:
    """SPPO's two targets; `win_prob`, P(chosen beats rejected), stands in for both in the paper's single form. None
    where the row's loss reads none."""
    columns = example.pair_columns
    if "win_prob_chosen" in columns and "win_prob_rejected" in columns:
        chosen += columns["win_prob_chosen"]
        rejected += columns["win_prob_rejected"]
    elif "win_prob" in columns:
        chosen += columns["win_prob"]
        rejected += [1 - p for p in columns["win_prob"]]
    elif example.loss is not None:
        chosen += [None] * len(example.pairs)
        rejected += [None] * len(example.pairs)

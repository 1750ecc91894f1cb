"""What is watched of an iteration, and what is said when it goes wrong: longer, poorer, cut, disagreeing, empty."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastpo.loop.config import Guards
from fastpo.loop.selecting import distinct_ngrams
from fastpo.sampling.items import Response

AT_FIRST = " at first"  # behind a figure of training: as it was when that began
ENOUGH = 2000  # responses of which lengths in characters and repetitions are counted


def sample_figures(counts: Mapping[str, int], some: Sequence[Response]) -> dict[str, float]:
    """Of all sampled responses, by the counts of their stage: how many, mean tokens, share cut off. Of `some`: mean
    characters, share of different 3-grams."""
    total = counts["responses"]
    if not total or not some:
        return {"responses": total}
    return {
        "responses": total, "mean tokens": counts["tokens"] / max(1, counts["with_token_ids"]),
        "mean characters": sum(len(r.text) for r in some) / len(some), "truncated": counts["truncated"] / total,
        "distinct 3-grams": distinct_ngrams([r.text for r in some]),
    }  # fmt: skip


def warnings_of(
    guards: Guards, now: Mapping[str, float], first: Mapping[str, float], rows: Mapping[str, Any],
    evaluated: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Sentences for people. `now`, `first`: sample_figures of this and of the first iteration; `rows`: rows.json."""
    found = []
    name = "mean tokens" if now.get("mean tokens") else "mean characters"
    # An online loss's own first responses: there may be one iteration alone.
    before, length = first.get(f"{name}{AT_FIRST}") or first.get(name), now.get(name)
    if before and length and length > guards.max_length_growth * before:
        where = "when training began" if f"{name}{AT_FIRST}" in first else "in the first iteration"
        found.append(f"responses are {length / before:.1f} times as long as {where} ({name})")
    distinct = now.get("distinct 3-grams")
    if (
        first.get("distinct 3-grams")
        and distinct is not None
        and distinct < guards.min_distinct * first["distinct 3-grams"]
    ):
        found.append(
            f"distinct 3-grams fell from {first['distinct 3-grams']:.2f} to {distinct:.2f}: the policy repeats itself"
        )
    if now.get("truncated", 0) > guards.max_truncated:
        found.append(f"{now['truncated']:.0%} of the responses were cut at max_tokens")
    agreed = rows.get("mean difference of the orders")
    if agreed is not None and 1 - agreed < guards.min_agreement:
        found.append(f"the two orders of a pair differ by {agreed:.2f} on average: the judge goes by the place")
    if rows.get("prompts") and rows["prompts kept"] / rows["prompts"] < guards.min_kept:
        found.append(f"only {rows['prompts kept']} of {rows['prompts']} prompts gave a row")
    win = evaluated.get("win rate")
    if win is not None and win < 0.5 and win + 2 * evaluated.get("win rate error", 0.0) < 0.5:
        found.append(f"it loses to {evaluated['against']}: win rate {win:.2f}")
    return found

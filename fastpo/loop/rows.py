"""The rows that an iteration trains on: of its own scored items, of earlier iterations, of a file; and their counts."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpo.data.rows import LOSS
from fastpo.data.sources import load_rows
from fastpo.errors import TrainingError
from fastpo.loop import degrade
from fastpo.loop.checks import losses_of, train_options
from fastpo.loop.config import LoopConfig, Select
from fastpo.loop.requests import refined_prompt
from fastpo.loop.selecting import GREEDY, Selector, as_pairs
from fastpo.losses import LOSSES
from fastpo.losses.table import DEGREE
from fastpo.sampling.items import Dropped, Item, Prompt, Scores, prompt_text, seed_of
from fastpo.sampling.parts import read_lines, write_json, write_lines
from fastpo.selection import length_penalty, relabel

Encode = Callable[[Prompt], Sequence[int]]  # a prompt's token ids, as the policy sees it


def make_rows(
    config: LoopConfig,
    items: Sequence[Item],
    scores: Mapping[str, Scores],
    *,
    scored: bool,
    selector: Any,
    earlier: Mapping[int, Path],
    dropped: Counter[str],
    encode: Encode,
    rows_path: Path,
    counts_path: Path,
) -> dict[str, Any]:
    """Writes rows.jsonl and rows.json; returns the counts. `earlier`: rows of iterations so many back, `dropped`: what
    went before the judgement. TrainingError where no row is left."""
    _refuse_by_place(scores, config.score.position_bias)
    found, total, gaps = Counter[str](), Counter[str](), 0.0
    degrees = degrade.Versions(config) if config.degrade.degrees else None
    named = dict if degrees is None else degrees.named

    def made() -> Iterator[dict[str, Any]]:
        """One after another: all of them at once are many times the size of the samples."""
        nonlocal gaps
        for item in items:
            row = selector.select(item, scores.get(item.id) if scored else None)
            if isinstance(row, Dropped):
                found[row.reason] += 1
                continue
            total["kept"] += 1
            total["pairs"] += len(row["pairs"])
            gaps += _length_gaps(row)
            for out in _forms(row, item, config, encode):
                total["own"] += 1
                yield named(out)
            if degrees is not None:
                yield from degrees.of(row)
        for name, rows in (
            ("extra", _extra(config, total["own"])),
            ("replayed", _replay(config, earlier, total["own"])),
        ):
            total[name] = len(rows)
            yield from map(named, rows)

    written = write_lines(rows_path, made())
    counts = {
        "prompts": len(items), "prompts kept": total["kept"], "pairs": total["pairs"], "rows": written,
        "of this iteration": total["own"], "replayed": total["replayed"], "from a file": total["extra"],
        **(degrees.counts if degrees is not None else {}),
        "dropped": dict(sorted(found.items())), "responses left out": dict(sorted(dropped.items())),
        "length gap, characters": gaps / total["pairs"] if total["pairs"] else None, **_agreement(scores),
    }  # fmt: skip
    try:
        if not written:
            raise TrainingError(_why_nothing(counts))
        if degrees is not None:
            degrees.check()
    except TrainingError:
        rows_path.unlink()
        raise
    write_json(counts_path, counts)
    return counts


def make_selector(config: LoopConfig, items: Sequence[Item], scores: Mapping[str, Scores]) -> Selector:
    """With DICE's penalty per character found over the whole stage, where it is asked for."""
    alpha = config.select.length_penalty
    if isinstance(alpha, str):
        if alpha != "auto":
            alpha = float(alpha)
        else:
            import torch

            values, chars = [], []
            for item in items:
                given = [
                    (v, len(r.text)) for v, r in zip(_values(scores.get(item.id)), item.responses) if v is not None
                ]
                if len(given) > 1:
                    values.append(torch.tensor([v for v, _ in given], dtype=torch.float64))
                    chars.append(torch.tensor([float(c) for _, c in given], dtype=torch.float64))
            alpha = length_penalty(values, chars)[0] if values else 0.0
    greedy = any(spec.get("source") == GREEDY for spec in config.sample.sources)
    losses = [LOSSES[name] for name in losses_of(train_options(config)) if name in LOSSES]
    whole, win_probs = any(loss.shape == "lists" for loss in losses), any(loss.win_prob for loss in losses)
    return Selector(config.select, config.seed, float(alpha), greedy, whole, win_probs)


def _values(scores: Scores | None) -> Sequence[float | None]:
    if scores is None:
        return []
    if scores.wins is None:
        return scores.values
    return [scores.win_prob(k) for k in range(len(scores.wins))]


def _forms(row: dict[str, Any], item: Item, config: LoopConfig, encode: Encode) -> list[dict[str, Any]]:
    """The rows that one selected item gives: itself, relabelled for its goals, on refinements, or pair by pair."""
    if config.select.relabel:
        return [out for pair in row["pairs"] for out in _relabelled(row, pair, config.select, encode)]
    rounds = config.refine
    if not rounds.rounds or not rounds.train:
        return as_pairs(row) if config.select.rows == "pairs" else [row]
    direct, on_lost, on_won = rounds.weights
    own = {} if rounds.loss is None else {"loss": losses_of(train_options(config))[0]}
    after = {} if rounds.loss is None else {"loss": rounds.loss}
    out = [{**row, "weight": direct, **own}]
    for pair in row["pairs"]:
        i, j = pair[0], pair[1]
        two = [row["responses"][i], row["responses"][j]]
        for k, weight in ((j, on_lost), (i, on_won)):
            prompt = refined_prompt(item.prompt, row["responses"][k]["text"], rounds.template)
            ids = {"prompt_ids": list(encode(prompt))} if "prompt_ids" in row else {}
            out.append({"id": f"{row['id']}/after-{k}", "prompt": prompt, **ids, "responses": two, "pairs": [[0, 1]],
                        "weight": weight, **after})  # fmt: skip
    return out


def _relabelled(row: Mapping[str, Any], pair: Sequence[Any], select: Select, encode: Encode) -> list[dict[str, Any]]:
    """Reward-augmented rows: for the winner's score as goal the pair, for the loser's its flip."""
    won, lost = (row["responses"][k] for k in pair[:2])
    scored = {"prompt": row["prompt"], "chosen": won, "rejected": lost, "chosen_score": won["score"],
              "rejected_score": lost["score"]}  # fmt: skip
    out = []
    for number, made in enumerate(relabel(scored, template=select.goal, joint=select.goal_joint)):
        ids = {"prompt_ids": list(encode(made["prompt"]))} if "prompt_ids" in row else {}
        out.append({"id": f"{row['id']}/goal-{number}", "prompt": made["prompt"], **ids,
                    "responses": [made["chosen"], made["rejected"]], "pairs": [[0, 1]]})  # fmt: skip
    return out


def _extra(config: LoopConfig, own: int) -> list[dict[str, Any]]:
    """Rows of a file, so many that they are `extra_share` of all of them; drawn by the seed."""
    if config.select.extra_rows is None:
        return []
    share = config.select.extra_share
    rows = [_kway(row) for row in load_rows(config.select.extra_rows)]
    wanted = min(len(rows), math.floor(own * share / (1 - share)))
    return random.Random(seed_of(config.seed, "extra rows")).sample(rows, wanted)


def _kway(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair in the form of the others."""
    if "responses" in row:
        return dict(row)
    entries = [{"text" if isinstance(row[name], str) else "messages": row[name]} for name in ("chosen", "rejected")]
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    return {**rest, "responses": entries, "pairs": [[0, 1]]}


def _replay(config: LoopConfig, earlier: Mapping[int, Path], own: int) -> list[dict[str, Any]]:
    """Rows of earlier iterations, at most so many that each has its share of all."""
    there = {back: share for back, share in sorted(config.replay.items()) if back in earlier}
    whole = own / (1 - sum(there.values())) if there else 0
    out: list[dict[str, Any]] = []
    for back, share in there.items():
        rows = [row for row in read_lines(earlier[back]) if "replayed" not in row and row.get(LOSS) != DEGREE]
        wanted = min(len(rows), math.floor(whole * share))
        drawn = random.Random(seed_of(config.seed, "replay", back, len(rows))).sample(rows, wanted)
        # Which loss trains a row is said of all of them, where there are several.
        out += [{name: value for name, value in row.items() if name != LOSS} | {"replayed": back} for row in drawn]
    return out


def _length_gaps(row: Mapping[str, Any]) -> float:
    """Characters of winners less those of losers, summed over the pairs."""
    sizes = [len(response["text"]) for response in row["responses"]]
    return float(sum(sizes[pair[0]] - sizes[pair[1]] for pair in row["pairs"]))


def _agreement(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Of pairs that were asked in both orders: how far apart the two answers are, and the share that says the same."""
    gaps = [gap for one in scores.values() for gap in one.agreement]
    if not gaps:
        return {}
    return {"asked in both orders": len(gaps), "mean difference of the orders": sum(gaps) / len(gaps)}


def _refuse_by_place(scores: Mapping[str, Scores], most: float) -> None:
    """TrainingError for a judge whose two answers on a pair, shown in either order, mostly contradict each other."""
    gaps = [gap for one in scores.values() for gap in one.agreement]
    share = sum(gap > 0.5 for gap in gaps) / len(gaps) if gaps else 0.0
    if share > most:
        raise TrainingError(
            f"the judge goes by the place alone in {share:.0%} of {len(gaps):,} pairs, which win in one order and lose "
            f"in the other, more than score.position_bias={most:g}: take a judge that can tell the responses apart"
        )


def _why_nothing(counts: Mapping[str, Any]) -> str:
    gone = {**counts["dropped"], **{f"responses {why}": n for why, n in counts["responses left out"].items()}}
    reasons = ", ".join(f"{reason}: {count}" for reason, count in gone.items()) or "no prompt"
    hint = ""
    if counts["dropped"].get("all tie", 0) > counts["prompts"] / 2 and "asked in both orders" in counts:
        hint = (
            "; the judge gives both orders of a pair the same answer, that is, it goes by the place alone: take a "
            "judge that can tell the responses apart"
        )
    return f"no row is left to train on ({reasons}){hint}"


def preview(prompt: Prompt, most: int = 80) -> str:
    text = " ".join(prompt_text(prompt).split())
    return text if len(text) <= most else text[: most - 1] + "…"

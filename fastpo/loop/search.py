"""Tree search over the steps of an answer, and pairs of steps: MCTS-DPO, arXiv:2405.00451.

    search(sampler, scorer, items, encode, decode, spec, folder, seed, max_failed, self_eval=, rows_path=) -> counts

of the policy behind `sampler`, for every prompt a tree. It writes into `folder`

    tree.jsonl       all answers and verdicts (answers.py); an interrupted search goes on from it
    siblings.jsonl   the nodes on the way that the search took which have several children, as items whose responses
                     are those children; `read_siblings` reads it
    rows.jsonl       (or rows_path) {id, prompt, chosen, rejected, win_prob, weight} for loss_type=dpo_soft; prompt,
                     chosen and rejected are token ids

* `scorer`: scores finished answers; from `threshold` on an answer is right (v + 1), else wrong (v - 1).
* `self_eval`: a scorer of responses in [0, 1], the probability that the answer so far is right; every step is asked.
  v is that over max(1, depth of the step before - 3); without it, and where the judgement failed, v of the step before.
* `encode(prompt)`, `decode(ids)`: token ids of a prompt, and their text without special tokens.
* `spec`: options, `growth.Search`. `seed`: JSON, with the prompt's id and the node's name it seeds every request.

A step without any verdict, on itself or on one that followed it, is in no pair. A failed response is no child, and a
finished answer whose judgement failed is taken out: no number is made of either.
Left out of the paper's code: children that are similar, not equal, are kept; no step of a known solution is put in.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastpo.errors import ConfigError, TrainingError
from fastpo.loop.answers import Answers
from fastpo.loop.growth import Ask, Decode, Growth, Judge, Tree, options_of
from fastpo.sampling.items import Item, Prompt, Response, Sampler, Scorer, Unit
from fastpo.sampling.parts import read_lines, write_lines

Encode = Callable[[Prompt], Sequence[int]]


def search(
    sampler: Sampler, scorer: Scorer | None, items: Sequence[Item], encode: Encode, decode: Decode,
    spec: Mapping[str, Any], folder: Path, seed: Any, max_failed: float, *, self_eval: Scorer | None = None,
    rows_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Grows a tree for every item and writes tree.jsonl, siblings.jsonl and rows.jsonl; returns counts.

    All trees ask together. ConfigError for options and scorers that do not fit, TrainingError where too much failed or
    no pair is left.
    """
    options = options_of(spec)
    if scorer is None and self_eval is None:
        raise ConfigError("search needs a scorer of finished answers, or self_eval: without either all steps are equal")
    for name, given in (("scorer", scorer), ("self_eval", self_eval)):
        if given is not None and given.unit != "response":
            raise ConfigError(f"search.{name}={given.name!r} judges a {given.unit}: a step needs a scorer of responses")
    asks = {role: one for role, one in (("self", self_eval), ("answer", scorer)) if one is not None}
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    siblings: list[dict[str, Any]] = []
    rows: list[list[dict[str, Any]]] = []
    with Answers(folder / "tree.jsonl", name="search", max_failed=max_failed) as answers:
        with tqdm(total=len(items), desc="search", unit="tree", disable=None) as bar:
            for start in range(0, len(items), options.trees):
                trees = [Tree(item, item.prompt_ids or encode(item.prompt), options, seed, decode, asks)
                         for item in items[start : start + options.trees]]  # fmt: skip
                counts["rounds"] += _grow(trees, sampler, asks, answers, bar)
                for tree in trees:
                    found = list(tree.siblings())
                    siblings += [_line_of(item) for item, _ in found]
                    rows.append(tree.pairs(found))
                    counts.update(tree.counts)
                    if not found:
                        counts["trees without siblings"] += 1
    made = [row for of_tree in rows for row in of_tree]
    with_pairs = sum(bool(of_tree) for of_tree in rows)
    for of_tree in rows:
        for row in of_tree:
            row["weight"] = 1.0 if options.weights == "pairs" else len(made) / (with_pairs * len(of_tree))
    write_lines(folder / "siblings.jsonl", siblings)
    write_lines(rows_path or folder / "rows.jsonl", made)
    out = {"prompts": len(items), "prompts kept": with_pairs, "pairs": len(made), "siblings": len(siblings),
           **answers.counts, **dict(sorted(counts.items()))}  # fmt: skip
    if not made:
        raise TrainingError(
            "search: no pair of steps is left to train on (" + ", ".join(f"{k}: {v}" for k, v in out.items()) + ")"
        )
    return out


def _grow(trees: Sequence[Tree], sampler: Sampler, asks: Mapping[str, Scorer], answers: Answers, bar: tqdm) -> int:
    """Until all are grown; each round asks what every tree waits for. Returns how many rounds that took."""
    rounds = 0
    waiting: list[tuple[Growth, Ask | Judge]] = []

    def go(growth: Growth, answer: Any) -> None:
        try:
            waiting.append((growth, growth.send(answer)))
        except StopIteration:
            bar.update()

    for tree in trees:
        go(tree.grow(), None)
    while waiting:
        rounds += 1
        now, waiting = waiting, []
        requests = [r for _, need in now if isinstance(need, Ask) for r in need.requests]
        told: dict[Any, Any] = dict(zip((r.unit for r in requests), answers.ask(sampler, requests), strict=True))
        for role in asks:
            needs = [need for _, need in now if isinstance(need, Judge) and need.role == role]
            units = [Unit(need.item, i) for need in needs for i in range(len(need.nodes))]
            names = [f"{role} {name}" for need in needs for name in need.nodes]
            if units:
                verdicts = answers.judge(asks[role], units, names)
                told |= {(unit.item.id, name): v for unit, name, v in zip(units, names, verdicts, strict=True)}
        for growth, need in now:
            if isinstance(need, Ask):
                go(growth, [told[r.unit] for r in need.requests])
            else:
                go(growth, [told[need.item.id, f"{need.role} {name}"] for name in need.nodes])
    return rounds


def _line_of(item: Item) -> dict[str, Any]:
    return {"id": item.id, "prompt": item.prompt, "prompt_ids": list(item.prompt_ids or ()),
            "responses": [r.to_json() for r in item.responses], "meta": dict(item.meta)}  # fmt: skip


def read_siblings(folder: Path) -> list[Item]:
    """The items of siblings.jsonl."""
    return [
        Item(line["id"], line["prompt"], tuple(line["prompt_ids"]), tuple(map(Response.from_json, line["responses"])),
             line["meta"])
        for line in read_lines(folder / "siblings.jsonl")
    ]  # fmt: skip

"""Measures with rules of their own on what a judge is shown: WildBench, RewardBench.

Their functions ask the judge themselves; what it says is kept in files (`judging.Kept`).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastpo.data.sources import column_names
from fastpo.errors import ConfigError, did_you_mean, quoted
from fastpo.evals import rewardbench, wildbench
from fastpo.evals.asked import refuse, refuse_repeated, rows_of
from fastpo.evals.judging import FileJudge, Kept, kept
from fastpo.evals.measure import Asked, Measure, plus_minus
from fastpo.evals.measure_options import COUNT, Option, is_count, is_number, is_whole
from fastpo.sampling.items import Item, Response, Unit
from fastpo.scoring.scoring import Ensemble


class WildBench(Measure):
    """WB-Reward of a judge of pairs against one or three baselines, or WB-Score of a judge of responses
    (wildbench.py)."""

    name, figure, own_judge, compares = "wildbench", "WB-Reward or WB-Score, -100 to 100", "wildbench", False
    options = {
        "margin": Option(500, "a number", is_number),
        "max_words": Option(wildbench.MAX_WORDS, COUNT, is_count, none=True),
    }

    def of_unit(self, unit: str) -> tuple[str, float | None]:
        return ("WB-Reward, -100 to 100", 0.0) if unit == "pair" else ("WB-Score, -100 to 100", None)

    def prompts(self, source: Any) -> list[Any]:
        return wildbench.load_tasks(source) if source is not None else wildbench.load_tasks()

    def items(self, asked: Asked) -> list[Item]:
        return [Item(task.id, list(task.turns)) for task in asked.items]

    def check(self, asked: Asked) -> None:
        super().check(asked)
        if asked.scorer.unit == "pair" and not asked.baselines:
            raise ConfigError(
                "WB-Reward compares with baselines: give baseline; a judge of mode response gives WB-Score"
            )
        if asked.scorer.unit == "list" or isinstance(asked.scorer, Ensemble | FileJudge):
            raise ConfigError("wildbench needs one judge of pairs or of responses, or annotations")
        if asked.scorer.unit == "response" and asked.baselines:
            raise ConfigError(
                "wildbench: a judge of responses gives WB-Score, which compares with nobody: leave baseline out, or "
                "take a judge of pairs for WB-Reward"
            )
        if asked.scorer.unit == "pair":
            _check_baselines(asked.baselines)

    @property
    def _max_words(self) -> int:
        return self.given["max_words"] or 0  # 0: the whole

    def _matches(self, asked: Asked) -> list[tuple[str, str]]:
        if asked.scorer.unit == "response":
            return [(model, "") for model in asked.rivals or asked.models]
        return [(model, other) for other in asked.baselines for model in asked.rivals]

    def units(self, asked: Asked) -> Iterator[Unit]:
        for names in self._matches(asked):
            for task in asked.items:
                texts = [asked.text(name, task.id) or "" for name in names if name]
                if not all(text.strip() for text in texts):
                    continue  # nobody is asked about an answer that is empty
                item = Item(task.id, list(task.turns), meta={"checklist": list(task.checklist)})
                shown = [Response(wildbench.shortened(text, self._max_words)) for text in texts]
                yield Unit(item.with_responses(shown), 0, 1 if len(shown) > 1 else None)

    def _judged(
        self, asked: Asked, folder: Path, done: bool = True
    ) -> dict[tuple[str, str], tuple[wildbench.Judged, Kept]]:
        out = {}
        for model, other in self._matches(asked):
            tasks = [t for t in asked.items if all(asked.text(n, t.id) is not None for n in (model, other) if n)]
            mine = {task.id: asked.text(model, task.id) or "" for task in tasks}
            names = [model, other] if other else [model]
            scorer = Kept(
                asked.scorer, folder / "-vs-".join(names), partial(_of_places, names),
                asked.max_failed, done=done, quarters=bool(other),
            )  # fmt: skip
            if other:
                theirs = {task.id: asked.text(other, task.id) or "" for task in tasks}
                judged = wildbench.compare(tasks, mine, theirs, scorer, seed=asked.seed, max_words=self._max_words)
            else:
                judged = wildbench.rate(tasks, mine, scorer, max_words=self._max_words)
            out[model, other] = judged, scorer
        return out

    def judge(self, asked: Asked, folder: Path) -> dict[str, Any]:
        return _sum([scorer.counts for _, scorer in self._judged(asked, folder, done=False).values()])

    def verdicts(self, asked: Asked, folder: Path) -> Iterator[dict[str, Any]]:
        for _, scorer in self._judged(asked, folder).values():
            yield from scorer.lines

    def figures(self, asked: Asked, folder: Path) -> dict[str, dict[str, Any]]:
        found, groups = self._judged(asked, folder), wildbench.groups_of(asked.items)
        failed = {key: dict(judged.failed) for key, (judged, _) in found.items()}
        if asked.scorer.unit == "response":
            return {model: _score(judged.ratings, groups, asked.seed) | {"left_out_failed": len(failed[model, ""])}
                    for (model, _), (judged, _) in found.items()}  # fmt: skip
        out = {}
        for model in asked.rivals:
            against = {other: found[model, other][0].comparisons for other in asked.baselines}
            out[model] = self._reward(against, groups, model, asked.seed)
            out[model]["left_out_failed"] = {other: len(failed[model, other]) for other in asked.baselines}
        return out

    def _reward(
        self, against: Mapping[str, Sequence[wildbench.Comparison]], groups: Any, model: str, seed: int
    ) -> dict[str, Any]:
        margin = self.given["margin"]
        figures = {other: wildbench.reward(given, margin, groups=groups, seed=seed) for other, given in against.items()}
        margins = {other: {str(m): wildbench.reward(given, m, draws=0).value for m in wildbench.MARGINS}
                   for other, given in against.items()}  # fmt: skip
        by = {other: vars(figure) for other, figure in figures.items()}
        more = {"margin": margin, "margins": margins, "baselines": by}
        if len(against) == 1:
            [one] = figures.values()
            return _around(one.value, one.error) | {"task_macro": one.task_macro} | more
        mixed = wildbench.mixture(figures, model)
        error, _ = wildbench.mixture_errors(against, margin, groups=groups, model=model, seed=seed)
        missing = list(mixed.missing)
        return _around(mixed.value, error) | {"task_macro": mixed.task_macro, "missing": missing} | more

    def of_annotations(self, source: Any, prompts: Any, seed: int, baseline: Any = None) -> dict[str, dict[str, Any]]:
        """A file of ratings, or files of comparisons by the baseline's name."""
        groups = None if prompts is None else wildbench.groups_of(wildbench.load_tasks(prompts))
        if not isinstance(source, Mapping):
            return {"model": _score(wildbench.read_ratings(source), groups, seed)}
        _check_baselines([str(name) for name in source])
        against = {str(name): wildbench.read_comparisons(rows, str(name)) for name, rows in source.items()}
        return {"model": self._reward(against, groups, "model", seed)}


def _check_baselines(names: Sequence[str]) -> None:
    """ConfigError for several of which one is not WildBench's: only of its own there is a mean."""
    foreign = next((name for name in names if name not in wildbench.BASELINES), None)
    if len(names) > 1 and foreign is not None:
        near = did_you_mean(foreign, wildbench.BASELINES)
        raise ConfigError(
            f"several baselines of WildBench are its own: {quoted(wildbench.BASELINES)}, not {foreign!r}{near}"
        )


def _of_places(names: Sequence[str], unit: Unit) -> list[str]:
    return [names[place] for place in (unit.i, unit.j) if place is not None]


def _score(ratings: Sequence[wildbench.Rating], groups: Any, seed: int) -> dict[str, Any]:
    found = wildbench.score(ratings, groups=groups, seed=seed)
    return _around(found.value, found.error) | {k: v for k, v in vars(found).items() if k not in ("value", "error")}


class RewardBench(Measure):
    """RewardBench 1 or 2 (rewardbench.py) of the judge itself; the answers are the rows'. Fractions.

    `version`: None: 2 where `chosen` are lists of texts. `failed`: "refuse", or "count", the benchmark's own rule.
    """

    name, figure, compares, of_judge = "rewardbench", "score, 0 to 1", False, True
    options = {
        "version": Option(None, "1 or 2", lambda value: is_whole(value) and value in (1, 2), none=True),
        "failed": Option("refuse", names=("refuse", "count")),
        "tie": Option(None, "a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1, none=True),
    }

    def prompts(self, source: Any) -> list[Any]:
        if source is None:
            return rewardbench.load_choices() if self._version([]) == 2 else rewardbench.load_pairs()
        rows = rows_of(source, "RewardBench's rows", ("chosen",))
        if "id" in column_names(rows):
            refuse("rows have no id; numbers of the rows",
                   [number for number, row in enumerate(rows) if row.get("id") is None], len(rows))  # fmt: skip
        return rewardbench.load_choices(rows) if self._version(rows) == 2 else rewardbench.load_pairs(rows)

    def _version(self, rows: Sequence[Mapping[str, Any]]) -> int:
        if self.given["version"] is not None:
            return self.given["version"]
        chosen = rows[0]["chosen"] if rows else ()
        return 2 if isinstance(chosen, list | tuple) and chosen and isinstance(chosen[0], str) else 1

    def items(self, asked: Asked) -> list[Item]:
        return [Item(one.name, one.prompt) for one in asked.items]

    def check(self, asked: Asked) -> None:
        if isinstance(asked.scorer, FileJudge):
            raise ConfigError("rewardbench takes scores that are there as annotations: rows of id, subset and scores")
        if asked.scorer.unit == "pair" and not _are_pairs(asked.items):
            raise ConfigError("RewardBench 2 compares four answers and more: it needs a judge of responses or of lists")

    def units(self, asked: Asked) -> Iterator[Unit]:
        for one in asked.items:
            item = Item(one.name, one.prompt, responses=tuple(Response(text) for text in one.answers))
            if asked.scorer.unit == "response":
                yield from (Unit(item, i) for i in range(len(one.answers)))
            else:
                yield Unit(item, 0, 1) if asked.scorer.unit == "pair" else Unit(item)

    def _judged(self, asked: Asked, folder: Path, done: bool = True) -> tuple[rewardbench.Result, list[Kept]]:
        right = {one.name: set(one.answers[: one.num_correct]) for one in asked.items}
        scorer = kept(
            asked.scorer, folder,
            lambda unit: ["right" if r.text in right[unit.item.id] else "wrong" for r in unit.responses],
            asked.max_failed, done,
        )  # fmt: skip
        given: dict[str, Any] = {"failed": self.given["failed"], "seed": asked.seed}
        if _are_pairs(asked.items):
            tie = rewardbench.tie_of(asked.scorer) if self.given["tie"] is None else self.given["tie"]
            result = rewardbench.evaluate_pairs(asked.items, scorer, tie=tie, **given)
        else:
            result = rewardbench.evaluate_choices(asked.items, scorer, **given)
        return result, list(scorer.members.values()) if isinstance(scorer, Ensemble) else [scorer]

    def judge(self, asked: Asked, folder: Path) -> dict[str, Any]:
        return _sum([scorer.counts for scorer in self._judged(asked, folder, done=False)[1]])

    def verdicts(self, asked: Asked, folder: Path) -> Iterator[dict[str, Any]]:
        for scorer in self._judged(asked, folder)[1]:
            yield from scorer.lines

    def figures(self, asked: Asked, folder: Path) -> dict[str, dict[str, Any]]:
        return {asked.scorer.name: _bench(self._judged(asked, folder)[0])}

    def of_annotations(self, source: Any, prompts: Any, seed: int, baseline: Any = None) -> dict[str, dict[str, Any]]:
        """Rows of `id`, `subset` and `scores`, the right answers' first; and the rows as `prompts`."""
        if prompts is None:
            raise ConfigError("rewardbench's annotations are scores of the answers in prompts: give prompts too")
        choices = self.prompts(prompts)
        rows = rows_of(source, "the scores", ("id", "subset", "scores"))
        wrong = [f"{_name(row)}: {row['scores']!r}" for row in rows if not _are_scores(row["scores"])]
        refuse("scores are no lists of numbers, null where one failed", wrong, len(rows))
        names = [_name(row) for row in rows]
        refuse_repeated("prompts have scores more than once", names)
        scores = {name: list(row["scores"]) for name, row in zip(names, rows)}
        known = {one.name for one in choices}
        refuse("scores are of other prompts", [name for name in names if name not in known], len(names))
        if _are_pairs(choices):
            tie, taken = self.given["tie"] or 0.0, rewardbench.PAIRS_FAILED
            result = rewardbench.of_pairs(choices, scores, tie=tie)
        else:
            result, taken = rewardbench.of_choices(choices, scores, seed=seed), rewardbench.CHOICES_FAILED
        rewardbench.settle_failures(result.failed, len(choices), "the annotations", self.given["failed"], taken)
        return {"judge": _bench(result)}


def _are_pairs(choices: Sequence[rewardbench.Choice]) -> bool:
    """Whether they are RewardBench's first version's."""
    return all(one.subset in (*rewardbench.WEIGHTS, *rewardbench.PRIOR) for one in choices)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['subset']}/{row['id']}"


def _are_scores(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(one is None or is_number(one) for one in given)


def _around(value: float | None, error: float | None) -> dict[str, Any]:
    """No interval, and a `note`, where prompts that are all alike say nothing of how far the figure varies."""
    if error == 0:
        note = "all prompts are alike, which says nothing of how far it varies: no interval"
        return {"value": value, "error": error, "interval": None, "note": note}
    return plus_minus(value, error)


def _bench(result: rewardbench.Result) -> dict[str, Any]:
    more = {k: v for k, v in vars(result).items() if k not in ("score", "ties", "failed", "missing")}
    more |= {"ties": None if result.ties is None else vars(result.ties), "missing": list(result.missing),
             "failed": dict(result.failed)}  # fmt: skip
    return _around(result.score, result.errors.get("score")) | {k: dict(v) if isinstance(v, Mapping) else v
                                                                    for k, v in more.items()}  # fmt: skip


def _sum(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of several stages as one."""
    out: dict[str, Any] = {"statuses": {}}
    for one in counts:
        for name, value in one.items():
            if name == "statuses":
                for status, n in value.items():
                    out["statuses"][status] = out["statuses"].get(status, 0) + n
            else:
                out[name] = out.get(name, 0) + value
    return out

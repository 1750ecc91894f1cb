"""WildBench (arXiv:2406.04770): WB-Reward against three baselines, with length margins; WB-Score; both by task.

The rules are those of the public repository, github.com/allenai/WildBench: leaderboard/data_dir/_create_tables.py (the
figures of one table), _merge_results.py (the mean over baselines) and src/eval.py (what the judge is shown). Figures
are on the leaderboard's scale, -100 to 100. The judge and its prompts are in wildbench_judge.py.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpo.errors import ConfigError, DataError, did_you_mean, quoted, shown
from fastpo.evals.asked import DRAWS, Term, refuse, refuse_repeated, resampled, rows_of, value_of, verdicts
from fastpo.sampling.items import Item, Response, Scorer, Turn, Unit, seed_of

DATA_SET, CONFIG, SPLIT = "allenai/WildBench", "v2", "test"
BASELINES = ("gpt-4-turbo-2024-04-09", "claude-3-haiku-20240307", "Llama-2-70b-chat-hf")
MARGINS = (-1, 100, 300, 500, 1000, 1500, 2000, 3000)  # characters; below 0: none
WEIGHTS = {
    "Creative Tasks": 0.5, "Planning & Reasoning": 1.25, "Math & Data Analysis": 1.0,
    "Information/Advice seeking": 0.75, "Coding & Debugging": 1.25,
}  # fmt: skip
GROUP_OF_TAG = {
    "Information seeking": "Information/Advice seeking", "Advice seeking": "Information/Advice seeking",
    "Creative Writing": "Creative Tasks", "Editing": "Creative Tasks", "Brainstorming": "Creative Tasks",
    "Role playing": "Creative Tasks", "Others": "Creative Tasks",
    "Reasoning": "Planning & Reasoning", "Planning": "Planning & Reasoning",
    "Math": "Math & Data Analysis", "Data Analysis": "Math & Data Analysis",
    "Coding & Debugging": "Coding & Debugging",
}  # fmt: skip
MAX_WORDS = 1000  # of the history, the last message and each answer
CUT = "... (truncated)"  # how a text ends that was cut; the figures know it by that
EMPTY = "[This model response is empty.]"
OUTCOMES = {"win_much": 1.0, "win": 0.5, "tie": 0.0, "lose": -0.5, "lose_much": -1.0}
_NAMES = {value: name for name, value in OUTCOMES.items()}
Groups = Mapping[str, Sequence[str]]  # id -> task groups


# ---- prompts


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt of the benchmark: a conversation whose last message is to be answered."""

    id: str
    turns: tuple[Turn, ...]
    checklist: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()  # the primary one first

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of all its tags, each once: a prompt counts in every one of them."""
        return tuple(dict.fromkeys(GROUP_OF_TAG[tag] for tag in self.tags))


def load_tasks(source: Any = DATA_SET) -> list[Task]:
    """The prompts: rows, a file of rows, or the data set by its name on the hub.

    Columns: `session_id` or `id`, `conversation_input` (turns), `checklist` (texts), `primary_tag`, `secondary_tags`.
    DataError in one line where they cannot be had, or for a row that is none, by name and count.
    """
    named = {"config_name": CONFIG, "split": SPLIT} if source == DATA_SET else {}
    rows = rows_of(source, "WildBench's prompts", ("conversation_input", "checklist", "primary_tag"), **named)
    tasks, bad = [], []
    for number, row in enumerate(rows):
        name = row.get("session_id") or row.get("id")
        if not name:
            raise DataError(f"row {number} of WildBench's prompts has neither session_id nor id")
        tags = (row["primary_tag"], *(row.get("secondary_tags") or ()))
        for tag in tags:
            if tag not in GROUP_OF_TAG:
                raise DataError(
                    f"prompt {name!r}: no task {shown(tag)} in WildBench{did_you_mean(str(tag), GROUP_OF_TAG)}"
                )
        turns = tuple(row["conversation_input"])
        if not turns or not all(map(_is_turn, turns)):
            bad.append(name)
        tasks.append(Task(str(name), turns, tuple(row["checklist"]), tags))
    refuse("prompts are no turns with role and content", bad, len(rows))
    refuse_repeated("prompts occur more than once", [task.id for task in tasks])
    return tasks


def _is_turn(given: Any) -> bool:
    return isinstance(given, Mapping) and all(isinstance(given.get(name), str) for name in ("role", "content"))


def groups_of(tasks: Sequence[Task]) -> dict[str, tuple[str, ...]]:
    """What `reward` and `score` read of the prompts."""
    return {task.id: task.groups for task in tasks}


def shortened(text: str, max_words: int = MAX_WORDS) -> str:
    """The first `max_words` of what single spaces part, with a mark that it was cut; 0 or less: the whole."""
    words = text.split(" ")
    return " ".join(words[:max_words]) + CUT if 0 < max_words < len(words) else text


# ---- evaluations


@dataclass(frozen=True, slots=True)
class Comparison:
    """A verdict on a model's answer beside a baseline's."""

    id: str
    outcome: float  # 1 much better, 0.5 slightly, 0 equal, -0.5, -1: of the model
    answer: str  # as the judge saw them
    baseline: str

    def left_out(self) -> bool:
        """Whether one of the answers was cut or empty: neither won nor lost, but in the total."""
        return any(text.endswith(CUT) or text == EMPTY for text in (self.answer, self.baseline))

    def with_margin(self, margin: float) -> float:
        """The outcome, a tie where it is slight and the winner longer by more than `margin` characters."""
        if margin < 0 or abs(self.outcome) != 0.5:
            return self.outcome
        longer = len(self.answer) - len(self.baseline)
        return 0.0 if (longer if self.outcome > 0 else -longer) > margin else self.outcome


@dataclass(frozen=True, slots=True)
class Rating:
    """A judge's score of an answer, 1 to 10."""

    id: str
    score: float
    answer: str  # as the judge saw it

    def left_out(self) -> bool:
        """Whether the answer was cut or empty: out of lengths and tasks, in the mean."""
        return not self.answer or self.answer.endswith(CUT)


def read_comparisons(rows: Any, baseline: str) -> list[Comparison]:
    """The comparisons of a file of the repository's eval_results/.../pairwise.v2, against `baseline`.

    A row: `session_id`, `winner` (a model's name, or "tie"), `extent` (1 slightly, 2 much), `model_outputs` {name:
    answer} of two models. DataError by name and count for repeated prompts, answers that are missing, and verdicts
    that are none.
    """
    rows = rows_of(rows, "the comparisons", ("session_id", "model_outputs"))
    ids = [str(row["session_id"]) for row in rows]
    refuse_repeated("prompts are judged more than once", ids)
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row["model_outputs"])
    its = [name for name in names if baseline in name]
    others = [name for name in names if name not in its]
    if len(its) != 1 or len(others) != 1:
        raise DataError(f"the comparisons are of {quoted(names)}: expected {baseline!r} and one other model")
    (its_name,), (model,) = its, others
    refuse(
        "comparisons lack an answer",
        [i for i, row in zip(ids, rows) if {type(row["model_outputs"].get(n)) for n in (its_name, model)} != {str}],
        len(rows),
    )
    found, bad = [], []
    for name, row in zip(ids, rows):
        outcome = _outcome(row.get("winner"), row.get("extent"), model, its_name)
        if outcome is None:
            bad.append(name)
        else:
            found.append(Comparison(name, outcome, row["model_outputs"][model], row["model_outputs"][its_name]))
    refuse("comparisons have no verdict", bad, len(rows), f"; a winner is {model!r}, {its_name!r} or 'tie'")
    return found


def _outcome(winner: Any, extent: Any, model: str, baseline: str) -> float | None:
    if winner == "tie":
        return 0.0
    if winner not in (model, baseline) or extent not in (1, 2):
        return None
    return extent / 2 if winner == model else -extent / 2


def read_ratings(rows: Any) -> list[Rating]:
    """The ratings of a file of the repository's eval_results/.../score.v2.

    A row: `session_id`, `score` (or `parsed_result` with it) from 1 to 10 as a number or its text, `model_output`.
    DataError as `read_comparisons` gives it.
    """
    rows = rows_of(rows, "the ratings", ("session_id", "model_output"))
    ids = [str(row["session_id"]) for row in rows]
    refuse_repeated("prompts are rated more than once", ids)
    found, bad = [], []
    for name, row in zip(ids, rows):
        output = row["model_output"]
        output = output[0] if isinstance(output, list) and output else output
        score = number_of(row["score"] if "score" in row else (row.get("parsed_result") or {}).get("score"))
        if score is None or not 1 <= score <= 10 or not isinstance(output, str):
            bad.append(name)
        else:
            found.append(Rating(name, score, output))
    refuse("ratings have no score from 1 to 10", bad, len(rows))
    return found


def number_of(value: Any) -> float | None:
    """The finite number that a value or its text is."""
    try:
        found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return found if math.isfinite(found) else None


# ---- figures


@dataclass(frozen=True)
class Figure:
    """What a table says of one model."""

    value: float  # WB-Reward or WB-Score, -100 to 100
    error: float | None  # its standard error, by resampling prompts
    total: int  # prompts with a verdict, those left out included
    left_out: int  # cut or empty
    mean_length: float | None  # characters of the model's answers, those left out not
    counts: Mapping[str, int] = field(default_factory=dict)  # WB-Reward: win_much, win, tie, lose, lose_much
    tasks: Mapping[str, float] = field(default_factory=dict)  # by group, of those that have prompts
    task_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    task_macro: float | None = None  # None: no groups were given, or one of the five has no prompt
    task_macro_error: float | None = None


def reward(
    comparisons: Sequence[Comparison], margin: float = -1, *, groups: Groups | None = None, seed: int = 0,
    draws: int = DRAWS,
) -> Figure:  # fmt: skip
    """WB-Reward against one baseline: 100 times the sum of the outcomes, over all prompts.

    Prompts whose answers were cut or empty add nothing to the sum, and count in the total; in a task's mean they do not
    count. `margin`: see `Comparison.with_margin`. `groups`: of `groups_of`, for the figures by task. `draws`: of the
    standard errors; 0: none.
    """
    if not comparisons:
        raise DataError("no comparisons: nothing to take a mean of")
    refuse_repeated("prompts are judged more than once", [c.id for c in comparisons])
    counted = [(c, c.with_margin(margin)) for c in comparisons if not c.left_out()]
    of_tasks: dict[str, list[float]] = {}
    for c, outcome in counted:
        for group in _groups(groups, c.id, comparisons):
            of_tasks.setdefault(group, []).append(outcome)
    whole, by_task = _terms([c.id for c in comparisons], _values(comparisons, margin), groups)
    return Figure(
        value=100 * math.fsum(o for _, o in counted) / len(comparisons),
        error=resampled([whole], seed, draws),
        total=len(comparisons),
        left_out=len(comparisons) - len(counted),
        mean_length=_mean([len(c.answer) for c, _ in counted]),
        counts=_counts([o for _, o in counted]),
        tasks=(tasks := {group: 100 * math.fsum(v) / len(v) for group, v in of_tasks.items()}),
        task_counts={group: _counts(v) for group, v in of_tasks.items()},
        task_macro=task_macro(tasks),
        task_macro_error=resampled(by_task, seed, draws) if len(tasks) == len(WEIGHTS) else None,
    )


def score(
    ratings: Sequence[Rating], *, groups: Groups | None = None, seed: int = 0, draws: int = DRAWS
) -> Figure:  # fmt: skip
    """WB-Score: (mean - 5) * 20 over all prompts; by task without those whose answers were cut or empty."""
    if not ratings:
        raise DataError("no ratings: nothing to take a mean of")
    refuse_repeated("prompts are rated more than once", [r.id for r in ratings])
    counted = [r for r in ratings if not r.left_out()]
    of_tasks: dict[str, list[float]] = {}
    for r in counted:
        for group in _groups(groups, r.id, ratings):
            of_tasks.setdefault(group, []).append(r.score)
    tasks = {group: _scaled(math.fsum(v) / len(v)) for group, v in of_tasks.items()}
    ids = [r.id for r in ratings]
    whole, _ = _terms(ids, {r.id: _scaled(r.score) for r in ratings}, None)
    _, by_task = _terms(ids, {r.id: None if r.left_out() else _scaled(r.score) for r in ratings}, groups)
    return Figure(
        value=_scaled(math.fsum(r.score for r in ratings) / len(ratings)),
        error=resampled([whole], seed, draws),
        total=len(ratings),
        left_out=len(ratings) - len(counted),
        mean_length=_mean([len(r.answer) for r in counted]),
        tasks=tasks,
        task_macro=task_macro(tasks),
        task_macro_error=resampled(by_task, seed, draws) if len(tasks) == len(WEIGHTS) else None,
    )


def _values(comparisons: Sequence[Comparison], margin: float) -> dict[str, float | None]:
    return {c.id: None if c.left_out() else 100 * c.with_margin(margin) for c in comparisons}


def _scaled(mean: float) -> float:
    return (mean - 5) * 20


def _counts(outcomes: Sequence[float]) -> dict[str, int]:
    return {name: sum(o == value for o in outcomes) for name, value in OUTCOMES.items()}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _groups(groups: Groups | None, name: str, all_of_them: Sequence[Any]) -> Sequence[str]:
    if groups is None:
        return ()
    if name not in groups:
        lacking = [one.id for one in all_of_them if one.id not in groups]
        refuse("prompts are none of the given groups", lacking, len(all_of_them))
    return groups[name]


def task_macro(tasks: Mapping[str, float]) -> float | None:
    """The mean of the five groups with their weights; None where one of them has no prompt.

    The repository's script takes a group without prompts for 0 and keeps its weight.
    """
    for group in tasks:
        if group not in WEIGHTS:
            raise DataError(f"no group of tasks {group!r} in WildBench{did_you_mean(group, WEIGHTS)}")
    if len(tasks) < len(WEIGHTS):
        return None
    return math.fsum(tasks[group] * weight for group, weight in WEIGHTS.items()) / math.fsum(WEIGHTS.values())


def _terms(
    ids: Sequence[str], values: Mapping[str, float | None], groups: Groups | None, share: float = 1.0
) -> tuple[Term, list[Term]]:
    """What `resampled` reads of figures over these prompts: of all prompts' mean, and of the mean over tasks.

    `values`: by the prompt's id; None adds nothing to the mean over all prompts, and is in no task.
    """
    given = [values.get(name) for name in ids]
    numbers = np.array([0.0 if v is None else v for v in given])  # [N]
    judged = np.array([name in values for name in ids], dtype=float)
    macro = []
    if groups is not None:
        total = math.fsum(WEIGHTS.values())
        for group, weight in WEIGHTS.items():
            inside = np.array([v is not None and group in groups[n] for n, v in zip(ids, given)], dtype=float)
            macro.append((share * weight / total, numbers * inside, inside))
    return (share, numbers, judged), macro


@dataclass(frozen=True)
class Mixture:
    """The mean of WB-Reward over the baselines."""

    value: float | None  # None: the comparisons with one of the baselines are missing
    task_macro: float | None
    tasks: Mapping[str, float]
    missing: tuple[str, ...] = ()


def mixture(figures: Mapping[str, Figure], model: str = "", baselines: Sequence[str] = BASELINES) -> Mixture:
    """The mean over the baselines of `reward`'s figures. A model that is a baseline has 0 against itself.

    Where another baseline's figure is missing there is no mean, and `missing` names it: the repository's tables take 0
    in its place.
    """
    for name in figures:
        if name not in baselines:
            raise ConfigError(
                f"no baseline {name!r} in WildBench, only {quoted(baselines)}{did_you_mean(name, baselines)}"
            )
    missing = tuple(name for name in baselines if name not in figures and name != model)
    if missing:
        return Mixture(None, None, {}, missing)
    given, count = list(figures.values()), len(baselines)
    macros = [figure.task_macro for figure in given]
    tasks = {g: math.fsum(f.tasks[g] for f in given) / count for g in WEIGHTS if all(g in f.tasks for f in given)}
    macro = None if not given or None in macros else math.fsum(m for m in macros if m is not None) / count
    return Mixture(math.fsum(figure.value for figure in given) / count, macro, tasks)


def mixture_errors(
    comparisons: Mapping[str, Sequence[Comparison]], margin: float = -1, *, groups: Groups | None = None,
    model: str = "", baselines: Sequence[str] = BASELINES, seed: int = 0,
) -> tuple[float | None, float | None]:  # fmt: skip
    """Standard errors of `mixture`'s value and task_macro, by resampling the prompts of all baselines together."""
    if any(name not in comparisons and name != model for name in baselines):
        return None, None
    ids = list(dict.fromkeys(c.id for given in comparisons.values() for c in given))
    terms = [_terms(ids, _values(given, margin), groups, 1 / len(baselines)) for given in comparisons.values()]
    wholes, by_task = [whole for whole, _ in terms], [term for _, macro in terms for term in macro]
    return resampled(wholes, seed), resampled(by_task, seed) if groups is not None else None


# ---- asking


@dataclass(frozen=True)
class Judged:
    """What a scorer said of a model's answers."""

    comparisons: tuple[Comparison, ...] = ()
    ratings: tuple[Rating, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)  # id -> status; in no figure, as in the repository's files


def compare(
    tasks: Sequence[Task], answers: Mapping[str, str], baseline: Mapping[str, str], scorer: Scorer, *,
    seed: int = 0, max_words: int = MAX_WORDS,
) -> Judged:  # fmt: skip
    """A model's answers beside a baseline's, each by the prompt's id, judged by a scorer of pairs.

    Which answer stands first is drawn with `seed` for each prompt alone. An answer without text loses by much, two of
    them are equal, and nobody is asked. The scorer's P(the first is better) must be one of five: 0, 1/4, 1/2, 3/4, 1.
    """
    if scorer.unit != "pair":
        raise ConfigError(f"WB-Reward needs a scorer of pairs, not of a {scorer.unit}")
    _check_answers(tasks, answers, "the model")
    _check_answers(tasks, baseline, "the baseline")
    seen = {t.id: [shortened(given[t.id], max_words) for given in (answers, baseline)] for t in tasks}
    settled, units, flipped = {}, [], []
    for task in tasks:
        empty = [not text.strip() for text in seen[task.id]]
        if any(empty):
            settled[task.id] = float(empty[1]) - float(empty[0])
            seen[task.id] = [EMPTY if e else text for e, text in zip(empty, seen[task.id])]
            continue
        second = random.Random(seed_of("wildbench", seed, task.id)).random() < 0.5  # the model's answer is shown second
        flipped.append(second)
        units.append(Unit(_item(task, seen[task.id]), *((1, 0) if second else (0, 1))))
    failed, none = {}, []
    for unit, second, verdict in zip(units, flipped, verdicts(scorer, units)):
        name, first = unit.item.id, value_of(verdict)
        if first is None:
            failed[name] = verdict.status
        elif (outcome := (1 - 2 * first if second else 2 * first - 1)) not in _NAMES:
            none.append(name)
        else:
            settled[name] = outcome
    refuse("verdicts are none of the five", none, len(units), "; a judge of WB-Reward answers A++, A+, A=B, B+ or B++")
    return Judged(
        comparisons=tuple(
            Comparison(t.id, settled[t.id], *(text.strip() for text in seen[t.id])) for t in tasks if t.id in settled
        ),
        failed=failed,
    )


def rate(
    tasks: Sequence[Task], answers: Mapping[str, str], scorer: Scorer, *, max_words: int = MAX_WORDS
) -> Judged:  # fmt: skip
    """A model's answers, by the prompt's id, judged by a scorer of responses from 1 to 10; one without text has 1."""
    if scorer.unit != "response":
        raise ConfigError(f"WB-Score needs a scorer of responses, not of a {scorer.unit}")
    _check_answers(tasks, answers, "the model")
    seen = {task.id: shortened(answers[task.id], max_words) for task in tasks}
    scores = {task.id: 1.0 for task in tasks if not seen[task.id].strip()}
    units = [Unit(_item(task, [seen[task.id]]), 0) for task in tasks if task.id not in scores]
    failed, none = {}, []
    for unit, verdict in zip(units, verdicts(scorer, units)):
        name, value = unit.item.id, value_of(verdict)
        if value is None:
            failed[name] = verdict.status
        elif not 1 <= value <= 10:
            none.append(name)
        else:
            scores[name] = value
    refuse("scores are not from 1 to 10", none, len(units))
    return Judged(
        ratings=tuple(Rating(t.id, scores[t.id], seen[t.id].strip()) for t in tasks if t.id in scores), failed=failed
    )


def _item(task: Task, texts: Sequence[str]) -> Item:
    meta = {"checklist": list(task.checklist)}
    return Item(task.id, list(task.turns), responses=tuple(Response(text) for text in texts), meta=meta)


def _check_answers(tasks: Sequence[Task], answers: Mapping[str, str], whose: str) -> None:
    refuse_repeated("prompts occur more than once", [task.id for task in tasks])
    lacking = [task.id for task in tasks if not isinstance(answers.get(task.id), str)]
    refuse(f"prompts have no answer of {whose}", lacking, len(tasks))
    known = {task.id for task in tasks}
    refuse(f"answers of {whose} are to other prompts", [name for name in answers if name not in known], len(answers))

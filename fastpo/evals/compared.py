"""Measures of answers that the loop's score stage judges: AlpacaEval 2, the arena, win rates, accuracy, checkpoints.

A failed verdict is in no figure; what it was is counted.
"""

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpo.data.sources import column_names
from fastpo.errors import ConfigError, DataError, did_you_mean, quoted
from fastpo.evals import alpaca, glm, pairwise
from fastpo.evals.asked import refuse, rows_of
from fastpo.evals.inputs import prompts_of, with_names
from fastpo.evals.judging import FIVE, FileJudge, lines_of
from fastpo.evals.measure import Asked, Measure, mean_of, plus_minus
from fastpo.evals.measure_options import ALLOW_MISSING, COUNT, RESAMPLES, Option, is_count, is_number
from fastpo.loop.score_stage import pair_values, plan_units, read_scores, read_verdicts, score_stage
from fastpo.sampling.items import Item, Response, Unit, prompt_text, seed_of
from fastpo.scoring.scoring import Ensemble


class _Stage(Measure):
    """A prompt with the answers of all models is one item. `needs_both`: whether a pair must have both orders."""

    needs_both = False

    def units(self, asked: Asked) -> Iterator[Unit]:
        first = asked.scorer
        for item in self.judged(asked):
            yield from plan_units(item, first, _plan(asked), asked.both)

    def judged(self, asked: Asked) -> list[Item]:
        """Whoever is before the baseline is shown first where each pair has one order: drawn for each prompt and model
        alone."""
        items = with_names(asked.items, asked.answers)
        if asked.both or asked.scorer.unit != "pair":
            return items
        return [replace(item, responses=self._drawn(item, asked)) for item in items]

    def _drawn(self, item: Item, asked: Asked) -> tuple[Response, ...]:
        def before(response: Response) -> int:
            if response.source == asked.baseline:
                return 1
            drawn = random.Random(seed_of(self.name, asked.seed, item.id, response.source)).random() < 0.5
            if isinstance(asked.scorer, FileJudge):  # as they were shown when they were judged
                drawn = asked.scorer.second(item.id, response.source, str(asked.baseline), drawn)
            return 2 * drawn

        return tuple(sorted(item.responses, key=before))

    def check(self, asked: Asked) -> None:
        super().check(asked)
        if asked.scorer.unit == "pair" and not asked.baselines:
            raise ConfigError(f"{self.name}: the judge compares pairs: give baseline, a policy or a file of answers")
        if len(asked.baselines) > 1:
            raise ConfigError(f"{self.name} has one baseline, not {quoted(asked.baselines)}")
        if asked.scorer.unit == "pair" and self.needs_both and not asked.both:
            raise ConfigError(f"{self.name} needs each pair in both orders: leave both_orders out")
        if isinstance(asked.scorer, FileJudge):
            units = list(self.units(asked))
            asked.scorer.refuse_others(units, {item.id for item in asked.every})
            asked.scorer.check(units, one_will_do=not self.needs_both)

    def judge(self, asked: Asked, folder: Path) -> dict[str, Any]:
        if isinstance(asked.scorer, FileJudge):  # again, of the answers that there are now
            asked.scorer.check(list(self.units(asked)), one_will_do=not self.needs_both)
        return score_stage(asked.scorer, self.judged(asked), folder, plan=_plan(asked), both_orders=asked.both,
                           max_failed=asked.max_failed)  # fmt: skip

    def verdicts(self, asked: Asked, folder: Path) -> Iterator[dict[str, Any]]:
        names = {unit.key: [r.source for r in unit.responses] for unit in self.units(asked)}
        members = list(asked.scorer.members) if isinstance(asked.scorer, Ensemble) else []
        for judge in (*members, asked.scorer.name):
            yield from lines_of(folder, judge, names)

    def games(self, asked: Asked, folder: Path) -> list[tuple[str, str, str, float | None]]:
        """(prompt, shown first, shown second, P(the first is better)): of scores both orders, the better one wins."""
        items, found = self.judged(asked), []
        if asked.scorer.unit == "pair":
            said = read_verdicts(folder, asked.scorer.name)
            for item in items:
                of = [response.source for response in item.responses]
                for (i, j), value in said.get(item.id, {}).items():
                    assert i is not None and j is not None
                    found.append((item.id, of[i], of[j], None if isinstance(value, str) else float(value)))
            return found
        for item, scores in zip(items, read_scores(folder, asked.scorer.name, items).values()):
            of_name = {r.source: v for r, v in zip(item.responses, scores.values)}
            for model in asked.rivals:
                if model in of_name and asked.baseline in of_name:
                    a, b = of_name[model], of_name[asked.baseline]
                    p = None if a is None or b is None else 0.5 + 0.5 * ((a > b) - (a < b))
                    found.append((item.id, model, asked.baseline, p))
                    found.append((item.id, asked.baseline, model, None if p is None else 1 - p))
        return found

    def wins(self, asked: Asked, folder: Path) -> dict[str, dict[str, float | None]]:
        """P(the model's answer is better), by model and prompt: the mean of both orders where there are two."""
        both = asked.both or asked.scorer.unit != "pair"
        of: dict[str, dict[str, dict[Any, Any]]] = {}
        for name, first, second, p in self.games(asked, folder):
            model = second if first == asked.baseline else first
            place = (0, 1) if first == model else (1, 0)
            of.setdefault(model, {}).setdefault(name, {})[place] = "failed" if p is None else p
        out: dict[str, dict[str, float | None]] = {model: {} for model in asked.rivals}
        for model, found in of.items():
            for name, verdicts in found.items():
                for (i, _), p in pair_values(verdicts, both).items():
                    out[model][name] = p if i == 0 or p is None else 1 - p
        return out

    def scores(self, asked: Asked, folder: Path) -> dict[str, dict[str, float | None]]:
        """The mean over a model's answers to a prompt, by model and prompt; None where one failed."""
        items = self.judged(asked)
        table = read_scores(folder, asked.scorer.name, items)
        out: dict[str, dict[str, float | None]] = {model: {} for model in asked.answers}
        for item in items:
            own: dict[str, list[float | None]] = {}
            for response, value in zip(item.responses, table[item.id].values):
                own.setdefault(response.source, []).append(value)
            for model, values in own.items():
                known = [v for v in values if v is not None]
                out[model][item.id] = statistics.fmean(known) if len(known) == len(values) else None
        return out


def _plan(asked: Asked) -> str:
    return f"against:{asked.baseline}" if asked.baselines and asked.scorer.unit == "pair" else "all"


def _known(values: Mapping[str, float | None]) -> list[float]:
    return [v for v in values.values() if v is not None]


class AlpacaEval(_Stage):
    """AlpacaEval 2 (alpaca.py): raw and length-controlled win rate in percent."""

    name, figure, even = "alpaca_eval", "length-controlled win rate, %", 50.0
    options = {
        "form": Option(None, names=alpaca.FORMS, none=True),
        "calibration": Option(None, "a path", lambda value: isinstance(value, str | Path), none=True),
        "resamples": RESAMPLES,
        "allow_missing": ALLOW_MISSING,
    }

    def check(self, asked: Asked) -> None:
        glm.need_scikit_learn("AlpacaEval's length-controlled win rate")
        super().check(asked)
        if len(asked.items) < glm.FOLDS:
            raise ConfigError(
                f"{self.name}: {len(asked.items)} prompts; its regression's {glm.FOLDS} folds need one each"
            )
        self._calibration([prompt_text(item.prompt) for item in asked.every])

    def _calibration(self, prompts: Sequence[str] | None) -> alpaca.Calibration | None:
        """What the options name; ConfigError where the form needs what is not in it."""
        source, form = self.given["calibration"], self.given["form"]
        found = None if source is None else alpaca.load_calibration(source, prompts=prompts)
        if found is None and form in (alpaca.FULL, alpaca.NOREG):
            raise ConfigError(f"measure.form {form!r} needs measure.calibration, the path of df_gamed.csv")
        if found is not None and form == alpaca.FULL and not len(found.gamed_index):
            raise ConfigError(f"measure.form {form!r} needs gamed baselines, which the calibration {source} lacks")
        return found

    def baseline(self, items: Sequence[Any]) -> Any:
        return "column:output" if items and all("output" in item.meta for item in items) else None

    def figures(self, asked: Asked, folder: Path) -> dict[str, dict[str, Any]]:
        assert asked.baseline is not None
        wins, out = self.wins(asked, folder), {}
        for model in asked.rivals:
            rows = alpaca.Annotations(
                [_nan(wins[model].get(item.id)) for item in asked.items],  # type: ignore[arg-type]
                [_length(asked.text(model, item.id)) for item in asked.items],  # type: ignore[arg-type]
                [_length(asked.text(asked.baseline, item.id)) for item in asked.items],  # type: ignore[arg-type]
                model, asked.baseline, tuple(prompt_text(item.prompt) for item in asked.items),
            )  # fmt: skip
            every = [prompt_text(item.prompt) for item in asked.every]
            out[model] = self._figure(rows, every, asked.seed, allow_missing=True)  # max_failed has judged of them
        return out

    def _figure(
        self, rows: alpaca.Annotations, prompts: Sequence[str] | None, seed: int, allow_missing: bool
    ) -> dict[str, Any]:
        given = {name: self.given[name] for name in ("form", "resamples")}
        found = alpaca.win_rates(rows, calibration=self._calibration(prompts), allow_missing=allow_missing, seed=seed,
                                 **given)  # fmt: skip
        more = {k: v for k, v in vars(found).items() if k not in ("model", "interval")}
        return {"value": found.length_controlled, "error": found.lc_standard_error, "interval": found.lc_interval,
                **more, "raw_interval": found.interval}  # fmt: skip

    def of_annotations(self, source: Any, prompts: Any, seed: int, baseline: Any = None) -> dict[str, dict[str, Any]]:
        glm.need_scikit_learn("AlpacaEval's length-controlled win rate")
        rows = alpaca.read_annotations(source)
        known = None if prompts is None else [prompt_text(item.prompt) for item in prompts_of(prompts)]
        allow_missing = self.given["allow_missing"]
        if known is not None:
            rows = rows.of_prompts(known, allow_missing)
        return {rows.model: self._figure(rows, known, seed, allow_missing)}


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _length(text: str | None) -> float:
    return math.nan if text is None else len(text)


class Arena(_Stage):
    """Pairwise win rates in the form of Arena-Hard (pairwise.py), in percent."""

    name, figure, own_judge, both, even = "arena", "win rate by Bradley-Terry, %", "arena", True, 50.0
    needs_both = True
    options = {
        "weight": Option(3, COUNT, is_count),
        "control": Option((), names=pairwise.CONTROLS, many=True),
        "resamples": RESAMPLES,
        "level": Option(0.95, "a number between 0 and 1", lambda value: is_number(value) and 0 < value < 1),
        "category": Option(None, "a text", lambda value: isinstance(value, str), none=True),
        "allow_missing": ALLOW_MISSING,
    }

    def check(self, asked: Asked) -> None:
        glm.need_scikit_learn("a Bradley-Terry fit")
        super().check(asked)
        self._no_category()

    def figures(self, asked: Asked, folder: Path) -> dict[str, dict[str, Any]]:
        assert asked.baseline is not None
        games = [
            pairwise.Game(name, first, second, None if p is None else verdict_of(p))
            for name, first, second, p in self.games(asked, folder)
        ]
        if asked.scorer.unit != "pair":  # which score is the better one says nothing of by how much
            games = [replace(game, verdict=SLIGHT.get(str(game.verdict), game.verdict)) for game in games]
        styles = {
            (item.id, model): pairwise.style_of(text)
            for item in asked.items for model in asked.answers if (text := asked.text(model, item.id)) is not None
        }  # fmt: skip
        return self._figure(games, asked.baseline, styles, asked.seed, allow_missing=True)  # as of alpaca_eval

    def _figure(
        self, games: Sequence[pairwise.Game], baseline: str, styles: Any, seed: int, allow_missing: bool
    ) -> dict[str, Any]:
        control = self.given["control"]
        given = {**self.given, "control": (control,) if isinstance(control, str) else tuple(control)}
        given |= {"allow_missing": allow_missing}
        del given["category"]
        found = pairwise.arena(games, baseline, styles=styles, seed=seed, **given)
        return {
            one.model: {"value": one.score, "error": None, "interval": one.interval and list(one.interval),
                        "baseline": baseline, "strength": one.strength, "games": one.games,
                        "points_of_the_first": found.first, "pairs_left_out": found.failed, "style": dict(found.style)}
            for one in found.standings if one.model != baseline
        }  # fmt: skip

    def of_annotations(self, source: Any, prompts: Any, seed: int, baseline: Any = None) -> dict[str, dict[str, Any]]:
        """Rows of `prompt` (or `id`), `a`, `b`, `verdict`, or Arena-Hard's judgments; a file, or a folder of them. The
        baseline is given, that of the judgments, or in every game."""
        rows = self._rows(source)
        if any("games" in row for row in rows):
            games = pairwise.read_judgments(rows, self.given["category"], baseline)
            baseline = games[0].a if baseline is None else baseline
        else:
            self._no_category()
            games = _games(rows)
        everywhere = set.intersection(*({game.a, game.b} for game in games))
        if baseline is None and len(everywhere) != 1:
            found = quoted(sorted(everywhere)) or "none"
            raise DataError(f"the games have no one model that is in all of them ({found}): give baseline, by name")
        if self.given["control"]:
            raise ConfigError("control needs answers, which annotations of the arena do not have")
        baseline = str(baseline) if baseline is not None else everywhere.pop()
        return self._figure(games, baseline, None, seed, self.given["allow_missing"])

    def _no_category(self) -> None:
        if self.given["category"] is not None:
            raise ConfigError("measure.category chooses among Arena-Hard's judgments, and none are given: leave it out")

    def _rows(self, source: Any) -> list[Any]:
        folder = Path(source) if isinstance(source, str | Path) else None
        if folder is None or not folder.is_dir():
            return rows_of(source, "the games", ())
        files = sorted(folder.glob("*.jsonl"))
        if not files:
            raise DataError(f"{folder} holds no .jsonl file of games")
        return [row for file in files for row in rows_of(file, "the games", ())]


def _games(source: Sequence[Mapping[str, Any]]) -> list[pairwise.Game]:
    rows = rows_of(source, "the games", ("a", "b"))
    known = column_names(rows)
    if "verdict" not in known:
        raise DataError(f"the games have no column 'verdict', only {quoted(known)}{did_you_mean('verdict', known)}")
    refuse("games have no verdict, which is null where it failed; numbers of the rows",
           [number for number, row in enumerate(rows) if "verdict" not in row], len(rows))  # fmt: skip
    prompts = [row.get("prompt") if row.get("prompt") is not None else row.get("id") for row in rows]
    refuse("games have neither prompt nor id; numbers of the rows",
           [number for number, prompt in enumerate(prompts) if prompt is None], len(rows))  # fmt: skip
    return [pairwise.Game(str(prompt), str(row["a"]), str(row["b"]), row["verdict"])
            for prompt, row in zip(prompts, rows)]  # fmt: skip


SLIGHT = {"A>>B": "A>B", "B>>A": "B>A"}


def verdict_of(p: float) -> str:
    """The one of the five verdicts whose P is nearest."""
    return min(FIVE, key=lambda name: abs(FIVE[name] - p))


class WinRate(_Stage):
    """Plain win rate of two policies on prompts of their domain, both orders (PUGC's), in percent."""

    name, figure, both, even = "win_rate", "win rate, %", True, 50.0

    def figures(self, asked: Asked, folder: Path) -> dict[str, dict[str, Any]]:
        out = {}
        for model, values in self.wins(asked, folder).items():
            known = _known(values)
            out[model] = mean_of(known, 100.0) | {
                "wins": sum(v > 0.5 for v in known), "ties": sum(v == 0.5 for v in known),
                "losses": sum(v < 0.5 for v in known), "left_out": len(asked.items) - len(known),
            }  # fmt: skip
        return out


class Verifier(_Stage):
    """The mean of a verifier or a function over prompts with answers (MCTS-DPO's accuracy)."""

    name, figure, compares = "verifier", "mean score", False

    def check(self, asked: Asked) -> None:
        if asked.scorer.unit == "pair":
            raise ConfigError(f"{self.name} needs a judge of responses, such as {{kind: verifier, ...}}, not of pairs")
        super().check(asked)

    def figures(self, asked: Asked, folder: Path) -> dict[str, dict[str, Any]]:
        return self.means(asked, self.scores(asked, folder))

    def means(self, asked: Asked, values: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
        out = {}
        for model, own in values.items():
            known = _known(own)
            out[model] = mean_of(known) | {"left_out": len(asked.items) - len(known)}
            if asked.baselines and model != asked.baseline:
                theirs = values[asked.baselines[0]]
                apart = [v - theirs[k] for k, v in own.items() if v is not None and theirs.get(k) is not None]
                found = mean_of(apart)
                # Differences may all be 0 or 1 and are no shares: no interval of Wilson's.
                around = plus_minus(found["value"], found["error"])
                out[model]["difference"] = {"to": asked.baseline, **around, "prompts": len(apart)}
        return out


class HeldOut(Verifier):
    """Which of several checkpoints answers held-out prompts best (Instruct-SkillMix): mean scores, or win rates in
    percent against the baseline where the judge compares; 100 prompts, drawn by the seed.

    `best` is the best of the models, where it can be told from the next one on the same prompts."""

    name, figure, both, limit = "held_out", "mean score, or win rate in %", True, 100

    def of_unit(self, unit: str) -> tuple[str, float | None]:
        return ("win rate, %", 50.0) if unit == "pair" else ("mean score", None)

    def check(self, asked: Asked) -> None:
        _Stage.check(self, asked)

    def figures(self, asked: Asked, folder: Path) -> dict[str, dict[str, Any]]:
        values, scale = self.scores(asked, folder) if asked.scorer.unit != "pair" else self.wins(asked, folder), 1.0
        if asked.scorer.unit != "pair":
            out = self.means(asked, values)
        else:
            out, scale = {}, 100.0
            for model, own in values.items():
                known = _known(own)
                out[model] = mean_of(known, scale) | {"left_out": len(asked.items) - len(known)}
        ranked = sorted(
            (model for model in asked.models if model in out and out[model]["value"] is not None),
            key=lambda model: out[model]["value"], reverse=True,
        )  # fmt: skip
        for found in out.values():
            found["best"] = False
        if len(ranked) > 1:
            best, following = ranked[:2]
            apart = [
                scale * (v - values[following][k]) for k, v in values[best].items()
                if v is not None and values[following].get(k) is not None
            ]  # fmt: skip
            mean = mean_of(apart)
            around = plus_minus(mean["value"], mean["error"])
            interval = around["interval"]
            out[best]["best"] = interval is not None and interval[0] > 0
            if not out[best]["best"] and apart:
                out[best]["no_clear_difference"] = {"to": following, **around, "prompts": len(apart)}  # fmt: skip
        return out

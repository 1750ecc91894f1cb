"""WildBench's published figures beside ours, from the evaluations that its public repository holds.

    git clone https://github.com/allenai/WildBench CLONE
    python bench/evals_wildbench.py --evaluations CLONE [--tasks FILE] [--no-write]

Three comparisons, each model by model:

* WB-Score from the evaluations themselves (eval_results/.../score.v2), with every score table of the history whose
  script reads that folder: score, prompts, mean length; with --tasks (the data set's rows, for their tags) by task too.
* WB-Reward from the evaluations themselves (.../pairwise.v2), with pairwise-*-K=*.json, likewise.
* The tables among themselves: rewards from the published counts of verdicts (pairwise-*-K=*.json), means over baselines
  and tasks (all_stat_wildbench.*.json).

CLONE may be a bare repository and may lack files: what is not there is named. Nothing of the repository is written but
its published figures, beside ours.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastpo.evals import wildbench as wb

sys.path.append(str(Path(__file__).resolve().parent))
import common  # noqa: E402

DATA = "leaderboard/data_dir"
SHORT = {"gpt4t": wb.BASELINES[0], "haiku": wb.BASELINES[1], "llama": wb.BASELINES[2]}
MARGINS = (-1, 500, 1000, 1500)  # of which there are tables
SAME = 1e-9  # of figures on the scale of 100: the order of sums


class Clone:
    """A git repository, of which files may be missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.commit = self._git("rev-parse", "HEAD").strip()
        listed = self._git("ls-tree", "-r", "-z", "--name-only", "HEAD").split("\0")
        self.files = [path for path in listed if path.startswith("eval_results/") and path.endswith(".json")]
        self._tables: dict[str, Any] = {}

    def _git(self, *words: str) -> str:
        done = subprocess.run(["git", "-C", str(self.folder), *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self.folder}: git {words[0]}: {done.stderr.strip()[:300]}")
        return done.stdout

    def text(self, path: str, commit: str = "HEAD") -> str:
        return self._git("cat-file", "blob", f"{commit}:{path}")

    def read(self, path: str, commit: str = "HEAD") -> Any:
        """The JSON of a file; None where it is not there."""
        name = f"{commit}:{path}"
        if name in self._tables:
            return self._tables[name]
        done = subprocess.run(["git", "-C", str(self.folder), "cat-file", "blob", name], capture_output=True)
        found = None if done.returncode else json.loads(done.stdout)
        if path.startswith(DATA):
            self._tables[name] = found
        return found

    def versions(self, path: str) -> Iterator[tuple[str, str, Any]]:
        """(commit, date, content), the newest first."""
        for entry in self._git("log", "--format=%H %as", "--", path).splitlines():
            commit, date = entry.split()
            if (content := self.read(path, commit)) is not None:
                yield commit, date, content


# ---- from the evaluations


def score_tables(clone: Clone) -> list[tuple[str, str, str, dict]]:
    """(version of the evaluations, judge, date, table) of every score table of the history, by the script beside it."""
    found = []
    for name, judge in (("score", "gpt-4o-2024-05-13"), ("score-sonnet", "claude-3-5-sonnet-20240620")):
        for commit, date, table in clone.versions(f"{DATA}/{name}.json"):
            script = clone.text(f"{DATA}/_create_tables.py", commit)
            folder = re.search(r'^(?:SCORE_)?FOLDER = "eval_results/(\S+)"', script, re.MULTILINE)
            found.append((folder[1], judge, date, table))
    return found


def published_score(theirs: dict) -> dict[str, float]:
    tasks = {f"task {t}": 10 * v for t, v in theirs["task_categorized_scores"].items()}
    return {"WB-Score": 10 * theirs["adjusted_score"], "prompts": theirs["total"], "length": theirs["avg_len"],
            "task macro": 10 * theirs["task_macro_score"], **tasks}  # fmt: skip


def from_scores(clone: Clone, groups: wb.Groups | None) -> tuple[list[dict], list[str]]:
    """A row for each file of ratings, with each table that its folder's name says was made of it."""
    rows, absent = [], []
    tables = score_tables(clone)
    for path in (p for p in clone.files if "/score.v2/" in p):
        evaluations = clone.read(path)
        if evaluations is None:
            absent.append(path)
            continue
        _, version, _, judge, name = path.split("/")
        model, judge = name.removesuffix(".json"), judge.removeprefix("eval=")
        figure = wb.score(wb.read_ratings(evaluations), groups=groups)
        ours = {"WB-Score": figure.value, "prompts": figure.total, "length": figure.mean_length,
                "task macro": figure.task_macro, **{f"task {t}": v for t, v in figure.tasks.items()}}  # fmt: skip
        row: dict[str, Any] = {"model": model, "version": version, "judge": judge, "error": figure.error, "ours": ours}
        of_it = [(date, published_score(table[model])) for v, j, date, table in tables
                 if (v, j) == (version, judge) and model in table]  # fmt: skip
        if of_it:
            row["table of"], row["published"] = of_it[0]
            row["difference"] = differences(ours, row["published"])
            gaps = [(date, differences(ours, theirs)) for date, theirs in of_it]
            row["tables"] = [{"date": date, "figures": len(gap), "difference": max(map(abs, gap.values()))}
                             for date, gap in gaps]  # fmt: skip
        rows.append(row)
    return rows, absent


def from_comparisons(clone: Clone, groups: wb.Groups | None) -> tuple[list[dict], list[str]]:
    """A row for each file of comparisons and each margin that has a table."""
    rows, absent = [], []
    for path in (p for p in clone.files if "/pairwise.v2/" in p):
        evaluations = clone.read(path)
        if evaluations is None:
            absent.append(path)
            continue
        baseline, model = path.split("/")[-2].removeprefix("ref="), path.split("/")[-1].removesuffix(".json")
        if len({name for row in evaluations for name in row["model_outputs"]}) < 2:
            continue  # the baseline against itself
        comparisons = wb.read_comparisons(evaluations, baseline)
        short = next(name for name, full in SHORT.items() if full == baseline)
        for margin in MARGINS:
            theirs = (clone.read(f"{DATA}/pairwise-{short}-K={margin}.json") or {}).get(model)
            figure = wb.reward(comparisons, margin, groups=groups)
            ours = {"WB-Reward": figure.value, **figure.counts, "length": figure.mean_length,
                    "task macro": figure.task_macro, **{f"task {t}": v for t, v in figure.tasks.items()}}  # fmt: skip
            row = {"model": model, "baseline": baseline, "margin": margin, "error": figure.error, "ours": ours}
            if theirs is not None:
                row["published"] = {
                    "WB-Reward": 100 * theirs["reward"], **{name: theirs[name] for name in wb.OUTCOMES},
                    "length": theirs["avg_len"], "task macro": 100 * theirs["task_macro_reward"],
                    **{f"task {t}": 100 * v for t, v in theirs["task_categorized_rewards"].items()},
                }  # fmt: skip
                row["difference"] = differences(ours, row["published"])
            rows.append(row)
    return rows, absent


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Of what both have."""
    return {key: ours[key] - value for key, value in theirs.items() if ours.get(key) is not None}


# ---- from the tables


def of_counts(theirs: dict) -> wb.Figure:
    """Our figure of published counts: comparisons that have them, without answers."""

    def value(counts: dict, of: int) -> float:
        given = [outcome for name, outcome in wb.OUTCOMES.items() for _ in range(counts[name])]
        rows = [wb.Comparison(str(n), outcome, "a", "b") for n, outcome in enumerate(given)]
        rows += [wb.Comparison(str(n), 0.0, wb.EMPTY, "b") for n in range(len(given), of)]
        return wb.reward(rows, draws=0).value

    tasks = {t: value(counts, 0) for t, counts in theirs["task_categorized_results"].items()}
    total = theirs["total"]
    return wb.Figure(value(theirs, total), None, total, 0, None, tasks=tasks, task_macro=wb.task_macro(tasks))


def from_tables(clone: Clone) -> dict[str, Any]:
    """Rewards of a baseline from its counts; means over the baselines, and task macro of scores, from both."""
    rewards, merged = [], []
    figures: dict[tuple[int, str], dict[str, wb.Figure]] = {}
    for margin in MARGINS:
        for short, baseline in SHORT.items():
            for model, theirs in (clone.read(f"{DATA}/pairwise-{short}-K={margin}.json") or {}).items():
                figure = of_counts(theirs)
                figures.setdefault((margin, model), {})[baseline] = figure
                pairs = [(figure.value, theirs["reward"]), (figure.task_macro, theirs["task_macro_reward"])]
                pairs += [(figure.tasks[t], v) for t, v in theirs["task_categorized_rewards"].items()]
                rewards.append({"model": model, "baseline": baseline, "margin": margin, "ours": figure.value,
                                "published": 100 * theirs["reward"], "figures": len(pairs),
                                "difference": max(abs(a - 100 * b) for a, b in pairs)})  # fmt: skip
    scores = clone.read(f"{DATA}/score.json") or {}
    for margin in MARGINS:
        for model, theirs in (clone.read(f"{DATA}/all_stat_wildbench.{margin}.json") or {}).items():
            macro = wb.task_macro({t: 10 * v for t, v in scores[model]["task_categorized_scores"].items()})
            pairs = [(macro, theirs["WB_score.task_macro"])]
            row: dict[str, Any] = {
                "model": model,
                "margin": margin,
                "published": theirs[f"mixture_of_rewards.K={margin}"],
            }
            mixed = wb.mixture(figures.get((margin, model), {}), model)
            row |= {"ours": mixed.value, "task macro": mixed.task_macro, "score task macro": macro}
            if mixed.missing:
                row["missing"] = list(mixed.missing)
            else:
                pairs += [(mixed.value, row["published"]), (mixed.task_macro, theirs[f"task_macro_reward.K={margin}"])]
                pairs += [(v, theirs[f"mixture_of_rewards.{t}.K={margin}"]) for t, v in mixed.tasks.items()]
                pairs += [((macro + mixed.task_macro) / 2, theirs["RewardScore_Avg"])]
            row |= {"figures": len(pairs), "difference": max(abs(a - b) for a, b in pairs)}
            merged.append(row)
    zeros = {}
    for margin in (k for k in wb.MARGINS if k not in MARGINS):
        table = clone.read(f"{DATA}/all_stat_wildbench.{margin}.json") or {}
        means = [theirs[f"mixture_of_rewards.K={margin}"] for theirs in table.values()]
        zeros[str(margin)] = {"entries": len(means), "zero": sum(value == 0 for value in means)}
    return {"rewards": rewards, "merged": merged, "margins without tables": zeros}


# ---- the page


def line(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def small(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


def worst(rows: Iterable[dict], key: str = "difference") -> float:
    """The largest difference of rows, whose differences are one number or one for each figure."""
    found = [abs(d) for row in rows for d in (row[key].values() if isinstance(row[key], dict) else [row[key]])]
    return max(found, default=0.0)


def of_scores(result: dict[str, Any]) -> list[str]:
    with_table = [row for row in result["scores"] if "published" in row]
    tables = [table for row in with_table for table in row["tables"]]
    compared = sum(table["figures"] for table in tables)
    lines = [
        f"## WB-Score, from the evaluations: {len(result['scores'])} files, {len(with_table)} with published figures",
        "",
        line("model", "evaluations", "prompts", "WB-Score", "±", "published", "difference", "length", "published",
             "difference", "tables"),
        line("---", "---", *["---:"] * 9),
    ]  # fmt: skip
    for row in with_table:
        ours, theirs, gap = row["ours"], row["published"], row["difference"]
        dates = sorted(table["date"] for table in row["tables"])
        lines.append(line(
            row["model"], row["version"], f"{ours['prompts']} ({theirs['prompts']})", shown(ours["WB-Score"]),
            shown(row["error"]), shown(theirs["WB-Score"]), small(gap["WB-Score"]), shown(ours["length"], 1),
            shown(theirs["length"], 1), small(gap["length"]), f"{len(dates)}, {dates[0]} to {dates[-1]}",
        ))  # fmt: skip
    lines += [
        "", "Published: the newest table of the repository's history that has the model and whose script reads this "
        f"folder of evaluations. Over all {len(tables)} such tables, {compared} figures: largest difference "
        f"{small(worst(tables))}.",
        "",
    ]  # fmt: skip
    without = [row for row in result["scores"] if "published" not in row]
    if without:
        lines += ["Evaluations of which no table of the repository was made:", "",
                  line("model", "evaluations", "judge", "prompts", "WB-Score", "±"),
                  line(*["---"] * 3, *["---:"] * 3)]  # fmt: skip
        lines += [line(r["model"], r["version"], r["judge"], r["ours"]["prompts"], shown(r["ours"]["WB-Score"]),
                       shown(r["error"])) for r in without]  # fmt: skip
        lines.append("")
    return lines


def of_rewards(result: dict[str, Any]) -> list[str]:
    rows = [row for row in result["comparisons"] if "published" in row]
    lines = [f"## WB-Reward, from the evaluations: {result['pair_files']} files", ""]
    if not rows:
        return [*lines, "None: the clone holds no file of comparisons of which there is a table.", ""]
    lines += [line("model", "baseline", "margin", "WB-Reward", "±", "published", "largest difference of its figures"),
              line("---", "---", *["---:"] * 5)]  # fmt: skip
    lines += [line(r["model"], r["baseline"], r["margin"], shown(r["ours"]["WB-Reward"]), shown(r["error"]),
                   shown(r["published"]["WB-Reward"]), small(worst([r]))) for r in rows]  # fmt: skip
    return [*lines, ""]


def of_tables(result: dict[str, Any]) -> list[str]:
    rewards, merged = result["tables"]["rewards"], result["tables"]["merged"]
    known = [row for row in merged if row["ours"] is not None]
    lines = [
        "## WB-Reward and means, from the published counts", "",
        f"* WB-Reward, its five tasks and their macro, of {len(rewards)} tables of a model, a baseline and a margin, "
        f"from the counts of verdicts: {sum(r['figures'] for r in rewards)} figures, largest difference "
        f"{small(worst(rewards))}.",
        "* Means over the baselines with their tasks and macro, task macro of WB-Score, and the mean of both, of "
        f"{len(merged)} entries: {sum(r['figures'] for r in merged)} figures, largest difference "
        f"{small(worst(merged))}.", "",
        "The mean over the baselines, and the largest difference of the entry's figures:", "",
        line("model", *(f"{'no margin' if k < 0 else k} | published | difference" for k in MARGINS)),
        line("---", *["---: | ---: | ---:"] * len(MARGINS)),
    ]  # fmt: skip
    cells = {(row["model"], row["margin"]): row for row in known}
    order = sorted({row["model"] for row in known}, key=lambda m: -cells.get((m, 500), {"ours": -math.inf})["ours"])
    for model in order:
        of_it = [cells.get((model, k), {}) for k in MARGINS]
        triples = [
            f"{shown(r.get('ours'))} | {shown(r.get('published'))} | {small(r.get('difference'))}" for r in of_it
        ]
        lines.append(line(model, *triples))
    return [*lines, ""]


def of_missing(result: dict[str, Any], groups: bool) -> list[str]:
    merged, absent = result["tables"]["merged"], result["absent"]
    lacking = sorted({r["model"] for r in merged if r["ours"] is None})
    without = result["tables"]["margins without tables"]
    zero, entries = (sum(of[key] for of in without.values()) for key in ("zero", "entries"))
    tags = "computed above, of the files that are there." if groups else (
        "not computed: they need the prompts' tags, which are in the data set on a hub (--tasks). Their sums are "
        "checked from the published counts and tasks."
    )  # fmt: skip
    return [
        "## What cannot be had from the published evaluations", "",
        f"* The means over baselines of {len(lacking)} models: {', '.join(lacking)}. Tables of a baseline lack them, "
        "and the script that merges the tables takes 0 for what is missing.",
        f"* The means at margins {', '.join(without)}: {zero} of {entries} published entries are 0. There are no "
        "tables of these margins, and the script takes 0 for them.",
        f"* Figures by task from the evaluations: {tags}",
        f"* What is in the {len(absent)} files of evaluations that this clone lacks: "
        f"{sum('/pairwise.v2/' in p for p in absent)} of comparisons, {sum('/score.v2/' in p for p in absent)} of "
        "ratings. The JSON names them. A whole clone has them.",
        "* WB-Elo and ranks: the Elo is fitted over the ratings of all models, in a random order, and the ranks are "
        "among all models, with the zeros above.", "",
    ]  # fmt: skip


def page(result: dict[str, Any], groups: bool) -> str:
    held = len(result["scores"]) + result["pair_files"]
    lines = [
        "# WildBench: ours beside the published figures", "",
        f"`bench/evals_wildbench.py` on github.com/allenai/WildBench at {result['wildbench'][:10]}, of whose "
        f"{result['files']} files of evaluations the clone holds {held}. Figures on the leaderboard's scale, -100 to "
        "100; ± is the standard error by resampling prompts.", "",
        *of_scores(result), *of_rewards(result), *of_tables(result), *of_missing(result, groups),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=Path, required=True, metavar="CLONE")
    parser.add_argument("--tasks", help="rows of the data set: a file, or its name on the hub")
    parser.add_argument("--folder", type=Path, help="of the results; default bench/results/<machine>")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    clone = Clone(args.evaluations)
    groups = wb.groups_of(wb.load_tasks(args.tasks)) if args.tasks else None
    scores, absent = from_scores(clone, groups)
    comparisons, absent_pairs = from_comparisons(clone, groups)
    result = {
        "wildbench": clone.commit, "files": len(clone.files), "scores": scores, "comparisons": comparisons,
        "pair_files": sum("/pairwise.v2/" in path for path in clone.files) - len(absent_pairs),
        "tables": from_tables(clone), "absent": absent + absent_pairs,
    }  # fmt: skip
    text = page(result, groups is not None)
    print(text)
    if not args.no_write:
        result["machine_info"] = common.environment()
        print(f"written to {common.write_result('evals_wildbench', result, text, args.folder)}")
    tables = [table for row in scores for table in row.get("tables", [])]
    published = [row for row in comparisons if "published" in row]
    most = max(worst([*tables, *published]), worst(result["tables"]["rewards"]), worst(result["tables"]["merged"]))
    if most > SAME:
        raise SystemExit(f"a figure differs from the published one by {most:.3g}")


if __name__ == "__main__":
    main()

"""AlpacaEval 2 from its public annotations: ours against the leaderboard, model by model, and against its package.

    .venv/bin/python bench/evals_alpaca.py --annotations REPOSITORY [--resamples 1000] [--old-folds-python PYTHON]
    .venv/bin/python bench/evals_alpaca.py --annotations REPOSITORY --speed --package-python PYTHON [--rounds 3]

REPOSITORY is a checkout of github.com/tatsu-lab/alpaca_eval: results/MODEL/weighted_alpaca_eval_gpt4_turbo/, the
leaderboard and the regression's weights under src/alpaca_eval/. PYTHON has alpaca-eval and patsy installed. Nothing of
the annotations is written: figures alone.

`--old-folds-python PYTHON`, one with scikit-learn below 1.9, adds the figures with the folds that it makes. There
GroupKFold sorts groups of equal size as numpy does on the processor (findings/group_k_fold_sorts.sh), and the
leaderboard's figures were made on several machines.

The leaderboard's difficulties and gamed baselines are files of a hub. The repository has the gamed baselines'
annotations (results/gpt4_1106_preview_{verbose,concise}/), above 4 MiB, which a copy without large files lacks, as ours
does. What such a copy says of them is enough for the regression (see `recovered`): difficulties from annotations that
carry the regression's own predictions and from its published weights; of the gamed baselines their lengths, and the two
sums by which their preferences enter.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
import common  # noqa: E402
import numpy as np  # noqa: E402

from fastpo.evals import alpaca, glm  # noqa: E402
from fastpo.evals.alpaca_rows import Annotations, Calibration  # noqa: E402

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
BASELINE = "gpt4_1106_preview"
GAMED = (f"{BASELINE}_verbose", f"{BASELINE}_concise")
WEIGHTS = ("np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)")
LIMIT = 0.01  # of a raw win rate, in points


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def table(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a CSV file by their first column."""
    with open(path, newline="") as file:
        return {row[""]: row for row in csv.DictReader(file)}


class Repository:
    def __init__(self, folder: Path):
        self.folder, package = folder, folder / "src" / "alpaca_eval"
        board = package / "leaderboards" / "data_AlpacaEval_2" / f"{JUDGE}_leaderboard.csv"
        weights = package / "metrics" / "weights" / JUDGE / "length_controlled_v1" / f"baseline_{BASELINE}.csv"
        if not board.is_file():
            raise SystemExit(f"{folder} is no checkout of tatsu-lab/alpaca_eval: no {board}")
        self.published = table(board)
        self.weights = {
            model: np.array([float(row[name]) for name in WEIGHTS]) for model, row in table(weights).items()
        }

    def annotations(self, model: str) -> Path:
        return self.folder / "results" / model / JUDGE / "annotations.json"

    def outputs(self, model: str) -> dict[str, str]:
        rows = json.loads((self.folder / "results" / model / "model_outputs.json").read_text())
        return {row["instruction"]: row["output"] for row in rows}

    def read(self, model: str) -> Annotations:
        return replace(alpaca.read_annotations(self.annotations(model)), model=model)


def difficulties(repository: Repository) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """(instructions, difficulties [M], whose annotations they are from).

    Where annotations carry `glm_preference`, the regression's prediction at equal lengths, its logit is
    b_difficulty * difficulty + b_model, with the weights that the repository publishes.
    """
    found: dict[str, dict[str, float]] = {}
    for path in sorted((repository.folder / "results").glob("*/**/annotations.json")):
        with open(path, "rb") as file:
            if b'"glm_preference"' not in file.read(1 << 16):
                continue
        rows = json.loads(path.read_bytes())
        _, difficulty, model = repository.weights[rows[0]["generator_2"]]
        values = (logit(np.array([row["glm_preference"] for row in rows])) - model) / difficulty
        found[rows[0]["generator_2"]] = dict(zip([row["instruction"] for row in rows], values.tolist()))
    if not found:
        raise SystemExit("no annotations with 'glm_preference' in this checkout: the difficulties cannot be recovered")
    first, *others = found.values()
    apart = max((abs(other[p] - value) for other in others for p, value in first.items()), default=0.0)
    if apart > 1e-5:
        raise SystemExit(f"the difficulties that {', '.join(found)} give differ by {apart:.1g}")
    return tuple(first), np.array(list(first.values())), list(found)


def published_penalty(
    repository: Repository, model: str, prompts: tuple[str, ...], difficulty: np.ndarray
) -> tuple[float | None, bool, np.ndarray]:
    """(C of the published weights, whether they are its optimum to 1 %, the gradient of the model's rows there [3]).

    At the optimum the gradient of the model's own coefficient, which no gamed row has, is minus its sign / C. The
    solver often stops before; C is then the nearest of the grid, or None where none is within a factor of two.
    """
    weights = repository.weights.get(model, np.zeros(3))
    if not repository.annotations(model).is_file() or not weights.all():
        return None, False, np.zeros(3)
    rows = repository.read(model)
    apart = rows.baseline_lengths - rows.lengths
    x = np.stack([np.tanh(apart / apart.std(ddof=1)), difficulty[: len(rows)], np.ones(len(rows))], 1)
    gradient = x.T @ (sigmoid(x @ weights) - rows.preferences)
    inverse = -gradient[2] / np.sign(weights[2])
    nearest = float(glm.CS[np.abs(np.log(glm.CS * max(inverse, 1e-12))).argmin()])
    near = inverse > 0 and 0.5 < inverse * nearest < 2
    return (nearest if near else None), near and abs(inverse * nearest - 1) < 0.01, gradient


def recovered(repository: Repository) -> tuple[Calibration, dict[str, Any]]:
    """The leaderboard's calibration as far as the repository determines it, and how well it does.

    The gamed baselines are the baseline asked to be long and to be short; the repository has their answers, so their
    features. Their preferences enter the fit by two sums alone, X'p. Each published weight is an optimum: its gradient,
    0 but for the penalty's sign / C, gives C (by the model's own coefficient, which no gamed row has) and then the two
    sums, once a model. They agree; the median of them is taken. The preferences themselves, which only the choice of C
    sees, are those that the gamed baselines' own published weights predict, moved to the sums.
    """
    prompts, difficulty, source = difficulties(repository)
    base = repository.outputs(BASELINE)
    apart = []
    for gamed in GAMED:
        outputs = repository.outputs(gamed)
        difference = np.array([len(base[prompt]) - len(outputs[prompt]) for prompt in prompts], dtype=float)
        apart.append(difference / difference.std(ddof=1))
    x = np.stack([np.tanh(np.concatenate(apart)), np.tile(difficulty, 2)], 1)  # [2M, 2]
    sums = []
    for model in repository.weights:
        c, exact, gradient = published_penalty(repository, model, prompts, difficulty)
        if exact and repository.read(model).prompts == prompts:
            weights = repository.weights[model]
            here = gradient[:2] + np.sign(weights[:2]) / c
            sums.append(here / alpaca.GAMED_WEIGHT + x.T @ sigmoid(x @ weights[:2]))
    wanted = np.median(sums, 0)
    own = np.concatenate(
        [np.stack([x[:, 0], x[:, 1], np.ones(len(x))], 1)[half] @ repository.weights[gamed]
         for gamed, half in zip(GAMED, (slice(0, len(prompts)), slice(len(prompts), None)))]
    )  # fmt: skip
    tilt = np.zeros(2)
    for _ in range(50):
        p = sigmoid(own + x @ tilt)
        tilt -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ p - wanted)
    preferences = sigmoid(own + x @ tilt)
    said = {
        "difficulties_from": source, "models": len(sums), "sums": wanted.tolist(),
        "spread_of_sums": (np.quantile(sums, 0.75, 0) - np.quantile(sums, 0.25, 0)).tolist(),
    }  # fmt: skip
    index = np.tile(np.arange(len(prompts)), 2)
    return Calibration(difficulty, preferences, np.concatenate(apart), index, prompts), said


def by_place(rows: Annotations, prompts: tuple[str, ...]) -> Annotations:
    """As the package takes them: row i is instruction i, whatever it asks."""
    return replace(rows, prompts=prompts[: len(rows)])


FOLDS = """
import json, sys
import numpy as np, sklearn
from sklearn.model_selection import GroupKFold
assert tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 9), "scikit-learn " + sklearn.__version__
rows = np.tile(np.arange(int(sys.argv[1])), 2)
print(json.dumps([[part.tolist() for part in fold] for fold in GroupKFold(5).split(rows, groups=rows)]))
"""
# By what numpy sorts with: the processor's vectors, or none, as on the machines of most of the leaderboard's figures.
SORTS = {
    "by vectors": "",
    "plainly": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
}


def old_folds(python: str, without: str) -> Callable[[int], list[tuple[np.ndarray, np.ndarray]]]:
    @lru_cache(64)
    def of(rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
        found = subprocess.run([python, "-W", "ignore", "-c", FOLDS, str(rows)], check=True, capture_output=True,
                               text=True, env=os.environ | {"NPY_DISABLE_CPU_FEATURES": without})  # fmt: skip
        return [(np.array(fitted), np.array(tested)) for fitted, tested in json.loads(found.stdout)]

    return of


def by_old_folds(repository: Repository, calibration: Calibration, python: str, rows: list[dict[str, Any]]) -> None:
    """Adds to each row `old_folds`: the figure by place with each of the old folds."""
    own = glm._folds
    try:
        for sort, without in SORTS.items():
            glm._folds = old_folds(python, without)
            for row in rows:
                if "full_by_place" not in row:
                    continue
                found = alpaca.win_rates(by_place(repository.read(row["model"]), calibration.prompts),
                                         calibration=calibration, allow_missing=True, resamples=0)  # fmt: skip
                row.setdefault("old_folds", {})[sort] = found.length_controlled
    finally:
        glm._folds = own
    for row in rows:
        published = row["published"]["length_controlled_winrate"]
        if "old_folds" in row:
            row |= {f"old folds, sorted {sort}": figure for sort, figure in row["old_folds"].items()}
            choices = [row["full_by_place"], *row["old_folds"].values()]
            row["nearest folds"] = min(choices, key=lambda figure: abs(figure - (published or 0)))


def model_rows(repository: Repository, calibration: Calibration, resamples: int) -> list[dict[str, Any]]:
    out = []
    for model, published in repository.published.items():
        row: dict[str, Any] = {"model": model, "published": {
            name: float(published[name]) if published.get(name) else None
            for name in ("win_rate", "standard_error", "length_controlled_winrate", "lc_standard_error", "avg_length")
        }}  # fmt: skip
        out.append(row)
        c, _, _ = published_penalty(repository, model, calibration.prompts, calibration.difficulties)
        row["published_inverse_penalty"] = c
        if not repository.annotations(model).is_file():
            continue
        rows = repository.read(model)
        minimal = alpaca.win_rates(rows, resamples=resamples)
        full = alpaca.win_rates(rows, calibration=calibration, allow_missing=True, resamples=resamples)
        shifted = alpaca.win_rates(
            by_place(rows, calibration.prompts), calibration=calibration, allow_missing=True, resamples=0
        )
        row |= {
            "prompts": minimal.prompts, "empty_answers": minimal.empty_answers, "win_rate": minimal.win_rate,
            "standard_error": minimal.standard_error, "minimal": minimal.length_controlled,
            "minimal_error": minimal.lc_standard_error, "minimal_note": minimal.note, "full_note": full.note,
            "full": full.length_controlled,
            "full_by_place": shifted.length_controlled, "full_error": full.lc_standard_error,
            "full_interval": full.lc_interval, "full_package_error": full.lc_package_error,
            "coefficients": full.coefficients, "inverse_penalty": shifted.inverse_penalty,
            "published_coefficients": repository.weights[model].tolist() if model in repository.weights else None,
        }  # fmt: skip
        print(
            f"{model}: raw {minimal.win_rate:.3f} ({published['win_rate'][:7]}), minimal "
            f"{minimal.length_controlled:.3f}, full {full.length_controlled:.4f} "
            f"({published['length_controlled_winrate'][:8]}) +- {full.lc_standard_error or 0:.2f}",
            flush=True,
        )
    return out


def same_penalty(row: dict[str, Any]) -> bool:
    ours, theirs = row.get("inverse_penalty"), row["published_inverse_penalty"]
    return None not in (ours, theirs) and abs(np.log(ours / theirs)) < 0.1


def distance(rows: list[dict[str, Any]], name: str, other: str) -> dict[str, Any]:
    from scipy import stats

    pairs = [(row["model"], row[name], row["published"][other]) for row in rows
             if row.get(name) is not None and row["published"][other] is not None]  # fmt: skip
    gaps = {model: abs(ours - theirs) for model, ours, theirs in pairs}
    worst = max(gaps, key=gaps.__getitem__)
    ours, theirs = [p[1] for p in pairs], [p[2] for p in pairs]
    return {
        "models": len(pairs), "mean": statistics.fmean(gaps.values()), "median": statistics.median(gaps.values()),
        "worst": gaps[worst], "worst_model": worst, "within_limit": sum(gap <= LIMIT for gap in gaps.values()),
        "spearman": float(stats.spearmanr(ours, theirs).statistic),
        "kendall": float(stats.kendalltau(ours, theirs).statistic),
    }  # fmt: skip


DISTANCES = {
    "raw win rate": ("win_rate", "win_rate"),
    "length_controlled_minimal": ("minimal", "length_controlled_winrate"),
    "length_controlled_winrate, calibration recovered": ("full_by_place", "length_controlled_winrate"),
    "the same, difficulties by prompt and not by place": ("full", "length_controlled_winrate"),
}
OLD_FOLDS = {
    "by place, folds of scikit-learn below 1.9 sorted by vectors": "old folds, sorted by vectors",
    "by place, folds of scikit-learn below 1.9 sorted plainly": "old folds, sorted plainly",
    "by place, of these three folds the nearest": "nearest folds",
}


def errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the length-controlled rate: ours, by resampling, against the package's of the same fit and the published."""
    here = [row for row in rows if row.get("full_error")]
    known = [row for row in here if row["published"]["lc_standard_error"]]
    of_fit = [row["full_error"] / row["full_package_error"] for row in here]
    published = [row["full_error"] / row["published"]["lc_standard_error"] for row in known]
    return {
        "models": len(here), "ours": statistics.fmean(row["full_error"] for row in here),
        "package": statistics.fmean(row["full_package_error"] for row in here),
        "ratio_median": statistics.median(of_fit), "ratio_least": min(of_fit), "ratio_most": max(of_fit),
        "models_published": len(known), "published_ratio_median": statistics.median(published),
        "published_ratio_least": min(published), "published_ratio_most": max(published),
    }  # fmt: skip


SAME = "the same by place, models whose C came out as in the published weights"


def notes(row: dict[str, Any], prompts: int) -> str:
    said = []
    published = row["published"]
    if row["prompts"] < prompts:
        gap = row["full"] - row["full_by_place"]
        said.append(
            f"{prompts - row['prompts']} missing: from there on the package's difficulties are those of other prompts; "
            f"by prompt it is {gap:+.2f}"
        )
    if abs(row["win_rate"] - published["win_rate"]) > LIMIT:
        said.append("the published raw rate is not that of the published annotations")
    if published["length_controlled_winrate"] is None:
        said.append("no length-controlled figure published")
    elif row["published_coefficients"] is None:
        said.append("no weights published")
    ours, theirs = row["inverse_penalty"], row["published_inverse_penalty"]
    if None not in (ours, theirs) and abs(np.log(ours / theirs)) > 0.1:
        said.append(f"C is {ours:.3g} here and {theirs:.3g} in the published weights")
    if row["empty_answers"]:
        said.append(f"{row['empty_answers']} empty answers")
    return "; ".join(said)


def noted(rows: list[dict[str, Any]], form: str, what: str) -> int:
    return sum(what in (row[form] or "") for row in rows)


def markdown(result: dict[str, Any]) -> str:
    here = [row for row in result["rows"] if "win_rate" in row]
    absent = [row["model"] for row in result["rows"] if "win_rate" not in row]
    lines = [
        f"AlpacaEval 2: {len(here)} of the leaderboard's {len(result['rows'])} models, those whose annotations the "
        "checkout holds;", "figures in points of percent.", "",
        f"| ours against published | models | within {LIMIT} | mean difference | median | worst | of | Spearman | "
        "Kendall |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]  # fmt: skip
    for name, d in result["distances"].items():
        lines.append(f"| {name} | {d['models']} | {d['within_limit']} | {d['mean']:.4f} | {d['median']:.4f} | "
                     f"{d['worst']:.4f} | {d['worst_model']} | {d['spearman']:.4f} | {d['kendall']:.4f} |")  # fmt: skip
    raw, spread, gamed = result["distances"]["raw win rate"], result["errors"], result["calibration"]
    lines += [
        "",
        f"Raw win rates within {LIMIT} of the leaderboard's: {raw['within_limit']} of {raw['models']}.",
        "",
        f"Standard error of the length-controlled rate, means of {spread['models']} models: {spread['ours']:.2f} by "
        f"{result['resamples']} resamples of the instructions, {spread['package']:.2f} by the package's rule.",
        f"The ratio is {spread['ratio_median']:.1f} in the median, {spread['ratio_least']:.1f} to "
        f"{spread['ratio_most']:.1f}; against the {spread['models_published']} published errors "
        f"{spread['published_ratio_median']:.1f}, {spread['published_ratio_least']:.1f} to "
        f"{spread['published_ratio_most']:.1f}. Of the minimal form the package's is 0.",
        "",
        "Figures without an interval, because length and model cannot be told apart or the penalty has set the model's "
        f"coefficient to 0: {noted(here, 'minimal_note', 'no interval')} of the minimal form, "
        f"{noted(here, 'full_note', 'no interval')} of the full. So far from the raw rate that the package would warn: "
        f"{noted(here, 'minimal_note', 'raw one is')} and {noted(here, 'full_note', 'raw one is')}.",
        "",
        f"The calibration is the repository's own: difficulties from the predictions in the annotations of "
        f"{', '.join(gamed['difficulties_from'])}, the gamed baselines' two sums from the published weights of "
        f"{gamed['models']} models (median {gamed['sums'][0]:.2f} and {gamed['sums'][1]:.2f}; between the quartiles "
        f"{gamed['spread_of_sums'][0]:.2f} and {gamed['spread_of_sums'][1]:.2f}).",
        "",
        "| model | raw | published | minimal | full | published | difference | error | published error | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip

    def shown(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for row in here:
        p, lc = row["published"], row["published"]["length_controlled_winrate"]
        gap = None if lc is None else row["full_by_place"] - lc
        lines.append(
            f"| {row['model']} | {row['win_rate']:.3f} | {shown(p['win_rate'], 3)} | {row['minimal']:.2f} | "
            f"{row['full_by_place']:.3f} | {shown(lc, 3)} | {shown(gap, 4)} | {shown(row['full_error'])} | "
            f"{shown(p['lc_standard_error'])} | {notes(row, result['prompts'])} |"
        )
    lines += [
        "",
        "`full` takes the difficulties by place, as the package does, so that it can be held against the published",
        "figure. Where C differs: folds choose it, and below 1.9 scikit-learn's folds were those of the processor; and",
        "the gamed baselines' own preferences, which the choice sees, are in annotations of the repository that are",
        f"not read here ({' and '.join(f'results/{name}' for name in GAMED)}, files above 4 MiB that our copy lacks).",
        "",
        f"Not in the checkout ({len(absent)}): {', '.join(absent)}.",
        "",
    ]
    return "\n".join(lines)


PACKAGE = r"""
import json, sys, time, warnings
from importlib.metadata import version
warnings.filterwarnings("ignore")
from alpaca_eval import utils
from alpaca_eval.metrics import glm_winrate
import sklearn
path = sys.argv[1]
glm_winrate.hf_hub_download = lambda **_: path
print(json.dumps({"alpaca-eval": version("alpaca-eval"), "scikit-learn": sklearn.__version__}), flush=True)
for line in sys.stdin:
    form, files = json.loads(line)
    start, found = time.perf_counter(), []
    for file in files:
        rows = utils.load_or_convert_to_dataframe(file)
        found.append(float(glm_winrate.get_length_controlled_winrate(
            rows, glm_name=form, save_weights_dir=None, is_add_glm_preference_inplace=False,
            is_warn_extreme_changes=False)["length_controlled_winrate"]))
    print(json.dumps([time.perf_counter() - start, found]), flush=True)
"""


def speed(repository: Repository, calibration: Calibration, python: str, rounds: int) -> dict[str, Any]:
    """All models from their files, the package and ours in turn, `rounds` times each; the medians of the totals."""
    files, sizes = [], []
    for model in repository.published:
        path = repository.annotations(model)
        if model != BASELINE and path.is_file():
            files.append(path)
            sizes.append(len(repository.read(model)))
    plain = replace(calibration, prompts=None)
    whole = [str(path) for path, size in zip(files, sizes) if size == len(calibration.difficulties)]
    forms = {"length_controlled_minimal": ("length_controlled_minimal", None, list(map(str, files))),
             "length_controlled_winrate": ("length_controlled_v1", plain, whole)}  # fmt: skip
    result: dict[str, Any] = {"rounds": rounds, "cores": len(os.sched_getaffinity(0)), "forms": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "df_gamed.csv"
        write_calibration(calibration, path)
        plain = alpaca.load_calibration(path)
        with subprocess.Popen([python, "-c", PACKAGE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}) as package:  # fmt: skip

            def ask(form: str, which: list[str]) -> tuple[float, list[float]]:
                package.stdin.write(json.dumps([form, which]) + "\n")
                package.stdin.flush()
                return tuple(json.loads(package.stdout.readline()))

            result["package"] = json.loads(package.stdout.readline())
            for form, (theirs, held, which) in forms.items():
                held = held and plain
                ask(theirs, which[:2])
                for workers in (1, None):
                    alpaca.leaderboard(which[:4], workers=workers, calibration=held, resamples=0)
                seconds: dict[str, list[float]] = {"package": [], "one process": [], "all cores": []}
                apart = 0.0
                names = [alpaca.read_annotations(path).model for path in which]
                for _ in range(rounds):
                    taken, figures = ask(theirs, which)
                    seconds["package"].append(taken)
                    for name, workers in (("all cores", None), ("one process", 1)):
                        start = time.perf_counter()
                        found = alpaca.leaderboard(which, workers=workers, calibration=held, resamples=0)
                        seconds[name].append(time.perf_counter() - start)
                        ours = {f.model: f.length_controlled for f in found}
                        assert set(ours) == set(names)
                        apart = max(apart, *(abs(ours[name] - figure) for name, figure in zip(names, figures)))
                result["forms"][form] = {"models": len(which), "seconds": seconds, "largest_difference": apart}
                print(form, len(which), {k: round(statistics.median(v), 3) for k, v in seconds.items()}, apart)
            package.stdin.close()
    return result


def write_calibration(calibration: Calibration, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["model", "preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
        )
        for p, length, index in zip(
            calibration.gamed_preferences, calibration.gamed_lengths, calibration.gamed_index.tolist()
        ):
            writer.writerow(["gamed", repr(float(p)), index, repr(float(length)),
                             repr(float(calibration.difficulties[index])), False])  # fmt: skip


def speed_markdown(result: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {version}" for name, version in result["package"].items())
    lines = [
        f"Length-controlled win rates from the files of annotations, all models that the checkout holds; {said}. "
        f"Medians of {result['rounds']} rounds, taken in turn; {result['cores']} cores; without errors by resampling.",
        "",
        "| form | models | package | one process | times | all cores | times | largest difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for form, found in result["forms"].items():
        package, one, cores = (
            statistics.median(found["seconds"][name]) for name in ("package", "one process", "all cores")
        )
        lines.append(
            f"| {form} | {found['models']} | {package:.2f} s | {one:.2f} s | {package / one:.1f} | {cores:.2f} s | "
            f"{package / cores:.1f} | {found['largest_difference']:.0e} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="a checkout of tatsu-lab/alpaca_eval")
    parser.add_argument("--resamples", type=int, default=1000, help="of the instructions, for a standard error")
    parser.add_argument("--speed", action="store_true", help="time it against the alpaca-eval package instead")
    parser.add_argument("--package-python", default=sys.executable, help="a Python with alpaca-eval and patsy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--old-folds-python", help="a Python with scikit-learn below 1.9")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    repository = Repository(args.annotations)
    calibration, said = recovered(repository)
    if args.speed:
        result = speed(repository, calibration, args.package_python, args.rounds) | {
            "machine_info": common.environment()
        }
        text, name = speed_markdown(result), "evals_alpaca_speed"
        wrong = [form for form, found in result["forms"].items() if found["largest_difference"] > 1e-6]
    else:
        rows = model_rows(repository, calibration, args.resamples)
        distances = dict(DISTANCES)
        if args.old_folds_python:
            by_old_folds(repository, calibration, args.old_folds_python, rows)
            distances |= {name: (row, "length_controlled_winrate") for name, row in OLD_FOLDS.items()}
        result = {
            "machine_info": common.environment(), "prompts": len(calibration.difficulties),
            "resamples": args.resamples, "calibration": said,
            "distances": {name: distance(rows, *columns) for name, columns in distances.items()}
            | {SAME: distance(list(filter(same_penalty, rows)), "full_by_place", "length_controlled_winrate")},
            "errors": errors(rows),
            "rows": rows,
        }  # fmt: skip
        text, name, wrong = markdown(result), "evals_alpaca", []
    print(text)
    if not args.no_write:
        print(common.write_result(name, result, text))
    if wrong:
        raise SystemExit(f"not the package's figures: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

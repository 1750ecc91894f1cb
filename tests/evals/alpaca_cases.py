"""Fifty made cases, and what the alpaca-eval package says of each: alpaca_cases.json.

    python tests/evals/alpaca_cases.py

with alpaca-eval 0.6.6 and patsy installed writes that file again. Every case is drawn from its number; the package's
function gets the rows and, in place of the hub's file, a made df_gamed.csv, drawn too.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent
FROZEN = FOLDER / "alpaca_cases.json"
CASES = 50
FORMS = {
    "length_controlled_v1": "length_controlled_winrate",
    "length_controlled_noreg": "length_controlled_noreg",
    "length_controlled_minimal": "length_controlled_minimal",
}  # the package's names, and ours
SIZES = (60, 120, 250, 400, 805)
KINDS = ("soft", "hard", "copies", "empty", "unjudged", "no answer", "ties", "weak", "strong", "itself")


def gamed(number: int) -> list[dict[str, Any]]:
    """df_gamed.csv of case `number`: two gamed baselines, one that is longer and one that is shorter."""
    draw, count = np.random.default_rng([1, number]), SIZES[number % len(SIZES)]
    difficulties = draw.normal(0, 0.8, count)
    rows = []
    for model, longer in (("verbose", -0.8), ("concise", 0.9)):
        apart = draw.normal(longer, 0.9, count)
        won = 1 / (1 + np.exp(1.2 * np.tanh(apart) - 0.7 * difficulties + draw.normal(0, 1, count)))
        rows += [
            {"model": model, "preference": float(won[i]), "index": i, "std_delta_len": float(apart[i]),
             "instruction_difficulty": float(difficulties[i]), "not_gamed_baseline": False}
            for i in range(count)
        ]  # fmt: skip
    return rows


def write_gamed(number: int, path: Path) -> Path:
    rows = gamed(number)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def form(number: int) -> str:
    return list(FORMS)[number % 3]


def kind(number: int) -> str:
    return KINDS[(number // 5) % len(KINDS)]


def annotations(number: int) -> list[dict[str, Any]]:
    """The rows of case `number`, as annotations.json has them."""
    draw, count, what = np.random.default_rng([2, number]), SIZES[number % len(SIZES)], kind(number)
    lengths = np.round(np.exp(draw.normal(6.5, 0.6, count))).astype(int)
    ours = np.round(lengths * np.exp(draw.normal(draw.normal(0, 0.3), 0.4, count))).astype(int)
    level = {"weak": -3.0, "strong": 2.5}.get(what, draw.normal(-0.5, 0.8))
    logits = level + 1.5 * np.tanh((ours - lengths) / 500) + draw.normal(0, 1.5, count)
    won = 1 / (1 + np.exp(-logits))
    preferences: list[float | None] = list((1 + (won if what != "hard" else (draw.random(count) < won))).tolist())
    first = ["x" * n for n in lengths]
    second: list[str | None] = ["x" * n for n in ours]
    some = draw.choice(count, count // 10, replace=False)
    for row in some:
        if what == "copies":  # answers that are the baseline's
            second[row], preferences[row] = first[row], 1.5
        elif what == "empty":
            second[row], preferences[row] = "", 1.0
        elif what == "unjudged":
            preferences[row] = None
        elif what == "no answer" and form(number) != "length_controlled_v1":  # there the package fails
            second[row] = None
        elif what == "ties":
            preferences[row] = 0.0 if row % 2 else 1.5
    model = "baseline" if what == "itself" else "model"
    return [
        {"instruction": f"instruction {i}", "output_1": first[i], "output_2": second[i], "generator_1": "baseline",
         "generator_2": model, "annotator": "judge", "preference": preferences[i]}
        for i in range(count)
    ]  # fmt: skip


def package_figures(number: int, path: Path) -> dict[str, float]:
    """What the package's function returns for case `number`; `path` is where its df_gamed.csv goes."""
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    write_gamed(number, path)
    glm_winrate.hf_hub_download = lambda **_: str(path)
    found = glm_winrate.get_length_controlled_winrate(
        pd.DataFrame(annotations(number)), glm_name=form(number), save_weights_dir=None, is_warn_extreme_changes=False,
        is_add_glm_preference_inplace=False,
    )  # fmt: skip
    return {name: float(value) for name, value in found.items()}


if __name__ == "__main__":
    import tempfile
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as folder:
        table = [package_figures(number, Path(folder) / "df_gamed.csv") for number in range(CASES)]
    said = {name: version(name) for name in ("alpaca-eval", "scikit-learn", "pandas", "patsy", "numpy")}
    FROZEN.write_text(json.dumps({"versions": said, "cases": table}, indent=1) + "\n")
    print(f"{FROZEN}: {len(table)} cases, {said}", file=sys.stderr)

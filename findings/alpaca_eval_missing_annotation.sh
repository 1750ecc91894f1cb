#!/bin/sh
# alpaca_eval 0.6.6: the length-controlled win rate gives row i of the annotations the difficulty of instruction i. Where an
# annotation is missing, as of several models of its leaderboard, every later row has the difficulty of another
# instruction, without a word: the figure is a different one. Annotations as the package writes them have no number of the
# instruction; with a column "index" of them it is right.
# The hub's df_gamed.csv is a made one here; the annotations are made too.
# Seen: alpaca_eval 0.6.6, scikit-learn 1.9.1: 805 annotations 14.03; without the first 13.18; without the last 14.06; without
#       the first, with its column 14.05
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile alpaca-eval==0.6.6 patsy==1.0.3 scikit-learn==1.9.1 pandas==3.1.1 numpy==2.4.6 \
    scipy==1.17.1
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$folder/hf" \
    "$folder/venv/bin/python" -I -W ignore - "$folder" 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
from alpaca_eval.metrics import glm_winrate

count, draw = 805, np.random.default_rng(0)
path = sys.argv[1] + "/df_gamed.csv"
glm_winrate.hf_hub_download = lambda **_: path
difficulty = draw.normal(0, 1.2, count)


def preferences(apart, level):
    return 1 / (1 + np.exp(1.2 * np.tanh(apart) - 1.2 * difficulty - level - draw.normal(0, 0.7, count)))


gamed = []
for longer in (-0.8, 0.9):
    apart = draw.normal(longer, 0.9, count)
    gamed.append(pd.DataFrame({
        "model": "gamed", "preference": preferences(apart, 0), "index": range(count), "std_delta_len": apart,
        "instruction_difficulty": difficulty, "not_gamed_baseline": False,
    }))
pd.concat(gamed).to_csv(path, index=False)
base = np.round(np.exp(draw.normal(7, 0.5, count)))
ours = np.round(base * np.exp(draw.normal(-0.7, 0.3, count)))
apart = base - ours
rows = pd.DataFrame({
    "instruction": [f"instruction {i}" for i in range(count)], "index": range(count),
    "output_1": ["x" * int(n) for n in base], "output_2": ["x" * int(n) for n in ours], "generator_1": "base",
    "generator_2": "new", "annotator": "judge", "preference": 1 + preferences(apart / apart.std(), -2.5),
})


def rate(rows, drop=("index",)):
    return float(glm_winrate.get_length_controlled_winrate(
        rows.drop(columns=list(drop)).reset_index(drop=True), save_weights_dir=None, is_add_glm_preference_inplace=False,
        is_warn_extreme_changes=False,
    )["length_controlled_winrate"])


whole, without_first, without_last = rate(rows), rate(rows[1:]), rate(rows[:-1])
numbered = rate(rows[1:], drop=())
print(
    f"alpaca_eval {version('alpaca-eval')}, scikit-learn {version('scikit-learn')}: 805 annotations {whole:.2f}; without the "
    f"first {without_first:.2f}; without the last {without_last:.2f}; without the first, with its column {numbered:.2f}"
)
as_stated = max(abs(without_last - whole), abs(numbered - whole)) < 0.1 and abs(without_first - whole) > 0.5
sys.exit(0 if as_stated else 1)
PY

#!/bin/sh
# alpaca_eval 0.6.6: lc_standard_error, beside the length-controlled win rate, is the standard deviation of the predicted
# preferences over the root of their number. The regression that predicts them is taken for certain: without the
# instruction difficulties all predictions are one number and the error is 0; with them it is several times smaller than
# the spread of the figure over samples of the same judge and models. standard_error, of the raw win rate, is right.
# The hub's df_gamed.csv is a made one here; the annotations are made too: 200 samples of 805.
# Seen: alpaca_eval 0.6.6, scikit-learn 1.9.1: length_controlled_v1: lc_standard_error 0.21 in the mean, spread of the figure
#       0.69; length_controlled_minimal: lc_standard_error 0.0000, spread 0.69; raw: standard_error 0.71, spread 0.69
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
difficulty = draw.normal(0, 0.6, count)


def preferences(apart, difficulty, level):
    return 1 / (1 + np.exp(1.2 * np.tanh(apart) - 0.7 * difficulty - level - draw.normal(0, 1, len(apart))))


gamed = []
for longer in (-0.8, 0.9):
    apart = draw.normal(longer, 0.9, count)
    gamed.append(pd.DataFrame({
        "model": "gamed", "preference": preferences(apart, difficulty, 0), "index": range(count), "std_delta_len": apart,
        "instruction_difficulty": difficulty, "not_gamed_baseline": False,
    }))
pd.concat(gamed).to_csv(path, index=False)


def sample():
    """Annotations of one model: lengths and the judge's noise anew, the instructions drawn of one population."""
    base = np.round(np.exp(draw.normal(7, 0.5, count)))
    ours = np.round(base * np.exp(draw.normal(-0.2, 0.4, count)))
    apart = base - ours
    own = draw.normal(0, 1, count)  # what else an instruction is harder by
    won = preferences(apart / apart.std(), difficulty + own, -1.5)
    return pd.DataFrame({
        "output_1": ["x" * int(n) for n in base], "output_2": ["x" * int(n) for n in ours], "generator_1": "base",
        "generator_2": "new", "annotator": "judge", "preference": 1 + won,
    })


found = {name: [] for name in ("length_controlled_v1", "length_controlled_minimal")}
for _ in range(200):
    rows = sample()
    for name, figures in found.items():
        figures.append(glm_winrate.get_length_controlled_winrate(
            rows, glm_name=name, save_weights_dir=None, is_add_glm_preference_inplace=False, is_warn_extreme_changes=False
        ))
said = {}
for name, figures in found.items():
    table = pd.DataFrame(figures).astype(float)
    said[name] = table["lc_standard_error"].mean(), table["length_controlled_winrate"].std()
    raw = table["standard_error"].mean(), table["win_rate"].std()
v1, minimal = said.values()
print(
    f"alpaca_eval {version('alpaca-eval')}, scikit-learn {version('scikit-learn')}: length_controlled_v1: lc_standard_error "
    f"{v1[0]:.2f} in the mean, spread of the figure {v1[1]:.2f}; length_controlled_minimal: lc_standard_error "
    f"{minimal[0]:.4f}, spread {minimal[1]:.2f}; raw: standard_error {raw[0]:.2f}, spread {raw[1]:.2f}"
)
as_stated = v1[0] < v1[1] / 2 and minimal[0] < 1e-6 and minimal[1] > 0.5 and 0.8 < raw[0] / raw[1] < 1.25
sys.exit(0 if as_stated else 1)
PY

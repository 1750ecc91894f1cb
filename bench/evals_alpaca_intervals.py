"""How often the resampled interval of AlpacaEval's length-controlled rate holds the truth.

    python bench/evals_alpaca_intervals.py [--seeds 100]

By how far the model's column of the regression stands apart from the length's: `_APART` of fastpo/evals/alpaca.py is
chosen by it. Made annotations in the minimal form: the model is longer by some standard deviations of the difference of
lengths, and wins by a logistic model, with and without the judge's love of length, so that the rate at equal lengths is
known. Fits whose model coefficient is 0 are left out: they have no interval.
"""

import argparse
import itertools
from collections import defaultdict

import numpy as np

from fastpo.evals import alpaca, glm

LEVEL = 0.85  # log-odds at equal lengths
EDGES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 1.01)
RESAMPLES = 100


def made(count: int, apart: float, love: float, seed: int) -> alpaca.Annotations:
    draw = np.random.default_rng([seed, count, int(100 * apart), int(-100 * love)])
    longer = np.round(100 * (apart + draw.normal(size=count)))
    chance = 1 / (1 + np.exp(-LEVEL - love * np.tanh(-longer / longer.std(ddof=1))))
    won = (draw.random(count) < chance).astype(float)
    return alpaca.Annotations(won, 5000 + longer, np.full(count, 5000.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    args = parser.parse_args()
    truth = 1 / (1 + np.exp(-LEVEL))
    held: dict[int, list[bool]] = defaultdict(list)
    for seed, count, apart, love in itertools.product(
        range(args.seeds), (100, 300), (0, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 4), (0.0, -1.5)
    ):
        design = alpaca._design(made(count, apart, love, seed), None, False, False)
        coefficients, c = glm.fit(design.x, design.targets, design.weights)
        if coefficients[-1] == 0:
            continue
        low, high = np.quantile(alpaca._resampled(design, coefficients, c, RESAMPLES, seed), (0.025, 0.975))
        held[int(np.searchsorted(EDGES, design.apart_from_length, side="right"))].append(bool(low <= truth <= high))
    for place, found in sorted(held.items()):
        print(f"{EDGES[place - 1]:.2f} to {EDGES[place]:.2f}: {np.mean(found):.3f} of {len(found)}")


if __name__ == "__main__":
    main()

"""RewardBench's own functions on made inputs, as numbers that tests/evals/test_rewardbench.py holds ours to.

    python tests/rewardbench_parity.py --analysis FOLDER    # writes tests/evals/rewardbench_parity.json

Needs the package rewardbench (pip install rewardbench, or its repository on PYTHONPATH), whose functions are called as
they are, and for the leaderboard's mean a checkout of github.com/allenai/reward-bench at FOLDER: analysis/ is not in
the package. The inputs are made from seeds, here and in the test alike.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

WHERE = Path(__file__).parent / "evals" / "rewardbench_parity.json"
SEEDS = range(20)


def made_subsets(seed: int, names: list[str], whole: bool) -> dict[str, float]:
    """An accuracy for each subset, or for most of them."""
    rng = random.Random(seed)
    return {name: rng.random() for name in sorted(names) if whole or rng.random() < 0.7}


def made_groups(seed: int) -> list[list[float]]:
    """Scores of four answers and more, the right one's first; coarse, so that many are equal."""
    rng = random.Random(1000 + seed)
    return [[float(rng.randrange(4)) for _ in range(rng.randint(2, 6))] for _ in range(30)]


def made_ties(seed: int) -> list[tuple[str, int, list[float]]]:
    """(id, right answers, scores) of Ties; some spreads and gaps are 0, some numbers have one of the two prompts."""
    rng = random.Random(2000 + seed)

    def scores(right: int, wrong: int) -> list[float]:
        coarse = rng.random() < 0.4
        of_right = [rng.gauss(1.5, 1) for _ in range(right)]
        of_wrong = [rng.gauss(0, 1) for _ in range(wrong)]
        return [float(round(s)) if coarse else s for s in of_right + of_wrong]

    rows = []
    for number in range(25):
        if number % 11 or seed % 2:
            rows.append((f"ref:{number}", 1, scores(1, rng.randint(1, 5))))
        if number % 7 or seed % 2:
            right = rng.randint(2, 6)
            rows.append((f"tied:{number}", right, scores(right, rng.randint(1, 9))))
    rng.shuffle(rows)
    return rows


# ---- the package


def their_sections(subsets: dict[str, float]) -> dict[str, float]:
    from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
    from rewardbench.utils import calculate_scores_per_section

    return calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, subsets)


def their_best_of(groups: list[list[float]]) -> list[float]:
    from datasets import Dataset
    from rewardbench.utils import reroll_and_score_dataset

    flat = [
        {"text": "t", "scores": s, "group": n} for n, group in enumerate(groups) for s in group
    ]  # fmt: skip
    return list(reroll_and_score_dataset(Dataset.from_list(flat), [len(g) for g in groups])["results"])


def their_ties(rows: list[tuple[str, int, list[float]]]) -> float:
    from datasets import Dataset
    from rewardbench.utils import process_single_model

    given = [{"id": name, "num_correct": right, "scores": scores} for name, right, scores in rows]
    return process_single_model(Dataset.from_list(given))[1]


def their_overall(folder: str, subsets: dict[str, float], prior: dict[str, float] | None) -> float:
    sys.path.insert(0, folder)
    import pandas
    from analysis.get_benchmark_results import get_average_over_rewardbench

    frame = pandas.DataFrame([{"model": "m", "model_type": "t", **subsets}])
    names = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
    priors = pandas.DataFrame([{"model": "m" if prior else "another", **(prior or dict.fromkeys(names, 0.5))}])
    return float(get_average_over_rewardbench(frame, priors)["average"].iloc[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--analysis", required=True, metavar="FOLDER")
    args = parser.parse_args()
    import numpy
    import rewardbench
    from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING

    names = list(EXAMPLE_COUNTS)
    prior = ["anthropic_helpful", "anthropic_hhh", "shp", "summarize"]
    numpy.seterr(all="ignore")
    out: dict[str, Any] = {
        "rewardbench": rewardbench.__version__,
        "counts": EXAMPLE_COUNTS,
        "sections": SUBSET_MAPPING,
        "section_scores": [their_sections(made_subsets(seed, names, whole=seed % 2 == 0)) for seed in SEEDS],
        "overall": [
            their_overall(
                args.analysis,
                made_subsets(seed, names, whole=True),
                made_subsets(seed, prior, whole=True) if seed % 2 else None,
            )
            for seed in SEEDS
        ],
        "best_of": [their_best_of(made_groups(seed)) for seed in SEEDS],
        "ties": [their_ties(made_ties(seed)) for seed in SEEDS],
    }
    WHERE.write_text(json.dumps(out, indent=1) + "\n")
    print(f"rewardbench {rewardbench.__version__}: written to {WHERE}")


if __name__ == "__main__":
    main()

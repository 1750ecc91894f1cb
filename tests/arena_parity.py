"""Arena-Hard's own functions on made judgments, as numbers that tests/evals/test_pairwise.py holds ours to.

    python tests/arena_parity.py --repository FOLDER    # writes tests/evals/arena_parity.json

FOLDER is a git repository of github.com/lmarena/arena-hard-auto. Its show_result.py and utils/ run as they are, in a
temporary folder, on judgments and answers in the repository's form; needs pandas and tqdm. Recorded: the share of
points of each model, which its leaderboard is without style control, and of its style-controlled fit the strengths,
once for all games and with more steps than its fifty, at which it stops short. The judgments are made from a seed,
here and in the test alike.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WHERE = Path(__file__).parent / "evals" / "arena_parity.json"
BASELINE = "o3-mini-2025-01-31"  # of the repository's settings for hard prompts
MODELS = {"some-7b": -0.7, "other-70b": 0.4, "third": 0.1}
CONTROL = ["length", "markdown"]  # one alone takes columns of models in the place of styles there
LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A", "A<B", "A<<B", "B=A", "B<A", "B<<A")
PROMPTS = 120


def made_answers(model: str) -> list[dict[str, Any]]:
    rng, longer = random.Random(model), MODELS.get(model, 0.0)
    return [
        {"uid": f"{n:016x}", "model": model,
         "metadata": {"token_len": int(200 * (1 + longer) * rng.uniform(0.2, 2)) + 1,
                      "header_count": {"h1": rng.randrange(3), "h2": rng.randrange(2)},
                      "list_count": {"ordered": rng.randrange(9), "unordered": rng.randrange(9)},
                      "bold_count": {"**": rng.randrange(12), "__": 0}}}
        for n in range(PROMPTS)
    ]  # fmt: skip


def made_judgments(model: str) -> list[dict[str, Any]]:
    """Both orders of each prompt, as gen_judgment.py writes them: the baseline is A in the first. Some have failed."""
    rng, rows = random.Random(f"judge {model}"), []
    answers, theirs = made_answers(model), made_answers(BASELINE)
    for n in range(PROMPTS):
        seen = MODELS[model] + 0.004 * (answers[n]["metadata"]["token_len"] - theirs[n]["metadata"]["token_len"])
        games: list[Any] = []
        for sign in (-1, 1):  # of the model's lead, for A
            lead = sign * seen + rng.gauss(0, 1)
            label = LABELS[sum(lead < edge for edge in (1.2, 0.3, -0.3, -1.2))]
            games.append({"score": rng.choice([label, *(x for x in LABELS[5:] if _turned(x) == label)])})
        if rng.random() < 0.04:
            games[rng.randrange(2)] = rng.choice([None, {"score": None}])
        rows.append({"uid": f"{n:016x}", "category": "hard_prompt", "judge": "made", "model": model,
                     "baseline": BASELINE, "games": games})  # fmt: skip
    return rows


def _turned(label: str) -> str:
    return label[::-1].translate(str.maketrans("<>", "><"))


RUN = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import show_result
from utils import math_utils

baseline, control = json.loads(sys.argv[1])
once = {}

def fit(features, outcomes, loss_type, **_):
    found, _ = math_utils.fit_pairwise_model(features, outcomes, loss_type, max_epochs=5000)
    once["fit"] = found.double().tolist()
    return found.repeat(2, 1), None

show_result.bootstrap_pairwise_model = fit
battles = show_result.load_judgments(["made"], "made")
shares = battles[["model", "scores"]].astype({"scores": float}).groupby("model").mean()["scores"].to_dict()
show_result.print_leaderboard_with_style_features(battles.copy(), "made", "hard_prompt", control)
names = sorted({*battles.model, baseline})
strengths = once["fit"][:len(names)]
styled = {name: s - strengths[names.index(baseline)] for name, s in zip(names, strengths)}
json.dump({"shares": shares, "styled": styled}, open("found.json", "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "utils").mkdir()
        for file in ("show_result.py", "utils/math_utils.py", "utils/judge_utils.py"):
            text = subprocess.run(["git", "-C", args.repository, "show", f"HEAD:{file}"], check=True,
                                  capture_output=True, text=True).stdout  # fmt: skip
            (folder / file).write_text(text)
        for what, models, make in (
            ("model_answer", [*MODELS, BASELINE], made_answers), ("model_judgment/made", [*MODELS], made_judgments),
        ):  # fmt: skip
            where = folder / "data/made" / what
            where.mkdir(parents=True)
            for model in models:
                (where / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make(model)))
        (folder / "run.py").write_text(RUN)
        subprocess.run([sys.executable, "run.py", json.dumps([BASELINE, CONTROL])], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        WHERE.write_text(json.dumps(json.loads((folder / "found.json").read_text()), indent=1) + "\n")
    print(f"wrote {WHERE}")


if __name__ == "__main__":
    main()

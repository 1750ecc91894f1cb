"""WildBench's own scripts on made evaluations, as numbers that tests/evals/test_wildbench.py holds ours to.

    python tests/wildbench_parity.py --repository FOLDER    # writes tests/evals/wildbench_parity.json

FOLDER is a git repository of github.com/allenai/WildBench. Its leaderboard/data_dir/_create_tables.py and
_merge_results.py run as they are, in a temporary folder; a module `datasets` beside them gives the made prompts in
place of the hub's. The evaluations are made from a seed, here and in the test alike.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WHERE = Path(__file__).parent / "evals" / "wildbench_parity.json"
BASELINES = {
    "gpt4t": "gpt-4-turbo-2024-04-09", "haiku": "claude-3-haiku-20240307", "llama": "Llama-2-70b-chat-hf",
}  # fmt: skip
MODELS = ("some-7b-chat", "other-70b", "claude-3-haiku-20240307")  # one of them a baseline
MARGINS = (-1, 0, 100, 500, 3000)
TAGS = (
    "Information seeking", "Creative Writing", "Coding & Debugging", "Reasoning", "Editing", "Math", "Planning",
    "Brainstorming", "Role playing", "Advice seeking", "Data Analysis", "Others",
)  # fmt: skip
PROMPTS = 160


def made_prompts() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"id": f"{n:08x}", "primary_tag": rng.choice(TAGS), "secondary_tags": rng.sample(TAGS, rng.randrange(4))}
        for n in range(PROMPTS)
    ]


def made_answer(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.05:
        return "[This model response is empty.]"
    return "x" * rng.choice([1, 99, 100, 101, 600, 601, 1100, rng.randrange(4000)]) + (
        "... (truncated)" if kind < 0.12 else ""
    )


def made_comparisons(model: str, baseline: str) -> list[dict[str, Any]]:
    """Some prompts have none, as in the published files."""
    rng = random.Random(f"{model} {baseline}")
    rows = []
    for prompt in made_prompts():
        if rng.random() < 0.03:
            continue
        names = [f"org/{model}", f"org/{baseline}"]
        winner = rng.choice([*names, *names, "tie"])
        outputs = {name: made_answer(rng) for name in rng.sample(names, 2)}
        rows.append({"session_id": prompt["id"], "winner": winner, "model_outputs": outputs,
                     "extent": 0 if winner == "tie" else rng.choice([1, 1, 2])})  # fmt: skip
    return rows


def made_ratings(model: str) -> list[dict[str, Any]]:
    rng = random.Random(model)
    rows = []
    for prompt in made_prompts():
        if rng.random() < 0.03:
            continue
        answer = made_answer(rng)
        score = rng.randint(2, 20) / 2
        rows.append({"session_id": prompt["id"], "model_test": f"org/{model}", "score": rng.choice([str(score), score]),
                     "model_output": "" if answer.startswith("[") else answer})  # fmt: skip
    return rows


STAND_IN = """
import json
def load_dataset(*_, **__):
    return json.load(open("prompts.json"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", required=True, metavar="FOLDER")
    args = parser.parse_args()

    def shown(what: str) -> str:
        done = subprocess.run(["git", "-C", args.repository, *what.split()], capture_output=True, text=True, check=True)
        return done.stdout

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = folder / "leaderboard" / "data_dir"
        tables.mkdir(parents=True)
        for script in ("_create_tables.py", "_merge_results.py"):
            (tables / script).write_text(shown(f"show HEAD:leaderboard/data_dir/{script}"))
        (folder / "datasets.py").write_text(STAND_IN)
        (folder / "tabulate.py").write_text("tabulate = str\n")
        (folder / "prompts.json").write_text(json.dumps(made_prompts()))
        (tables / "all_stat.json").write_text("{}")
        (tables / "wb_elo_results.json").write_text('{"elo_stat": {}}')
        for baseline in BASELINES.values():
            where = folder / "eval_results/v2.0522/pairwise.v2/eval=gpt-4-turbo-2024-04-09" / f"ref={baseline}"
            where.mkdir(parents=True)
            for model in MODELS:
                if model != baseline:
                    (where / f"{model}.json").write_text(json.dumps(made_comparisons(model, baseline)))
        where = folder / "eval_results/v2.0625/score.v2/eval=gpt-4o-2024-05-13"
        where.mkdir(parents=True)
        for model in MODELS:
            (where / f"{model}.json").write_text(json.dumps(made_ratings(model)))

        def run(script: str, *words: str) -> None:
            command = [sys.executable, str(tables / script), *words]
            subprocess.run(command, cwd=folder, env={"PYTHONPATH": name}, check=True, capture_output=True)

        run("_create_tables.py", "score")
        for short in BASELINES:
            for margin in MARGINS:
                run("_create_tables.py", f"pairwise-{short}", str(margin))
        run("_merge_results.py")
        read = lambda path: json.loads((tables / path).read_text())  # noqa: E731
        out = {
            "commit": shown("rev-parse HEAD").strip(),
            "score": read("score.json"),
            "reward": {
                str(margin): {short: read(f"pairwise-{short}-K={margin}.json") for short in BASELINES}
                for margin in MARGINS
            },
            "merged": {str(margin): read(f"all_stat_wildbench.{margin}.json") for margin in (-1, 100, 500, 3000)},
        }
    WHERE.write_text(json.dumps(out, indent=None, separators=(",", ":")) + "\n")
    print(f"WildBench {out['commit'][:10]}: written to {WHERE}")


if __name__ == "__main__":
    main()

"""bench/evals_wildbench.py on a repository of made evaluations, whole and with files that are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import wildbench_parity as made

ROOT = Path(__file__).resolve().parent.parent.parent
FROZEN = json.loads((Path(__file__).parent / "wildbench_parity.json").read_text())
SCRIPT = 'PAIRWISE_FOLDER = "eval_results/v2.0522"\nSCORE_FOLDER = "eval_results/v2.0625"\n'


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wildbench")
    for baseline in made.BASELINES.values():
        for model in made.MODELS:
            if model != baseline:
                write(folder / f"eval_results/v2.0522/pairwise.v2/eval=j/ref={baseline}/{model}.json",
                      made.made_comparisons(model, baseline))  # fmt: skip
    for model in made.MODELS:
        write(folder / f"eval_results/v2.0625/score.v2/eval=gpt-4o-2024-05-13/{model}.json", made.made_ratings(model))
    tables = folder / "leaderboard/data_dir"
    write(tables / "score.json", FROZEN["score"])
    write(tables / "_create_tables.py", SCRIPT)
    for margin in (-1, 500):
        for short in made.BASELINES:
            write(tables / f"pairwise-{short}-K={margin}.json", FROZEN["reward"][str(margin)][short])
        write(tables / f"all_stat_wildbench.{margin}.json", FROZEN["merged"][str(margin)])
    write(folder / "prompts.json", [
        {**row, "conversation_input": [{"role": "user", "content": "q"}], "checklist": []}
        for row in made.made_prompts()
    ])  # fmt: skip
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "made")
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def git(folder, *words):
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def run(clone, out, *options):
    command = [sys.executable, str(ROOT / "bench" / "evals_wildbench.py"), "--evaluations", str(clone), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "GIT_NO_LAZY_FETCH": "1"}
    done = subprocess.run([*command, "--folder", str(out)], env=environment, capture_output=True, text=True)
    path = out / "evals_wildbench.json"
    return done, json.loads(path.read_text()) if path.exists() else None


def test_a_whole_clone_with_tasks(clone, tmp_path):
    done, result = run(clone, tmp_path, "--tasks", str(clone / "prompts.json"))
    assert done.returncode == 0, done.stderr
    assert not result["absent"] and result["files"] == 11
    assert len(result["scores"]) == 3 and len(result["comparisons"]) == 8 * 4
    for row in result["scores"]:
        assert len(row["difference"]) == 9 and max(map(abs, row["difference"].values())) < 1e-12
    published = [row for row in result["comparisons"] if "published" in row]
    assert len(published) == 8 * 2
    assert all(len(row["difference"]) == 13 and max(map(abs, row["difference"].values())) < 1e-12 for row in published)
    assert len(result["tables"]["rewards"]) == 16 and len(result["tables"]["merged"]) == 6
    text = (tmp_path / "evals_wildbench.md").read_text()
    assert "| some-7b-chat | v2.0625 |" in text and "computed above" in text


@pytest.mark.slow
def test_missing_files_are_named_and_wrong_figures_are_an_error(clone, tmp_path):
    other = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--no-hardlinks", str(clone), str(other))
    lost = "eval_results/v2.0625/score.v2/eval=gpt-4o-2024-05-13/other-70b.json"
    named = subprocess.run(["git", "-C", str(other), "rev-parse", f"HEAD:{lost}"], capture_output=True, text=True)
    found = other / ".git/objects" / named.stdout[:2] / named.stdout[2:].strip()
    found.unlink()
    done, result = run(other, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert result["absent"] == [lost] and len(result["scores"]) == 2
    assert "need the prompts' tags" in (tmp_path / "out" / "evals_wildbench.md").read_text()

    score = FROZEN["score"]["some-7b-chat"]
    write(clone / "leaderboard/data_dir/score.json",
          {**FROZEN["score"], "some-7b-chat": {**score, "adjusted_score": score["adjusted_score"] + 0.01}})  # fmt: skip
    git(clone, "commit", "-aqm", "wrong")
    done, _ = run(clone, tmp_path / "wrong")
    assert done.returncode == 1 and done.stderr.strip() == "a figure differs from the published one by 0.1"

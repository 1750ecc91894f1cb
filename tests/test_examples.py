"""The files of examples/: each is read as `fastpo train --config` reads it, and trains the toy model for a step."""

import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import fastpo
from fastpo import cli
from fastpo.losses.online import is_online

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "examples").glob("*.yaml"))

# What only a large machine has, and what the toy's tokenizer needs. Everything else stays as the file says.
SMALL = shlex.split(
    "--use-cpu --dtype float32 --bf16 false --fsdp no --max-tokens 512 --max-steps 1 --logging-first-step "
    "--eval-strategy no --save-strategy no --no-report --disable-tqdm"
)
# The toy ends an answer by chance, and says what is right more often in a few words.
ONLINE = shlex.split("--max-completion-length 12 --mask-truncated-completions false")


@pytest.fixture(scope="module")
def model(toy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    toy.model().save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(toy, tmp_path_factory):
    """`rows(options)`: a file of rows of the kind that a configuration reads."""

    def write(options: dict) -> Path:
        if options["loss_type"] == "kto":
            given = [
                {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
                for i, row in enumerate(toy.rows(8))
            ]
        elif is_online([options["loss_type"]]):
            given = [{"prompt": row["prompt"], "answer": "w1"} for row in toy.rows(8)]
        elif "pair_policy" in options:
            given = toy.kway_rows(8)
            for row in given:
                for response in row["responses"]:
                    response.pop("win_prob" if options["loss_type"] == "dpo" else "score")
        else:
            given = toy.rows(8)
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        return path

    return write


def test_every_example_is_listed():
    text = (ROOT / "examples" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.(?:yaml|py))\)", text)) == {
        path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".yaml", ".py")
    }
    assert len(FILES) >= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads(path, capsys):
    assert cli.main(["train", "--config", str(path), "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    for name, value in given.items():
        assert printed[name] == value, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_head_names_the_file(path):
    """The command in the comment is the file's own."""
    assert re.search(rf"^# .*train --config examples/{path.name}", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trains_a_toy(path, model, rows, tmp_path):
    given = yaml.safe_load(path.read_text())
    data = rows(given)
    out = tmp_path / "out"
    online = is_online([given["loss_type"]])
    command = ["train", "--config", str(path), "--model", str(model), "--train-dataset", str(data),
               "--output-dir", str(out), *SMALL, *(ONLINE if online else [])]  # fmt: skip
    assert cli.main(command) == 0
    first, *_ = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert first["step"] == 1 and first["learning_rate"] >= 0
    if online:  # its loss is 0 but for rounding where the policy is the one that sampled
        assert math.isfinite(first["loss"]) and first["grad_norm"] > 0 and first["reward_std"] > 0
        assert sum(re.fullmatch("rewards/.*/mean", name) is not None for name in first) == len(given["reward_funcs"])
        assert len((out / "completions" / "000000.jsonl").read_text().splitlines()) == given["num_completions_to_print"]
    else:
        assert first["loss"] > 0
    saved = yaml.safe_load((out / "config.yaml").read_text())
    for name in ("loss_type", "learning_rate", "per_device_train_batch_size"):
        assert saved[name] == given[name]


def test_sample_scores_and_writes_rows(toy, tmp_path, monkeypatch, capsys):
    """examples/sample.py on a toy that ends its answers by chance; fastpo trains on the rows that it writes."""
    spec = importlib.util.spec_from_file_location("sample", ROOT / "examples" / "sample.py")
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    for part in (toy.model(), tokenizer):
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "rows.jsonl"

    def main(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sample.py", str(tmp_path / "model"), *arguments])
        sample.main()
        return capsys.readouterr().out

    limit = ["--max-new-tokens", "60"]
    assert ", 0 of them right, " in main(str(out), *limit)
    assert out.read_text() == ""  # answers that are all wrong have one score
    monkeypatch.setattr(sample, "CAPITALS", {f"w{i}": "w" for i in range(48)})  # any word of the toy's is right
    assert re.search(r"^128 answers, (\d+) that end, \1 of them right, ", main(str(out), *limit))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and all(0 < r["score"] < 1 for row in rows for r in row["responses"])
    held_out = main("--held-out", "--responses", "0", *limit)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--held-out", "--questions", str(tmp_path / "questions.jsonl")])
    sample.main()
    [first, *_] = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert first["id"] == "w32" and sample.right(first["prompt"], "It is w.", first) == 1.0
    assert sample.right(first["prompt"], "No.", first) == 0.0
    assert re.search(r"^16 answers, \d+ that end", held_out) and str(out) not in held_out
    args = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "max_steps": 1, "logging_steps": 1,
            "save_final": False, "report": False, "disable_tqdm": True}  # fmt: skip
    result = fastpo.train(str(tmp_path / "model"), rows, args=args)
    assert result.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)

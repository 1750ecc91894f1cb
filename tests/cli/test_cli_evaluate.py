"""`fastpo evaluate` on the command line: from files to a figure, the cost, one-line errors."""

import json
import logging
import re

import pytest

from fastpo import cli

COUNT = 12


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Prompts, answers of two models, a judge and a configuration, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write = {
        "prompts": [{"id": f"p{k}", "prompt": f"q{k}", "answer": "yes"} for k in range(COUNT)],
        "new": [{"id": f"p{k}", "text": "yes" if k % 3 else "no"} for k in range(COUNT)],
        "old": [{"id": f"p{k}", "text": "no"} for k in range(COUNT)],
    }
    for name, rows in write.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text("def longer(prompt, response, meta):\n    return float(len(response))\n")
    (tmp_path / "eval.yaml").write_text(
        "prompts: prompts.jsonl\nmodel: new.jsonl\nbaseline: old.jsonl\noutput_dir: out\n"
        "judge: {kind: function, function: 'judge.py:longer'}\n"
    )
    return tmp_path


def test_a_win_rate_from_a_file_of_options(files, capsys, caplog):
    caplog.set_level(logging.INFO, "fastpo")
    assert cli.main(["evaluate", "win_rate", "--config", "eval.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].startswith("model: win rate 83.33% (95%: ") and "report.html" in captured.out
    assert "win_rate: 12 prompts; no answers to sample; 24 judgements by judge" in caplog.messages
    assert {p.name for p in (files / "out").iterdir()} >= {
        "answers.jsonl",
        "verdicts.jsonl",
        "result.json",
        "report.html",
    }
    # The measure's name in either spelling, and options on top.
    assert cli.main(["evaluate", "win-rate", "--config", "eval.yaml", "--limit", "5", "--output_dir", "few"]) == 0
    assert json.loads((files / "few" / "result.json").read_text())["counts"]["prompts"] == 5


def test_options_without_a_file(files, capsys):
    argv = ["evaluate", "held_out", "--model", "new=new.jsonl", "--model", "old=old.jsonl", "--prompts",
            "prompts.jsonl", "--output-dir", "out", "--set", "judge.kind=verifier",
            "--set", "judge.verifier=exact_match"]  # fmt: skip
    assert cli.main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr().out == "held_out: 12 prompts; no answers to sample; 24 judgements by judge\n"
    assert not (files / "out").exists()
    assert cli.main(argv) == 0
    new, old, _ = capsys.readouterr().out.splitlines()
    assert new.startswith("new: mean score 0.6667 (95%: ") and new.endswith(", 12 prompts; the best")
    assert old.startswith("old: mean score 0 (95%: 0 to ")


@pytest.mark.parametrize("argv, message", [
    (["evaluate"], "NAME"),
    (["evaluate", "winrate", "--config", "eval.yaml"], "no measure 'winrate', only .*; did you mean 'win_rate'"),
    (["evaluate", "win_rate"], "fastpo evaluate needs output_dir"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--model", "a", "--model", "b=c"], "each has a name, NAME=PATH"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--prompts", "none.jsonl"], "no such file: none.jsonl"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--set", "judge"], "expected NAME=VALUE"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--baseline", "prompts.jsonl"], "12 of 12 answers of baseline"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--modle", "a"], "unrecognised argument '--modle'"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--max-tokens", "96"],
     "'--max-tokens'; did you mean --set sample.max_tokens=96"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--top_p=0.5"], "did you mean --set sample.top_p=0.5"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--dry-run", "--set", "sample.max_token=9"],
     "sample.max_token: .* did you mean 'max_tokens'"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--dry-run", "--set", "sample.temprature=0.5"],
     "did you mean 'temperature'"),
    (["evaluate", "win_rate", "--config", "eval.yaml", "--dry-run", "--set", "judge.functoin=x"],
     "no option 'functoin'.* did you mean 'function'"),
])  # fmt: skip
def test_mistakes_are_one_line(files, capsys, argv, message):
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]), lines


def test_a_dotted_option_changes_one_of_its_section(files, capsys):
    """The judge of the file stays a function, its file is another; and --model is in the place of `models`."""
    (files / "shorter.py").write_text("def shorter(prompt, response, meta):\n    return -float(len(response))\n")
    argv = ["evaluate", "win_rate", "--config", "eval.yaml", "--output-dir", "second"]
    assert cli.main([*argv, "--set", "judge.function=shorter.py:shorter"]) == 0
    assert "win rate 16.67%" in capsys.readouterr().out
    (files / "models.yaml").write_text((files / "eval.yaml").read_text().replace("model: new", "models: {a: new")
                                       .replace(".jsonl\nbaseline", ".jsonl}\nbaseline"))  # fmt: skip
    argv = ["evaluate", "win_rate", "--config", "models.yaml", "--output-dir"]
    assert cli.main([*argv, "third", "--model", "old.jsonl"]) == 0
    assert capsys.readouterr().out.startswith("model: win rate 50%")
    assert cli.main([*argv, "fourth", "--model", "b=new.jsonl"]) == 0
    assert capsys.readouterr().out.startswith("b: win rate 83.33%")
    # A judge of another kind is another judge.
    assert cli.main([*argv, "fifth", "--set", "judge.kind=verifier", "--set", "judge.verifier=exact_match"]) == 0
    assert "win rate 83.33%" in capsys.readouterr().out


@pytest.mark.parametrize("path, message", [
    ("./dop", "model: there is no folder 'dop'; did you mean 'dpo'?"),
    ("runs/loop/iter-2/tarin", "there is no folder 'runs/loop/iter-2/tarin'; did you mean 'runs/loop/iter-2/train'?"),
    ("rnus/loop/iter-2", "did you mean 'runs'?"),
    ("runs/loop/iter-2", "the folder 'runs/loop/iter-2' holds no model (no config.json); did you mean "
                         "'runs/loop/iter-2/train'?"),
    ("runs/lop", "there is no folder 'runs/lop'; did you mean 'runs/loop'?"),
    ("judge.py", "'judge.py' is a file and no model's folder"),
    ("dop", "did you mean 'dpo'?"),
])  # fmt: skip
def test_a_model_that_is_not_there_is_found_before_anything_is_asked(files, capsys, monkeypatch, path, message):
    from fastpo.evals import policies

    asked = []

    monkeypatch.setattr(policies, "_on_a_hub", asked.append)
    for folder in ("dpo", "runs/loop/iter-2/train"):
        (files / folder).mkdir(parents=True)
        (files / folder / "config.json").write_text("{}")
    assert cli.main(["evaluate", "win_rate", "--config", "eval.yaml", "--dry-run", "--model", path]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line and asked == (["dop"] if path == "dop" else [])

"""Command lines that cannot be: exit code 2, one line on stderr that names the mistake, nothing on stdout."""

import pytest

from fastpo.cli import main


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'? (see fastpo --help)"),
        (["zzz"], "unknown command 'zzz'; there are train, iterate, evaluate, recipes, plan, losses, quickstart, "
                  "check, games, "
                  "env"),
        (["a\nb"], "unknown command 'a\\nb'; there are"),
        (["env", "extra"], "unrecognised argument 'extra' (see fastpo env --help)"),
        (["losses", "dpoo"], "unknown loss_type 'dpoo'; did you mean 'dpo'?"),
        (["train", "--beta"], "argument --beta: expected one argument"),
        (["train", "--beta="], "beta must be a number, not ''"),
        (["train", "--beta", "nan"], "beta must be positive, not nan"),
        (["train", "--max-steps", "1e400"], "max_steps must be at most 1,000,000,000, not inf"),
        (["train", "--seed", "-1"], "seed must be zero or more, not -1"),
        (["train", "--no-beta"], "beta must be a number, not False"),
        (["train", "--config", "nowhere.yaml"], "no such file: 'nowhere.yaml' (the configuration)"),
        (["train", "--config", "/"], "cannot read the configuration '/': Is a directory"),
        (["train", "--model", "./nowhere", "--train-dataset", "x.jsonl"], "model: no such folder: './nowhere'"),
        (["train", "--model", "m", "--train-dataset", "./nowhere.jsonl"], "no such file: ./nowhere.jsonl"),
        (["check", "--device", "foo"], "there is no device 'foo'; use cuda, cuda:0 or cpu"),
        (["check", "--device", "meta"], "device 'meta' is not supported; use cuda or cpu"),
        (["games", "--eta", "nan"], "eta must be positive, not nan"),
        (["games", "--tau", "inf"], "tau must be from 1e-09 to 1e+09, not inf"),
        (["games", "--steps", "1000000000000"], "steps must be from 1 to 1,000,000"),
        (["games", "random", "--size", "1000000"], "size must be from 2 to 1,000, not 1000000"),
        (["games", "random", "--seed", "99999999999999999999999"], "seed must be from 0 to 4,294,967,295"),
        (["games", "random", "--seed", "-1"], "seed must be from 0 to 4,294,967,295, not -1"),
        (["games", "--start", "1e308,1e308,1e308"], "start must be 3 positive numbers"),
        (["games", "--algorithm", ","], "algorithm names none"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes(capsys, argv, words):
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastpo: error: ") and words in lines[0], lines
    assert not captured.out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beta: 0.1\nbeta: 0.2\n", "'beta' is set twice (line 2)"),
        ("env: [1]\n", "must be a mapping of variables, not [1]"),
        ('env: {"a\\0b": 1}\n', "cannot be set"),
        ("model: [1]\n", "model must be a path or a name, not [1]"),
        ("peft_config: 3\n", "peft_config must be a mapping, not 3"),
        ("bta: 3\n", "unknown option 'bta'; did you mean 'beta'?"),
        ("train:\n\t- 1\n", "indent with spaces, not with tabs"),
        ("[1]\n", "must hold option names with values, not a list"),
    ],
)
def test_files_that_cannot_be(capsys, tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastpo: error: ") and words in lines[0], lines

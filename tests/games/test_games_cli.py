"""`fastpo games`: tables, plots, one-line errors."""

import pytest

from fastpo.cli import main
from fastpo.games.games import ALGORITHMS


def test_games_command_prints_gaps_and_draws(capsys, tmp_path):
    picture = tmp_path / "rps.png"
    assert main(["games", "rps", "--steps", "50", "--start", "5,3,2", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "0.375 0.277 0.347" in out and "0.333 0.333 0.333" in out
    assert all(name in out for name in ALGORITHMS)
    assert picture.stat().st_size > 10_000
    assert main(["games", "weighted-rps", "--algorithm", "inpo,nash-md", "--steps", "3", "--trained"]) == 0
    out = capsys.readouterr().out
    assert "Gap to the Nash" not in out and "nash_md" in out


@pytest.mark.parametrize("name", ["bradley-terry", "random", "condorcet", "mixture"])
def test_games_command_on_every_game(capsys, name):
    assert main(["games", name, "--size", "5", "--steps", "20", "--algorithm", "mwu"]) == 0
    assert "5 responses" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["rsp"], "unknown game 'rsp'; did you mean 'rps'?"),
        (["rps", "--algorithm", "nash-mb"], "unknown algorithm 'nash-mb'; did you mean 'nash_md'?"),
        (["rps", "--seed", "1"], "rps does not read seed; random and mixture do"),
        (["rps", "--steps", "0"], "steps must be from 1 to 1,000,000, not 0"),
        (["rps", "--tau", "0"], "tau must be positive, not 0"),
        (["rps", "--start", "1,2"], "start must be 3 positive numbers, not [1.0, 2.0]"),
        (["rps", "--start", "a"], "argument --start: 'a' is not a list of numbers such as 0.5,0.3,0.2"),
        (["rps", "--payoffs", "1,2"], "payoffs must be one number or three, not 2"),
        (["random", "--size", "1"], "size must be from 2 to 1,000, not 1"),
        (["rps", "--plot", "x.doc"], "plot must end in .png, .svg or .pdf, not 'x.doc'"),
        (["rps", "--plott", "x.png"], "unrecognised argument '--plott'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_games_command_bad_input(capsys, options, message):
    assert main(["games", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastpo: error: ") and message in lines[0], lines


@pytest.mark.parametrize(
    "missing, message",
    [
        ("matplotlib", "plot needs matplotlib, which is not installed: pip install matplotlib"),
        ("scipy", "games needs scipy, which is not installed: pip install 'fastpo[games]'"),
    ],
)
def test_what_a_missing_package_does_is_said_before_the_runs(capsys, monkeypatch, tmp_path, missing, message):
    monkeypatch.setattr("fastpo.cli.games.find_spec", lambda name: None if name == missing else True)
    assert main(["games", "rps", "--plot", str(tmp_path / "x.png")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"fastpo: error: {message}\n" and not captured.out

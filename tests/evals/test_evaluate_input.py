"""fastpo.evaluate: what is wrong is said in one line before anything is asked; the cost; verdicts given back."""

import json
import random

import pytest
from evaluate_cases import (
    BENCH,
    MINE,
    PROMPTS,
    TASKS,
    THEIRS,
    Judged,
    answers_to,
    size,
)

from fastpo.errors import ConfigError, DataError, FastpoError
from fastpo.evals.measure import mean_of

# ---- what holds 95 %


@pytest.mark.parametrize("values, wanted", [
    ([0.5] * 40, (35.2, 64.8)),  # as of a share of one half: Wilson's, and no point
    ([1.0] * 11 + [0.5], (69.9, 99.6)),
    ([1.0] * 20, (83.9, 100.0)),
    ([0.9, 1.0, 0.8, 0.98], (83.1, 100.0)),  # 1.96 standard errors reach 100.9
    ([0.1, 0.0, 0.2, 0.02], (0.0, 16.9)),
])  # fmt: skip
def test_an_interval_is_no_point_and_does_not_leave_the_scale(values, wanted):
    assert mean_of(values, 100.0)["interval"] == pytest.approx(wanted, abs=0.05)


def test_numbers_that_are_no_shares_keep_their_own_scale():
    assert mean_of([-1.0, 3.0, 8.0])["interval"][0] < 0 and mean_of([-1.0, 3.0, 8.0])["interval"][1] > 8
    assert mean_of([0.3])["interval"] is None and mean_of([])["interval"] is None


@pytest.mark.parametrize("count", [20, 80])
@pytest.mark.parametrize("win, tie", [(0.45, 0.1), (0.2, 0.6), (0.88, 0.1), (0.0, 1.0), (0.05, 0.9)])
def test_with_ties_the_interval_covers_and_is_no_wider_than_without_them(win, tie, count):
    draw, inside, times = random.Random(1), 0, 400
    truth = win + tie / 2
    for _ in range(times):
        found = mean_of(draw.choices([1.0, 0.5, 0.0], [win, tie, max(0.0, 1 - win - tie)], k=count))
        low, high = found["interval"]
        assert 0 <= low < high <= 1
        inside += low <= truth <= high
        # No wider than of wins and losses alone with this mean, and one more prompt's weight for the edges.
        alone = (found["value"] * (1 - found["value"]) / count) ** 0.5
        assert high - low <= 2 * 1.96 * (alone + 1 / count)
    assert inside / times >= 0.93
    assert tie > 0.5 or inside / times <= 0.995  # where nearly all are ties it holds more than it must


# ---- options, before anything is asked


class Counted:
    """A function that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompt, response, meta):
        self.calls += 1
        return float(len(response))


OPTIONS = {
    "weight text": ("arena", {"weight": "3"}, "measure.weight must be a whole number, 1 or more, not '3'"),
    "weight 0": ("arena", {"weight": 0}, "measure.weight must be a whole number, 1 or more, not 0"),
    "level": ("arena", {"level": 2}, "measure.level must be a number between 0 and 1, not 2"),
    "control": ("arena", {"control": ["lenght"]}, "measure.control 'lenght' is none of 'length', .*mean 'length'"),
    "controls none": ("arena", {"control": None}, "measure.control None is none of"),
    "category": ("arena", {"category": 3}, "measure.category must be a text, not 3"),
    "category of none": ("arena", {"category": "hard"}, "measure.category chooses among Arena-Hard's"),
    "resamples -3": ("arena", {"resamples": -3}, "measure.resamples must be a whole number: 0, .* not -3"),
    "resamples 1": ("alpaca_eval", {"resamples": 1}, "measure.resamples must be .* not 1"),
    "resamples 10.5": ("alpaca_eval", {"resamples": 10.5}, "measure.resamples must be .* not 10.5"),
    "resamples true": ("alpaca_eval", {"resamples": True}, "measure.resamples must be .* not True"),
    "form": ("alpaca_eval", {"form": "length_controled_noreg"}, "measure.form 'length.*is none of .*did you mean"),
    "form alone": ("alpaca_eval", {"form": "length_controlled_noreg"}, "needs measure.calibration"),
    "calibration": ("alpaca_eval", {"calibration": "/nowhere/df_gamed.csv"}, "/nowhere/df_gamed.csv: no such file"),
    "calibration 3": ("alpaca_eval", {"calibration": 3}, "measure.calibration must be a path, not 3"),
    "margin": ("wildbench", {"margin": "500"}, "measure.margin must be a number, not '500'"),
    "max_words": ("wildbench", {"max_words": 0}, "measure.max_words must be a whole number, 1 or more, not 0"),
    "failed": ("rewardbench", {"failed": "cuont"}, "measure.failed 'cuont' is none of .*did you mean 'count'"),
    "tie": ("rewardbench", {"tie": "half"}, "measure.tie must be a number from 0 to 1, not 'half'"),
    "version": ("rewardbench", {"version": 3}, "measure.version must be 1 or 2, not 3"),
}  # fmt: skip
INPUTS = {
    "wildbench": {"prompts": TASKS, "model": answers_to(TASKS, 1), "baseline": None}, "rewardbench": {"prompts": BENCH},
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_of_a_measure_is_refused_before_the_first_judgement(case, go):
    name, given, message = OPTIONS[case]
    judge = Counted()
    with pytest.raises(FastpoError, match=message):
        go(name, **INPUTS.get(name, {}), judge=judge, measure=given)
    assert judge.calls == 0


def test_a_whole_answer_may_be_shown(go):
    long = {name: "word " * 1200 for name in answers_to(TASKS, 1)}
    given = {"prompts": TASKS, "model": long, "baseline": None, "judge": lambda prompt, response, meta: 5.0}
    assert go("wildbench", **given).figures["model"]["left_out"] == len(TASKS)
    assert go("wildbench", folder="whole", **given, measure={"max_words": None}).figures["model"]["left_out"] == 0


def test_the_command_reads_numbers(tmp_path, capsys):
    from fastpo.cli.command_line import main

    for name, rows in (("prompts", PROMPTS), ("mine", MINE), ("theirs", THEIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["evaluate", "arena", "--prompts", str(tmp_path / "prompts.jsonl"), "--output-dir", str(tmp_path / "out"),
             "--model", str(tmp_path / "mine.jsonl"), "--baseline", str(tmp_path / "theirs.jsonl"), "--dry-run",
             "--set", "judge.kind=verifier", "--set", "judge.verifier=exact_match"]  # fmt: skip
    assert main([*given, "--set", "measure.resamples=10", "--set", "measure.level=0.9"]) == 0
    assert main([*given, "--set", "measure.resamples='10'"]) == 2
    said = capsys.readouterr().err
    assert "measure.resamples must be a whole number: 0, for no interval, or 2 and more, not '10'" in said


BAD = {
    "few prompts": (lambda go, judge: go("alpaca_eval", judge=judge, limit=3),
                    "alpaca_eval: 3 prompts; its regression's 5 folds need one each"),
    "wildbench's baselines": (lambda go, judge: go(
        "wildbench", prompts=TASKS, model=answers_to(TASKS, 1), judge=Judged(lambda *given: judge("", "", {})),
        baseline={"claude-3-haiku": {"answers": answers_to(TASKS, 2)}, "y": {"answers": answers_to(TASKS, 3)}}),
        "several baselines of WildBench are its own: .*not 'claude-3-haiku'; did you mean 'claude-3-haiku-20240307'"),
    "no role": (lambda go, judge: go(
        "wildbench", model=answers_to(TASKS, 1), baseline=None, judge=judge,
        prompts=[{**TASKS[0], "conversation_input": [{"content": "q"}]}, *TASKS[1:]]),
        "1 of 20 prompts are no turns with role and content: 'w0'"),
    "nothing chosen": (lambda go, judge: go("rewardbench", judge=judge, prompts=[{**r, "chosen": []} for r in BENCH]),
                       r"an answer is neither a text nor turns: \[\]"),
    "an id of null": (lambda go, judge: go("rewardbench", judge=judge, prompts=[*BENCH, {**BENCH[0], "id": None}]),
                      "1 of 19 rows have no id; numbers of the rows: 18"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_first_judgement(case, go):
    call, message = BAD[case]
    judge = Counted()
    with pytest.raises(FastpoError, match=message):
        call(go, judge)
    assert judge.calls == 0


def test_a_file_in_the_place_of_the_folder_is_said(go, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="output_dir: .*out' is a file"):
        go("win_rate", judge=size)
    with pytest.raises(ConfigError, match="output_dir: .*out' is a file"):
        go("rewardbench", folder="out/below", prompts=BENCH, annotations=[])


GAMES = [{"prompt": str(k), "a": a, "b": b, "verdict": v} for k in range(5)
         for a, b, v in (("x", "y", "A>B"), ("y", "x", "B>A"))]  # fmt: skip
SCORES = [{"id": r["id"], "subset": r["subset"], "scores": [2.0, 1.0]} for r in BENCH]
ANNOTATIONS = {
    "verdict misnamed": ("arena", [{"veredict" if k == "verdict" else k: v for k, v in g.items()} for g in GAMES], {},
                         "the games have no column 'verdict', only .*; did you mean 'veredict'"),
    "a game without verdict": ("arena", [*GAMES, {"prompt": "9", "a": "x", "b": "y"}], {},
                               "1 of 11 games have no verdict, which is null where it failed; .*: 10"),
    "no prompt": ("arena", [{k: v for k, v in g.items() if k != "prompt"} for g in GAMES], {},
                  "10 of 10 games have neither prompt nor id; numbers of the rows: 0, 1"),
    "category": ("arena", GAMES, {"category": "hard"}, "measure.category chooses among Arena-Hard's judgments"),
    "a number": ("rewardbench", [{**SCORES[0], "scores": 1.0}, *SCORES[1:]], {},
                 "1 of 18 scores are no lists of numbers.*: 'hep-python/0: 1.0'"),
    "texts": ("rewardbench", [{**row, "scores": ["a", "b"]} for row in SCORES], {}, "18 of 18 scores are no lists of"),
    "twice": ("rewardbench", [*SCORES, SCORES[1]], {}, "1 of 18 prompts have scores more than once: 'math-prm/1'"),
    "failed": ("rewardbench", [{**SCORES[0], "scores": [None, 1.0]}, *SCORES[1:]], {},
               "1 of 18 prompts have a score that failed: 'hep-python/0'; failed: count"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_bad_annotations_are_refused_by_name_and_count(case, go):
    name, rows, measure, message = ANNOTATIONS[case]
    given = {"prompts": BENCH} if name == "rewardbench" else {"prompts": None, "model": None, "baseline": "x"}
    with pytest.raises((ConfigError, DataError), match=message):
        go(name, annotations=rows, measure=measure, **given)


def test_a_score_that_failed_counts_where_that_is_asked_for(go):
    rows = [{**SCORES[0], "scores": [None, 1.0]}, *SCORES[1:]]
    found = go("rewardbench", prompts=BENCH, annotations=rows, measure={"failed": "count"}).figures["judge"]
    assert found["subsets"]["hep-python"] == pytest.approx(5.5 / 6)

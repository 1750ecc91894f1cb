"""fastpo.evaluate: what is wrong is said in one line before anything is asked; the cost; verdicts given back."""

import json
import logging
import random
import types

import pytest
from evaluate_cases import (
    BENCH,
    COUNT,
    MINE,
    PROMPTS,
    TASKS,
    THEIRS,
    Judged,
    answers_to,
    preferences,
    quarters,
    result_of,
    size,
)

import fastpo
from fastpo.errors import ConfigError, DataError, FastpoError
from fastpo.evals.judging import ArenaJudge, FileJudge, cost
from fastpo.evals.measure import mean_of
from fastpo.sampling.items import Item, Response, Unit
from fastpo.sampling.parts import read_lines
from fastpo.scoring.judges import ServerBackend
from fastpo.scoring.scoring import Ensemble, FunctionScorer

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
               "1 of 18 prompts have no verdict of the annotations: .hep-python/0 .failed..; failed=.count."),
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


# ---- verdicts that are there


def verdicts_of(go, tmp_path, judge, name="win_rate", **options):
    go(name, folder="judged", judge=judge, **options)
    return list(read_lines(tmp_path / "judged" / "verdicts.jsonl"))


def test_one_lost_line_or_one_stray_one_is_refused_and_changes_no_figure(go, tmp_path):
    rows = verdicts_of(go, tmp_path, Judged(lambda *shown: 1.0))
    assert go("win_rate", verdicts=rows).value == 50.0
    for name in ("win_rate", "arena"):
        with pytest.raises(DataError, match=r"1 of 80 verdicts are missing: 'p0 / \w+ / \w+'$"):
            go(name, folder="lost", verdicts=rows[1:])
    stray = [{**rows[0], "shown": ["other", "baseline"]}, {**rows[0], "id": "zzz"}]
    with pytest.raises(DataError, match="2 of 82 verdicts are of prompts or models that nobody asks about: 'p0 / oth"):
        go("win_rate", folder="stray", verdicts=rows + stray)
    with pytest.raises(DataError, match="1 of 80 verdicts are there more than once: 'p0 / "):
        go("win_rate", folder="twice", verdicts=[*rows, rows[0]])


def test_verdicts_of_prompts_that_limit_leaves_out_are_counted(go, tmp_path, caplog):
    rows = verdicts_of(go, tmp_path, Judged())
    with caplog.at_level(logging.INFO, "fastpo"):
        assert go("win_rate", verdicts=rows, limit=5).counts["verdicts"]["units"] == 10
    assert [r.message for r in caplog.records if "leaves out" in r.message] == [
        "70 of 80 verdicts are of prompts that limit leaves out"
    ]
    with pytest.raises(DataError, match="1 of 81 verdicts are of prompts or models"):
        go("win_rate", folder="b", verdicts=[*rows, {**rows[0], "id": "zzz"}], limit=5)


def test_verdicts_in_one_order_are_taken_as_they_were_shown(go, tmp_path):
    rows = verdicts_of(go, tmp_path, Judged(), name="alpaca_eval", measure={"resamples": 0})
    own = result_of(tmp_path / "judged")["figures"]["model"]["win_rate"]
    found = go("alpaca_eval", verdicts=rows, seed=7, measure={"resamples": 0})
    assert found.figures["model"]["win_rate"] == own
    again = list(read_lines(tmp_path / "out" / "verdicts.jsonl"))
    assert [line["shown"] for line in again] == [row["shown"] for row in rows]  # whatever the seed draws
    with pytest.raises(DataError, match="40 of 80 verdicts are missing: .*; both_orders: false takes each pair in the"):
        go("win_rate", folder="b", verdicts=rows)
    one_order = go("win_rate", folder="c", verdicts=rows, both_orders=False)
    assert one_order.value == pytest.approx(100 * sum(preferences()) / COUNT)
    with pytest.raises(DataError, match=r"40 of 80 verdicts are missing: [^;]*$"):  # nobody set both_orders
        go("arena", folder="d", verdicts=rows)


def test_a_pair_in_both_orders_asks_for_both_of_all(go, tmp_path):
    rows = verdicts_of(go, tmp_path, Judged(), name="alpaca_eval", both_orders=True, measure={"resamples": 0})
    assert go("alpaca_eval", verdicts=rows, measure={"resamples": 0}).counts["verdicts"]["units"] == 2 * COUNT
    with pytest.raises(DataError, match=r"1 of 80 verdicts are missing: [^;]*$"):
        go("alpaca_eval", folder="b", verdicts=rows[1:])


def test_of_several_judges_one_is_named(go, tmp_path):
    same = FunctionScorer("b", lambda prompt, response, meta: 1.0)
    verdicts_of(go, tmp_path, Ensemble("both", {"a": FunctionScorer("a", size), "b": same}))
    path = str(tmp_path / "judged" / "verdicts.jsonl")
    with pytest.raises(DataError, match=r"are of 'a', 'b', 'both': say which, {verdicts: FILE, judge: NAME}"):
        go("win_rate", verdicts=path)
    own = result_of(tmp_path / "judged")["figures"]["model"]["value"]
    assert go("win_rate", folder="both", verdicts={"verdicts": path, "judge": "both"}).value == own
    assert go("win_rate", folder="b", verdicts={"verdicts": path, "judge": "b"}).value == 50.0
    with pytest.raises(DataError, match="no verdicts of the judge 'bot', only of .*; did you mean 'both'"):
        go("win_rate", folder="c", verdicts={"verdicts": path, "judge": "bot"})
    with pytest.raises(ConfigError, match="verdicts has no option 'judges'; did you mean 'judge'"):
        go("win_rate", folder="d", verdicts={"verdicts": path, "judges": "both"})


def test_verdicts_on_several_answers_a_prompt_stand_in_their_order():
    item = Item("p", "q", responses=tuple(Response(text, source=name) for text, name in zip("abcd", "mmxm")))
    units = [Unit(item, i) for i in range(4)]
    rows = [{"id": "p", "shown": [name], "value": value} for name, value in zip("mmxm", (1.0, 2.0, 3.0, 4.0))]
    judge = FileJudge(rows)
    judge.check(units, one_will_do=True)
    assert [verdict.value for _, verdict in judge.score(units)] == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(DataError, match="1 of 4 verdicts are missing: 'p / m'"):
        FileJudge(rows[1:]).check(units, one_will_do=True)


def test_verdicts_of_several_answers_are_given_back(go, policies, tmp_path):
    prompts = [{"id": str(k), "prompt": f"w{k}"} for k in range(6)]
    given = {"prompts": prompts, "model": policies[0], "baseline": None,
             "sample": {"n": 3, "temperature": 1.0, "max_tokens": 4}}  # fmt: skip
    judge = FunctionScorer("judge", lambda prompt, response, meta: float(sum(map(ord, response)) % 7))
    rows = verdicts_of(go, tmp_path, judge, "verifier", **given)
    assert len(rows) == 18
    assert go("verifier", verdicts=rows, **given).value == result_of(tmp_path / "judged")["figures"]["model"]["value"]


SHOWN = [5, [], ["a", "b", "c"], [["model"], "baseline"], {"model": 1}]


@pytest.mark.parametrize("shown", SHOWN, ids=repr)
def test_names_that_are_none_are_refused(shown, go):
    with pytest.raises(DataError, match="1 of 1 verdicts have no names of one or two models under shown: .p0: "):
        go("win_rate", verdicts=[{"id": "p0", "shown": shown, "value": 1.0}])


# ---- what has changed


def test_the_option_that_was_changed_is_named(go, policies):
    go("win_rate", judge=size)
    for given, message in (
        ({"limit": 6}, "stage judge was done with limit=None, now it is 6"),
        ({"seed": 7}, "stage judge was done with seed=42, now it is 7"),
        ({"limit": 6, "seed": 7}, "stage judge was done with limit=None, now it is 6"),
        ({"model": THEIRS}, "stage judge was done with texts.answers of model="),
    ):
        with pytest.raises(ConfigError, match=message):
            go("win_rate", judge=size, **given)
    given = {"model": policies[0], "baseline": None, "judge": size, "sample": {"max_tokens": 2}, "folder": "sampled"}
    prompts = [{"id": str(k), "prompt": f"w{k}"} for k in range(6)]
    go("verifier", prompts=prompts, **given, limit=3)
    with pytest.raises(ConfigError, match="stage sample-model was done with limit=3, now it is 4"):
        go("verifier", prompts=prompts, **given, limit=4)
    with pytest.raises(ConfigError, match="stage sample-model was done with seed=42, now it is 1"):
        go("verifier", prompts=prompts, **given, limit=3, seed=1)


# ---- cost


@pytest.fixture
def line(tmp_path, capsys):
    """The line that a dry run prints, of `go`'s options."""

    def run(name, start_from=None, **options):
        given = {"prompts": PROMPTS, "model": MINE, "baseline": THEIRS, "output_dir": str(tmp_path / "out"), **options}
        assert fastpo.evaluate(name, given, dry_run=True, start_from=start_from) is None
        return capsys.readouterr().out

    return run


def test_cost_is_one_line_and_nothing_is_asked(line, policies, tmp_path):
    judge = Judged()
    found = line("win_rate", model=policies[0], baseline=policies[1], judge=judge, sample={"max_tokens": 10})
    characters = sum(2 * len(f"{row['prompt']} {'x' * 40} {'x' * 40}") for row in PROMPTS)
    assert found == (
        "win_rate: 40 prompts; 80 answers to sample, at most 800 tokens; 80 judgements by judge, at most "
        f"{characters // 4:,} prompt tokens at four characters each\n"
    )
    assert judge.calls == 0 and not (tmp_path / "out").exists()


def test_what_is_done_is_not_counted_again(go, line, policies):
    given = {"model": policies[0], "baseline": THEIRS, "sample": {"max_tokens": 3}}
    with pytest.raises(KeyboardInterrupt):
        go("win_rate", **given, judge=Judged(stop=18))
    assert "no answers to sample; 63 judgements by judge, 17 more are done, about " in line(
        "win_rate", **given, judge=Judged()
    )
    go("win_rate", **given, judge=Judged())
    whole = line("win_rate", **given, judge=Judged())
    assert whole == "win_rate: 40 prompts; no answers to sample; no judgements left for judge\n"
    assert "; 80 judgements by judge, about " in line("win_rate", **given, judge=of_another_key())
    assert "40 answers to sample" in line("win_rate", **given | {"sample": {"max_tokens": 4}}, judge=Judged())
    assert "no answers to sample; 80 judgements" in line("win_rate", "judge", **given, judge=Judged())
    assert "40 answers to sample, at most 120 tokens; 80 judg" in line("win_rate", "sample", **given, judge=Judged())


def of_another_key():
    judge = Judged()
    judge.key = judge.identity = {"judge": "another"}
    return judge


def test_of_wildbench_nobody_is_asked_about_an_empty_answer(go, line):
    given = {"prompts": TASKS, "model": answers_to(TASKS, 1), "baseline": {"answers": answers_to(TASKS, 2)}}
    assert f"; {len(TASKS) - 1} judgements by judge" in line("wildbench", **given, judge=Judged(quarters))
    with pytest.raises(KeyboardInterrupt):
        go("wildbench", **given, judge=Judged(quarters, stop=9))
    assert "; 11 judgements by judge, 8 more are done" in line("wildbench", **given, judge=Judged(quarters))


def test_cost_of_functions_files_ensembles_and_judges_that_write():
    item = Item("a", "12345678", responses=(Response("1234"), Response("1234")))
    units = [Unit(item, 0), Unit(item, 1)]
    assert cost(FunctionScorer("f", size), units) == (2, 0, 0, 0)
    both = Ensemble("e", {"f": FunctionScorer("f", size), "j": Judged()})
    assert cost(both, units) == (4, 2 * 13 // 4, 0, 0)
    assert cost(FileJudge([{"id": "a", "shown": ["x"], "value": 1.0}]), units) == (2, 0, 0, 0)
    client, pair = types.SimpleNamespace(close=lambda: None), [Unit(item, 0, 1), Unit(item, 1, 0)]
    for options, tokens in (({}, 2 * 300), ({"temperature": 0.7}, 4 * 300), ({"by": "logprobs"}, 0)):
        judge = ArenaJudge("judge", ServerBackend(client, "m", max_tokens=300, **options))
        assert cost(judge, pair).written == tokens

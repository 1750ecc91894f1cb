"""fastpo.evaluate: the three steps from files and from policies, resume, cost, what is refused, what is written."""

import itertools
import json
import random
import subprocess
import sys
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
    longer,
    preferences,
    quarters,
    result_of,
    size,
)

import fastpo
from fastpo.errors import ConfigError, DataError, TrainingError
from fastpo.evals import alpaca, pairwise, rewardbench, wildbench
from fastpo.evals.compared import verdict_of
from fastpo.evals.judging import ArenaJudge, judge_of
from fastpo.evals.measure import mean_of
from fastpo.evals.measures import MEASURES
from fastpo.evals.wildbench_judge import WildBenchJudge
from fastpo.loop import evaluation
from fastpo.sampling.items import Item, Response, Scores, Unit, Verdict
from fastpo.sampling.parts import read_lines
from fastpo.scoring.judges import Judge
from fastpo.scoring.scoring import BothOrders, Ensemble, FunctionScorer

# ---- figures, against the measures' own functions


def test_alpaca_eval_is_what_win_rates_gives(go, tmp_path):
    figure = go("alpaca_eval", judge=Judged(), measure={"resamples": 50}).figures["model"]
    rows = alpaca.Annotations(preferences(), [len(r["text"]) for r in MINE], [len(r["text"]) for r in THEIRS])
    own = alpaca.win_rates(rows, resamples=50, seed=42)
    assert figure["value"] == own.length_controlled and figure["interval"] == own.lc_interval
    assert figure["win_rate"] == own.win_rate and tuple(figure["raw_interval"]) == own.interval
    assert figure["form"] == alpaca.MINIMAL and figure["interval"] != figure["raw_interval"]
    counts = result_of(tmp_path / "out")["counts"]["verdicts"]
    assert counts["units"] == counts["ok"] == COUNT  # one order each


def test_alpaca_eval_shows_either_first_and_swapping_the_models_gives_the_rest(go, tmp_path):
    go("alpaca_eval", judge=Judged())
    first = [line["shown"][0] for line in read_lines(tmp_path / "out" / "verdicts.jsonl")]
    assert 8 < first.count("model") < COUNT - 8
    raw = go("alpaca_eval", judge=Judged()).figures["model"]["win_rate"]
    swapped = go("alpaca_eval", folder="swapped", judge=Judged(), model=THEIRS, baseline=MINE).figures["model"]
    assert swapped["win_rate"] == pytest.approx(100 - raw)


def test_a_judge_that_always_takes_the_first_is_seen_and_balanced(go, tmp_path):
    one_sided = Judged(lambda *shown: 1.0)
    assert go("win_rate", judge=one_sided).value == 50.0
    orders = result_of(tmp_path / "out")["counts"]["verdicts"]["orders"]
    assert orders["by_position"] == orders["first"] == 1.0
    assert go("alpaca_eval", folder="both", judge=one_sided, both_orders=True).figures["model"]["win_rate"] == 50.0


def test_a_better_score_is_one_win_in_the_arena(go):
    """Scores say which answer is better and not by how much: three wins of a clear verdict are not theirs."""
    found = go("arena", judge=size).figures["model"]["value"]
    assert found == pytest.approx(go("win_rate", folder="plain", judge=size).figures["model"]["value"], abs=1e-3)
    assert 0 < found < 100


def test_arena_is_what_its_function_gives(go):
    found = go("arena", judge=Judged(), measure={"resamples": 50, "control": ["length"]}).figures["model"]
    games, styles = [], {}
    for mine, theirs, p in zip(MINE, THEIRS, preferences()):
        games.append(pairwise.Game(mine["id"], "model", "baseline", verdict_of(p)))
        games.append(pairwise.Game(mine["id"], "baseline", "model", verdict_of(1 - p)))
        styles |= {(mine["id"], "model"): pairwise.style_of(mine["text"]),
                   (mine["id"], "baseline"): pairwise.style_of(theirs["text"])}  # fmt: skip
    own = pairwise.arena(games, "baseline", control=["length"], styles=styles, resamples=50, seed=42)
    assert found["value"] == pytest.approx(own.of("model").score)
    assert found["interval"] == pytest.approx(own.of("model").interval) and found["style"].keys() == {"length"}


@pytest.mark.parametrize(
    "p, verdict", [(1, "A>>B"), (0.9, "A>>B"), (0.8, "A>B"), (0.5, "A=B"), (0.2, "B>A"), (0, "B>>A")]
)
def test_the_nearest_of_five_verdicts(p, verdict):
    assert verdict_of(p) == verdict


def test_win_rate_of_scores_and_of_pairs(go):
    wins = [(len(a["text"]) > len(b["text"])) + 0.5 * (len(a["text"]) == len(b["text"])) for a, b in zip(MINE, THEIRS)]
    found = go("win_rate", judge=size).figures["model"]
    assert found["value"] == pytest.approx(100 * sum(wins) / COUNT)
    assert (found["wins"], found["ties"]) == (wins.count(1.0), wins.count(0.5))
    assert found["interval"][0] < found["value"] < found["interval"][1]
    pairs = go("win_rate", folder="pairs", judge=Judged()).figures["model"]
    assert pairs["value"] == pytest.approx(100 * sum(preferences()) / COUNT) and pairs["wins"] == found["wins"]


def test_several_models_against_one_of_them(go):
    models = {"a": MINE, "b": THEIRS, "c": [{**row, "text": "c" * 50} for row in MINE]}
    found = go("win_rate", model=None, models=models, baseline="b", judge=Judged()).figures
    assert set(found) == {"a", "c"} and found["c"]["value"] == pytest.approx(90)


def test_accuracy_with_a_difference_to_the_baseline(go):
    prompts = [{**row, "answer": "a" * 10} for row in PROMPTS]
    right = [{**row, "text": "a" * (10 if k % 4 else 3)} for k, row in enumerate(MINE)]
    found = go("verifier", prompts=prompts, model=right, judge={"kind": "verifier", "verifier": "exact_match"})
    mine, theirs = found.figures["model"], found.figures["baseline"]
    assert mine["value"] == 0.75 and mine["interval"] == pytest.approx([0.598060, 0.858129], abs=1e-6)  # Wilson
    assert mine["difference"]["value"] == pytest.approx(0.75 - theirs["value"])
    assert mine["answers"]["mean characters"] == pytest.approx(8.25)
    loops = evaluation.figures({str(k): Scores([float(k % 4 > 0)]) for k in range(COUNT)}, None, COUNT)
    assert (mine["value"], mine["error"]) == (loops["score"], pytest.approx(loops["score error"]))


def test_held_out_chooses_the_best_of_the_checkpoints_on_drawn_prompts(go):
    many = [{"id": str(k), "prompt": f"q{k}"} for k in range(150)]
    models = {name: {str(k): letter * 5 for k in range(150)} for name, letter in (("early", "x"), ("late", "xy"))}
    found = go("held_out", prompts=many, model=None, baseline=None, models=models, judge=size)
    assert [found.figures[name]["best"] for name in models] == [False, True]
    assert found.figures["late"]["value"] == 10 and found.counts["prompts"] == 100
    assert go("held_out", folder="few", prompts=many, model=None, baseline=None, models=models, judge=size,
              limit=7).counts["prompts"] == 7  # fmt: skip


def test_wilsons_interval_covers_and_an_even_sample_has_one():
    assert mean_of([1.0] * 20)["interval"] == pytest.approx([0.8388, 1.0], abs=1e-3)
    draw, inside = random.Random(0), 0
    for _ in range(400):
        low, high = mean_of([float(draw.random() < 0.9) for _ in range(60)])["interval"]
        inside += low <= 0.9 <= high
    assert 0.92 <= inside / 400 <= 0.99


def test_wildbench_is_what_its_functions_give(go, tmp_path):
    mine, theirs = answers_to(TASKS, 1), answers_to(TASKS, 2)
    tasks = wildbench.load_tasks(TASKS)
    given = {"prompts": TASKS, "model": mine, "baseline": {"answers": theirs}}
    judge = FunctionScorer("judge", quarters, unit="pair")
    own = wildbench.compare(tasks, mine, theirs, judge, seed=42)
    figure = wildbench.reward(own.comparisons, 500, groups=wildbench.groups_of(tasks), seed=42)
    found = go("wildbench", **given, judge=judge).figures["model"]
    assert found["value"] == figure.value and found["task_macro"] == figure.task_macro
    assert (
        found["error"] == figure.error and found["margins"]["baseline"]["-1"] == wildbench.reward(own.comparisons).value
    )
    lines = list(read_lines(tmp_path / "out" / "verdicts.jsonl"))
    assert len(lines) == len(TASKS) - 1  # nobody is asked about an empty answer
    assert {frozenset(line["shown"]) for line in lines} == {frozenset(("model", "baseline"))}
    with pytest.raises(ConfigError, match="gives WB-Score, which compares with nobody: leave baseline out"):
        go("wildbench", folder="none", **given, judge=size)
    score = go("wildbench", folder="score", **given | {"baseline": None},
               judge=lambda prompt, response, meta: 1 + len(response) % 10)  # fmt: skip
    rater = FunctionScorer("judge", lambda prompt, response, meta: 1 + len(response) % 10)
    assert score.value == wildbench.score(wildbench.rate(tasks, mine, rater).ratings).value


def test_wildbench_of_three_baselines(go):
    mine = answers_to(TASKS, 1)
    baselines = {name: {"answers": answers_to(TASKS, seed)} for seed, name in enumerate(wildbench.BASELINES, 2)}
    found = go(
        "wildbench", prompts=TASKS, model=mine, baseline=baselines, judge=FunctionScorer("j", quarters, unit="pair")
    )
    values = [of["value"] for of in found.figures["model"]["baselines"].values()]
    assert len(values) == 3 and found.value == pytest.approx(sum(values) / 3)
    with pytest.raises(ConfigError, match="are its own: 'gpt-4-turbo"):
        go("wildbench", folder="other", prompts=TASKS, model=mine, judge=FunctionScorer("j", quarters, unit="pair"),
           baseline={"x": {"answers": mine}, "y": {"answers": mine}})  # fmt: skip


@pytest.mark.parametrize("judge", [
    FunctionScorer("judge", size), FunctionScorer("judge", longer, unit="pair"),
    Ensemble("both", {"a": FunctionScorer("a", size), "b": FunctionScorer("b", lambda prompt, response, meta: 1.0)}),
])  # fmt: skip
def test_rewardbench_is_what_its_function_gives(go, tmp_path, judge):
    found = go("rewardbench", prompts=BENCH, judge=judge).figures[judge.name]
    own = rewardbench.evaluate_pairs(rewardbench.load_pairs(BENCH), judge, seed=42)
    assert found["subsets"] == own.subsets and found["sections"] == own.sections and found["value"] is None
    assert "hep-rust" in found["missing"]
    assert {name for line in read_lines(tmp_path / "out" / "verdicts.jsonl") for name in line["shown"]} == {
        "right",
        "wrong",
    }


def test_prompts_that_are_all_alike_give_no_interval(go):
    """60 (60 to 60) of ratings that are all 8 is no interval of 95 %."""
    texts = {key: "x" * (3 + n) for n, key in enumerate(answers_to(TASKS, 1))}
    own = {"prompts": TASKS, "model": texts, "baseline": None}
    found = go("wildbench", **own, judge=lambda prompt, response, meta: 8.0).figures["model"]
    assert found["value"] == pytest.approx(60) and found["interval"] is None and "are alike" in found["note"]
    found = go("wildbench", **own, folder="other", judge=lambda prompt, response, meta: 3.0 + len(response) % 5)
    found = found.figures["model"]
    assert found["interval"] is not None and "note" not in found


def test_rewardbench_2_is_known_by_its_rows(go):
    wrong = ["n", "nn", "nnn"]
    rows = [{"id": str(k), "subset": "Math", "prompt": f"q{k}", "chosen": ["y" * (k % 6)], "rejected": wrong}
            for k in range(1, 12)]  # fmt: skip
    found = go("rewardbench", prompts=rows, judge=size).figures["judge"]
    assert (
        found["subsets"]
        == rewardbench.evaluate_choices(rewardbench.load_choices(rows), FunctionScorer("s", size)).subsets
    )


# ---- policies, and going on


def test_two_policies_are_sampled_judged_and_read(go, policies, tmp_path):
    prompts = [{"id": str(k), "prompt": f"w{k} w{k + 1}"} for k in range(12)]
    given = {"prompts": prompts, "model": None, "models": dict(zip("ab", policies)), "baseline": "a",
             "sample": {"max_tokens": 6, "temperature": 1.0}, "judge": Judged(), "max_failed": 0.0}  # fmt: skip
    first = go("win_rate", **given)
    out = tmp_path / "out"
    lines = list(read_lines(out / "answers.jsonl"))
    assert (
        len(lines) == 24 and {line["model"] for line in lines} == {"a", "b"} and all(line["tokens"] for line in lines)
    )
    verdicts = list(read_lines(out / "verdicts.jsonl"))
    assert len(verdicts) == 24 and set(verdicts[0]["shown"]) == {"a", "b"}
    result = result_of(out)
    assert result["models"] == dict(zip("ab", policies)) and result["keys"].keys() == {"sample-a", "sample-b", "judge"}
    assert result["versions"]["fastpo"] and result["baselines"]["a"]["answers"]["mean tokens"] > 0
    page = (out / "report.html").read_text()
    assert "a shown first, b second" in page and "95% interval" in page
    # Answers that are there are those that were sampled.
    again = go("win_rate", folder="again", **given | {
        "models": {n: {"answers": str(out / "answers.jsonl"), "model": n} for n in "ab"}, "sample": None,
    })  # fmt: skip
    assert again.value == first.value
    # As are verdicts.
    there = given | {"judge": None, "verdicts": str(out / "verdicts.jsonl")}
    assert go("win_rate", folder="third", **there).value == first.value


@pytest.mark.parametrize("stop", [1, 17, 79])
def test_a_judge_that_was_killed_goes_on_with_what_is_left(go, tmp_path, stop):
    go("win_rate", folder="whole", judge=Judged())
    with pytest.raises(KeyboardInterrupt):
        go("win_rate", judge=Judged(stop=stop))
    with open(tmp_path / "out" / "judged" / "judge" / "part-0000.jsonl", "ab") as torn:
        torn.write(b'{"id":"p3","i":0,')
    rest = Judged()
    go("win_rate", judge=rest)
    assert rest.calls == 2 * COUNT - (stop - 1)
    for name in ("answers.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert result_of(tmp_path / "out")["figures"] == result_of(tmp_path / "whole")["figures"]
    done = Judged()
    go("win_rate", judge=done)
    assert done.calls == 0


KILLED = """
import json, os, signal, sys
import fastpo

calls = 0


def judge(prompt, response, meta):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return float(len(response))


fastpo.evaluate("win_rate", json.load(open("options.json")), judge={"kind": "function", "function": judge})
"""


@pytest.mark.slow
def test_a_process_that_was_killed_leaves_what_an_unbroken_one_does(tmp_path):
    many = [{"id": f"p{k}", "prompt": f"question {k}"} for k in range(600)]  # of an exact judge 256 verdicts at a time
    options = {"prompts": many, "model": {row["id"]: "a" * (k % 7) for k, row in enumerate(many)},
               "baseline": {"answers": {row["id"]: "b" * (k % 5) for k, row in enumerate(many)}}}  # fmt: skip
    script = [sys.executable, "-c", KILLED]
    for folder, kills in (("whole", [0]), ("out", [1, 700, 0])):
        (tmp_path / "options.json").write_text(json.dumps({**options, "output_dir": folder}))
        for at in kills:
            done = subprocess.run([*script, str(at)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == (-9 if at else 0), done.stderr[-2000:]
        if folder == "out":
            assert (tmp_path / "out" / "judged" / "judge" / "part-0000.jsonl").stat().st_size
    for name in ("answers.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert result_of(tmp_path / "out")["figures"] == result_of(tmp_path / "whole")["figures"]


def test_wildbenchs_judge_goes_on_too_and_a_done_one_is_not_asked_again(go):
    given = {"prompts": TASKS, "model": answers_to(TASKS, 1), "baseline": {"answers": answers_to(TASKS, 2)},
             "max_failed": 0.5}  # fmt: skip
    lost = Verdict.failed("timeout")

    def sometimes(prompt, first, second, meta):
        return lost if prompt[0]["content"] == "Task 3" else 0.75

    with pytest.raises(KeyboardInterrupt):
        go("wildbench", **given, judge=Judged(sometimes, stop=9))
    rest = Judged(sometimes)
    found = go("wildbench", **given, judge=rest)
    assert rest.calls == len(TASKS) - 1 - 8 + 1  # what failed before is asked again
    assert found.figures["model"]["left_out_failed"] == {"baseline": 1}
    assert found.counts["verdicts"]["statuses"] == {"timeout": 1}
    done = Judged(sometimes)
    assert go("wildbench", **given, judge=done).value == found.value and done.calls == 0


def test_sampling_goes_on_where_it_was_stopped(go, policies, tmp_path, monkeypatch):
    from fastpo.sampling.local_sampler import LocalSampler

    prompts = [{"id": str(k), "prompt": f"w{k}"} for k in range(9)]
    given = {"prompts": prompts, "model": policies[0], "baseline": None, "judge": size,
             "sample": {"max_tokens": 5, "temperature": 1.0, "batch_size": 2}}  # fmt: skip
    go("verifier", folder="whole", **given)
    real, batches = LocalSampler._within_memory, itertools.count()

    def stopping(self, batch, limit):
        if next(batches) == 2:
            raise KeyboardInterrupt
        return real(self, batch, limit)

    monkeypatch.setattr(LocalSampler, "_within_memory", stopping)
    with pytest.raises(KeyboardInterrupt):
        go("verifier", **given)
    assert len(list(read_lines(tmp_path / "out" / "sampled" / "model.jsonl"))) == 4
    go("verifier", **given)
    assert next(batches) == 3 + 3
    for name in ("answers.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_several_answers_a_prompt(go, policies):
    prompts = [{"id": str(k), "prompt": f"w{k}"} for k in range(6)]
    given = {"prompts": prompts, "model": policies[0], "baseline": None}
    found = go("verifier", **given, judge=size, sample={"n": 3, "temperature": 1.0, "max_tokens": 4})
    assert found.figures["model"]["answers"]["answers"] == 18 and found.figures["model"]["prompts"] == 6
    with pytest.raises(ConfigError, match="sample.n is above 1, and win_rate judges one answer a prompt"):
        go("win_rate", folder="b", **given | {"baseline": policies[1]}, judge=size, sample={"n": 2, "temperature": 1.0})
    with pytest.raises(ConfigError, match="n=2 answers of temperature 0 are all the same"):
        go("verifier", folder="c", **given, judge=size, sample={"n": 2})


def test_kept_verdicts_are_of_all_runs(go):
    first, second = Judged(cached=True, name="kept"), Judged(cached=True, name="kept")
    value = go("win_rate", judge=first).value
    assert go("win_rate", folder="second", judge=second).value == value
    assert (first.calls, second.calls) == (2 * COUNT, 0)


def test_what_has_changed_is_named_and_redone_from_there(go, tmp_path):
    go("win_rate", judge=Judged())
    with pytest.raises(
        ConfigError, match="stage judge was done with judge.judge='judge', now it is 'other'.*--from judge"
    ):
        go("win_rate", judge=Judged(name="other"))
    options = {"prompts": PROMPTS, "model": MINE, "baseline": THEIRS, "output_dir": str(tmp_path / "out")}
    again = Judged(name="other")
    fastpo.evaluate("win_rate", options, judge=again, start_from="judge")
    assert again.calls == 2 * COUNT and (tmp_path / "out" / "old-1" / "judged").is_dir()
    with pytest.raises(ConfigError, match="no stage 'judg'; did you mean 'judge'"):
        fastpo.evaluate("win_rate", options, judge=again, start_from="judg")


# ---- failures


def test_a_failed_judgement_is_never_a_number(go, tmp_path):
    def fails(prompt, first, second, meta):
        return Verdict.failed("refused", "I cannot") if prompt == "question 3" else longer(prompt, first, second, meta)

    for name in ("alpaca_eval", "arena", "win_rate", "held_out"):
        found = go(name, folder=name, judge=Judged(fails), max_failed=0.1)
        assert found.counts["verdicts"]["statuses"] == {"refused": 1 + (name != "alpaca_eval")}
    rest = [p for k, p in enumerate(preferences()) if k != 3]
    assert result_of(tmp_path / "win_rate")["figures"]["model"]["value"] == pytest.approx(100 * sum(rest) / len(rest))
    assert result_of(tmp_path / "alpaca_eval")["figures"]["model"]["missing_preferences"] == 1
    assert result_of(tmp_path / "arena")["figures"]["model"]["pairs_left_out"] == 1
    assert "failed: refused" in (tmp_path / "arena" / "report.html").read_text()
    with pytest.raises(TrainingError, match="failed on .* of 80 units, more than max_failed=0.02 allows: 2 refused"):
        go("win_rate", folder="strict", judge=Judged(fails), max_failed=None)


# ---- what is refused


BAD = {
    "no measure": (lambda go: go("alpaca", judge=size), "no measure 'alpaca', only .*; did you mean 'alpaca_eval'"),
    "no judge": (lambda go: go("win_rate"), "win_rate needs a judge"),
    "two judges": (lambda go: go("win_rate", judge=size, verdicts=[]), "give one of the two"),
    "no baseline": (lambda go: go("win_rate", judge=size, baseline=None), "compares with a baseline"),
    "no model": (lambda go: go("verifier", judge=size, model=None, baseline=None), "verifier needs model"),
    "no prompts": (lambda go: go("win_rate", judge=size, prompts=None), "needs prompts"),
    "an option": (lambda go: go("win_rate", judge=size, limits=3), "no option limits; did you mean 'limit'"),
    "its option": (lambda go: go("arena", judge=size, measure={"weigth": 1}),
                   "no option 'weigth'.*did you mean 'weight'"),
    "pairs": (lambda go: go("verifier", judge=Judged()), "needs a judge of responses"),
    "one order": (lambda go: go("arena", judge=Judged(), both_orders=False), "arena needs each pair in both orders"),
    "a prompt twice": (lambda go: go("win_rate", judge=size, prompts=[*PROMPTS, {"prompt": "question 7"}]),
                       "1 of 40 prompts occur more than once: 'question 7'"),
    "an id twice": (lambda go: go("win_rate", judge=size, prompts=[*PROMPTS, {"id": "p7", "prompt": "new"}]),
                    "1 of 40 ids of prompts occur more than once: 'p7'"),
    "missing answers": (lambda go: go("win_rate", judge=size, model=MINE[2:]),
                        "2 of 40 prompts have no answer of model: 'p0', 'p1'"),
    "others' answers": (lambda go: go("win_rate", judge=size, model=[*MINE, {"id": "p99", "text": "x"}]),
                        "1 of 41 answers of model are to other prompts: 'p99'"),
    "two answers": (lambda go: go("win_rate", judge=size, baseline=[*THEIRS, THEIRS[5]]),
                    "1 of 40 prompts have more than one answer of baseline: 'p5'"),
    "no text": (lambda go: go("win_rate", judge=size, model=[*MINE[1:], {"id": "p0"}]),
                "1 of 40 answers of model have no text"),
    "models mixed": (lambda go: go("win_rate", judge=size, model=[{**r, "model": k} for k in "ab" for r in MINE]),
                     "the answers of model are of 'a', 'b': say which"),
    "missing verdicts": (lambda go: go("verifier", baseline=None, verdicts=[dict(id="p0", shown="model", value=1)]),
                         "39 of 40 verdicts are missing: 'p1 / model'"),
    "no verdict": (lambda go: go("win_rate", verdicts=[{"id": "p0", "shown": ["model", "baseline"], "value": 1.2}]),
                   "1 of 1 verdicts are none .*: 'p0 model / baseline: 1.2'"),
    "wildbench's order": (lambda go: go("wildbench", prompts=TASKS, model=answers_to(TASKS[1:], 1), judge=quarters),
                          "1 of 20 prompts have no answer of model: 'w0'"),
    "rewardbench's answers": (lambda go: go("rewardbench", prompts=BENCH, judge=size, model=MINE),
                              "is of the judge"),
    "rewardbench's failures": (
        lambda go: go("rewardbench", prompts=BENCH, max_failed=0.9,
                      judge=lambda prompt, response, meta: None if prompt == "q3" else 1.0),
        "1 of 18 prompts have no verdict of 'judge': 'hep-python/3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name_and_count(case, go, tmp_path):
    call, message = BAD[case]
    with pytest.raises((ConfigError, DataError), match=message):
        call(go)
    assert not (tmp_path / "out" / "result.json").exists()


# ---- judges and formats


def test_a_language_model_is_asked_as_the_benchmark_asks(tmp_path):
    pytest.importorskip("openai")
    pytest.importorskip("tenacity")
    spec = {"kind": "judge", "base_url": "http://localhost:1/v1", "model": "m"}
    assert isinstance(judge_of(spec, {}, tmp_path, "arena"), ArenaJudge)
    assert isinstance(judge_of(spec, {}, tmp_path, "wildbench"), WildBenchJudge)
    assert judge_of({**spec, "mode": "response"}, {}, tmp_path, "wildbench").unit == "response"
    for given in ({**spec, "template": "pair"}, {**spec, "by": "logprobs"}):
        assert isinstance(judge_of(given, {}, tmp_path, "arena"), Judge)
    assert isinstance(judge_of(spec, {}, tmp_path), Judge)  # without its two orders, which the measure asks for


def test_what_a_judge_of_the_arena_writes():
    judge = ArenaJudge("judge", types.SimpleNamespace(exact=False, key={}, identity={}))
    assert [judge.read(f"so [[{v}]]").value for v in ("A>>B", "A>B", "A=B", "B>A", "B>>A")] == [1, 0.75, 0.5, 0.25, 0]
    assert judge.read("both are good").status == "unparsed"
    unit = Unit(Item("i", "why?", responses=(Response("one"), Response("two"))), 1, 0)
    assert judge.content(unit).index("two") < judge.content(unit).index("one")
    assert BothOrders(judge).unit == "pair"


def test_formats_of_the_benchmarks_are_read(go, tmp_path):
    rows = [{"instruction": row["prompt"], "output": b["text"], "generator": "gpt4"} for row, b in zip(PROMPTS, THEIRS)]
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{"instruction": r["prompt"], "output": a["text"]} for r, a in zip(PROMPTS, MINE)]))
    found = go("alpaca_eval", prompts=rows, model=str(path), baseline=None, judge=Judged(), measure={"resamples": 0})
    assert found.figures["model"]["win_rate"] == pytest.approx(100 * sum(preferences()) / COUNT)
    outputs = [{"session_id": k, "output": [text]} for k, text in answers_to(TASKS, 1).items()]
    assert go("wildbench", folder="wild", prompts=TASKS, model=outputs, baseline=None,
              judge=lambda prompt, response, meta: 5.0).value == pytest.approx(20 * (4.8 - 5))  # fmt: skip


def test_annotations_need_no_judge(go, tmp_path):
    rows = [
        {"instruction": row["prompt"], "output_1": b["text"], "output_2": a["text"], "generator_1": "old",
         "generator_2": "new", "preference": 1 + p}
        for row, a, b, p in zip(PROMPTS, MINE, THEIRS, preferences())
    ]  # fmt: skip
    none = {"model": None, "baseline": None}
    found = go("alpaca_eval", annotations=rows, **none, measure={"resamples": 0})
    assert found.figures["new"]["win_rate"] == pytest.approx(100 * sum(preferences()) / COUNT)
    assert (tmp_path / "out" / "report.html").exists()
    games = [{"prompt": str(k), "a": a, "b": b, "verdict": v} for k in range(5)
             for a, b, v in (("x", "y", "A>B"), ("y", "x", "B>A"))]  # fmt: skip
    with pytest.raises(DataError, match=r"no one model that is in all of them \('x', 'y'\): give baseline"):
        go("arena", annotations=games, prompts=None, **none)
    assert set(go("arena", annotations=games, prompts=None, model=None, baseline="x").figures) == {"y"}
    games += [{"prompt": "z", "a": a, "b": b, "verdict": "A=B"} for a, b in (("x", "z"), ("z", "x"))]
    assert go("arena", annotations=games, prompts=None, **none).figures["y"]["value"] < 1
    (tmp_path / "judged").mkdir()
    judged = [{"uid": str(k), "category": "hard", "model": "y", "baseline": "x", "games": [{"score": "A>B"}] * 2}
              for k in range(5)]  # fmt: skip
    (tmp_path / "judged" / "y.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    assert go("arena", annotations=tmp_path / "judged", prompts=None, **none).figures["y"]["value"] == pytest.approx(50)
    with pytest.raises(DataError, match="no judgment is of category 'creative', only of 'hard'"):
        go("arena", annotations=judged, prompts=None, **none, measure={"category": "creative"})
    scores = [{"id": r["id"], "subset": r["subset"], "scores": [len(r["chosen"]), len(r["rejected"])]} for r in BENCH]
    own = rewardbench.evaluate_pairs(rewardbench.load_pairs(BENCH), FunctionScorer("s", size))
    assert go("rewardbench", prompts=BENCH, annotations=scores).figures["judge"]["subsets"] == own.subsets
    with pytest.raises(ConfigError, match="win_rate has no annotations of its own"):
        go("win_rate", annotations=rows, **none)
    with pytest.raises(ConfigError, match="leave judge out"):
        go("alpaca_eval", annotations=rows, judge=size, **none)


def test_the_command_knows_every_measure():
    from fastpo.cli.evaluate import NAMES

    assert set(NAMES) == set(MEASURES)

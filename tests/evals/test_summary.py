"""What an evaluation says: lines for people on the terminal and the page, and how it was measured."""

import json
import re

import pytest

import fastpo
from fastpo.errors import ConfigError
from fastpo.evals import summary
from fastpo.sampling.items import Response

COUNT = 24
PROMPTS = [{"id": f"p{k}", "prompt": f"question {k}", "answer": "yes"} for k in range(COUNT)]
NO = {f"p{k}": "no" for k in range(COUNT)}


def yes(share):
    """Right answers to so many of 24 prompts."""
    return {f"p{k}": "yes" if k < share else "no" for k in range(COUNT)}


def size(prompt, response, meta):
    return float(len(response))


@pytest.fixture
def go(tmp_path):
    def run(name, folder="out", **options):
        given = {"prompts": PROMPTS, "output_dir": str(tmp_path / folder), "judge": size}
        return fastpo.evaluate(name, {**given, **{k: v for k, v in options.items() if v is not None}})

    return run


def page_of(result):
    return re.sub(r"<[^>]+>", " ", (result.output_dir / "report.html").read_text().split("<main>")[1])


# ---- did it help


def test_a_win_rate_names_itself_the_baseline_the_prompts_and_whether_it_is_a_difference(go):
    even = go("win_rate", model=yes(12), baseline={"old": {"answers": {f"p{k}": "yes" if k > 11 else "no"
                                                                       for k in range(COUNT)}}})  # fmt: skip
    [line] = summary.lines(even.result)
    assert line == "model: win rate 50% (95%: 31.43 to 68.57) against old, 24 prompts; not distinguishable from 50"
    assert line in page_of(even)
    better = summary.lines(go("win_rate", folder="better", model=yes(24), baseline={"answers": NO}).result)[0]
    assert better.endswith("against baseline, 24 prompts; better than baseline")
    worse = summary.lines(go("win_rate", folder="worse", model=NO, baseline={"answers": yes(24)}).result)[0]
    assert worse.endswith("; worse than baseline")


def test_alpacas_line_has_the_raw_rate_and_the_form(go):
    sizes = {f"p{k}": "x" * (1 + k % 5) for k in range(COUNT)}
    [line] = summary.lines(go("alpaca_eval", model=yes(18), baseline={"answers": sizes}).result)
    assert re.match(
        r"model: length-controlled win rate [\d.]+%.*, form length_controlled_minimal, raw win rate [\d.]+%", line
    )


def test_the_difference_to_the_baseline_stands_first(go):
    found = go("verifier", model=yes(20), baseline={"answers": yes(6)},
               judge={"kind": "verifier", "verifier": "exact_match"})  # fmt: skip
    mine, theirs = summary.lines(found.result)
    assert mine.startswith("model: difference to baseline +0.5833 (95%: ") and "paired on 24 prompts" in mine
    assert "better than baseline; mean score 0.8333 (95%: " in mine
    assert theirs.startswith("baseline: mean score 0.25 (95%: ")
    tiles = page_of(found).split("baseline: mean score")[1]
    assert tiles.index("model, difference to baseline") < tiles.index("0.8333")
    alike = go("verifier", folder="alike", model=yes(7), baseline={"answers": yes(6)},
               judge={"kind": "verifier", "verifier": "exact_match"})  # fmt: skip
    assert "; not distinguishable from 0; mean score" in summary.lines(alike.result)[0]


def test_the_best_is_said_only_where_it_can_be_told(go):
    alike = go("held_out", models={"a": yes(13), "b": yes(12)}).result
    assert not any("the best" in line for line in summary.lines(alike))
    [remark] = summary.remarks(alike)
    assert remark.startswith("no clear difference between a and b: +0.04167 (95%: ")
    apart = go("held_out", folder="apart", models={"a": yes(3), "b": yes(22)}).result
    assert [line.endswith("; the best") for line in summary.lines(apart)] == [False, True]
    alone = go("held_out", folder="alone", model=yes(3)).result
    assert "best" not in summary.lines(alone)[0] and not summary.remarks(alone)
    with_baseline = go("held_out", folder="baseline", models={"a": yes(3), "b": NO}, baseline={"old": {"answers":
                       yes(22)}}).result  # fmt: skip
    assert not with_baseline["figures"]["old"]["best"]  # it is none of the models that are chosen from


@pytest.mark.parametrize("unit, name", [("pair", "WB-Reward"), ("response", "WB-Score")])
def test_wildbench_names_the_figure_that_was_computed(go, unit, name):
    tasks = [{"id": f"p{k}", "conversation_input": [{"role": "user", "content": f"Task {k}"}], "checklist": ["?"],
              "primary_tag": "Math", "secondary_tags": []} for k in range(COUNT)]  # fmt: skip
    judges = {"pair": lambda prompt, first, second, meta: 0.75, "response": lambda prompt, response, meta: 5.0}
    found = go("wildbench", prompts=tasks, model=yes(3), judge=judges[unit],
               baseline={"answers": NO} if unit == "pair" else None).result  # fmt: skip
    assert summary.lines(found)[0].startswith(f"model: {name} ") and "of -100 to 100" in summary.lines(found)[0]


def test_pairs_of_ones_own_have_their_share_of_right_ones(go):
    rows = [{"id": k, "subset": "shp", "prompt": "q", "chosen": "yes" * k, "rejected": "ny"} for k in range(1, 5)]
    found = go("rewardbench", prompts=rows).result
    assert summary.lines(found) == ["judge: score: no figure, for others are missing; right in shp 1"]


# ---- what a reader must know


@pytest.mark.parametrize("p, place", [(0.9, "first"), (0.1, "second")])
def test_a_judge_that_goes_by_the_place_is_named_beside_the_figure(go, p, place):
    found = go("win_rate", model=yes(12), baseline={"answers": NO}, judge=lambda prompt, first, second, meta: p)
    said = f"the judge names the answer that is shown {place} in 24 of 24 pairs: the figure says nothing of the models"
    assert summary.remarks(found.result) == [said] and said in page_of(found)
    assert "distinguishable" not in summary.lines(found.result)[0]


def test_a_judge_that_sees_the_answers_is_not_named(go):
    found = go("win_rate", model=yes(22), baseline={"answers": NO},
               judge=lambda prompt, first, second, meta: 0.5 + (len(first) - len(second)) / 4)  # fmt: skip
    assert not summary.remarks(found.result)


class CutOff:
    """A sampler that reaches the limit on all but two prompts."""

    exact, key, found = True, {"sampler": "cut off"}, {}

    def batches(self, requests):
        return [list(requests)]

    def sample(self, requests):
        for k, request in enumerate(requests):
            yield request, Response("word " * (1 + k), (1, 2, 3), finished=k < 2)

    def close(self):
        pass


@pytest.fixture
def policy(toy, tmp_path):
    toy.tokenizer().save_pretrained(tmp_path / "policy")
    toy.model().save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_answers_that_were_cut_off_are_spoken_of(tmp_path, policy):
    options = {"prompts": PROMPTS, "model": policy, "judge": size, "sample": {"max_tokens": 48}}
    found = fastpo.evaluate("verifier", options, output_dir=str(tmp_path / "out"), sampler=lambda path: CutOff())
    said = "model: 22 of 24 answers were cut off: raise sample.max_tokens, now 48"
    assert summary.remarks(found.result) == [said] and said in page_of(found)
    record = json.loads((tmp_path / "out" / "stages" / "sample-model.json").read_text())
    assert "drop_truncated" not in record["options"]["sample"]  # nothing is dropped
    # The file of answers says it too, and what does not say it is not known.
    there = {"prompts": PROMPTS, "judge": size, "model": str(tmp_path / "out" / "answers.jsonl")}
    again = fastpo.evaluate("verifier", there, output_dir=str(tmp_path / "again"))
    assert again.figures["model"]["answers"]["cut off"] == 22 and not summary.remarks(again.result)


def test_whether_an_answer_was_cut_off_is_not_known_where_nobody_says_it(go):
    found = go("verifier", model=yes(3))
    assert found.result["figures"]["model"]["answers"]["cut off"] is None
    assert json.loads((found.output_dir / "answers.jsonl").read_text().splitlines()[0])["finished"] is None
    assert re.search(r"model\s+24\s+0\s+0\s+–", page_of(found))


# ---- how it was measured


def test_result_and_page_say_how_it_was_measured(go, policy, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    found = go("win_rate", model=policy, prompts=str(rows), limit=6, baseline={"old": {"answers": NO}},
               sample={"max_tokens": 3, "temperature": 0.5}, judge={"kind": "function", "function": size})  # fmt: skip
    how = found.result["how"]
    assert how["models"]["model"]["policy"] == policy and how["models"]["model"]["sample"]["temperature"] == 0.5
    assert how["prompts"] == {"from": str(rows), "number": 6, "drawn from": 24}
    assert how["judge"] == {"kind": "function", "function": "size"}
    page = page_of(found)
    assert policy in page and f"6, drawn from 24: {rows}" in page and "judge: function" in page
    assert "sections {}" not in page and "in both orders:" not in page


def test_what_is_read_first_are_answers_that_differ_half_won_and_half_lost(go):
    mine = {f"p{k}": "short" if k % 2 else "longer answer" for k in range(COUNT)}
    theirs = {f"p{k}": "middle" if k < 16 else mine[f"p{k}"] for k in range(COUNT)}
    page = (go("win_rate", model=mine, baseline={"answers": theirs}).output_dir / "report.html").read_text()
    shown = re.findall(r"<h3>(p\d+)", page) or re.findall(r">(p\d+)<", page)
    first = [int(name[1:]) for name in dict.fromkeys(shown)]
    assert len(first) == 12 and all(k < 16 for k in first) and sum(k % 2 for k in first) == 6


# ---- functions


def test_a_function_of_a_pair_is_known_by_its_parameters(go):
    def better(prompt, first, second, meta):
        return 0.5 + (len(first) - len(second)) / 4

    assert go("win_rate", model=yes(24), baseline={"answers": NO}, judge=better).value == 75
    with pytest.raises(ConfigError, match="needs a judge of responses"):
        go("verifier", model=yes(24), judge=better)

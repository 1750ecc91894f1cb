"""fastpo.evaluate of annotations: what is missing or twice is refused by name and count, unless gaps are allowed; what
a figure says of itself."""

import html
import json

import pytest

import fastpo
from fastpo.errors import DataError

PROMPTS = [{"id": f"p{k}", "prompt": f"question {k}"} for k in range(40)]
BENCH = [
    {"id": k, "subset": subset, "prompt": f"q{k}", "chosen": "yes", "rejected": "no"}
    for k, subset in enumerate(["hep-python", "math-prm", "alpacaeval-easy"] * 6)
]  # fmt: skip


@pytest.fixture
def go(tmp_path):
    """`go(NAME, **options)` in the test's folder `out`: the figures."""

    def run(name, **options):
        return fastpo.evaluate(name, {"output_dir": str(tmp_path / "out"), **options}).figures

    return run


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def annotated(lost=0, **changes):
    """Annotations of alpaca_eval: the first `lost` have no preference, and two rows these changes."""
    return [
        {"instruction": row["prompt"], "output_1": "b" * (5 + k % 7), "output_2": "a" * (4 + k % 9),
         "generator_1": "old", "generator_2": "new", "preference": None if k < lost else 1 + (k % 3) / 2,
         **(changes if k < 2 else {})}
        for k, row in enumerate(PROMPTS)
    ]  # fmt: skip


def games(lost=0):
    return [{"prompt": str(k), "a": a, "b": b, "verdict": None if k < lost else v} for k in range(8)
            for a, b, v in (("x", "y", "A>B"), ("y", "x", "A=B"))]  # fmt: skip


@pytest.mark.parametrize("name, rows, said, left_out", [
    ("alpaca_eval", annotated(lost=20), "new: 20 of 40 preferences are missing: 'question 0', .* and 15 more; allow_m",
     {"missing_preferences": 20, "missing_answers": 0, "missing_baseline_answers": 0}),
    ("alpaca_eval", annotated(output_1=None), "new: 2 of 40 answers of the baseline are missing: 'question 0', 'ques",
     {"missing_preferences": 0, "missing_answers": 0, "missing_baseline_answers": 2}),
    ("alpaca_eval", annotated()[3:], "new: 3 of 40 prompts have no annotation: 'question 0'", {"prompts": 37}),
    ("arena", games(lost=3), "3 of 8 pairs lack a verdict in one of the two orders: '0: x / y'",
     {"pairs_left_out": 3}),
], ids=["preferences", "answers of the baseline", "prompts", "games"])  # fmt: skip
def test_annotations_with_gaps_are_refused_unless_gaps_are_allowed(go, tmp_path, name, rows, said, left_out):
    given = {"annotations": rows} | ({"prompts": PROMPTS} if name == "alpaca_eval" else {"baseline": "x"})
    with pytest.raises(DataError, match=said):
        go(name, **given, measure={"resamples": 10})
    assert not (tmp_path / "out" / "result.json").exists()
    [found] = go(name, **given, measure={"resamples": 10, "allow_missing": True}).values()
    assert {key: found[key] for key in left_out} == left_out


def test_what_a_figure_says_of_itself_is_in_the_result_and_on_the_page(go, tmp_path):
    rows = [{**row, "output_2": "a" * (900 + k % 2)} for k, row in enumerate(annotated())]
    found = go("alpaca_eval", annotations=rows)["new"]
    assert found["interval"] is None and found["error"] is None and found["raw_interval"] is not None
    assert result_of(tmp_path / "out")["figures"]["new"]["note"] == found["note"]
    said = f"; {html.escape(found['note'])}</p>"  # the end of the model's sentence
    assert said in (tmp_path / "out" / "report.html").read_text()


def test_rewardbenchs_annotations_that_failed_or_are_repeated(go, caplog):
    rows = [{"id": r["id"], "subset": r["subset"], "scores": [1.0, 0.0] if k > 5 else [None, None]}
            for k, r in enumerate(BENCH)]  # fmt: skip
    given = {"prompts": BENCH, "annotations": rows}
    with pytest.raises(DataError, match=r"^6 of 18 prompts have no verdict of the annotations: 'hep-python/0 \(failed"):
        go("rewardbench", **given)
    found = go("rewardbench", **given, measure={"failed": "count"})["judge"]
    assert found["subsets"] == pytest.approx(dict.fromkeys(("hep-python", "math-prm", "alpacaeval-easy"), 5 / 6))
    assert len(found["failed"]) == 6 and "6 of 18 prompts have a failed verdict of the annotations" in caplog.text
    with pytest.raises(DataError, match="^2 of 18 prompts have scores more than once: 'hep-python/6', 'math-prm/7'$"):
        go("rewardbench", prompts=BENCH, annotations=[*rows, *rows[6:8]])
    many = [{"id": str(k), "subset": "Math", "prompt": "q", "chosen": ["y"], "rejected": ["a", "b", "c"]}
            for k in range(3)]  # fmt: skip
    scores = [{"id": row["id"], "subset": "Math", "scores": [1.0, 0.0, None, 0.0]} for row in many]
    with pytest.raises(DataError, match="^3 of 3 prompts have no verdict of the annotations: 'Math/0"):
        go("rewardbench", prompts=many, annotations=scores)

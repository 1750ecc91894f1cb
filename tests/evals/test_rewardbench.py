"""RewardBench 1 and 2: the package's own figures, any scorer, bad input."""

import json
import logging
import math
import random
import statistics
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import fastpo
import rewardbench_parity as made
from fastpo.errors import ConfigError, DataError
from fastpo.evals import rewardbench as rb
from fastpo.evals.text_judge import TextJudge
from fastpo.sampling.items import Verdict
from fastpo.scoring.judges import Judge
from fastpo.scoring.scorers import make_scorer
from fastpo.scoring.scoring import BaseScorer, Ensemble, FunctionScorer

FROZEN = json.loads((Path(__file__).parent / "rewardbench_parity.json").read_text())
SEEDS = made.SEEDS
NEAR = dict(rel=0, abs=1e-12)


# ---- the package's rules


def test_the_tables_are_the_packages():
    assert {name: list(subsets) for name, subsets in rb.SECTIONS.items()} == FROZEN["sections"]
    assert rb.WEIGHTS == FROZEN["counts"]


@pytest.mark.parametrize("seed", SEEDS)
def test_sections_and_their_mean(seed):
    subsets = made.made_subsets(seed, list(rb.WEIGHTS), whole=seed % 2 == 0)
    theirs = FROZEN["section_scores"][seed]
    sections = rb.section_scores(subsets)
    assert sections == pytest.approx({n: v for n, v in theirs.items() if n in sections}, **NEAR)
    assert all(theirs[n] == 0 for n in rb.SECTIONS if n not in sections)
    whole = rb.section_scores(made.made_subsets(seed, list(rb.WEIGHTS), whole=True))
    prior = rb.prior_score(made.made_subsets(seed, list(rb.PRIOR_COUNTED), whole=True)) if seed % 2 else None
    assert rb.overall_score(whole, prior) == pytest.approx(FROZEN["overall"][seed], **NEAR)


@pytest.mark.parametrize("seed", SEEDS)
def test_best_of_and_ties(seed):
    assert [rb.best_of_result(g) for g in made.made_groups(seed)] == pytest.approx(FROZEN["best_of"][seed], **NEAR)
    assert rb.ties_score(made.made_ties(seed)).score == pytest.approx(FROZEN["ties"][seed], **NEAR)


@pytest.mark.slow
def test_the_installed_package_gives_the_frozen_numbers():
    """0.1.4, the newest on PyPI, has the sections alone; the rest is in the repository's 0.1.5."""
    utils = pytest.importorskip("rewardbench.utils", exc_type=ImportError)
    for seed in SEEDS:
        subsets = made.made_subsets(seed, list(rb.WEIGHTS), whole=seed % 2 == 0)
        assert made.their_sections(subsets) == pytest.approx(FROZEN["section_scores"][seed], **NEAR)
        if hasattr(utils, "reroll_and_score_dataset"):
            assert made.their_best_of(made.made_groups(seed)) == pytest.approx(FROZEN["best_of"][seed], **NEAR)
        if hasattr(utils, "process_single_model"):
            assert made.their_ties(made.made_ties(seed)) == pytest.approx(FROZEN["ties"][seed], **NEAR)


def test_equal_scores():
    assert [rb.pair_result(a, 1.0) for a in (0.5, 1.0, 1.5)] == [0, 0, 1]
    assert rb.pair_result(1.0, 1.0, tie=0.5) == 0.5
    assert [rb.best_of_result(s) for s in ([1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0])] == [1, 1 / 2, 1 / 3, 0]


# ---- rows and scorers


def pairs(per=3):
    """Chosen answers hold a number above the rejected one's."""
    rng = random.Random(0)
    rows = []
    for subset in rb.WEIGHTS:
        for _ in range(per):
            low, high = sorted(rng.sample(range(100), 2))
            rows.append({"id": len(rows), "subset": subset, "prompt": f"p{len(rows)}", "chosen": str(high),
                         "rejected": str(low)})  # fmt: skip
    return rows


def choices(per=4):
    rng = random.Random(1)
    rows = []
    for subset in rb.DOMAINS[:-1]:
        for n in range(per):
            high, *low = sorted(rng.sample(range(100), 4), reverse=True)
            rows.append({"id": f"{subset}-{n}", "subset": subset, "prompt": "p", "chosen": [str(high)],
                         "rejected": [str(x) for x in low]})  # fmt: skip
    for n in range(per):
        rows.append({"id": f"ref:{n}", "subset": "Ties", "prompt": "p", "chosen": ["90"], "rejected": ["1", "2"]})
        rows.append({"id": f"tied:{n}", "subset": "Ties", "prompt": "p", "chosen": ["90", "91"], "rejected": ["3"]})
    return rows


def value(prompt, response, meta):
    return float(response)


SCORERS = {
    "response": value,
    "pair": lambda prompt, first, second, meta: float(float(first) > float(second)),
    "list": lambda prompt, responses, meta: [float(r) for r in responses],
}


@pytest.mark.parametrize("unit", SCORERS)
@pytest.mark.parametrize("right", [True, False])
def test_any_scorer_and_its_opposite(unit, right):
    def turned(*given):
        found = SCORERS[unit](*given)
        if right:
            return found
        return 1 - found if unit == "pair" else [-x for x in found] if unit == "list" else -found

    scorer = FunctionScorer("f", turned, unit=unit)
    result = rb.evaluate_pairs(rb.load_pairs(pairs()), scorer)
    assert result.score == result.sections["Chat"] == result.subsets["hep-js"] == float(right)
    assert result.counts == dict.fromkeys(rb.WEIGHTS, 3) and not result.missing and not result.failed
    if unit == "pair":
        with pytest.raises(ConfigError, match="needs a scorer of responses or of lists"):
            rb.evaluate_choices(rb.load_choices(choices()), scorer)
        return
    result = rb.evaluate_choices(rb.load_choices(choices()), scorer)
    assert [result.subsets[name] for name in rb.DOMAINS[:-1]] == [float(right)] * 5
    if right:  # spread 1, gap 86 and more: tanh is 1
        assert result.ties.score == pytest.approx(1.01) and result.score == pytest.approx((5 + 1.01) / 6)
    else:
        assert result.ties.ref_accuracy == result.ties.tied_accuracy == result.ties.preferred == 0


@pytest.mark.parametrize("unit", ["pair", "list"])
def test_what_is_shown_first_wins_half(unit):
    first = {"pair": lambda prompt, a, b, meta: 1.0, "list": lambda prompt, rs, meta: [1.0] + [0.0] * (len(rs) - 1)}
    scorer = FunctionScorer("first", first[unit], unit=unit)
    rows = rb.load_pairs(pairs(per=20))
    results = [rb.evaluate_pairs(rows, scorer, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    assert results[0].score == pytest.approx(0.5, abs=5 * results[0].errors["score"])
    # The order of one prompt depends on nothing else.
    one = [c for c in rows if c.subset == "hep-go"]
    assert rb.evaluate_pairs(one, scorer).subsets["hep-go"] == results[0].subsets["hep-go"]


def test_ties_of_judges_are_worth_half():
    rows = rb.load_pairs(pairs())
    same = {"response": lambda p, r, m: 1.0, "pair": lambda p, a, b, m: 0.5, "list": lambda p, rs, m: [1.0, 1.0]}
    found = {u: rb.evaluate_pairs(rows, FunctionScorer("s", f, unit=u)).score for u, f in same.items()}
    assert found == {"response": 0.0, "pair": 0.5, "list": 0.5}
    assert rb.evaluate_pairs(rows, FunctionScorer("s", same["response"]), tie=0.5).score == 0.5
    assert (
        rb.evaluate_choices(rb.load_choices(choices()), FunctionScorer("s", same["response"])).subsets["Math"] == 0.25
    )


class Seven(TextJudge):
    """A language model that rates every answer 7."""

    key, unit, benchmark = {"judge": "seven"}, "response", "RewardBench"

    def __init__(self):
        super().__init__("seven", types.SimpleNamespace(exact=False, close=lambda: None, answers=self.answers))

    def answers(self, questions, read):
        yield from ((n, read("7")) for n in range(len(questions)))

    def content(self, unit):
        return unit.responses[0].text

    def value(self, reply):
        return float(reply)


def test_ties_of_language_models_that_rate_answers_are_worth_half(tmp_path):
    """run_judge_ratings gives equal ratings no winner, for which run_generative.py counts 1/2."""
    rows = rb.load_pairs(pairs())
    assert rb.evaluate_pairs(rows, Seven()).score == 0.5 and rb.evaluate_pairs(rows, Seven(), tie=0).score == 0
    backend = types.SimpleNamespace(exact=False, key={}, identity={})
    judge = Judge("judge", backend, "response")
    value_of_seven = FunctionScorer("f", lambda prompt, response, meta: 7.0)
    members = {"seven": Seven(), "f": value_of_seven}
    assert [rb.tie_of(s) for s in (judge, value_of_seven, Ensemble("e", members))] == [0.5, 0.0, 0.0]
    del members["f"]
    assert rb.tie_of(Ensemble("e", members)) == 0.5
    found = fastpo.evaluate("rewardbench", {"prompts": pairs(), "judge": Seven(), "output_dir": str(tmp_path)})
    assert found.figures["seven"]["value"] == 0.5


def test_prior_sets_have_half_a_weight():
    rows = [{"id": n, "prompt": [{"role": "user", "content": "p"}], "chosen": "0", "rejected": "1"} for n in range(4)]
    prior = [c for name in rb.PRIOR for c in rb.load_pairs(rows, subset=name)]
    result = rb.evaluate_pairs([*rb.load_pairs(pairs()), *prior], FunctionScorer("f", value))
    assert result.prior == 0 and result.score == pytest.approx(4 / 4.5)
    some = rb.evaluate_pairs(rb.load_pairs(pairs()[:9]), FunctionScorer("f", value))
    assert some.score is None and some.sections == {"Chat": 1.0} and len(some.missing) == 20


def test_failed_verdicts(caplog):
    def f(prompt, response, meta):
        return None if response in lost else float(response)

    rows = rb.load_pairs(pairs())
    lost = [rows[0].answers[0], rows[4].answers[1]]
    hit = [c.name for c in rows if set(c.answers) & set(lost)]
    with caplog.at_level(logging.WARNING, "fastpo"):
        result = rb.evaluate_pairs(rows, FunctionScorer("f", f))
    assert set(result.failed) == set(hit) and f"{len(hit)} of {len(rows)} prompts" in caplog.text
    half = [c.name for c in rows if c.subset == rows[0].subset]
    assert result.subsets[rows[0].subset] == statistics.fmean(0.5 if n in hit else 1.0 for n in half)
    with pytest.raises(DataError, match=rf"^{len(hit)} of {len(rows)} prompts have no verdict of 'f'.*\(none\)"):
        rb.evaluate_pairs(rows, FunctionScorer("f", f), failed="refuse")
    many = rb.load_choices(choices())
    lost = [many[0].answers[1]]  # a wrong answer without a score is below the right one
    assert rb.evaluate_choices(many[:1], FunctionScorer("f", f)).subsets["Factuality"] == 1
    lost = [many[0].answers[0]]
    assert rb.evaluate_choices(many[:1], FunctionScorer("f", f)).subsets["Factuality"] == 0
    lost = many[0].answers
    assert rb.evaluate_choices(many[:1], FunctionScorer("f", f)).subsets["Factuality"] == 0.25
    lost = ["3"]  # of every tied prompt
    ties = rb.evaluate_choices([c for c in many if c.subset == "Ties"], FunctionScorer("f", f)).ties
    assert (ties.ref_accuracy, ties.tied_accuracy, ties.preferred_hard, ties.margin) == (1, 0, 0, 0)


def test_a_scorer_that_leaves_units_out():
    class Silent(BaseScorer):
        name, key = "silent", {}

        def score(self, units):
            yield units[0], Verdict(1.0)

    result = rb.evaluate_pairs(rb.load_pairs(pairs()), Silent())
    assert len(result.failed) == 69 and set(result.failed.values()) == {"no verdict"}


def test_errors_are_standard_errors():
    rng = random.Random(0)
    scores, rows = {}, rb.load_pairs(pairs(per=8))
    spread = []
    for _ in range(300):
        scores = {c.name: (float(rng.random() < 0.7), 0.5) for c in rows}
        result = rb.of_pairs(rows, scores)
        spread.append((result.score, result.errors["score"]))
    assert statistics.stdev(s for s, _ in spread) == pytest.approx(statistics.fmean(e for _, e in spread), rel=0.15)


def test_the_ties_interval_covers():
    def draw(rng, prompts=60):
        rows = []
        for n in range(prompts):
            rows += [(f"ref:{n}", 1, [rng.gauss(1, 1), rng.gauss(0, 1)])]
            rows += [(f"tied:{n}", 2, [rng.gauss(2, 0.5), rng.gauss(2, 0.5), rng.gauss(0, 1)])]
        return rows

    rng = random.Random(0)
    true = rb.ties_score(draw(rng, 20_000)).score
    found = [rb.ties_score(draw(rng)) for _ in range(150)]
    covered = sum(abs(f.score - true) < 1.96 * f.error for f in found) / len(found)
    assert 0.88 <= covered <= 0.99


# ---- models of ours


def test_models_and_ratios_as_scorers(toy, tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=toy.words + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64, num_labels=1, pad_token_id=2)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    for seed, name in enumerate(("strong", "weak")):
        toy.model(seed=seed).save_pretrained(tmp_path / name)
    for name in ("rm", "strong", "weak"):
        toy.tokenizer().save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("rm", "strong", "weak")}
    rng = random.Random(0)
    rows = [
        {"id": n, "subset": "hep-go", "prompt": toy.text(rng, 2, 5), "chosen": " " + toy.text(rng, 1, 3),
         "rejected": " " + toy.text(rng, 5, 9)} for n in range(12)
    ]  # fmt: skip
    given = rb.load_pairs(rows)
    swapped = rb.load_pairs([{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows])
    sections = {
        "rm": {"kind": "reward_model", "model": "rm"},
        "ratio": {"kind": "density_ratio", "strong": "strong", "weak": "weak"},
        "implicit": {"kind": "implicit", "policy": "strong", "reference": "weak"},
        "lengths": {"kind": "implicit", "policy": "strong", "reference": "weak", "alpha": 5.0},
        "both": {"kind": "ensemble", "of": ["rm", "ratio"], "rule": "mean"},
    }
    for name, section in sections.items():
        scorer = make_scorer(name, section, paths, tmp_path, others=sections)
        result, other = rb.evaluate_pairs(given, scorer), rb.evaluate_pairs(swapped, scorer)
        assert not result.failed and result.subsets["hep-go"] + other.subsets["hep-go"] == pytest.approx(1), name
        if name == "lengths":  # every chosen answer is shorter, and a character costs 5
            assert result.subsets["hep-go"] == 1
        else:
            assert 0 < result.subsets["hep-go"] < 1, name


# ---- bad input

BAD = {
    "no column": (lambda rows: [{**dict(list(r.items())[:3]), "rejected": "1"} for r in rows],
                  "have no column 'chosen'"),
    "missing answers": (lambda rows: [{**r, "rejected": None} if r["id"] < 2 else r for r in rows],
                        "^2 of 69 rows of RewardBench's pairs have no 'rejected'; numbers of the rows: 0, 1$"),
    "duplicates": (lambda rows: [*rows, rows[0], rows[5]],
                   "^2 of 69 prompts occur more than once: 'alpacaeval-easy/0', 'alpacaeval-length/5'$"),
    "another subset": (lambda rows: [{**rows[0], "subset": "hep-ja"}], "no subset 'hep-ja' .*did you mean 'hep-java'"),
    "no rows": (lambda rows: [], "no rows"),
    "an answer that is none": (lambda rows: [{**rows[0], "chosen": 3}], "neither a text nor turns"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs(case):
    change, message = BAD[case]
    with pytest.raises(DataError, match=message):
        rb.load_pairs(change(pairs()))


def test_bad_choices():
    rows = choices()
    for change, message in (
        ({"rejected": []}, "^1 of 1 prompts lack right or wrong answers: 'Factuality/Factuality-0'"),
        ({"chosen": ["1", "2"]}, "^1 of 1 prompts have more than one right answer, and are not of Ties"),
        ({"subset": "Fact"}, "did you mean 'Factuality'"),
    ):
        with pytest.raises(DataError, match=message):
            rb.load_choices([{**rows[0], **change}])
    with pytest.raises(DataError, match="^1 of 1 prompts of Ties are not of the form .*: 'one'$"):
        rb.ties_score([("one", 1, [1.0, 0.0])])
    with pytest.raises(DataError, match="two and more of a tied one.*: 'tied:1'$"):
        rb.ties_score([("ref:1", 1, [1.0, 0.0]), ("tied:1", 1, [1.0, 0.0])])
    with pytest.raises(DataError, match="both a ref and a tied"):
        rb.ties_score([("ref:1", 1, [1.0, 0.0])])


def test_bad_scores():
    rows = rb.load_pairs(pairs())
    whole, last = {c.name: (1.0, 0.0) for c in rows}, "hep-rust/68"
    with pytest.raises(DataError, match="^1 of 69 prompts have no scores: 'alpacaeval-easy/0'$"):
        rb.of_pairs(rows, {n: s for n, s in whole.items() if n != "alpacaeval-easy/0"})
    with pytest.raises(DataError, match="^1 of 69 prompts have scores that are not finite: 'hep-rust/68'$"):
        rb.of_pairs(rows, {**whole, last: (math.nan, 0.0)})
    with pytest.raises(DataError, match="^1 of 69 prompts have another number of scores"):
        rb.of_pairs(rows, {**whole, last: (1.0,)})
    with pytest.raises(DataError, match="no prompts"):
        rb.of_pairs([], {})
    with pytest.raises(ConfigError, match="failed='no'"):
        rb.evaluate_pairs(rows, FunctionScorer("f", value), failed="no")


@pytest.mark.parametrize("load", [rb.load_pairs, rb.load_choices, lambda: rb.load_pairs(rb.PRIOR_SETS, subset="shp")])
def test_a_data_set_that_is_not_here(load):
    with pytest.raises(DataError, match="are not here: .*give the rows, or the path of a file of them$") as raised:
        load()
    assert "\n" not in str(raised.value)


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    assert rb.load_pairs(path) == rb.load_pairs(pairs())
    with pytest.raises(DataError, match="are not here: no such file"):
        rb.load_choices(tmp_path / "none.jsonl")
    path.write_text("{no JSON")
    with pytest.raises(DataError, match="^RewardBench's pairs cannot be read: .*line 1"):
        rb.load_pairs(path)
    with pytest.raises(DataError, match="^RewardBench's pairs cannot be read: row 0 is a int"):
        rb.load_pairs([1])

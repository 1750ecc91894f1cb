"""Scorers of plain Python: what a function may give, and that nothing else becomes a number."""

import functools
import math
import operator
from decimal import Decimal
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from fastpo.errors import ConfigError
from fastpo.sampling.items import Item, Response, Scores, Unit, Verdict
from fastpo.scoring.scorers import BothOrders, Ensemble, FunctionScorer, Rules, make_scorer
from fastpo.scoring.scoring import BaseScorer, load_function
from fastpo.selection import ensemble_reward


def item(*texts, prompt="p", name="x", **meta):
    return Item(name, prompt, responses=tuple(Response(text) for text in texts), meta=meta)


def units(scorer, of):
    if scorer.unit == "response":
        return [Unit(of, i) for i in range(len(of.responses))]
    return [Unit(of, 0, 1)] if scorer.unit == "pair" else [Unit(of)]


def verdicts(scorer, of):
    return [verdict for _, verdict in scorer.score(units(scorer, of))]


GIVEN = [
    (1, 1.0), (0.5, 0.5), (True, 1.0), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (torch.tensor(2.0), 2.0),
    (np.array(3), 3.0), (-3.0, -3.0), (None, "none"), (math.nan, "not_finite"), (math.inf, "not_finite"),
    (-math.inf, "not_finite"), (torch.tensor(math.nan), "not_finite"), ("3", "not_a_number"), ([1.0], "not_a_number"),
    (torch.tensor([1.0]), "not_a_number"), (1j, "not_a_number"), (Decimal(1), "not_a_number"), ({}, "not_a_number"),
    (10**400, "not_finite"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "found"), GIVEN, ids=[repr(given)[:30] for given, _ in GIVEN])
def test_what_a_function_may_give(given, found):
    plain = FunctionScorer("f", lambda prompt, response, meta: given)
    trl = FunctionScorer("f", lambda prompts, completions, **columns: [given] * len(completions))
    for scorer in (plain, trl):
        for verdict in verdicts(scorer, item("a", "b")):
            assert (verdict.status if verdict.value is None else verdict.value) == found
            assert verdict.value is None or type(verdict.value) is float


def test_exceptions_are_failures_of_their_own_units():
    def f(prompt, response, meta):
        if response == "b":
            raise RuntimeError("no\nb")
        return 1.0

    found = verdicts(FunctionScorer("f", f), item("a", "b", "c"))
    assert [v.value for v in found] == [1.0, None, 1.0]
    assert found[1].status == "error" and found[1].raw == "RuntimeError: no b"


def test_by_name_by_position_and_in_part():
    of = item("a", "b", prompt=[{"role": "user", "content": "q"}], answer=4)
    for f in (
        lambda prompt, response, meta: meta["answer"],
        lambda x, y, z: z["answer"],
        lambda response: 4,
        lambda meta, response: meta["answer"] * (response in "ab"),
        lambda *given: given[2]["answer"],
        functools.partial(lambda factor, response: factor * 2, 2),
        lambda **given: given["meta"]["answer"],
        lambda response, strict=True: 4 if strict else 0,
    ):
        assert [v.value for v in verdicts(FunctionScorer("f", f), of)] == [4.0, 4.0]
    pair = FunctionScorer("f", lambda prompt, first, second, meta: 0.25 if first < second else 0.75, unit="pair")
    assert [v.value for v in verdicts(pair, of)] == [0.25]
    listed = FunctionScorer("f", lambda responses: [1.0, None], unit="list")
    assert [v.value for v in verdicts(listed, of)] == [(1.0, None)]
    with pytest.raises(ConfigError, match="cannot be called"):
        FunctionScorer("f", lambda x: 1)
    with pytest.raises(ConfigError, match="did you mean 'response'"):
        FunctionScorer("f", lambda response: 1, unit="responses")


def test_probabilities_and_lists_of_a_wrong_size():
    of = item("a", "b")
    for p in (-0.1, 1.5):
        [verdict] = verdicts(FunctionScorer("f", lambda first, second, p=p: p, unit="pair"), of)
        assert verdict.value is None and verdict.status == "out_of_range"
    for given, status in (
        ([1.0], "wrong_count"), ([1.0, 2.0, 3.0], "wrong_count"), (1.0, "not_a_list"), ("12", "not_a_list"),
        (None, "not_a_list"), ({0: 1, 1: 2}, "not_a_list"), ([None, math.nan], "none"),
    ):  # fmt: skip
        [verdict] = verdicts(FunctionScorer("f", lambda responses, given=given: given, unit="list"), of)
        assert verdict.value is None and verdict.status == status


def test_trl_signature():
    seen = []

    def reward(prompts, completions, answer, completion_ids=None, **columns):
        seen.append((prompts, completions, answer, completion_ids, columns))
        return [float(c == a) for c, a in zip(completions, answer)]

    of = Item("x", "q", responses=(Response("4", (1, 2)), Response("5", (3,))), meta={"answer": "4", "level": 2})
    assert [v.value for v in verdicts(FunctionScorer("r", reward), of)] == [1.0, 0.0]
    assert seen == [(["q", "q"], ["4", "5"], ["4", "4"], [[1, 2], [3]], {"level": [2, 2]})]

    chat = item("4", prompt=[{"role": "user", "content": "q"}])
    turns = []
    scorer = FunctionScorer("r", lambda completions, **kwargs: turns.append(completions) or [0.0])
    verdicts(scorer, chat)
    assert turns == [[[{"role": "assistant", "content": "4"}]]]

    assert [v.status for v in verdicts(FunctionScorer("r", reward), item("4", "5"))] == ["error"] * 2  # no answer
    for given, status in ((lambda completions: [1.0], "wrong_count"), (lambda completions: 1 / 0, "error"),
                          (lambda completions: None, "error")):  # fmt: skip
        assert [v.status for v in verdicts(FunctionScorer("r", given), of)] == [status] * 2


def test_the_key_is_of_what_the_function_is(tmp_path):
    def key(function, **options):
        return FunctionScorer("f", function, **options).key

    def made(n):
        return lambda response: n

    assert key(made(1)) == key(made(1)) != key(made(2))
    assert key(lambda response, n=1: n) != key(lambda response, n=2: n)
    one, two = (functools.partial(max, n) for n in (1, 2))
    assert key(one) != key(two)
    path = tmp_path / "judges.py"
    path.write_text("def good(response):\n    return helper(response)\n\ndef helper(r):\n    return 1.0\n")
    first = FunctionScorer("f", "judges.py:good", where=tmp_path)
    assert verdicts(first, item("a"))[0].value == 1.0
    path.write_text(path.read_text().replace("1.0", "2.0"))
    second = FunctionScorer("f", "judges.py:good", where=tmp_path)
    assert verdicts(second, item("a"))[0].value == 2.0 and first.key != second.key
    assert load_function("operator:length_hint") == (operator.length_hint, ANY)
    for given, words in (
        ("judges.py:godo", "did you mean 'good'"), ("nothing.py:f", "no file"),
        ("no_such_module:f", "cannot be imported"), ("judges", "expected a callable"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            FunctionScorer("f", given, where=tmp_path)


# ---- verifiers


def verified(options, *responses, prompt="p", **meta):
    scorer = make_scorer("v", {"kind": "verifier", **options}, {}, Path())
    return [v.status if v.value is None else v.value for v in verdicts(scorer, item(*responses, prompt=prompt, **meta))]


def test_verifiers():
    assert verified({"verifier": "max_words", "n": 2}, "a b", "a b c", "") == [1, 0, 0]
    assert verified({"verifier": "min_words", "n": 2}, "a b", "a") == [1, 0]
    assert verified({"verifier": "regex", "pattern": r"^a.*z$"}, "a\nz", "b") == [1, 0]
    assert verified({"verifier": "regex", "pattern": "X", "absent": True, "ignore_case": True}, "x", "y") == [0, 1]
    exact = {"verifier": "exact_match"}
    assert verified(exact, " 4 ", "5", answer=4) == [1, 0]
    assert verified(exact, "4") == ["error"]  # no such column
    assert verified({**exact, "part": "last_word"}, "so it is **even**.", "odd", answer="even") == [1, 0]
    assert verified({**exact, "part": "last_line", "ignore_case": True}, "x\nEven", "even\nx", answer="even") == [1, 0]
    for options, words in (
        ({"verifier": "max_word", "n": 1}, "did you mean 'max_words'"), ({"verifier": "max_words"}, "needs 'n'"),
        ({"verifier": "max_words", "m": 1}, "no option 'm'"), ({"verifier": "max_words", "n": "1"}, "whole number"),
        ({"verifier": "regex", "pattern": "("}, "no regular expression"), ({}, "needs 'verifier'"),
        ({**exact, "part": "last"}, "none of whole"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            verified(options, "a")


def test_math_verify():
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra verify)")
    options = {"verifier": "math_verify"}
    given = [r"So it is $\frac{1}{2}$.", "0.5", r"\boxed{0.25}", "I do not know"]
    assert verified(options, *given, answer="1/2") == [1, 1, 0, 0]
    assert verified(options, "5", answer=5) == [1]
    assert verified(options, "5", answer="?!") == ["error"] and verified(options, "5") == ["error"]


def test_ifeval():
    pytest.importorskip("if_verifiable", reason="if-verifiable is not installed (extra verify)")
    asked = {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
             "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "at least"}]}  # fmt: skip
    options = {"verifier": "ifeval"}
    assert verified(options, "one two three", "one, two three", "a, b", "", **asked) == [1, 0, 0, 0]
    assert verified({**options, "rule": "mean"}, "one two three", "one, two three", "a, b", **asked) == [1, 0.5, 0]
    loose = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    text = "Sure, here:\nno commas"
    assert verified(options, text, **loose) == [0] and verified({**options, "loose": True}, text, **loose) == [1]
    # What IFEval's own code skips, or fills in by chance, is no verdict here.
    for broken in (
        {"instruction_id_list": ["punctuation:no_comas"], "kwargs": [{}]},
        {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least"}]},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"instruction_id_list": [], "kwargs": []}, {},
    ):  # fmt: skip
        assert verified(options, "one two three", **broken) == ["error"]


# ---- both orders, rules


class Fixed(BaseScorer):
    """A pair scorer of given probabilities, None for a failure."""

    name, unit = "fixed", "pair"

    def __init__(self, p):
        self.p = p

    key = property(lambda self: {"fixed": 1})

    def score(self, asked):
        for unit in asked:
            p = self.p[unit.i, unit.j]
            yield unit, Verdict.failed("refused", "no") if p is None else Verdict(p, raw=f"{unit.i}{unit.j}")


def test_both_orders_are_one_verdict():
    [verdict] = verdicts(BothOrders(Fixed({(0, 1): 0.9, (1, 0): 0.3})), item("a", "b"))
    assert verdict.value == pytest.approx(0.8) and '"raw": "10"' in verdict.raw
    [always_a] = verdicts(BothOrders(Fixed({(0, 1): 1.0, (1, 0): 1.0})), item("a", "b"))
    assert always_a.value == 0.5
    for p in ({(0, 1): None, (1, 0): 1.0}, {(0, 1): 1.0, (1, 0): None}):
        [verdict] = verdicts(BothOrders(Fixed(p)), item("a", "b"))
        assert verdict.value is None and verdict.status == "refused"
    with pytest.raises(ConfigError, match="two orders"):
        BothOrders(FunctionScorer("f", lambda response: 1.0))


def test_rules_are_a_mean_or_nothing():
    rules = [lambda response: "a" in response, lambda response: len(response) > 1]
    assert [v.value for v in verdicts(Rules("r", rules), item("ab", "a", "b"))] == [1.0, 0.5, 0.0]
    [failed] = verdicts(Rules("r", [*rules, lambda response: None]), item("ab"))
    assert failed.value is None and failed.status == "none"
    [failed] = verdicts(Rules("r", [lambda response: 2.0]), item("ab"))
    assert failed.value is None and failed.status == "out_of_range"
    with pytest.raises(ConfigError, match="needs a judge"):
        Rules("r", ["The answer is polite."])
    with pytest.raises(ConfigError, match="no rules"):
        Rules("r", [])


# ---- ensembles


def ensemble(rule="mean", names="abc", **options):
    return Ensemble("all", dict.fromkeys(names, Fixed({})), rule, **options)


def tables(**columns):
    """A table of one item a member, of its values."""
    return {name: {"x": Scores(list(values))} for name, values in columns.items()}


@pytest.mark.parametrize("rule", ["mean", "wco", "uwo"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_rules_of_ensembles_are_those_of_selection(rule, unbiased):
    values = torch.randn(3, 7, dtype=torch.float64)
    given = tables(**{name: row.tolist() for name, row in zip("abc", values)})
    made, _ = ensemble(rule, normalise=False, unbiased=unbiased, coefficient=0.7).combine(given)
    wanted = ensemble_reward(values, rule, coefficient=0.7, unbiased=unbiased)
    np.testing.assert_allclose(made["x"].values, wanted, rtol=1e-12)
    np.testing.assert_allclose(made["x"].spread, values.std(0, unbiased=False), rtol=1e-12)


def test_members_are_normalised_over_the_stage():
    given = {
        "a": {"x": Scores([1.0, 3.0]), "y": Scores([5.0, None])},
        "b": {"x": Scores([2.0, 2.0]), "y": Scores([2.0, 2.0])},
    }
    made, moments = ensemble(names="ab").combine(given)
    std = math.sqrt(8 / 3)
    assert moments["a"] == {"mean": 3.0, "std": pytest.approx(std), "normalised": True}
    assert made["x"].values == pytest.approx([-1 / std, 0.0]) and made["y"].values == [pytest.approx(1 / std), None]
    # r + lambda mean(rules): the reward normalised, the rules as they are.
    made, _ = ensemble("sum", names="ab", normalise=["a"], weights={"b": 0.5}).combine(given)
    assert made["x"].values == pytest.approx([-2 / std + 1, 1.0])


def test_a_member_that_failed():
    given = tables(a=[1.0, None, None], b=[3.0, 3.0, None], c=[5.0, 5.0, 5.0])
    strict, _ = ensemble(normalise=False).combine(given)
    assert strict["x"].values == [3.0, None, None]
    two, _ = ensemble(normalise=False, min_valid=2).combine(given)
    assert two["x"].values == [3.0, 4.0, None]
    least, _ = ensemble("wco", normalise=False, min_valid=1).combine(given)
    assert least["x"].values == [1.0, 3.0, 5.0]


def test_wco_is_not_led_by_a_member_that_can_be_hacked():
    rng = np.random.default_rng(0)
    good = rng.normal(size=200)
    members = [good + rng.normal(size=200) * 0.3 for _ in range(3)]
    hacked = rng.random(200) < 0.1
    members[0] = members[0] + 6.0 * hacked  # a bonus for something else
    given = tables(**dict(zip("abc", members)))
    best = {}
    for rule in ("mean", "wco"):
        made, _ = ensemble(rule, normalise=False).combine(given)
        best[rule] = good[np.argsort(made["x"].values)[-10:]].mean()
    assert best["wco"] > best["mean"] + 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "wcoo"}, "did you mean 'wco'"), ({"weights": {"d": 1}}, "no member"),
        ({"rule": "uwo", "weights": {"a": 1}}, "no weights"), ({"weights": {"a": -1}}, "above 0"),
        ({"rule": "sum", "min_valid": 1}, "another number"), ({"min_valid": 4}, "min_valid=4"),
        ({"normalise": ["z"]}, "no member"), ({"weights": {"a": math.nan}}, "no finite number"),
        ({"rule": "uwo", "unbiased": True, "min_valid": 1}, "min_valid=1"),
    ],
)  # fmt: skip
def test_ensembles_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        ensemble(**options)


# ---- by name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "no `kind`"), ({"kind": "judg"}, "did you mean 'judge'"), ({"kind": "function"}, "needs 'function'"),
        ({"kind": "function", "function": "math:sqrt", "units": 1}, "did you mean 'unit'"),
        ({"kind": "reward_model"}, "needs 'model'"),
        ({"kind": "reward_model", "model": "starr"}, "did you mean 'start'"),
        ({"kind": "reward_model", "model": "start", "batchsize": 1}, "did you mean 'batch_size'"),
        ({"kind": "judge"}, "needs 'base_url'"),
        ({"kind": "judge", "base_url": "http://x/v1", "mode": "pairs"}, "did you mean 'pair'"),
        ({"kind": "judge", "base_url": "http://x/v1", "temprature": 1}, "did you mean 'temperature'"),
        ({"kind": "judge", "path": "start", "by": "text"}, "judges by logprobs"),
        ({"kind": "judge", "path": "start", "temperature": 1}, "no option 'temperature'"),
        ({"kind": "implicit", "policy": "start"}, "needs 'reference'"),
        ({"kind": "implicit", "policy": "start", "reference": "start", "alpha": -1}, "alpha=-1"),
        ({"kind": "density_ratio", "strong": "start", "weak": "start", "reduce": "max"}, "sum, mean"),
        ({"kind": "rules", "rules": []}, "no rules"), ({"kind": "rules", "rules": "none.txt"}, "cannot be read"),
        ({"kind": "ensemble", "of": ["b"]}, "of names 'b'"), ({"kind": "ensemble", "of": []}, "needs other scorers"),
        ({"kind": "ensemble", "of": {"b": {"kind": "function", "function": "math:sqrt"}}, "rules": "wco"}, "'rule'"),
    ],
)  # fmt: skip
def test_sections_that_are_refused(spec, words):
    with pytest.raises(ConfigError, match=words):
        make_scorer("a", spec, {"start": "/nowhere"}, Path())


def test_an_ensemble_finds_its_members_by_name():
    others = {"a": {"kind": "verifier", "verifier": "max_words", "n": 3}, "all": {"kind": "ensemble", "of": ["a"]}}
    made = make_scorer("all", others["all"], {}, Path(), others=others)
    assert list(made.members) == ["a"] and made.key["ensemble"]["a"]["verifier"] == "max_words"


def test_rules_of_a_file(tmp_path):
    (tmp_path / "rules.txt").write_text("Be short.\n\nBe kind.\n")
    (tmp_path / "rules.json").write_text('["Be short.", "Be kind."]')
    for name in ("rules.txt", "rules.json"):
        with pytest.raises(ConfigError, match="'Be short.' is a text"):
            make_scorer("r", {"kind": "rules", "rules": name}, {}, tmp_path)


def test_an_ensemble_keeps_its_name_whatever_is_normalised():
    members = {name: FunctionScorer(name, lambda prompt, response, meta: 1.0) for name in ("a", "b")}
    for more in ({"normalise": ["a"]}, {"weights": {"b": 2.0}}):
        assert Ensemble("all", members, "sum", **more).name == "all"

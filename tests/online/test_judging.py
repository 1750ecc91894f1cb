"""Preferences between a step's responses: by rewards, by scorers of pairs, by TRL's judges."""

import math
from collections import Counter

import numpy as np
import pytest

from fastpo.errors import ConfigError, TrainingError
from fastpo.online.judging import Preferences, compared
from fastpo.online.rewards import Rewards
from fastpo.sampling.items import Response
from fastpo.scoring.scoring import FunctionScorer

NAN = float("nan")
ROWS = [{"prompt": "one"}, {"prompt": [{"role": "user", "content": "two"}]}]
GROUPS = [[Response(t) for t in ("a", "bb", "ccc")], [Response(t) for t in ("dddd", "d")]]


def pair(function):
    return FunctionScorer(function.__name__, function, unit="pair")


def longer(prompt, first, second):
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


class Judge:
    """TRL's kind."""

    def __init__(self, rank):
        self.rank, self.asked = rank, []

    def judge(self, prompts, completions, shuffle_order=True):
        assert not shuffle_order
        self.asked += [(prompt, *pair) for prompt, pair in zip(prompts, completions, strict=True)]
        return [self.rank(*pair) for pair in completions]


def of_length(first, second):
    return int(len(second) > len(first))


WINS = [[[0.5, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 1.0, 0.5]], [[0.5, 1.0], [0.0, 0.5]]]


SECTION = {"kind": "function", "function": longer, "unit": "pair"}


@pytest.mark.parametrize("judge", [pair(longer), Judge(of_length), SECTION])
def test_who_beats_whom(judge):
    found = Preferences(judge=judge)(ROWS, GROUPS)
    assert [w.tolist() for w in found.wins] == WINS and found.wins[0].dtype == np.float64
    assert found.used.all() and not found.left_out and found.line() == "" and found.rewards is None
    assert (found.orders.pairs, found.orders.by_position) == (4, 0)


def test_what_trls_judge_is_shown():
    judge = Judge(of_length)
    Preferences(judge=judge)(ROWS, GROUPS)
    assert judge.asked[:2] == [("one", "a", "bb"), ("one", "bb", "a")] and judge.asked[-1] == ("two", "d", "dddd")
    judge.asked.clear()
    found = Preferences(judge=judge, both_orders=False)(ROWS, GROUPS)
    assert len(judge.asked) == 4 and found.orders is None


def always_first(prompt, first, second):
    return 1.0


@pytest.mark.parametrize("judge", [pair(always_first), Judge(lambda first, second: 0)])
def test_a_judge_that_names_the_first_gives_ties(judge):
    found = Preferences(judge=judge)(ROWS, GROUPS)
    assert all((w == 0.5).all() for w in found.wins)
    assert (found.orders.pairs, found.orders.by_position) == (4, 4)
    one = Preferences(judge=judge, both_orders=False)(ROWS, GROUPS)
    assert one.wins[1].tolist() == [[0.5, 1.0], [0.0, 0.5]]


def test_a_section_that_asks_one_order():
    """Nothing is loaded: a judge in this process loads its model when it is first asked."""
    section = {"kind": "judge", "path": "a/b"}
    for given, both in ((None, True), (True, True), (False, False)):
        options = {} if given is None else {"both_orders": given}
        preferences = Preferences(judge=section | options)
        assert preferences.both_orders is both and preferences.scorer.unit == "pair"
        assert not Preferences(judge=section | options, both_orders=False).both_orders


def test_equal_texts_are_a_tie_and_asked_once():
    judge = Judge(of_length)
    group = [Response(t) for t in ("bb", "a", "bb", "a")]
    [wins] = Preferences(judge=judge)(ROWS[:1], [group]).wins
    assert wins.tolist() == [[0.5, 1, 0.5, 1], [0, 0.5, 0, 0.5], [0.5, 1, 0.5, 1], [0, 0.5, 0, 0.5]]
    assert len(judge.asked) == 2


@pytest.mark.parametrize("rank", [-1, None, NAN, 2, 0.4, "0"])
def test_a_rank_that_is_none_is_no_win_of_the_second(rank):
    def judge(first, second):
        return rank if "bb" in (first, second) and "a" in (first, second) else of_length(first, second)

    found = Preferences(judge=Judge(judge))(ROWS, GROUPS)
    assert math.isnan(found.wins[0][0, 1]) and math.isnan(found.wins[0][1, 0])
    assert found.wins[0][2].tolist() == [1, 1, 0.5] and found.used.all()
    assert sum(found.left_out.values()) == 1 and "1 of 4 pairs could not be judged" in found.line()


def test_one_order_that_failed_is_the_pair():
    def judge(prompt, first, second):
        return None if first == "ccc" else longer(prompt, first, second)

    found = Preferences(judge=pair(judge))(ROWS, GROUPS)
    assert np.isnan(found.wins[0][2]).all() and np.isnan(found.wins[0][:, 2]).all()
    assert found.used.tolist() == [True, True, False, True, True] and found.left_out == {"judge: none": 2}
    assert found.wins[0][:2, :2].tolist() == [[0.5, 0.0], [1.0, 0.5]]


def test_a_judge_that_raises_on_one_prompt():
    class Raises(Judge):
        def judge(self, prompts, completions, **options):
            if "one" in prompts:
                raise ConnectionError("reset")
            return super().judge(prompts, completions, **options)

    found = Preferences(judge=Raises(of_length))(ROWS, GROUPS)
    assert np.isnan(found.wins[0]).all() and found.wins[1].tolist() == WINS[1]
    assert found.left_out == {"Raises: error": 3} and found.said == {"Raises: error": "ConnectionError: reset"}


def test_a_judge_that_never_judges_stops_the_run():
    for judge in (Judge(lambda first, second: -1), pair(lambda prompt, first, second: 1 / 0)):
        preferences = Preferences(judge=judge)
        with pytest.raises(TrainingError, match="could not judge any of 4 pairs"):
            preferences(ROWS, GROUPS)
        found = preferences(ROWS, GROUPS, stop=False)
        assert found.broken and all(np.isnan(w).all() for w in found.wins) and not found.used.any()


def test_a_judge_that_judged_once_may_fail():
    down = False

    def judge(first, second):
        return -1 if down else of_length(first, second)

    preferences = Preferences(judge=Judge(judge))
    preferences(ROWS, GROUPS)
    down = True
    assert preferences(ROWS, GROUPS).left_out == {"Judge: error": 4}


def test_probabilities_of_a_judge_that_has_them():
    class Soft:
        def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
            assert return_scores and not shuffle_order
            return [0.9 if len(a) > len(b) else 0.2 for a, b in completions]

    [_, wins] = Preferences(judge=Soft())(ROWS, GROUPS).wins
    assert np.allclose(wins, [[0.5, 0.85], [0.15, 0.5]])


# ---- rewards


def length(completions, **kwargs):
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def test_by_the_difference_of_rewards():
    found = Preferences(Rewards([length], weights=[0.5]))(ROWS, GROUPS)
    assert found.rewards.tolist() == [0.5, 1.0, 1.5, 2.0, 0.5]
    assert np.allclose(found.wins[1], [[0.5, 1 / (1 + math.exp(-1.5))], [1 / (1 + math.exp(1.5)), 0.5]], rtol=1e-15)
    assert (found.wins[0] + found.wins[0].T == 1).all()
    hard = Preferences(Rewards([length]), comparison="hard")(ROWS, GROUPS)
    assert [w.tolist() for w in hard.wins] == WINS


def test_far_apart_and_equal_rewards():
    wins = compared(np.array([1e4, -1e4, -1e4, NAN]))
    assert wins[:3, :3].tolist() == [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    assert np.isnan(wins[3]).all() and np.isnan(wins[:, 3]).all()
    assert compared(np.array([1.0, 1.0]), "hard").tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_the_penalty_of_what_did_not_end():
    group = [Response("aaa", finished=False), Response("aa"), Response("a", finished=False)]
    found = Preferences(Rewards(length), missing_eos_penalty=1.5, comparison="hard")(ROWS[:1], [group])
    assert found.rewards.tolist() == [1.5, 2.0, -0.5]
    assert found.wins[0].tolist() == [[0.5, 0, 1], [1, 0.5, 1], [0, 0, 0.5]]


def test_rewards_that_failed():
    def f(completions, **kwargs):
        return [NAN if c == "bb" else 1.0 for c in completions]

    found = Preferences(Rewards([length, f]))(ROWS, GROUPS)
    assert np.isnan(found.wins[0][1]).all() and np.isnan(found.rewards[1])
    assert found.used.tolist() == [True, False, True, True, True]
    assert found.left_out == Counter({"f: not_finite": 1}) == found.judged.left_out
    assert "1 of 5 responses" in found.line()
    broken = Preferences(Rewards({"f": lambda **kwargs: None}))
    with pytest.raises(TrainingError, match="'f' could not judge"):
        broken(ROWS, GROUPS)
    assert broken(ROWS, GROUPS, stop=False).broken


def test_a_response_alone_is_not_used():
    for preferences in (Preferences(Rewards(length)), Preferences(judge=pair(longer))):
        found = preferences([ROWS[0], ROWS[1], ROWS[0]], [GROUPS[0], GROUPS[1][:1], []])
        assert found.used.tolist() == [True] * 3 + [False] and [w.shape for w in found.wins] == [(3, 3), (1, 1), (0, 0)]


def test_a_judge_of_single_responses_is_a_reward():
    preferences = Preferences(judge={"kind": "verifier", "verifier": "max_words", "n": 1}, comparison="hard")
    group = [Response("a"), Response("b c"), Response("d")]
    assert preferences(ROWS[:1], [group]).wins[0].tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]


def test_what_is_closed():
    class Closed(FunctionScorer):
        closed = False

        def close(self):
            self.closed = True

    one, two = (Closed("c", longer, unit="pair") for _ in range(2))
    with Preferences(judge=one), Preferences(Rewards([two])):
        pass
    assert one.closed and two.closed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of them"),
        ({"rewards": length, "judge": Judge(of_length)}, "give one of them"),
        ({"rewards": length, "comparison": "bradley"}, "none of bradley_terry, hard; did you mean 'bradley_terry'"),
        ({"rewards": length, "missing_eos_penalty": -1}, "expected a number from 0 on"),
        ({"rewards": length, "missing_eos_penalty": NAN}, "expected a number from 0 on"),
        ({"judge": Judge(of_length), "missing_eos_penalty": 1.0}, "a judge of pairs gives none"),
        ({"judge": 3}, "judge=3: expected a scorer's section"),
        ({"judge": {"kind": "judg"}}, "did you mean 'judge'"),
    ],
)
def test_what_is_refused(given, message):
    if "rewards" in given:
        given = given | {"rewards": Rewards(given["rewards"])}
    with pytest.raises(ConfigError, match=message):
        Preferences(**given)

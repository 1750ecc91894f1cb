"""The score stage: what is asked, that it goes on where it was cut short, and what its table says."""

import itertools
import json
import os
import random
import signal
import time
import types
from pathlib import Path

import pytest
import torch

from fastpo.errors import ConfigError, TrainingError
from fastpo.loop.score_stage import (
    plan_units,
    planned,
    position_bias,
    read_scores,
    read_verdicts,
    score_stage,
    tournament_matches,
    wins_of,
)
from fastpo.loop.selecting import bracket
from fastpo.loop.verdicts import VerdictCache
from fastpo.sampling.items import Item, Response, Unit, Verdict
from fastpo.scoring.scorers import BothOrders, Ensemble, FunctionScorer
from fastpo.scoring.scoring import BaseScorer


def items(n, k=3, source="policy"):
    return [
        Item(f"i{m}", f"p{m}", responses=tuple(Response(f"{m}-{j}", source=source) for j in range(k))) for m in range(n)
    ]


def lines(folder, name):
    return [json.loads(line) for line in (folder / name / "part-0000.jsonl").read_text().splitlines()]


class Spy(BaseScorer):
    """A scorer that remembers what it was asked, and answers by a function of the unit."""

    def __init__(self, answer, unit="response", *, name="spy", exact=False, cached=False, version=1):
        self.name, self.unit, self.exact, self.cached, self.version = name, unit, exact, cached, version
        self.answer, self.asked = answer, []

    key = property(lambda self: {"spy": self.version})

    def score(self, units):
        for unit in units:
            self.asked.append(unit.key)
            value = self.answer(unit)
            yield unit, value if isinstance(value, Verdict) else Verdict(value)


def beats(unit):
    """The later response is better, and what is shown first is favoured a little."""
    return 0.9 if unit.i > unit.j else 0.2


# ---- plans


def test_plans():
    [of] = items(1, 3)
    of = of.with_responses([*of.responses[:1], *(Response(r.text, source="gold") for r in of.responses[1:])])
    pair = Spy(beats, "pair")

    def asked(plan, both):
        return [unit.key[1:] for unit in plan_units(of, pair, plan, both)]

    assert asked("all", False) == [(0, 1), (0, 2), (1, 2)]
    assert asked("all", True) == [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    assert asked("against", False) == [(0, 1), (0, 2)] and asked("against:gold", False) == asked("all", False)
    assert [u.key[1:] for u in plan_units(of, Spy(None))] == [(0, None), (1, None), (2, None)]
    assert [u.key[1:] for u in plan_units(of, Spy(None, "list"))] == [(None, None)]
    assert planned([of, of], pair, "all", True) == 12 and planned(items(2, 8), pair, "tournament", False) == 22
    with pytest.raises(ConfigError, match="did you mean 'tournament'"):
        score_stage(pair, [of], Path(), plan="tournamnt")


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7, 8])
def test_a_tournament_asks_what_its_bracket_needs(k):
    rng = random.Random(k)
    for _ in range(40):
        p = {pair: rng.choice([0.0, 0.3, 0.5, 1.0, None]) for pair in itertools.combinations(range(k), 2)}
        for (i, j), value in list(p.items()):
            p[j, i] = None if value is None else 1 - value
        known = {}
        while missing := tournament_matches(k, known):
            assert not set(missing) & set(known) and len(set(map(frozenset, missing))) == len(missing)
            known |= {pair: p[pair] for pair in missing}
        # With every verdict known the bracket comes to the same, and all that it looks at was asked.
        looked = set()

        def probability(i, j, looked=looked, p=p):
            looked.add(frozenset((i, j)))
            return p[i, j]

        best, worst = bracket(k, probability)
        if best is not None and worst is not None and best != worst:
            looked.add(frozenset((best, worst)))
        assert looked == set(map(frozenset, known))
        if k == 8 and None not in known.values():
            assert len(known) == 11


def test_the_best_of_a_transitive_judge_wins_the_tournament(tmp_path):
    """Against brute force: who wins most of all pairs is the best, who wins least the worst."""
    of = items(20, 8)
    strength = {f"i{m}": random.Random(m).sample(range(8), 8) for m in range(20)}
    judge = Spy(lambda u: float(strength[u.item.id][u.i] > strength[u.item.id][u.j]), "pair")
    counts = score_stage(judge, of, tmp_path, plan="tournament", both_orders=True)
    # The last match is known where the best and the worst met in the first round.
    met = sum(any({s[k], s[k + 1]} == {0, 7} for k in range(0, 8, 2)) for s in strength.values())
    assert counts["asked"] == 20 * 22 - 2 * met == counts["units"] and 0 < met < 20
    for name, scores in read_scores(tmp_path, "spy", of).items():
        best, worst = bracket(8, lambda i, j, wins=scores.wins: wins[i][j])
        assert strength[name][best] == 7 and strength[name][worst] == 0
        assert scores.wins[best][worst] == 1.0


# ---- what is written, and read


def test_pairs_in_both_orders(tmp_path):
    of = items(2, 2)
    counts = score_stage(BothOrders(Spy(beats, "pair")), of, tmp_path)
    assert counts["orders"] == {"pairs": 2, "agree": 1.0, "by_position": 0.0, "first": 0.0, "gap": pytest.approx(0.1)}
    written = lines(tmp_path, "spy")
    assert [(w["id"], w["i"], w["j"], w["value"], w["status"]) for w in written[:2]] == [
        ("i0", 0, 1, 0.2, "ok"), ("i0", 1, 0, 0.9, "ok")
    ]  # fmt: skip
    scores = read_scores(tmp_path, "spy", of)["i0"]
    assert scores.wins == [[None, pytest.approx(0.15)], [pytest.approx(0.85), None]]
    assert scores.values == [pytest.approx(0.15), pytest.approx(0.85)] and scores.agreement == [pytest.approx(0.1)]


def test_a_cyclic_judge_is_kept_as_it_was_measured(tmp_path):
    p = {(0, 1): 0.9, (1, 2): 0.8, (0, 2): 0.1}
    score_stage(Spy(lambda u: p[u.i, u.j], "pair"), items(1), tmp_path)
    scores = read_scores(tmp_path, "spy", items(1))["i0"]
    for (i, j), value in p.items():
        assert scores.wins[i][j] == value and scores.wins[j][i] == 1 - value


def test_one_order_that_failed_is_the_pair_that_failed(tmp_path):
    judge = Spy(lambda u: Verdict.failed("refused", "no") if u.i == 2 else beats(u), "pair")
    score_stage(judge, items(1), tmp_path, both_orders=True, max_failed=0.5)
    scores = read_scores(tmp_path, "spy", items(1))["i0"]
    assert scores.wins[0][2] is scores.wins[2][0] is scores.wins[1][2] is None and scores.wins[0][1] is not None
    assert scores.values[2] is None and len(scores.agreement) == 1
    assert read_verdicts(tmp_path, "spy")["i0"][2, 0] == "refused"


def test_a_judge_that_always_says_a(tmp_path):
    of = items(3)
    counts = score_stage(BothOrders(Spy(lambda u: 1.0, "pair")), of, tmp_path)
    assert counts["orders"] == {"pairs": 9, "agree": 0.0, "by_position": 1.0, "first": 1.0, "gap": 1.0}
    for scores in read_scores(tmp_path, "spy", of).values():
        assert {p for row in scores.wins for p in row} == {None, 0.5} and scores.values == [0.5] * 3
    assert position_bias({}) == {"pairs": 0, "agree": None, "by_position": None, "first": None, "gap": None}


def test_responses_and_lists(tmp_path):
    of = items(2)
    score_stage(Spy(lambda u: Verdict.failed("none") if u.i == 1 else float(u.i)), of, tmp_path, max_failed=1)
    assert read_scores(tmp_path, "spy", of)["i1"].values == [0.0, None, 2.0]
    assert read_scores(tmp_path, "spy", of)["i1"].wins is None
    wins = read_scores(tmp_path, "spy", of, wins=True)["i1"].wins
    assert wins[0][2] == pytest.approx(torch.tensor(-2.0).sigmoid().item()) and wins[0][1] is None and wins[0][0] == 0.5
    assert wins_of([0.0, 1000.0]) == [[0.5, 0.0], [1.0, 0.5]]
    listed = Spy(lambda u: (1.0, None, 3.0) if u.item.id == "i0" else Verdict.failed("unparsed"), "list", name="l")
    score_stage(listed, of, tmp_path, max_failed=0.5)
    table = read_scores(tmp_path, "l", of)
    assert table["i0"].values == [1.0, None, 3.0] and table["i1"].values == [None] * 3


def test_too_many_failures_end_the_stage(tmp_path):
    judge = Spy(lambda u: Verdict.failed("unparsed" if u.i else "refused", f"reply\n{u.i}"))
    with pytest.raises(TrainingError) as error:
        score_stage(judge, items(100), tmp_path, max_failed=0.02)
    assert "failed on 7 of 300 units, more than max_failed=0.02 allows: 3 refused, 4 unparsed" in str(error.value)
    assert "refused: 'reply 0' | unparsed: 'reply 1' | refused: 'reply 0'" in str(error.value)
    assert len(judge.asked) == 7 and not (tmp_path / "spy" / "scorer.json").exists()
    with pytest.raises(ConfigError, match="no scores of 'spy'"):
        read_scores(tmp_path, "spy", items(1))


# ---- going on


def test_what_is_there_is_not_asked_again_and_what_failed_once_more(tmp_path):
    of, broken = items(4), {("i1", 2, None), ("i2", 0, None)}
    first = Spy(lambda u: Verdict.failed("timeout") if u.key in broken else float(u.i))
    score_stage(first, of, tmp_path, max_failed=1)
    part = tmp_path / "spy" / "part-0000.jsonl"
    kept = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(kept[:8]) + kept[8][:20])  # cut short: the last line torn, i1 2 and i2 0 failed
    second = Spy(lambda u: Verdict.failed("timeout") if u.key == ("i2", 0, None) else float(u.i))
    counts = score_stage(second, of, tmp_path, max_failed=0.1)
    assert second.asked == [("i1", 2, None), ("i2", 0, None), *((f"i{m}", i, None) for m, i in
                            ((2, 2), (3, 0), (3, 1), (3, 2)))]  # fmt: skip
    assert counts == {"units": 12, "ok": 11, "failed": 1, "statuses": {"timeout": 1}, "asked": 6, "from_cache": 0}
    assert read_scores(tmp_path, "spy", of)["i1"].values == [0.0, 1.0, 2.0]
    assert len(lines(tmp_path, "spy")) == 13  # i1 2 twice: what failed as before is not written again
    third = Spy(lambda u: 5.0)
    assert score_stage(third, of, tmp_path, max_failed=0.1)["failed"] == 0 and third.asked == [("i2", 0, None)]


def test_lines_of_another_judge_do_not_count(tmp_path):
    of = items(2)
    score_stage(Spy(lambda u: 0.0), of, tmp_path)
    other = Spy(lambda u: 1.0, version=2)
    counts = score_stage(other, of, tmp_path)
    assert counts["of_another_judge"] == 6 == len(other.asked)
    assert read_scores(tmp_path, "spy", of)["i0"].values == [1.0] * 3


def test_another_model_under_the_same_name_judges_anew(tmp_path):
    class Served(Spy):
        says = "one"
        identity = property(lambda self: {**self.key, **({"server": self.says} if self.says else {})})

    of = items(2)
    first = Served(lambda u: 0.0)
    score_stage(first, of, tmp_path)
    part = tmp_path / "spy" / "part-0000.jsonl"
    whole = part.read_bytes()
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    again = Served(lambda u: 2.0)
    assert score_stage(again, of, tmp_path)["units"] == 6 and len(again.asked) == 4
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    silent = Served(lambda u: 3.0)
    silent.says = None  # a server that does not say what it has
    score_stage(silent, of, tmp_path)
    assert len(silent.asked) == 4
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    other = Served(lambda u: 1.0)
    other.says = "two"
    assert score_stage(other, of, tmp_path)["of_another_judge"] == 2 and len(other.asked) == 6
    assert read_scores(tmp_path, "spy", of)["i0"].values == [1.0] * 3
    # A stage that has all its verdicts asks nobody who they are.
    part.write_bytes(whole)
    done = Served(lambda u: 1 / 0)
    done.identity_asked = False
    counts = score_stage(done, of, tmp_path)
    assert counts["asked"] == 0 and read_scores(tmp_path, "spy", of)["i0"].values == [0.0] * 3


def test_exact_scorers_are_asked_in_the_batches_of_the_plan(tmp_path, monkeypatch):
    """What a number depends on beside its unit, the batch, is as in an unbroken run."""
    monkeypatch.setattr("fastpo.loop.score_stage.CHUNK", 4)

    class Batched(Spy):
        def score(self, units):
            self.asked.append([u.key for u in units])
            for n, unit in enumerate(units):
                yield unit, Verdict(float(len(units) * 100 + n))

    of = items(5)
    whole, broken = Batched(None, exact=True), Batched(None, exact=True)
    score_stage(whole, of, tmp_path / "whole")
    score_stage(broken, of, tmp_path / "broken")
    assert [len(chunk) for chunk in whole.asked] == [6, 6, 3]
    part = tmp_path / "broken" / "spy" / "part-0000.jsonl"
    unbroken = part.read_bytes()
    for cut in (0, 10, len(unbroken) // 3, len(unbroken) // 2, len(unbroken) - 1):
        part.write_bytes(unbroken[:cut])
        score_stage(Batched(None, exact=True), of, tmp_path / "broken")
        assert part.read_bytes() == unbroken == (tmp_path / "whole" / "spy" / "part-0000.jsonl").read_bytes()


def _slow(response):
    time.sleep(0.001)
    return float(sum(map(ord, response)) % 7)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["response", "tournament", "failing"])
def test_killed_and_started_again(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("fastpo.loop.score_stage.CHUNK", 8)
    of = items(24, 8 if kind == "tournament" else 4)

    def pair(first, second):
        return 0.5 + 0.5 * ((_slow(first) > _slow(second)) - (_slow(first) < _slow(second)))

    def failing(response):
        return _slow(response) or None

    def run(folder):
        if kind == "tournament":
            score_stage(BothOrders(FunctionScorer("f", pair, unit="pair")), of, folder, plan="tournament")
        else:
            function = failing if kind == "failing" else _slow
            score_stage(FunctionScorer("f", function), of, folder, max_failed=1.0)

    start = time.perf_counter()
    run(tmp_path / "whole")
    took = time.perf_counter() - start
    rng, kills = random.Random(0), 0
    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            run(tmp_path / "broken")
            os._exit(0)
        time.sleep(rng.uniform(0.0, took / 2))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            break
    run(tmp_path / "broken")
    assert kills >= 2
    for name in ("part-0000.jsonl", "scorer.json"):
        assert (tmp_path / "broken" / "f" / name).read_bytes() == (tmp_path / "whole" / "f" / name).read_bytes()


# ---- across runs


def test_verdicts_are_kept_across_runs_and_failures_are_not(tmp_path):
    of = items(3)
    answer = lambda u: Verdict.failed("timeout") if u.key == ("i0", 0, None) else Verdict(u.i / 3, raw="said")  # noqa: E731
    with VerdictCache(tmp_path / "kept.sqlite") as cache:
        first = Spy(answer, cached=True)
        score_stage(first, of, tmp_path / "one", cache=cache, max_failed=1)
        again = Spy(lambda u: 7.0, cached=True)
        counts = score_stage(again, of, tmp_path / "two", cache=cache)
        assert again.asked == [("i0", 0, None)] and counts["from_cache"] == 8 and counts["asked"] == 1
        assert read_scores(tmp_path / "two", "spy", of)["i0"].values == [7.0, 1 / 3, 2 / 3]
        assert lines(tmp_path / "two", "spy")[1]["raw"] == "said"
        other = Spy(lambda u: 8.0, cached=True, version=2)
        score_stage(other, of, tmp_path / "three", cache=cache)
        assert len(other.asked) == 9
        # Another meta or another response is another content.
        moved = [Item(i.id, i.prompt, responses=i.responses, meta={"answer": 1}) for i in of]
        score_stage(fresh := Spy(lambda u: 8.0, cached=True), moved, tmp_path / "four", cache=cache)
        assert len(fresh.asked) == 9
    # The order of a pair is part of it; an exact scorer is asked whole batches or nothing.
    with VerdictCache(tmp_path / "kept.sqlite") as cache:
        score_stage(Spy(beats, "pair", cached=True, name="p"), of, tmp_path / "five", cache=cache)
        swapped = Spy(beats, "pair", cached=True, name="p")
        score_stage(swapped, [i.with_responses(i.responses[::-1]) for i in of], tmp_path / "six", cache=cache)
        assert len(swapped.asked) == 9
        exact = Spy(lambda u: 1.0, cached=True, exact=True)
        score_stage(exact, [*of, *items(4)[3:]], tmp_path / "seven", cache=cache)
        assert len(exact.asked) == 12


def test_a_cache_that_cannot_be_used_is_done_without(tmp_path, caplog):
    (tmp_path / "kept.sqlite").write_text("no database" * 100)
    with VerdictCache(tmp_path / "kept.sqlite") as cache:
        score_stage(Spy(lambda u: 1.0, cached=True), items(1), tmp_path, cache=cache)
    assert "goes on without it" in caplog.text
    assert read_scores(tmp_path, "spy", items(1))["i0"].values == [1.0] * 3


def test_lists_come_back_from_the_cache_as_they_were(tmp_path):
    with VerdictCache(tmp_path / "kept.sqlite") as cache:
        cache.put({"a": Verdict((1.0, None)), "b": Verdict(0.1), "c": Verdict.failed("none")})
        assert cache.get(["a", "b", "c", "d"]) == {"a": Verdict((1.0, None)), "b": Verdict(0.1)}


# ---- ensembles


def test_an_ensemble_through_the_stage(tmp_path):
    of = items(2)
    members = {"a": FunctionScorer("a", lambda response: float(response[-1])), "b": Spy(lambda u: 5.0 - u.i, name="b")}
    scorer = Ensemble("all", members, "uwo", normalise=False, coefficient=1.0)
    counts = score_stage(scorer, of, tmp_path)
    assert counts["units"] == 6 and counts["asked"] == 12 and counts["members"]["a"]["units"] == 6
    scores = read_scores(tmp_path, "all", of)["i1"]
    assert scores.values == pytest.approx([2.5 - 6.25, 2.5 - 2.25, 2.5 - 0.25]) and scores.spread == [2.5, 1.5, 0.5]
    assert json.loads((tmp_path / "all" / "scorer.json").read_text())["settled"]["members"]["a"]["mean"] == 1.0
    members["b"] = Spy(lambda u: Verdict.failed("none") if u.i else 1.0, name="b")
    with pytest.raises(TrainingError, match="'b' failed on"):
        score_stage(scorer.__class__("all", members), of, tmp_path / "strict")
    members = {
        name: Spy(lambda u, n=n: Verdict.failed("none") if u.i == n else 1.0, name=name) for n, name in enumerate("ab")
    }
    with pytest.raises(TrainingError, match="no value for 4 of 6"):  # two of each are missing, of both four
        score_stage(Ensemble("all", members), of, tmp_path / "half", max_failed=0.4)
    assert score_stage(Ensemble("all", members, min_valid=1), of, tmp_path / "one", max_failed=0.4)["failed"] == 0


# ---- what TRL makes of a failed judge


def test_trl_makes_the_failed_one_the_winner_and_we_do_not(tmp_path):
    """TRL 1.16's own function of rewards: None becomes 0 in a sum, which beats -3."""
    online = pytest.importorskip("trl.experimental.online_dpo.online_dpo_trainer", reason="trl is not installed")
    reward = lambda prompts, completions, **columns: [-3.0, None]  # noqa: E731
    state = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu"), reward_funcs=[reward], reward_processing_classes=[None],
        reward_weights=None, state=None,
    )  # fmt: skip
    rewards = online.OnlineDPOTrainer._calculate_rewards_from_functions(
        state, ["p", "p"], ["bad", "judge failed"], [[1], [2]]
    )
    assert rewards.tolist() == [-3.0, 0.0]
    first, second = rewards.split(1)
    assert not (first >= second)  # its rule: the second, of which nothing is known, is chosen

    of = [Item("x", "p", responses=(Response("bad"), Response("judge failed")))]
    score_stage(FunctionScorer("r", reward), of, tmp_path, max_failed=0.5)
    assert read_scores(tmp_path, "r", of)["x"].values == [-3.0, None]


def test_units_of_an_item_without_responses(tmp_path):
    of = [Item("x", "p"), *items(1)]
    for scorer in (
        Spy(lambda u: 1.0, name="r"),
        Spy(beats, "pair", name="p"),
        Spy(lambda u: (1.0,) * 3, "list", name="l"),
    ):
        score_stage(scorer, of, tmp_path)
        assert read_scores(tmp_path, scorer.name, of)["x"].values == []
    assert [v.value for _, v in Spy(lambda u: 1.0).score([Unit(of[1], 0)])] == [1.0]

"""WildBench: the repository's own figures, the judge's prompts and replies, bad input."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

import wildbench_parity as made
from fastpo.errors import ConfigError, DataError
from fastpo.evals import wildbench as wb
from fastpo.evals.wildbench_judge import CHOICES, WildBenchJudge, read_choice, read_rating
from fastpo.sampling.items import Failure, Item, Response, Unit
from fastpo.scoring.scoring import FunctionScorer

FROZEN = json.loads((Path(__file__).parent / "wildbench_parity.json").read_text())
NEAR = dict(rel=1e-12, abs=1e-12)
BASELINE = "baseline-1"


def prompts():
    return [
        {**row, "conversation_input": [{"role": "user", "content": "q"}], "checklist": ["c"]}
        for row in made.made_prompts()
    ]


GROUPS = wb.groups_of(wb.load_tasks(prompts()))


def rewards(model, margin):
    """By the short names of the baselines."""
    return {
        short: wb.reward(wb.read_comparisons(made.made_comparisons(model, name), name), margin, groups=GROUPS)
        for short, name in made.BASELINES.items()
        if name != model
    }


# ---- the repository's figures


@pytest.mark.parametrize("margin", made.MARGINS)
@pytest.mark.parametrize("model", made.MODELS)
def test_rewards_are_the_scripts(model, margin):
    for short, figure in rewards(model, margin).items():
        theirs = FROZEN["reward"][str(margin)][short][model]
        assert figure.value == pytest.approx(100 * theirs["reward"], **NEAR)
        assert figure.counts == {name: theirs[name] for name in wb.OUTCOMES}
        assert (figure.total, figure.mean_length) == (theirs["total"], pytest.approx(theirs["avg_len"], **NEAR))
        assert figure.task_counts == theirs["task_categorized_results"]
        assert figure.tasks == pytest.approx(
            {t: 100 * v for t, v in theirs["task_categorized_rewards"].items()}, **NEAR
        )
        assert figure.task_macro == pytest.approx(100 * theirs["task_macro_reward"], **NEAR)


@pytest.mark.parametrize("margin", [-1, 100, 500, 3000])
@pytest.mark.parametrize("model", made.MODELS)
def test_the_mean_over_baselines_is_the_scripts(model, margin):
    theirs = FROZEN["merged"][str(margin)][model]
    figures = {made.BASELINES[short]: figure for short, figure in rewards(model, margin).items()}
    mixture = wb.mixture(figures, model)
    assert mixture.value == pytest.approx(theirs[f"mixture_of_rewards.K={margin}"], **NEAR)
    assert mixture.task_macro == pytest.approx(theirs[f"task_macro_reward.K={margin}"], **NEAR)
    assert mixture.tasks == pytest.approx(
        {task: theirs[f"mixture_of_rewards.{task}.K={margin}"] for task in wb.WEIGHTS}, **NEAR
    )


@pytest.mark.parametrize("model", made.MODELS)
def test_scores_are_the_scripts(model):
    figure, theirs = wb.score(wb.read_ratings(made.made_ratings(model)), groups=GROUPS), FROZEN["score"][model]
    assert figure.value == pytest.approx(10 * theirs["adjusted_score"], **NEAR)
    assert figure.tasks == pytest.approx({t: 10 * v for t, v in theirs["task_categorized_scores"].items()}, **NEAR)
    assert figure.task_macro == pytest.approx(10 * theirs["task_macro_score"], **NEAR)
    assert (figure.total, figure.mean_length) == (theirs["total"], pytest.approx(theirs["avg_len"], **NEAR))
    assert FROZEN["merged"]["-1"][model]["WB_score.task_macro"] == pytest.approx(figure.task_macro, **NEAR)


def test_a_missing_baseline_is_named_and_not_0():
    figures = {made.BASELINES[short]: figure for short, figure in rewards("other-70b", 500).items()}
    del figures["Llama-2-70b-chat-hf"]
    mixture = wb.mixture(figures, "other-70b")
    assert (mixture.value, mixture.task_macro, mixture.missing) == (None, None, ("Llama-2-70b-chat-hf",))
    with pytest.raises(ConfigError, match="did you mean 'claude-3-haiku-20240307'"):
        wb.mixture({"claude-3-haiku": figures.popitem()[1]})


# ---- margins


def slight(answer, baseline, outcome=0.5):
    return wb.Comparison("p", outcome, "x" * answer, "y" * baseline)


def test_a_margin_makes_slight_verdicts_ties_and_is_strict():
    for margin, expected in ((-1, 0.5), (99, 0.0), (100, 0.5), (500, 0.5)):
        assert slight(200, 100).with_margin(margin) == expected
        assert slight(100, 200, -0.5).with_margin(margin) == -expected
    assert slight(100, 200).with_margin(0) == 0.5  # the shorter one won
    assert [slight(10**6, 1, o).with_margin(0) for o in (1.0, -1.0, 0.0)] == [1.0, -1.0, 0.0]


def test_a_margin_of_no_end_is_none():
    comparisons = wb.read_comparisons(made.made_comparisons("some-7b-chat", BASELINE), BASELINE)
    assert wb.reward(comparisons, math.inf).value == wb.reward(comparisons, -1).value


@pytest.mark.parametrize("margin", made.MARGINS)
def test_swapped_models_have_the_opposite(margin):
    comparisons = wb.read_comparisons(made.made_comparisons("some-7b-chat", BASELINE), BASELINE)
    swapped = [wb.Comparison(c.id, -c.outcome, c.baseline, c.answer) for c in comparisons]
    figure, other = (wb.reward(given, margin, groups=GROUPS) for given in (comparisons, swapped))
    assert figure.value == pytest.approx(-other.value) and figure.task_macro == pytest.approx(-other.task_macro)
    assert figure.error == pytest.approx(other.error)


def test_cut_and_empty_answers_count_in_the_total_alone():
    cut = [wb.Comparison(str(n), 1.0, "a", text) for n, text in enumerate(["b", "b" + wb.CUT, wb.EMPTY, "b"])]
    figure = wb.reward(cut)
    assert (figure.value, figure.total, figure.left_out, figure.counts["win_much"]) == (50.0, 4, 2, 2)
    ratings = [wb.Rating("1", 10, "a"), wb.Rating("2", 1, ""), wb.Rating("3", 1, "abc" + wb.CUT)]
    figure = wb.score(ratings, groups={n: ["Creative Tasks"] for n in "123"})
    assert (figure.value, figure.left_out, figure.mean_length) == (-20.0, 2, 1)
    assert figure.tasks == {"Creative Tasks": 100.0} and figure.task_macro is None  # one group of five


def test_intervals_cover():
    rng = random.Random(0)
    found = []
    for _ in range(200):
        ids = [str(n) for n in range(120)]
        groups = {n: rng.sample(list(wb.WEIGHTS), rng.randint(1, 2)) for n in ids}
        outcomes = {n: rng.choices([1.0, 0.5, 0.0, -0.5, -1.0], [1, 2, 3, 4, 2])[0] for n in ids}
        figure = wb.reward([wb.Comparison(n, outcomes[n], "a", "b") for n in ids], groups=groups)
        found.append((figure.value, figure.error, figure.task_macro, figure.task_macro_error))
    true = 100 * (1 + 1 - 2 - 2) / 12
    for value, error in ((0, 1), (2, 3)):
        covered = statistics.fmean(abs(f[value] - true) < 1.96 * f[error] for f in found)
        assert 0.9 <= covered <= 0.99


def test_errors_of_the_mixture():
    comparisons = {n: wb.read_comparisons(made.made_comparisons("other-70b", n), n) for n in wb.BASELINES}
    same = {n: comparisons[wb.BASELINES[0]] for n in wb.BASELINES}
    figure = wb.reward(same[wb.BASELINES[0]], groups=GROUPS)
    # Three times the same comparisons are worth one; others are worth more.
    assert wb.mixture_errors(same, groups=GROUPS) == pytest.approx((figure.error, figure.task_macro_error))
    assert wb.mixture_errors(comparisons, groups=GROUPS)[0] < 0.8 * figure.error
    assert wb.mixture_errors(dict(list(same.items())[:2])) == (None, None)


# ---- asking


def tasks(n=40):
    rows = [
        {"session_id": f"s{k}", "primary_tag": "Math", "secondary_tags": ["Planning", "Reasoning"],
         "checklist": ["Is it right?", "Is it whole?"],
         "conversation_input": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "reply"},
                                {"role": "user", "content": f"last {k}"}]} for k in range(n)
    ]  # fmt: skip
    return wb.load_tasks(rows)


class Said:
    """A backend that says what a function makes of the question."""

    exact, key, identity = True, {"model": "said"}, {"model": "said"}

    def __init__(self, say):
        self.say, self.questions = say, []

    def answers(self, questions, read):
        for n, question in enumerate(questions):
            self.questions.append(question.text)
            yield n, read(self.say(question.text))

    def close(self):
        pass


def part(text, name):
    return text.split(f"<{name}>\n")[1].split(f"\n</{name}>")[0]


def longer(text):
    a, b = len(part(text, "answer_A")), len(part(text, "answer_B"))
    return json.dumps({"notes on A": "...", "choice": "A+" if a > b else "B+" if b > a else "A=B"})


def test_the_judge_sees_conversation_checklist_and_both_answers():
    backend = Said(longer)
    answers, baseline = {f"s{k}": "model " * (k + 1) for k in range(40)}, {f"s{k}": "base " * 20 for k in range(40)}
    judged = wb.compare(tasks(), answers, baseline, WildBenchJudge("j", backend, "pair"))
    assert [c.id for c in judged.comparisons] == [f"s{k}" for k in range(40)] and not judged.failed
    for c in judged.comparisons:
        assert c.outcome == (0.5 if len(answers[c.id]) > 100 else -0.5)
        assert (c.answer, c.baseline) == (answers[c.id].strip(), baseline[c.id].strip())
    text = backend.questions[3]
    assert part(text, "conversation_so_far") == "USER: first\n\nASSISTANT: reply\n\n"
    assert part(text, "last_message") == "last 3" and part(text, "checklist") == "- Is it right?\n- Is it whole?"
    assert all(choice in text for choice in CHOICES)


def test_the_order_is_random_with_a_seed_and_of_each_prompt_alone():
    def order(seed, n=40):
        backend = Said(longer)
        given = {t.id: "model" for t in tasks(n)}, {t.id: "base" for t in tasks(n)}
        wb.compare(tasks(n), *given, WildBenchJudge("j", backend, "pair"), seed=seed)
        return [part(text, "answer_A") == "model" for text in backend.questions]

    assert order(0) == order(0) != order(1) and order(0, 20) == order(0)[:20]
    assert 100 < sum(order(0, 300)) < 200


def test_a_judge_that_looks_at_the_order_alone_gives_0():
    given = {t.id: "a" for t in tasks(400)}, {t.id: "b" for t in tasks(400)}
    first = FunctionScorer("first", lambda prompt, first, second, meta: 1.0, unit="pair")
    figure = wb.reward(wb.compare(tasks(400), *given, first).comparisons)
    assert abs(figure.value) < 4 * figure.error


def test_what_is_empty_is_not_asked():
    backend = Said(longer)
    few = tasks(4)
    answers = {"s0": " ", "s1": "x", "s2": "\n", "s3": "xx"}
    baseline = {"s0": "y", "s1": "", "s2": " ", "s3": "y"}
    judged = wb.compare(few, answers, baseline, WildBenchJudge("j", backend, "pair"))
    assert [c.outcome for c in judged.comparisons] == [-1.0, 1.0, 0.0, 0.5] and len(backend.questions) == 1
    assert [c.left_out() for c in judged.comparisons] == [True, True, True, False]
    backend = Said(lambda text: '{"score": 8}')
    rated = wb.rate(few, answers, WildBenchJudge("j", backend, "response"))
    assert [r.score for r in rated.ratings] == [1.0, 8.0, 1.0, 8.0] and len(backend.questions) == 2


def test_long_texts_are_cut_by_words():
    assert wb.shortened("a b c", 3) == "a b c" and wb.shortened("a b c", 2) == "a b" + wb.CUT
    assert wb.shortened("a b c", 0) == wb.shortened("a b c", -1) == "a b c"
    assert wb.shortened("a\nb  c", 2) == "a\nb " + wb.CUT  # single spaces part words, as in the repository
    long = " ".join(["w"] * 1001)
    backend = Said(longer)
    task = wb.Task("s0", ({"role": "user", "content": long}, {"role": "user", "content": long}), ("c",), ("Math",))
    judged = wb.compare([task], {"s0": long}, {"s0": "y"}, WildBenchJudge("j", backend, "pair"))
    assert judged.comparisons[0].left_out() and backend.questions[0].count(wb.CUT) == 3
    rated = wb.rate([task], {"s0": long}, WildBenchJudge("j", Said(lambda text: '{"score": "7"}'), "response"))
    assert rated.ratings[0].left_out() and wb.score(rated.ratings).value == 40


def test_failed_verdicts_are_in_no_figure():
    few = tasks(4)
    answers = {f"s{k}": "x" * (k + 1) for k in range(4)}
    said = {"x": "Sorry, I cannot.", "xx": "", "xxx": "hm", "xxxx": '{"score": 11}'}
    scorer = WildBenchJudge("j", Said(lambda text: said[part(text, "answer")]), "response")
    judged = wb.rate(few, answers, scorer)
    assert judged.failed == {"s0": "refused", "s1": "empty", "s2": "unparsed", "s3": "out_of_range"}
    with pytest.raises(DataError, match="no ratings"):
        wb.score(judged.ratings)


READ = [
    ('{"choice": "A++"}', 1.0), ('```json\n{"choice": "B+"}\n```', 0.25), ('{"choice": "A=B",}', 0.5),
    ('<think>A++</think>{"choice": "B++"}', 0.0), ('{"notes": "it said "no" to it", "choice": "A+"}', 0.75),
    ('{"choice": " A+ "}', 0.75), ('{"choice": "A"}', "unparsed"), ('{"choice": "[A+ or A=B]"}', "unparsed"),
    ('{"verdict": "A+"}', "unparsed"), ('{"choice": "A+" "choice": "B+"}', "unparsed"), ("A+", "unparsed"),
    ('["A+"]', "unparsed"), ('{"choice": null}', "unparsed"), ("", "empty"), ("I can't judge this.", "refused"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "found"), READ, ids=[reply[:30] or "empty" for reply, _ in READ])
def test_choices_read(reply, found):
    value = read_choice(reply)
    assert (value.status if isinstance(value, Failure) else value) == found


RATED = [
    ('{"score": "7"}', 7.0), ('{"score": 10}', 10.0), ('{"score": "8.5",}', 8.5),
    ('{"strengths": "a "b"", "score": 3}', 3.0),
    ('{"score": 0}', "out_of_range"), ('{"score": "7/10"}', "unparsed"), ('{"score": true}', "unparsed"),
    ('{"score": "nan"}', "unparsed"), ('{"score": [7]}', "unparsed"), ("7", "unparsed"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "found"), RATED, ids=[reply[:30] for reply, _ in RATED])
def test_ratings_read(reply, found):
    value = read_rating(reply)
    assert (value.status if isinstance(value, Failure) else value) == found


def test_a_template_of_ones_own(tmp_path):
    (tmp_path / "t.txt").write_text("{history}|{query}|{response}|{checklist}|{not a slot}")
    scorer = WildBenchJudge("j", Said(str), "response", template="t.txt", where=tmp_path)
    item = Item("i", "q {response}", responses=(Response("r {query}"),), meta={"checklist": ["c"]})
    assert scorer.content(Unit(item, 0)) == "|q {response}|r {query}|- c|{not a slot}"
    assert scorer.key != WildBenchJudge("j", Said(str), "response").key
    for template, message in (
        ("{history}{query}{checklist}", "has no {response}"),
        ("{history}{query}{checklist}{response}{lable}", "names {lable}"),
        ("none.txt", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            WildBenchJudge("j", Said(str), "response", template=template, where=tmp_path)
    with pytest.raises(ConfigError, match="expected pair or response"):
        WildBenchJudge("j", Said(str), "list")


# ---- bad input


def test_bad_comparisons():
    rows = made.made_comparisons("some-7b-chat", BASELINE)
    of = f"of {len(rows)}"
    for change, message in (
        (
            lambda r: {**r, "winner": "org/other"},
            rf"^2 {of} comparisons have no verdict: '",
        ),
        (lambda r: {**r, "winner": f"org/{BASELINE}", "extent": 3}, rf"^2 {of} comparisons have no verdict"),
        (
            lambda r: {**r, "model_outputs": {f"org/{BASELINE}": "x"}},
            rf"^2 {of} comparisons lack an answer: '\w+'",
        ),
        (lambda r: {**r, "session_id": rows[5]["session_id"]}, "^1 of .* prompts are judged more than once: '00000"),
        (
            lambda r: {**r, "model_outputs": None},
            rf"^2 {of} rows of the comparisons have no 'mod",
        ),
    ):
        with pytest.raises(DataError, match=message):
            wb.read_comparisons([*map(change, rows[:2]), *rows[2:]], BASELINE)
    with pytest.raises(DataError, match="expected 'baseline-2' and one other model"):
        wb.read_comparisons(rows, "baseline-2")
    many = [{**rows[0], "session_id": str(n), "winner": None} for n in range(9)]
    with pytest.raises(DataError, match="^9 of 9 .*'0', '1', '2', '3', '4' and 4 more"):
        wb.read_comparisons(many, BASELINE)


def test_bad_ratings():
    rows = made.made_ratings("m")
    for bad in (None, "N/A", "", 0, 11, "nan", True, [7]):
        with pytest.raises(DataError, match=rf"^1 of {len(rows)} ratings have no score from 1 to 10: '00000000'$"):
            wb.read_ratings([{**rows[0], "score": bad}, *rows[1:]])
    with pytest.raises(DataError, match="rated more than once"):
        wb.read_ratings([*rows, rows[0]])
    ratings = wb.read_ratings(rows)
    with pytest.raises(DataError, match=f"^{len(ratings) - 1} of {len(ratings)} prompts are none of the"):
        wb.score(ratings, groups={ratings[0].id: ["Creative Tasks"]})


def test_bad_answers():
    few, whole = tasks(3), {"s0": "a", "s1": "b", "s2": "c"}
    judge, pairs = WildBenchJudge("j", Said(longer), "response"), WildBenchJudge("j", Said(longer), "pair")
    for given, message in (
        ({"s0": "a", "s2": None}, "^2 of 3 prompts have no answer of the model: 's1', 's2'$"),
        ({**whole, "other": "d"}, "^1 of 4 answers of the model are to other prompts: 'other'$"),
    ):
        for call in (lambda g=given: wb.rate(few, g, judge), lambda g=given: wb.compare(few, g, whole, pairs)):
            with pytest.raises(DataError, match=message):
                call()
    with pytest.raises(DataError, match="prompts have no answer of the baseline: 's0', 's1', 's2'"):
        wb.compare(few, whole, {}, pairs)
    with pytest.raises(DataError, match="^1 of 3 prompts occur more than once: 's1'$"):
        wb.rate([*few, few[1]], whole, judge)
    with pytest.raises(ConfigError, match="needs a scorer of pairs, not of a response"):
        wb.compare(few, whole, whole, judge)
    third = FunctionScorer("third", lambda prompt, first, second, meta: 1 / 3, unit="pair")
    with pytest.raises(DataError, match="^3 of 3 verdicts are none of the five: 's0', 's1', 's2'; a judge"):
        wb.compare(few, whole, whole, third)


def test_bad_prompts():
    rows = prompts()[:3]
    for change, message in (
        ({"primary_tag": "Maths"}, "no task 'Maths' in WildBench; did you mean 'Math'"),
        ({"conversation_input": []}, "^1 of 3 prompts are no turns with role and content: '00000000'$"),
        ({"checklist": None}, "^1 of 3 rows of WildBench's prompts have no 'checklist'"),
        ({"id": rows[1]["id"]}, "^1 of 2 prompts occur more than once: '00000001'$"),
        ({"id": None}, "row 0 of WildBench's prompts has neither session_id nor id"),
    ):
        with pytest.raises(DataError, match=message):
            wb.load_tasks([{**rows[0], **change}, *rows[1:]])
    with pytest.raises(DataError, match="^WildBench's prompts are not here: .*path of a file of them$"):
        wb.load_tasks()

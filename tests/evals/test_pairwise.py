"""Pairwise win rates: what a judge writes, strengths, style control, intervals, and games that are refused."""

import json
import sys

import numpy as np
import pytest

import arena_parity as made
from fastpo.errors import ConfigError, DataError
from fastpo.evals import pairwise
from fastpo.evals.pairwise import Game, Style, arena
from fastpo.sampling.items import Failure

LABELS = list(pairwise.VERDICTS)
MIRROR = dict(zip(LABELS, LABELS[::-1]))


def played(strengths, prompts, seed=0, bias=0.0, noise=0.8):
    """Games of all pairs in both orders; the verdict by the difference of strengths, the prompt's own and noise."""
    draw, games, names = np.random.default_rng(seed), [], list(strengths)
    for number in range(prompts):
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                own = draw.normal(0, 1.0)  # of this pair of answers, the same in both orders
                for a, b, sign in ((one, other, 1), (other, one, -1)):
                    seen = sign * (strengths[one] - strengths[other] + own) + bias + draw.normal(0, noise)
                    label = LABELS[int(np.digitize(-seen, [-1.2, -0.3, 0.3, 1.2]))]
                    games.append(Game(f"p{number}", a, b, label))
    return games


def strengths_by_iteration(games, weight=3):
    """Bradley and Terry's own way (minorisation, Hunter 2004), written apart from the fit."""
    names = sorted({game.a for game in games})
    wins = {a: {b: 0.0 for b in names} for a in names}
    for game in games:
        points, strong = pairwise.VERDICTS[game.verdict]
        times = weight if strong else 1
        wins[game.a][game.b] += times * points
        wins[game.b][game.a] += times * (1 - points)
    p = dict.fromkeys(names, 1.0)
    for _ in range(5000):
        p = {
            a: sum(wins[a].values()) / sum((wins[a][b] + wins[b][a]) / (p[a] + p[b]) for b in names if b != a)
            for a in names
        }
        total = sum(p.values())
        p = {a: value / total for a, value in p.items()}
    return {a: np.log(value) for a, value in p.items()}


@pytest.mark.parametrize(
    "reply, label",
    [
        ("My own answer: 4. Both are right.\n[[A=B]]", "A=B"),
        ("[[A>>B]]", "A>>B"), ("Verdict: [[ B > A ]].", "B>A"), ("[B>>A]", "B>>A"), ("**[[A>B]]**", "A>B"),
        ("[[a>>b]]", "A>>B"),
        ("[[A<B]]", "B>A"), ("[[A<<B]]", "B>>A"), ("[[B=A]]", "A=B"), ("[[B<A]]", "A>B"), ("[[B<<A]]", "A>>B"),
        ("[[A>B]] as I said: [[A>B]], which is [[B<A]]", "A>B"),
        ("not [A>B] alone, but [[A>>B]]", "A>>B"),
        ("<think>perhaps [[B>A]]</think>[[A>B]]", "A>B"),
        ("[[A>B]] or [[B>A]]", Failure), ("[[A>A]]", Failure), ("A is better", Failure), ("", Failure),
        ("I'm sorry, I cannot judge this.", Failure), ("<think>[[A>B]]", Failure), ("[[A>>>B]]", Failure),
    ],
)  # fmt: skip
def test_verdicts(reply, label):
    found = pairwise.read_verdict(reply)
    assert isinstance(found, Failure) if label is Failure else found == label


def test_the_template_asks_for_what_is_read():
    asked = pairwise.question("Say {answer_a} {0}.", "a {answer_b}", "b {prompt} \\1")
    assert "Say {answer_a} {0}." in asked and "a {answer_b}" in asked and "b {prompt} \\1" in asked
    for label in LABELS:
        assert f"[[{label}]]" in pairwise.template()
    assert sorted(__import__("re").findall(r"\{(\w+)\}", pairwise.template())) == ["answer_a", "answer_b", "prompt"]


def test_two_models_have_the_share_of_points():
    games = played({"new": 0.5, "base": 0.0}, 60)
    points = total = 0.0
    for game in games:
        share, strong = pairwise.VERDICTS[game.verdict]
        times = 3 if strong else 1
        points += times * (share if game.a == "new" else 1 - share)
        total += times
    found = arena(games, "base", resamples=0)
    assert found.of("new").score == pytest.approx(100 * points / total, abs=1e-4)
    assert found.of("base").score == 50 and found.of("new").games == 120


@pytest.mark.parametrize("weight", [1, 3])
def test_strengths_are_bradley_and_terry_s(weight):
    games = played({"a": 0.8, "b": 0.3, "c": 0.0, "d": -1.0}, 50, seed=3)
    wanted = strengths_by_iteration(games, weight)
    found = arena(games, "c", weight=weight, resamples=0)
    for model, strength in wanted.items():
        assert found.of(model).strength == pytest.approx(strength - wanted["c"], abs=1e-4)
    assert [s.model for s in found.standings] == ["a", "b", "c", "d"]


def test_swapped_models_give_the_rest_to_a_hundred():
    games = played({"new": 0.6, "base": 0.0}, 40)
    one, other = arena(games, "base", resamples=50), arena(games, "new", resamples=50)
    assert one.of("new").score + other.of("base").score == pytest.approx(100, abs=1e-6)
    low, high = other.of("base").interval
    assert one.of("new").interval == pytest.approx((100 - high, 100 - low), abs=1e-6)
    turned = [Game(g.prompt, g.b, g.a, MIRROR[g.verdict]) for g in games]  # the same verdicts, told from the other side
    assert arena(turned, "base", resamples=0).of("new").score == pytest.approx(one.of("new").score, abs=1e-6)


def test_the_first_place_goes_out_by_both_orders():
    fair = arena(played({"new": 0.0, "base": 0.0}, 800, bias=0.0), "base", resamples=0)
    bent = arena(played({"new": 0.0, "base": 0.0}, 800, bias=1.0), "base", resamples=0)
    assert abs(fair.first - 50) < 4 and bent.first > 70
    assert abs(bent.of("new").score - 50) < 6


def test_equal_styles_change_nothing_and_a_judge_s_love_of_length_is_taken_out():
    games = played({"new": 0.2, "base": 0.0}, 200)
    same = {(game.prompt, model): Style(100, 1, 2, 3) for game in games for model in ("new", "base")}
    plain = arena(games, "base", resamples=0).of("new").score
    for control in (["length"], ["markdown"], ["length", "markdown"]):
        found = arena(games, "base", control=control, styles=same, resamples=0)
        assert found.of("new").score == pytest.approx(plain, abs=1e-6)
        assert not any(found.style.values())
    draw, games, styles = np.random.default_rng(1), [], {}
    for number in range(1500):  # equally good, but `new` is longer and the judge likes that
        prompt, lengths = (
            f"p{number}",
            {m: int(1000 * np.exp(draw.normal(s, 0.5))) for m, s in (("new", 0.5), ("base", 0))},
        )
        styles |= {(prompt, model): Style(length) for model, length in lengths.items()}
        for a, b in (("new", "base"), ("base", "new")):
            seen = 2 * (lengths[a] - lengths[b]) / (lengths[a] + lengths[b]) + draw.logistic()
            games.append(Game(prompt, a, b, "A>B" if seen > 0 else "B>A"))
    assert arena(games, "base", resamples=0).of("new").score > 57
    controlled = arena(games, "base", control=["length"], styles=styles, resamples=0)
    assert abs(controlled.of("new").score - 50) < 4 and controlled.style["length"] > 0.3


def test_intervals_cover():
    """Nominal 95 % in 100 draws of a seed each: 0.87 is more than three standard deviations below."""
    wanted = arena(played({"new": 0.4, "base": 0.0}, 20_000, seed=999), "base", resamples=0).of("new").score
    inside = alone = 0
    for seed in range(100):
        games = played({"new": 0.4, "base": 0.0}, 80, seed=seed)
        low, high = arena(games, "base", resamples=200, seed=seed).of("new").interval
        inside += low <= wanted <= high
        # Games as if they were independent: two names for the prompt of the two orders.
        apart = [Game(f"{g.prompt} {o}", a, b, v) for n, g in enumerate(games) for o in [n % 2]
                 for a, b, v in [(g.a, g.b, g.verdict), (g.b, g.a, MIRROR[g.verdict])]]  # fmt: skip
        low, high = arena(apart, "base", resamples=200, seed=seed).of("new").interval
        alone += low <= wanted <= high
    assert inside >= 87 and alone < inside


@pytest.mark.parametrize("control", [[], ["length", "markdown"]])
def test_resamples_are_fitted_as_the_library_does(control):
    games, draw = played({"a": 0.8, "b": 0.0, "c": -1.0}, 20), np.random.default_rng(0)
    styles = {(g.prompt, m): Style(*draw.integers(1, 50, 4).tolist()) for g in games for m in (g.a, g.b)}
    _, style = pairwise._styles(games, control, styles)
    x = np.concatenate([[[(m == g.a) - (m == g.b) for m in "ab"] for g in games], style], 1).astype(float)
    fit = pairwise._Fit(x, np.array([pairwise.VERDICTS[g.verdict][0] for g in games]))
    counts = draw.integers(0, 3, (4, len(games))).astype(float)
    again = fit.again(counts, fit(np.ones(len(games))))
    assert again == pytest.approx(np.array([fit(one) for one in counts]), abs=1e-5)


def test_a_model_that_wins_everything_has_a_score():
    games = [Game(f"p{n}", a, b, "A>B" if a == "new" else "B>A") for n in range(5) for a, b in
             (("new", "base"), ("base", "new"))]  # fmt: skip
    found = arena(games, "base", resamples=20).of("new")
    assert 99.9 < found.score <= 100 and np.isfinite(found.strength)


def test_intervals_of_little():
    """None without draws or of one prompt; of a model that has won everything as wide as so many prompts allow."""
    several = both("p") + both("q") + both("r")
    assert arena(several, "base", resamples=0).of("new").interval is None
    assert arena(both("p"), "base").of("new").interval is None
    low, high = arena(several, "base").of("new").interval
    assert low == pytest.approx(100 * 3 / (3 + 1.96**2), abs=0.01) and high == 100
    turned = arena(several, "new").of("base")
    assert turned.interval == pytest.approx((0, 100 - low)) and turned.interval[0] <= turned.score <= turned.interval[1]


def test_the_same_seed_the_same_interval():
    games = played({"new": 0.4, "base": 0.0}, 30)
    assert arena(games, "base", resamples=30) == arena(games, "base", resamples=30)
    assert arena(games, "base", resamples=30) != arena(games, "base", resamples=30, seed=1)


def test_style_of_a_text():
    text = "# Title\n\n- one\n* two\n3. three\n**bold** and __more__\n```\n# no header\n- no item\n```\n#nothing\n"
    assert pairwise.style_of(text) == Style(len(text), 1, 3, 2)


@pytest.fixture(scope="module")
def judged():
    """Arena-Hard's numbers of the made judgments, and the games."""
    rows = [row for model in made.MODELS for row in made.made_judgments(model)]
    return json.loads(made.WHERE.read_text()), pairwise.read_judgments(rows)


def test_scores_are_arena_hard_s(judged):
    frozen, games = judged
    for model, share in frozen["shares"].items():
        own = [game for game in games if model in (game.a, game.b)]
        found = arena(own, made.BASELINE, allow_missing=True, resamples=0)
        assert found.of(model).score == pytest.approx(100 * share, abs=1e-4)
        assert found.failed == sum(None in (a.verdict, b.verdict) for a, b in zip(own[::2], own[1::2])) > 0


def test_style_control_is_arena_hard_s_but_for_what_it_calls_equal(judged):
    """There the mean over all games, model less baseline, is the middle: the models' strengths shift together."""
    frozen, games = judged
    styles = {}
    for model in (*made.MODELS, made.BASELINE):
        for row in made.made_answers(model):
            counts = row["metadata"]
            styles[row["uid"], model] = Style(
                counts["token_len"], *(sum(counts[f"{name}_count"].values()) for name in ("header", "list", "bold"))
            )
    found = arena(games, made.BASELINE, allow_missing=True, control=made.CONTROL, styles=styles, resamples=0)
    apart = [found.of(model).strength - frozen["styled"][model] for model in made.MODELS]
    assert apart == pytest.approx([apart[0]] * len(apart), abs=5e-3)  # its fit is in fp32 and stops early
    assert abs(apart[0]) > 0.1


def test_judgments_of_a_file():
    one = {"uid": "p", "category": "x", "model": "new", "baseline": "base", "games": [{"score": "A<<B"}, None]}
    assert pairwise.read_judgments([one]) == [Game("p", "base", "new", "B>>A"), Game("p", "new", "base", None)]
    old = {"question_id": "p", "model": "new", "games": [{"score": "B>A"}, {"score": "A=B"}]}
    assert pairwise.read_judgments([old], baseline="base")[0] == Game("p", "base", "new", "B>A")
    other = one | {"category": "y", "baseline": "else"}
    assert len(pairwise.read_judgments([one, other], "y")) == 2
    with pytest.raises(DataError, match="of the categories 'x', 'y': give one, category: x"):
        pairwise.read_judgments([one, other])
    with pytest.raises(DataError, match="no judgment is of category 'z', only of 'x'"):
        pairwise.read_judgments([one], "z")
    with pytest.raises(DataError, match="1 of 2 judgments lack uid, model, baseline or two games.*: 1$"):
        pairwise.read_judgments([one, old | {"baseline": None}])


def both(prompt, verdict="A>B", a="new", b="base"):
    return [Game(prompt, a, b, verdict), Game(prompt, b, a, MIRROR.get(verdict, verdict))]


@pytest.mark.parametrize(
    "games, said",
    [
        ([], "arena: no games"),
        (both("p", "A>C") + both("q"), "2 of 4 verdicts are none of 'A>>B', .*: 'p: A>C', 'p: A>C'"),
        (both("p") + [Game("q", "new", "new", "A=B")], "1 of 3 games are of a model with itself: 'new'"),
        (both("p") + both("p"), "2 of 2 games are there more than once: 'p / new / base'"),
        (both("p") + both("q")[:1], "1 of 2 pairs lack a verdict in one of the two orders: 'q: base / new'; allow_m"),
        (both("p") + both("q", None), "1 of 2 pairs lack a verdict in one of the two orders"),
        (both("p", b="bse"), "the baseline 'base' has played no game; did you mean 'bse'"),
        (both("p") + both("p", a="x", b="y"), "2 of 4 models are joined to 'base' by no games: 'x', 'y'"),
    ],
)
def test_bad_games(games, said):
    with pytest.raises(DataError, match=said):
        arena(games, "base", resamples=0)


def test_missing_games_are_left_out_by_both_orders():
    games = both("p") + both("q", "B>A") + both("r") + both("s")[:1] + both("t", None)
    found = arena(games, "base", allow_missing=True, resamples=0)
    assert found.failed == 2 and found.of("new").score == pytest.approx(100 * 2 / 3, abs=1e-4)
    with pytest.raises(DataError, match="none of 1 pairs has a verdict in both orders"):
        arena(both("t", None), "base", allow_missing=True)


def test_bad_options(monkeypatch):
    games = both("p")
    with pytest.raises(DataError, match="2 of 2 answers have no style: 'p / base', 'p / new'"):
        arena(games, "base", control=["length"])
    with pytest.raises(ConfigError, match="control 'lenght' is none of 'length', 'markdown'; did you mean 'length'"):
        arena(games, "base", control=["lenght"])
    with pytest.raises(ConfigError, match="weight 0 must be 1 or more"):
        arena(games, "base", weight=0)
    with pytest.raises(ConfigError, match="no model 'nw' in this arena; did you mean 'new'"):
        arena(games, "base", resamples=0).of("nw")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"Bradley-Terry fit needs scikit-learn, .*: pip install 'fastpo\[evals\]'$"):
        arena(games, "base")

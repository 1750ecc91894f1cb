"""Judges' and reward models' scores (section 4.5, item 6 of the specification)."""

import itertools
import sys

import pytest
import torch

from fastpo import selection
from fastpo.errors import ConfigError


@pytest.mark.parametrize(
    "choice, len_a, len_b, margin, reward",
    [
        ("A+", 1500, 1000, 500, 0.5),  # longer by exactly the margin: the win stands
        ("A+", 1501, 1000, 500, 0.0),
        ("B+", 1000, 1500, 500, -0.5),
        ("B+", 1000, 1501, 500, 0.0),
        ("A+", 1000, 9000, 500, 0.5),  # the loser's length does not matter
        ("A++", 9000, 10, 500, 1.0),  # a clear win stands
        ("B++", 10, 9000, 500, -1.0),
        ("A=B", 10, 9000, 500, 0.0),
        ("A+", 11, 10, 0, 0.0),
        ("A+", 9000, 10, -1, 0.5),  # no rule
    ],
)
def test_wildbench_length_rule(choice, len_a, len_b, margin, reward):
    assert selection.wb_reward([choice], [len_a], [len_b], margin=margin) == reward
    mean = selection.wb_reward([choice, "A++"], [len_a, 1], [len_b, 1], margin=margin)
    assert mean == pytest.approx((reward + 1) / 2)


def test_length_controlled_win_rate_recovers_its_model_and_is_symmetric():
    g = torch.Generator().manual_seed(0)
    n = 20_000
    model, baseline = (torch.randint(200, 4000, (n,), generator=g).double() for _ in range(2))
    model += 600  # a model that writes more
    feature = torch.tanh((model - baseline) / (model - baseline).std())
    p = torch.sigmoid(-0.4 + 1.3 * feature)
    rate, beta = selection.length_controlled_win_rate(p, model, baseline)
    assert beta == pytest.approx(1.3, abs=1e-6) and rate == pytest.approx(
        100 * torch.sigmoid(torch.tensor(-0.4)).item()
    )
    assert p.mean() * 100 > rate + 5  # length alone raised the raw rate
    swapped, same = selection.length_controlled_win_rate(1 - p, baseline, model)
    assert swapped == pytest.approx(100 - rate, abs=1e-9) and same == pytest.approx(beta, abs=1e-9)
    votes = torch.bernoulli(p, generator=g)
    rate, beta = selection.length_controlled_win_rate(votes, model, baseline)
    assert beta == pytest.approx(1.3, abs=0.1) and rate == pytest.approx(40.13, abs=1.5)
    equal = torch.full((4,), 100.0)
    assert selection.length_controlled_win_rate(torch.tensor([1, 0.5, 1, 0.5]), equal, equal)[0] == pytest.approx(75)


# prefs, len_model, len_baseline, and what the Newton iteration gave that was here before scikit-learn did the fit.
FITS_BEFORE = {
    "preferences": (
        [0.9, 0.2, 0.7, 0.5, 0.35], [1200, 300, 2500, 800, 90], [1000] * 5, (57.408128173899186, 1.442366636734349),
    ),
    "votes": (
        [1, 0, 1, 1, 0, 1], [500, 400, 900, 100, 1200, 650], [700, 300, 950, 400, 800, 20],
        (75.89990752780577, -1.952968679883777),
    ),
    "separable": ([0, 0, 1, 1], [1, 2, 3, 4], [2.5] * 4, (50.0, 41.481809564437306)),
    "separable_elsewhere": ([0, 0, 1, 1, 0], [1, 2, 3, 4, 2.9], [2.5] * 5, (0.0, 284.07467178410184)),
    "all_won": ([1, 1, 1], [10, 20, 60], [15] * 3, (99.99999775259764, 1.32629042431108)),
    "all_lost_at_one_length": ([0, 0, 0], [7] * 3, [7] * 3, (1.7841725950526672e-06, 0.0)),
}  # fmt: skip


@pytest.mark.filterwarnings("error")  # a fit that does not converge warns
@pytest.mark.parametrize("prefs, model, baseline, expected", FITS_BEFORE.values(), ids=FITS_BEFORE.keys())
def test_length_controlled_win_rate_as_by_the_newton_iteration_of_before(prefs, model, baseline, expected):
    """Data that a length separates too: the ridge of 1e-9 a row decides there, in both, on a plateau 1e-5 wide."""
    got = selection.length_controlled_win_rate(
        *(torch.tensor(v, dtype=torch.float64) for v in (prefs, model, baseline))
    )
    tight = len(prefs) > 4 and expected[0] > 0
    assert got == pytest.approx(expected, rel=1e-9 if tight else 1e-4, abs=1e-9)


@pytest.mark.filterwarnings("error")
def test_length_controlled_win_rate_is_the_maximum_of_the_likelihood():
    g = torch.Generator().manual_seed(3)
    for n in (5, 40, 1000):
        for votes in (False, True):
            model, baseline = (torch.randint(1, 4000, (n,), generator=g).double() for _ in range(2))
            p = torch.rand(n, generator=g, dtype=torch.float64)
            p = torch.bernoulli(p, generator=g) if votes else p
            rate, beta = selection.length_controlled_win_rate(p, model, baseline)
            feature = torch.tanh((model - baseline) / (model - baseline).std())
            residual = torch.sigmoid(torch.logit(torch.tensor(rate / 100, dtype=torch.float64)) + beta * feature) - p
            # The ridge's pull, 1e-9 of a coefficient a row, is all that is left of the gradient.
            assert max(abs(residual.mean()), abs((residual * feature).mean())) < 1e-8 * (1 + abs(beta)), (n, votes)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"needs scikit-learn, .*: pip install 'fastpo\[evals\]'$"):
        selection.length_controlled_win_rate(torch.tensor([1.0, 0]), torch.ones(2), torch.ones(2))


def test_ensembles_by_both_variances():
    scores = torch.tensor([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0], [4.0, 2.0], [5.0, 2.0]])
    assert selection.ensemble_reward(scores, "mean").tolist() == [3, 2]
    assert selection.ensemble_reward(scores, "wco").tolist() == [1, 2]
    assert selection.ensemble_reward(scores).tolist() == [3 - 0.5 * 2.0, 2]  # 1/k
    assert selection.ensemble_reward(scores, unbiased=True).tolist() == [3 - 0.5 * 2.5, 2]  # 1/(k - 1): 1.25 times


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_best_of_n_against_every_subset(n):
    g = torch.Generator().manual_seed(1)
    proxy, gold = torch.randn(7, generator=g), torch.randn(7, generator=g)
    best = [max(subset, key=lambda i: proxy[i]) for subset in itertools.combinations(range(7), n)]
    assert selection.best_of_n(proxy, n, gold) == pytest.approx(gold[best].mean().item(), abs=1e-6)
    assert selection.best_of_n(proxy, n) == pytest.approx(proxy[best].mean().item(), abs=1e-6)


def test_dice_length_penalty_on_a_toy_set():
    # Quality plus 0.02 a character: the penalty that undoes it leaves pairs whose lengths differ by nothing on average.
    g = torch.Generator().manual_seed(2)
    chars = [torch.randint(100, 1000, (16,), generator=g).double() for _ in range(200)]
    scores = [0.02 * c + torch.randn(16, generator=g, dtype=torch.float64) for c in chars]
    alpha, gap = selection.length_penalty(scores, chars)
    assert alpha == pytest.approx(0.02, abs=0.002) and abs(gap) < 100
    assert selection.length_penalty(scores, chars, grid=[0.0])[1] > 700
    # Two prompts by hand: gaps of +10 and +30 at 0; at 0.2 the second turns, so the mean is -10.
    scores, chars = (
        [torch.tensor([5.0, 0.0]), torch.tensor([3.0, 0.0])],
        [torch.tensor([20.0, 10]), torch.tensor([40.0, 10])],
    )
    assert selection.length_penalty(scores, chars, grid=[0.0, 0.2, 0.6]) == (0.2, -10.0)


def test_relabelling_flips_the_pair_for_the_lower_goal():
    row = {"prompt": "x", "chosen": "good", "rejected": "bad", "chosen_score": 9.0, "rejected_score": 4}
    before = dict(row)
    high, low = selection.relabel(row, template="target score {goal}")
    assert high == {"prompt": "target score 9\n\nx", "chosen": "good", "rejected": "bad"}
    assert low == {"prompt": "target score 4\n\nx", "chosen": "bad", "rejected": "good"}
    assert row == before
    assert selection.relabel({**row, "rejected_score": 9}) == []


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: selection.wb_reward(["A"], [1], [1]), r"'A' is none of A\+\+"),
        (lambda: selection.wb_reward(["A+"], [1, 2], [1]), "as many lengths as choices"),
        (lambda: selection.length_controlled_win_rate(torch.tensor([1.0, 2]), torch.ones(2), torch.ones(2)), "0, 1"),
        (lambda: selection.ensemble_reward(torch.ones(3), "max"), "none of mean, wco, uwo"),
        (lambda: selection.best_of_n(torch.ones(3), 4), r"n must be in \[1, 3\], not 4"),
        (lambda: selection.length_penalty([], []), "0 prompts have scores"),
        (lambda: selection.relabel({"prompt": "x"}), "no column 'chosen'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_goal_for_a_conversation_is_in_the_systems_turn():
    """Not a list printed into a text."""
    scores = {"chosen_score": 9, "rejected_score": 3, "chosen": "a", "rejected": "b"}
    turns = [{"role": "user", "content": "hi"}]
    high, low = selection.relabel({"prompt": turns, **scores}, template="goal {goal}")
    assert high["prompt"] == [{"role": "system", "content": "goal 9"}, *turns]
    assert low["prompt"] == [{"role": "system", "content": "goal 3"}, *turns] and low["chosen"] == "b"
    own = [{"role": "system", "content": "be kind"}, *turns]
    high, _ = selection.relabel({"prompt": own, **scores}, template="goal {goal}")
    assert high["prompt"] == [{"role": "system", "content": "be kind\n\ngoal 9"}, *turns]

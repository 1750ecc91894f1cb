"""Theory as a test: on games whose equilibrium is known, losses have the minimisers and algorithms the rates that their
papers claim. fp64, one thread. Section numbers are those of the specification (docs/games.md says what each shows)."""

import math
import sys

import pytest
import torch

from fastpo.errors import ConfigError
from fastpo.games import games, tabular
from fastpo.games.games import ALGORITHMS
from fastpo.games.tabular import TabularPolicy, fit, population_loss
from fastpo.losses.table import LOSSES
from fastpo.ops import linear_logprob, preference_loss

RPS = games.rock_paper_scissors()
WEIGHTED = games.rock_paper_scissors(1 / 6, 2 / 6, 3 / 6)
RANDOM = games.random_game(6)
GAMES = {"rps": RPS, "weighted_rps": WEIGHTED, "random_6": RANDOM}
REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()  # of the reference numbers in 4.3
START = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 0)
TAU = 0.1

on_games = pytest.mark.parametrize("prefs", GAMES.values(), ids=GAMES.keys())
on_two_games = pytest.mark.parametrize("prefs", [WEIGHTED, RANDOM], ids=["weighted_rps", "random_6"])


def policy(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(n, generator=g, dtype=torch.float64), 0)


def distance(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Largest difference of two probabilities."""
    return (log_p.exp() - log_q.exp()).abs().max().item()


def step(name: str, value: float) -> dict[str, float]:
    """A loss's own name for the coefficient that its paper calls eta."""
    return {"eta" if "eta" in LOSSES[name].defaults else "beta": value}


# --- 4.1: games and equilibria


def test_nash_of_weighted_rock_paper_scissors():
    assert torch.allclose(games.nash_equilibrium(RPS), torch.full((3,), 1 / 3).double(), atol=1e-14)
    assert torch.allclose(games.nash_equilibrium(WEIGHTED), torch.tensor([3, 2, 1]).double() / 6, atol=1e-14)
    a, b, c = 0.07, 0.31, 0.5
    expected = torch.tensor([c, b, a], dtype=torch.float64) / (a + b + c)
    assert torch.allclose(games.nash_equilibrium(games.rock_paper_scissors(a, b, c)), expected, atol=1e-14)


def test_nash_by_linear_programming_on_many_games():
    partial = 0
    for n in (2, 3, 4, 6, 9, 17, 40):
        for seed in range(5):
            prefs = games.random_game(n, seed)
            pi = games.nash_equilibrium(prefs)
            assert pi.min() >= 0 and abs(pi.sum() - 1) < 1e-12
            assert abs(games.duality_gap(prefs, pi.log())) < 1e-12
            partial += bool((pi == 0).any())
    assert partial > 10  # a random game's equilibrium plays some of its responses


@pytest.mark.parametrize("kind", ["uniform", "ties", "tournament", "near_half", "tenths", "copies"])
def test_nash_on_degenerate_games(kind):
    """Where linear programming could cycle or lose digits: every answer is certified by its gap."""
    for n in (2, 3, 5, 8, 13, 30):
        for seed in range(5):
            g = torch.Generator().manual_seed(100 * n + seed)
            u = torch.rand(n, n, generator=g, dtype=torch.float64)
            u = {"ties": (3 * u).floor() / 2, "tournament": u.round(), "tenths": (10 * u).round() / 10,
                 "near_half": 0.5 + 1e-6 * (u - 0.5)}.get(kind, u)  # fmt: skip
            prefs = u.triu(1) + (1 - u.T).tril(-1) + 0.5 * torch.eye(n, dtype=torch.float64)
            if kind == "copies":
                prefs = prefs.repeat(2, 2)
            gap, scale = games.duality_gap(prefs, games.nash_equilibrium(prefs).log()), (prefs - 0.5).abs().max().item()
            assert gap < 1e-12 * scale + 4 * torch.finfo(torch.float64).eps


# What the simplex method and the Newton iterations gave that were here before SciPy did these.
NASH_BEFORE = {
    0: [0.47030019399446, 0, 0.46485013696327, 0, 0, 0.064849669042277],
    1: [0, 0, 0, 1, 0, 0],
    2: [0.078442762260095, 0.083689155783445, 0, 0.83786808195646, 0, 0],
    3: [0.40084136512915, 0.32649890022882, 0, 0, 0.27265973464203, 0],
}
# From policy(6, seed) on RANDOM: (update, eta, steps, seed) -> log-policy.
UPDATES_BEFORE = {
    ("sppo", 1e-3, 1, 22): [
        -0.0096535110910007, -173.20084283909, -37.487738362165, -116.17741762502, -4.6452564587996, -52.859510962608,
    ],
    ("sppo", 0.2, 1, 22): [
        -0.46486678440035, -3.6054147412642, -2.5912364069354, -1.4869583387496, -4.8986218037191, -3.3197564200871,
    ],
    ("sppo", 30.0, 1, 22): [
        -1.1270377460203, -2.6773665408893, -2.2672674848911, -0.8095646580092, -5.2347093619766, -2.9320168461322,
    ],
    ("sppo", 0.5, 50, 15): [
        -0.15572628026331, -20.726397220922, -1.9365182922089, -37.517477411536, -13.45359176154, -23.037813206405,
    ],
    ("dno_prct", 0.5, 1, 15): [
        -1.3824416921078, -3.0635219723558, -4.103431144855, -2.620083048115, -1.0401648649696, -1.3486017939683,
    ],
    ("dno_prct", 2.0, 1, 15): [
        -2.4775531375866, -1.8630012864341, -3.0375865275895, -1.5746884793682, -1.0616044889137, -1.8330653043955,
    ],
    ("dno_prct", 2.0, 50, 15): [
        -0.18218551317264, -21.976441349023, -1.7924453681497, -50.33841588047, -13.921312798764, -25.743742202409,
    ],
}  # fmt: skip


@pytest.mark.parametrize("seed, expected", NASH_BEFORE.items())
def test_nash_as_by_the_simplex_method_of_before(seed, expected):
    got = games.nash_equilibrium(games.random_game(6, seed))
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", UPDATES_BEFORE, ids=lambda case: "-".join(map(str, case)))
def test_updates_as_by_the_newton_iterations_of_before(case):
    (name, eta, steps, seed), expected = case, UPDATES_BEFORE[case]
    got = games.run(RANDOM, getattr(games, name), steps, start=policy(6, seed), eta=eta)[-1]
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_nash_of_preferences_that_all_lie_near_a_half(size):
    """HiGHS's own tolerance, 1e-7, is wider than these games: unscaled, it calls any policy their equilibrium."""
    near = 0.5 + size * (WEIGHTED - 0.5)
    assert torch.allclose(games.nash_equilibrium(near), games.nash_equilibrium(WEIGHTED), rtol=0, atol=1e-15 / size)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    for module in ("scipy.optimize", "scipy.special"):
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    for call in (
        lambda: games.nash_equilibrium(RPS),
        lambda: games.sppo(RPS, REF, eta=1.0),
        lambda: games.dno_prct(RPS, REF, eta=1.0),
    ):
        with pytest.raises(ConfigError, match=r"needs SciPy, .*: pip install 'fastpo\[games\]'$"):
            call()
    assert games.mwu(RPS, REF, eta=1.0).isfinite().all()  # the rest does without


def test_nash_of_degenerate_and_transitive_games():
    tied = torch.full((5, 5), 0.5, dtype=torch.float64)
    assert games.duality_gap(tied, games.nash_equilibrium(tied).log()) == 0
    copies = RPS.repeat(2, 2)  # every response twice: many equilibria, degenerate pivots
    assert games.duality_gap(copies, games.nash_equilibrium(copies).log()) < 1e-12
    best = games.nash_equilibrium(games.bradley_terry([0.3, 2.0, -1.0, 1.9]))
    assert best.tolist() == [0, 1, 0, 0]


def test_a_mixture_of_transitive_annotators_is_cyclic():
    prefs = games.condorcet(3)
    assert min(prefs[0, 1], prefs[1, 2], prefs[2, 0]) > 0.5 or min(prefs[1, 0], prefs[2, 1], prefs[0, 2]) > 0.5
    assert torch.allclose(games.nash_equilibrium(prefs), torch.full((3,), 1 / 3).double(), atol=1e-12)
    half = games.mixture([RPS, 1 - RPS])
    assert torch.equal(half, torch.full((3, 3), 0.5, dtype=torch.float64))
    assert torch.allclose(games.mixture([WEIGHTED, RPS], [0.25, 0.75]), 0.25 * WEIGHTED + 0.75 * RPS)


@on_games
@pytest.mark.parametrize("tau", [10.0, 0.1, 0.001, 1e-5])
def test_regularised_nash_is_a_fixed_point_with_no_gap(prefs, tau):
    ref = policy(len(prefs), 1)
    star = games.regularised_nash(prefs, ref, tau)
    # What is left is rounding, as 1/tau magnifies it.
    assert distance(games.offline_ipo(prefs, star, log_ref=ref, tau=tau), star) < 1e-13 / tau
    assert abs(games.regularised_gap(prefs, star, ref, tau)) < 1e-12
    assert games.regularised_gap(prefs, ref, ref, tau) > 1e-4
    assert games.duality_gap(prefs, star) <= -2 * tau * ref.min().item() + 1e-12  # the game itself in the limit


def test_regularised_nash_against_the_damped_fixed_point():
    ref, pi = policy(6, 2), policy(6, 3)
    for _ in range(3000):
        pi = torch.log_softmax(0.98 * pi + 0.02 * games.offline_ipo(RANDOM, pi, log_ref=ref, tau=TAU), 0)
    assert distance(pi, games.regularised_nash(RANDOM, ref, TAU)) < 1e-12


# --- 4.3: rates of the exact updates


@pytest.mark.parametrize(
    "steps, gap, last",
    [(100, 0.072, 0.383), (400, 0.013, 0.354), (1600, 0.011, 0.309), (6400, 0.005, 0.452)],
    ids=["T100", "T400", "T1600", "T6400"],
)
def test_mwu_average_iterate_is_within_hedges_bound(steps, gap, last):
    spread = -START.min().item()
    policies = games.run(RPS, games.mwu, steps, start=START, eta=math.sqrt(steps / (8 * spread)))
    average = games.duality_gap(RPS, games.averages(policies)[steps - 1])
    assert average <= math.sqrt(2 * spread / steps)
    assert average == pytest.approx(gap, abs=5e-4)
    assert games.duality_gap(RPS, policies[-1]) == pytest.approx(last, abs=5e-4)  # the last iterate does not converge


@pytest.mark.parametrize("steps, last", [(100, 0.496), (400, 0.157), (1600, 0.494), (6400, 0.285)])
def test_mwu_on_weighted_rock_paper_scissors(steps, last):
    spread = -START.min().item()
    policies = games.run(WEIGHTED, games.mwu, steps, start=START, eta=math.sqrt(steps / (8 * spread)))
    assert games.duality_gap(WEIGHTED, games.averages(policies)[steps - 1]) <= math.sqrt(2 * spread / steps)
    assert games.duality_gap(WEIGHTED, policies[-1]) == pytest.approx(last, abs=5e-4)


@on_games
def test_mwu_average_bound_on_every_game_at_every_step(prefs):
    start = policy(len(prefs), 4)
    spread, eta, steps = -start.min().item(), 2.0, 800
    averages = games.averages(games.run(prefs, games.mwu, steps, start=start, eta=eta))
    for t in range(1, steps + 1):
        assert games.duality_gap(prefs, averages[t - 1]) <= 2 * (eta * spread / t + 1 / (8 * eta))


def test_mwu_last_iterate_moves_away():
    policies = games.run(RPS, games.mwu, 400, start=REF, eta=5.0)
    nash = games.nash_equilibrium(RPS).log()
    kl = [games.kl(nash, p) for p in policies]
    assert kl[0] == pytest.approx(0.070, abs=5e-4) and kl[-1] == pytest.approx(0.203, abs=5e-4)
    assert all(after >= before for before, after in zip(kl, kl[1:]))
    assert min(games.duality_gap(RPS, p) for p in policies) > 0.15


@on_games
def test_dno_improves_at_every_step(prefs):
    """P(next beats this) = 1/2 + eta (KL(next||this) + KL(this||next)): the paper's inequality with its slack."""
    for eta in (0.2, 1.0, 5.0):
        policies = games.run(prefs, games.mwu, 200, start=policy(len(prefs), 5), eta=eta)
        for now, after in zip(policies, policies[1:]):
            won = games.win_prob(prefs, after, now)
            assert won >= 0.5 + eta * games.kl(after, now) - 1e-12
            assert won == pytest.approx(0.5 + eta * (games.kl(after, now) + games.kl(now, after)), abs=1e-12)


def test_regression_numbers():
    star = games.regularised_nash(RPS, REF, TAU)
    expected = torch.tensor([0.37532696, 0.27743263, 0.34724041], dtype=torch.float64)
    assert torch.allclose(star.exp(), expected, atol=5e-9, rtol=0)
    policies = games.run(RPS, games.inpo, 200, start=REF, eta=1.0, log_ref=REF, tau=TAU)
    kl = [games.kl(star, policies[t]) for t in (0, 50, 100, 200)]
    assert kl == pytest.approx([6.22e-2, 1.82e-4, 5.79e-7, 5.86e-12], rel=2e-3)


@on_games
@pytest.mark.parametrize("steps", [100, 400, 1600])
def test_inpo_average_iterate(prefs, steps):
    """INPO Theorem 3, O(1/sqrt T), with the constant of this setting: 2 sqrt(2 D/T), D = log(1/min ref).

    Started at the reference, log(pi_t/ref) has a range of at most 1/tau, so the gradient's range is at most 2; mirror
    descent's regret is then eta D + T/(2 eta), and the gap twice its mean.
    """
    ref = policy(len(prefs), 6)
    spread = -ref.min().item()
    eta = max(math.sqrt(steps / (2 * spread)), TAU)
    policies = games.run(prefs, games.inpo, steps, start=ref, eta=eta, log_ref=ref, tau=TAU)
    gap = games.regularised_gap(prefs, games.averages(policies)[steps - 1], ref, TAU)
    assert -1e-12 <= gap <= 2 * math.sqrt(2 * spread / steps)


@on_games
@pytest.mark.parametrize(
    "update, one_step, rate",
    [(games.inpo, lambda eta: 8 / eta**2, 32), (games.nash_md, lambda eta: 2 / eta**2, 8)],
    ids=["inpo_theorem_4", "nash_md_theorem_1"],
)
def test_last_iterate_with_a_decaying_step(prefs, update, one_step, rate):
    """KL(star||next) <= (1 - tau/eta) KL(star||this) + c/eta^2, hence KL <= rate/(tau^2 (T + 1)).

    INPO's constant C = max(B tau, 1) is 1: started at the reference |log(pi_t/ref)| <= B = 1/tau.
    """
    ref = REF if len(prefs) == 3 else policy(len(prefs), 7)
    star, eta = games.regularised_nash(prefs, ref, TAU), games.decaying(TAU)
    policies = games.run(prefs, update, 2000, start=ref, eta=eta, log_ref=ref, tau=TAU)
    kl = [games.kl(star, p) for p in policies]
    ratios = []
    for t in range(2000):
        assert kl[t + 1] <= (1 - TAU / eta(t)) * kl[t] + one_step(eta(t))
        ratios.append(kl[t + 1] * TAU**2 * (t + 2) / rate)
    assert max(ratios) < (1.3e-3 if update is games.inpo else 1.6e-3)  # loose by three orders, reached on RPS
    if prefs is RPS:
        assert kl[-1] == pytest.approx(3.5e-9 if update is games.inpo else 6.1e-8, rel=0.05)
    slope = math.log(max(kl[1000:]) / max(kl[100:200])) / math.log(10)
    assert slope < -1  # at least as fast as the theorem's 1/T


@on_games
def test_the_first_decaying_step_of_inpo_ignores_the_start(prefs):
    """eta_0 = tau, so kappa = 1: the start enters through its win rates alone."""
    n, ref = len(prefs), policy(len(prefs), 7)
    start = policy(n, 8)
    (_, first) = games.run(prefs, games.inpo, 1, start=start, eta=games.decaying(TAU), log_ref=ref, tau=TAU)
    assert distance(first, games.offline_ipo(prefs, start, log_ref=ref, tau=TAU)) < 1e-14


def test_inpo_with_a_constant_step_converges_where_the_spectral_radius_says():
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    for eta in (0.3, 0.45, 0.5, 1.0, 5.0):
        predicted = math.sqrt((1 - TAU / eta) ** 2 + 1 / (12 * eta**2))
        assert games.spectral_radius(RPS, uniform, eta, TAU) == pytest.approx(predicted, abs=1e-12)
    threshold = (TAU**2 + 1 / 12) / (2 * TAU)
    assert threshold == pytest.approx(0.4667, abs=5e-5)
    assert games.spectral_radius(RPS, uniform, threshold, TAU) == pytest.approx(1, abs=1e-12)
    assert games.spectral_radius(RPS, uniform, 0.380, 0.380 / 3) > 1 > games.spectral_radius(RPS, uniform, 0.390, 0.13)

    star = games.regularised_nash(RPS, REF, TAU)
    final = {}
    for eta in (0.4, 0.5, 1.0):
        last = games.run(RPS, games.inpo, 2500, start=REF, eta=eta, log_ref=REF, tau=TAU)[-1]
        final[eta] = games.kl(star, last)
    assert final[0.4] == pytest.approx(0.11, abs=5e-3) and final[0.5] < 1e-12 and final[1.0] < 1e-12


@pytest.mark.parametrize("eta, steps", [(0.5, 1200), (1.0, 350), (3.0, 700)], ids=["eta0.5", "eta1", "eta3"])
def test_inpo_with_a_constant_step_is_linear_at_that_rate(eta, steps):
    star = games.regularised_nash(RPS, REF, TAU)
    policies = games.run(RPS, games.inpo, steps, start=REF, eta=eta, log_ref=REF, tau=TAU)
    off = [(p - star).norm().item() for p in policies]
    assert off[-1] < 1e-7
    half = steps // 2
    rate = (off[-1] / off[half]) ** (1 / (steps - half))
    assert rate == pytest.approx(games.spectral_radius(RPS, REF, eta, TAU), abs=1e-3)


def test_nash_md_with_a_constant_step_is_biased():
    star = games.regularised_nash(RPS, REF, TAU)
    for eta, bias in ((1.0, 7.3e-4), (0.2, 0.047)):
        last = games.run(RPS, games.nash_md, 2000, start=REF, eta=eta, log_ref=REF, tau=TAU)[-1]
        assert games.kl(star, last) == pytest.approx(bias, rel=0.01)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64).log()  # where the equilibrium is the reference there is none
    last = games.run(RPS, games.nash_md, 500, start=START, eta=1.0, log_ref=uniform, tau=TAU)[-1]
    assert games.kl(uniform, last) < 1e-12


def test_online_ipo_converges_for_a_large_tau_only():
    for tau, converges in ((1.0, True), (0.1, False)):
        policies = games.run(RPS, games.online_ipo, 300, start=REF, eta=1.0, log_ref=REF, tau=tau)
        gap = games.regularised_gap(RPS, policies[-1], REF, tau)
        assert gap < 1e-12 if converges else gap > 0.5


@on_games
def test_identities_between_updates(prefs):
    pi, ref = policy(len(prefs), 8), policy(len(prefs), 9)
    assert distance(games.inpo(prefs, pi, log_ref=ref, eta=0.7, tau=0.0), games.mwu(prefs, pi, eta=0.7)) < 1e-15
    assert distance(games.nash_md(prefs, pi, log_ref=ref, eta=0.7, tau=0.0), games.mwu(prefs, pi, eta=0.7)) < 1e-15
    online = games.online_ipo(prefs, pi, log_ref=ref, eta=1.0, tau=0.7)
    assert distance(games.inpo(prefs, pi, log_ref=ref, eta=0.7, tau=0.7), online) < 1e-15


@on_games
def test_two_hundred_steps_of_every_update_stay_policies(prefs):
    ref = policy(len(prefs), 10)
    for a in ALGORITHMS.values():
        eta = games.decaying(TAU) if a.decay else 2.0 * a.eta_scale
        fixed = {"log_ref": ref, "tau": TAU} if a.regularised else {}
        policies = games.run(prefs, a.update, 200, start=ref, eta=eta, **fixed)
        assert policies.isfinite().all() and (policies.logsumexp(1).abs() < 1e-12).all(), a.name


# --- 4.4: minimisers of the population losses, through the library's op and table of losses


def both(log_p: torch.Tensor) -> torch.Tensor:
    return torch.outer(log_p.exp(), log_p.exp())


def minimiser(name: str, n: int, weights: torch.Tensor, **given) -> torch.Tensor:
    start = torch.full((n,), -math.log(n), dtype=torch.float64)
    return fit(lambda logps: population_loss(name, logps, weights, **given), start)


ETA, KAPPA_TAU = 0.8, 0.8 / 3  # kappa 1/3, as in INPO's experiments


def inpo_minimiser(name: str, prefs: torch.Tensor, pi: torch.Tensor, ref: torch.Tensor, weights: torch.Tensor):
    if name == "inpo":
        given = {"ref": ref, "prev": pi, "eta": ETA, "kappa": KAPPA_TAU / ETA}
    else:  # the two references mixed into one number a pair
        given = {"ref": ref / 3 + pi * 2 / 3, "beta": ETA, "ipo_reduce": "sum"}
    return minimiser(name, len(prefs), weights, labels=prefs, **given)


@on_two_games
@pytest.mark.parametrize("name", ["ipo", "inpo"], ids=["ipo_to_the_mixture", "inpo"])
def test_inpo_minimiser(prefs, name):
    pi, ref, mu = (policy(len(prefs), s) for s in (11, 12, 13))
    omd = games.inpo(prefs, pi, log_ref=ref, eta=ETA, tau=KAPPA_TAU)
    assert distance(inpo_minimiser(name, prefs, pi, ref, both(pi)), omd) < 1e-6
    # Pairs from another policy: win rates against it, and no longer mirror descent.
    other = torch.log_softmax(prefs @ mu.exp() / ETA + ref / 3 + pi * 2 / 3, 0)
    got = inpo_minimiser(name, prefs, pi, ref, both(mu))
    assert distance(got, other) < 1e-6 and distance(got, omd) > 0.01


@on_two_games
def test_dno_minimiser_for_any_pairs(prefs):
    n = len(prefs)
    pi = policy(n, 14)
    win = prefs @ pi.exp()
    weights = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.05
    got = minimiser("dno", n, weights, ref=pi, win=win, beta=ETA)
    assert distance(got, games.mwu(prefs, pi, eta=ETA)) < 1e-6


@on_two_games
@pytest.mark.parametrize("name", ["dpo", "dno_prct"])
def test_dno_prct_minimiser(prefs, name):
    pi = policy(len(prefs), 15)
    to_mwu = []
    for eta in (0.5, 2.0, 8.0, 32.0, 128.0):
        got = minimiser(name, len(prefs), both(pi), labels=prefs, ref=pi, **step(name, eta))
        g = got - pi
        won = torch.sigmoid(eta * (g[:, None] - g[None, :])) @ pi.exp()
        assert (won - prefs @ pi.exp()).abs().max() < 1e-5
        exact = games.dno_prct(prefs, pi, eta=eta)
        assert distance(got, exact) < 1e-6
        to_mwu.append(distance(exact, games.mwu(prefs, pi, eta=eta / 4)))
    assert to_mwu[-1] < 4e-4  # the mwu step 4/eta in the limit, at a distance like 1/eta
    assert to_mwu[2] / to_mwu[3] == pytest.approx(4, rel=0.2) and to_mwu[3] / to_mwu[4] == pytest.approx(4, rel=0.1)


@on_two_games
def test_ipo_and_dpo_minimisers(prefs):
    n = len(prefs)
    ref, mu = policy(n, 16), policy(n, 17)
    got = minimiser("ipo", n, both(mu), labels=prefs, ref=ref, beta=0.6, ipo_reduce="sum")
    assert distance(got, games.offline_ipo(prefs, mu, log_ref=ref, tau=0.6)) < 1e-6

    rewards = torch.linspace(-1, 1.5, n, dtype=torch.float64).flip(0)
    clean = games.bradley_terry(rewards)
    expected = games.dpo(rewards, log_ref=ref, beta=0.9)
    assert distance(minimiser("dpo", n, both(mu), labels=clean, ref=ref, beta=0.9), expected) < 1e-6
    flipped = 0.8 * clean + 0.2 * clean.T
    got = minimiser("robust", n, both(mu), labels=flipped, ref=ref, beta=0.9, label_smoothing=0.2)
    assert distance(got, expected) < 1e-6
    assert distance(minimiser("dpo", n, both(mu), labels=flipped, ref=ref, beta=0.9), expected) > 0.01


@pytest.mark.parametrize("name", ["online_ipo", "ipo_md"])
def test_online_ipo_minimiser(name):
    ref, mu = policy(6, 18), policy(6, 19)  # mu: whatever the pairs are sampled from, the gradient does not see it
    got = minimiser(name, 6, both(mu), labels=RANDOM, ref=ref, beta=0.6)
    assert distance(got, games.offline_ipo(RANDOM, mu, log_ref=ref, tau=0.6)) < 1e-6


@on_two_games
def test_regularised_dno_minimiser(prefs):
    n = len(prefs)
    pi, ref = policy(n, 20), policy(n, 21)
    given = {"ref": ref, "prev": pi, "beta": ETA, "kappa": KAPPA_TAU / ETA}
    win = prefs @ pi.exp()
    soft = minimiser("dno_reg", n, both(pi), win=win, **given)  # Algorithm 1's soft labels
    assert distance(soft, games.inpo(prefs, pi, log_ref=ref, eta=ETA, tau=KAPPA_TAU)) < 1e-6
    hard = minimiser("dno_reg", n, both(pi), labels=prefs, **given)  # those of DNO-Prct
    g = hard - ref / 3 - pi * 2 / 3
    assert (torch.sigmoid(ETA * (g[:, None] - g[None, :])) @ pi.exp() - win).abs().max() < 1e-6


@on_two_games
@pytest.mark.parametrize("eta_s", [0.05, 0.2, 1.0, 3.0])
def test_sppo_minimiser(prefs, eta_s):
    """With the baseline log Z it is mwu; as published, with 1/2, mwu up to O(eta_s^3)."""
    pi = policy(len(prefs), 22)
    win, beta = prefs @ pi.exp(), 1 / eta_s
    mwu = games.mwu(prefs, pi, eta=beta)
    published = minimiser("sppo", len(prefs), both(pi), ref=pi, win=win, beta=beta)
    assert distance(published, games.sppo(prefs, pi, eta=beta)) < 1e-6
    rho, residual = (published - pi).exp(), published - pi - eta_s * (win - 0.5)
    assert (residual - (pi.exp() @ residual) * rho).abs().max() < 1e-5
    if eta_s <= 0.2:
        assert distance(published, mwu) < 1e-4
    # (p - 1/2)/beta becomes p/beta - log Z by a shift of the reference.
    log_z = torch.logsumexp(pi + eta_s * win, 0)
    exact = minimiser("sppo", len(prefs), both(pi), ref=pi - log_z + 0.5 * eta_s, win=win, beta=beta)
    assert distance(exact, mwu) < 1e-6


@on_two_games
@pytest.mark.parametrize("eta_s", [1.0, 3.0])
def test_sppo_is_mwu_on_unnormalised_tables(prefs, eta_s):
    """As published, baseline 1/2: without the softmax its minimiser is pi exp(eta_s (win - 1/2)), mwu's to a factor."""
    pi = policy(len(prefs), 22)
    table, win = torch.zeros_like(pi, requires_grad=True), prefs @ pi.exp()
    optimiser = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = population_loss("sppo", table, both(pi), ref=pi, win=win, beta=1 / eta_s)
        value.backward()
        return value

    optimiser.step(closure)
    assert (table.detach() - pi - eta_s * (win - 0.5)).abs().max() < 1e-6
    assert distance(torch.log_softmax(table.detach(), 0), games.mwu(prefs, pi, eta=1 / eta_s)) < 1e-6


@pytest.mark.parametrize("eta", [1e-3, 1.0, 1e3], ids=["papers_beta", "eta1", "eta1000"])
def test_sppo_is_stationary_at_any_scale(eta):
    """At the paper's beta = 1e-3 the targets are hundreds of nats: no exponential may overflow."""
    pi = policy(6, 22)
    after, c = games.sppo(RANDOM, pi, eta=eta), (RANDOM @ pi.exp() - 0.5) / eta
    residual = after - pi - c
    off = residual - (pi.exp() @ residual) * (after - pi).exp()
    assert off.abs().max() < 1e-12 * (1 + c.abs().max())


@on_two_games
def test_sppo_as_published_leaves_mwu_with_the_cube_of_the_step(prefs):
    pi = policy(len(prefs), 22)
    off = [distance(games.sppo(prefs, pi, eta=1 / s), games.mwu(prefs, pi, eta=1 / s)) for s in (0.05, 0.1, 0.2, 0.4)]
    for small, large in zip(off, off[1:]):
        assert math.log2(large / small) == pytest.approx(3, abs=0.1)


def test_sampled_inpo_converges_with_the_root_of_the_pairs():
    pi, ref = policy(3, 23), policy(3, 24)
    exact = games.inpo(WEIGHTED, pi, log_ref=ref, eta=ETA, tau=KAPPA_TAU)
    mixed = ref / 3 + pi * 2 / 3
    frequency = (2 * both(pi) * WEIGHTED).flatten()  # of (chosen, rejected)
    errors = []
    for pairs in (1_000, 10_000, 100_000):
        total = 0.0
        for seed in range(12):
            g = torch.Generator().manual_seed(seed)
            drawn = torch.multinomial(frequency, pairs, replacement=True, generator=g)
            share = torch.bincount(drawn, minlength=9).double().reshape(3, 3) / pairs
            got = minimiser("ipo", 3, share, ref=mixed, beta=ETA, ipo_reduce="sum")
            total += distance(got, exact) ** 2
        errors.append(math.sqrt(total / 12))
    assert errors[0] < 0.03 and errors[2] < 0.003
    assert math.log10(errors[2] / errors[0]) / 2 == pytest.approx(-0.5, abs=0.12)


def test_gradient_descent_through_the_op_reaches_rounding():
    """3000 plain steps of learning rate 1 on the table of logits, by the op's and the loss's own gradients."""
    prefs, pi, ref = WEIGHTED, policy(3, 25), policy(3, 26)
    mixed = ref / 3 + pi * 2 / 3
    table = TabularPolicy(ref)
    for _ in range(3000):
        loss = population_loss("ipo", table(), both(pi), labels=prefs, ref=mixed, beta=ETA, ipo_reduce="sum")
        (grad,) = torch.autograd.grad(loss, table.weight)
        with torch.no_grad():
            table.weight -= grad
    assert distance(table().detach(), games.inpo(prefs, pi, log_ref=ref, eta=ETA, tau=KAPPA_TAU)) < 1e-14


def test_the_trainers_preference_op_has_the_same_gradient():
    """`ops.preference_loss` on a packed batch of one-token responses: what the trainer calls."""
    pi, n = policy(6, 27), 6
    index = torch.cartesian_prod(torch.arange(n), torch.arange(n)).int()
    weight = (2 * both(pi) * RANDOM).flatten()
    mixed = policy(6, 28)
    gradients = []
    for packed in (True, False):
        table = TabularPolicy(policy(6, 29))
        logps = table()
        if packed:
            offsets = torch.arange(n + 1, dtype=torch.int32)
            loss, _ = preference_loss(logps, mixed, offsets, index, weight, loss_type="ipo", beta=ETA, ipo_reduce="sum")
        else:
            given = {"labels": RANDOM, "ref": mixed, "beta": ETA, "ipo_reduce": "sum"}
            loss = population_loss("ipo", logps, both(pi), **given)
        gradients.append(torch.autograd.grad(loss, table.weight)[0])
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15)


# --- 4.5: the rest of the suite


@pytest.mark.parametrize(
    "name", ["dpo", "ipo", "robust", "hinge", "sppo", "sppo_hard", "dno", "dno_prct", "dno_reg", "inpo", "online_ipo"]
)
def test_coefficients_by_central_differences_through_the_op(name):
    """(4.5, 1) for the losses of the games; tests/losses/test_functions.py has every row of the table."""
    pi, ref = policy(6, 30), policy(6, 31)
    given = {"ref": ref, "win": RANDOM @ pi.exp(), **step(name, ETA)}
    if name in ("dno_reg", "inpo"):
        given |= {"prev": pi, "kappa": KAPPA_TAU / ETA}

    def value(weight: torch.Tensor) -> torch.Tensor:
        logps = linear_logprob(torch.ones_like(weight), weight, torch.arange(6))
        return population_loss(name, logps, both(pi), labels=RANDOM, **given)

    weight = policy(6, 32)[:, None].requires_grad_()
    assert torch.autograd.gradcheck(value, (weight,), eps=1e-6, rtol=1e-6, atol=1e-6)


@on_games
@pytest.mark.parametrize("a", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_three_trained_iterations_equal_the_exact_ones(prefs, a):
    """(4.5, 4) The outer loop with the policy trained at every step by the library's loss."""
    ref = policy(len(prefs), 33)
    eta = games.decaying(0.3) if a.decay else 1.0 * a.eta_scale
    fixed = {"log_ref": ref, "tau": 0.3} if a.regularised else {}
    exact = games.run(prefs, a.update, 3, start=ref, eta=eta, **fixed)
    trained = games.run(prefs, tabular.trained_update(a), 3, start=ref, eta=eta, **fixed)
    assert distance(trained[-1], exact[-1]) < 1e-6  # the specification asks for 1e-3


def test_trained_with_a_plain_optimiser():
    """The same with RMSprop, the optimiser of the papers, in place of L-BFGS."""
    pi = policy(3, 34)
    for _ in range(3):
        table, win = TabularPolicy(pi), WEIGHTED @ pi.exp()
        optimiser = torch.optim.RMSprop(table.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-3, total_iters=300)
        for _ in range(300):
            optimiser.zero_grad()
            population_loss("sppo", table(), both(pi), ref=pi, win=win, beta=2.0).backward()
            optimiser.step()
            schedule.step()
        got = table().detach()
        assert distance(got, games.sppo(WEIGHTED, pi, eta=2.0)) < 1e-3
        pi = got


def test_two_iterations_of_dno_through_the_trainer(toy, tmp_path):
    """`fastpo.train` on every pair of three answers to one prompt: tokeniser, packing, trunk, head, reference, AdamW.

    Pairs carry DNO's soft labels as weights. DPO's minimiser concerns only the answers' differences, so the mass that a
    real vocabulary leaves on other answers plays no part.
    """
    import fastpo

    model, tokenizer, answers, eta = toy.model(), toy.tokenizer(), (" w1", " w2", " w3"), 0.05

    def policy_of_three() -> torch.Tensor:
        logps = []
        for answer in answers:
            ids = torch.tensor([tokenizer("w9" + answer + "<eos>")["input_ids"]])
            logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
            logps.append(logits[:-1].gather(1, ids[0, 1:, None]).sum())
        return torch.log_softmax(torch.stack(logps).detach(), 0)

    now = policy_of_three()
    for iteration in range(2):
        win = RPS @ now.exp()
        expected = games.mwu(RPS, now, eta=eta)
        rows = [
            {
                "prompt": "w9",
                "chosen": answers[y],
                "rejected": answers[z],
                "weight": torch.sigmoid(win[y] - win[z]).item(),
            }
            for y in range(3)
            for z in range(3)
            if y != z
        ]
        options = dict(
            output_dir=str(tmp_path / str(iteration)), disable_tqdm=True, use_cpu=True, bf16=False, max_steps=100,
            per_device_train_batch_size=6, learning_rate=5e-3, lr_scheduler_type="cosine", warmup_ratio=0.0,
            gradient_checkpointing=False, save_final=False, loss_type="dpo", beta=eta, logging_steps=30,
        )  # fmt: skip
        model = fastpo.train(model, rows, processing_class=tokenizer, args=options).model.eval()
        got = policy_of_three()
        assert distance(now, expected) > 0.05 and distance(got, expected) < 1e-3, (now, expected, got)
        now = got


def evaluate(name: str, chosen: float, rejected: float, dtype: torch.dtype, **hyper):
    """(loss, d/d chosen, d/d rejected) of a single pair with a reference of 0, in a dtype."""
    one = lambda v: torch.tensor([v], dtype=dtype)  # noqa: E731
    lw, ll = one(chosen).requires_grad_(), one(rejected).requires_grad_()
    value = LOSSES[name](
        lw, ll, one(0.0), one(0.0), chosen_len=one(1.0), rejected_len=one(1.0), win_prob_chosen=one(0.9),
        win_prob_rejected=one(0.1), **hyper,
    )  # fmt: skip
    value.sum().backward()
    return [v.detach().double().item() for v in (value, lw.grad, ll.grad)]


@pytest.mark.parametrize(
    "name, chosen, rejected, dtypes, hyper",
    [
        ("dpo", -500, -504, ("bfloat16", "float32"), {}),
        ("ipo", -500, -504, ("bfloat16", "float32"), {"ipo_reduce": "sum"}),
        ("hinge", -500, -504, ("bfloat16", "float32"), {}),
        ("robust", -500, -504, ("bfloat16", "float32"), {"label_smoothing": 0.2}),
        ("sppo", -500, -504, ("bfloat16", "float32"), {}),
        ("sppo", 0.03, -0.02, ("float32",), {}),  # residuals of 400 nats
        ("sppo_hard", -500, -504, ("bfloat16", "float32"), {}),
        ("orpo", -1e-7, -2.0, ("float32",), {"nll_coef": 0.0}),
        ("discopop", -600, 0, ("float32",), {}),  # u = -30
        ("exo_pair", -500, -504, ("bfloat16", "float32"), {"label_smoothing": 1e-3}),
    ],
    ids=["dpo", "ipo", "hinge", "robust", "sppo_500", "sppo_residual_400", "sppo_hard", "orpo", "discopop", "exo_pair"],
)
def test_extreme_inputs(name, chosen, rejected, dtypes, hyper):
    """(4.5, 5) Low precision loses digits, not the loss: finite, and the fp64 value within the dtype's rounding.

    The inputs are exact in each dtype, or are the dtype's nearest.
    """
    for dtype in (getattr(torch, d) for d in dtypes):
        rounded = [torch.tensor(float(v)).to(dtype).double().item() for v in (chosen, rejected)]
        exact = evaluate(name, *rounded, torch.float64, **hyper)
        got = evaluate(name, *rounded, dtype, **hyper)
        assert all(map(math.isfinite, got))
        slack = 8 * torch.finfo(dtype).eps
        for value, expected in zip(got, exact):
            assert abs(value - expected) <= slack * max(abs(expected), max(map(abs, exact[1:])), 1.0), (dtype, got)


# --- bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: games.check_preferences(torch.ones(2, 3)), r"square matrix \[n, n\], not \[2, 3\]"),
        (lambda: games.check_preferences(torch.tensor([[0.5, 1.2], [-0.2, 0.5]])), r"P\(0 beats 1\) = 1.2 is no prob"),
        (lambda: games.check_preferences(torch.tensor([[0.5, 0.6], [0.6, 0.5]])), "mirror image do not add to 1"),
        (lambda: games.check_preferences(torch.full((2, 2), math.nan)), "is no probability"),
        (lambda: games.rock_paper_scissors(0.6), "a must be in"),
        (lambda: games.mixture([RPS, RANDOM]), "games of one size"),
        (lambda: games.mixture([RPS, RPS], [0.5, 0.6]), "add to 1"),
        (lambda: games.algorithm("imwu"), "did you mean 'mwu'"),
        (lambda: games.regularised_nash(RPS, REF, 0.0), "tau must be positive"),
        (lambda: games.inpo(RPS, REF, log_ref=REF, eta=0.1, tau=0.2), r"tau must be in \[0, eta = 0.1\]"),
        (lambda: games.run(RPS, games.mwu, 3, start=REF, eta=-1.0), "eta must be positive"),
        (lambda: games.dno_prct(torch.tensor([[0.5, 1.0], [0.0, 0.5]]).double(), REF[:2], eta=1.0), "no minimiser"),
    ],
)  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)

"""Preference games with known equilibria, and what the theorems of self-play algorithms say on them, exactly.

n = responses of a single prompt; prefs [n, n] fp64, prefs[y, z] = P(y beats z), so prefs + prefs.T = 1. Policies are
log-probabilities [n], fp64: in the log domain an update is a sum, and no probability underflows to a zero that it could
never leave. `eta` divides: a larger one is a smaller step (the step of SPPO's and Nash-MD's papers is 1/eta).
`fastpo.games.tabular` trains the same updates through the library's losses.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpo.errors import ConfigError


def check_preferences(prefs: Tensor) -> Tensor:
    """`prefs` [n, n] in fp64, or ConfigError naming the first entry that is no preference."""
    prefs = torch.as_tensor(prefs, dtype=torch.float64)
    if prefs.dim() != 2 or prefs.shape[0] != prefs.shape[1] or not len(prefs):
        raise ConfigError(f"preferences must be a square matrix [n, n], not {list(prefs.shape)}")
    outside = ~((prefs >= 0) & (prefs <= 1))  # so that NaN is outside too
    torn = (prefs + prefs.T - 1).abs() > 1e-9
    for bad, why in ((outside, "is no probability"), (torn, "and its mirror image do not add to 1")):
        if bad.any():
            y, z = bad.nonzero()[0].tolist()
            raise ConfigError(f"P({y} beats {z}) = {prefs[y, z]:g} {why}")
    return prefs


# --- games


def rock_paper_scissors(a: float = 0.5, b: float | None = None, c: float | None = None) -> Tensor:
    """P - 1/2 = [[0, a, -b], [-a, 0, c], [b, -c, 0]], b and c being a by default. Nash: (c, b, a) / (a + b + c)."""
    b, c = a if b is None else b, a if c is None else c
    for name, value in (("a", a), ("b", b), ("c", c)):
        if not 0 < value <= 0.5:
            raise ConfigError(f"rock-paper-scissors: {name} must be in (0, 0.5], not {value:g}")
    return 0.5 + torch.tensor([[0, a, -b], [-a, 0, c], [b, -c, 0]], dtype=torch.float64)


def bradley_terry(rewards: Sequence[float] | Tensor) -> Tensor:
    """P(y beats z) = sigmoid(r_y - r_z): transitive, its Nash equilibrium plays the best response alone."""
    r = torch.as_tensor(rewards, dtype=torch.float64)
    return torch.sigmoid(r[:, None] - r[None, :])


def random_game(n: int, seed: int = 0) -> Tensor:
    """Independent uniform preferences above the diagonal: cyclic in general, with an equilibrium on some responses."""
    if n < 2:
        raise ConfigError(f"a game needs at least 2 responses, not {n}")
    u = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    return u + (1 - u.T).tril(-1) + 0.5 * torch.eye(n, dtype=torch.float64)


def mixture(games: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """A population of annotators: each game is one's preferences, weighted by its share (default: equal).

    Bradley-Terry annotators who disagree mix to preferences that no Bradley-Terry model has, cyclic ones among them.
    """
    if not games or any(g.shape != games[0].shape for g in games):
        raise ConfigError(f"a mixture needs games of one size, not {[len(g) for g in games]}")
    w = torch.as_tensor([1 / len(games)] * len(games) if weights is None else weights, dtype=torch.float64)
    if len(w) != len(games) or not (w >= 0).all() or abs(w.sum().item() - 1) > 1e-9:
        raise ConfigError(f"a mixture of {len(games)} games needs as many shares that add to 1, not {w.tolist()}")
    return torch.einsum("g,gyz->yz", w, torch.stack(list(games)))


def condorcet(n: int = 3, scale: float = 3.0) -> Tensor:
    """A mixture: n Bradley-Terry annotators, each with the ranking of the one before shifted by one place.

    Every annotator is transitive; the majority is not. Its equilibrium is uniform, by symmetry.
    """
    if n < 3:
        raise ConfigError(f"a cycle of annotators needs at least 3 responses, not {n}")
    rewards = scale * torch.linspace(1, 0, n, dtype=torch.float64)
    return mixture([bradley_terry(rewards.roll(k)) for k in range(n)])


# --- what is measured


def kl(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) of two policies; 0 log 0 is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum().item()


def win_prob(prefs: Tensor, log_p: Tensor, log_q: Tensor) -> float:
    """P(p beats q)."""
    return (log_p.exp() @ prefs @ log_q.exp()).item()


def duality_gap(prefs: Tensor, log_pi: Tensor) -> float:
    """2 (max_y P(y beats pi) - 1/2): what the best response gains over it; 0 at the Nash equilibrium alone."""
    return 2 * ((prefs @ log_pi.exp()).max().item() - 0.5)


def regularised_gap(prefs: Tensor, log_pi: Tensor, log_ref: Tensor, tau: float) -> float:
    """The duality gap of J(p, q) = P(p beats q) - tau KL(p || ref) + tau KL(q || ref) (INPO, 2407.00617 eq. 3)."""
    best = tau * torch.logsumexp(log_ref + prefs @ log_pi.exp() / tau, 0).item()
    return 2 * (best + tau * kl(log_pi, log_ref)) - 1


# --- equilibria


def nash_equilibrium(prefs: Tensor) -> Tensor:
    """The Nash policy, as probabilities [n], by linear programming (SciPy's HiGHS); one of them where there are more.

    With A = prefs - 1/2: the least v >= A pi, which is 0, over the probabilities pi. The duality gap certifies the
    answer, whatever found it. ConfigError without SciPy.
    """
    optimize = _scipy("optimize")
    prefs = check_preferences(prefs)
    n, advantage = len(prefs), (prefs - prefs.T) / 2  # skew to the last digit
    # HiGHS's tolerances are absolute: preferences that all lie near 1/2 would be within them. No equilibrium moves.
    scale = advantage.abs().max().item() or 1.0
    found = optimize.linprog(
        np.append(np.zeros(n), 1.0),  # of (pi, v)
        A_ub=np.hstack([advantage.numpy() / scale, -np.ones((n, 1))]), b_ub=np.zeros(n),
        A_eq=np.append(np.ones(n), 0.0)[None], b_eq=[1.0], bounds=[(0, None)] * n + [(None, None)], method="highs",
    )  # fmt: skip
    if found.x is None:
        raise ArithmeticError(f"linear programming found no equilibrium of a game of {n} responses: {found.message}")
    pi = torch.from_numpy(found.x[:n]).clamp_min(0)
    pi /= pi.sum()
    gap = 2 * (advantage @ pi).max().item()
    if not gap < 1e-8 * scale:
        raise ArithmeticError(f"linear programming stopped at a duality gap of {gap:g} on a game of {n} responses")
    return pi


def _scipy(module: str) -> Any:
    """A module of SciPy, which is an extra: 140 MB that training does not need."""
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError:
        raise ConfigError("fastpo.games needs SciPy, which is not installed: pip install 'fastpo[games]'") from None


def regularised_nash(prefs: Tensor, log_ref: Tensor, tau: float) -> Tensor:
    """Log-policy of the regularised game's equilibrium, pi = ref exp(prefs pi / tau) / Z, by damped Newton.

    F(u) = u - log ref - A softmax(u) / tau with A = prefs - 1/2 has the Jacobian I - A S / tau, S the softmax's. A is
    skew and S positive semi-definite, so A S has imaginary eigenvalues only and the Jacobian is never singular; F grows
    with u. Backtracking on |F| therefore ends at the one root, for any tau > 0, where the plain fixed point diverges
    once tau is small. The root is followed from a large tau down: from afar Newton needs hundreds of steps. SciPy's
    `root` has no method with that guarantee: on the same way down its `lm` ended beside the root in 2 of 1440 cases.
    """
    _check_tau(tau)
    advantage = check_preferences(prefs) - 0.5
    u, now = log_ref.clone(), max(1.0, tau)
    while True:
        u, residual = _newton(u, advantage, log_ref, now)
        if now == tau:
            break
        now = max(now / 2, tau)
    if not residual < 1e-9 * (1 + 1 / tau):
        raise ArithmeticError(f"Newton's method stopped at a residual of {residual:g} for tau = {tau:g}")
    return torch.log_softmax(u, 0)


def _newton(u: Tensor, advantage: Tensor, log_ref: Tensor, tau: float) -> tuple[Tensor, float]:
    """The root near u of `regularised_nash`'s F, and |F| there."""

    def residual(u: Tensor) -> Tensor:
        return u - log_ref - advantage @ torch.softmax(u, 0) / tau

    f = residual(u)
    for _ in range(200):
        pi = torch.softmax(u, 0)
        cov = torch.diag(pi) - torch.outer(pi, pi)
        step = torch.linalg.solve(torch.eye(len(u), dtype=torch.float64) - advantage @ cov / tau, f)
        size, t = f.norm(), 1.0
        while t > 1e-12 and residual(u - t * step).norm() > (1 - 0.25 * t) * size:
            t /= 2
        if t <= 1e-12 or size == 0:  # no descent left above rounding
            break
        u = u - t * step
        f = residual(u)
    return u, f.norm().item()


def _check_tau(tau: float) -> None:
    if not tau > 0:
        raise ConfigError(f"tau must be positive, not {tau}")


def spectral_radius(prefs: Tensor, log_ref: Tensor, eta: float, tau: float) -> float:
    """Of INPO's update with a constant eta, linearised at the regularised equilibrium: it converges where this is < 1.

    On symmetric rock-paper-scissors with a uniform reference its square is (1 - tau/eta)^2 + 1/(12 eta^2).
    """
    pi = regularised_nash(prefs, log_ref, tau).exp()
    cov = torch.diag(pi) - torch.outer(pi, pi)
    # Shifting all of log pi changes no policy: projecting its direction out leaves the tangent space.
    tangent = torch.eye(len(pi), dtype=torch.float64) - 1 / len(pi)
    update = tangent @ ((1 - tau / eta) * torch.eye(len(pi), dtype=torch.float64) + (prefs - 0.5) @ cov / eta) @ tangent
    return torch.linalg.eigvals(update).abs().max().item()


# --- exact updates: log pi_t [n] -> log pi_{t+1} [n]


def mwu(prefs: Tensor, log_pi: Tensor, *, eta: float) -> Tensor:
    """pi_{t+1} ~ pi_t exp(prefs pi_t / eta): multiplicative weights.

    Also DNO's Algorithm 1 (2404.03715), SPO, iterative IPO with tau = eta, and SPPO with the exact log Z.
    """
    return torch.log_softmax(log_pi + prefs @ log_pi.exp() / eta, 0)


def sppo(prefs: Tensor, log_pi: Tensor, *, eta: float) -> Tensor:
    """The exact minimiser of SPPO's published loss, whose baseline is 1/2 instead of log Z; beta = eta.

    With g = log(pi/pi_t), c = (prefs pi_t - 1/2)/eta and m = KL(pi_t || pi) stationarity reads g + m exp(g) = c, so
    m exp(g) = w with w + log w = c + log m, and m is fixed by sum pi_t exp(g) = 1. That sum is convex and decreasing in
    m, so Newton from any m where it is at least 1 climbs to the only root. Differs from `mwu` by O(1/eta^3).
    ConfigError without SciPy.
    """
    omega = _scipy("special").wrightomega  # w > 0 with w + log w = x
    pi = log_pi.exp()
    c = (prefs @ pi - 0.5) / eta
    m = max(0.0, (pi * (c + log_pi)).max().item())  # 0, or where one term alone is 1: no exponential overflows
    for _ in range(200):
        g = c if m == 0 else c - torch.from_numpy(omega((c + math.log(m)).numpy()))
        rho = g.exp()
        step = ((pi @ rho).item() - 1) / (pi @ (rho * rho / (1 + m * rho))).item()
        if step <= 1e-16 + 1e-15 * m:  # rounding
            break
        m += step
    return torch.log_softmax(log_pi + g, 0)


def dno_prct(prefs: Tensor, log_pi: Tensor, *, eta: float) -> Tensor:
    """The minimiser of DNO-Prct (DPO with reference pi_t) over pairs from pi_t, labelled by `prefs`.

    g = log(pi/pi_t) solves sum_z pi_t(z) sigmoid(eta (g_y - g_z)) = P(y beats pi_t): the best Bradley-Terry fit to the
    preferences, near the mwu step 4/eta once eta is large. ConfigError without SciPy, and where there is none.
    """
    optimize, expit = _scipy("optimize"), _scipy("special").expit
    pi = log_pi.exp().numpy()
    target = prefs.numpy() @ pi

    # Rows of gradient and Hessian are divided by pi_t, which may underflow. The added pi g fixes the constant that g
    # leaves free.
    def residual(g: np.ndarray) -> np.ndarray:
        return expit(g[:, None] - g[None, :]) @ pi - target + pi @ g

    def jacobian(g: np.ndarray) -> np.ndarray:
        s = expit(g[:, None] - g[None, :])
        curvature = s * (1 - s) * pi
        return np.diag(curvature.sum(1)) - curvature + pi

    options = {"ftol": 1e-15, "xtol": 1e-15, "maxiter": 1000}
    found = optimize.root(residual, np.zeros(len(pi)), jac=jacobian, method="lm", options=options)
    if np.ptp(found.x) > 30:  # a sigmoid within 1e-13 of 1: g grows for ever
        raise ConfigError("dno_prct has no minimiser here: some responses always beat all others")
    if not np.abs(found.fun).max() < 1e-10:
        raise ArithmeticError(f"dno_prct: least squares stopped at a residual of {np.abs(found.fun).max():g}")
    return torch.log_softmax(log_pi + torch.from_numpy(found.x) / eta, 0)


def inpo(prefs: Tensor, log_pi: Tensor, *, log_ref: Tensor, eta: float, tau: float) -> Tensor:
    """pi_{t+1} ~ exp(prefs pi_t / eta) ref^k pi_t^(1-k), k = tau/eta: INPO (2407.00617), online mirror descent.

    Also DNO's regularised Option I. tau = 0 is mwu; eta = tau is `online_ipo`, which forgets pi_t.
    """
    k = kappa(eta, tau)
    return torch.log_softmax(prefs @ log_pi.exp() / eta + k * log_ref + (1 - k) * log_pi, 0)


def nash_md(prefs: Tensor, log_pi: Tensor, *, log_ref: Tensor, eta: float, tau: float) -> Tensor:
    """m ~ ref^k pi_t^(1-k), k = tau/eta; pi_{t+1} ~ m exp(prefs m / eta): Nash-MD, 2312.00886; DNO's Option II."""
    k = kappa(eta, tau)
    log_m = torch.log_softmax(k * log_ref + (1 - k) * log_pi, 0)
    return torch.log_softmax(log_m + prefs @ log_m.exp() / eta, 0)


def kappa(eta: float, tau: float) -> float:
    """The reference's share of a step, tau/eta."""
    if not 0 <= tau <= eta * (1 + 1e-12):
        raise ConfigError(f"tau must be in [0, eta = {eta:g}], not {tau:g}")
    return min(tau / eta, 1.0)


def online_ipo(prefs: Tensor, log_pi: Tensor, *, log_ref: Tensor, eta: float, tau: float) -> Tensor:
    """pi_{t+1} ~ ref exp(prefs pi_t / tau): best responses in the regularised game. `eta` plays no part."""
    return offline_ipo(prefs, log_pi, log_ref=log_ref, tau=tau)


def offline_ipo(prefs: Tensor, log_mu: Tensor, *, log_ref: Tensor, tau: float) -> Tensor:
    """ref exp(P(y beats mu) / tau): the minimiser of IPO (2310.12036) on pairs from a fixed policy mu."""
    return torch.log_softmax(log_ref + prefs @ log_mu.exp() / tau, 0)


def dpo(rewards: Tensor, *, log_ref: Tensor, beta: float) -> Tensor:
    """ref exp(r / beta): the minimiser of DPO (2305.18290) on Bradley-Terry labels of the rewards r."""
    return torch.log_softmax(log_ref + rewards / beta, 0)


# --- runs


def decaying(tau: float) -> Callable[[int], float]:
    """eta_t = tau (t + 2)/2, for which INPO's Theorem 4 and Nash-MD's Theorem 1 give KL = O(1/T)."""
    return lambda t: tau * (t + 2) / 2


@dataclass(frozen=True)
class Algorithm:
    """One row of the table: an exact update, and whose equilibrium it seeks."""

    name: str
    title: str
    update: Callable[..., Tensor]
    regularised: bool  # towards the equilibrium of the game with KL to a reference, or of the game itself
    decay: bool = False  # eta_t = tau (t + 2)/2 instead of a constant eta
    eta_scale: float = 1.0  # its own eta for the step that 1/eta is for the others


_TABLE = (
    Algorithm("mwu", "MWU = DNO = SPO = iterative IPO", mwu, False),
    Algorithm("sppo", "SPPO as published", sppo, False),
    Algorithm("dno_prct", "DNO-Prct", dno_prct, False, eta_scale=4.0),
    Algorithm("inpo", "INPO", inpo, True),
    Algorithm("inpo_decay", "INPO, decaying step", inpo, True, decay=True),
    Algorithm("nash_md", "Nash-MD", nash_md, True),
    Algorithm("nash_md_decay", "Nash-MD, decaying step", nash_md, True, decay=True),
    Algorithm("online_ipo", "online IPO", online_ipo, True),
)
ALGORITHMS: dict[str, Algorithm] = {a.name: a for a in _TABLE}
ALIASES = {"dno": "mwu", "spo": "mwu", "iterative_ipo": "mwu", "omd": "inpo"}


def algorithm(name: str) -> Algorithm:
    """The algorithm of a name or alias; ConfigError naming the nearest for an unknown one."""
    key = name.strip().lower().replace("-", "_")
    key = ALIASES.get(key, key)
    if key in ALGORITHMS:
        return ALGORITHMS[key]
    raise ConfigError(unknown("algorithm", name, key, [*ALGORITHMS, *ALIASES]))


def unknown(what: str, given: str, key: str, known: Sequence[str]) -> str:
    """One line for a name that is not there."""
    import difflib

    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"unknown {what} {given!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")


def run(
    prefs: Tensor,
    update: Callable[..., Tensor],
    steps: int,
    *,
    start: Tensor,  # [n] log-probabilities
    eta: float | Callable[[int], float],
    **fixed: Tensor | float,  # log_ref and tau of a regularised update
) -> Tensor:
    """Log-policies [steps + 1, n] of an update repeated from `start`; `eta` may depend on the step t = 0, 1, ..."""
    prefs = check_preferences(prefs)
    out = [torch.log_softmax(start.double(), 0)]
    for t in range(steps):
        now = eta(t) if callable(eta) else eta
        if not now > 0:
            raise ConfigError(f"eta must be positive, not {now}")
        out.append(update(prefs, out[-1], eta=now, **fixed))
    return torch.stack(out)


def averages(policies: Tensor) -> Tensor:
    """Log of the average policy after each step: row t is the mean of rows 0 to t. [T, n] -> [T, n]"""
    counts = torch.arange(1, len(policies) + 1, dtype=torch.float64)
    return torch.logcumsumexp(policies, 0) - counts.log()[:, None]

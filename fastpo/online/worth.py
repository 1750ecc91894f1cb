"""What responses are worth: rewards become advantages, comparisons become advantages or pairs. Every rank judges its
part of the prompts, and has all verdicts afterwards.

G = responses of a prompt, R = of all prompts, F = reward functions.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastpo.config.online import Rollouts
from fastpo.config.train_config import TrainConfig
from fastpo.data.example import OF_REFERENCE
from fastpo.data.kway import Forming
from fastpo.data.packing import sequence_tokens
from fastpo.errors import TrainingError
from fastpo.losses import advantages as worth
from fastpo.losses.online import POLICY, Online
from fastpo.online.asking import Wins
from fastpo.online.drawing import Drawn
from fastpo.online.judging import Preferences
from fastpo.online.prompts import Asked
from fastpo.online.rewards import Rewards
from fastpo.online.rollouts import Group, Judged
from fastpo.sampling.items import Response
from fastpo.training.distributed import World

UNSAMPLED = "not sampled"
NAN = float("nan")
Penalty = Callable[[Sequence[Group]], list[list[float]]]  # of each response of groups: KL to the reference


def groups_of(drawn: Sequence[Drawn], asked: Mapping[int, Asked]) -> tuple[list[Group], Counter[str]]:
    """What there is of each prompt's responses, and how many there are not."""
    groups, lost = [], Counter[str]()
    for d in drawn:
        there = [r for r in d.responses if r is not None]
        for failure in d.failures:
            lost[f"{UNSAMPLED}: {failure.status}"] += 1
        empty = len(d.responses) - len(there) - len(d.failures)
        if empty:
            lost[f"{UNSAMPLED}: no token"] += empty
        if there:
            groups.append(Group(d.row, asked[d.row], there))
    return groups, lost


def _of_ranks(
    world: World, groups: Sequence[Group], judge: Callable[[list[Any], list[Any]], Any]
) -> list[tuple[range, Any]]:
    """What `judge` says of each rank's share of the groups (rows, responses), with which groups those are."""
    shares = [range(rank, len(groups), world.size) for rank in range(world.size)]
    rows = [groups[n].asked.row for n in shares[world.rank]]
    given = [groups[n].responses for n in shares[world.rank]]
    return list(zip(shares, world.gather(world.all_do(lambda: judge(rows, given))), strict=True))


def _count(parts: Sequence[Any], left_out: Counter[str], nothing: bool) -> None:
    """Counts what the ranks' judges left out. TrainingError where they are broken and said nothing."""
    for part in parts:
        left_out.update(part.left_out)
    broken = next((part.broken for part in parts if part.broken), None)
    if nothing and broken:
        raise TrainingError(broken)


def _means(parts: Sequence[Any]) -> dict[str, float]:
    """Of what reward functions log, over the ranks."""
    logged: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.logged.items():
            logged.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in logged.items()}


class ByRewards:
    """Advantages of the responses by reward functions, for losses per token."""

    def __init__(
        self, config: TrainConfig, asks: Rollouts, way: Online, rewards: Rewards, world: World,
        state: Callable[[], Any],
    ):  # fmt: skip
        self.config, self.asks, self.way, self.rewards, self.world = config, asks, way, rewards, world
        self.state = state
        self.penalty: Penalty | None = None
        self.beta = 0.0

    def penalise(self, penalty: Penalty, beta: float) -> None:
        """From now on take this from the rewards, as rloo does; it is beta times a KL."""
        self.penalty, self.beta = penalty, beta

    def __call__(self, drawn: Sequence[Drawn], asked: Mapping[int, Asked]) -> Judged:
        """TrainingError where a reward function never judges anything."""
        groups, left_out = groups_of(drawn, asked)
        tokens = {g.row: sequence_tokens(g.example()) for g in groups}
        values, used, extra, logged = self._judged(groups, left_out)
        names, weights = list(self.rewards.names), list(map(float, self.rewards.weights))
        responses = [r for g in groups for r in g.responses]
        for name, column, weight in self._own(responses):
            names, weights = [*names, name], [*weights, weight]
            values = np.column_stack([values, np.where(used, column, NAN)])
        places = np.repeat(np.arange(len(groups)), [len(g.responses) for g in groups])
        config = self.config
        penalty = None
        if self.penalty is not None and groups:
            penalty = [v for of_group in self.penalty(groups) for v in of_group]
            if config.mask_truncated_completions:
                penalty = [v if r.finished else 0.0 for v, r in zip(penalty, responses, strict=True)]
        found = worth.advantages(
            values, places, weights=weights, aggregation=config.multi_objective_aggregation,
            scale=self.asks.scale_rewards, baseline=_BASELINES.get(self.way.loss, "mean"), penalty=penalty,
        )  # fmt: skip
        metrics = _reward_metrics(names, values, weights, used, found) | length_metrics(responses)
        if penalty:
            counted = [r for r in responses if r.finished or not config.mask_truncated_completions]
            metrics["kl"] = sum(penalty) / self.beta / max(1, sum(len(r.token_ids or ()) for r in counted))
        lines = []
        if config.log_completions:
            lines = _lines(groups, names, values, found.values.tolist(), used, extra)
        out, at = [], 0
        for group in groups:
            place = range(at, at + len(group.responses))
            at = place.stop
            keep = [bool(used[r]) for r in place]
            if any(keep):
                group.advantage = [float(found.values[r]) for r in place]
                group.masked = [config.mask_truncated_completions and not r.finished for r in group.responses]
                group.leave(keep)
                out.append(group)
        return Judged(out, metrics | logged, tokens, left_out, lines)

    def _judged(
        self, groups: Sequence[Group], left_out: Counter[str]
    ) -> tuple[Any, Any, dict[str, list[Any]], dict[str, float]]:
        """values [R, F], used [R], columns that functions log, and their metrics, of all ranks' parts together."""
        parts = _of_ranks(self.world, groups, partial(self.rewards, state=self.state(), stop=False))
        total = sum(len(g.responses) for g in groups)
        values, used = np.full((total, len(self.rewards.names)), NAN), np.zeros(total, bool)
        starts = np.cumsum([0, *(len(g.responses) for g in groups)])
        extra: dict[str, list[Any]] = {}
        for theirs, part in parts:
            at = 0
            for n in theirs:
                count = len(groups[n].responses)
                here, there = slice(starts[n], starts[n + 1]), slice(at, at + count)
                values[here], used[here] = part.values[there], part.used[there]
                for name, column in part.extra.items():
                    extra.setdefault(name, [None] * total)[here] = column[there]
                at += count
        judged = [part for _, part in parts]
        _count(judged, left_out, nothing=not used.any())
        return values, used, extra, _means(judged)

    def _own(self, responses: Sequence[Response]) -> list[tuple[str, Any, float]]:
        """Rewards of the options: (name, [R], weight)."""
        config, out = self.config, []
        if config.overlong_buffer:
            lengths = [len(r.token_ids or ()) for r in responses]
            column = worth.soft_overlong(lengths, config.max_completion_length, config.overlong_buffer)
            out.append(("overlong", column.numpy(), float(config.overlong_penalty)))
        if config.missing_eos_penalty:
            out.append(
                ("missing_eos", np.array([-float(not r.finished) for r in responses]), config.missing_eos_penalty)
            )
        return out

    def close(self) -> None:
        self.rewards.close()


class ByWins:
    """Advantages or pairs of the responses by who beats whom, for the preference losses."""

    def __init__(
        self, config: TrainConfig, asks: Rollouts, way: Online, preferences: Preferences, world: World,
        state: Callable[[], Any],
    ):  # fmt: skip
        self.config, self.asks, self.way, self.preferences = config, asks, way, preferences
        self.world, self.state = world, state

    def __call__(self, drawn: Sequence[Drawn], asked: Mapping[int, Asked]) -> Judged:
        groups, left_out = groups_of(drawn, asked)
        parts = _of_ranks(self.world, groups, partial(self.preferences, state=self.state(), stop=False))
        wins: dict[int, Any] = {}
        rewards: list[np.ndarray] = [np.zeros(0)] * len(groups)  # of each prompt's responses, where there are rewards
        for theirs, part in parts:
            wins |= dict(zip(theirs, part.wins, strict=True))
            if part.rewards is not None and len(theirs):
                ends = np.cumsum([len(groups[n].responses) for n in theirs])
                for n, of_group in zip(theirs, np.split(part.rewards, ends[:-1]), strict=True):
                    rewards[n] = of_group
        preferred = [part for _, part in parts]
        _count(preferred, left_out, nothing=bool(groups) and all(np.isnan(p).all() for p in wins.values()))
        tokens = {g.row: sequence_tokens(g.example()) for g in groups}
        # What a reference or a mixture with it says to be compared with is no measure of the policy.
        every = [r for g in groups for r in g.responses]
        ours = [r.source == POLICY for r in every]
        ours = ours if any(ours) else [True] * len(every)
        metrics = length_metrics([r for r, own in zip(every, ours, strict=True) if own])
        found = np.concatenate([np.zeros(0), *rewards])
        if len(found):
            found = found[np.array(ours) & ~np.isnan(found)]
        if len(found):
            metrics |= {"reward": _mean(found), "reward_std": _std(found)}
        lines = []
        if self.config.log_completions:
            lines = [line for n, g in enumerate(groups) for line in _compared_lines(g, wins[n], rewards[n])]
        make = self._pairs if self.way.pairs else self._advantages
        made = [group for n, group in enumerate(groups) if make(group, wins[n])]
        metrics |= _means([part.judged for part in preferred if part.judged is not None])
        if self.way.pairs:
            metrics["pairs_formed"] = float(sum(len(g.pairs) for g in made))
        return Judged(made, metrics, tokens, left_out, lines)

    def _advantages(self, group: Group, p: np.ndarray) -> bool:
        """Of policy samples alone: how often they win, against each other or, where there are others, against those."""
        ours = [k for k, r in enumerate(group.responses) if r.source == POLICY]
        others = [k for k, r in enumerate(group.responses) if r.source != POLICY]
        rates = np.full(len(ours), NAN)
        for place, k in enumerate(ours):
            against = [p[k, j] for j in (others or ours) if j != k and not np.isnan(p[k, j])]
            rates[place] = np.mean(against) if against else NAN
        keep = np.flatnonzero(~np.isnan(rates))
        if not len(keep):
            return False
        baseline = 0.5 if others else float(rates[keep].mean())
        group.responses = [group.responses[ours[n]] for n in keep]
        group.advantage = [float(rates[n] - baseline) for n in keep]
        group.masked = [self.config.mask_truncated_completions and not r.finished for r in group.responses]
        return True

    def _pairs(self, group: Group, p: np.ndarray) -> bool:
        count = len(group.responses)
        pairs: list[tuple[int, int]] = []
        columns: dict[str, list[float]] = {}
        if self.way.pairs == "soft":
            weights: list[float] = []
            for i in range(count):
                for j in range(i + 1, count):
                    if not np.isnan(p[i, j]):
                        pairs += [(i, j), (j, i)]
                        weights += [2 * float(p[i, j]), 2 * float(1 - p[i, j])]
            columns["weight"] = weights
        elif self.way.pairs == "against":
            ours = [k for k, r in enumerate(group.responses) if r.source == POLICY]
            theirs = [k for k, r in enumerate(group.responses) if r.source != POLICY]
            for i, j in zip(ours, theirs, strict=False):
                if not np.isnan(p[i, j]) and p[i, j] != 0.5:
                    pairs.append((i, j) if p[i, j] > 0.5 else (j, i))
            columns[OF_REFERENCE] = [float(i in theirs) for i, _ in pairs]
        else:
            off = ~np.eye(count, dtype=bool)
            rates = [float(np.nanmean(p[k][off[k]])) if not np.isnan(p[k][off[k]]).all() else NAN for k in range(count)]
            judged = [k for k, rate in enumerate(rates) if rate == rate]
            if len(judged) > 1:
                forming = Forming(self.config.pair_policy, self.config.pair_margin)
                pairs = [(judged[i], judged[j]) for i, j in forming.pairs([rates[k] for k in judged])]
        used = sorted({k for pair in pairs for k in pair})
        at = {k: n for n, k in enumerate(used)}
        group.responses = [group.responses[k] for k in used]
        group.pairs, group.pair_columns = [(at[i], at[j]) for i, j in pairs], columns if pairs else {}
        return bool(pairs)

    def close(self) -> None:
        self.preferences.close()


_BASELINES = {"rloo": "leave_one_out", "reinforce": "batch"}


# ---- for the log, under TRL's names


def length_metrics(responses: Sequence[Response]) -> dict[str, float]:
    """Tokens of the responses, and of those that ended by themselves."""
    lengths = np.array([len(r.token_ids or ()) for r in responses], float)
    if not len(lengths):
        return {}
    ended = lengths[np.array([r.finished for r in responses])]
    clipped = 1 - len(ended) / len(lengths)
    out = {"completions/mean_length": lengths.mean(), "completions/min_length": lengths.min(),
           "completions/max_length": lengths.max(), "completions/clipped_ratio": clipped}  # fmt: skip
    ended = ended if len(ended) else np.zeros(1)
    out |= {"completions/mean_terminated_length": ended.mean(), "completions/min_terminated_length": ended.min(),
            "completions/max_terminated_length": ended.max()}  # fmt: skip
    return {name: float(value) for name, value in out.items()}


def _reward_metrics(
    names: Sequence[str], values: Any, weights: Sequence[float], used: Any, found: Any
) -> dict[str, float]:
    out: dict[str, float] = {}
    for f, name in enumerate(names):
        column = values[:, f][~np.isnan(values[:, f])]
        out[f"rewards/{name}/mean"], out[f"rewards/{name}/std"] = _mean(column), _std(column)
    reward = np.nansum(values[used] * np.asarray(weights), axis=1)  # without a penalty
    out["reward"], out["reward_std"] = _mean(reward), _std(reward)
    out["frac_reward_zero_std"] = _mean(found.zero_std.numpy()[used].astype(float))
    return out


def _mean(values: Any) -> float:
    return float(values.mean()) if len(values) else NAN


def _std(values: Any) -> float:
    """As TRL: with Bessel's correction, of one value 0."""
    return float(values.std(ddof=1)) if len(values) > 1 else (0.0 if len(values) else NAN)


def _lines(
    groups: Sequence[Group], names: Sequence[str], values: Any, advantages: Sequence[float], used: Any,
    extra: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    out = []
    every = ((g, r) for g in groups for r in g.responses)
    for n, (group, response) in enumerate(every):
        rewards = {name: None if np.isnan(values[n, f]) else float(values[n, f]) for f, name in enumerate(names)}
        out.append({"prompt": group.asked.prompt, "completion": response.text, **rewards,
                    **{name: _plain(column[n]) for name, column in extra.items()},
                    "advantage": advantages[n] if used[n] else None})  # fmt: skip
    return out


def _compared_lines(group: Group, p: np.ndarray, rewards: np.ndarray) -> list[dict[str, Any]]:
    """Of a prompt's responses [G]: who gave each, its reward where there are any, and how often it wins (p [G, G])."""
    rates = Wins(p).rates()
    worths = [None if np.isnan(r) else float(r) for r in rewards] if len(rewards) else None
    return [
        {"prompt": group.asked.prompt, "completion": response.text, "source": response.source,
         **({} if worths is None else {"reward": worths[k]}), "win_rate": rates[k]}
        for k, response in enumerate(group.responses)
    ]  # fmt: skip


def _plain(value: Any) -> Any:
    """What JSON can hold of what a reward function logs; of the rest its text."""
    if hasattr(value, "tolist"):  # an array, a tensor, a number of NumPy
        value = value.tolist()
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError):
        return str(value)

"""What a figure says, in sentences: the lines of the terminal, which stand on the page too, and how it was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpo.evals.options import NOT_READ, EvalConfig, Source
from fastpo.loop import config as configs
from fastpo.report.charts import number

BY_PLACE = configs.Score().position_bias  # the loop refuses a judge above it, and a figure of it says nothing
CUT_OFF = 0.05  # share of a sampled model's answers: above it the limit is spoken of


def lines(result: Mapping[str, Any]) -> list[str]:
    """One of each model: its figure, against whom, of how many prompts, and whether that is a difference."""
    return [f"{name}: {sentence(result, name)}" for name in result["figures"]]


def sentence(result: Mapping[str, Any], name: str) -> str:
    """The figure of a model, the paired difference first where there is one."""
    found = result["figures"][name]
    apart, parts = found.get("difference"), []
    if apart and apart["value"] is not None:
        paired = f"{signed(apart['value'])}{_around(apart)}, paired on {_prompts(apart['prompts'])}"
        parts.append(f"difference to {apart['to']} {paired}{_verdict(apart['interval'], 0, apart['to'], result)}")
    parts.append(_figure(result, found, alone=not parts))
    if found.get("best"):
        parts.append("the best")
    if found.get("note"):
        parts.append(str(found["note"]))
    return "; ".join(parts)


def _figure(result: Mapping[str, Any], found: Mapping[str, Any], alone: bool) -> str:
    label, _, unit = result["figure"].partition(", ")
    if found["value"] is None:
        parts = found.get("subsets") or {}  # of pairs of one's own RewardBench has no score
        some = [f"{name} {number(value)}" for name, value in list(parts.items())[:6]]
        return f"{label}: no figure" + (f", for others are missing; right in {', '.join(some)}" if some else "")
    percent = "%" if unit == "%" else ""
    text = f"{label} {number(found['value'])}{percent}{_around(found)}"
    if unit and not percent:
        text += f", on a scale of {unit}"
    if "win_rate" in found:  # AlpacaEval's: which regression it is decides what it may be compared with
        text += f", form {found['form']}, raw win rate {number(found['win_rate'])}%"
    if not alone:
        return text
    even, others = result.get("even"), against(result, found)
    text += f" against {', '.join(others)}" if even is not None and others else ""
    count = found.get("prompts", found.get("total", result["counts"].get("prompts")))
    text += f", {_prompts(count)}" if count else ""
    return text + ("" if even is None else _verdict(found.get("interval"), even, ", ".join(others), result))


def against(result: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Whom a figure compares with: also of annotations, which name them themselves."""
    if result.get("baselines"):
        return list(result["baselines"])
    return [found["baseline"]] if found.get("baseline") else list(found.get("baselines") or ())


def _verdict(interval: Sequence[float] | None, even: float, other: str, result: Mapping[str, Any]) -> str:
    if not interval or by_place(result):  # a judge that goes by the place says neither
        return ""
    if interval[0] <= even <= interval[1]:
        return f"; not distinguishable from {even:g}"
    return f"; {'better' if interval[0] > even else 'worse'} than {other}" if other else ""


def signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def _around(found: Mapping[str, Any]) -> str:
    given = found.get("interval")
    return f" (95%: {number(given[0])} to {number(given[1])})" if given else ""


def _prompts(count: int) -> str:
    return f"{count:,} prompt{'' if count == 1 else 's'}"


# ---- what a reader must know beside the figures


def remarks(result: Mapping[str, Any]) -> list[str]:
    """A judge that goes by the place, models that cannot be told apart, answers that were cut off."""
    found = [by_place(result)] if by_place(result) else []
    for name, one in result["figures"].items():
        near = one.get("no_clear_difference")
        if near:
            found.append(
                f"no clear difference between {name} and {near['to']}: {signed(near['value'])}{_around(near)}, paired "
                f"on {_prompts(near['prompts'])}"
            )
    for name, one in {**result["figures"], **result.get("baselines", {})}.items():
        sample = result.get("how", {}).get("models", {}).get(name, {}).get("sample")
        counts = one.get("answers")
        if sample and counts and counts["cut off"] and counts["cut off"] > CUT_OFF * counts["answers"]:
            found.append(
                f"{name}: {counts['cut off']:,} of {counts['answers']:,} answers were cut off: raise "
                f"sample.max_tokens, now {sample['max_tokens']}"
            )
    return found


def by_place(result: Mapping[str, Any]) -> str:
    """The line on a judge that names the same place in both orders of nearly all pairs; empty for any other."""
    orders = (result["counts"].get("verdicts") or {}).get("orders") or {}
    if not orders.get("pairs") or orders["by_position"] <= BY_PLACE:
        return ""
    pairs = orders["pairs"]
    first, places = round(orders["first"] * pairs), round(orders["by_position"] * pairs)
    if first in (0, places):
        said = f"names the answer that is shown {'first' if first else 'second'} in {places:,} of {pairs:,} pairs"
    else:
        both = f"{first:,} times the first, {places - first:,} the second"
        said = f"goes by the place in {places:,} of {pairs:,} pairs ({both})"
    return f"the judge {said}: the figure says nothing of the models"


# ---- how it was measured


def how(config: EvalConfig, sources: Sequence[Source], judged: int, every: int) -> dict[str, Any]:
    """Judge, models and prompts as they were given, for people: paths, kinds and options, without secrets."""
    return {"judge": _judge(config), "models": {one.name: _source(one) for one in sources},
            "prompts": {"from": given_as(config.prompts), "number": judged, "drawn from": every}}  # fmt: skip


def _judge(config: EvalConfig) -> dict[str, Any]:
    if config.verdicts is not None:
        return {"kind": "verdicts", "from": given_as(config.verdicts)}
    if isinstance(config.judge, Mapping):
        return dict(configs.as_json(dict(config.judge)))
    if callable(config.judge):
        named = [str(getattr(config.judge, name, "")) for name in ("__module__", "__qualname__")]
        return {"kind": "function", "function": ".".join(filter(None, named)) or type(config.judge).__name__}
    return {"kind": type(config.judge).__name__, "name": str(getattr(config.judge, "name", ""))}


def _source(one: Source) -> dict[str, Any]:
    if one.policy is not None:
        return {"policy": one.policy, "sample": sampling(one)}
    return {"answers": given_as(one.answers)} | ({} if one.of is None else {"model": one.of})


def sampling(one: Source) -> dict[str, Any]:
    """The options that a policy is sampled with: without those of the loop, which an evaluation does not read."""
    return {name: value for name, value in configs.as_json(one.sample).items() if name not in NOT_READ}


def given_as(given: Any) -> Any:
    return str(given) if isinstance(given, str | Path) else f"{type(given).__name__} in memory"

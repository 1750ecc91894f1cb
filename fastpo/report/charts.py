"""The curves of fastpo's pages: from log lines to SVG figures.

Written here rather than by matplotlib: they take the page's colours, light and dark, keep their text legible on a
phone, weigh a few kilobytes each, and let a few lines of script show the values under the pointer. Without script the
legends show the last values.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any, NamedTuple

Point = tuple[float, float | None]  # step and value; None where the value is not finite: a gap in the curve

BUCKETS = 240  # of a long curve each keeps its lowest and highest point: twice the pixels of a chart, spikes included
OTHER_CHARTS = 12  # of metrics that fastpo does not know, from callbacks
LOG_RATIO = 1000.0  # positive values that span more than this are drawn on a logarithmic axis

# Title, metrics and a word on them. What a chart does not have it does not show.
LEARNING = (
    ("Loss", ("loss",), ""),
    ("Reward", ("reward",), "mean of the responses that were drawn"),
    ("Spread of the rewards", ("reward_std", "frac_reward_zero_std"), "deviation; prompts whose responses are alike"),
    ("Length of responses", ("completions/mean_length",), "tokens"),
    ("Entropy", ("entropy",), "nats a token"),
    ("KL to the reference", ("kl",), ""),
    ("Accuracy", ("rewards/accuracies", "accuracy"), "chosen reward above rejected"),
    ("Reward margin", ("rewards/margins", "margin"), "chosen minus rejected"),
    ("Rewards", ("rewards/chosen", "rewards/rejected"), ""),
    ("Rewards of responses", ("max_reward", "mean_reward", "min_reward"), ""),
    ("Log-probabilities", ("logps/chosen", "logps/rejected"), "nats an answer"),
    ("Gradient norm", ("grad_norm",), "before clipping"),
    ("Learning rate", ("learning_rate",), ""),
)
MACHINE = (
    ("Tokens per second", ("tokens_per_second",), "real tokens, no padding"),
    ("Pairs per second", ("pairs_per_second",), ""),
    ("Peak memory", ("peak_memory_gb",), "GiB"),
    ("Model FLOPs utilisation", ("mfu",), ""),
    ("Packing efficiency", ("packing_efficiency",), "tokens over the room for them"),
    ("Shared prompts", ("shared_prompt_savings",), "share of the tokens spared"),
    ("Skipped steps", ("skipped_steps",), "non-finite, in all"),
)
NO_CURVE = {"step", "epoch", "num_tokens", "total_flos", "runtime", "samples_per_second", "steps_per_second"}
KNOWN = [key for _, keys, _ in (*LEARNING, *MACHINE) for key in keys] + sorted(NO_CURVE)
# Names so plain that other metrics end in them: they are these only where the log is a reward model's.
OF_REWARDS = {"accuracy", "margin", "max_reward", "mean_reward", "min_reward"}


class Curves(NamedTuple):
    """metric -> set ("train", "eval", ...) -> points."""

    of: dict[str, dict[str, list[Point]]]
    sets: list[str]  # train first

    def last(self, metric: str, name: str = "train") -> float | None:
        """The last finite value."""
        points = self.of.get(metric, {}).get(name, [])
        return next((y for _, y in reversed(points) if y is not None), None)


def read_curves(log_history: Sequence[Mapping[str, Any]]) -> Curves:
    """The curves in a log: train lines, `eval_...` lines of any number of sets, not the run's summary.

    A run too short for a train line has the summary's figures as its only points.
    """
    of: dict[str, dict[str, list[Point]]] = {}
    sets = ["train"]
    has_train = any("loss" in line for line in log_history)
    of_rewards = any("mean_reward" in line or "eval_mean_reward" in line for line in log_history)
    known = [key for key in KNOWN if of_rewards or key not in OF_REWARDS]
    for index, line in enumerate(log_history):
        if "train_runtime" in line and has_train:
            continue
        step = line.get("step", index)
        for key, value in line.items():
            if not is_number(value) and value is not None:
                continue
            name, metric = _split(key, known)
            if metric in NO_CURVE or (metric.startswith("train_") and metric != "train_loss"):
                continue
            metric = "loss" if metric == "train_loss" else metric
            if name not in sets:
                sets.append(name)
            finite = value is not None and math.isfinite(value)
            of.setdefault(metric, {}).setdefault(name, []).append((float(step), float(value) if finite else None))
    of = {metric: series for metric, series in of.items() if any(y is not None for p in series.values() for _, y in p)}
    return Curves(of, sets)


def _split(key: str, known: Sequence[str] = KNOWN) -> tuple[str, str]:
    """`eval_easy_rewards/margins` -> ("easy", "rewards/margins"); other keys are the training's."""
    if not key.startswith("eval_"):
        return "train", key
    rest = key.removeprefix("eval_")
    for metric in known:
        if rest == metric:
            return "eval", metric
        if rest.endswith(f"_{metric}"):
            return rest.removesuffix(f"_{metric}"), metric
    return "eval", rest


def thin(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """At most about `3 * buckets` points: of each bucket the lowest, the highest, and a gap if it has one."""
    if len(points) <= 2 * buckets:
        return list(points)
    keep = {0, len(points) - 1}
    for b in range(buckets):
        part = range(b * len(points) // buckets, (b + 1) * len(points) // buckets)
        finite = [i for i in part if points[i][1] is not None]
        if finite:
            keep |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        if len(finite) < len(part):
            keep.add(next(i for i in part if points[i][1] is None))
    return [points[i] for i in sorted(keep)]


class Axis(NamedTuple):
    """Values to pixels."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, log: bool = False) -> "Axis":
        """An axis over all values, with some room where they are all the same."""
        values = list(values)
        low, high = min(values), max(values)
        if log:
            return cls(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), start, end, True)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = 0.1 * max(abs(low), abs(high)) or 1.0
            low, high = low - room, high + room
        return cls(low, high, start, end)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values on the axis."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**k for k in range(first, last + 1, max(1, math.ceil((last - first) / count)))]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 210, 50, 20, 10, 26
COLOURS, DASHES = 6, 3  # of the page's style sheet


class Series(NamedTuple):
    name: str
    colour: int  # from 1 on
    dash: int  # 0: a full line
    dots: bool
    points: list[Point]
    errors: Mapping[float, float] = MappingProxyType({})  # step -> half the height of its bar


def _series(metrics: Sequence[str], curves: Curves) -> list[Series]:
    """One metric: a colour a set. Several: a colour a metric, and dashes of their own for each set of evaluation."""
    out = []
    for m, metric in enumerate(metrics):
        for s, name in enumerate(curves.sets):
            points = curves.of.get(metric, {}).get(name)
            if not points:
                continue
            short = metric.rpartition("/")[2]
            label = name if len(metrics) == 1 else short if name == "train" else f"{short}, {name}"
            colour = s if len(metrics) == 1 else m
            thinned = thin(points)
            dots = name != "train" and len(thinned) <= 60
            dash = 0 if len(metrics) == 1 or s == 0 else (s - 1) % DASHES + 1
            out.append(Series(label, colour % COLOURS + 1, dash, dots, thinned))
    return out


def chart(
    title: str,
    note: str,
    series: Sequence[Series],
    steps: Sequence[float],
    *,
    over: str = "step",
    names: Mapping[int, str] = MappingProxyType({}),
    level: float | None = None,
    heights: Sequence[float] = (),
) -> str:
    """A figure: title, legend with the last values, SVG, and the points for the script.

    steps: the ends of the horizontal axis, which counts what `over` says; `names` of some of its values. level: a line
    across, such as an even win rate. heights: values that the vertical axis holds too, so that several charts share it.
    """
    ys = [y for s in series for _, y in s.points if y is not None]
    ys += [y + sign * s.errors[x] for s in series for x, y in s.points if y is not None and x in s.errors
           for sign in (-1, 1)]  # fmt: skip
    ys += [*heights, *([] if level is None else [level])]
    log = min(ys) > 0 and max(ys) / min(ys) > LOG_RATIO
    x = Axis.over(steps, LEFT, WIDTH - RIGHT)
    y = Axis.over(ys, HEIGHT - BOTTOM, TOP, log=log)
    y = y if log else y._replace(low=y.low - 0.04 * (y.high - y.low), high=y.high + 0.04 * (y.high - y.low))
    note = ", ".join(filter(None, (note, "logarithmic" if log else "")))
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 3.5:.1f}" class="y">{_short(v)}</text>'
        for v in y.ticks()
    )
    whole = [v for v in x.ticks() if v == int(v) and v >= 0]
    grid += "".join(
        f'<text x="{x(v):.1f}" y="{HEIGHT - 8}" class="x">{escape(names.get(int(v), _short(v)))}</text>' for v in whole
    )
    grid += "" if level is None else f'<path class="even" d="M{LEFT} {y(level):.1f}H{WIDTH - RIGHT}"/>'
    lines = "".join(_line(s, x, y) for s in series)
    marks = "".join(f'<circle class="mark s{s.colour}" r="3.5" visibility="hidden"/>' for s in series)
    points = [[[int(a), _rounded(b)] for a, b in s.points if b is not None] for s in series]
    scale = [x.low, x.high, x.start, x.end, y.low, y.high, y.start, y.end, int(log)]
    label = f"{title} over {over}s. " + ". ".join(f"{s.name}: {_spoken(s, over, names)}" for s in series)
    data = {"scale": scale, "points": points, "over": over, "names": dict(names)}
    legend = "".join(
        '<span class="key"><svg class="swatch" viewBox="0 0 18 4">'
        f'<path class="line s{s.colour} d{s.dash}" d="M0 2H18"/>'
        f"</svg>{escape(s.name)} <b>{number(_last(s.points))}</b></span>"
        for s in series
    )
    heading = escape(title) + (f" <small>{escape(note)}</small>" if note else "")
    return (
        f'<figure class="chart"><figcaption><h3><span class="at"></span>{heading}</h3><p class="legend">{legend}</p>'
        f'</figcaption><svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{grid}<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/>{lines}{marks}</svg>'
        f'<script type="application/json">{_json(data)}</script></figure>'
    )


def _line(series: Series, x: Axis, y: Axis) -> str:
    """The curve, broken at gaps; a point without neighbours, and every point of a sparse evaluation, is a dot."""
    runs: list[list[Point]] = [[]]
    for point in series.points:
        if point[1] is None:
            runs.append([])
        else:
            runs[-1].append(point)
    place = [[f"{x(a):.1f} {y(b):.1f}" for a, b in run] for run in runs]
    bars = "".join(
        f"M{x(a):.1f} {y(b - e):.1f}V{y(b + e):.1f}M{x(a) - 3:.1f} {y(b - e):.1f}h6M{x(a) - 3:.1f} {y(b + e):.1f}h6"
        for a, b in series.points
        if b is not None and (e := series.errors.get(a, 0.0)) > 0
    )
    path = "".join("M" + "L".join(run) for run in place if len(run) > 1)
    out = f'<path class="line s{series.colour} d{series.dash}" d="{path}"/>' if path else ""
    out += f'<path class="error s{series.colour}" d="{bars}"/>' if bars else ""
    for run in place:
        if len(run) == 1 or series.dots:
            for cx, cy in (p.split() for p in run):
                out += f'<circle class="dot s{series.colour}" cx="{cx}" cy="{cy}" r="2.6"/>'
    return out


def draw(wanted: Iterable[tuple[str, Sequence[str], str]], curves: Curves) -> str:
    """Those charts that have points, as one grid over the same steps; empty where none has."""
    steps = [x for of in curves.of.values() for points in of.values() for x, _ in points]
    ends = (min(steps), max(steps)) if steps else (0, 1)
    drawn = [(title, note, _series(metrics, curves)) for title, metrics, note in wanted]
    figures = "".join(chart(title, note, series, ends) for title, note, series in drawn if series)
    return f'<div class="charts">{figures}</div>' if figures else ""


def others(curves: Curves) -> list[tuple[str, tuple[str], str]]:
    """A chart for each metric that is in no table above."""
    return [(metric, (metric,), "") for metric in curves.of if metric not in KNOWN][:OTHER_CHARTS]


def is_number(value: Any) -> bool:
    """An int or float, finite or not; no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """A number that is neither NaN nor infinite."""
    return is_number(value) and math.isfinite(value)


def _last(points: Sequence[Point]) -> float | None:
    return next((y for _, y in reversed(points) if y is not None), None)


def _spoken(series: Series, over: str, names: Mapping[int, str]) -> str:
    """The first and the last value, for those who cannot see the curve."""
    finite = [(x, y) for x, y in series.points if y is not None]
    if not finite:
        return "no finite value"

    def at(x: float, y: float) -> str:
        error = f" ± {number(series.errors[x])}" if series.errors.get(x) else ""
        return f"{number(y)}{error} at {names.get(int(x), f'{over} {x:g}')}"

    return ", ".join(at(*point) for point in (finite[0], finite[-1])[: len(finite)])


def number(value: Any) -> str:
    """Four digits, as a person writes them."""
    if not is_finite(value):
        return "–" if value is None else str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else _exponent(f"{value:.4g}")


def _short(value: float) -> str:
    """A tick's label."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return _exponent(f"{value:.4g}")


def _exponent(text: str) -> str:
    return text.replace("e-0", "e-").replace("e+", "e")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _json(value: Any) -> str:
    """For a script element: nothing in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")

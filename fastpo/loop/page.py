"""report.html of a run of the loop: iterations side by side, and answers and judgements to read.

Made of the files of the run's folder alone (run_files.py, examples.py), after every iteration and when a run ends
early, in the look of a training run's page (fastpo/report/page.py).
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastpo.loop.guards import AT_FIRST
from fastpo.loop.page_examples import STYLE, cut, examples_section, held_out_section
from fastpo.loop.run_files import IterationFiles, RunFiles, in_order, mapping, number, read_run
from fastpo.report.charts import Point, Series, chart, read_curves
from fastpo.report.charts import number as shown_number
from fastpo.report.pieces import document, duration, grid, save, section, table

WARNING, OPTIONS = 1000, 20_000  # characters
BARS = 5  # kinds of a stacked bar that have a colour of their own
BOOKKEEPING = ("prompts", "select")  # stages that neither sample nor judge nor train
_SECRET = ("api_key", "headers", "authorization", "token", "password", "secret")


def write_page(folder: Path) -> None:
    """Write `report.html` of a run's folder into it.

    folder: as `fastpo iterate` makes it; what of its files is not there, or cannot be read, is left out of the page.
    OSError where the page cannot be written.
    """
    folder = Path(folder)
    save(folder / "report.html", page_of(read_run(folder)))


def page_of(run: RunFiles) -> str:
    """The page's HTML."""
    sections = [
        _head(run),
        _warnings(run),
        section("Policies", _charts(run)),
        section("Iterations", _comparison(run)),
        section("Prompts and pairs", _kept(run)),
        section("Time", _time(run)),
        section("Training", _losses(run)),
        held_out_section(run),
        examples_section(run),
        _options(run),
        f"<footer>Written by fastpo, {time.strftime('%Y-%m-%d %H:%M %Z')}</footer>",
    ]
    return document(_title(run), "\n".join(part for part in sections if part), _STYLE + STYLE)


def _title(run: RunFiles) -> str:
    recipe = run.options.get("recipe")
    return f"{run.folder.resolve().name}: {recipe}" if isinstance(recipe, str) else run.folder.resolve().name


# ----------------------------------------------------------------- the head


def _head(run: RunFiles) -> str:
    options, train = run.options, mapping(run.options.get("train"))
    loss = train.get("loss_type")
    facts = {
        "Recipe": options.get("recipe"),
        "Model": options.get("model"),
        "Prompts": options.get("prompts"),
        "Scorers": ", ".join(_scorer(name, spec) for name, spec in mapping(options.get("scorers")).items()),
        "Loss": ", ".join(map(str, loss)) if isinstance(loss, list) else loss,
        "Folder": str(run.folder),
    }
    shown = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v)
    finished = [one for one in run.trained if _finished(run, one)]
    state = f"{len(finished)} of {run.planned} iteration{'s' * (run.planned != 1)}"
    begun = next((one for one in run.iterations if one.begun()), None)
    whole = len(finished) == run.planned > 0
    if begun is not None and not whole:
        state += f"; {_name(begun)}: {begun.begun()} was begun"
    count = sum(len(one.warnings) for one in run.iterations)
    noted = f'<a class="chip stopped" href="#warnings">{count} warning{"s" * (count > 1)}</a>' if count else ""
    tiles = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in _tiles(run) if value
    )
    return (
        f"<header><h1>{escape(_title(run))}</h1>"
        f'<p><span class="chip {"finished" if whole else "stopped"}">{escape(state)}</span>{noted}</p>'
        f'<dl class="facts">{shown}</dl><div class="tiles">{tiles}</div></header>'
    )


def _scorer(name: str, spec: Any) -> str:
    kind = mapping(spec).get("kind")
    return f"{name} ({kind})" if isinstance(kind, str) else str(name)


def _finished(run: RunFiles, one: IterationFiles) -> bool:
    return one.done("train") and (one.done("eval") or not mapping(run.options.get("eval")).get("prompts"))


def _name(one: IterationFiles) -> str:
    return f"iteration {one.number}" if one.number else "the start's evaluation"


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    tiles = []
    for key, label in (("score", "held-out score"), ("win rate", "win rate")):
        known = [(one, value) for one in run.iterations if (value := number(one.eval, key)) is not None]
        if known:
            last, value = known[-1]
            first = f", {known[0][0].made} {shown_number(known[0][1])}" if len(known) > 1 else ""
            against = last.eval.get("against")
            over = f" against {against}" if key == "win rate" and isinstance(against, str) else ""
            tiles.append((f"{label}{over}, {last.made}{first}", shown_number(value)))
    sums = {
        "responses sampled": [number(one.counts("sample"), "responses") for one in run.trained],
        "judgements": [number(one.counts("score"), "units") for one in run.trained],
        "of these failed": [number(one.counts("score"), "failed") for one in run.trained],
        "pairs": [number(one.rows, "pairs") for one in run.trained],
    }
    for label, values in sums.items():
        total = sum(value for value in values if value is not None)
        if total:
            tiles.append((label, f"{total:,.0f}"))
    before = [] if run.prepared is None else [run.prepared]
    seconds = sum(sum(one.seconds().values()) for one in [*before, *run.iterations])
    if seconds:
        tiles.append(("time", duration(seconds)))
    return tiles


def _warnings(run: RunFiles) -> str:
    said = [(one.made if one.number == 0 else f"iteration {one.number}", text) for one in run.iterations
            for text in one.warnings]  # fmt: skip
    said += [("could not be read", text) for text in run.unreadable]
    if not said:
        return ""
    items = "".join(
        f"<li><strong>{escape(where)}</strong><p>{escape(cut(text, WARNING))}</p></li>" for where, text in said
    )
    return f'<section id="warnings"><h2>Warnings</h2><ul class="warnings">{items}</ul></section>'


# ----------------------------------------------------------------- numbers


def _charts(run: RunFiles) -> str:
    """Over the policies: what an iteration samples is the policy's that the one before has made."""
    ends = (0.0, float(max(1, run.planned)))
    names = {0: "start"}
    against = next((one.eval["against"] for one in reversed(run.iterations) if "against" in one.eval), "the start")

    def held(key: str) -> list[Point]:
        found = ((float(one.number), number(one.eval, key)) for one in run.iterations)
        return [(x, y) for x, y in found if y is not None]

    def sampled(key: str, of: Callable[[IterationFiles], Mapping[str, Any]]) -> list[Point]:
        found = ((one.number - 1.0, number(of(one), key)) for one in run.trained)
        return [(x, y) for x, y in found if y is not None]

    def errors(key: str) -> dict[float, float]:
        found = {float(one.number): number(one.eval, f"{key} error") for one in run.iterations}
        return {x: e for x, e in found.items() if e is not None}

    def figure(
        title: str, note: str, series: Sequence[Series], level: float | None = None, heights: Sequence[float] = ()
    ) -> str:
        there = [one for one in series if one.points]
        if not there:
            return ""
        return chart(title, note, there, ends, over="iterate", names=names, level=level, heights=heights)

    def both(key: str) -> list[Series]:
        return [Series("held-out", 1, 0, True, held(key)),
                Series("sampled for training", 2, 0, True, sampled(key, lambda one: one.counts("sample")))]  # fmt: skip

    length = "mean tokens" if any(number(one.counts("sample"), "mean tokens") for one in run.trained) else ""
    length = length or "mean characters"
    agreement = [(x, 1 - y) for x, y in sampled("mean difference of the orders", lambda one: one.rows) if y is not None]
    kept = [(one.number - 1.0, share) for one in run.trained if (share := _share_kept(one)) is not None]
    figures = [
        figure("Held-out score", "mean and its standard error",
               [Series("score", 1, 0, True, held("score"), errors("score"))]),
        figure("Win rate", f"on held-out prompts, against {against}; an even one is dotted",
               [Series("win rate", 1, 0, True, held("win rate"), errors("win rate"))], 0.5),
        figure("Length", length.removeprefix("mean ") + " a response, mean", both(length)),
        figure("Cut off", "share of responses that max_tokens ended", both("truncated"), heights=(0,)),
        figure("Distinct 3-grams", "share of different runs of three words", both("distinct 3-grams")),
        figure("Agreement of the two orders", "1 less the mean difference of a pair's two answers",
               [Series("agreement", 2, 0, True, agreement)], heights=(0, 1)),
        figure("Prompts that gave a row", "share", [Series("kept", 2, 0, True, kept)], heights=(0, 1)),
    ]  # fmt: skip
    drawn = "".join(figures)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _share_kept(one: IterationFiles) -> float | None:
    prompts, kept = number(one.rows, "prompts"), number(one.rows, "prompts kept")
    return kept / prompts if prompts and kept is not None else None


def _comparison(run: RunFiles) -> str:
    """A column an iteration; groups of rows by stage. What no iteration has is left out."""
    if not run.iterations:
        return "<p>None has begun.</p>"
    columns = run.iterations

    def counted(stage: str, key: str) -> Callable[[IterationFiles], str]:
        return lambda one: _plain(number(one.counts(stage), key))

    def of_rows(key: str) -> Callable[[IterationFiles], str]:
        return lambda one: _plain(number(one.rows, key))

    def share(stage: str, key: str) -> Callable[[IterationFiles], str]:
        return lambda one: _percent(number(one.counts(stage), key))

    def role(key: str) -> Callable[[IterationFiles], str]:
        return lambda one: run.name_of(path) if (path := one.options("train").get(key)) is not None else ""

    def of_training(label: str) -> Callable[[IterationFiles], str]:
        return lambda one: _first_and_last(one.counts("train"), label)

    def measured(key: str) -> Callable[[IterationFiles], str]:
        return lambda one: _with_error(one.eval, key)

    groups: list[tuple[str, list[tuple[str, Callable[[IterationFiles], str]]]]] = [
        ("Policies", [
            ("sampled and trained from", run.sampled_from),
            ("reference of the loss", role("ref_model")),
            ("previous policy of the loss", role("prev_model")),
        ]),
        ("Samples", [
            ("prompts", counted("prompts", "prompts")), ("responses", counted("sample", "responses")),
            ("failed", counted("sample", "failed")), ("tokens, mean", counted("sample", "mean tokens")),
            ("characters, mean", counted("sample", "mean characters")), ("cut off", share("sample", "truncated")),
            ("distinct 3-grams", share("sample", "distinct 3-grams")),
        ]),
        ("Judgements", [
            ("asked", counted("score", "units")), ("failed", counted("score", "failed")),
            ("asked in both orders", of_rows("asked in both orders")),
            ("mean difference of the orders", of_rows("mean difference of the orders")),
        ]),
        ("Rows", [
            ("prompts that gave one", _kept_of), ("pairs", of_rows("pairs")),
            ("rows", of_rows("rows")), ("replayed from earlier iterations", of_rows("replayed")),
            ("from a file", of_rows("from a file")),
            ("characters, chosen less rejected", of_rows("length gap, characters")),
        ]),
        ("Training", [
            ("loss, mean over the run", _train_loss),
            *((label, of_training(label)) for label in _of_training(columns)),
        ]),
        ("Held-out prompts", [
            ("score", measured("score")),
            ("win rate", measured("win rate")), ("tokens, mean", lambda one: _plain(number(one.eval, "mean tokens"))),
            ("cut off", lambda one: _percent(number(one.eval, "truncated"))),
            ("judgements failed", lambda one: _plain(number(one.eval, "failed"))),
        ]),
        ("Time", [("in all", _spent)]),
    ]  # fmt: skip
    body = ""
    for title, rows in groups:
        cells = [(label, [of(one) for one in columns]) for label, of in rows]
        there = [(label, values) for label, values in cells if any(values)]
        if there:
            body += f'<tr class="group"><th scope="rowgroup" colspan="{len(columns) + 1}">{escape(title)}</th></tr>'
        for label, values in there:
            shown = "".join(f"<td>{escape(value) or '–'}</td>" for value in values)
            body += f'<tr><th scope="row">{escape(label)}</th>{shown}</tr>'
    names = "".join(f'<th scope="col">{one.number if one.number else "start"}</th>' for one in columns)
    head = f'<thead><tr><th scope="col">iteration</th>{names}</tr></thead>'
    paths = table(run.policies().items())
    folded = f"<details><summary>Where the policies are</summary>{paths}</details>" if paths else ""
    return f'<div class="wide"><table class="counts compared">{head}<tbody>{body}</tbody></table></div>{folded}'


def _kept_of(one: IterationFiles) -> str:
    share, kept = _share_kept(one), number(one.rows, "prompts kept")
    return "" if share is None else f"{_plain(kept)} ({_percent(share)})"


def _train_loss(one: IterationFiles) -> str:
    found = number(one.counts("train"), "train_loss")
    return "" if found is None else shown_number(found)


def _of_training(iterations: Sequence[IterationFiles]) -> list[str]:
    """Figures of responses that were drawn in training: those that are known of its beginning and its end."""
    names = dict.fromkeys(name for one in iterations for name in one.counts("train"))
    return [name.removesuffix(AT_FIRST) for name in names if name.endswith(AT_FIRST)]


def _first_and_last(counts: Mapping[str, Any], label: str) -> str:
    first, last = number(counts, f"{label}{AT_FIRST}"), number(counts, label)
    return "" if first is None or last is None else f"{shown_number(first)} \N{RIGHTWARDS ARROW} {shown_number(last)}"


def _spent(one: IterationFiles) -> str:
    return duration(total) if (total := sum(one.seconds().values())) else ""


def _plain(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else shown_number(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _with_error(values: Mapping[str, Any], key: str) -> str:
    value, error = number(values, key), number(values, f"{key} error")
    if value is None:
        return ""
    return shown_number(value) + (f" ± {error:.2g}" if error else "")


# ----------------------------------------------------------------- stacked bars


def _bars(rows: Sequence[tuple[str, Mapping[str, float], str]], unit: Callable[[float], str]) -> str:
    """A bar a row, of the same scale: (label, parts by name, what is written behind it)."""
    every = dict.fromkeys(name for _, parts, _ in rows for name in parts)
    names = [name for name in every if any(parts.get(name, 0) > 0 for _, parts, _ in rows)]
    if not names:
        return ""
    colour = {name: k % 6 + 1 for k, name in enumerate(names)}
    most = max(sum(parts.values()) for _, parts, _ in rows)
    legend = "".join(f'<span class="key"><i class="block s{colour[name]}"></i>{escape(name)}</span>' for name in names)
    body = ""
    for label, parts, note in rows:
        spoken = ", ".join(f"{name} {unit(value)}" for name, value in parts.items() if value > 0)
        bar = "".join(
            f'<i class="s{colour[name]}" style="width:{100 * value / most:.2f}%" '
            f'title="{escape(f"{name}: {unit(value)}")}"></i>'
            for name, value in parts.items()
            if value > 0
        )
        body += (
            f'<div class="row"><span class="label">{escape(label)}</span>'
            f'<div class="bar" role="img" aria-label="{escape(f"{label}: {spoken}")}">{bar}</div>'
            f'<span class="note">{escape(note)}</span></div>'
        )
    return f'<div class="bars"><p class="legend">{legend}</p>{body}</div>'


def _kept(run: RunFiles) -> str:
    """What became of the prompts, and which responses were not judged."""
    there = [one for one in run.trained if one.rows]
    if not there:
        return ""
    # A tree search counts steps and rounds of its own, not prompts.
    dropped = {one.number: {} if "search" in one.stages else _counts(one.rows, "dropped") for one in there}
    searched = {one.number: _counts(one.rows, "dropped") if "search" in one.stages else {} for one in there}
    responses = {one.number: _counts(one.rows, "responses left out") for one in there}
    reasons = _by_size(dropped)
    first = reasons if len(reasons) <= BARS else reasons[: BARS - 1]
    rows = []
    for one in there:
        kept = number(one.rows, "prompts kept") or 0.0
        parts = {"gave a row": kept} | {reason: dropped[one.number].get(reason, 0.0) for reason in first}
        parts["other reasons"] = sum(dropped[one.number].get(r, 0.0) for r in reasons if r not in first)
        if "search" in one.stages:
            parts["no pair of steps"] = max(0.0, (number(one.rows, "prompts") or 0.0) - kept)
        pairs = number(one.rows, "pairs")
        rows.append((f"iteration {one.number}", parts, "" if pairs is None else f"{pairs:,.0f} pairs"))
    out = "<h3>Prompts</h3>" + _bars(rows, lambda v: f"{v:,.0f}")
    tables = (("prompts without a row", dropped), ("responses not judged", responses), ("of the search", searched))
    for title, counts in tables:
        cells = [[r, *(_plain(counts[one.number].get(r, 0.0)) for one in there)] for r in _by_size(counts)]
        head = [f"{title}, in iteration", *(f"{one.number}" for one in there)]
        out += grid(head, cells, counts=True) if cells else ""
    return out


def _counts(values: Mapping[str, Any], name: str) -> dict[str, float]:
    """Those of a mapping in rows.json that are not 0."""
    found = mapping(values.get(name))
    return {str(key): value for key in found if (value := number(found, key))}


def _by_size(counts: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The reasons of all iterations, the most frequent one first."""
    totals: dict[str, float] = {}
    for of in counts.values():
        for reason, count in of.items():
            totals[reason] = totals.get(reason, 0.0) + count
    return sorted(totals, key=lambda reason: -totals[reason])


def _time(run: RunFiles) -> str:
    there = [(f"iteration {one.number}" if one.number else "start", one) for one in run.iterations if one.seconds()]
    if run.prepared is not None and run.prepared.seconds():
        there.insert(0, ("before", run.prepared))
    if not there:
        return ""
    rows, cells = [], []
    known = {name for _, one in there for name in one.seconds() if name not in BOOKKEEPING}
    stages = sorted(known, key=in_order)
    for label, one in there:
        seconds = one.seconds()
        rest = sum(seconds.get(name, 0.0) for name in BOOKKEEPING)
        whole = sum(seconds.values())
        parts = {name: seconds.get(name, 0.0) for name in stages} | {"bookkeeping": rest}
        share = f"{rest / whole:.1%}" if whole and one.number else ""
        rows.append((label, parts, duration(whole)))
        cells.append([label, *(duration(seconds[name]) if name in seconds else "–" for name in stages),
                      duration(rest) if one.number else "–", duration(whole), share or "–"])  # fmt: skip
    head = ["", *stages, "bookkeeping", "in all", "share of bookkeeping"]
    note = (
        '<p class="said">Bookkeeping is all that neither samples nor judges nor trains: drawing the prompts, forming '
        "the rows. The evaluation samples and judges.</p>"
    )
    return _bars(rows, duration) + grid(head, cells, counts=True) + note


def _losses(run: RunFiles) -> str:
    return _curves(run, "reward", "Reward") + _curves(run, "loss", "Loss")


def _curves(run: RunFiles, metric: str, title: str) -> str:
    """A chart an iteration, all of the same scales."""
    found = [(one, points) for one in run.trained
             if (points := read_curves(one.metrics).of.get(metric, {}).get("train"))]  # fmt: skip
    heights = [y for _, points in found for _, y in points if y is not None]
    if not heights:
        return ""
    steps = [x for _, points in found for x, _ in points]
    ends, extent = (min(steps), max(steps)), (min(heights), max(heights))
    figures = []
    for one, points in found:
        curve = [Series(metric, 1, 0, False, points)]
        if any(y is not None for _, y in points):
            figures.append(chart(f"{title}, iteration {one.number}", "", curve, ends, heights=extent))
    return f'<div class="charts small">{"".join(figures)}</div>'


# ----------------------------------------------------------------- the end


def _options(run: RunFiles) -> str:
    if not run.options:
        return ""
    text = cut(json.dumps(_without_secrets(run.options), indent=1, ensure_ascii=False, default=str), OPTIONS)
    versions = next((v for one in reversed(run.iterations) for stage in one.stages.values()
                     if (v := mapping(stage.get("versions")))), {})  # fmt: skip
    return section(
        "Options",
        f"<details><summary>All, as iterate.json has them</summary><pre>{escape(text)}</pre></details>"
        + (f"<details><summary>Versions</summary>{table(versions.items())}</details>" if versions else ""),
    )


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: "…" if str(k).lower() in _SECRET and v else _without_secrets(v) for k, v in value.items()}
    return [_without_secrets(v) for v in value] if isinstance(value, list) else value


_STYLE = """
h3 + .bars { margin-top: 8px; } .bars { max-width: 980px; margin-bottom: 12px; }
.bars .legend { min-height: 0; margin-bottom: 8px; } .bars .key { display: inline-block; }
.block { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px;
  background: var(--c); }
.row { display: grid; grid-template-columns: 92px 1fr 92px; gap: 12px; align-items: center; padding: 3px 0; }
.row .label { color: var(--soft); font-size: 13.5px; }
.row .note { font-size: 13.5px; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 16px; background: var(--card); border-radius: 3px; overflow: hidden; }
.bar i { background: var(--c); min-width: 1px; box-shadow: inset -1px 0 var(--bg); }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr)); }
.compared { min-width: 420px; } .compared thead th { font-weight: 600; }
.compared .group th { font-weight: 600; color: var(--text); padding-top: 14px; }
.wide + .wide { margin-top: 14px; }
p.said { color: var(--soft); max-width: 80ch; margin: 8px 0 12px; }
@media (max-width: 600px) { .row { grid-template-columns: 76px 1fr 76px; gap: 8px; }
  .row .label, .row .note { font-size: 12.5px; } }
"""

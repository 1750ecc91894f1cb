"""The run report: one HTML file with curves, settings, counts and warnings, readable from a disk without a network.

A few lines of script show the values under the pointer; without it the curves' legends show the last values, and the
table at the end of the page all of them.
"""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.losses.table import OPTIONS, resolve_terms
from fastpo.report.charts import LEARNING, MACHINE, Curves, draw, is_finite, number, others, read_curves

TABLE_ROWS = 200  # of the table of values
OTHER_CHARTS = 12  # metrics that fastpo does not know, from callbacks


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    config: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    warnings: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> Path:
    """Write the report beside `path` and rename it into place.

    log_history: transformers' log lines, with `step`. data: set name -> DataReport, as it is or as a dict.
    warnings: dicts of name, step and message. summary: `model`, `outcome` and whatever the run ended with.
    """
    page = _page(
        title=title, config=config, log_history=log_history, data=data, warnings=warnings, environment=environment,
        summary=summary,
    )  # fmt: skip
    path = Path(path)
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(page, encoding="utf-8", errors="replace")
    os.replace(beside, path)
    return path


def _page(
    *,
    title: str,
    config: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    warnings: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> str:
    curves = read_curves(log_history)
    sections = [
        _head(title, config, summary, curves, len(warnings)),
        _warnings(warnings),
        _section("Learning", draw(LEARNING, curves)),
        _section("Other metrics", draw(others(curves), curves)),
        _evaluation(curves),
        _section("Speed and memory", draw(MACHINE, curves)),
        _data(data),
        _settings(config),
        _section("Environment", _table(_flat(environment))),
        _section("Summary", _table((k, v) for k, v in summary.items() if k not in ("model", "outcome"))),
        _values(log_history),
        f"<footer>Written by fastpo, {time.strftime('%Y-%m-%d %H:%M %Z')}</footer>",
    ]
    body = "\n".join(part for part in sections if part)
    before, between, after = re.split("@TITLE@|@BODY@", _TEMPLATE)
    return before + escape(title) + between + body + after


# ----------------------------------------------------------------- sections


def _head(title: str, config: Mapping, summary: Mapping, curves: Curves, warnings: int) -> str:
    outcome = str(summary.get("outcome", "finished"))
    kind = next((k for k in ("finished", "failed") if outcome.startswith(k)), "stopped")
    lines = {"Loss": _loss_text(config), "Model": summary.get("model", ""), "Output": config.get("output_dir", "")}
    facts = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in lines.items() if v)
    noted = f'<a class="chip stopped" href="#warnings">{warnings} warning{"s" * (warnings > 1)}</a>' if warnings else ""
    steps, of = summary.get("steps"), summary.get("max_steps")
    steps = (
        max((x for s in curves.of.values() for p in s.values() for x, _ in p), default=None) if steps is None else steps
    )
    evals = [(f"{name} loss", curves.last("loss", name)) for name in curves.sets[1:]][:2]
    tiles: list[tuple[str, Any]] = [
        ("final loss", curves.last("loss")),
        *evals,
        ("accuracy", _first(curves.last("rewards/accuracies"), curves.last("accuracy"))),
        ("margin", _first(curves.last("rewards/margins"), curves.last("margin"))),
        ("steps", None if steps is None else f"{steps:,.0f}" + (f" of {of:,.0f}" if of and of != steps else "")),
        ("time", _duration(summary["train_runtime"]) if is_finite(summary.get("train_runtime")) else None),
        ("tokens/s", summary.get("tokens_per_second", curves.last("tokens_per_second"))),
        ("peak GiB", summary.get("peak_memory_gb", curves.last("peak_memory_gb"))),
    ]
    shown = "".join(
        f"<div><b>{escape(v if isinstance(v, str) else number(v))}</b><span>{escape(k)}</span></div>"
        for k, v in tiles
        if v is not None
    )
    return (
        f'<header><h1>{escape(title)}</h1><p><span class="chip {kind}">{escape(outcome)}</span>{noted}</p>'
        f'<dl class="facts">{facts}</dl><div class="tiles">{shown}</div></header>'
    )


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _loss_text(config: Mapping[str, Any]) -> str:
    """`dpo (beta 0.1) + 0.5 sft`, with the defaults that the configuration leaves to the loss."""
    names = config.get("loss_type", "dpo")
    names = [names] if isinstance(names, str) else list(names)
    weights = config.get("loss_weights")
    given = {k: config[k] for k in (*OPTIONS, "loss_kwargs") if k in config}
    try:
        terms = resolve_terms(names, weights, **given)
    except ConfigError:  # the report of a run that failed for it
        return " + ".join(map(str, names))
    parts = []
    for term in terms:
        hyper = ", ".join(f"{k} {_text(v)}" for k, v in term.hyper.items() if not (k == "label_smoothing" and not v))
        weight = "" if term.weight == 1 else f"{term.weight:g} "
        parts.append(f"{weight}{term.name}" + (f" ({hyper})" if hyper else ""))
    return " + ".join(parts)


def _warnings(warnings: Sequence[Mapping[str, Any]]) -> str:
    if not warnings:
        return ""
    items = "".join(
        f"<li><strong>{escape(str(w.get('name', 'warning')).replace('_', ' '))}</strong>"
        f"<span>{'step ' + escape(str(w['step'])) if w.get('step') else 'at the start'}</span>"
        f"<p>{escape(str(w.get('message', '')))}</p></li>"
        for w in warnings
    )
    return f'<section id="warnings"><h2>Warnings</h2><ul class="warnings">{items}</ul></section>'


def _evaluation(curves: Curves) -> str:
    """The last evaluation of each set, with the first beside it."""
    metrics = [m for m in curves.of if any(s in curves.of[m] for s in curves.sets[1:])]
    if not metrics:
        return ""
    rows = []
    for metric in metrics:
        cells = [metric]
        for name in curves.sets[1:]:
            values = [y for _, y in curves.of[metric].get(name, []) if y is not None]
            change = f" (first {number(values[0])})" if len(values) > 1 else ""
            cells.append(f"{number(values[-1])}{change}" if values else "")
        rows.append(cells)
    return _section("Evaluation", _grid(["last", *curves.sets[1:]], rows, counts=True))


COUNTS = {
    "rows": "rows",
    "kept": "kept",
    "responses": "responses",
    "truncated": "responses truncated",
    "truncated_eos": "of these, lost their end of sequence",
    "truncated_prompts": "prompts truncated",
    "prompt_tokens": "tokens of prompts",
    "response_tokens": "tokens of responses",
    "longest_sequence": "longest sequence, tokens",
    "max_length": "max_length",
    "boundary_moved": "rows whose response begins inside the prompt",
    "doubled_specials": "rows with a doubled BOS or EOS removed",
    "own_endings": "responses with an ending of their own",
    "repeated_prompts": "rows whose responses repeat the prompt",
    "repeated_turns": "rows whose responses repeated the prompt's turns",
    "continued": "rows whose responses continue the prompt's last turn",
    "masked_rows": "rows with turns of others in their responses",
    "masked_tokens": "tokens of these, not trained on",
}


def _data(data: Mapping[str, Any]) -> str:
    """Counts, a column a set; what is zero everywhere is left out."""
    if not data:
        return ""
    sets = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else dict(v) for k, v in data.items()}  # type: ignore[arg-type]
    rows: list[list[str]] = []
    always = ("rows", "kept", "truncated")
    for key, label in COUNTS.items():
        values = [s.get(key) for s in sets.values()]
        if any(values) or (key in always and any(v is not None for v in values)):
            rows.append([label, *(_count(key, s) for s in sets.values())])
        if key == "kept":
            for reason in dict.fromkeys(r for s in sets.values() for r in s.get("dropped") or {}):
                cells = [f"{(s.get('dropped') or {}).get(reason, 0):,}" for s in sets.values()]
                rows.append([f"dropped: {reason}", *cells])
    said = [
        f"<li><strong>{escape(k)}</strong><p>{escape(str(w))}</p></li>"
        for k, s in sets.items()
        for w in s.get("warnings") or []
    ]
    notes = f'<ul class="warnings">{"".join(said)}</ul>' if said else ""
    return _section("Data", _grid(["", *sets], rows, counts=True) + notes)


def _count(key: str, report: Mapping[str, Any]) -> str:
    """A count; with its share or mean where that says more."""
    value = report.get(key)
    if value is None:
        return "–"
    out = f"{value:,}"
    whole = {"truncated": "responses", "truncated_eos": "responses", "truncated_prompts": "kept", "kept": "rows"}.get(
        key
    )
    if whole and report.get(whole) and value != report[whole]:
        return f"{out} ({value / report[whole]:.1%})"
    mean = {"prompt_tokens": "kept", "response_tokens": "responses"}.get(key)
    return f"{out} (mean {value / report[mean]:.0f})" if mean and report.get(mean) else out


def _settings(config: Mapping[str, Any]) -> str:
    """Those that differ from the defaults, then the rest by group."""
    known = {f.name: f for f in dataclasses.fields(TrainConfig)}
    defaults = dataclasses.asdict(TrainConfig())
    changed: list[list[str]] = []
    groups: dict[str, list[list[str]]] = {}
    for name, value in config.items():
        if name not in known or value != defaults[name]:
            changed.append([name, _text(value), _text(defaults[name]) if name in known else ""])
        else:
            groups.setdefault(known[name].metadata["group"], []).append([name, _text(value)])
    first = _grid(["changed", "value", "default"], changed) if changed else "<p>All at their defaults.</p>"
    rest = "".join(f"<h3>{escape(group)}</h3>{_grid(None, rows)}" for group, rows in groups.items())
    count = len(config) - len(changed)
    return _section("Settings", f"{first}<details><summary>{count} at their defaults</summary>{rest}</details>")


def _values(log_history: Sequence[Mapping[str, Any]]) -> str:
    """Every logged value as a table, thinned: what the curves show, for those who cannot see or hover them."""
    if not log_history:
        return ""
    every = math.ceil(len(log_history) / TABLE_ROWS)
    lines = [line for i, line in enumerate(log_history) if i % every == 0 or i == len(log_history) - 1]
    keys = ["step", *dict.fromkeys(k for line in lines for k in line if k != "step")]
    rows = [[_text(line[k]) if k in line else "" for k in keys] for line in lines]
    said = f"{len(log_history):,} log lines" + (f", every {every}th" if every > 1 else "")
    table = _grid(keys, rows, counts=True)
    return _section("Values", f'<details class="values"><summary>{said}</summary>{table}</details>')


# -------------------------------------------------------------------- pieces


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>" if body else ""


def _table(items: Iterable[tuple[str, Any]]) -> str:
    rows = [[key, _text(value)] for key, value in items]
    return _grid(None, rows) if rows else ""


def _grid(head: Sequence[str] | None, rows: Iterable[Sequence[str]], *, counts: bool = False) -> str:
    """A table whose first column names the rows; all cells are escaped here. counts: cells that never wrap."""
    top = "<thead><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    attribute = ' class="counts"' if counts else ""
    return f'<div class="wide"><table{attribute}>{top}<tbody>{body}</tbody></table></div>'


def _flat(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Nested mappings as one list of rows; packages that are not installed are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((k, v) for k, v in value.items() if v is not None)
        else:
            yield key, value


def _text(value: Any) -> str:
    """A setting or a value of a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return ", ".join(value) or "none"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    if not minutes:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:.0f} s"


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { --bg: #fff; --card: #f7f7f8; --text: #1b1c1e; --soft: #63666c; --rule: #dddfe3;
  --s1: #0063a6; --s2: #d1550a; --s3: #00805c; --s4: #a8508a; --s5: #8a6d00; --s6: #5b5fc7;
  --good: #12713f; --good-bg: #dff3e7; --warn: #7a4b00; --warn-bg: #fdf0d2; --bad: #a51d24; --bad-bg: #fbe3e3; }
@media (prefers-color-scheme: dark) { :root { --bg: #16171a; --card: #1f2125; --text: #e8e9eb; --soft: #a0a4ab;
  --rule: #363940; --s1: #63b3f2; --s2: #ff9552; --s3: #46c79c; --s4: #e39bcb; --s5: #dcb93c; --s6: #a5a8ff;
  --good: #8fdcb0; --good-bg: #173a28; --warn: #f5cf85; --warn-bg: #40310f; --bad: #ffaaaa; --bad-bg: #4a1c1f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 24px 20px 40px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0; }
small, footer, summary { color: var(--soft); }
.at { float: right; font-weight: 400; font-size: 12px; }
h3 small { font-weight: 400; font-size: 12px; }
header p { margin: 0 0 12px; }
.chip { display: inline-block; padding: 2px 10px; margin: 0 8px 4px 0; border-radius: 6px; font-weight: 600;
  font-size: 13px; text-decoration: none; overflow-wrap: anywhere; }
.finished { color: var(--good); background: var(--good-bg); }
.stopped { color: var(--warn); background: var(--warn-bg); }
.failed { color: var(--bad); background: var(--bad-bg); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0 0 18px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 8px; }
.tiles div { background: var(--card); border-radius: 6px; padding: 9px 12px; }
.tiles b { display: block; font-size: 18px; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 13px; }
.warnings { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
.warnings li { background: var(--warn-bg); border-radius: 6px; padding: 10px 14px; }
.warnings strong { color: var(--warn); margin-right: 10px; }
.warnings span { color: var(--soft); font-size: 13px; }
.warnings p { margin: 2px 0 0; max-width: 90ch; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 12px; }
.chart { margin: 0; background: var(--card); border-radius: 6px; padding: 10px 12px 4px; min-width: 0; }
.legend { margin: 2px 0 4px; font-size: 12.5px; min-height: 1.5em; color: var(--soft); }
.key { white-space: nowrap; margin-right: 12px; }
.key b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 18px; height: 4px; margin-right: 5px; vertical-align: middle; }
.s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); }
.plot { display: block; width: 100%; height: auto; touch-action: pan-y; }
.plot text { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
text.y { text-anchor: end; } text.x { text-anchor: middle; }
.grid { stroke: var(--rule); } .cursor { stroke: var(--soft); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
.d1 { stroke-dasharray: 5 3; } .d2 { stroke-dasharray: 2 2; } .d3 { stroke-dasharray: 8 3 2 3; }
.dot, .mark { fill: var(--c); } .mark { stroke: var(--card); }
.wide { overflow-x: auto; } .wide + .warnings { margin-top: 12px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tbody th { font-weight: 400; color: var(--soft); }
td { overflow-wrap: anywhere; min-width: 5em; } .counts td { white-space: nowrap; }
details { margin-top: 12px; } details h3 { margin: 16px 0 4px; } summary { cursor: pointer; }
footer { margin-top: 40px; font-size: 13px; }
@media (max-width: 600px) { main { padding: 16px 14px 32px; } h1 { font-size: 22px; }
  th, td { padding-right: 12px; } }
@media print { :root { --bg: #fff; --card: #fff; --text: #000; --soft: #444; --rule: #ccc; --s1: #0063a6; --s2: #d1550a;
  --s3: #00805c; --s4: #a8508a; --s5: #8a6d00; --s6: #5b5fc7; } body { font-size: 11pt; } main { padding: 0; }
  .charts { grid-template-columns: 1fr 1fr; } .chart, .warnings li, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .wide { overflow: visible; } }
</style>
</head>
<body>
<main>
@BODY@
</main>
<script>
for (const figure of document.querySelectorAll(".chart")) {
  const { scale, points } = JSON.parse(figure.querySelector("script").textContent);
  const [x0, x1, left, right, y0, y1, bottom, top, log] = scale, f = log ? Math.log10 : v => v;
  const px = x => left + (right - left) * (x - x0) / (x1 - x0);
  const py = y => bottom + (top - bottom) * (f(y) - f(y0)) / (f(y1) - f(y0));
  const svg = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor"), at = figure.querySelector(".at");
  const marks = figure.querySelectorAll(".mark"), shown = figure.querySelectorAll(".key b");
  const last = [...shown].map(b => b.textContent);
  const nearest = (list, x) => list.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a, list[0]);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), u = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = x0 + (u - left) / (right - left) * (x1 - x0), step = nearest(points.flat(), x)[0];
    points.forEach((list, i) => {
      const p = list.length ? nearest(list, step) : null;
      if (!p) return;
      shown[i].textContent = String(+p[1].toPrecision(4)) + (p[0] === step ? "" : " at " + p[0]);
      marks[i].setAttribute("cx", px(p[0])); marks[i].setAttribute("cy", py(p[1]));
      marks[i].setAttribute("visibility", "visible");
    });
    cursor.setAttribute("transform", `translate(${px(step)} 0)`); cursor.setAttribute("visibility", "visible");
    at.textContent = "step " + step;
  });
  svg.addEventListener("pointerleave", () => {
    [cursor, ...marks].forEach(e => e.setAttribute("visibility", "hidden"));
    shown.forEach((b, i) => b.textContent = last[i]); at.textContent = "";
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details:not(.values)").forEach(d => d.open = true));
</script>
</body>
</html>
"""

"""What fastpo's pages for people have in common: a file each, readable from a disk without a network, light and dark.

A few lines of script show the values under the pointer in charts (charts.py).
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


def document(title: str, body: str, style: str = "") -> str:
    """The whole page. title: a text; body and style: HTML and CSS as they are."""
    before, own, between, after = re.split("@TITLE@|@STYLE@|@BODY@", _TEMPLATE)
    return before + escape(title) + own + style + between + body + after


def save(path: str | os.PathLike[str], page: str) -> Path:
    """Write the page beside `path` and rename it into place."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(page, encoding="utf-8", errors="replace")
    os.replace(beside, path)
    return path


def section(heading: str, body: str) -> str:
    """Its heading is a text; nothing where the body is empty."""
    return f"<section><h2>{escape(heading)}</h2>{body}</section>" if body else ""


def table(items: Iterable[tuple[str, Any]]) -> str:
    """Two columns: names and values."""
    rows = [[key, text(value)] for key, value in items]
    return grid(None, rows) if rows else ""


def grid(head: Sequence[str] | None, rows: Iterable[Sequence[str]], *, counts: bool = False) -> str:
    """A table whose first column names the rows; all cells are escaped here. counts: cells that never wrap."""
    top = "<thead><tr>" + "".join(f'<th scope="col">{escape(h)}</th>' for h in head) + "</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    attribute = ' class="counts"' if counts else ""
    return f'<div class="wide"><table{attribute}>{top}<tbody>{body}</tbody></table></div>'


def flat(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Nested mappings as one list of rows; packages that are not installed are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((k, v) for k, v in value.items() if v is not None)
        else:
            yield key, value


def text(value: Any) -> str:
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


def duration(seconds: float) -> str:
    """Of seconds, as people say it."""
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
.grid { stroke: var(--rule); } .cursor, .even { stroke: var(--soft); } .even { stroke-dasharray: 1 4; }
.error { stroke: var(--c); fill: none; }
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
@STYLE@</style>
</head>
<body>
<main>
@BODY@
</main>
<script>
for (const figure of document.querySelectorAll(".chart")) {
  const { scale, points, over, names } = JSON.parse(figure.querySelector("script").textContent);
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
      shown[i].textContent = String(+p[1].toPrecision(4)) + (p[0] === step ? "" : " at " + (names[p[0]] ?? p[0]));
      marks[i].setAttribute("cx", px(p[0])); marks[i].setAttribute("cy", py(p[1]));
      marks[i].setAttribute("visibility", "visible");
    });
    cursor.setAttribute("transform", `translate(${px(step)} 0)`); cursor.setAttribute("visibility", "visible");
    at.textContent = names[step] ?? over + " " + step;
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

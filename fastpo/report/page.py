"""The run report: one HTML file with curves, settings, counts and warnings, readable from a disk without a network.

A few lines of script show the values under the pointer; without it the curves' legends show the last values, and the
table at the end of the page all of them.
"""

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.losses.table import OPTIONS, resolve_terms
from fastpo.report.charts import LEARNING, MACHINE, Curves, draw, is_finite, number, others, read_curves
from fastpo.report.pieces import document, duration, flat, grid, save, section, table, text

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
    return save(path, page)


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
        section("Learning", draw(LEARNING, curves)),
        section("Other metrics", draw(others(curves), curves)),
        _evaluation(curves),
        section("Speed and memory", draw(MACHINE, curves)),
        _data(data),
        _settings(config),
        section("Environment", table(flat(environment))),
        section("Summary", table((k, v) for k, v in summary.items() if k not in ("model", "outcome"))),
        _values(log_history),
        f"<footer>Written by fastpo, {time.strftime('%Y-%m-%d %H:%M %Z')}</footer>",
    ]
    body = "\n".join(part for part in sections if part)
    return document(title, body)


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
        ("time", duration(summary["train_runtime"]) if is_finite(summary.get("train_runtime")) else None),
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
        hyper = ", ".join(f"{k} {text(v)}" for k, v in term.hyper.items() if not (k == "label_smoothing" and not v))
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
    return section("Evaluation", grid(["last", *curves.sets[1:]], rows, counts=True))


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
    return section("Data", grid(["", *sets], rows, counts=True) + notes)


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
            changed.append([name, text(value), text(defaults[name]) if name in known else ""])
        else:
            groups.setdefault(known[name].metadata["group"], []).append([name, text(value)])
    first = grid(["changed", "value", "default"], changed) if changed else "<p>All at their defaults.</p>"
    rest = "".join(f"<h3>{escape(group)}</h3>{grid(None, rows)}" for group, rows in groups.items())
    count = len(config) - len(changed)
    return section("Settings", f"{first}<details><summary>{count} at their defaults</summary>{rest}</details>")


def _values(log_history: Sequence[Mapping[str, Any]]) -> str:
    """Every logged value as a table, thinned: what the curves show, for those who cannot see or hover them."""
    if not log_history:
        return ""
    every = math.ceil(len(log_history) / TABLE_ROWS)
    lines = [line for i, line in enumerate(log_history) if i % every == 0 or i == len(log_history) - 1]
    keys = ["step", *dict.fromkeys(k for line in lines for k in line if k != "step")]
    rows = [[text(line[k]) if k in line else "" for k in keys] for line in lines]
    said = f"{len(log_history):,} log lines" + (f", every {every}th" if every > 1 else "")
    return section(
        "Values", f'<details class="values"><summary>{said}</summary>{grid(keys, rows, counts=True)}</details>'
    )

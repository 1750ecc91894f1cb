"""The table of layouts in docs/data.md, made from the layouts themselves. `python -m fastpo.data.docs` writes the page
anew with it; the tests compare."""

import re
from pathlib import Path

from fastpo.data.layouts import LAYOUTS, Layout

BEGIN, END = "<!-- layouts: made by `python -m fastpo.data.docs` -->", "<!-- end of layouts -->"
_KINDS = {"preference": "pairs, or K responses", "unpaired": "labelled completions (kto, bco)", "sft": "sft"}


def table() -> str:
    """Every layout once, by kind: its name, the columns it is known by, and what becomes of them."""
    lines = []
    for kind, title in _KINDS.items():
        lines += [f"**{title}**", "", "| layout | known by the columns | read as |", "| --- | --- | --- |"]
        groups: dict[tuple[str, int], list[Layout]] = {}
        for layout in LAYOUTS:
            if layout.kind == kind:
                groups.setdefault((_name(layout), len(layout.shapes)), []).append(layout)
        lines += [f"| {name} | {_columns(group)} | {_becomes(group)} |" for (name, _), group in groups.items()]
        lines.append("")
    return "\n".join(lines)


def _name(layout: Layout) -> str:
    return "pairs with a prompt of another name" if "for a prompt" in layout.name else layout.name


def _by_place(group: list[Layout]) -> list[list[str]]:
    """The columns of layouts of one name, place by place."""
    return [list(dict.fromkeys(names)) for names in zip(*(layout.shapes for layout in group), strict=True)]


def _columns(group: list[Layout]) -> str:
    return ", ".join(" or ".join(f"`{name}`" for name in names) for names in _by_place(group))


def _becomes(group: list[Layout]) -> str:
    layout = group[0]
    if not layout.line:
        gives = layout.gives
        for names in _by_place(group):
            if len(names) > 1:
                gives = re.sub(rf"\b{names[0]}( ->|,|$)", r"that column\1", gives, count=1)
        return gives.replace("that column,", "prompt,")
    if "for a prompt" in layout.name:
        return "refused, with the lines to write: how the responses follow the prompt is not in the data"
    return f"refused, with the line to write: {layout.why.split(' (')[0].removesuffix('; if response1 is')}"


def page(text: str) -> str:
    """`text` with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    path.write_text(page(path.read_text()))

"""docs/troubleshooting.md quotes messages: each still stands in the source, so that the page cannot rot."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^> (.+)$", PAGE, re.MULTILINE)
GAP = "\0"  # what differs from run to run: `...` on the page, a value in the source


def _texts(tree: ast.AST) -> set[str]:
    """Every text of a module as it is printed, values left out: of f-strings, of `%` formats, of plain ones."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
            found.add("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub(r"%[.\d]*[sdgrf]|\{[^{}]*\}", GAP, node.value))
    return found


@pytest.fixture(scope="module")
def texts() -> set[str]:
    found = {(ROOT / "Makefile").read_text()}
    for path in sorted((ROOT / "fastpo").rglob("*.py")):
        found |= _texts(ast.parse(path.read_text(encoding="utf-8")))
    return found


def _pieces(message: str) -> list[str]:
    """The literal parts of a message, each as long as the page has it."""
    return [piece.strip(" :;,()") for piece in message.split("...")]


def _stands(piece: str, texts: set[str]) -> bool:
    """Whether a part is in one text of the source, or is made of a few that follow each other there."""
    if any(piece in text for text in texts):
        return True
    for cut in range(len(piece) - 8, 8, -1):  # the longest beginning first
        if any(piece[:cut] in text and text.endswith((piece[:cut], piece[:cut] + GAP)) for text in texts):
            return _stands(piece[cut:].strip(" :;,()"), texts)
    return False


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: re.sub(r"\W+", "-", m)[:50].strip("-"))
def test_message_stands_in_the_source(message, texts):
    pieces = [piece for piece in _pieces(message) if len(piece) >= 8]
    assert pieces, "nothing of this line is checked"
    for piece in pieces:
        assert _stands(piece, texts), f"no text of fastpo/ has: {piece}"


def test_a_wrong_message_is_found(texts):
    assert not _stands("the model has a head that nobody knows", texts)
    assert not _stands("its head has a rule (a scale, a soft cap, a bias, another module) that nobody knows", texts)


def test_page_is_about_as_many_messages_as_it_was():
    assert len(MESSAGES) >= 50 and not re.search(r"^> .+\n>", PAGE, re.MULTILINE), "one line a message"


def test_every_guardrail_is_listed():
    (source,) = [text for path in (ROOT / "fastpo").rglob("*.py") if "class Guardrails" in (text := path.read_text())]
    source = source[source.index("class Guardrails") :]
    names = {a or b or c for a, b, c in re.findall(r'"(\w+)": self\._|"(\w+)": _|found\["(\w+)"\]', source)}
    assert len(names) >= 8
    assert set(re.findall(r"^\| `\[(\w+)\]`", PAGE, re.MULTILINE)) == names | {"out_of_memory"}

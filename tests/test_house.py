"""The layout of the package, as docs/architecture.md draws it: what the contracts in pyproject.toml do not say."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FILES_AT_THE_TOP = 10
LINES, TRAINER_LINES = 600, 500


def module_name(path: Path) -> str:
    """kernels/ is installed as fastpo/kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastpo", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for folder in ("fastpo", "kernels") for path in (ROOT / folder).rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(tree: ast.Module) -> set[str]:
    """Every dotted name that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that each reach all others of the set (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            circle = set()
            while name not in circle:
                circle.add(stack.pop())
            if len(circle) > 1:
                found.append(circle)

    for name in graph:
        if name not in index:
            visit(name)
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e", "a"}}
    assert sorted(map(sorted, circles(graph))) == [["b", "c"], ["e", "f"]]


def test_no_circle_of_imports():
    # A room's __init__ hands on names of its modules, and they may import one another through it.
    modules = {name for name, path in FILES.items() if path.name != "__init__.py"}
    graph = {name: (imported(TREES[name]) & modules) - {name} for name in modules}
    assert not circles(graph)


def test_only_the_trainer_names_its_class():
    knowing = {
        name
        for name, tree in TREES.items()
        if {"fastpo.Trainer", "fastpo.trainer.Trainer"} & imported(tree)
        or any(isinstance(node, ast.Attribute) and node.attr == "Trainer" for node in ast.walk(tree))
    }
    assert knowing <= {"fastpo", "fastpo.trainer"}


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if path.name == "__init__.py" and "." in name])
def test_a_room_hands_on_names_and_nothing_else(name):
    docstring, *rest = TREES[name].body
    assert isinstance(docstring, ast.Expr) and ast.get_docstring(TREES[name])
    for node in rest:
        names_all = isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]
        assert isinstance(node, ast.ImportFrom) or names_all, ast.unparse(node)


def test_no_room_reads_what_another_keeps_to_itself():
    found = set()
    for name, tree in TREES.items():
        modules = {}  # local name -> module of another room
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    if not full.startswith("fastpo.") or room(full) == room(name) or full == "fastpo._C":
                        continue
                    if alias.name.startswith("_") and not alias.name.startswith("__"):
                        found.add((name, full))
                    if full in FILES:
                        modules[alias.asname or alias.name] = full
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                if node.attr.startswith("_") and not node.attr.startswith("__"):
                    found.add((name, f"{modules[node.value.id]}.{node.attr}"))
    assert not found


def test_kernels_import_nothing_of_fastpo():
    """import-linter does not see fastpo.kernels, which everything may import."""
    for name in FILES:
        if name.startswith("fastpo.kernels."):
            assert all(other.startswith("fastpo.kernels") for other in imported(TREES[name]) if "fastpo" in other), name


def test_few_files_at_the_top():
    assert len(list((ROOT / "fastpo").glob("*.py"))) <= FILES_AT_THE_TOP


def test_no_file_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    limits = {"fastpo.trainer": TRAINER_LINES}
    assert not {name: n for name, n in lengths.items() if n > limits.get(name, LINES)}


def test_the_drawing_is_of_this_house():
    """docs/architecture.md: the layers of the contract in their order, and no file that is not there."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [layer.split(" | ") for layer in contracts[0]["layers"]]
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)]
    assert layers[0] == ["__main__"] and drawn == layers[1:]
    named = [path for path in re.findall(r"`([\w/]+\.py)`", text) if "NAME" not in path]
    assert named and not [path for path in named if not any((ROOT / top / path).is_file() for top in ("", "fastpo"))]

"""What MkDocs does not do by itself: links that leave docs/, the table of options, names that break in narrow tables.

Links such as `../bench/results/aot.md` work on GitHub. On the site they become addresses below `repo_url`; one whose
target is not in the checkout, or whose anchor the target does not have, is a warning, which `--strict` makes an error.
"""

import ast
import logging
import re
from pathlib import Path, PurePosixPath

from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
CODE = r"^```.*?^```|`[^`\n]+`"
LINK = r"(?P<before>!?\[[^\]]*\]\(\s*)(?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?(?P<after>\s*\))"
TOKEN = re.compile(f"(?P<code>{CODE})|{LINK}", re.MULTILINE | re.DOTALL)  # what begins first is meant
OPTIONS = "<!-- options -->"

log = logging.getLogger("mkdocs.plugins.fastpo")


def on_page_markdown(markdown, page, config, files):
    where = page.file.src_uri
    text = markdown.replace(OPTIONS, options_table()) if OPTIONS in markdown else markdown
    return TOKEN.sub(lambda m: m[0] if m["code"] else _link(m, where, config["repo_url"]), text)


def on_page_context(context, page, config, nav):
    """Long names in tables may break behind an underscore, for phones. Here, for the search has been fed by now."""
    page.content = re.sub(r"<(t[dh])\b.*?</\1>", _breakable_cell, page.content, flags=re.DOTALL)


def _breakable_cell(match):
    return re.sub(r"<[^>]*>|(?<=[^\W_])_", lambda m: "_<wbr>" if m[0] == "_" else m[0], match[0])


def _link(match, where, repo_url):
    target, anchor = match["target"], match["anchor"] or ""
    if not target or ":" in target:
        return match[0]
    path = _normal(PurePosixPath("docs", where).parent / target)
    if path is None or (path.parts[:1] == ("docs",) and path.parts[:2] != ("docs", "theme")):
        return match[0]  # within the site, where MkDocs looks after it
    full = ROOT / path
    if not full.exists():
        log.warning("%s: the link %s leaves docs/ for %s, which is not in the checkout", where, target, path)
    elif anchor and full.suffix == ".md" and anchor[1:] not in anchors(full.read_text(encoding="utf-8")):
        log.warning("%s: the link %s%s: %s has no such heading", where, target, anchor, path)
    kind = "tree" if full.is_dir() else "blob"
    return f"{match['before']}{repo_url.rstrip('/')}/{kind}/main/{path}{anchor}{match['after']}"


def _normal(path):
    """The path without `..`, from the checkout's root; None where it leaves that."""
    parts = []
    for part in path.parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        else:
            parts.append(part)
    return PurePosixPath(*parts)


def anchors(text):
    """The anchors that GitHub gives the headings of a Markdown file."""
    slug, seen, found = slugify(case="lower"), {}, set()
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+\s+(.*)$", text, re.MULTILINE):
        name = slug(heading.replace("`", ""), "-")
        seen[name] = seen.get(name, -1) + 1
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
    return found


# ---- the options


def options_table():
    """Every option of TrainConfig by group, read from its source: name, default, meaning, choices."""
    groups = {}
    for name, default, group, text, choices in _fields(train_config_source()):
        shown = "" if default is None else f"`{default!r}`"
        one_of = "; one of " + ", ".join(f"`{choice}`" for choice in choices) if choices else ""
        cell = (text + one_of).replace("|", "\\|")
        groups.setdefault(group, []).append(f'| <code id="{name}">{name}</code> | {shown} | {cell} |')
    table = "| option | default | |\n| --- | --- | --- |\n"
    return "\n".join(f"## {group.capitalize()}\n\n{table}" + "\n".join(rows) + "\n" for group, rows in groups.items())


def train_config_source():
    """The file that defines TrainConfig, wherever it lies below fastpo/."""
    files = sorted((ROOT / "fastpo").rglob("*.py"))
    (path,) = [file for file in files if "\nclass TrainConfig" in file.read_text(encoding="utf-8")]
    return path


def _fields(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                names[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    (config,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainConfig"]
    for node in config.body:
        call = getattr(node, "value", None)
        if isinstance(node, ast.AnnAssign) and isinstance(call, ast.Call) and getattr(call.func, "id", "") == "_opt":
            values = [names[a.id] if isinstance(a, ast.Name) else ast.literal_eval(a) for a in call.args]
            default, group, text, choices = (*values, None)[:4]
            yield node.target.id, default, group, text, choices

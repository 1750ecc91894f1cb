"""docs/recipes/ and the options in docs/loop.md, made from the recipes' files and the comments in config.py.

`python -m fastpo.loop.docs` writes both anew; the tests compare.
"""

import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastpo.config.online import rollouts
from fastpo.config.train_config import TrainConfig
from fastpo.loop import config as configs
from fastpo.loop import online, recipes
from fastpo.loop.config import LoopConfig
from fastpo.loop.run_files import mapping
from fastpo.loop.selecting import POLICIES, WITHOUT_SCORES
from fastpo.losses import LOSSES, canonical_name

BEGIN, END = "<!-- options: made by `python -m fastpo.loop.docs` -->", "<!-- end of options -->"
SECTIONS = ("sample", "refine", "score", "select", "degrade", "eval", "guards")
GIVEN = {"model": "path/to/sft", "prompts": "prompts.jsonl", "output_dir": "run"}  # by every user
_WIDTH = 100
_OF_THE_LOOP = {
    "reference": "the policy that the loss compares with, by name or path",
    "previous": "the second policy that it compares with, by name or path",
    "reward_funcs": "scorers that judge what an online loss draws, by name",
}


class Option(NamedTuple):
    """A field of config.py."""

    name: str
    default: str  # as it is written in YAML; empty: it must be given
    text: str  # its comment


# ---- options


def options_of(cls: type) -> list[Option]:
    """The fields of a dataclass of config.py, with the comments that follow them in its source."""
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (node,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
    lines = {
        n.target.id: n.end_lineno for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    found = []
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        section = dataclasses.is_dataclass(default)
        shown = "" if default is dataclasses.MISSING or section else _flow(default)
        found.append(Option(field.name, shown, comments.get(lines[field.name] or 0, "")))
    return found


def options_table() -> str:
    """Every option by section, for docs/loop.md."""
    parts = [_table("The run", LoopConfig, "")]
    for section in SECTIONS:
        cls = type(getattr(configs.build(GIVEN), section))
        parts.append(_table(f"`{section}`", cls, f"{section}.") + (f"\n{rules_table()}" if section == "select" else ""))
    return "\n".join(parts)


def rules_table() -> str:
    """The rules of `select.policy`, for docs/loop.md."""
    rows = [f"| `{name}` | {_cell(_sentence(' '.join((inspect.getdoc(rule) or '').split())))} |"
            for name, rule in POLICIES.items()]  # fmt: skip
    return "| `select.policy` | |\n| --- | --- |\n" + "\n".join(rows) + "\n"


def _table(title: str, cls: type, before: str) -> str:
    about = " ".join((inspect.getdoc(cls) or "").split()) if before else ""
    rows = "\n".join(f"| `{before}{o.name}` | {_default(o)} | {_cell(o.text)} |" for o in options_of(cls))
    return (
        f"### {title}\n\n"
        + (f"{about}\n\n" if about else "")
        + f"| option | default | |\n| --- | --- | --- |\n{rows}\n"
    )


def _default(option: Option) -> str:
    if option.name in GIVEN:
        return "must be given"
    return f"`{option.default}`" if option.default else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _flow(value: Any) -> str:
    """A value in YAML, on one line."""
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{value:e}".partition("e")
        return (
            f"{float(digits):.12g}".removesuffix(".0")
            + ("" if "." in f"{float(digits):.12g}" else ".0")
            + (f"e{int(exponent)}")
        )
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").strip()


# ---- recipes


def recipe_page(name: str) -> str:
    """docs/recipes/NAME.md."""
    texts, options, example = recipes.text_of(name), recipes.options_of(name), recipes.example_of(name)
    parts = [f"# {name}", _sentence(texts["title"]), _sentence(texts["about"])]
    for label, key in (("Source", "source"), ("Chosen here", "choices"), ("It needs", "needs")):
        if texts[key]:
            parts.append(f"**{label}:** {_sentence(_linked(texts[key]), capital=False)}")
    parts += before(options)
    parts.append("## An iteration\n\n" + "\n".join(f"{n}. {line}" for n, line in enumerate(steps(options), 1)))
    parts.append("## Run it\n\n" + _run(name, example))
    parts.append(
        "## Its options\n\nWhat the recipe sets. Everything else is at [its default](../loop.md#options); what your "
        f"own file sets wins.\n\n```yaml\n{options_block(options)}```"
    )
    return "\n\n".join(parts) + "\n"


def _run(name: str, example: Mapping[str, Any]) -> str:
    given = {"recipe": name, **GIVEN, **example, "eval": {"prompts": "heldout.jsonl"}}
    text = yaml.safe_dump(given, sort_keys=False, default_flow_style=None, width=_WIDTH)
    command = "    fastpo iterate --config run.yaml"
    return f"```yaml\n# run.yaml\n{text}```\n\n{command} --dry-run\n{command}"


def before(options: Mapping[str, Any]) -> list[str]:
    """What there is to say before the iterations: the stages before them, and where there are none."""
    config = configs.build({**GIVEN, **options})
    out = []
    if config.prepare:
        stages = ", ".join(f"`{name}`" for name in config.prepare)
        out.append(f"Before the first iteration ([how](../loop-prepare.md)): {stages}.")
    if config.iterations == 0:
        out.append("By itself it has no iterations; with `iterations` of 1 or more they follow.")
    return out


def steps(options: Mapping[str, Any]) -> list[str]:
    """What an iteration of a recipe does, a line a stage."""
    config = configs.build({**GIVEN, **options})
    select, train = config.select, config.train
    out = ["A part of the prompts that no other iteration has."]
    if online.way_of(train):
        return [*out, *_online_steps(train)]
    if config.search:
        out.append("A tree of steps for each, grown by the current policy ([tree search](../loop-search.md)).")
        out.append("Pairs: of the children of a node on the way that the search took, the best against the worst.")
        return [*out, _training(train)]
    out.append(_sampling(config))
    if config.refine.rounds:
        out.append(f"{_count(config.refine.rounds, 'round')} of a better answer, given the one before.")
    if config.extra_responses:
        where = ", ".join(f"`{source}`, of `{file}`" for source, file in config.extra_responses.items())
        out.append(f"Responses from outside join them: {where}.")
    if select.policy in WITHOUT_SCORES and not config.score.by:
        out.append("Nothing is judged.")
    else:
        kind = mapping(config.scorers.get(config.score.by)).get("kind")
        pairs = {
            "all": "all pairs",
            "tournament": "the matches of a tournament",
            "against": "pairs with the policy's own",
        }
        orders = " in both orders" if config.score.both_orders else ""
        if kind is not None and kind != "judge":
            out.append(f"`{config.score.by}` scores each response.")
        else:
            out.append(f"Your scorer judges them: one of pairs is asked about {pairs[config.score.units]}{orders}.")
    out.append(f"Pairs: {_first_line(POLICIES[select.policy])}")
    if config.degrade.degrees:
        whose = "winner" if config.degrade.of == "chosen" else "response of a pair"
        out.append(
            f"Each {whose} in {config.degrade.degrees} versions, from whole to without {config.degrade.most:.0%} of "
            f"its key phrases (`{config.degrade.phrases}`), a row each."
        )
    if config.replay:
        shares = ", ".join(f"{share:.0%} from {back} back" for back, share in config.replay.items())
        out.append(f"Pairs of earlier iterations join them: {shares}.")
    if select.extra_rows is not None or "extra_share" in mapping(options.get("select")):
        out.append(f"Rows of a file, `select.extra_rows`, join them: {select.extra_share:.0%} of all.")
    out.append(_training(train))
    return out


def _sampling(config: LoopConfig) -> str:
    sample = config.sample
    cut = [f"top_p {sample.top_p:g}"] * (sample.top_p < 1) + [f"top_k {sample.top_k}"] * (sample.top_k > 0)
    what = []
    if sample.n:
        at = ", ".join([f"temperature {sample.temperature:g}", *cut])
        what.append(
            f"{_count(sample.n, 'response')} of the current policy to each, {at}, at most {sample.max_tokens:,} tokens"
        )
    for spec in sample.sources:
        mixed = " with mixed logits" if spec.get("contrast_prefix") is not None else ""
        after = " after a prefix" if spec.get("prefix") else ""
        temperature = spec.get("temperature", sample.temperature)
        how = "temperature 0" if temperature == 0 else f"temperature {temperature:g}"
        what.append(f"{_count(int(spec.get('n', 1)), 'response')}{after}{mixed}, {how}, as `{spec['source']}`")
    return "; ".join(what)[:1].upper() + "; ".join(what)[1:] + "."


def _training(train: Mapping[str, Any]) -> str:
    losses = train.get("loss_type", "dpo")
    losses = [losses] if isinstance(losses, str) else list(losses)
    linked = " and ".join(f"[`{name}`](../losses.md#{canonical_name(name)})" if _is_loss(name) else f"`{name}`"
                          for name in losses)  # fmt: skip
    referring = any(_is_loss(name) and LOSSES[canonical_name(name)].reference for name in losses)
    roles = []
    if referring:
        roles.append(f"the reference is `{train.get('reference', 'current')}`")
    if "previous" in train:
        roles.append(f"the previous policy is `{train['previous']}`")
    more = f"; {' and '.join(roles)}" if roles else ""
    return f"Training from the current policy with {linked}{more}. The next iteration starts from what comes of it."


def _online_steps(train: Mapping[str, Any]) -> list[str]:
    """Of an iteration whose loss draws its responses as it trains."""
    way, config = online.way_of(train), _built(train)
    assert way is not None
    asks = rollouts(config)
    names = ", ".join(f"`{name}`" for name in train.get(online.REWARDS, ()))
    judged = f"Each is worth the weighted sum of {names}" if names else "Your scorers judge them"
    reads = online.reads_reference(train, config)
    more = f"; the reference is `{train.get('reference', 'current')}`" if reads else ""
    return [
        f"Training from the current policy with [`{way.name}`](../losses.md#{way.loss}), on responses that it gives as "
        f"it trains ([online training](../online.md)): {_count(asks.num_generations, 'response')} to each prompt, "
        f"temperature {asks.temperature:g}, at most {asks.max_completion_length:,} tokens{more}. {judged}. The next "
        "iteration starts from what comes of it."
    ]


def _built(train: Mapping[str, Any]) -> TrainConfig:
    own = (*_OF_THE_LOOP, online.REWARDS)
    return TrainConfig.build({k: v for k, v in train.items() if k not in own}, output_dir="run")


def _is_loss(name: str) -> bool:
    try:
        return canonical_name(name) in LOSSES
    except ValueError:
        return False


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _first_line(function: Any) -> str:
    """The first sentence of a docstring, small."""
    text = " ".join((inspect.getdoc(function) or "").split())
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def options_block(options: Mapping[str, Any]) -> str:
    """A recipe's options as YAML, each with the comment that it has in the configuration."""
    of_run = {o.name: o.text for o in options_of(LoopConfig)}
    lines: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping) and name in (*SECTIONS, "train"):
            lines.append(f"{name}:")
            texts = _texts_of(name)
            lines += _commented([(_entry(key, inner, "  "), texts.get(key, "")) for key, inner in value.items()])
        else:
            lines += _commented([(_entry(name, value), of_run.get(name, ""))])
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, indent: str = "") -> str:
    """`name: value`; on several lines where it is long."""
    line = f"{indent}{name}: {_flow(value)}"
    if len(line) <= _WIDTH:
        return line
    text = yaml.safe_dump(value, default_flow_style=None, width=_WIDTH - len(indent) - 2, sort_keys=False)
    return f"{indent}{name}:\n" + "\n".join(f"{indent}  {inner}" for inner in text.splitlines())


def _texts_of(section: str) -> Mapping[str, str]:
    if section == "train":
        return {f.name: f.metadata["help"] for f in dataclasses.fields(TrainConfig)} | _OF_THE_LOOP
    return {o.name: o.text for o in options_of(type(getattr(configs.build(GIVEN), section)))}


def _commented(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Comments behind, one below the other; above a line that has no room for it."""
    short = [
        len(line)
        for line, text in lines
        if text and "\n" not in line and len(line) + len(text) + 4 <= _WIDTH and len(line) <= 40
    ]
    column = max(short, default=0)
    for line, text in lines:
        text = " ".join(text.split())
        if "\n" not in line and text and len(line) <= column and column + len(text) + 4 <= _WIDTH:
            yield f"{line:<{column}}  # {text}"
        elif text:
            indent = " " * (len(line) - len(line.lstrip()))
            yield f"{indent}# {textwrap.shorten(text, _WIDTH - len(indent) - 2, placeholder=' ...')}"
            yield line
        else:
            yield line


def _sentence(text: str, capital: bool = True) -> str:
    text = text[:1].upper() + text[1:] if capital else text
    return text if not text or text[-1] in ".!?" else f"{text}."


def _linked(text: str) -> str:
    """Numbers of papers become links."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def index_page() -> str:
    """docs/recipes/index.md."""
    rows = []
    for name in recipes.names():
        config = configs.build({**GIVEN, **recipes.options_of(name)})
        if way := online.way_of(config.train):
            rows.append(_online_row(name, way.name, config.train))
            continue
        sampler = "tree search" if config.search else _samples(config)
        unscored = config.select.policy in WITHOUT_SCORES and not config.score.by
        kind = mapping(config.scorers.get(config.score.by)).get("kind")
        scorer = "none" if unscored else f"`{kind}`" if kind else _scorers(recipes.example_of(name))
        losses = config.train.get("loss_type", "dpo")
        losses = [losses] if isinstance(losses, str) else list(losses)
        referring = any(_is_loss(x) and LOSSES[canonical_name(x)].reference for x in losses)
        reference = f"`{config.train.get('reference', 'current')}`" if referring else "-"
        if "previous" in config.train:
            reference += f", previous `{config.train['previous']}`"
        rule = "siblings" if config.search else f"`{config.select.policy}`"
        cells = [f"[{name}]({name}.md)", sampler, scorer, rule,
                 ", ".join(f"`{x}`" for x in losses), reference]  # fmt: skip
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    head = "| recipe | samples | scorer | selector | loss | reference |\n| --- | --- | --- | --- | --- | --- |\n"
    return _INDEX + "\n" + head + "\n".join(rows) + "\n"


def _online_row(name: str, loss: str, train: Mapping[str, Any]) -> str:
    config = _built(train)
    reference = f"`{train.get('reference', 'current')}`" if online.reads_reference(train, config) else "-"
    scorers = ", ".join(f"`{one}`" for one in train.get(online.REWARDS, ())) or _scorers(recipes.example_of(name))
    count = rollouts(config).num_generations
    cells = [f"[{name}]({name}.md)", f"{count} as it trains", scorers, "-", f"`{loss}`", reference]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _samples(config: LoopConfig) -> str:
    """K and where they come from, in a few words."""
    sample = config.sample
    parts = [str(sample.n)] * (sample.n > 0)
    parts += [f"{spec.get('n', 1)} {spec['source']}" for spec in sample.sources]
    parts += [f"{config.refine.rounds} refined"] * (config.refine.rounds > 0)
    return " + ".join([*parts, *map(str, config.extra_responses)])


def _scorers(example: Mapping[str, Any]) -> str:
    """What the example gives, as one way of several."""
    specs = [mapping(spec) for spec in mapping(example.get("scorers")).values()]
    kinds = [
        f"{spec['kind']}, {spec['mode']}" if "mode" in spec else str(spec["kind"]) for spec in specs if "kind" in spec
    ]
    return f"yours (such as `{kinds[-1]}`)" if kinds else "yours"


_INDEX = """\
# Recipes

Made by `python -m fastpo.loop.docs`; the tests compare. A recipe is a file of options for [the loop](../loop.md), after
a paper's system: `fastpo iterate --recipe NAME` takes them as defaults, `fastpo recipes NAME` prints them. What a paper
leaves open is an option, and its page says what was chosen.
"""


def pages() -> dict[str, str]:
    """Text by name of all files in docs/recipes/."""
    return {"index.md": index_page()} | {f"{name}.md": recipe_page(name) for name in recipes.names()}


def guide(text: str) -> str:
    """docs/loop.md with its options made anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{options_table()}\n{END}{rest.partition(END)[2]}"


def write(docs: Path) -> None:
    """All of it in a folder like docs/; pages of recipes that are no more are removed."""
    (docs / "recipes").mkdir(exist_ok=True)
    for old in (docs / "recipes").glob("*.md"):
        old.unlink()
    for file, text in pages().items():
        (docs / "recipes" / file).write_text(text, encoding="utf-8")
    (docs / "loop.md").write_text(guide((docs / "loop.md").read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[2] / "docs")

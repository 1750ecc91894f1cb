"""Recipes: each file is options that are known and fit together, with texts; the pages in docs/ are made of them."""

import re
from importlib.util import find_spec

import pytest
import yaml

from fastpo.cli import main
from fastpo.errors import ConfigError
from fastpo.loop import checks, docs, recipes
from fastpo.loop import config as configs
from fastpo.loop.config import Eval, LoopConfig, Select
from fastpo.loop.recipes import ABOUT, TEXTS
from fastpo.scoring.scorers import make_scorer

NAMES = recipes.names()
OF_SYSTEMS = ("dno", "dno_prct", "sppo", "inpo", "selm", "iterative_dpo", "evolve", "dice", "reward_augmented",
              "just_say", "rm_ensemble", "cdr", "pugc", "autorule")  # fmt: skip


class Asked:
    """What the checks read of a scorer."""

    def __init__(self, name, unit):
        self.name, self.unit = name, unit


def unit_of(spec):
    """What a scorer of this section judges; sections of an ensemble, a model or rules judge a response."""
    return {"pair": "pair", "list": "list"}.get(spec.get("mode", ""), "response")


def options_of(name):
    """A recipe with what its user adds."""
    return configs.merged(recipes.options_of(name), configs.merged(docs.GIVEN, recipes.example_of(name)))


def test_the_systems_are_there():
    assert set(OF_SYSTEMS) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_known_and_fit_together(name):
    config = configs.build(configs.merged(docs.GIVEN, recipes.options_of(name)))
    assert config.output_dir == "run"
    config = configs.build(options_of(name))
    scorers = {key: Asked(key, unit_of(spec)) for key, spec in config.scorers.items()}
    for t in range(1, config.iterations + 1):
        now = config.in_iteration(t)
        by = checks.deciding(now, scorers)
        checks.check(now, None if by is None else scorers[by], {key: s.unit for key, s in scorers.items()})


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_is_not_known_is_refused(name):
    for section, wrong in (
        (None, "iteration"),
        ("select", "polcy"),
        ("score", "buy"),
        ("eval", "agains"),
        ("train", "betta"),
    ):
        options = options_of(name)
        if section is None:
            options[wrong] = 1
        else:
            options[section] = {**options.get(section, {}), wrong: 1}
        with pytest.raises(ConfigError, match=f"{wrong}.*did you mean"):
            checks.train_options(configs.build(options))


@pytest.mark.parametrize("name", NAMES)
def test_texts(name):
    found = recipes.read(name)
    for key in TEXTS:
        assert found[key].strip(), f"{name}.yaml has no {key}"
    assert set(recipes.text_of(name)) == set(TEXTS)
    assert not set(ABOUT) & set(recipes.options_of(name))
    assert "train" in found and "example" in found


def test_scorers_of_the_examples_can_be_made(tmp_path):
    """By name and options; nothing is loaded, and no server is asked."""
    policies = dict.fromkeys(("start", "before", "current", "previous"), "models/some")
    (tmp_path / "rules.json").write_text('["is polite"]')
    for name in NAMES:
        config = configs.build(options_of(name))
        if "base_url" in str(config.scorers) and not find_spec("openai"):
            continue  # a client of servers is made with it
        for key, spec in config.scorers.items():
            made = make_scorer(key, spec, policies, tmp_path, others=config.scorers)
            assert made.unit == unit_of(spec), (name, key)


def test_command_line(capsys):
    assert main(["recipes"]) == 0
    told = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", told, re.MULTILINE) for name in NAMES)
    assert main(["recipes", "inpo"]) == 0
    told = capsys.readouterr().out
    assert "Needs:" in told and "example" not in told
    printed = yaml.safe_load(told[told.index("sample:") :])
    assert printed == recipes.options_of("inpo")
    assert main(["recipes", "spo"]) != 0
    assert "did you mean" in capsys.readouterr().err


# -------------------------------------------------------------------- docs


def test_pages_are_those_of_the_recipes(repo_root):
    folder = repo_root / "docs" / "recipes"
    written = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    assert written == docs.pages(), "run python -m fastpo.loop.docs"
    guide = (repo_root / "docs" / "loop.md").read_text(encoding="utf-8")
    assert docs.guide(guide) == guide, "run python -m fastpo.loop.docs"


def test_the_site_has_every_recipe(repo_root):
    nav = (repo_root / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"^  - (\w+): recipes/\1\.md$", nav, re.MULTILINE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_a_page_are_the_recipe(name):
    """What is printed as YAML, comments and all, is what the recipe sets and what its user gives."""
    run, options = re.findall(r"```yaml\n(.*?)```", docs.recipe_page(name), re.DOTALL)
    assert yaml.safe_load(options) == yaml.safe_load(yaml.safe_dump(recipes.options_of(name)))
    given = yaml.safe_load(run)
    assert given.pop("recipe") == name and given.pop("eval") == {"prompts": "heldout.jsonl"}
    assert given == {**docs.GIVEN, **recipes.example_of(name)}
    assert max(map(len, options.splitlines())) <= 140


def test_every_option_is_in_the_guide():
    table = docs.options_table()
    for option in docs.options_of(Select):
        assert f"| `select.{option.name}` |" in table
    for option in docs.options_of(LoopConfig):
        assert f"| `{option.name}` |" in table
    lacking = [o.name for cls in (LoopConfig, Select, Eval) for o in docs.options_of(cls) if not o.text]
    assert not lacking, "an option without a comment in config.py"
    assert {o.name: o.default for o in docs.options_of(Eval)}["against"] == "start"


def test_steps_say_what_the_options_say():
    text = "\n".join(docs.steps(recipes.options_of("inpo")))
    assert (
        "8 responses" in text and "tournament" in text and "`inpo`" in text and "previous policy is `current`" in text
    )
    changed = configs.merged(recipes.options_of("inpo"), {"sample": {"n": 3}, "train": {"loss_type": "simpo"}})
    changed["train"].pop("previous")
    text = "\n".join(docs.steps(changed))
    assert "3 responses" in text and "reference" not in text


def test_writing_makes_all_pages_anew(repo_root, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "gone.md").write_text("of a recipe that is no more")
    guide = (repo_root / "docs" / "loop.md").read_text(encoding="utf-8")
    (tmp_path / "loop.md").write_text(re.sub(r"\| `select\.margin`.*\n", "", guide), encoding="utf-8")
    docs.write(tmp_path)
    assert {p.name for p in (tmp_path / "recipes").iterdir()} == set(docs.pages())
    assert (tmp_path / "loop.md").read_text(encoding="utf-8") == guide

"""What README and docs show: Python blocks run on a toy, commands are understood, paths and imports are there."""

import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import fastpo
from fastpo import cli, quickstart

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXTS = dict(zip(NAMES, (page.read_text(encoding="utf-8") for page in PAGES)))
BLOCKS = [
    pytest.param(name, block, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
]
# Why a block is not run.
NOT_RUN = {"DPOTrainer": "TRL's own script", "trl-lib/": "tests/test_migration.py runs it, with TRL's data set made",
           '"base_url"': "a judge behind a server"}  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """The arguments of every `fastpo` command that a page shows on a line of its own, alone or under torchrun."""
    found = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        match = re.match(r"(?: {4}|)(?:(?:srun )?torchrun .*? -m )?fastpo ((?:[a-z]+\b|--version).*)$", line)
        if match and match[1].split()[0] in ("train", "plan", "quickstart", "check", "losses", "games", "env",
                                          "iterate", "recipes"):  # fmt: skip
            found.append([token for token in shlex.split(match[1], comments=True) if token != "..."])
    return found


COMMANDS = [
    pytest.param(command, id=f"{name}-{' '.join(command)[:60]}")
    for name, text in TEXTS.items()
    for command in commands(text)
]


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory) -> Path:
    """Where the snippets run: models and data under the names that they use."""
    folder = tmp_path_factory.mktemp("snippets")
    for name in ("path/to/model", "sft", "iterate-2"):
        toy.model().save_pretrained(folder / name)
        toy.tokenizer().save_pretrained(folder / name)
    tokenizer = quickstart.build_tokenizer()
    for part in (quickstart.build_model(tokenizer, 0), tokenizer):
        part.save_pretrained(folder / "fastpo-quickstart" / "supervised")
    lines = "".join(json.dumps(row) + "\n" for row in toy.rows(8))
    for name in ("pairs.jsonl", "a.jsonl", "org/name/train.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(lines)
    prompts = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in toy.rows(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "rewards.yaml").write_text("short: {kind: verifier, verifier: max_words, n: 100}\n")
    (folder / "run.yaml").write_text("model: path/to/model\ntrain_dataset: pairs.jsonl\noutput_dir: yaml-out\n")
    return folder


@pytest.fixture
def names(toy, folder, monkeypatch):
    """What the blocks take for granted; and `fastpo.train`, `iterate` and `Trainer` at two steps, on the CPU, without a
    training run's report."""
    pytest.importorskip("datasets").Dataset.from_list(toy.rows(8)).to_parquet(folder / "b.parquet")
    small = dict(use_cpu=True, bf16=False, max_steps=2, report=False, disable_tqdm=True, overwrite_output_dir=True)
    monkeypatch.chdir(folder)
    trainer = type("Small", (), {"__new__": lambda cls, *a, **k: real(*a, **k, **small)})
    real = fastpo.Trainer
    monkeypatch.setattr(fastpo, "Trainer", trainer)
    monkeypatch.setattr(fastpo, "train", partial(fastpo.train, **small))
    logps = {name: -20 * torch.rand(3) for name in ("chosen_logps", "rejected_logps")}
    monkeypatch.setattr(fastpo, "iterate", partial(_small_iterate, fastpo.iterate, small))
    judged = toy.kway_rows(4)
    tokens = {name: -torch.rand(10) for name in ("logp", "old_logp", "ref_logp")}
    tokens |= {"rewards": torch.rand(4, 1), "groups": [0, 0, 1, 1], "offsets": torch.tensor([0, 3, 5, 8, 10])}
    tokens |= {"tokens": 10.0, "responses": 4, "max_completion_length": 8}
    return {
        "fastpo": fastpo, "model": toy.model(), "rows": toy.rows(8), "held_out": toy.rows(4, seed=1),
        "pairs_sampled_from_iterate_2": toy.rows(6, seed=2), "sample_and_judge": lambda policy: judged,
        "n_w": torch.tensor([3.0, 5.0, 7.0]), "n_l": torch.tensor([4.0, 2.0, 9.0]), **logps,
        **tokens,
    }  # fmt: skip


def _small_iterate(real, small, *args, sample, train, **options):
    """The toy ends no answer by itself."""
    return real(*args, sample={**sample, "drop_truncated": False}, train={**train, **small}, **options)


@pytest.mark.parametrize("name, block", BLOCKS)
def test_python_block(name, block, names, request):
    if reason := next((why for mark, why in NOT_RUN.items() if mark in block), None):
        pytest.skip(reason)
    block = block.replace(", ...)", ")")  # and further arguments
    if "fastpo.train(model, [" in block:  # a model in memory has no tokenizer of its own
        block = block.replace("fastpo.train(model,", 'fastpo.train("sft",')
    exec(compile(block, name, "exec"), names)
    for result in [v for v in names.values() if isinstance(v, fastpo.TrainResult)]:
        assert result.state.global_step == 2


def test_blocks_are_found():
    assert len(BLOCKS) >= 8 and {name for name, *_ in (b.values for b in BLOCKS)} >= {"README.md", "docs/training.md"}
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command, folder, monkeypatch, capsys):
    """`train` and `plan` go as far as their configuration, the others' options are in their help."""
    monkeypatch.chdir(folder)
    if command[0] in ("train", "plan"):
        assert cli.main([*command, "--print-config"]) == 0, capsys.readouterr().err
        assert "output_dir:" in capsys.readouterr().out
    else:
        cli.main([command[0], "--help"])
        told = capsys.readouterr().out
        assert not [token for token in command[1:] if token.startswith("--") and token not in told]


def test_every_import_runs():
    """In a process of its own, without warnings: an old path would warn."""
    lines = set()
    for text in TEXTS.values():
        lines |= set(re.findall(r"^\s*((?:from fastpo[\w.]* import [\w, ]+|import fastpo[\w.]*))", text, re.MULTILINE))
    modules = {m for text in TEXTS.values() for m in re.findall(r"python -m (fastpo[\w.]*)", text)}
    paths = {p for text in TEXTS.values() for p in re.findall(r"`(fastpo(?:\.\w+)+)(?:\(|`|\[)", text)}
    paths |= {p for text in TEXTS.values() for p in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    assert len(lines) >= 2 and len(paths) >= 15
    code = ["import importlib.util, pkgutil, warnings", "warnings.simplefilter('error', FutureWarning)", *sorted(lines)]
    code += [f"assert importlib.util.find_spec({module!r}), {module!r}" for module in sorted(modules)]
    code += [f"pkgutil.resolve_name({path!r})" for path in sorted(paths)]
    command = [sys.executable, "-c", "\n".join(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_there(name):
    """Files of the repository that a page names, in its own words: `fastpo/trainer.py`, `bench/aot.py`."""
    named = re.findall(r"`((?:fastpo|kernels|csrc|bench|tests|examples|findings|docs)/[\w./-]*\w)/?`", TEXTS[name])
    run = r"(?:python|pytest|bash|sh)(?: -\S+)* ((?:bench|tests|examples|findings)/\S+\.(?:py|sh))"
    missing = [path for path in [*named, *re.findall(run, TEXTS[name])] if not (ROOT / path).exists()]
    assert not missing

"""Versions of a response without its key phrases, and the recipe spo_degree from end to end."""

import json

import pytest
from safetensors.torch import load_file

import fastpo
from fastpo.errors import ConfigError, TrainingError
from fastpo.loop import degrade
from fastpo.loop.config import Degrade, merged
from fastpo.sampling.parts import read_lines

# The example of RAKE's authors, with a word that stands twice in another case.
ABSTRACT = (
    "Compatibility of systems of linear constraints over the set of natural numbers. Criteria of compatibility of a "
    "system of linear Diophantine equations, strict inequations, and nonstrict inequations are considered."
)


def phrases(kind, text, **options):
    found = degrade.PHRASES[kind](text, Degrade(phrases=kind, **options), 5)
    return [[text[slice(*span)] for span in phrase] for phrase in found]


def test_rake():
    """linear: in phrases of 2 and 3 words, so 2.5; Diophantine and equations 3 each: 8.5 for the three together."""
    found = [places[0] for places in phrases("rake", ABSTRACT)]
    assert found[:5] == ["linear Diophantine equations", "linear constraints", "natural numbers", "strict inequations",
                         "nonstrict inequations"]  # fmt: skip
    assert set(found[5:]) == {"Compatibility", "systems", "set", "Criteria", "system", "considered"}
    assert phrases("rake", ABSTRACT)[5] == ["Compatibility", "compatibility"]
    assert phrases("rake", "It is what it was, and I don’t think so.") == [["think"]]
    assert phrases("rake", "") == []


def test_words_and_patterns():
    assert phrases("words", "an Elephant ate an elephant-sized bun") == [
        ["elephant-sized"], ["Elephant"], ["ate"], ["bun"], ["an", "an"]]  # fmt: skip
    found = phrases("pattern", "607=odd", pattern="odd|even|.")
    assert sorted(places[0] for places in found) == ["0", "6", "7", "=", "odd"]
    assert found == phrases("pattern", "607=odd", pattern="odd|even|.")


def test_what_is_left():
    text = "The cat sat, the cat  ran."
    assert degrade.without(text, []) == text
    assert degrade.without(text, [(4, 7)]) == "The sat, the cat  ran."
    assert degrade.without(text, [(0, 3), (17, 20)]) == "cat sat, the  ran."
    assert degrade.without(" w1 w2", [(1, 3)]) == " w2"
    assert degrade.without("abc", [(2, 3), (0, 1)]) == "b"


@pytest.mark.parametrize("degrees", [2, 3, 5])
@pytest.mark.parametrize("most", [0.5, 1.0])
def test_shares_that_rise(degrees, most):
    """Degree k lacks k / (degrees - 1) of `most` of the words, the longest first."""
    text = " ".join("x" * n for n in range(1, 11)) + " !"
    found = degrade.versions(text, Degrade(degrees, phrases="words", most=most), 0)
    assert found[0] == text and len(found) == degrees
    for k, version in enumerate(found):
        gone = -(-10 * most * k // (degrees - 1))
        assert version.split() == [*("x" * n for n in range(1, 11 - int(gone))), "!"]


def test_too_few_phrases():
    options = Degrade(4, phrases="words", most=1.0)
    assert degrade.versions("one three !", options, 0) is None
    assert degrade.versions("one three fourth", options, 0) is None  # of which nothing would be left
    assert degrade.versions("one three fourth !", options, 0) == [
        "one three fourth !", "one three !", "one !", "!"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the recipe

TRAIN = {
    "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report": False,
    "gradient_checkpointing": False, "learning_rate": 1e-3, "optim": "adamw_torch", "save_strategy": "no",
    "logging_steps": 1,
}  # fmt: skip


def judge(prompt, response, meta):
    return float(sum(map(ord, response)) % 7)


@pytest.fixture(scope="module")
def start(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    toy.model().save_pretrained(folder)
    return folder


@pytest.fixture
def options(toy, start, tmp_path):
    def make(**more):
        given = {
            "recipe": "spo_degree", "model": str(start), "output_dir": str(tmp_path / "run"), "iterations": 1,
            "prompts": [{"id": str(k), "prompt": row["prompt"]} for k, row in enumerate(toy.rows(8))],
            "sample": {"n": 3, "temperature": 1.0, "max_tokens": 6, "drop_truncated": False},
            "degrade": {"degrees": 3, "phrases": "words"}, "train": TRAIN,
        }  # fmt: skip
        return merged(given, more)

    return make


def rows_of(folder):
    rows = list(read_lines(folder / "rows.jsonl"))
    return [row for row in rows if row["loss"] == "dpo"], [row for row in rows if row["loss"] == "degree_aux"]


def test_the_recipe(options, tmp_path):
    """Each pair's winner in versions, trained beside it; the second iteration draws pairs of the first alone."""
    more = {"iterations": 2, "replay": {1: 0.2}, "guards": {"stop": False}}
    result = fastpo.iterate(options(**more), scorers={"judge": judge})
    for t in (1, 2):
        folder = tmp_path / "run" / f"iter-00{t}"
        pairs, singles = rows_of(folder)
        counts = json.loads((folder / "rows.json").read_text())
        assert counts["rows"] == len(pairs) + len(singles) and counts["of a degree"] == len(singles) > 0
        assert len(singles) == 3 * (counts["prompts kept"] - counts["responses without degrees"])
        own = {row["id"]: row for row in pairs if "replayed" not in row}
        assert len(own) == counts["of this iteration"] == len(pairs) - counts["replayed"]
        for k in range(0, len(singles), 3):
            three = singles[k : k + 3]
            row = own[three[0]["id"].split("/")[0]]
            winner = row["responses"][row["pairs"][0][0]]
            assert [x["degree"] for x in three] == [0, 1, 2] and three[0]["completion"] == winner["text"]
            assert all(x["prompt_ids"] == row["prompt_ids"] for x in three)
            lengths = [len(x["completion"].split()) for x in three]
            assert lengths[0] > lengths[1] > lengths[2]
        assert load_file(folder / "train" / "degree_head.safetensors")["weight"].shape == (3, 32)
    assert result.iterations[0]["rows"]["of a degree"] == len(rows_of(tmp_path / "run/iter-001")[1])


def test_losers_too_and_turns(options, tmp_path, toy):
    """Of a conversation a version is a turn."""
    prompts = [{"id": str(k), "prompt": [{"role": "user", "content": row["prompt"]}]}
               for k, row in enumerate(toy.rows(6))]  # fmt: skip
    fastpo.iterate(options(prompts=prompts, degrade={"of": "both"}), scorers={"judge": judge})
    pairs, singles = rows_of(tmp_path / "run/iter-001")
    counts = json.loads((tmp_path / "run/iter-001/rows.json").read_text())
    assert len(singles) == 3 * (2 * len(pairs) - counts["responses without degrees"]) > 3 * len(pairs)
    assert singles[0]["completion"][0]["role"] == "assistant" and isinstance(singles[0]["prompt"], list)


def test_a_changed_option_names_itself(options):
    fastpo.iterate(options(), scorers={"judge": judge})
    with pytest.raises(ConfigError, match="degrade"):
        fastpo.iterate(options(degrade={"most": 0.6}), scorers={"judge": judge})


@pytest.mark.parametrize(
    "more, message",
    [
        ({"degrade": {"degrees": 1}}, "degrade.degrees must be 0, or 2 to 64, not 1"),
        ({"degrade": {"phrases": "yake"}}, "degrade.phrases must be rake, words or pattern, not 'yake'"),
        ({"degrade": {"of": "all"}}, "degrade.of must be chosen or both"),
        ({"degrade": {"most": 0}}, r"degrade.most must be a share in \(0, 1\]"),
        ({"degrade": {"pattern": "["}}, "degrade.pattern must be a regular expression"),
        (
            {"train": {"loss_kwargs": {"degrees": 4}}},
            r"degrade.degrees=3 and degree_aux has degrees=4: set train.loss_kwargs=\{degr",
        ),
        ({"degrade": {"degrees": 0}}, "loss_type=degree_aux reads rows of a degree: set degrade.degrees, such as 4"),
        (
            {"train": {"loss_type": "dpo", "loss_weights": [1.0]}},
            "degrade.degrees=3 makes rows of",
        ),
        (
            {"train": {"loss_type": ["dpo", "sft", "degree_aux"], "loss_weights": [1, 1, 1]}},
            "beside one loss of pairs, not dpo",
        ),
        ({"train": {"loss_type": ["aot", "degree_aux"]}}, "aot reads a number of the whole step"),
        ({"train": {"loss_type": ["degree_aux"], "loss_weights": [1]}}, "degree_aux is added to a loss of pairs"),
        ({"select": {"rows": "pairs"}}, "set select.rows=kway"),
    ],
)
def test_what_does_not_go_together(options, more, message):
    with pytest.raises(ConfigError, match=message):
        fastpo.iterate(options(**more), scorers={"judge": judge})


def test_answers_without_key_phrases(options):
    """Two words are not enough for ten degrees."""
    more = {"degrade": {"degrees": 10}}
    with pytest.raises(
        TrainingError, match=r"no response has the key phrases for 10 degrees \(degrade.phrases=words\)"
    ):
        fastpo.iterate(options(**more), scorers={"judge": judge})

"""What is done before the loop: supervision, AutoRule's rules, PUGC's queries, Instruct-SkillMix; by script."""

import dataclasses
import json
import random
import re
from collections import Counter

import pytest

from fastpo.errors import ConfigError, DataError, TrainingError
from fastpo.loop import prepare
from fastpo.loop.autorule import AutoRule, rules
from fastpo.loop.growth import Search
from fastpo.loop.pairs import read_pairs
from fastpo.loop.pugc import Queries, queries
from fastpo.loop.skillmix import SkillMix, mix, read_form, skillmix
from fastpo.loop.stages import Iteration
from fastpo.loop.supervise import Supervise, refining_rows, sft
from fastpo.loop.written import Template, read_texts, unrepeated
from fastpo.sampling.items import Failure, Response, seed_of
from fastpo.scoring.replies import is_refusal


class Scripted:
    """A teacher that answers by rule: of the last turn, or of the whole request."""

    exact, key = True, {}

    def __init__(self, answer, batch=2, exact=True):
        self.answer, self.batch, self.exact, self.asked = answer, batch, exact, []

    def batches(self, requests):
        order = sorted(requests, key=lambda r: (-len(r.prompt_ids), r.unit))
        return [order[k : k + self.batch] for k in range(0, len(order), self.batch)]

    def sample(self, requests):
        for request in requests:
            self.asked.append(request)
            given = self.answer(request)
            yield request, Response(given, None, True) if isinstance(given, str) else given

    def close(self):
        pass

    def of(self, source):
        return [r for r in self.asked if r.source == source]


def encode(prompt):
    return [len(turn["content"]) for turn in prompt]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_after_interruptions(tmp_path, work, names):
    """`work(folder, teacher)` leaves the same bytes, wherever the last file that grew was cut off."""
    whole = tmp_path / "whole"
    counts = work(whole)
    contents = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert set(names) <= set(contents)
    grown = [name for name in names if name.endswith(".jsonl") and name not in ("rows.jsonl", "prompts.jsonl")]
    rng = random.Random(0)
    for number, name in enumerate(grown):
        for cut in {0, *rng.sample(range(len(contents[name])), 3)}:
            folder = tmp_path / f"cut-{number}-{cut}"
            folder.mkdir()
            for earlier in grown[:number]:
                (folder / earlier).write_bytes(contents[earlier])
            (folder / name).write_bytes(contents[name][:cut])
            assert work(folder) == counts
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


# ---- what models write


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('<think>["x"]</think> ["a"]', ["a"]),
        ('Sure!\n```json\n["a", "b"]\n```', ["a", "b"]),
        ('```\n["a"]\n```', ["a"]),
        ('{"rules": ["a", " ", "A."]}', ["a"]),
        ("[]", []),
        ('Here: ["a"] and ["b"]', None),
        ("1. a\n2. b", None),
        ('["a", 1]', None),
        ('[["a"]]', None),
        ('["a", "b', None),
        ("<think>hm", None),
        ("", None),
        ('"a"', None),
    ],
)
def test_lists_of_texts(reply, texts):
    assert read_texts(reply) == texts


def test_refusals():
    assert is_refusal("I'm sorry, but no") and is_refusal("I can\u2019t help") and not is_refusal("Can I swim?")


def test_templates_must_hold_what_is_filled_in(tmp_path):
    mine = tmp_path / "merge.txt"
    mine.write_text("Merge these rules, please.\n")
    with pytest.raises(ConfigError, match=r"template merge_rules \(.*merge.txt\) has no {rules}: it would not be seen"):
        Template("merge_rules", ("rules",), {"merge_rules": str(mine)})
    mine.write_text("{other} {rules} {\n")
    filled = Template("merge_rules", ("rules",), {"merge_rules": str(mine)})
    assert filled(rules="{rules} {other}") == "{other} {rules} {other} {"  # what is put in is not read again
    with pytest.raises(ConfigError, match="template merge_rules .*No such file"):
        Template("merge_rules", ("rules",), {"merge_rules": str(tmp_path / "none.txt")})


def test_every_built_in_template_is_whole():
    assert unrepeated(["Be kind.", "be  kind", "Be brief"]) == ["Be kind.", "Be brief"]
    text = Template("justify", ("prompt", "a", "b", "preferred"))(prompt="P?", a="one", b="two", preferred="B")
    assert "P?" in text and "one" in text and "two" in text and "{" not in text


# ---- the names


def test_names_and_options_are_checked():
    assert prepare.check({"sft": {"rows": "x"}, "skillmix": {}}) == ["skillmix", "sft"]
    assert list(prepare.PREPARATIONS) == ["skillmix", "queries", "rules", "sft"]
    with pytest.raises(ConfigError, match="prepare: no stage 'rule'; did you mean 'rules'"):
        prepare.check({"rule": {}})
    with pytest.raises(ConfigError, match="no option prepare.queries.text; did you mean 'texts'"):
        prepare.check({"queries": {"text": "x"}})
    with pytest.raises(ConfigError, match="prepare.rules must hold options by name, not 3"):
        prepare.check({"rules": 3})


# ---- AutoRule

PAIRS = [{"id": f"q{i}", "prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(7)]


def reasoner(request):
    """Explains, extracts two rules an explanation, of which one is everybody's, and merges what says the same."""
    text = request.prompt[-1]["content"]
    if request.source == "justify":
        good = re.search(r"good (\d)", text)[1]
        return f"<think>hm</think>The answer good {good} is better."
    if request.source == "extract":
        good = re.search(r"good (\d)", text)[1]
        return json.dumps(["The answer is good.", f"The answer says {good}."])
    listed = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
    return json.dumps(sorted({"The answer says a number." if "says" in rule else rule for rule in listed}))


def run_rules(folder, teacher=None, max_failed=0.0, **spec):
    spec = {"pairs": PAIRS, "n": 5} | spec
    return rules(spec, teacher or Scripted(reasoner), folder, encode=encode, seed=3, max_failed=max_failed)


def test_rules_from_pairs(tmp_path):
    teacher = Scripted(reasoner)
    counts = run_rules(tmp_path, teacher)
    assert json.loads((tmp_path / "rules.json").read_text()) == ["The answer is good.", "The answer says a number."]
    assert counts == {"pairs": 5, "justified": 5, "extract: rules": 10, "different rules": 6, "rules": 2}
    asked = teacher.of("justify")
    orders = Counter()
    for request in asked:
        text = request.prompt[0]["content"]
        n = request.id[1:]
        first = text.index(f"good {n}") < text.index(f"bad {n}")
        orders[first] += 1
        assert f"preferred answer {'A' if first else 'B'}." in text and f"Question {n}?" in text
        assert request.prompt_ids == (len(text),) and request.temperature == 0.6 and request.max_tokens == 4096
        assert request.seed == seed_of(3, "rules", request.id, "justify", 0)
    assert len(orders) == 2  # in random order
    assert all("<think>hm</think>The answer good" in r.prompt[0]["content"] for r in teacher.of("extract"))
    [merge] = teacher.of("merge-0")
    for rule in ["The answer is good.", *(f"The answer says {r.id[1:]}." for r in asked)]:
        assert rule in merge.prompt[0]["content"]  # the rules are there for the model to see


def test_many_rules_are_merged_in_groups(tmp_path):
    teacher = Scripted(reasoner)
    counts = run_rules(tmp_path, teacher, n=7, group=3)
    assert [len(teacher.of(f"merge-{k}")) for k in range(3)] == [3, 1, 0]  # of 8 rules: 3, 3 and 2; then one list
    assert counts["rules"] == 2


def test_the_model_may_say_itself_which_is_better(tmp_path):
    def answer(request):
        if request.source != "justify":
            return reasoner(request)
        text, n = request.prompt[0]["content"], int(request.id[1:])
        assert "preferred" not in text
        if n == 0:
            return "Both are fine."
        letter = "A" if text.index("good") < text.index("bad") else "B"
        if n == 1:
            letter = "AB"["BA".index(letter)]
        return reasoner(request) + f"\nBetter: **{letter}**"

    counts = run_rules(tmp_path, Scripted(answer), n=7, preference="asked")
    assert counts["justified"] == 5
    assert counts["justify: unparsed"] == 1 and counts["justify: for the other answer"] == 1


def test_what_the_reasoner_does_not_say_is_not_invented(tmp_path):
    def answer(request):
        n = request.id[1:]
        if request.source == "justify" and n == "0":
            return Response("cut", None, False)
        if request.source == "justify" and n == "1":
            return " "
        if request.source == "extract" and n == "2":
            return "1. Be good"
        if request.source == "extract" and n == "3":
            return "[]"
        if request.source.startswith("merge") and request.k == 0:
            return "no list"
        if request.source.startswith("merge") and request.k == 1:
            return json.dumps([f"rule {k}" for k in range(99)])
        return reasoner(request)

    teacher = Scripted(answer)
    counts = run_rules(tmp_path / "a", teacher, n=7)
    assert counts == {
        "pairs": 7, "justified": 5, "different rules": 4, "rules": 2, "justify: cut off": 1, "justify: empty": 1,
        "extract: unparsed": 1, "extract: no rule": 1, "extract: rules": 6, "merge: unparsed": 1,
        "merge: more rules than there were": 1,
    }  # fmt: skip
    assert [r.k for r in teacher.of("merge-0")] == [0, 1, 2]
    with pytest.raises(TrainingError, match=r"could not be merged in 2 attempts \(.*last reply: '\[\"rule 0\""):
        run_rules(tmp_path / "b", Scripted(answer), n=7, attempts=2)
    with pytest.raises(TrainingError, match=r"no rule was found in 5 explanations \(.*extract: unparsed 5"):
        run_rules(tmp_path / "c", Scripted(lambda r: "no" if r.source == "extract" else reasoner(r)))
    failing = Scripted(lambda r: Failure("refused", "never") if r.id == "q2" else reasoner(r))
    with pytest.raises(TrainingError, match=r"justify: 1 of 7 requests failed.*1 refused.*q2: 'never'"):
        run_rules(tmp_path / "d", failing, n=7)
    assert run_rules(tmp_path / "d", failing, n=7, max_failed=0.2)["justify: failed"] == 1


def test_rules_after_interruptions(tmp_path):
    same_after_interruptions(
        tmp_path, lambda folder: run_rules(folder, n=7, group=3), ["justify.jsonl", "extract.jsonl", "merge.jsonl"]
    )


def test_failures_of_a_server_are_asked_again(tmp_path):
    bad = Scripted(lambda r: Failure("timeout") if r.id == "q2" else reasoner(r), exact=False)
    with pytest.raises(TrainingError, match="1 timeout"):
        run_rules(tmp_path, bad, n=7)
    good = Scripted(reasoner, exact=False)
    assert "justify: failed" not in run_rules(tmp_path, good, n=7)
    assert [r.id for r in good.of("justify")] == ["q2"]


# ---- pairs of any layout


def test_pairs_are_read_in_the_layouts_of_training():
    counts = Counter()
    turns = [{"role": "user", "content": "Hi?"}]
    talks = [{"prompt": "Hi?", "chosen": [*turns, {"role": "assistant", "content": "yes"}],
              "rejected": [*turns, {"role": "assistant", "content": "no"}]}]  # fmt: skip
    [pair] = read_pairs(talks, "pairs", counts)
    assert (pair.prompt, pair.chosen, pair.rejected) == (turns, "yes", "no")
    k_way = [{"id": "k", "prompt": "Hi?", "responses": [{"text": "no", "score": 1}, {"text": "yes", "score": 2}]}]
    [pair] = read_pairs(k_way, "pairs", counts)
    assert (pair.id, pair.prompt, pair.chosen, pair.rejected) == ("k", "Hi?", "yes", "no")
    responses = [{"text": text, "token_ids": [k], "finished": True} for k, text in enumerate(("no", "yes"))]
    own = [{"id": "o", "prompt": "Hi?", "prompt_ids": [1], "pairs": [[1, 0]], "responses": responses}]
    [pair] = read_pairs(own, "pairs", counts)  # rows of an iteration
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi?", "yes", "no")
    same = [*PAIRS, PAIRS[0], {"id": "e", "prompt": "x", "chosen": "", "rejected": "b"}]
    assert len(read_pairs(same, "pairs", counts)) == 7
    assert counts == {"repeated": 1, "empty completion": 1}
    with pytest.raises(DataError, match="pairs: there are no rows"):
        read_pairs([], "pairs", counts)
    with pytest.raises(DataError, match="pairs: preference rows need the columns 'chosen', 'rejected'"):
        read_pairs([{"prompt": "x", "best": "y"}], "pairs", counts)
    with pytest.raises(DataError, match="token ids"):
        read_pairs([{"prompt": [1], "chosen": [2], "rejected": [3]}], "pairs", counts)


# ---- PUGC

TEXTS = [{"id": f"t{i}", "text": f"Text number {i}."} for i in range(6)]


def reader(request):
    text = request.prompt[0]["content"]
    n = re.search(r"Text number (\d)", text)[1]
    if request.source == "query":
        return f'"What is number {n}?"'
    assert f"What is number {n}?" in text
    return "Yes"


def run_queries(folder, answer=reader, **spec):
    return queries({"texts": TEXTS} | spec, Scripted(answer), folder, encode=encode, seed=1, max_failed=0.0)


def test_queries_of_texts(tmp_path):
    counts = run_queries(tmp_path)
    assert counts == {"texts": 6, "prompts": 6}
    found = read(tmp_path / "prompts.jsonl")
    assert found[2] == {
        "id": "t2", "prompt": [{"role": "user", "content": "What is number 2?"}], "reference_text": "Text number 2.",
    }  # fmt: skip
    from fastpo.loop.prompts import read_prompts

    [item, *_] = read_prompts(str(tmp_path / "prompts.jsonl"))
    assert item.meta == {"reference_text": "Text number 0."}


def test_queries_that_are_none(tmp_path):
    def answer(request):
        n = request.id[1:]
        if request.source == "query":
            given = {"0": "NONE", "1": "I'm sorry, I can't write that.", "2": "what is  number 3?"}
            return given.get(n) or reader(request)
        return {"4": "No, it does not.", "5": "It depends."}.get(n) or "Yes"

    asked = [*TEXTS, {"id": "again", "text": "Text number 0."}, {"id": "blank", "text": " "}, *(
        {"id": f"u{i}", "text": f"Text number {i + 6}."} for i in range(2))]  # fmt: skip

    def last(request):
        if request.id == "u0":
            return Response("What", None, False)
        return " <think>x</think> " if request.id == "u1" else answer(request)

    counts = run_queries(tmp_path, last, texts=asked, turns=False)
    assert counts == {
        "texts": 8, "prompts": 1, "texts: repeated": 1, "texts: too short": 1, "queries: the text answers nothing": 1,
        "queries: refused": 1, "queries: repeated": 1, "queries: cut off": 1, "queries: empty": 1,
        "filter: the text does not answer it": 1, "filter: unparsed": 1,
    }  # fmt: skip
    assert read(tmp_path / "prompts.jsonl") == [
        {"id": "t2", "prompt": "what is  number 3?", "reference_text": "Text number 2."}
    ]


def test_queries_are_refused_where_nothing_is_left(tmp_path):
    with pytest.raises(TrainingError, match="no query is left of 6 texts .queries: the text answers nothing 6"):
        run_queries(tmp_path / "a", lambda r: "NONE")
    with pytest.raises(DataError, match="row 0 has no text in 'body', only 'id', 'text'"):
        run_queries(tmp_path / "b", column="body")
    with pytest.raises(ConfigError, match="prepare.queries needs texts"):
        run_queries(tmp_path / "c", texts=None)


def test_queries_after_interruptions(tmp_path):
    same_after_interruptions(tmp_path, run_queries, ["queries.jsonl", "filter.jsonl", "prompts.jsonl"])


# ---- Instruct-SkillMix


def form(instruction, response):
    return f"### Instruction:\n{instruction}\n\n### Response:\n{response}"


def writer(request):
    """Refines into what says so; item 1 is cut off at first, 2 is refined without the form, 3 never has it."""
    if request.source == "topics":
        return '["cooking", "law"]'
    if request.source == "skills":
        return json.dumps([f"{request.id} skill {k}" for k in range(3)])
    if request.source == "types":
        return '["a question", "a plan"]'
    n = int(request.id.removeprefix("mix-"))
    if request.source == "critique":
        return "It is too long."
    if n == 3:
        return "I would rather not."
    if request.source == "generate" and n == 1:
        return Response("### Instruction:\nShort", None, False)
    if request.source == "refine" and n == 2:
        return "Better as it is."
    if request.source == "refine" and n == 4:
        return Response(form("x", "y"), None, False)
    return form(f"Do {n}", f"{request.source} {n}")


def run_mix(folder, answer=writer, max_failed=0.0, **spec):
    teacher = answer if isinstance(answer, Scripted) else Scripted(answer)
    return skillmix({"n": 6} | spec, teacher, folder, encode=encode, seed=5, max_failed=max_failed)


def test_a_chat_for_each_item(tmp_path):
    teacher = Scripted(writer)
    counts = run_mix(tmp_path, teacher)
    assert counts == {
        "items": 6, "rows": 5, "skills": 6, "types": 2, "generate: cut off": 1, "refine: cut off": 1,
        "rows: from refine": 3, "rows: from refine-again": 1, "rows: from generate": 1, "rows: fallbacks": 1,
        "rows: unparsed": 1,
    }  # fmt: skip
    rows = {row["id"]: row for row in read(tmp_path / "rows.jsonl")}
    said = {name: row["completion"][0]["content"] for name, row in rows.items()}
    assert said == {
        "mix-000000": "refine 0", "mix-000001": "refine 1", "mix-000002": "generate 2", "mix-000004": "refine-again 4",
        "mix-000005": "refine 5",
    }  # fmt: skip
    assert rows["mix-000000"]["prompt"] == [{"role": "user", "content": "Do 0"}]
    [again] = teacher.of("refine-again")
    roles = [turn["role"] for turn in again.prompt]
    assert roles == ["user", "assistant"] * 3 + ["user"]  # one chat: generate, critique, refine, again
    assert again.prompt[1]["content"] == form("Do 4", "generate 4")
    [again] = teacher.of("generate-again")
    assert again.prompt[1]["content"] == "### Instruction:\nShort" and len(again.prompt) == 3
    for request in teacher.of("generate"):
        row = rows.get(request.id)
        text = request.prompt[0]["content"]
        if row is not None:
            assert len(set(row["skills"])) == 2 and row["type"] in text
            assert all(f"{k}. {skill}" in text for k, skill in enumerate(row["skills"], 1))


def test_mixes_are_drawn_by_the_seed():
    skills, types = [f"s{k}" for k in range(9)], [f"t{k}" for k in range(4)]
    drawn = [mix(skills, types, 2, i, 0) for i in range(40)]
    for start in range(0, 40, 4):
        assert sorted(kind for _, kind in drawn[start : start + 4]) == types  # a cycle, shuffled anew
    assert len({tuple(kind for _, kind in drawn[s : s + 4]) for s in range(0, 40, 4)}) > 3
    assert len({tuple(two) for two, _ in drawn}) > 25 and all(len(set(two)) == 2 for two, _ in drawn)
    assert drawn == [mix(skills, types, 2, i, 0) for i in range(40)]
    assert drawn != [mix(skills, types, 2, i, 1) for i in range(40)]


def test_lists_from_files(tmp_path):
    (tmp_path / "skills.txt").write_text("one\n\ntwo\nOne.\nthree\n")
    (tmp_path / "types.json").write_text('["a plan"]')
    teacher = Scripted(writer)
    counts = run_mix(tmp_path / "out", teacher, skills=str(tmp_path / "skills.txt"), types=str(tmp_path / "types.json"),
                     k=3, turns=False)  # fmt: skip
    assert (counts["skills"], counts["types"]) == (3, 1)
    assert not teacher.of("topics") and not teacher.of("types")
    assert read(tmp_path / "out" / "rows.jsonl")[0]["completion"] == "refine 0"
    with pytest.raises(TrainingError, match="2 skills are too few for k=3"):
        run_mix(tmp_path / "b", skills=["x", "y"], types=["t"], k=3)
    with pytest.raises(DataError, match="there is no such file|cannot be read"):
        run_mix(tmp_path / "c", skills=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="no option prepare.skillmix.skill; did you mean 'skills'"):
        run_mix(tmp_path / "d", skill=["x"])


def test_a_chat_that_fails_falls_back(tmp_path):
    def answer(request):
        if request.source == "critique" and request.id == "mix-000000":
            return Failure("timeout")
        if request.source == "generate" and request.id == "mix-000005":
            return Failure("refused", "no")
        return writer(request)

    counts = run_mix(tmp_path, answer, max_failed=0.3)
    assert counts["rows"] == 4 and counts["rows: no reply"] == 1
    assert counts["critique: failed"] == 1 and counts["generate: failed"] == 1
    assert read(tmp_path / "rows.jsonl")[0]["completion"][0]["content"] == "generate 0"


def test_repeated_instructions_and_no_rows(tmp_path):
    same = Scripted(lambda r: form("Same", r.id) if r.id.startswith("mix") else writer(r))
    assert run_mix(tmp_path / "a", same)["rows: repeated instruction"] == 5
    with pytest.raises(TrainingError, match=r"no row is left of 6 items \(.*rows: unparsed 6"):
        run_mix(tmp_path / "b", lambda r: "no" if r.id.startswith("mix") else writer(r))


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (form("a", "b"), ("a", "b")),
        ("Here it is.\n**Instruction:**\na\n**Response:**\nb\nc", ("a", "b\nc")),
        ("<think>x</think>\n" + form("a\n# Title", "1. b"), ("a\n# Title", "1. b")),
        (form("a", "b") + "\n" + form("c", "d"), None),
        (form("", "b"), None),
        (form("a", " "), None),
        ("### Response:\nb\n### Instruction:\na", None),
        ("a", None),
    ],
)
def test_the_form_is_read(reply, found):
    assert read_form(reply) == found


def test_skillmix_after_interruptions(tmp_path):
    names = ["topics.jsonl", "skills.jsonl", "types.jsonl", "generate.jsonl", "generate-again.jsonl", "critique.jsonl",
             "refine.jsonl", "refine-again.jsonl"]  # fmt: skip
    same_after_interruptions(tmp_path, run_mix, names)


# ---- supervision


def test_rows_that_teach_to_refine():
    rows = refining_rows(PAIRS[:1], " Better, please.", Counter())
    assert rows == [
        {"id": "q0", "prompt": "Question 0?", "completion": "good 0"},
        {"id": "q0/refine", "prompt": "Question 0?bad 0 Better, please.", "completion": "good 0"},
    ]
    user = {"role": "user", "content": "Hi?"}
    talk = {"prompt": [user], "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}]}  # fmt: skip
    rows = refining_rows([talk], "Better?", Counter())
    assert [row["completion"] for row in rows] == [[{"role": "assistant", "content": "yes"}]] * 2
    assert rows[1]["prompt"] == [user, {"role": "assistant", "content": "no"}, {"role": "user", "content": "Better?"}]


@pytest.fixture(scope="module")
def start(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    toy.model().save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


FEW = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "report": False}


def test_a_policy_from_pairs(toy, start, tmp_path):
    pairs = [{**row, "id": f"r{i}"} for i, row in enumerate(toy.rows(6))]
    counts = sft({"pairs": pairs, "template": " w1", "train": FEW}, None, tmp_path / "a", seed=0, model=start)
    assert counts["rows"] == 12 and counts["policy"] == str(tmp_path / "a" / "train")
    assert (tmp_path / "a" / "train" / "model.safetensors").is_file()
    assert len(read(tmp_path / "a" / "rows.jsonl")) == 12
    again = sft({"pairs": pairs, "template": " w1", "train": FEW}, None, tmp_path / "a", seed=0, model=start)
    assert again["policy"] == counts["policy"]


def test_a_policy_from_a_column_and_of_skillmix(toy, start, tmp_path):
    prompts = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in toy.rows(6)] + [
        {"prompt": "w1", "answer": ""}
    ]
    spec = {"rows": prompts, "column": "answer", "train": FEW, "model": start}
    counts = sft(spec, None, tmp_path / "a", seed=0)
    assert counts["rows"] == 6 and counts["no answer"] == 1
    texts = Scripted(lambda r: form("w1 w2 " + "w3 " * int(r.id[-1]), "w4 w5") if r.id.startswith("mix") else writer(r))
    run_mix(tmp_path / "mix", texts, turns=False)
    spec = {"rows": str(tmp_path / "mix" / "rows.jsonl"), "train": FEW}
    assert (tmp_path / "b" / "train").name in sft(spec, None, tmp_path / "b", seed=0, model=start)["policy"]


def test_supervision_that_cannot_be(start, tmp_path):
    for spec, said in [
        ({}, "needs rows or pairs, and not both"),
        ({"rows": [], "pairs": PAIRS}, "needs rows or pairs, and not both"),
        ({"pairs": PAIRS, "column": "x"}, "prepare.sft.column is a column of prepare.sft.rows"),
        ({"rows": PAIRS, "train": {"loss_type": "dpo"}}, "prepare.sft.train.loss_type is set by the stage"),
        ({"row": PAIRS}, "no option prepare.sft.row; did you mean 'rows'"),
    ]:
        with pytest.raises(ConfigError, match=said):
            sft(spec, None, tmp_path, model=start)
    with pytest.raises(ConfigError, match="prepare.sft needs model"):
        sft({"rows": PAIRS}, None, tmp_path)
    with pytest.raises(DataError, match="row 0 has no column 'chose': did you mean 'chosen'"):
        sft({"rows": PAIRS, "column": "chose"}, None, tmp_path, model=start)


@pytest.mark.parametrize(
    ("page", "heading", "options"),
    [
        ("loop-prepare.md", "`sft`", Supervise),
        ("loop-prepare.md", "`rules`", AutoRule),
        ("loop-prepare.md", "`queries`", Queries),
        ("loop-prepare.md", "`skillmix`", SkillMix),
        ("loop-search.md", "# Tree", Search),
    ],
)
def test_the_pages_list_every_option(repo_root, page, heading, options):
    text = (repo_root / "docs" / page).read_text()
    section = text[text.index(heading if heading.startswith("#") else f"## {heading}") :]
    section = section.split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    listed = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    assert set(listed) == set(fields)
    for row in rows:
        names = re.findall(r"`(\w+)`", row[0])
        if len(row) == 3 and re.fullmatch(r"[\w., -]+", row[1]) and len(row[1].split(", ")) == len(names):
            for name, shown in zip(names, row[1].split(", ")):
                if shown[0].isdigit() or shown in ("true", "false"):
                    assert shown == str(fields[name]).lower(), name


# ---- as stages of a run


def test_a_stage_is_done_once_and_knows_its_templates(tmp_path):
    mine, said, closed = tmp_path / "query.txt", [], []
    mine.write_text("{text} ?\n")

    def teacher():
        made = Scripted(reader)
        made.close = lambda: closed.append(made)
        return made

    def run(**spec):
        spec = {"texts": TEXTS, "templates": {"query": str(mine)}} | spec
        folder = tmp_path / "run" / "prepare"
        made = prepare.stage("queries", spec, folder / "queries", teacher, encode=encode, seed=1, max_failed=0.0)
        return Iteration(folder, said.append).run(made)

    first = run()
    assert first["counts"] == {"texts": 6, "prompts": 6} and len(closed) == 1
    assert run() == first and len(closed) == 1
    assert list(first["outputs"]) == ["queries/prompts.jsonl"]
    mine.write_text("{text} What?\n")
    with pytest.raises(ConfigError, match=r"stage queries was done with templates.query='\{text\} \?'"):
        run()
    mine.write_text("{text} ?\n")
    with pytest.raises(ConfigError, match="was done with options.max_tokens=512, now it is 5"):
        run(max_tokens=5)
    mine.write_text("What?\n")
    with pytest.raises(ConfigError, match="has no {text}"):
        prepare.check({"queries": {"templates": {"query": str(mine)}}})
    with pytest.raises(ConfigError, match="prepare.queries asks a model"):
        prepare.stage("queries", {}, tmp_path, None, encode=encode, seed=1, max_failed=0.0)


def test_supervision_as_a_stage(toy, start, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy.rows(6)))
    spec = {"pairs": str(tmp_path / "pairs.jsonl"), "template": " w1", "train": FEW}
    made = prepare.stage("sft", spec, tmp_path / "p" / "sft", None, encode=None, seed=0, max_failed=0.0, model=start)
    assert set(made.inputs) == {"pairs", "model"}
    record = Iteration(tmp_path / "p", print).run(made)
    assert record["counts"]["policy"] == str(tmp_path / "p" / "sft" / "train")

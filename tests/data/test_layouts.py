"""The layouts of other projects and data sets: recognised from a row or two each, converted alike from every source, or
refused with a line that works when it is pasted."""

import json
import math
import random
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpo.data import prepare_examples
from fastpo.data.layouts import LAYOUTS, find, kind_of, read_as
from fastpo.errors import DataError, FastpoError

TEMPLATE = (
    "{% for m in messages %}<t>{{ m['role'] }}: {{ m['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<t>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of bytes with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["</s>", "<t>", "<e>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


PAIR = ("<t>user: q<e><t>assistant: ", ["good<e>", "bad<e>"])
SYSTEM = ("<t>system: s<e>" + PAIR[0], PAIR[1])
ONE = (PAIR[0], ["good<e>"])

# Name -> rows, kind, and what is to come out: prompt and responses, of the first row that is kept.
CERTAIN = {
    "ultrafeedback": (
        [{"instruction": "q", "models": ["m", "n"], "completions": [
            {"response": "bad", "overall_score": 2.0, "fine-grained_score": 9.0},
            {"response": "good", "overall_score": 8.5, "fine-grained_score": 1.0}]}], "preference", PAIR),
    "ultrafeedback_argilla": (
        [{"source": "x", "instruction": "q", "chosen_response": "good", "rejected_response": "bad",
          "chosen_avg_rating": 5.0, "rejected_avg_rating": 3.0}], "preference", PAIR),
    "ultrafeedback_zephyr": (  # the prompt's text beside whole conversations, and the chosen one as messages
        [{"prompt": "q", "prompt_id": "1", "chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")],
          "messages": [user("q"), bot("good")], "score_chosen": 8.0, "score_rejected": 2.0}], "preference", PAIR),
    "ultrafeedback_trl": (
        [{"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")], "score_chosen": 8.0,
          "score_rejected": 2.0}], "preference", PAIR),
    "orca": ([{"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}], "preference", SYSTEM),
    "orca_no_system": ([{"system": "", "question": "q", "chosen": "good", "rejected": "bad"}], "preference", PAIR),
    "orca_argilla": (
        [{"system": "s", "input": "q", "chosen": "good", "rejected": "bad", "rating": [9.0, 8.0], "status": "unchanged",
          "chosen_score": 9.0}], "preference", SYSTEM),
    "truthy": ([{"id": "1", "system": "s", "prompt": "q", "chosen": "good", "rejected": "bad"}], "preference", SYSTEM),
    "ultra_interact": (
        [{"task": "m", "trajectory": [{"from": "user", "value": "q"}], "chosen": "good", "rejected": "bad"}],
        "preference", PAIR),
    "nectar": (
        [{"prompt": "\n\nHuman: q\n\nAssistant: ", "num_responses": 3, "answers": [
            {"answer": "worse", "rank": 2.0}, {"answer": "good", "rank": 1.0}, {"answer": "bad", "rank": 7.0}]}],
        "preference", ("\n\nHuman: q\n\nAssistant: ", ["good</s>", "bad</s>"])),
    "helpsteer2": (
        [{"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": 0},
         {"prompt": "q", "response_1": "bad", "response_2": "good", "preference_strength": 2}], "preference", PAIR),
    "helpsteer2_turns": (
        [{"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nq", "response_1": "good", "response_2": "bad",
          "preference_strength": -3}], "preference",
        ("<t>user: a<e><t>assistant: b<e>" + PAIR[0], PAIR[1])),
    "helpsteer3": (
        [{"domain": "code", "context": [user("q")], "response1": "bad", "response2": "good", "overall_preference": 1},
         {"domain": "code", "context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0}],
        "preference", PAIR),
    "shp": (
        [{"post_id": "1", "history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 9}],
        "preference", PAIR),
    "shp_second": (
        [{"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}], "preference", PAIR),
    "pku": (
        [{"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1}], "preference", PAIR),
    "arena": (
        [{"winner": "tie (bothbad)", "conversation_a": [user("q"), bot("x")], "conversation_b": [user("q"), bot("y")]},
         {"winner": "model_b", "conversation_a": [user("q"), bot("bad")], "conversation_b": [user("q"), bot("good")]}],
        "preference", PAIR),
    "arena_parts": (
        [{"winner": "model_a", "full_conversation": [],
          "conversation_a": [{"role": "user", "content": [{"type": "text", "text": "q", "image": None}]},
                             {"role": "assistant", "content": [{"type": "text", "text": "good", "image": None}]}],
          "conversation_b": [{"role": "user", "content": [{"type": "text", "text": "q", "image": None}]},
                             {"role": "assistant", "content": [{"type": "text", "text": "bad", "image": None}]}]}],
        "preference", PAIR),
    "arena_55k": (
        [{"prompt": '["q"]', "response_a": '["bad"]', "response_b": '["good"]', "winner_model_a": 0,
          "winner_model_b": 1, "winner_tie": 0}], "preference", PAIR),
    "arena_wsdm": (
        [{"prompt": "q", "response_a": "good", "response_b": "bad", "winner": "model_a"}], "preference", PAIR),
    "webgpt": (
        [{"question": {"full_text": "q", "id": "1"}, "answer_0": "bad", "answer_1": "good", "score_0": -0.5,
          "score_1": 0.5}], "preference", PAIR),
    "sharegpt": (
        [{"conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")}], "preference", PAIR),
    "sharegpt_system": (
        [{"system": "s", "conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")}], "preference",
        SYSTEM),
    "sharegpt_whole": (
        [{"chosen": [human("q"), gpt("good")], "rejected": [human("q"), gpt("bad")]}], "preference", PAIR),
    "axolotl": ([{"messages": [user("q")], "chosen": bot("good"), "rejected": bot("bad")}], "preference", PAIR),
    "openai": (
        [{"input": {"messages": [user("q")]}, "preferred_output": [bot("good")], "non_preferred_output": [bot("bad")]}],
        "preference", PAIR),
    "sharegpt_sequence": (  # a list of objects as an object of lists, as Sequence of `datasets` makes it
        [{"conversations": {"from": ["human"], "value": ["q"]}, "chosen": gpt("good"), "rejected": gpt("bad")}],
        "preference", PAIR),
    "turns_as_json": (
        [{"prompt": json.dumps([user("q")]), "chosen": json.dumps([bot("good")]),
          "rejected": json.dumps([bot("bad")])}],
        "preference", PAIR),
    "messages_as_python": ([{"messages": str([user("q"), bot("good")])}], "sft", ONE),
    "answers_that_look_like_turns": (  # but have a role that no chat has: texts
        [{"prompt": "q", "chosen": '[{"role": "admin", "content": "x"}]', "rejected": "bad"}], "preference",
        ("q", ['[{"role": "admin", "content": "x"}]</s>', "bad</s>"])),
    "swift": ([{"messages": [user("q"), bot("good")], "rejected_response": "bad"}], "preference", PAIR),
    "swift_messages": (
        [{"messages": [user("q"), bot("good")], "rejected_messages": [user("q"), bot("bad")]}], "preference", PAIR),
    "factory_alpaca": (
        [{"instruction": "a", "input": "q", "chosen": "good", "rejected": "bad"}], "preference",
        ("<t>user: a\nq<e><t>assistant: ", PAIR[1])),
    "factory_rounds": (
        [{"system": "s", "instruction": "q", "input": "", "history": [["a", "b"]], "chosen": "good",
          "rejected": "bad"}], "preference", ("<t>system: s<e><t>user: a<e><t>assistant: b<e>" + PAIR[0], PAIR[1])),
    "alpaca_two": ([{"instruction": "q", "input": "", "output": ["good", "bad"]}], "preference", PAIR),
    "code_pairs": ([{"input": "q", "accepted": "good", "rejected": "bad", "ID": 3}], "preference", PAIR),
    "stack_exchange": (
        [{"qid": 1, "question": "q", "response_j": "good", "response_k": "bad"}], "preference", PAIR),
    "chat_prompt": ([{"prompt": [user("q")], "chosen": "good", "rejected": "bad"}], "preference", PAIR),
    "text_prompt_turns": ([{"prompt": "q", "chosen": [bot("good")], "rejected": [bot("bad")]}], "preference", PAIR),
    "question_turns": ([{"question": "q", "chosen": [bot("good")], "rejected": [bot("bad")]}], "preference", PAIR),
    "hh": (  # fastpo's own: the prompt inside both texts
        [{"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}], "preference",
        ("\n\nHuman: q\n\nAssistant:", [" good</s>", " bad</s>"])),
    "hh_with_question": (
        [{"question": "q", "chosen": "q: good", "rejected": "q: bad"}], "preference",
        ("q:", [" good</s>", " bad</s>"])),
    "ready_prompt_with_system": (  # made ready before, with its system text inside: as it is
        [{"system": "s", "prompt": "<t>system: s<e><t>user: q<e><t>assistant: ", "chosen": "good", "rejected": "bad"}],
        "preference", (SYSTEM[0], ["good</s>", "bad</s>"])),
    "ids_pairs": (
        [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}], "preference", ([5, 6], [[7], [8, 9]])),
    "kto_sharegpt": (
        [{"conversations": [human("q"), gpt("good")], "kto_tag": True}], "unpaired", ONE),
    "kto_alpaca": (
        [{"instruction": "q", "input": "", "output": "good", "kto_tag": True}], "unpaired", ONE),
    "kto_messages": ([{"messages": [user("q"), bot("good")], "label": True}], "unpaired", ONE),
    "kto_thumbs": (
        [{"prompt": [user("q")], "completion": [bot("good")], "rating": "thumbs_up"}], "unpaired", ONE),
    "kto_response": ([{"prompt": "q", "response": "good", "label": 1}], "unpaired", ONE),
    "kto_ids": ([{"prompt_ids": [5], "completion_ids": [6, 7], "label": True}], "unpaired", ([5], [[6, 7]])),
    "sft_messages": ([{"messages": [user("q"), bot("good")]}], "sft", ONE),
    "sft_sharegpt": ([{"system": "s", "conversations": [human("q"), gpt("good")]}], "sft", (SYSTEM[0], ["good<e>"])),
    "sft_alpaca": ([{"instruction": "q", "input": "", "output": "good"}], "sft", ONE),
    "sft_dolly": ([{"instruction": "q", "context": "", "response": "good"}], "sft", ONE),
    "sft_questions": ([{"question": "q", "answer": "good"}], "sft", ONE),
    "sft_ready": ([{"prompt": "Q: q\nAnswer:", "response": " good"}], "sft", ("Q: q\nAnswer:", [" good</s>"])),
    "sft_text": ([{"text": "good"}], "sft", ("g", ["ood</s>"])),
    "sft_ids": ([{"input_ids": [5, 6, 7]}], "sft", ([5], [[6, 7]])),
    "sft_labels": ([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}], "sft", ([5, 6], [[7]])),
    "sft_ids_two": ([{"prompt_ids": [5, 6], "completion_ids": [7]}], "sft", ([5, 6], [[7]])),
}  # fmt: skip


def texts(example, tokenizer, form):
    prompt, responses = example.prompt_ids.tolist(), [r.tolist() for r in example.responses]
    if isinstance(form[0], list):
        return prompt, responses
    return tokenizer.decode(prompt), [tokenizer.decode(r) for r in responses]


@pytest.mark.parametrize("name", CERTAIN)
def test_converted(letters, name):
    rows, kind, expected = CERTAIN[name]
    examples, report = prepare_examples(rows, letters, kind=kind, columns=[])
    assert texts(examples[0], letters, expected) == expected
    assert len(examples) == 1 and sum(report.dropped.values()) == len(rows) - 1  # ties alone are dropped, and counted
    if kind == "unpaired":
        assert examples[0].response_columns["label"] == [1.0]


@pytest.mark.parametrize("source", ["jsonl", "parquet", "dataset", "pandas", "polars", "arrow", "generator", "stream"])
def test_every_source_gives_the_same_ids(letters, tmp_path, source):
    """As a list of dicts gives. Arrow fills nested objects up with nulls, and pandas has arrays for lists."""
    pyarrow = pytest.importorskip("pyarrow", reason="Arrow's sources")
    library = {"dataset": "datasets", "stream": "datasets", "pandas": "pandas", "polars": "polars"}.get(source, "json")
    module = pytest.importorskip(library)
    for name, (rows, kind, expected) in CERTAIN.items():
        path = tmp_path / f"{name}.{source}"
        if source == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif source == "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        given = {
            "dataset": lambda rows: module.Dataset.from_list(rows),
            "stream": lambda rows: module.Dataset.from_list(rows).to_iterable_dataset(),
            "pandas": lambda rows: pyarrow.Table.from_pylist(rows).to_pandas(),
            "polars": lambda rows: module.DataFrame(rows),
            "arrow": pyarrow.Table.from_pylist,
            "generator": iter,
        }.get(source, lambda rows, path=path: path)(rows)
        examples, report = prepare_examples(given, letters, kind=kind, columns=[])
        assert texts(examples[0], letters, expected) == expected, name
        assert report.rows == len(rows) and len(examples) == 1, name


REFUSED = {
    "pku_two_verdicts": (
        [{"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1, "safer_response_id": 0}],
        "preference", "are two columns: choose one"),
    "summaries": (
        [{"info": {"post": "q", "id": "x"}, "summaries": [{"text": "bad"}, {"text": "good"}], "choice": 1}],
        "preference", "how the summary is asked for"),
    "helpsteer": (
        [{"prompt": "q", "response": "bad", "helpfulness": 1}, {"prompt": "q", "response": "good", "helpfulness": 4}],
        "preference", "rows of one prompt stand beside each other"),
    "helpsteer3": (
        [{"context": [user("q")], "response1": "good", "response2": "bad"}], "preference", "overall_preference"),
    **{column: ([{column: "q", "chosen": "good", "rejected": "bad"}], "preference", f"'{column}' holds the prompt")
       for column in ("question", "input", "instruction", "query", "context")},
    "rating": (
        [{"prompt": [user("q")], "completion": [bot("good")], "rating": 5}], "unpaired", "which ratings are good ones"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_line_of_an_error_works_when_pasted(letters, name):
    datasets = pytest.importorskip("datasets", reason="the lines are of that library")
    rows, kind, why = REFUSED[name]
    for given in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(DataError, match=why) as caught:
            prepare_examples(given, letters, kind=kind)
    message = str(caught.value)
    assert "\n" not in message
    at = re.search(r": (\[\{|dataset\.map)", message).start() + 2
    dataset = datasets.Dataset.from_list(rows)
    mended = eval(message[at:], {"dataset": dataset, "list": list, "zip": zip, "max": max, "min": min})
    examples, _ = prepare_examples(mended, letters, kind=kind)
    prompt, responses = texts(examples[0], letters, PAIR)
    if name == "summaries":
        assert (prompt, responses) == ("q\n\nTL;DR:", ["good</s>", "bad</s>"])
    else:
        assert prompt == PAIR[0] and responses == PAIR[1][: len(responses)]
    if "rename_column" in message:
        renamed = eval(re.search(r"dataset\.rename_column\([^)]*\)", message).group(), {"dataset": dataset})
        assert texts(prepare_examples(renamed, letters)[0][0], letters, PAIR) == ("q", ["good</s>", "bad</s>"])


def test_every_refused_layout_is_tried():
    tried = {find(set(rows[0]), rows, (kind,)).name for rows, kind, _ in REFUSED.values()}
    lines = {layout.name for layout in LAYOUTS if layout.line}
    assert {name for name in lines - tried if "for a prompt" not in name} == set()
    named = [find(set(rows[0]), rows, (kind,)) for rows, kind, _ in CERTAIN.values()]
    untried = {layout.name for layout in LAYOUTS if not layout.line} - {layout.name for layout in named if layout}
    assert untried == set()


def test_without_recognition_rows_are_as_they_are(letters):
    rows, kind, _ = CERTAIN["orca"]
    with pytest.raises(DataError, match="those of pairs with a system text.*recognise_layouts=true reads them"):
        prepare_examples(rows, letters, kind=kind, recognise=False)


def test_one_line_says_what_was_read(letters, caplog):
    caplog.set_level("INFO", logger="fastpo")
    _, report = prepare_examples(CERTAIN["shp"][0] * 3, letters, columns=[])
    lines = [r.getMessage() for r in caplog.records]
    assert [line for line in lines if "read as SHP" in line and "recognise_layouts=false" in line] == lines
    assert "history -> prompt" in report.reading


def test_scores_under_other_names_are_read_where_a_loss_reads_them(letters):
    rows = CERTAIN["ultrafeedback_trl"][0]
    examples, report = prepare_examples(rows, letters, columns=["chosen_score", "rejected_score"])
    assert examples[0].response_columns == {"score": [8.0, 2.0]}
    assert "score_chosen, score_rejected -> chosen_score, rejected_score" in report.reading
    examples, report = prepare_examples(rows, letters, columns=[])
    assert examples[0].response_columns == {} and report.reading == ""
    argilla = CERTAIN["ultrafeedback_argilla"][0]
    examples, _ = prepare_examples(argilla, letters, columns=["chosen_score", "rejected_score"])
    assert examples[0].response_columns == {"score": [5.0, 3.0]}


def test_masks_of_token_ids(letters):
    """What is not trained after the first trained token weighs 0; rows without a mask weigh 1."""
    rows = [
        {"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]},
        {"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1]},
    ]
    examples, _ = prepare_examples(rows, letters, kind="sft")
    assert [e.prompt_ids.tolist() for e in examples] == [[5], [5]]
    assert [e.token_weights[0].tolist() for e in examples] == [[1, 0, 1], [1, 1]]
    for row, message in [
        ({"input_ids": [5, 6], "labels": [-100]}, "row 0: 'labels' has 1 entries and 'input_ids' 2"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "row 0: 'input_ids' has no token to train on"),
        ({"input_ids": [5, 10**6]}, "row 0: token id 1000000 is none of the tokenizer's 259 tokens"),
        ({"input_ids": [5, 6, None]}, "row 0: 'completion' has None, which is no token id"),
        ({"input_ids": [5, -1]}, "row 0: 'completion' has -1, which is no token id"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare_examples([row], letters, kind="sft")


def test_messages_are_trained_from_the_first_turn_of_the_assistant(letters):
    turns = [user("a"), bot("b"), user("c"), bot("d"), user("e")]
    examples, _ = prepare_examples([{"messages": turns}], letters, kind="sft")
    assert letters.decode(examples[0].prompt_ids) == "<t>user: a<e><t>assistant: "
    assert letters.decode(examples[0].responses[0]) == "b<e><t>user: c<e><t>assistant: d<e>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"human_ref_B": None}, "row 1: column 'human_ref_B' is None"),
        ({"human_ref_B": 3}, "row 1: column 'human_ref_B' must be a text, not 3"),
        ({"labels": 2}, "row 1: column 'labels' must be 0 or 1, not 2"),
        ({"labels": None}, "row 1: column 'labels' must be a number, not None"),
    ],
)
def test_a_row_that_does_not_fit_is_named(letters, change, message):
    rows = CERTAIN["shp"][0] * 2
    rows[1] = rows[1] | change
    with pytest.raises(DataError, match=message):
        prepare_examples(rows, letters, columns=[])
    examples, report = prepare_examples(rows, letters, columns=[], invalid="drop")
    assert len(examples) == 1 and sum(report.dropped.values()) == 1


def test_a_first_row_that_is_a_tie_decides_nothing(letters):
    tie = {"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": 0}
    with pytest.raises(DataError, match="none of the first 2 rows can be trained on: row 0: tie in 'preference_str"):
        prepare_examples([tie, tie], letters)


def test_no_chat_template(letters):
    plain = PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer, eos_token="</s>")
    with pytest.raises(DataError, match=r"no chat template: .*\(the rows are read as SHP"):
        prepare_examples(CERTAIN["shp"][0], plain, columns=[])


@pytest.mark.parametrize(
    ("name", "losses", "kind"),
    [("orca", "pairs", "preference"), ("orca", "unpaired", "preference"), ("orca", "sft", "preference"),
     ("kto_messages", "unpaired", "unpaired"), ("sft_messages", "sft", "sft"), ("shp", "unpaired", "preference"),
     ("ultrafeedback", "unpaired", "unpaired"), ("sft_text", "sft", "sft"), ("ultrafeedback", "sft", "preference")],
)  # fmt: skip
def test_kind_of(name, losses, kind):
    rows = CERTAIN[name][0]
    assert kind_of(list(rows[0]), rows, losses) == kind


def test_own_columns_are_no_layout():
    for row in ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": [user("q")], "chosen": [bot("a")],
                                                                  "rejected": [bot("b")]}):  # fmt: skip
        assert read_as(list(row), [row], "preference", None).layout is None
    for row in ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a", "label": True}):
        assert find(list(row), [row], ("sft", "unpaired")) is None


def test_a_prompt_under_any_other_name_is_not_lost(letters):
    """TRL trains these without their prompts, in silence."""
    rows = [{"task_text": f"What is {n}?", "chosen": f"{n}.", "rejected": f"No {n}."} for n in range(5)]
    with pytest.raises(DataError, match="no column 'prompt': if it is in 'task_text', dataset.rename_column") as caught:
        prepare_examples(rows, letters)
    assert "dataset.remove_columns(['task_text'])" in str(caught.value)
    inside = [{"id": "x", "chosen": f"What is {n}? It is {n}.", "rejected": f"What is {n}? No."} for n in range(5)]
    examples, _ = prepare_examples(inside, letters)
    assert letters.decode(examples[3].prompt_ids) == "What is 3?"


def test_docs_page():
    from pathlib import Path

    from fastpo.data import docs

    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    assert docs.page(text) == text  # `python -m fastpo.data.docs` makes it
    for layout in LAYOUTS:
        assert all(f"`{name}`" in text for name in layout.shapes), layout.name


@pytest.mark.parametrize("seed", range(3))
def test_no_row_raises_anything_raw_and_none_is_lost(letters, seed):
    """Junk in the place of any column, key or entry of any layout's row."""
    numpy = pytest.importorskip("numpy")
    rng = random.Random(seed)
    junk = [None, "", 0, -1, True, math.nan, math.inf, 1e308, 10**400, 10**5000, "\ud800", "[1", b"b", [], [None], [[]],
            ["a"], [1, "a"], {}, [{"role": "user"}], [{"role": None, "content": "x"}], [{"from": [1], "value": {}}],
            [{"role": "user", "content": "x"}, 5], [{"role": "assistant", "content": numpy.array([1, 2])}],
            numpy.array([1, 2]), object(), {1: 2}, set(), [{"text": "a", "score": "x"}], {"text": None}]  # fmt: skip
    own = {"own": ([{"prompt": "q", "chosen": "a", "rejected": "b", "weight": 1.0, "chosen_score": 1.0,
                     "rejected_score": 0.5}], "preference"),
           "kway": ([{"prompt": "q", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]}],
                    "preference")}  # fmt: skip
    every = {**{name: entry[:2] for name, entry in {**CERTAIN, **REFUSED}.items()}, **own}
    for _ in range(150):
        rows, kind = every[rng.choice(list(every))]
        changed = json.loads(json.dumps(rows[0]))
        name = rng.choice([*changed, "tools", "weight", "system", 5])
        inner = changed.get(name)
        if isinstance(inner, list) and inner and isinstance(inner[0], dict) and rng.random() < 0.5:
            inner[0][rng.choice(list(inner[0]))] = rng.choice(junk)
        else:
            changed[name] = rng.choice(junk)
        rows = [*rows, changed, *rows] if rng.random() < 0.7 else [changed, *rows]
        for invalid in ("raise", "drop"):
            try:
                examples, report = prepare_examples(rows, letters, kind=kind, invalid=invalid)
            except FastpoError as error:
                assert "\n" not in str(error)
            else:
                assert report.rows == len(rows) == len(examples) + sum(report.dropped.values())

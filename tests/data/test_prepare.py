"""Rows to token ids, against expectations written by hand and against TRL's own tokenisation where TRL is installed.

Tokenizers are built here: a word-level one, whose ids can be read as words, and byte-level BPE, whose tokens merge
across the boundary of prompt and response.
"""

import gzip
import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastpo.data import describe_example, prepare_examples, require_columns
from fastpo.errors import DataError

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_dialogues.jsonl.gz"
WORDS = "the sky grass is blue green red of what colour system user assistant tool think : ?".split()
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|nl|>"]
# As Qwen's: a turn is <|im_start|>role content<|im_end|>; tools go first; thinking can be switched off.
TEMPLATE = (
    "{% if tools %}<|im_start|> tool {% for t in tools %}{{ t['name'] }} {% endfor %}<|im_end|><|nl|>{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'bad' %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|> {{ m['role'] }} : {{ m['content'] }}<|im_end|><|nl|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant :"
    "{% if thinking is defined and thinking %} think{% endif %}{% endif %}"
)


def word_tokenizer(bos=False, eos=False, chat=False, **names):
    """Word-level; `bos` and `eos` make it add <s> in front and </s> behind by itself."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or eos:
        single = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", SPECIAL.index("<s>")), ("</s>", SPECIAL.index("</s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **names}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|nl|>"], **names
    )
    if chat:
        wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def bpe():
    """Byte-level BPE with merges across words, so that a boundary is anywhere inside a token."""
    rng = random.Random(0)
    lines = ["".join(rng.choice("ab  c\nd") for _ in range(60)) for _ in range(300)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|eos|>", "<|im_start|>", "<|im_end|>", "<|nl|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|eos|>", additional_special_tokens=special[1:]
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def words(tokenizer, ids):
    assert isinstance(ids, np.ndarray) and ids.dtype == np.int32
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def one(rows, tokenizer, **options):
    """(prompt, [responses], report) of a single row, as words."""
    examples, report = prepare_examples(rows if isinstance(rows, list) else [rows], tokenizer, **options)
    assert len(examples) == 1
    return words(tokenizer, examples[0].prompt_ids), [words(tokenizer, r) for r in examples[0].responses], report


PAIR = {"prompt": "the sky is", "chosen": " blue", "rejected": " green grass"}


def turn(role, content):
    return {"role": role, "content": content}


CHAT = {
    "prompt": [turn("user", "what colour is the sky ?")],
    "chosen": [turn("assistant", "blue")],
    "rejected": [turn("assistant", "green")],
}
CHAT_PROMPT = "<|im_start|> user : what colour is the sky ? <|im_end|> <|nl|> <|im_start|> assistant :"


# ---- ids


@pytest.mark.parametrize("bos", [False, True], ids=["no_bos", "bos"])
def test_texts(bos):
    prompt, responses, report = one(PAIR, word_tokenizer(bos=bos))
    assert prompt == "<s> " * bos + "the sky is"
    assert responses == ["blue </s>", "green grass </s>"]
    assert (report.rows, report.kept, report.dropped, report.warnings) == (1, 1, {}, [])


def test_implicit_prompt():
    row = {"chosen": "the sky is blue", "rejected": "the sky is green"}
    assert one(row, word_tokenizer())[:2] == ("the sky is", ["blue </s>", "green </s>"])
    row = {name: [*CHAT["prompt"], *CHAT[name]] for name in ("chosen", "rejected")}
    tokenizer = word_tokenizer(chat=True)
    assert one(row, tokenizer)[:2] == one(CHAT, tokenizer)[:2]
    # The prompt's text in its own column beside whole conversations: the conversations decide.
    assert one({"prompt": "what colour is the sky ?", **row}, tokenizer)[:2] == one(CHAT, tokenizer)[:2]


def test_conversations_end_as_the_template_ends_them():
    prompt, responses, report = one(CHAT, word_tokenizer(bos=True, chat=True))
    assert prompt == CHAT_PROMPT  # the template is all: the tokenizer's own BOS stays away
    assert responses == ["blue <|im_end|> <|nl|>", "green <|im_end|> <|nl|>"]
    assert report.warnings == []


@pytest.mark.parametrize("tools", [[{"name": "grass"}], '[{"name": "grass"}]'], ids=["list", "json"])
def test_tools_and_template_kwargs(tools):
    row = {**CHAT, "tools": tools, "chat_template_kwargs": {"thinking": False}}
    assert one(row, word_tokenizer(chat=True))[0] == "<|im_start|> tool grass <|im_end|> <|nl|> " + CHAT_PROMPT


def test_a_prompt_that_the_template_writes_differently_alone():
    """The generation prompt ends in a word that the whole conversation has not: the boundary moves before it."""
    row = {**CHAT, "chat_template_kwargs": {"thinking": True}}
    prompt, responses, report = one(row, word_tokenizer(chat=True))
    assert prompt == CHAT_PROMPT
    assert responses[0] == "blue <|im_end|> <|nl|>"
    assert report.boundary_moved == 1
    assert len(report.warnings) == 1 and "'think'" in report.warnings[0]


def test_sft_rows():
    row = {"prompt": "the sky is", "completion": " blue"}
    examples, report = prepare_examples([row], word_tokenizer(), kind="sft")
    assert words(word_tokenizer(), examples[0].responses[0]) == "blue </s>"
    assert examples[0].pairs == [] and len(examples[0].responses) == 1
    chat = {"prompt": CHAT["prompt"], "completion": CHAT["chosen"]}
    assert one(chat, word_tokenizer(chat=True), kind="sft")[:2] == (CHAT_PROMPT, ["blue <|im_end|> <|nl|>"])


def test_eos_is_not_doubled():
    row = {**PAIR, "chosen": " blue</s>"}
    assert one(row, word_tokenizer())[1][0] == "blue </s>"


def test_tokenizer_that_adds_bos_and_eos():
    prompt, responses, report = one(PAIR, word_tokenizer(bos=True, eos=True))
    assert (prompt, responses) == ("<s> the sky is", ["blue </s>", "green grass </s>"])
    assert report.doubled_specials == 1 and report.boundary_moved == 0


def test_pre_rendered_chat_gives_the_conversation_s_ids(caplog):
    """One BOS (with a warning), and nothing behind the end of turn."""
    tokenizer = word_tokenizer(bos=True, chat=True)
    tokenizer.chat_template = "<s>" + TEMPLATE
    render = tokenizer.apply_chat_template
    prompt = render(CHAT["prompt"], tokenize=False, add_generation_prompt=True)
    whole = {name: render(CHAT["prompt"] + CHAT[name], tokenize=False) for name in ("chosen", "rejected")}
    texts = {"prompt": prompt, **{name: text.removeprefix(prompt) for name, text in whole.items()}}
    with caplog.at_level(logging.WARNING, logger="fastpo.data"):
        prompt, responses, report = one([texts], tokenizer)
    assert (prompt, responses) == one(CHAT, tokenizer)[:2]
    assert prompt.startswith("<s> <|im_start|>")
    assert (report.doubled_specials, report.own_endings) == (1, 2)
    assert len([r for r in caplog.records if "second one was removed" in r.message]) == 1


def test_fuzz_boundary(bpe):
    """Any split of any text: prompt + response is the whole text's ids, and the prompt the longest common beginning."""
    rng = random.Random(1)
    rows = []
    for _ in range(400):
        texts = ["".join(rng.choice("ab  c\nd") for _ in range(rng.randint(low, 30))) for low in (1, 1, 1)]
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts)))
    examples, report = prepare_examples(rows, bpe, invalid="drop")
    assert report.kept + sum(report.dropped.values()) == 400
    assert report.kept > 300 and report.boundary_moved > 50
    for example, number in zip(examples, report.kept_rows):
        row = rows[number]
        alone = bpe(row["prompt"])["input_ids"]
        wholes = [bpe(row["prompt"] + row[name] + "<|eos|>")["input_ids"] for name in ("chosen", "rejected")]
        shared = 0
        while shared < len(alone) and all(w[shared : shared + 1] == [alone[shared]] for w in wholes):
            shared += 1
        assert example.prompt_ids.tolist() == alone[:shared]
        for response, whole in zip(example.responses, wholes):
            assert example.prompt_ids.tolist() + response.tolist() == whole


def test_many_rows_in_order_and_processes(bpe):
    rows = [{"prompt": f"a{i}", "chosen": f" b{i % 7}", "rejected": " c"} for i in range(2300)]
    examples, report = prepare_examples(rows, bpe)
    assert report.kept_rows == list(range(2300))
    assert [bpe.decode(e.responses[0]) for e in examples[::500]] == [f" b{i % 7}<|eos|>" for i in range(0, 2300, 500)]
    parallel, parallel_report = prepare_examples(rows, bpe, num_proc=2)
    assert parallel_report == report
    assert all((a.prompt_ids == b.prompt_ids).all() for a, b in zip(examples, parallel, strict=True))


def test_datasets_give_the_same(bpe):
    datasets = pytest.importorskip("datasets", reason="the datasets extra")
    rows = [{**CHAT, "tools": None, "win_prob": 0.5}, {**CHAT, "tools": '[{"name": "red"}]', "win_prob": 0.25}]
    rows[1] = {**rows[1], "chosen": [turn("assistant", "red")]}
    from_list, _ = prepare_examples(rows, bpe)
    from_dataset, report = prepare_examples(datasets.Dataset.from_list(rows).with_format("numpy"), bpe)
    for a, b in zip(from_list, from_dataset, strict=True):
        assert a.prompt_ids.tolist() == b.prompt_ids.tolist()
        assert [r.tolist() for r in a.responses] == [r.tolist() for r in b.responses]
        assert a.pair_columns == b.pair_columns
    assert report.columns == ["prompt", "chosen", "rejected", "tools", "win_prob"]


# ---- truncation


def test_keep_start():
    row = {"prompt": "the sky is", "chosen": " blue", "rejected": " green grass of red"}
    prompt, responses, report = one(row, word_tokenizer(), max_length=5)
    assert prompt == "the sky is"
    assert responses == ["blue </s>", "green grass"]  # no EOS on what was cut
    assert (report.truncated, report.truncated_eos, report.responses) == (1, 1, 2)
    assert "1 of 2 responses truncated at max_length 5 (1 lost their end of sequence)" in report.summary()
    # A conversation's end of turn counts as its end.
    report = one(CHAT, word_tokenizer(chat=True), max_length=15)[2]
    assert (report.truncated, report.truncated_eos) == (2, 2)


def test_prompt_that_fills_max_length():
    rows = [PAIR, {"prompt": "the sky of the sky is", "chosen": " blue", "rejected": " red"}]
    examples, report = prepare_examples(rows, word_tokenizer(), max_length=6)
    assert (report.kept, report.kept_rows, report.dropped) == (1, [0], {"prompt fills max_length": 1})
    assert "1 of 2 rows kept; 1 dropped: prompt fills max_length" in report.summary()
    with pytest.raises(DataError, match=r"no row is left to train on: 0 of 2 rows kept; 2 dropped"):
        prepare_examples(rows, word_tokenizer(), max_length=3)


def test_pairs_made_identical_by_truncation_are_dropped():
    rows = [PAIR, {"prompt": "the sky is", "chosen": " blue", "rejected": " blue of the grass"}]
    report = one(rows, word_tokenizer(), max_length=4)[2]
    assert report.dropped == {"identical pair after truncation": 1}


def test_keep_end():
    row = {"prompt": "what colour is the sky", "chosen": " blue", "rejected": " green grass of"}
    tokenizer = word_tokenizer()
    options = {"max_length": 6, "truncation_mode": "keep_end"}
    examples, report = prepare_examples([row], tokenizer, **options)
    example = examples[0]
    assert [words(tokenizer, p) for p in example.response_prompts] == ["colour is the sky", "the sky"]
    assert words(tokenizer, example.prompt_ids) == "the sky"
    assert [words(tokenizer, r) for r in example.responses] == ["blue </s>", "green grass of </s>"]
    assert (report.truncated, report.truncated_eos, report.truncated_prompts) == (0, 0, 1)
    # A response longer than max_length: its first kept token is context only, as nothing predicts it.
    options["max_length"] = 3
    example = prepare_examples([row], tokenizer, **options)[0][0]
    assert [words(tokenizer, p) for p in example.response_prompts] == ["sky", "grass"]
    assert [words(tokenizer, r) for r in example.responses] == ["blue </s>", "of </s>"]
    # Nothing cut: one prompt.
    options["max_length"] = 20
    assert prepare_examples([row], tokenizer, **options)[0][0].response_prompts is None


# ---- optional columns


def test_optional_columns():
    row = {**PAIR, "weight": 2, "win_prob": 0.75, "win_prob_chosen": 0.75, "win_prob_rejected": np.float32(0.5)}
    row |= {"chosen_score": 8.5, "rejected_score": -3, "ref_chosen_logps": -1.5, "ref_rejected_logps": 0.0}
    tokenizer = word_tokenizer()
    example = prepare_examples([row], tokenizer)[0][0]
    assert example.pair_columns == {
        "weight": [2.0],
        "win_prob": [0.75],
        "win_prob_chosen": [0.75],
        "win_prob_rejected": [0.5],
    }
    assert example.response_columns == {"score": [8.5, -3.0], "ref_logps": [-1.5, 0.0]}
    example = prepare_examples([{**row, "chosen_score": None}], tokenizer, columns=("weight",))[0][0]
    assert (example.pair_columns, example.response_columns) == ({"weight": [2.0]}, {})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"win_prob": float("nan")}, r"row 1: column 'win_prob' is nan, expected a number from 0 to 1"),
        ({"win_prob": 1.5}, r"row 1: column 'win_prob' is 1.5, expected a number from 0 to 1"),
        ({"win_prob": None}, r"row 1: column 'win_prob' is None"),
        ({"win_prob": "0.5"}, r"row 1: column 'win_prob' is '0.5'"),
        ({"weight": -1.0}, r"row 1: column 'weight' is -1.0, expected a finite number, at least 0"),
        ({"weight": True}, r"row 1: column 'weight' is True"),
        ({"chosen_score": float("inf"), "rejected_score": 1.0}, r"row 1: column 'chosen_score' is inf"),
        ({"ref_chosen_logps": 3.0, "ref_rejected_logps": -1.0}, r"is 3.0, expected a finite number, at most 0"),
        ({"chosen": " green grass"}, r"row 1: 'chosen' and 'rejected' are identical"),
        ({"chosen": " green  grass"}, r"row 1: 'chosen' and 'rejected' have the same token ids"),
        ({"chosen": ""}, r"row 1: 'chosen' is empty"),
        ({"rejected": None}, r"row 1: column 'rejected' is None"),
        ({"prompt": ""}, r"row 1: the prompt is empty, so no token is left"),
        ({"prompt": "the", "chosen": "sky", "rejected": "red"}, r"row 1: the prompt merges whole into the first token"),
    ],
)
def test_invalid_rows_are_refused_or_dropped(columns, message):
    optional = {"win_prob": 0.5, "weight": 1.0, "chosen_score": 1.0, "rejected_score": 0.5}
    good = {**PAIR, **optional, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}
    rows = [good, {**good, **columns}]
    with pytest.raises(DataError, match=message) as caught:
        prepare_examples(rows, word_tokenizer())
    assert "\n" not in str(caught.value) and "invalid_rows='drop'" in str(caught.value)
    report = one(rows, word_tokenizer(), invalid="drop")[2]
    assert (report.kept_rows, sum(report.dropped.values())) == ([0], 1)


def test_an_empty_prompt_is_fine_behind_a_bos():
    assert one({**PAIR, "prompt": ""}, word_tokenizer(bos=True))[0] == "<s>"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": []}, "row 1: the prompt is empty"),
        ({"chosen": []}, "row 1: 'chosen' is empty"),
        ({"chosen": [{"role": "assistant", "content": "", "tool_calls": None}]}, "row 1: 'chosen' is empty"),
        ({"chosen": [turn("bad", "blue")]}, "row 1: the chat template failed: TemplateError: unknown role"),
    ],
)
def test_invalid_conversations(columns, message):
    rows = [CHAT, {**CHAT, **columns}, CHAT]
    tokenizer = word_tokenizer(chat=True)
    with pytest.raises(DataError, match=message):
        prepare_examples(rows, tokenizer)
    examples, report = prepare_examples(rows, tokenizer, invalid="drop")
    assert report.kept_rows == [0, 2] and sum(report.dropped.values()) == 1
    assert words(tokenizer, examples[1].prompt_ids) == CHAT_PROMPT


# ---- what is wrong with all rows


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, {}, "'chosen' is missing .* did you mean 'choosen'"),
        ({"promt": "a", "chosen": "b", "rejected": "c"}, {}, "no column 'prompt' but 'promt': did you mean"),
        ({"question": "a", "good": "b", "bad": "c"}, {}, "'chosen' is missing from 'question', .* rename the column"),
        ({"prompt": "a", "completion": "b"}, {}, "rows with 'completion' are for loss_type='sft'"),
        (PAIR, {"kind": "sft"}, "sft rows need the columns 'prompt', 'completion'; 'completion' is missing .* rename"),
        ({**PAIR, "chosen_score": 1.0}, {}, "'chosen_score' needs 'rejected_score'"),
        ({**PAIR, "win_prob_rejected": 1.0}, {}, "'win_prob_rejected' needs 'win_prob_chosen'"),
        ({**PAIR, "images": []}, {}, "'images' is not supported"),
        ({**PAIR, "rejected": CHAT["rejected"]}, {}, "'prompt' is a text, 'chosen' is a text, 'rejected' is a conv"),
        ({**PAIR, "chosen": 3}, {}, "row 0: column 'chosen' must be a text or a list of turns, found a int"),
        ({**PAIR, "chosen": ["blue"]}, {}, "found a list of str"),
        ({**PAIR, "chosen": [{"from": "gpt", "value": "x"}]}, {}, "need the keys 'role' and 'content', found 'from'"),
        (CHAT, {}, "the tokenizer has no chat template: set tokenizer.chat_template"),
        (PAIR, {"max_length": 1}, "max_length=1"),
        (PAIR, {"truncation_mode": "middle"}, "expected one of 'keep_start', 'keep_end'"),
    ],
)
def test_wrong_columns(row, options, message):
    with pytest.raises(DataError, match=message) as caught:
        prepare_examples([row, row], word_tokenizer(), **options)
    assert "\n" not in str(caught.value)


def test_a_row_that_differs():
    tokenizer = word_tokenizer(chat=True)
    with pytest.raises(DataError, match="row 1: column 'prompt' is a conversation, where it is a text in the rows"):
        prepare_examples([PAIR, CHAT], tokenizer)
    with pytest.raises(DataError, match="row 1 has no column 'chosen': did you mean 'chosn'"):
        prepare_examples([PAIR, {"prompt": "a", "chosn": "b", "rejected": "c"}], tokenizer, invalid="drop")
    with pytest.raises(DataError, match="row 0 has no column 'prompt'"):
        prepare_examples([{"chosen": "a b", "rejected": "a c"}, PAIR], tokenizer)
    with pytest.raises(DataError, match="row 0: column 'weight' is None"):
        prepare_examples([PAIR, {**PAIR, "weight": 1.0}], tokenizer)
    with pytest.raises(DataError, match="the dataset has no rows"):
        prepare_examples([], tokenizer)


def test_tokenizer_without_eos_or_pad():
    with pytest.raises(DataError, match="no EOS token.* set it, as tokenizer.eos_token"):
        prepare_examples([PAIR], word_tokenizer(eos_token=None))
    assert one(CHAT, word_tokenizer(chat=True, eos_token=None))[0] == CHAT_PROMPT  # the template ends the turns
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token is None
    one(PAIR, tokenizer)
    assert tokenizer.pad_token is None
    with pytest.raises(DataError, match="must be a tokenizer, not a SimpleNamespace"):
        prepare_examples([PAIR], SimpleNamespace(image_processor=None, tokenizer=tokenizer))


def test_warnings_are_said_once(caplog):
    rows = [
        {"prompt": f"{p} ", "chosen": f"{p} blue", "rejected": f"{p} red", "wieght": 1, "tools": None} for p in WORDS
    ]
    with caplog.at_level(logging.WARNING, logger="fastpo.data"):
        report = prepare_examples(rows, word_tokenizer())[1]
    said = [record.getMessage() for record in caplog.records]
    assert said == report.warnings and len(said) == 3
    assert any("begin with the prompt, which then stands twice" in message for message in said)
    assert any("'wieght' is not read: did you mean 'weight'?" in message for message in said)
    assert any("'tools' is not used" in message for message in said)
    row = {**PAIR, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}
    assert "must be of the truncated" in one(row, word_tokenizer(), max_length=4)[2].warnings[0]
    row = {"prompt": "the", "completion": " sky", "weight": 1.0}
    assert "'weight' are not used for sft" in one(row, word_tokenizer(), kind="sft")[2].warnings[0]


# ---- for the trainer


def test_require_columns():
    examples, report = prepare_examples([{**PAIR, "win_prob": 0.5, "chosen_scores": 1.0}], word_tokenizer())
    require_columns(examples, ["win_prob", ("win_prob_chosen", "win_prob")], "sppo")
    with pytest.raises(DataError) as caught:
        require_columns(examples, ["chosen_score"], "nca", report.columns)
    assert str(caught.value) == (
        "loss_type='nca' needs the column 'chosen_score' with 'rejected_score', which the dataset has not: "
        "did you mean 'chosen_scores'?"
    )
    with pytest.raises(DataError, match="'sppo' needs the column 'win_prob_chosen' or 'weight', which"):
        require_columns(examples, [("win_prob_chosen", "weight")], "sppo")


def test_describe_example():
    tokenizer = word_tokenizer()
    rows = [{**PAIR, "win_prob": 0.5}, {**PAIR, "rejected": " grass " * 300, "win_prob": 0.5}]
    examples, _ = prepare_examples(rows, tokenizer)
    lines = describe_example(examples[0], tokenizer).splitlines()
    assert lines == [
        "prompt          3 tokens, context, no loss: 'the sky is'",
        "chosen          2 tokens, trained on: 'blue </s>'",
        "rejected        3 tokens, trained on: 'green grass </s>'",
        "columns    win_prob [0.5]",
    ]
    assert len(describe_example(examples[1], tokenizer)) < 1000
    cut, _ = prepare_examples(rows[1:], tokenizer, max_length=4, truncation_mode="keep_end")
    assert describe_example(cut[0], tokenizer).count("prompt ") == 2
    sft, _ = prepare_examples([{"prompt": "the", "completion": " sky"}], tokenizer, kind="sft", max_length=2)
    assert "completion      1 tokens, trained on (no EOS at the end): 'sky'" in describe_example(sft[0], tokenizer)


# ---- parity with TRL


def trl_rows(rows, tokenizer, max_length, truncation_mode):
    """TRL's own preparation and collator: [(input_ids, completion mask), ...], chosen then rejected of each row."""
    pytest.importorskip("trl", reason="TRL is in the bench extra only")
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    args = SimpleNamespace(max_length=max_length, truncation_mode=truncation_mode, dataset_num_proc=None)
    rows = Dataset.from_list(rows)
    prepared = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")
    collate = DataCollatorForPreference(0, max_length, truncation_mode)
    result = []
    for row in prepared:
        batch = collate([row])
        for k in range(2):
            real = batch["attention_mask"][k].bool()
            result.append((batch["input_ids"][k][real].tolist(), batch["completion_mask"][k][real].tolist()))
    return result


def our_rows(examples):
    result = []
    for example in examples:
        for k, response in enumerate(example.responses):
            prompt = example.prompt_ids if example.response_prompts is None else example.response_prompts[k]
            result.append((prompt.tolist() + response.tolist(), [0] * len(prompt) + [1] * len(response)))
    return result


TRUNCATIONS = [(None, "keep_start"), (128, "keep_start"), (128, "keep_end")]


@pytest.mark.parametrize(("max_length", "mode"), TRUNCATIONS, ids=["whole", "keep_start", "keep_end"])
def test_parity_with_trl_on_real_dialogues(max_length, mode):
    pytest.importorskip("trl", reason="TRL is in the bench extra only")
    if not HH.exists():
        pytest.skip(f"{HH} is not here")
    with gzip.open(HH, "rt") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator((row["chosen"] for row in rows), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

    examples, report = prepare_examples(rows, tokenizer, max_length=max_length, truncation_mode=mode, invalid="drop")
    theirs = trl_rows(rows, tokenizer, max_length, mode)
    ours = our_rows(examples)
    left_out = report.dropped.get("identical pair after truncation", 0)
    if left_out:  # TRL trains on these: their loss is a constant
        pairs = zip(theirs[::2], theirs[1::2])
        theirs = [side for pair in pairs if pair[0] != pair[1] for side in pair]
    assert len(ours) == len(theirs) == 2 * report.kept
    assert report.boundary_moved > 10
    for (ids, mask), (trl_ids, trl_mask) in zip(ours, theirs):
        assert ids == trl_ids
        # A response that fills the window: its first token is context here, and shifted out of the loss there.
        assert mask[1:] == trl_mask[1:]


def test_parity_with_trl_on_conversations(bpe):
    pytest.importorskip("trl", reason="TRL is in the bench extra only")
    rng = random.Random(2)

    def text():
        return "".join(rng.choice("ab  c\nd") for _ in range(rng.randint(1, 40)))

    rows = []
    for i in range(60):
        prompt = [turn("system", text())] * (i % 2) + [turn("user", text()), turn("assistant", text())] * (i % 3)
        rows.append(
            {
                "prompt": [*prompt, turn("user", text())],
                "chosen": [turn("assistant", text())],
                "rejected": [turn("assistant", text())],
                "tools": json.dumps([{"name": text()}]) if i % 4 else None,
                "chat_template_kwargs": {"thinking": bool(i % 5)},
            }
        )
    for max_length, mode in ((None, "keep_start"), (90, "keep_start"), (90, "keep_end")):
        examples, report = prepare_examples(rows, bpe, max_length=max_length, truncation_mode=mode)
        theirs = trl_rows(rows, bpe, max_length, mode)
        assert our_rows(examples) == theirs, (max_length, mode)
        assert report.boundary_moved > 0
    implicit = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    assert our_rows(prepare_examples(implicit, bpe)[0]) == trl_rows(implicit, bpe, None, "keep_start")


def test_extract_prompt_is_trl_s():
    trl = pytest.importorskip("trl.data_utils", reason="TRL is in the bench extra only")
    from fastpo.data.rows import extract_prompt

    rng = random.Random(3)
    for _ in range(3000):
        chosen, rejected = ("".join(rng.choice("a ") for _ in range(rng.randint(1, 9))) for _ in range(2))
        theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
        if chosen[0] == rejected[0] or chosen[-1] != " ":  # else TRL's index of -1 takes nearly all as the prompt
            assert extract_prompt(chosen, rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_a_tokenizer_without_an_unknown_token():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<eos>": 0, "x": 1, "y": 2}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    (example,), _ = prepare_examples([{"prompt": "x", "chosen": " y", "rejected": " x"}], tokenizer)
    assert example.prompt_ids.tolist() == [1] and [r.tolist() for r in example.responses] == [[2, 0], [1, 0]]

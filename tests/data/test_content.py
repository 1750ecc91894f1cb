"""What rows of conversations hold reaches the tokens, or is spoken of; and what of several turns is trained on."""

import importlib.util
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fastpo
from fastpo.data import prepare_examples, unpair
from fastpo.data.sources import load_rows
from fastpo.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes tools, calls (arguments as JSON) and reasoning; as Qwen3, reasoning only of turns behind the last question.
FULL = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRINGS = FULL.replace("c.function.arguments | tojson", "'' + c.function.arguments")  # takes arguments as text only
PARTS = CHATML.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p.text }}{% endfor %}")
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template=CHATML, **names):
    """Bytes and one merge, of two newlines."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["ĊĊ"]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|tool|>"]
    names = {"eos_token": "</s>", "additional_special_tokens": special} | names
    out = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    out.chat_template = template
    return out


def user(content):
    return {"role": "user", "content": content}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, **more):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **more}


def pair(prompt=None, chosen="yes", rejected="no", **more):
    prompt = [user("q")] if prompt is None else prompt
    responses = {k: [bot(v)] if isinstance(v, str) else v for k, v in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": prompt, **responses, **more}


def read(row, template=CHATML, **options):
    """(prompt, [responses], report), decoded, of one row."""
    tok = tokenizer(template)
    (example,), report = prepare_examples([row], tok, **options)
    return tok.decode(example.prompt_ids), [tok.decode(ids) for ids in example.responses], report


def trained(row, template=CHATML, **options):
    """What each response is trained on, a blank line where something is left out."""
    tok = tokenizer(template)
    (example,), _ = prepare_examples([row], tok, **options)
    if example.token_weights is None:
        return [tok.decode(ids) for ids in example.responses]
    out = []
    for ids, weights in zip(example.responses, example.token_weights, strict=True):
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(weights)) + 1)
        out.append("[...]".join(tok.decode(ids[run]) for run in runs if weights[run[0]]))
    return out


# ---- pieces


def test_pieces_that_the_template_does_not_write_are_counted(caplog):
    row = pair(
        prompt=[{**user("q"), "name": "Ada", "mood": "curious"}], chosen=[bot("42", reasoning_content="careful")],
        rejected=[bot("41", reasoning_content="sloppy")], tools=[{"type": "function", "function": {"name": "a"}}],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="fastpo.data"):
        _, report = prepare_examples([row] * 3, tokenizer())
    assert report.lost == {"names of turns": 3, "'mood' of turns": 3, "reasoning": 3, "tools": 3}
    for kind in report.lost:
        assert (
            len([r for r in caplog.records if f"in 3 rows the chat template does not write the {kind}" in r.message])
            == 1
        )
    assert read(row, FULL)[2].lost == {"names of turns": 1, "'mood' of turns": 1}


def test_words_that_stand_elsewhere_are_no_find():
    """The tool's name is a letter of everything, the reasoning the answer's own words."""
    row = pair(chosen=[bot("yes", reasoning_content="yes")], rejected=[bot("no", reasoning_content="no")],
               tools=[{"name": "e"}])  # fmt: skip
    assert set(read(row)[2].lost) == {"reasoning", "tools"}


def test_reasoning_in_the_content_that_a_template_cuts_out():
    cuts = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    row = pair(chosen="<think>careful</think>42", rejected="<think>sloppy</think>41")
    _, responses, report = read(row, cuts)
    assert responses == ["42<|im_end|>\n", "41<|im_end|>\n"] and report.lost == {"reasoning": 1}
    assert not read(row)[2].lost
    history = pair(prompt=[user("a"), bot("b", reasoning_content="c"), user("d")])
    assert read(history, FULL)[2].lost == {"reasoning of earlier turns": 1}


def test_system_text_that_is_not_written():
    drops = CHATML.replace("in messages", "in messages if m['role'] != 'system'")
    assert read(pair(prompt=[{"role": "system", "content": "Be terse."}, user("q")]), drops)[2].lost == {
        "system text": 1
    }


@pytest.mark.parametrize(
    "chosen",
    [[call("f", {"x": 1}, content="")], [call("f", {"x": 1})], "  ", [bot("", reasoning_content="hm")]],
    ids=["call", "call without content", "spaces", "reasoning"],
)
def test_a_response_that_renders_empty_is_refused(chosen):
    template = CHATML.replace("m['content']", "(m['content'] or '') | trim")
    with pytest.raises(DataError, match="row 0: the chat template writes nothing of response 0 but an empty turn"):
        read(pair(chosen=chosen), template)
    examples, report = prepare_examples([pair(), pair(chosen=chosen)], tokenizer(template), invalid="drop")
    assert report.dropped == {"a response that renders empty": 1} and len(examples) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": "cat.png"}, {"type": "text", "text": "what?"}], "a part of type 'image'"),
        ([{"type": "input_audio", "input_audio": {}}], "a part of type 'input_audio'"),
        (None, "turn 0 of the prompt has no 'content'"),
        (5, "has a int as 'content'"),
        ([{"type": "text"}], "has a part without a text: 'type'"),
    ],
)
def test_contents_that_are_no_texts_are_refused(content, message):
    with pytest.raises(DataError, match=f"row 0: .*{message}"):
        read(pair(prompt=[user(content)]))


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio"])
def test_columns_of_other_media_are_refused(column):
    with pytest.raises(DataError, match=f"the column '{column}' is not supported"):
        read(pair(**{column: "x"}))


def test_half_a_character_is_refused():
    for row in ({"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, pair(chosen="b\ud800")):
        with pytest.raises(DataError, match="row 0: .* is not valid Unicode: a lone surrogate"):
            read(row)


# ---- forms


def test_parts_become_texts_where_the_template_has_texts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    row = pair(prompt=[user(parts)], chosen=[bot([{"type": "text", "text": "yes"}])])
    prompt, responses, report = read(row)
    assert prompt == "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert responses == ["yes<|im_end|>\n", "no<|im_end|>\n"] and report.flattened == 1
    both = PARTS.replace("{% for p", "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p")
    both = both.replace("{% endfor %}<|", "{% endfor %}{% endif %}<|")
    assert "onetwo<" in read(row, both)[0]  # a template that takes lists gets them


def test_texts_become_parts_where_the_template_has_parts():
    prompt, responses, report = read(pair(), PARTS)
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert responses == ["yes<|im_end|>\n", "no<|im_end|>\n"] and report.flattened == 1


@pytest.mark.parametrize("template", [FULL, STRINGS], ids=["objects", "texts"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_arguments_become_what_the_template_has(template, as_text):
    calls = [{"city": "Köln"}, {"city": 'a "b"'}]
    row = pair(chosen=[call("f", json.dumps(calls[0]) if as_text else calls[0])],
               rejected=[call("f", json.dumps(calls[1], ensure_ascii=False) if as_text else calls[1])])  # fmt: skip
    _, responses, report = read(row, template)
    if template == STRINGS and as_text:
        assert json.loads(responses[0][8:].split("</call>")[0]) == calls[0]
    else:
        assert responses[0] == '<call>f {"city": "Köln"}</call><|im_end|>\n'
    assert responses[1] == '<call>f {"city": "a \\"b\\""}</call><|im_end|>\n'
    assert report.read_arguments == (as_text == (template == FULL)) and not report.lost


@pytest.mark.parametrize("template", [FULL, STRINGS], ids=["objects", "texts"])
def test_calls_without_a_content(template):
    """Templates that join the content to something fail on one that is not there: they get an empty one."""
    needs = template.replace("m.content or ''", "'' + m.content")
    assert needs != template
    for content in ({}, {"content": None}):
        row = pair(chosen=[call("f", {"x": 1}, **content)], rejected=[call("f", '{"x": 2}', **content)])
        assert read(row, needs)[:2] == read(row, template)[:2]


def test_rows_are_the_same_from_all_sources(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets extra")
    rows = [
        pair(chosen=[call("kettle", {"litres": 2}, content=None)], rejected=[call("oven", {"degrees": 200})], tools=[
            {"function": {"name": "kettle", "parameters": {"litres": {"type": "number"}}}}]),
        pair(chosen=[call("oven", {"degrees": 180})], rejected=[call("kettle", {"litres": 1})], tools=[
            {"function": {"name": "oven", "parameters": {"degrees": {"type": "number"}}}}]),
    ]  # fmt: skip
    mixed = [pair(prompt=[user("q")]), pair(prompt=[user([{"type": "text", "text": "q"}])])]
    for number, data in enumerate((rows, mixed)):
        lines = tmp_path / f"{number}.jsonl"
        lines.write_text("\n".join(map(json.dumps, data)))
        sources = {"list": data, "jsonl": str(lines)}
        if number == 0:
            sources["Dataset"] = datasets.Dataset.from_list(data)
            sources["Dataset"].to_parquet(str(tmp_path / "plain.parquet"))
            sources["parquet"] = str(tmp_path / "plain.parquet")
        if "on_mixed_types" in datasets.Dataset.from_list.__code__.co_varnames:  # datasets 5: Arrow's JSON type
            sources["mixed"] = datasets.Dataset.from_list(data, on_mixed_types="use_json")
            sources["mixed"].to_parquet(str(tmp_path / f"{number}.parquet"))
            sources["mixed parquet"] = str(tmp_path / f"{number}.parquet")
        found = {name: prepare_examples(source, tokenizer(FULL))[0] for name, source in sources.items()}
        ids = {name: [[e.prompt_ids.tolist(), *(r.tolist() for r in e.responses)] for e in examples]
               for name, examples in found.items()}  # fmt: skip
        assert len(ids) >= 2
        assert all(of == ids["list"] for of in ids.values()), list(ids)
    assert "null" not in tokenizer().decode(found["list"][0].responses[0])


def test_parquet_of_json_text_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    if not hasattr(pa, "json_"):
        pytest.skip("pyarrow without the JSON type")
    table = pa.table({"chosen": pa.array(['"yes"', '[{"role": "user"}]', None], pa.json_(pa.string()))})
    pq.write_table(table, tmp_path / "x.parquet")
    assert load_rows(str(tmp_path / "x.parquet")) == [
        {"chosen": "yes"},
        {"chosen": [{"role": "user"}]},
        {"chosen": None},
    ]


# ---- prompts


def test_a_prompt_that_the_assistant_began_is_continued():
    prompt, responses, report = read(
        pair(prompt=[user("Rome?"), bot("Sure, it is")], chosen=" sunny.", rejected=" bad.")
    )
    assert prompt == "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\nSure, it is"
    assert responses == [" sunny.<|im_end|>\n", " bad.<|im_end|>\n"]
    assert report.continued == 1 and "the responses continue it" in report.warnings[0]
    assert read(pair(prompt=[user("q"), bot("")]))[:2] == read(pair())[:2]  # nothing begun: the generation prompt
    with pytest.raises(DataError, match="writes nothing of response 0"):
        read(pair(prompt=[user("q"), bot("Sure")], chosen="  "), CHATML.replace("m['content']", "m['content'] | trim"))


def test_a_boundary_inside_the_prompt_is_refused():
    """A template that puts the system text into the last turn, if that is the user's."""
    template = (
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{% if loop.last and m['role'] == 'user' and "
        "messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% endif %}{{ m['content'] }}<|im_end|>"
        "{% endfor %}"
    )
    row = pair(prompt=[{"role": "system", "content": "Be terse."}, user("Who are you?")])
    with pytest.raises(DataError, match="row 0: the chat template writes the prompt differently.*'Who are you[?]'"):
        read(row, template)
    assert read(pair(), template)[0] == "<|im_start|>q<|im_end|>"  # without a system text it writes the same


def test_a_generation_prompt_that_only_the_prompt_has_is_no_harm():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
    prompt, responses, report = read(pair(), template)
    assert (prompt, responses[0]) == ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>\n")
    assert report.boundary_moved == 1


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be terse."}]])
def test_a_prompt_repeated_in_the_responses_is_taken_once(system):
    row = pair(prompt=[*system, user("q")], chosen=[user("q"), bot("yes")], rejected=[*system, user("q"), bot("no")])
    found = read(row)
    assert found[:2] == read(pair(prompt=[*system, user("q")]))[:2]
    assert found[2].repeated_turns == 1
    only = pair(chosen=[{"role": "system", "content": "s"}, user("q"), bot("yes")],
                rejected=[{"role": "system", "content": "s"}, user("q"), bot("no")])  # fmt: skip
    assert read(only)[:2] == read(pair(prompt=[{"role": "system", "content": "s"}, user("q")]))[:2]
    history = [user("a"), bot("b"), user("c")]
    with pytest.raises(DataError, match="a response only repeats the prompt"):
        read(pair(prompt=history, chosen=history))


# ---- ends


def test_only_eos_and_the_template_s_end_are_endings():
    texts = {"prompt": "a", "chosen": "b<|im_end|>\n", "rejected": "c<|tool|>"}
    _, responses, report = read(texts)
    assert responses == ["b<|im_end|>\n", "c<|tool|></s>"] and report.own_endings == 1
    assert read(texts, None)[1] == ["b<|im_end|>\n</s>", "c<|tool|></s>"]


# ---- several turns

NIGHT = [bot("Blue."), user("And at night?"), bot("Black.")]
LOOP = [call("look", {"word": "x"}), {"role": "tool", "content": "a letter"}, bot("It is a letter.")]


def test_turns_of_others_are_not_trained_on():
    row = pair(chosen=NIGHT)
    assert trained(row) == ["Blue.<|im_end|>\n[...]Black.<|im_end|>\n", "no<|im_end|>\n"]
    assert trained(row, assistant_only=False)[0] == read(row)[1][0]
    assert "4" not in str(read(pair())[2].masked_tokens) and read(row)[2].masked_rows == 1
    (example,), report = prepare_examples([row], tokenizer())
    assert [int((w == 0).sum()) for w in example.token_weights] == [report.masked_tokens, 0]


def test_a_template_s_own_marks_decide():
    assert trained(pair(chosen=NIGHT), GENERATION)[0] == "Blue.<|im_end|>[...]Black.<|im_end|>"


def test_tool_turns_and_reasoning_of_earlier_turns():
    assert trained(pair(chosen=LOOP), FULL)[0] == (
        '<call>look {"word": "x"}</call><|im_end|>\n[...]It is a letter.<|im_end|>\n'
    )
    # The first answer's reasoning stands there only as long as no question follows.
    thought = [
        bot("Blue.", reasoning_content="Light."),
        user("And at night?"),
        bot("Black.", reasoning_content="Dark."),
    ]
    assert trained(pair(chosen=thought), FULL)[0] == "Blue.<|im_end|>\n[...]<think>Dark.</think>Black.<|im_end|>\n"
    # A call's name that stands again with the answer; a template that leaves the tool's turn out.
    named = "{% if m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].function.name }}: {% endif %}"
    again = FULL.replace("{{ m.content or '' }}", named + "{{ m.content or '' }}")
    assert trained(pair(chosen=LOOP), again) == trained(pair(chosen=LOOP), FULL)
    without = FULL.replace("{% for m in messages %}<", "{% for m in messages if m.role != 'tool' %}<")
    assert trained(pair(chosen=LOOP), without) == [
        '<call>look {"word": "x"}</call><|im_end|>\n[...]It is a letter.<|im_end|>\n', "no<|im_end|>\n"
    ]  # fmt: skip


def test_responses_that_begin_with_another_s_turn():
    row = pair(prompt=[user("q"), bot("a")], chosen=[user("r"), bot("yes")], rejected=[user("s"), bot("no")])
    assert read(row)[0] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert trained(row) == ["yes<|im_end|>\n", "no<|im_end|>\n"]
    with pytest.raises(DataError, match="response 0 has no turn of the assistant"):
        read(pair(chosen=[{"role": "tool", "content": "x"}]))


def test_turns_that_cannot_be_told_apart_are_refused():
    mixes = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | reverse }}")
    with pytest.raises(DataError, match="turns that are not the assistant's, and .*assistant_only_loss=false"):
        trained(pair(chosen=NIGHT), mixes)


def test_masks_through_truncation_and_other_kinds():
    row = pair(chosen=NIGHT)
    whole = len(prepare_examples([row], tokenizer())[0][0].responses[0])
    for mode in ("keep_start", "keep_end"):
        for cut in range(2, 40):
            options = {"max_length": 40 + whole - cut, "truncation_mode": mode, "invalid": "drop"}
            (example,), _ = prepare_examples([row], tokenizer(), **options)
            full, _ = prepare_examples([row], tokenizer())
            kept = len(example.responses[0])
            expected = full[0].token_weights[0]
            expected = expected[:kept] if mode == "keep_start" else expected[-kept:]
            assert example.token_weights[0].tolist() == expected.tolist()
    sft = {"prompt": row["prompt"], "completion": NIGHT}
    (example,), _ = prepare_examples([sft], tokenizer(), kind="sft")
    assert int(example.token_weights[0].sum()) == len("Blue.#\nBlack.#\n")
    ranked = {"prompt": row["prompt"], "responses": [{"messages": NIGHT, "score": 1}, {"text": "no", "score": 0}]}
    (example,), _ = prepare_examples([ranked], tokenizer())
    assert int(example.token_weights[0].sum()) == len("Blue.#\nBlack.#\n") and all(example.token_weights[1] == 1)
    beside, _ = prepare_examples([row, pair()], tokenizer())
    assert all(e.token_weights is not None for e in beside)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "sft", "kto"])
def test_numbers_are_those_of_the_assistant_s_turns(toy, tmp_path, loss):
    """Sums, lengths and NLLs of a run, of policy and reference, against plain PyTorch on the assistant's tokens."""
    words = iter(toy.text(random.Random(0), 600, 600).split())

    def said(n):
        return " ".join(next(words) for _ in range(n))

    tok = toy.tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{{ 'w95' if m['role'] == 'user' else 'w96' }} {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}w96 {% endif %}"
    )
    rows = [pair([user(said(3))], [bot(said(k)), user(said(4)), bot(said(5))], said(2 + k)) for k in range(1, 9)]
    policy, reference = toy.model(), toy.model(1)
    options = dict(
        output_dir=str(tmp_path / "out"), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1, max_steps=1,
        per_device_train_batch_size=16, gradient_checkpointing=False, save_final=False, report=False, loss_type=loss,
        max_tokens=150,
    )  # fmt: skip
    result = fastpo.train(toy.model(), rows, processing_class=tok, args=options,
                          ref_model=reference if loss in ("dpo", "kto") else None)  # fmt: skip

    def sums(model, side):
        """Log-probabilities of each response's own tokens summed, and how many they are."""
        out = []
        for row in rows:
            ids, own = [], []
            for turn in row["prompt"] + row[side]:
                text = tok(turn["content"] + " <eos>")["input_ids"]
                ids += tok("w96" if turn["role"] == "assistant" else "w95")["input_ids"] + text
                own += [False] + [turn["role"] == "assistant"] * len(text)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            logp = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            mask = torch.tensor(own[1:])
            out.append((logp[mask].sum(), mask.sum()))
        return [torch.stack(column) for column in zip(*out)]

    (lw, nw), (ll, nl) = sums(policy, "chosen"), sums(policy, "rejected")
    (rw, _), (rl, _) = sums(reference, "chosen"), sums(reference, "rejected")
    logged = result.log_history[0]
    if loss == "dpo":
        expected = -torch.nn.functional.logsigmoid(0.1 * ((lw - ll) - (rw - rl))).mean()
    elif loss == "simpo":
        expected = -torch.nn.functional.logsigmoid(2.0 * (lw / nw - ll / nl) - 1.0).mean()
    elif loss == "sft":
        expected = -lw.sum() / nw.sum()
    else:
        assert logged["rewards/chosen"] == pytest.approx(float(0.1 * (lw - rw).mean()), rel=1e-4)
        assert logged["rewards/rejected"] == pytest.approx(float(0.1 * (ll - rl).mean()), rel=1e-4)
        return
    assert logged["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss", ["sampo", "ld_dpo"])
def test_losses_of_tokens_by_number_refuse_turns_of_others(toy, tmp_path, loss):
    tok = toy.tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    rows = [pair([user("w1")], [bot("w2"), user("w3"), bot("w4")], "w5"), pair([user("w6")], "w7", "w8")]
    options = dict(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, loss_type=loss, max_steps=1)
    more = {"ld_alpha": 0.5} if loss == "ld_dpo" else {}
    with pytest.raises(
        DataError, match="in 1 rows the responses have turns that are not trained on: set assistant_only"
    ):
        fastpo.train(toy.model(), rows, processing_class=tok, args={**options, **more})


# ---- pairs for unpaired losses


def test_pairs_are_unpaired_before_they_are_tokenised():
    tok = tokenizer()
    rows = [{"prompt": "q\n", "chosen": "a", "rejected": "\nb"}, {"prompt": "x", "chosen": "y", "rejected": "y"}]
    single = [{"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
              for k in ("chosen", "rejected") for r in rows]  # fmt: skip
    apart, report = prepare_examples(rows, tok, kind="unpaired")
    alone, _ = prepare_examples(single, tok, kind="unpaired")

    def shown(examples):
        return [(tok.decode(e.prompt_ids), tok.decode(e.responses[0]), e.response_columns) for e in examples]

    assert shown(apart) == shown(alone) and (report.rows, report.kept) == (4, 4)
    assert shown(unpair(prepare_examples(rows[:1], tok)[0])) == shown([alone[0], alone[2]])
    assert shown(alone)[0][:2] == ("q\n", "a</s>") and shown(alone)[2][:2] == ("q", "\n\nb</s>")
    _, report = prepare_examples(
        [*rows, {"prompt": "p", "chosen": "", "rejected": "z"}], tok, kind="unpaired", invalid="drop"
    )
    assert (report.rows, report.kept, report.dropped) == (6, 4, {"empty completion": 2})


def test_unpaired_order_is_trl_s_by_thousands():
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(1001)]
    labels = [e.response_columns["label"] == [1.0] for e in prepare_examples(rows, tokenizer(), kind="unpaired")[0]]
    assert labels == [True] * 1000 + [False] * 1000 + [True, False]


# ---- fuzz


def test_fuzz_of_rows():
    spec = importlib.util.spec_from_file_location("fuzz_rows", Path(__file__).parents[1] / "fuzz_rows.py")
    fuzz_rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz_rows)
    assert fuzz_rows.fuzz(1500, seed=3) == []


# ---- tokenizers with a way of their own


class Direct:
    """As mistral-common's in transformers: ids without a text between, a mode for prompts and one for training."""

    eos_token, eos_token_id, bos_token_id, chat_template = "</s>", 0, None, None
    tokens = ("</s>", "[INST]", "[/INST]", *map(chr, range(32, 127)))

    def __init__(self, tokenizer_path="somewhere", mode="test"):
        self._tokenizer_path, self.mode = tokenizer_path, mode

    def apply_chat_template(self, turns, tokenize, return_dict, add_generation_prompt=False, tools=None,
                            continue_final_message=False):  # fmt: skip
        assert tokenize and return_dict
        answered = turns[-1]["role"] == "assistant"
        if continue_final_message != (self.mode == "test" and answered) or (self.mode == "finetuning" and not answered):
            raise ValueError(f"not in the mode {self.mode}")
        out = []
        for turn in turns:
            words = list(turn["content"])
            out += [*words, "</s>"] if turn["role"] == "assistant" else ["[INST]", *words, "[/INST]"]
        return {"input_ids": [self.tokens.index(token) for token in out][: -1 if continue_final_message else None]}

    def decode(self, ids, **_):
        return "".join(self.tokens[i] for i in ids)


@pytest.mark.parametrize("mode", ["test", "finetuning"])
def test_a_tokenizer_with_two_modes(mode):
    tok = Direct(mode=mode)

    def shown(row):
        (example,), _ = prepare_examples([row], tok)
        weights = example.token_weights
        return [tok.decode(example.prompt_ids), *map(tok.decode, example.responses)], weights and weights[0].tolist()

    assert shown(pair()) == (["[INST]q[/INST]", "yes</s>", "no</s>"], None)
    assert shown(pair([user("q"), bot("So ")])) == (["[INST]q[/INST]So ", "yes</s>", "no</s>"], None)
    ids, weights = shown(pair(chosen=[bot("a"), user("b"), bot("c")]))
    assert ids[1] == "a</s>[INST]b[/INST]c</s>" and weights == [1, 1, 0, 0, 0, 1, 1]
    with pytest.raises(DataError, match=r"a Direct \(mistral-common\) reads no special tokens in texts.*conversations"):
        prepare_examples([{"prompt": "a", "chosen": "b", "rejected": "c"}], tok)


def test_mistral_common(tmp_path):
    common = pytest.importorskip("mistral_common", reason="mistral-common")
    from transformers import MistralCommonBackend

    path = next(Path(common.__file__).parent.glob("data/tekken_*.json"))
    tok = MistralCommonBackend(tokenizer_path=str(path))
    (example,), _ = prepare_examples([pair([user("Hi there")], "Yo", "Go away")], tok)
    assert tok.decode(example.prompt_ids.tolist()) == "<s>[INST]Hi there[/INST]"
    assert [tok.decode(r.tolist()) for r in example.responses] == ["Yo</s>", "Go away</s>"]

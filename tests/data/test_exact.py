"""Token ids as they were sampled: trained as they are, beside texts too; equal responses are one."""

import json

import numpy as np
import pytest
import torch

import fastpo
from fastpo import data
from fastpo.data.kway import Forming
from fastpo.errors import DataError

LETTERS = "abcdefgh .:?"
MERGES = [("a", "b"), ("ab", "c"), ("d", "e"), (" ", "a")]


@pytest.fixture(scope="module")
def bpe():
    """A tokenizer of letters with merges, in which "ab" has two spellings, of which it writes one."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<end>", *LETTERS, *("".join(merge) for merge in MERGES)]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>.{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def ids(bpe):
    return lambda text: [bpe.convert_tokens_to_ids(letter) for letter in text]


@pytest.fixture(scope="module")
def model(toy, bpe):
    return lambda seed=0: toy.model(seed, vocab_size=len(bpe))


def plain(example):
    return example.prompt_ids.tolist(), [r.tolist() for r in example.responses]


def sampled(model, bpe, n=6, k=4, new=5):
    """Rows as a sampler leaves them: distinct ids of `generate`, letters up to "e", cut at `new` tokens, scored."""
    torch.manual_seed(3)
    others = [i for i in range(1, len(bpe)) if not 2 <= i <= 6]
    rows = []
    for i in range(n):
        prompt = bpe(f"{LETTERS[i]}b:")["input_ids"]
        given = torch.tensor([prompt] * 4 * k)
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=True, max_new_tokens=new, pad_token_id=0,
            eos_token_id=0, suppress_tokens=others,
        )[:, len(prompt) :].tolist()  # fmt: skip
        cut = [own[: own.index(0) + 1] if 0 in own else own for own in out]
        distinct = [own for j, own in enumerate(cut) if own not in cut[:j]][:k]
        assert len(distinct) == k
        responses = [{"token_ids": own, "finished": own[-1] == 0, "text": bpe.decode(own), "score": float(j),
                      "win_prob": (1 + j) / 8} for j, own in enumerate(distinct)]  # fmt: skip
        rows.append({"prompt_ids": prompt, "prompt": bpe.decode(prompt), "responses": responses})
    return rows


def own_logps(model, prompt, response):
    """[tokens] fp64, differentiable: of the response's ids after the prompt's, by the model's own logits."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    logp = logits[:-1].log_softmax(-1).gather(1, torch.tensor([prompt + response])[0, 1:, None])[:, 0]
    return logp[len(prompt) - 1 :]


# -------------------------------------------------------------------------------------------------------- as they are


def test_nothing_is_appended_and_nothing_is_tokenised_again(bpe, ids):
    a, b = ids("ab"), ids("abc")  # two and three tokens, which the tokenizer would write as one each
    assert bpe(bpe.decode(a))["input_ids"] != a
    prompt = ids("dea")
    kway = {"prompt_ids": prompt, "responses": [{"token_ids": a, "finished": False, "score": 1},
                                                {"token_ids": [*b, 0], "finished": True, "score": 0}]}  # fmt: skip
    texts = kway | {"prompt": "this is not read", "responses": [r | {"text": "nor this"} for r in kway["responses"]]}
    pair = {"prompt_ids": prompt, "chosen": a, "rejected": [*b, 0]}
    forms = [kway, texts, kway | {"prompt": prompt}, {"prompt": prompt, "responses": kway["responses"]}, pair,
             pair | {"prompt": "dea"}, {"prompt": prompt, "chosen": a, "rejected": [*b, 0]},
             {"prompt_ids": prompt, "chosen_ids": a, "rejected_ids": [*b, 0]},
             {"prompt": "dea", "chosen": "ab", "rejected": "abc", "prompt_ids": prompt, "chosen_ids": a,
              "rejected_ids": [*b, 0]}]  # fmt: skip
    for row in forms:
        (example,), report = data.prepare_examples([row], bpe)
        assert plain(example) == (prompt, [a, [*b, 0]]) and example.pairs == [(0, 1)]
        assert report.boundary_moved == 0 and report.warnings == []
    _, report = data.prepare_examples([kway], bpe)
    assert report.unfinished == 1 and "1 responses unfinished, trained without an end" in report.summary()
    for row in ({"prompt_ids": prompt, "completion": b}, {"prompt": "x", "prompt_ids": prompt, "completion_ids": b}):
        (example,), _ = data.prepare_examples([row], bpe, kind="sft")
        assert plain(example) == (prompt, [b])
    (one,), _ = data.prepare_examples([{"prompt": "x", "prompt_ids": prompt, "completion": b, "label": True}], bpe,
                                      kind="unpaired")  # fmt: skip
    assert plain(one) == (prompt, [b])


def test_the_prompt_of_ids_may_be_a_text(bpe, ids):
    """Then its ids are those of training on texts."""
    row = {"prompt": "de", "responses": [{"token_ids": ids("ab"), "score": 1}, {"text": "c", "score": 0}]}
    pair = {"prompt": "de", "chosen": ids("ab"), "rejected": "c"}
    for given in (row, pair):
        (example,), _ = data.prepare_examples([given], bpe)
        assert plain(example) == (bpe("de")["input_ids"], [ids("ab"), [*ids("c"), 0]])
    (example,), _ = data.prepare_examples([{"prompt": "de", "completion": ids("ab")}], bpe, kind="sft")
    assert plain(example) == (bpe("de")["input_ids"], [ids("ab")])


def test_a_tokenizer_that_takes_no_texts_is_none_of_their_business(bpe, ids):
    import copy

    bare = copy.deepcopy(bpe)
    bare.chat_template = None
    rows = [{"prompt": [{"role": "user", "content": "a"}], "prompt_ids": ids("a"),
             "responses": [{"token_ids": ids("b"), "score": 1}, {"token_ids": ids("c"), "score": 0}]}]  # fmt: skip
    (example,), _ = data.prepare_examples(rows, bare)
    assert plain(example) == (ids("a"), [ids("b"), ids("c")])
    rows[0]["responses"][0] = {"text": "b", "score": 1}
    with pytest.raises(DataError, match="the rows are conversations and the tokenizer has no chat template"):
        data.prepare_examples(rows, bare)
    bare.eos_token = None
    (example,), _ = data.prepare_examples([{"prompt": ids("a"), "chosen": ids("b"), "rejected": ids("c")}], bare)
    assert plain(example) == (ids("a"), [ids("b"), ids("c")])


# ------------------------------------------------------------------------------------------------------ beside texts


def test_an_answer_from_elsewhere_follows_the_same_prompt(bpe, ids):
    prompt, answer = bpe("de:")["input_ids"], ids("ab")
    row = {"prompt": "de:", "prompt_ids": prompt,
           "responses": [{"token_ids": answer, "score": 0}, {"text": "abc", "score": 1},
                         {"text": "c", "finished": False, "score": -1}]}  # fmt: skip
    (example,), report = data.prepare_examples([row], bpe, forming=Forming("all"))
    assert plain(example) == (prompt, [answer, ids("c"), [*bpe("abc")["input_ids"], 0]])  # as the pairs name them
    assert report.warnings == [] and report.unfinished == 1
    # "a" and "b" would be one token across the boundary, which the sampled response's prompt has not.
    merges = row | {"prompt": "dea", "prompt_ids": ids("dea")}
    merges["responses"] = [row["responses"][0], {"text": "bc", "score": 1}]
    (example,), report = data.prepare_examples([merges], bpe)
    assert plain(example) == (ids("dea"), [[*ids("bc"), 0], answer])
    assert report.other_prompts == 1 and "in 1 rows 'prompt_ids' are not how" in report.warnings[0]
    other = row | {"prompt_ids": [*ids("h"), *prompt]}  # a beginning that the text has not
    (example,), report = data.prepare_examples([other], bpe)
    assert plain(example)[1][0] == [*bpe("abc")["input_ids"], 0] and report.other_prompts == 1


def test_an_answer_in_a_conversation(bpe, ids):
    prompt = [{"role": "user", "content": "de"}]
    prompt_ids = list(bpe.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
                      ["input_ids"])  # fmt: skip
    gold = {"role": "assistant", "content": "abc"}
    alone = {"prompt": prompt, "chosen": [gold], "rejected": [gold | {"content": "h"}]}
    (expected,), _ = data.prepare_examples([alone], bpe)
    assert expected.prompt_ids.tolist() == prompt_ids
    for entry in ({"text": "abc"}, {"messages": [gold]}):
        row = {"prompt": prompt, "prompt_ids": prompt_ids,
               "responses": [{"token_ids": ids("ab"), "score": 0}, entry | {"score": 1}]}  # fmt: skip
        (example,), report = data.prepare_examples([row], bpe)
        assert plain(example) == (prompt_ids, [expected.responses[0].tolist(), ids("ab")]) and not report.warnings
        (pair,), _ = data.prepare_examples(
            [{"prompt": prompt, "prompt_ids": prompt_ids, "chosen": [gold], "rejected": ids("ab")}], bpe
        )
        assert plain(pair) == plain(example)
    # Turns that are not the assistant's have no weight, behind the prompt's ids too.
    turns = [gold, {"role": "user", "content": "h"}, gold]
    row["responses"][1] = {"messages": turns, "score": 1}
    (example,), report = data.prepare_examples([row], bpe)
    (expected,), _ = data.prepare_examples([alone | {"chosen": turns}], bpe)
    assert (
        example.token_weights[0].tolist() == expected.token_weights[0].tolist() and not expected.token_weights[0].all()
    )
    assert example.token_weights[1].tolist() == [1.0, 1.0]


def test_other_layouts_keep_the_prompts_ids(bpe, ids):
    """Pairs of texts after a conversation: with it and with prompt_ids, which end as the template does not."""
    row = {"prompt": [{"role": "user", "content": "de"}], "chosen": "abc", "rejected": "h"}
    (as_turns,), _ = data.prepare_examples([row], bpe)
    (exact,), report = data.prepare_examples([row | {"prompt_ids": ids("gg")}], bpe)
    assert plain(exact) == (ids("gg"), plain(as_turns)[1]) and report.reading.startswith("read as pairs after a prompt")
    whole = {"input_ids": ids("gab"), "labels": [-100, -100, 3], "prompt_ids": ids("g")}
    (one,), _ = data.prepare_examples([whole], bpe, kind="sft")
    assert plain(one) == (ids("ga"), [ids("b")])


def test_truncation(bpe, ids):
    row = {"prompt_ids": ids("dea"), "responses": [{"token_ids": ids("abcabc"), "score": 1},
                                                   {"token_ids": ids("hg"), "score": 0}]}  # fmt: skip
    (example,), report = data.prepare_examples([row], bpe, max_length=5)
    assert plain(example) == (ids("dea"), [ids("ab"), ids("hg")]) and report.truncated == 1
    (example,), _ = data.prepare_examples([row], bpe, max_length=5, truncation_mode="keep_end")
    assert [example.prompt_of(k).tolist() for k in (0, 1)] == [ids("b"), ids("dea")]
    assert [r.tolist() for r in example.responses] == [ids("cabc"), ids("hg")]


@pytest.mark.parametrize("form", ["jsonl", "arrow"])
def test_files_and_arrow_give_the_same(bpe, ids, tmp_path, form):
    """Arrow writes every key into every entry."""
    rows = [{"prompt": "de:", "prompt_ids": bpe("de:")["input_ids"],
             "responses": [{"token_ids": ids("ab"), "finished": False, "count": 2, "score": 1.0},
                           {"text": "h", "score": 0.0}]},
            {"prompt": None, "prompt_ids": ids("g"), "responses": [{"token_ids": ids("a"), "score": 1.0},
                                                                   {"token_ids": ids("b"), "score": 0.0}]}]  # fmt: skip
    expected = [plain(e) for e in data.prepare_examples(rows, bpe)[0]]
    if form == "arrow":
        given = pytest.importorskip("datasets").Dataset.from_list(rows)
    else:
        given = tmp_path / "rows.jsonl"
        given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [plain(e) for e in data.prepare_examples(given, bpe, num_proc=2)[0]] == expected


# ----------------------------------------------------------------------------------------------------- equal responses


def test_equal_responses_are_one_with_the_mean_of_their_numbers(bpe, ids):
    def responses(*given):
        return [{"token_ids": ids(text), "score": score, "win_prob": p, **more} for text, score, p, more in given]

    row = {"prompt_ids": ids("d"), "pairs": [[0, 2], [1, 3], [0, 1], [3, 0]],
           "responses": responses(("ab", 4, 0.5, {"count": 3}), ("h", 2, 0.25, {}), ("ab", 0, 0.1, {}),
                                  ("g", 1, 0.0, {}))}  # fmt: skip
    (example,), report = data.prepare_examples([row], bpe, forming=Forming("all"))
    assert plain(example)[1] == [ids("ab"), ids("h"), ids("g")] and example.pairs == [(0, 1), (0, 2), (1, 2)]
    assert example.response_columns["score"] == [3.0, 2.0, 1.0]  # (3 x 4 + 0) / 4
    assert example.pair_columns["win_prob_chosen"] == pytest.approx([0.4, 0.4, 0.25])
    assert report.merged == 1 and report.offered == 4 and "1 responses merged with equal ones" in report.summary()
    (example,), _ = data.prepare_examples([row], bpe, forming=Forming("explicit"))
    assert plain(example)[1] == [ids("h"), ids("g"), ids("ab")]
    assert example.pairs == [(0, 1), (2, 0), (1, 2)]  # that of 0 and 2, which are one, is gone
    (example,), _ = data.prepare_examples([row], bpe, forming=Forming(whole=True))
    assert example.response_columns["score"] == [3.0, 2.0, 1.0]
    same = {"prompt_ids": ids("d"), "responses": responses(("ab", 4, 0.5, {}), ("ab", 2, 0.5, {}))}
    once = {"prompt_ids": ids("d"), "responses": responses(("ab", 4, 0.5, {"count": 2}))}
    _, report = data.prepare_examples([row, same, once], bpe)
    assert report.dropped == {"fewer than two distinct responses": 2} and report.kept_rows == [0]
    with pytest.raises(DataError, match="no row is left to train on: 0 of 1 rows kept; 1 dropped: fewer than two dist"):
        data.prepare_examples([same], bpe)


def test_responses_that_are_equal_as_token_ids_alone(bpe, ids):
    """A text and the ids that it becomes; and what truncation leaves alike."""
    gold = [*bpe("abc")["input_ids"], 0]
    row = {"prompt": "d:", "prompt_ids": bpe("d:")["input_ids"],
           "responses": [{"token_ids": gold, "score": 3}, {"text": "abc", "score": 1}, {"text": "h", "score": 0},
                         {"text": "abc", "finished": False, "score": -1}]}  # fmt: skip
    (example,), report = data.prepare_examples([row], bpe, forming=Forming("all"))
    assert plain(example)[1] == [gold, [*ids("h"), 0], gold[:-1]] and report.merged == 1
    assert example.response_columns["score"] == [2.0, 0.0, -1.0] and example.pairs == [(0, 1), (0, 2), (1, 2)]
    (example,), report = data.prepare_examples([row], bpe, forming=Forming("all"), max_length=3)
    assert plain(example)[1] == [gold[:1], ids("h")] and example.response_columns["score"] == [1.0, 0.0]
    assert report.merged == 2 and report.truncated == 2
    # The pair changes with the mean: the best was the same as the worst.
    row["responses"] = [{"text": "abc", "score": 3}, {"token_ids": gold, "score": -3}, {"text": "h", "score": 1}]
    (example,), _ = data.prepare_examples([row], bpe)
    assert plain(example)[1] == [[*ids("h"), 0], gold] and example.pairs == [(0, 1)]
    row["responses"] = row["responses"][:2]
    with pytest.raises(DataError, match="1 dropped: fewer than two distinct responses"):
        data.prepare_examples([row], bpe)


def test_equal_greedy_responses_are_one(bpe, ids):
    own, other = ids("ab"), ids("h")
    row = {"prompt_ids": ids("d"), "responses": [{"token_ids": own, "score": 1, "greedy": True},
                                                 {"token_ids": own, "score": 1, "greedy": True},
                                                 {"token_ids": other, "score": 0}]}  # fmt: skip
    (example,), _ = data.prepare_examples([row], bpe, columns=["greedy"])
    assert example.greedy == 0 and plain(example)[1] == [own, other]
    unmarked = [{k: v for k, v in r.items() if k != "greedy"} for r in row["responses"]]
    for greedy, place, n in ((other, 1, 2), (ids("g"), 2, 3)):
        (example,), _ = data.prepare_examples([row | {"responses": unmarked, "greedy": greedy}], bpe,
                                              columns=["greedy"])  # fmt: skip
        assert (example.greedy, len(example.responses)) == (place, n)


# ------------------------------------------------------------------------------------------------------------ training


def train(model, bpe, rows, tmp_path, **options):
    defaults = dict(
        output_dir=str(tmp_path / str(len(list(tmp_path.iterdir())))), disable_tqdm=True, use_cpu=True, bf16=False,
        logging_steps=1, per_device_train_batch_size=100, lr_scheduler_type="constant", optim="sgd", beta=0.5,
        gradient_checkpointing=False, save_final=False, report=False, max_grad_norm=0.0, save_strategy="no",
        max_steps=2, learning_rate=0.5, loss_type="dpo", pair_policy="all",
    )  # fmt: skip
    rest = {k: options.pop(k) for k in ("ref_model", "prev_model", "eval_dataset") if k in options}
    return fastpo.train(model, rows, processing_class=bpe, args={**defaults, **options}, **rest)


def logged(result, key="loss"):
    return [line[key] for line in result.log_history if key in line]


def test_steps_of_plain_pytorch_on_the_sampled_ids(model, bpe, tmp_path):
    """Cut responses without an end, spellings that the tokenizer would not choose: two steps of SGD in fp64."""
    policy = model()
    rows = sampled(policy, bpe)
    every = [(row["prompt_ids"], [r["token_ids"] for r in row["responses"]]) for row in rows]
    cut = [r for row in rows for r in row["responses"] if not r["finished"]]
    assert len(cut) > 10 and all(0 not in r["token_ids"] for r in cut)
    assert any(bpe(r["text"])["input_ids"] != r["token_ids"] for r in cut)
    result = train(policy, bpe, rows, tmp_path, ref_model=model(1))
    trained, ref = model().double(), model(1).double()
    optimizer, losses = torch.optim.SGD(trained.parameters(), lr=0.5), []
    for _ in range(2):
        margins = []
        for prompt, responses in every:
            h = [own_logps(trained, prompt, r).sum() - own_logps(ref, prompt, r).sum().detach() for r in responses]
            margins += [h[i] - h[j] for i in range(4) for j in range(i)]
        loss = -torch.nn.functional.logsigmoid(0.5 * torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert logged(result) == pytest.approx(losses, rel=1e-5)
    expected = torch.cat([p.detach().flatten() for p in trained.parameters()])
    got = torch.cat([p.detach().flatten() for p in result.model.parameters()]).double()
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-4)


def test_how_rows_are_given_and_packed_changes_nothing(model, bpe, tmp_path):
    """References from the data, computed, cached and read again; K responses or pairs; shared prompts or none."""
    rows = sampled(model(), bpe)
    ref = model(1)
    base = train(model(), bpe, rows, tmp_path, ref_model=ref, max_tokens=100_000)
    pairs = [{"prompt_ids": row["prompt_ids"], "chosen": row["responses"][i]["token_ids"],
              "rejected": row["responses"][j]["token_ids"]}
             for row in rows for i in range(4) for j in range(i)]  # fmt: skip
    logps = fastpo.sequence_logps(ref, rows, processing_class=bpe)
    given = [row | {"responses": [r | {"ref_logps": float(x.sum())} for r, x in zip(row["responses"], of, strict=True)]}
             for row, of in zip(rows, logps, strict=True)]  # fmt: skip
    others = [
        train(model(), bpe, rows, tmp_path, ref_model=ref, max_tokens=1),
        train(model(), bpe, rows, tmp_path, ref_model=ref, share_prompts="always"),
        train(model(), bpe, rows, tmp_path, ref_model=ref, share_prompts="never", eval_dataset=rows, eval_steps=1,
              eval_strategy="steps", sample_generations=1),
        train(model(), bpe, pairs, tmp_path, ref_model=ref, pair_policy="best_worst"),
        train(model(), bpe, given, tmp_path),
    ]  # fmt: skip
    for other in others:
        for key in ("loss", "rewards/margins", "logps/chosen"):
            assert logged(other, key) == pytest.approx(logged(base, key), rel=1e-5, abs=1e-6), key
    assert logged(others[2], "eval_loss")[0] == pytest.approx(logged(base)[1], rel=1e-5)


def test_previous_policies_and_win_probabilities(model, bpe, tmp_path):
    rows = sampled(model(), bpe)
    for loss, given in (("sppo", {}), ("inpo", {"prev_model": model(2)}), ("infonca", {})):
        beta = {"beta": None} if loss == "inpo" else {}
        policy = "best_worst" if loss == "infonca" else "all"
        given |= {"loss_type": loss, "pair_policy": policy, "ref_model": model(1), **beta}
        a, b = (train(model(), bpe, rows, tmp_path, max_tokens=m, **given) for m in (1, 10_000))
        assert logged(a) == pytest.approx(logged(b), rel=1e-5)


def test_sequence_logps_of_exactly_these_ids(model, bpe, ids):
    policy = model()
    rows = [
        *sampled(policy, bpe, n=3),
        {"prompt": "de:", "responses": [{"text": "ab"}, {"token_ids": ids("ab"), "text": "ab"},
                                        {"text": "ab", "finished": False}]},
        {"prompt": [{"role": "user", "content": "de"}], "responses": [{"text": "ab"}]},
        {"prompt_ids": ids("dea"), "prompt": "dea", "chosen": ids("bc"), "rejected": "bc"},
        {"prompt": ids("dea"), "completion": ids("bc")},
    ]  # fmt: skip
    out = fastpo.sequence_logps(policy, rows, processing_class=bpe)
    chat = bpe("u:de<end>.a:")["input_ids"]
    expected = [[(row["prompt_ids"], r["token_ids"]) for r in row["responses"]] for row in rows[:3]]
    de = bpe("de:")["input_ids"]
    expected += [[(de, [*bpe("ab")["input_ids"], 0]), (de, ids("ab")), (de, bpe("ab")["input_ids"])],
                 [(chat, bpe("ab<end>.")["input_ids"])],
                 [(ids("dea"), ids("bc")), (ids("dea"), [*ids("bc"), 0])], [(ids("dea"), ids("bc"))]]  # fmt: skip
    assert [len(row) for row in out] == [len(row) for row in expected]
    for found, given in zip(out, expected, strict=True):
        for logp, (prompt, response) in zip(found, given, strict=True):
            assert logp.shape == (len(response),)
            np.testing.assert_allclose(logp, own_logps(policy, prompt, response).detach().numpy(), atol=2e-6)
    bad = [*rows, {"prompt": "a", "completion": ""}]
    with pytest.raises(DataError, match="row 7: 'completion' is empty"):
        fastpo.sequence_logps(policy, bad, processing_class=bpe)
    with pytest.raises(DataError, match="row 0: response 1 needs 'text', 'messages' or 'token_ids', found 'score'"):
        fastpo.sequence_logps(
            policy, [{"prompt": "a", "responses": [{"text": "b"}, {"score": 1}]}], processing_class=bpe
        )


# ----------------------------------------------------------------------------------------------------------- bad input

TURNS = [{"role": "user", "content": "de"}]
A, B = {"token_ids": [2, 3], "score": 1}, {"token_ids": [4], "score": 0}
ROW = {"prompt_ids": [5], "responses": [A, B]}


def entry(**changes):
    return ROW | {"responses": [A, B | changes]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (entry(token_ids=[4, 999]), "row 1: token id 999 is none of the tokenizer's 18 tokens"),
        (entry(token_ids=[4, -1]), "row 1: response 1: 'token_ids' has -1, which is no token id"),
        (entry(token_ids=[4, 1.0]), "row 1: response 1: 'token_ids' has 1.0, which is no token id"),
        (entry(token_ids=[4, True]), "row 1: response 1: 'token_ids' has True, which is no token id"),
        (entry(token_ids="ab"), "row 1: response 1: 'token_ids' must be a list of token ids, not 'ab'"),
        (entry(token_ids=[]), "row 1: response 1: 'token_ids' has no token ids"),
        (entry(finished=1), "row 1: response 1: 'finished' must be true or false, not 1"),
        (entry(count=0), "row 1: response 1: 'count' must be a whole number from 1 on, not 0"),
        (entry(count=1.5), "row 1: response 1: 'count' must be a whole number from 1 on, not 1.5"),
        (entry(token_ids=None), "row 1: response 1 needs 'text', 'messages' or 'token_ids', found 'score'"),
        (entry(token_ids=None, text="h"), "row 1: response 1 is a text, and the row has no 'prompt' that it"),
        (ROW | {"prompt_ids": None}, "row 1 has no 'prompt_ids', which the rows before have"),
        (ROW | {"prompt_ids": None, "prompt": "de"}, "row 1 has no 'prompt_ids', which the rows before have"),
        (ROW | {"prompt_ids": []}, "row 1: column 'prompt_ids' has no token ids"),
        (ROW | {"prompt_ids": [5.5]}, "row 1: column 'prompt_ids' has 5.5, which is no token id"),
        (ROW | {"prompt_ids": "de"}, "row 1: column 'prompt_ids' must be a list of token ids, not 'de'"),
    ],
)  # fmt: skip
def test_bad_ids(bpe, row, message):
    with pytest.raises(DataError, match=message) as caught:
        data.prepare_examples([ROW, row], bpe)
    assert "\n" not in str(caught.value)
    (example,), report = data.prepare_examples([ROW, row], bpe, invalid="drop") if "needs" not in message else ([0], 0)
    assert report == 0 or sum(report.dropped.values()) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": TURNS, "responses": [A, B]}],
         "row 0: response 0 has 'token_ids', and the prompt is a conversation: give its ids too, as the colu"),
        ([{"prompt": TURNS, "chosen": [2], "rejected": [3]}],
         "row 0: 'chosen' is a list of token ids, and the prompt is a conversation: give its ids too"),
        ([{"prompt": TURNS, "prompt_ids": [5], "responses": [A, {"text": "h", "finished": False, "score": 0}]}],
         "row 0: response 1 is not 'finished', and a chat template would end it: give its 'token_ids'"),
        ([{"prompt": "d", "prompt_ids": [5], "chosen": [2], "rejected": [{"role": "assistant", "content": "h"}]}],
         "row 0: column 'rejected' is a conversation, where the prompt is a text"),
        ([{"prompt_ids": [5], "chosen": [2], "rejected": "h"}],
         "row 0: column 'rejected' is a text, and the row has no 'prompt' that it was written after"),
        ([{"prompt_ids": [5], "chosen": [2], "rejected": []}], "row 0: 'rejected' is empty"),
        ([{"prompt_ids": [5], "chosen": [2, 3], "rejected": [2, 3]}], "row 0: 'chosen' and 'rejected' are identical"),
        ([{"prompt": "d", "chosen": "a", "rejected": "b"}, {"prompt": "d", "prompt_ids": [5], "chosen": "a",
                                                           "rejected": "b"}] * 600, None),
    ],
)  # fmt: skip
def test_bad_rows(bpe, rows, message):
    if message is None:  # prompt ids that begin behind the rows which decide
        rows, message = [rows[0]] * 1000 + rows[1:2], "row 1000 has 'prompt_ids', which the rows before have not"
    with pytest.raises(DataError, match=message) as caught:
        data.prepare_examples(rows, bpe)
    assert "\n" not in str(caught.value)


def test_ids_that_the_model_has_not(toy, bpe, tmp_path):
    with pytest.raises(DataError, match="the train data hold token id 17, but the model has 10 embeddings"):
        train(toy.model(vocab_size=10), bpe, [entry(token_ids=[17])], tmp_path)

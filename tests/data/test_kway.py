"""Rows of K responses: the pairs formed of them, losses over whole lists, and a greedy response beside the pair."""

import json
import math
from functools import partial

import pytest
import torch

from fastpo import data
from fastpo.data.kway import Forming
from fastpo.data.packing import collate
from fastpo.data.sources import load_rows
from fastpo.errors import ConfigError, DataError, TrainingError
from fastpo.reference.passes import reference_logps

LISTS = ["exo_rw", "infonca", "nca_rw"]


def kway_rows(toy, n=8, sizes=(2, 3, 5)):
    return toy.kway_rows(n, sizes=sizes)


def pair(row, winner, loser, **more):
    won, lost = row["responses"][winner], row["responses"][loser]
    return {"prompt": row["prompt"], "chosen": won["text"], "rejected": lost["text"], **more}


def flat(rows, policy):
    """The pairs as rows of their own, in the order of the rows."""
    out = []
    for row in rows:
        scores = [r["score"] for r in row["responses"]]
        found = [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]
        if policy == "best_worst":
            found = [(scores.index(max(scores)), scores.index(min(scores)))]
        out += [pair(row, i, j, win_prob_chosen=row["responses"][i]["win_prob"],
                     win_prob_rejected=row["responses"][j]["win_prob"]) for i, j in found]  # fmt: skip
    return out


@pytest.fixture
def run(sgd_run):
    return partial(sgd_run, max_steps=2, learning_rate=0.5, beta=0.5)


def logged(result, key="loss"):
    return [line[key] for line in result.log_history if key in line]


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


# ------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("forming", "values", "pairs"),
    [
        (Forming(), [1, 3, 3, 0, 0], [(1, 3)]),
        (Forming(), [2, 2], []),
        (Forming("all"), [1, 3, 3], [(1, 0), (2, 0)]),
        (Forming("all"), [0.0, 0.0, 0.0], []),
        (Forming("margin", 0.1), [0.9, 0.8, 0.85], [(0, 1)]),  # 0.9 - 0.8 is just below 0.1 in floats
        (Forming("margin", 2), [0, 1, 3], [(2, 0), (2, 1)]),
    ],
)
def test_which_pairs_are_formed(forming, values, pairs):
    assert forming.pairs(values) == pairs


def test_rows_become_examples(toy):
    row = {"prompt": "w1", "responses": [{"text": f" w{k + 2}", "score": s} for k, s in enumerate([1, 4, 2, 4, 0])]}
    tie = {"prompt": "w1", "responses": [{"text": " w2", "score": 1}, {"text": " w3", "score": 1}]}
    explicit = row | {"pairs": [[2, 0], [4, 0], [2, 0]]}
    ids = [k + 5 for k in range(5)]  # of the k-th response's one word

    def examples(rows, forming):
        return data.prepare_examples(rows, toy.tokenizer(), forming=forming)

    def of(example):
        return [int(r[0]) for r in example.responses], example.pairs

    (one,), report = examples([row, tie], Forming())
    assert of(one) == ([ids[1], ids[4]], [(0, 1)]) and one.response_columns == {"score": [4.0, 0.0]}
    assert report.dropped == {"no pair (all have the same score)": 1} and report.kept_rows == [0]
    assert "1 pairs of 2 of their 5 responses; 1 dropped: no pair" in report.summary()
    (one,), _ = examples([row], Forming("margin", 3))
    assert of(one) == ([ids[1], ids[0], ids[4], ids[3]], [(0, 1), (0, 2), (3, 1), (3, 2)])
    (one,), _ = examples([explicit], Forming("explicit"))
    assert of(one) == ([ids[2], ids[0], ids[4]], [(0, 1), (2, 1)])
    (one,), _ = examples([row], Forming(whole=True))
    assert of(one) == (ids, [(1, 4)]) and one.response_columns["score"] == [1, 4, 2, 4, 0]
    packed = collate(examples([row], Forming("all"))[0], [0])
    assert len(packed.pairs) == 9 and len(packed.cu_seqlens) == 6  # each response once


def test_a_response_is_the_text_or_the_turns_after_the_prompt(toy, tmp_path):
    datasets = pytest.importorskip("datasets")
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    answers = [{"score": float(k), "text": f"w{k} w7"} for k in range(3)]
    turns = [{"score": a["score"], "messages": [{"role": "assistant", "content": a["text"]}]} for a in answers]
    prompt = [{"role": "user", "content": "w1 w2"}]
    rows = [{"prompt": prompt, "responses": r} for r in (answers, turns)]
    expected = [{"prompt": prompt, "chosen": turns[2]["messages"], "rejected": turns[0]["messages"]}]
    a, b = data.prepare_examples(rows, tokenizer)[0]
    (c,) = data.prepare_examples(expected, tokenizer)[0]
    datasets.Dataset.from_list(rows[:1]).to_parquet(tmp_path / "rows.parquet")
    (d,) = data.prepare_examples(datasets.Dataset.from_list(rows[:1]), tokenizer)[0]
    (e,) = data.prepare_examples(str(tmp_path / "rows.parquet"), tokenizer)[0]
    for other in (b, c, d, e):
        assert [r.tolist() for r in other.responses] == [r.tolist() for r in a.responses]
        assert other.prompt_ids.tolist() == a.prompt_ids.tolist() and other.pairs == a.pairs == [(0, 1)]


def test_truncation(toy):
    rows = kway_rows(toy, 12, sizes=(3,))
    for mode in ("keep_start", "keep_end"):
        examples, report = data.prepare_examples(rows, toy.tokenizer(), max_length=9, truncation_mode=mode,
                                                 forming=Forming("all"))  # fmt: skip
        assert report.truncated and all(len(e.prompt_of(k)) + len(r) <= 9 for e in examples
                                        for k, r in enumerate(e.responses))  # fmt: skip
    begin_alike = {"prompt": "w1", "responses": [{"text": f" w2 w3{' w4' * k}", "score": k} for k in range(3)]}
    short = {"prompt": "w1", "responses": [{"text": f" w{k}", "score": k} for k in range(2)]}
    for forming in (Forming(), Forming("all")):
        _, report = data.prepare_examples([begin_alike, short], toy.tokenizer(), max_length=3, forming=forming)
        assert report.dropped == {"fewer than two distinct responses": 1} and report.kept == 1


@pytest.mark.parametrize("loss", ["dpo", "simpo", "sppo", "dno", ["dpo", "sft"], "aot"])
def test_two_responses_are_a_pair(toy, run, loss):
    rows = kway_rows(toy, sizes=(2,), n=12)
    for row in rows[::2]:
        row["responses"].reverse()
    beta = {} if loss == "simpo" else {"beta": 0.5}
    a, b = (run(r, loss_type=loss, per_device_train_batch_size=5, eval_strategy="epoch", rest={"eval_dataset": r},
                **beta) for r in (rows, flat(rows, "all")))  # fmt: skip
    assert logged(a) == logged(b) and logged(a, "eval_loss") == logged(b, "eval_loss")
    assert torch.equal(weights(a), weights(b)) and a.metrics["num_tokens"] == b.metrics["num_tokens"]


@pytest.mark.parametrize("loss", ["dpo", "sppo", "aot"])
def test_all_pairs_of_eight_are_the_pairs_one_by_one(toy, run, loss):
    rows = kway_rows(toy, n=4, sizes=(8, 3))
    pairs = flat(rows, "all")
    a = run(rows, loss_type=loss, pair_policy="all", max_tokens=70, learning_rate=0.05)
    b = run(pairs, loss_type=loss, per_device_train_batch_size=len(pairs), max_tokens=500, learning_rate=0.05)
    for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert logged(a, key) == pytest.approx(logged(b, key), rel=2e-5, abs=1e-6), key
    torch.testing.assert_close(weights(a), weights(b), atol=2e-6, rtol=2e-5)
    assert a.metrics["num_tokens"] < b.metrics["num_tokens"] / 2


def test_explicit_pairs_and_weights(toy, run):
    rows = [row | {"pairs": [[2, 0], [1, 2]], "weight": 0.5 + i % 2}
            for i, row in enumerate(kway_rows(toy, n=6, sizes=(3, 4)))]  # fmt: skip
    pairs = [pair(row, i, j, weight=row["weight"]) for row in rows for i, j in row["pairs"]]
    a = run(rows, pair_policy="explicit")
    b = run(pairs)
    assert logged(a) == pytest.approx(logged(b), rel=1e-5)
    torch.testing.assert_close(weights(a), weights(b), atol=2e-6, rtol=2e-5)
    no_scores = [{"prompt": r["prompt"], "pairs": r["pairs"], "weight": r["weight"],
                  "responses": [{"text": e["text"]} for e in r["responses"]]} for r in rows]  # fmt: skip
    assert logged(run(no_scores, pair_policy="explicit")) == logged(a)


# --------------------------------------------------------------------------------------------- against plain PyTorch


def ratio(toy, model, ref, prompt, response):
    tokenizer = toy.tokenizer()
    ids = tokenizer(prompt + response + "<eos>")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])

    def logp(m):
        logits = m(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).sum()

    with torch.no_grad():
        base = logp(ref)
    return logp(model) - base


def expected_list(loss, toy, row, model, ref, beta):
    a = beta * torch.stack([ratio(toy, model, ref, row["prompt"], r["text"]) for r in row["responses"]])
    r = torch.tensor([r["score"] for r in row["responses"]]).double()
    if loss == "exo_rw":
        p, q = a.softmax(0), (r / 0.5).softmax(0)
        return (p * (p / q).log()).sum()
    w = (r / 0.8).softmax(0)
    if loss == "infonca":
        return -(w * a.log_softmax(0)).sum()
    return -(w * torch.sigmoid(a).log()).sum() - torch.sigmoid(-a).log().sum() / len(a)


def expected_selm(toy, row, model, ref, beta):
    a, b, g = (ratio(toy, model, ref, row["prompt"], row[k]) for k in ("chosen", "rejected", "greedy"))
    return -torch.sigmoid(beta * (a - b)).log() + 0.3 * beta * g


def with_greedy(toy, n=7):
    extra = toy.rows(n, seed=5)
    return [row | {"greedy": (extra[i]["chosen"], row["chosen"], row["rejected"])[i % 3]}
            for i, row in enumerate(toy.rows(n))]  # fmt: skip


@pytest.mark.parametrize("loss", [*LISTS, "selm"])
def test_steps_of_plain_pytorch(toy, run, loss):
    """Three steps of SGD over rows of differing K, in fp64 on full logits."""
    rows = with_greedy(toy) if loss == "selm" else kway_rows(toy)
    model, ref = toy.model().double(), toy.model().double()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(3):
        of_rows = [expected_selm(toy, row, model, ref, 0.5) if loss == "selm"
                   else expected_list(loss, toy, row, model, ref, 0.5) for row in rows]  # fmt: skip
        value = torch.stack(of_rows).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    kwargs = {"exo_rw": {}, "selm": {"alpha": 0.3}}.get(loss, {"temperature": 0.8})
    result = run(rows, loss_type=loss, loss_kwargs=kwargs, max_tokens=90, max_steps=3)
    assert losses[2] < losses[0]
    assert logged(result) == pytest.approx(losses, rel=1e-4)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(result).double(), expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", [*LISTS, "selm", ["infonca", "dpo"], ["nca_rw", "sft"]])
def test_packing_changes_nothing(toy, run, loss):
    rows = with_greedy(toy) if loss == "selm" else kway_rows(toy, n=10)
    rows = [row | {"weight": 0.5 + i % 2} for i, row in enumerate(rows)]
    cuts = (
        {"per_device_train_batch_size": 8, "max_tokens": 100_000},
        {"per_device_train_batch_size": 8, "max_tokens": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens": 100},
    )
    more = dict(loss_type=loss, rest={"eval_dataset": rows[:7]}, eval_steps=2, learning_rate=0.05)
    runs = [run(rows, **more, **cut) for cut in cuts]
    for other in runs[1:]:
        for key in ("loss", "eval_loss", "grad_norm", "rewards/chosen", "rewards/accuracies"):
            # A log-ratio is the difference of two sums near -60, whose fp32 spacing is 4e-6.
            assert logged(other, key) == pytest.approx(logged(runs[0], key), rel=2e-5, abs=5e-6), key
        torch.testing.assert_close(weights(other), weights(runs[0]), atol=1e-6, rtol=1e-5)


def test_the_metrics_of_a_list_are_those_of_its_best_and_worst(toy, run):
    rows = kway_rows(toy)
    model = toy.model(1)
    a = run(rows, loss_type="nca_rw", max_steps=1, rest={"ref_model": model})
    b = run(flat(rows, "best_worst"), loss_type="dpo", max_steps=1, rest={"ref_model": model})
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert logged(a, key) == pytest.approx(logged(b, key), rel=1e-5), key


def test_mixtures_with_lists(toy, run):
    rows = kway_rows(toy)
    ref = {"rest": {"ref_model": toy.model(1)}, "max_steps": 1, "beta": 0.5}
    both, first, second = (logged(run(rows, loss_type=name, **weight, **ref))[0] for name, weight in (
        (["exo_rw", "dpo"], {"loss_weights": [1.0, 0.25]}), ("exo_rw", {}), ("dpo", {})))  # fmt: skip
    assert both == pytest.approx(first + 0.25 * second, rel=1e-5)


@pytest.mark.parametrize("loss", ["nca_rw", "selm", ["exo_rw", "dpo"]])
def test_a_start_away_from_the_reference_is_refused(toy, run, monkeypatch, loss):
    real = reference_logps
    monkeypatch.setattr(
        "fastpo.reference.passes.reference_logps", lambda *a, **k: [[p + 0.5 for p in row] for row in real(*a, **k)]
    )
    with pytest.raises(TrainingError, match=r"should start at its reference, .* loss \[[-\d., ]+\] instead of \["):
        run(with_greedy(toy) if loss == "selm" else kway_rows(toy), loss_type=loss)


def test_reference_sums_from_the_data(toy, run):
    """Of every response, and of the greedy one."""
    model = toy.model().double()

    def ref(prompt, text):
        zero = lambda **_: type("Logits", (), {"logits": torch.zeros(1, len(toy.tokenizer()(prompt + text + "<eos>")[  # noqa: E731
            "input_ids"]), 100)})()  # fmt: skip
        tokens = len(toy.tokenizer()(text + "<eos>")["input_ids"])
        return float(ratio(toy, model, zero, prompt, text).detach()) - tokens * math.log(100)

    rows = kway_rows(toy)
    given = [row | {"responses": [r | {"ref_logps": ref(row["prompt"], r["text"])} for r in row["responses"]]}
             for row in rows]  # fmt: skip
    assert logged(run(given, loss_type="exo_rw")) == pytest.approx(logged(run(rows, loss_type="exo_rw")), rel=1e-4)
    rows = with_greedy(toy)
    names = {"chosen": "ref_chosen_logps", "rejected": "ref_rejected_logps", "greedy": "ref_greedy_logps"}
    given = [row | {name: ref(row["prompt"], row[k]) for k, name in names.items()} for row in rows]
    options = {"loss_type": "selm", "loss_kwargs": {"alpha": 0.3}}
    assert logged(run(given, **options)) == pytest.approx(logged(run(rows, **options)), rel=1e-4)
    with pytest.raises(DataError, match="row 0: the responses' ref_logps need 'ref_greedy_logps' beside them"):
        run([{k: v for k, v in row.items() if k != "ref_greedy_logps"} for row in given], **options)


def test_a_greedy_response_among_k(toy, run):
    """As a column, marked in its entry, and beside a pair: the same; a response that it equals is not doubled."""
    rows = kway_rows(toy, sizes=(4,))
    pairs = flat(rows, "best_worst")
    of = [row["responses"][1 + i % 3]["text"] for i, row in enumerate(rows)]
    column = [row | {"greedy": text} for row, text in zip(rows, of, strict=True)]
    marked = [row | {"responses": [r | {"greedy": r["text"] == text} for r in row["responses"]]}
              for row, text in zip(rows, of, strict=True)]  # fmt: skip
    beside = [row | {"greedy": text} for row, text in zip(pairs, of, strict=True)]
    runs = [run(r, loss_type="selm", loss_kwargs={"alpha": 0.3}) for r in (column, marked, beside)]
    assert logged(runs[0]) == logged(runs[1]) == logged(runs[2])
    assert runs[0].metrics["num_tokens"] == runs[1].metrics["num_tokens"] == runs[2].metrics["num_tokens"]
    examples, _ = data.prepare_examples(beside, toy.tokenizer(), columns=["greedy"])
    assert {(len(e.responses), e.greedy) for e in examples} <= {(3, 2), (2, 0), (2, 1)}
    assert "greedy" in data.describe_example(next(e for e in examples if e.greedy == 2), toy.tokenizer())


# ---------------------------------------------------------------------------------------------------------- bad input


def change(**entry):
    """Changes the second response of the first row; None takes a key away."""

    def of(rows):
        changed = {k: v for k, v in (rows[0]["responses"][1] | entry).items() if v is not None}
        first = rows[0] | {"responses": [rows[0]["responses"][0], changed, *rows[0]["responses"][2:]]}
        return [first, *rows[1:]]

    return of


def every(**columns):
    return lambda rows: [row | columns for row in rows]


def only(*keys):
    return lambda rows: [row | {"responses": [{k: r[k] for k in keys} for r in row["responses"]]} for row in rows]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda rows: [rows[0] | {"responses": rows[0]["responses"][:1]}, *rows[1:]], {},
         "row 0: a preference needs two responses or more, 'responses' has 1"),
        (change(score=None), {}, "row 0: response 1 has no 'score'"),
        (change(score=math.nan), {}, "row 0: response 1: 'score' is nan, expected a finite number"),
        (change(win_prob=1.2), {"loss_type": "sppo"}, "row 0: response 1: 'win_prob' is 1.2, expected a number from 0"),
        (change(win_prob=None), {"loss_type": "dno"}, "row 0: response 1 has no 'win_prob'"),
        (only("text"), {}, "pair_policy=best_worst compares responses by 'score' or 'win_prob', and those of row 0"),
        (lambda rows: [row | {"responses": [{"text": r["text"], "scores": 1} for r in row["responses"]]}
                       for row in rows], {}, "rename 'scores' to 'score'"),
        (only("text", "score"), {"loss_type": "sppo"}, "loss_type='sppo' needs 'win_prob' in every entry"),
        (only("text", "win_prob"), {"loss_type": "infonca"}, "loss_type='infonca' needs 'score' in every entry"),
        (only("text", "win_prob"), {"loss_type": "dpo_soft"}, "P.chosen beats rejected., which is a pair's"),
        (change(text=""), {}, "row 0: response 1 is empty"),
        (change(text=None), {}, "row 0: response 1 needs 'text', 'messages' or 'token_ids', found 'score', 'win_prob'"),
        (change(text=None, texts="w1"), {}, "did you mean 'texts'"),
        (change(messages=[]), {}, "row 0: response 1 needs 'text', 'messages' or 'token_ids', not both"),
        (change(text=None, messages=[{"role": "assistant", "content": "w1"}]), {}, "where the prompt is a text"),
        (every(), {"pair_policy": "explicit"}, "pair_policy=explicit reads the column 'pairs', missing from"),
        (every(pairs=[[0, 9]]), {"pair_policy": "explicit"}, r"column 'pairs' has \[0, 9\], and the \d responses"),
        (every(pairs=[[0, -1]]), {"pair_policy": "explicit"}, "are numbered 0 to"),
        (every(pairs=[[1, 1]]), {"pair_policy": "explicit"}, r"\[1, 1\], which is no \[winner, loser\]"),
        (every(pairs="0>1"), {"pair_policy": "explicit"}, r"must be a list of \[winner, loser\]"),
        (every(responses=[{"text": " w1", "score": 1}, {"text": " w2", "score": 1}]), {}, "no row is left"),
        (every(responses=None), {}, "the first 8 rows have no 'responses', or no prompt"),
        (every(responses="w1"), {}, "must be a list of objects with 'text' or 'messages'"),
        (every(chosen="w1"), {}, "the data have 'responses' and 'chosen': leave out one of them"),
        (lambda rows: [{"responses": r["responses"], "prompts": "w1"} for r in rows], {}, "did you mean 'prompts'"),
        (every(), {"loss_type": "kto"}, "rows of K responses are for losses of pairs and lists"),
        (every(), {"loss_type": "selm"}, "row 0 has neither 'greedy'"),
        (every(), {"loss_type": ["selm", "infonca"]}, "infonca reads whole lists of responses and selm one beside"),
        (every(), {"loss_type": "infonca", "pair_policy": "all"}, "leave pair_policy=all out"),
        (every(), {"pair_policy": "margin"}, "pair_policy=margin and pair_margin need each other"),
        (every(), {"pair_margin": 1.0}, "pair_policy=margin and pair_margin need each other"),
        (every(), {"pair_policy": "margin", "pair_margin": 0}, "pair_margin must be positive"),
        (every(), {"pair_policy": "worst"}, "pair_policy must be one of best_worst, all, margin, explicit"),
    ],
)  # fmt: skip
def test_bad_input(toy, run, make, options, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        run(make(kway_rows(toy)), **options)
    assert "\n" not in str(caught.value)


def test_rows_of_one_response_are_refused_or_dropped(toy):
    """Of one that was given; those of which one is left are no mistake (test_exact.py)."""
    rows = kway_rows(toy, sizes=(3,))
    for response in rows[1]["responses"]:
        response["text"] = rows[1]["responses"][0]["text"]
    rows[3]["responses"] = rows[3]["responses"][:1]
    with pytest.raises(DataError, match="row 3: a preference needs two responses or more, .*invalid_rows='drop'"):
        data.prepare_examples(rows, toy.tokenizer())
    examples, report = data.prepare_examples(rows, toy.tokenizer(), invalid="drop")
    assert report.dropped == {"fewer than two distinct responses": 1, "fewer than two responses": 1}
    assert len(examples) == 6


def test_win_probabilities_are_held_to_each_other_where_a_loss_reads_them(toy, run):
    """One response with two of them: two judgements to compare by, a contradiction to train on."""
    (row,) = kway_rows(toy, n=1, sizes=(3,))
    texts = [r["text"] for r in row["responses"]]
    rows = [row | {"responses": [{"text": text, "win_prob": p} for text, p in zip(texts, probs, strict=True)]}
            for probs in ((0.1, 0.5, 0.9), (0.2, 0.5, 0.7))]  # fmt: skip
    run(rows, max_steps=1)
    with pytest.raises(DataError, match=r"rows 0 and 1 contradict .* 0.9 by the one and 0.7 by the other"):
        run(rows, loss_type="sppo")


def test_the_columns_that_pairs_lack(toy, run):
    with pytest.raises(DataError, match="loss_type='selm' needs the column 'greedy', which the dataset has not"):
        run(toy.rows(4), loss_type="selm")
    with pytest.raises(DataError, match="loss_type='exo_rw' needs the column 'chosen_score' with 'rejected_score'"):
        run(toy.rows(4), loss_type="exo_rw")


def test_options_that_do_nothing_are_said(toy, caplog):
    _, report = data.prepare_examples(toy.rows(3), toy.tokenizer(), forming=Forming("all"))
    assert report.warnings == ["pair_policy=all has no effect: the rows have no 'responses'"]
    rows = [row | {"pairs": [[0, 1]], "win_prob": 0.3} for row in kway_rows(toy)]
    _, report = data.prepare_examples(rows, toy.tokenizer())
    assert report.warnings == ["the column 'pairs' is not used: pair_policy=explicit reads it",
                               "the columns 'win_prob' are not used for K-way rows"]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ real, and CLI


def byte_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_eight_real_responses(shared_data):
    """805 rows, 19 of them with equal responses, which are one with the mean of their win probabilities."""
    raw = load_rows(shared_data("alpaca_eval_kway.jsonl.gz"))
    with pytest.raises(DataError, match="rename 'win_prob_vs_baseline' to 'win_prob'"):
        data.prepare_examples(raw, byte_tokenizer())
    rows = [{"prompt": r["prompt"], "responses": [{"text": e["text"], "win_prob": e["win_prob_vs_baseline"]}
             for e in r["responses"]]} for r in raw]  # fmt: skip
    means = []
    for row in rows:
        by_text: dict[str, list[float]] = {}
        for r in row["responses"]:
            by_text.setdefault(r["text"], []).append(r["win_prob"])
        means.append([sum(p) / len(p) for p in by_text.values()])
    assert sum(len(row) < 8 for row in means) == 19
    for forming, least in ((Forming(), None), (Forming("all"), 0.0), (Forming("margin", 0.5), 0.5)):
        gaps = [[a - b for a in row for b in row if a > b] for row in means]
        pairs = [1 if least is None else sum(gap >= least - 1e-9 for gap in row) for row in gaps]
        kept = sum(map(bool, pairs))
        examples, report = data.prepare_examples(rows, byte_tokenizer(), forming=forming)
        assert sum(report.dropped.values()) == 805 - kept and 0 < kept <= 805
        assert (len(examples), report.pairs, sum(len(e.pairs) for e in examples)) == (kept, sum(pairs), sum(pairs))
        assert report.merged == sum(8 - len(row) for row, n in zip(means, pairs, strict=True) if n)
        assert all(e.pair_columns["win_prob_chosen"][k] > e.pair_columns["win_prob_rejected"][k]
                   for e in examples for k in range(len(e.pairs)))  # fmt: skip


def test_the_command_reads_k_responses(toy, tmp_path):
    from fastpo import cli

    toy.model().save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in kway_rows(toy)))
    options = ["--pair-policy", "margin", "--pair-margin", "0.5", "--max-steps", "1", "--use-cpu", "--disable-tqdm",
               "--logging-steps", "1", "--no-report", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(["train", "--model", str(tmp_path / "model"), "--train-dataset", str(path), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_explicit_pairs_have_weights_of_their_own(toy):
    """[winner, loser, weight]: a pair that is there twice has the sum; rows without have ones; merged ones add up."""
    rows = [
        {"prompt": "w1", "responses": [{"text": f" w{k}"} for k in (2, 3, 4)],
         "pairs": [[0, 1, 0.5], [0, 2, 2], [0, 1, 1]]},
        {"prompt": "w1", "responses": [{"text": " w2"}, {"text": " w3"}], "pairs": [[1, 0]]},
        {"prompt": "w5", "responses": [{"text": " w2"}, {"text": " w3"}, {"text": " w3"}], "weight": 3.0,
         "pairs": [[0, 1, 0.25], [0.0, 2.0, 0.5]]},
    ]  # fmt: skip
    examples, _ = data.prepare_examples(
        [{"weight": 1.0, **row} for row in rows], toy.tokenizer(), kind="preference", forming=Forming("explicit")
    )
    assert [e.pairs for e in examples] == [[(0, 1), (0, 2)], [(0, 1)], [(0, 1)]]
    assert [e.pair_columns["weight"] for e in examples] == [[1.5, 2.0], [1.0], [2.25]]


def test_a_pairs_weight_that_is_none_is_refused(toy):
    row = {"prompt": "w1", "responses": [{"text": " w2"}, {"text": " w3"}], "pairs": [[0, 1, -1]]}
    with pytest.raises(DataError, match="at least 0"):
        data.prepare_examples([row], toy.tokenizer(), kind="preference", forming=Forming("explicit"))

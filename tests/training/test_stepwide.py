"""Losses that look at a whole step: the same numbers for any packing, against their formulas on full logits."""

import json

import numpy as np
import pytest
import torch

from fastpo import data
from fastpo.errors import ConfigError, DataError

WIDE = ["kto", "bco", "aot", "aot_unpaired"]


def unpaired_rows(toy, n=14, seed=3):
    rows = [{"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in toy.rows(n, seed=seed)
            for k in ("chosen", "rejected")]  # fmt: skip
    return rows[: n + 1]  # as many desirable as not, and one more


@pytest.fixture
def run(sgd_run, tmp_path):
    def call(rows, name="run", **options):
        defaults = dict(
            output_dir=str(tmp_path / name), max_steps=3, per_device_train_batch_size=8, learning_rate=0.05, beta=0.5,
            save_strategy="steps",
        )  # fmt: skip
        return sgd_run(rows, **{**defaults, **options})

    return call


def rows_for(toy, loss):
    return unpaired_rows(toy) if loss in ("kto", "bco") else toy.rows(15)


def logged(result, key):
    return [line[key] for line in result.log_history if key in line]


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


@pytest.mark.parametrize("loss", WIDE)
def test_packing_changes_nothing(toy, run, loss):
    """One micro-batch a step, or one a row; accumulated or not; evaluation too."""
    rows = rows_for(toy, loss)
    rest = {"eval_dataset": rows[:9]}
    runs = [
        run(rows, f"run{i}", loss_type=loss, rest=rest, eval_steps=2, **cut)
        for i, cut in enumerate([
            {"max_tokens": 100_000}, {"max_tokens": 1},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens": 60},
        ])
    ]  # fmt: skip
    keys = ["loss", "eval_loss", "grad_norm", "rewards/chosen", *(["kl", "eval_kl"] if loss == "kto" else [])]
    for other in runs[1:]:
        for key in keys:
            assert logged(other, key) == pytest.approx(logged(runs[0], key), rel=2e-5, abs=1e-6), key
        torch.testing.assert_close(weights(other), weights(runs[0]), atol=1e-6, rtol=1e-5)


def of_response(model, tokenizer, prompt, response):
    ids = tokenizer(prompt + response + "<eos>")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).sum()


def logistic(u):
    return -torch.nn.functional.logsigmoid(u)


def expected_loss(loss, toy, rows, model, ref, beta, seen):
    """The loss of one step over `rows` as its paper writes it; `seen` holds the log-ratios of the steps before."""
    tokenizer = toy.tokenizer()

    def ratio(prompt, response):
        with torch.no_grad():
            base = of_response(ref, tokenizer, prompt, response)
        return of_response(model, tokenizer, prompt, response) - base

    if loss in ("kto", "bco"):
        a = torch.stack([ratio(r["prompt"], r["completion"]) for r in rows])
        label = torch.tensor([r["label"] for r in rows])
        if loss == "bco":
            seen += a.detach().tolist()
            u = beta * a - beta * torch.tensor(seen).double().mean()
            return logistic(torch.where(label, u, -u)).mean()
        n = len(rows)
        others = [next(rows[(i + k) % n] for k in range(1, n) if rows[(i + k) % n]["prompt"] != rows[i]["prompt"])
                  for i in range(n)]  # fmt: skip
        with torch.no_grad():
            z = torch.stack([ratio(r["prompt"], o["completion"]) for r, o in zip(rows, others, strict=True)]).mean()
        u = beta * (a - z.clamp(min=0))
        return torch.where(label, 1 - torch.sigmoid(u), 1 - torch.sigmoid(-u)).mean()
    a = torch.stack([ratio(r["prompt"], r["chosen"]) for r in rows])
    b = torch.stack([ratio(r["prompt"], r["rejected"]) for r in rows])
    if loss == "aot_unpaired":
        return logistic(beta * (a.sort().values - b.sort().values)).mean()
    with torch.no_grad():
        reference = [of_response(ref, tokenizer, r["prompt"], r["chosen"]) - of_response(
            ref, tokenizer, r["prompt"], r["rejected"]) for r in rows]  # fmt: skip
    reference = torch.stack(reference)
    return logistic(beta * ((a - b + reference).sort().values - reference.sort().values)).mean()


@pytest.mark.parametrize("loss", WIDE)
def test_steps_of_plain_pytorch(toy, run, loss):
    """Three steps of SGD over all rows, in fp64 on full logits."""
    rows = rows_for(toy, loss)
    model, ref = toy.model().double(), toy.model().double()
    optimizer, losses, seen = torch.optim.SGD(model.parameters(), lr=2.0), [], []
    for _ in range(3):
        value = expected_loss(loss, toy, rows, model, ref, 0.5, seen)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    result = run(rows, loss_type=loss, per_device_train_batch_size=len(rows), max_tokens=90, learning_rate=2.0)
    assert losses[2] < losses[0]
    assert logged(result, "loss") == pytest.approx(losses, rel=1e-4)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(result).double(), expected, atol=2e-5, rtol=1e-3)


def test_pairs_become_unpaired_rows(toy, run):
    rows = toy.rows(6)
    flat = [{"prompt": r["prompt"], "completion": r[k], "label": int(k == "chosen")}
            for k in ("chosen", "rejected") for r in rows]  # in TRL's order  # fmt: skip
    one, two = (
        run(r, name, loss_type="kto", train_sampling_strategy="sequential") for r, name in ((rows, "a"), (flat, "b"))
    )
    assert logged(one, "loss") == logged(two, "loss") and torch.equal(weights(one), weights(two))
    assert "rewards/margins" in one.log_history[0] and "rewards/accuracies" not in one.log_history[0]


def test_the_mean_reward_goes_on_after_a_resume(toy, run):
    rows = unpaired_rows(toy)
    options = dict(loss_type="bco", save_steps=2, max_steps=4)
    whole = run(rows, "whole", **options)
    run(rows, "cut", **{**options, "max_steps": 2})
    resumed = run(rows, "cut", **options, resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_kl_of_other_prompts(toy, caplog):
    tokenizer = toy.tokenizer()
    rows = [
        {"prompt": p, "completion": f" w{i}", "label": True} for i, p in enumerate(["w1 w2", "w1 w2", "w3", "w4 w5"])
    ]
    examples, _ = data.prepare_examples(rows, tokenizer, kind="unpaired", max_length=3)
    found = data.mismatched(examples, 3)
    assert [e.responses[0].tolist() for e in found] == [
        [5],
        [5],
        [6],
        [3],
    ]  # w2, w2, w3, w0, cut to 3 with their prompts
    assert all(a.prompt_ids is b.prompt_ids for a, b in zip(found, examples, strict=True))
    with caplog.at_level("WARNING", logger="fastpo.data"):
        found = data.mismatched(examples[:2], None)
    assert "all rows have the same prompt" in caplog.text
    assert [e.responses[0].tolist() for e in found] == [examples[k].responses[0].tolist() for k in (1, 0)]
    with pytest.raises(DataError, match="there is only one"):
        data.mismatched(examples[:1], None)


def test_rows_sorted_by_prompt_are_no_quadratic_work(monkeypatch):
    rows = [data.Example(np.array([i // 200]), [np.array([i])]) for i in range(1000)]
    calls, equal = [], np.array_equal
    monkeypatch.setattr(np, "array_equal", lambda a, b: calls.append(1) or equal(a, b))
    found = [int(e.responses[0][0]) for e in data.mismatched(rows, None)]
    assert found == [(i // 200 + 1) % 5 * 200 for i in range(1000)]
    assert len(calls) <= 2 * len(rows)


def test_mixtures_and_balance(toy, run, caplog):
    rows = unpaired_rows(toy)
    result = run(
        rows, loss_type=["kto", "sft"], loss_weights=[1.0, 0.5], loss_kwargs={"desirable_weight": 3.0}, max_steps=1
    )
    assert "kto: desirable_weight x 8 rows is 3.43 of undesirable_weight x 7 rows" in caplog.text
    model, tokenizer = toy.model().double(), toy.tokenizer()
    desirable = [r for r in rows if r["label"]]
    # One step of 8 rows: the sft term is the mean over tokens of the desirable ones among them.
    assert result.log_history[0]["loss"] > 0.5
    whole = run(rows, "whole", loss_type=["kto", "sft"], loss_weights=[0.0, 1.0], max_steps=1,
                per_device_train_batch_size=len(rows))  # fmt: skip
    with torch.no_grad():
        sums = [of_response(model, tokenizer, r["prompt"], r["completion"]) for r in desirable]
    lengths = [len(tokenizer(r["completion"] + "<eos>")["input_ids"]) for r in desirable]
    assert whole.log_history[0]["loss"] == pytest.approx(-sum(sums).item() / sum(lengths), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (lambda t: unpaired_rows(t), {"loss_type": "dpo"}, "rows with 'completion' are for loss_type='kto' or 'bco'"),
        (lambda t: unpaired_rows(t), {"loss_type": ["kto", "dpo"]}, "kto takes unpaired rows and dpo pairs"),
        (lambda t: [r | {"label": "perhaps"} for r in unpaired_rows(t)], {"loss_type": "kto"},
         "must be true or false, not 'perhaps'"),
        (lambda t: [{"prompt": "w1", "completion": "w2"}] * 3, {"loss_type": "bco"}, "unpaired rows need the columns"),
        (lambda t: [r | {"weight": 2.0} for r in t.rows(4)], {"loss_type": "aot"}, "leave the column weight out"),
        (lambda t: t.rows(4), {"loss_type": "aot", "disable_dropout": False}, "dropout must be off: disable_dropout"),
        (lambda t: [r | {"ref_chosen_logps": -9.0, "ref_rejected_logps": -9.0} for r in t.rows(4)],
         {"loss_type": "kto"}, "ref_chosen_logps and ref_rejected_logps of the train data cannot: pass ref_model"),
    ],
)  # fmt: skip
def test_bad_input(toy, run, rows, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run(rows(toy), **options)


def test_the_command_reads_unpaired_rows(toy, tmp_path):
    from fastpo import cli

    toy.model().save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in unpaired_rows(toy)))
    options = ["--loss-type", "kto", "--loss-kwargs", '{"undesirable_weight": 1.1}', "--max-steps", "1", "--use-cpu",
               "--disable-tqdm", "--no-report", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(["train", "--model", str(tmp_path / "model"), "--train-dataset", str(path), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] == 0 or abs(lines[0]["kl"]) < 1e-5


def test_labels_of_a_dataset_object(toy, run):
    """Its columns are selected by name before rows are read."""
    datasets = pytest.importorskip("datasets")
    rows = unpaired_rows(toy)
    one, two = run(rows, "a", loss_type="kto"), run(datasets.Dataset.from_list(rows), "b", loss_type="kto")
    assert logged(one, "loss") == logged(two, "loss")


def test_pairs_with_a_column_named_label_are_pairs(toy, run):
    rows = toy.rows(6)
    one, two = (run(r, loss_type="kto", name=n) for r, n in ((rows, "a"), ([r | {"label": 3} for r in rows], "b")))
    assert logged(one, "loss") == logged(two, "loss")


def test_weights_of_pairs_that_become_rows(toy, run, caplog):
    run([r | {"weight": 2.0} for r in toy.rows(6)], loss_type="kto", max_steps=1)
    assert "the column 'weight' is not used: kto takes each response of a pair as a row of its own" in caplog.text


def test_the_kl_counts_token_weights_as_the_rewards_do(toy, run):
    def kl(weight):
        rows = [r | {f"{k}_token_weights": [weight] * (len(r[k].split()) + 1) for k in ("chosen", "rejected")}
                for r in toy.rows(6)]  # fmt: skip
        result = run(rows, f"by{weight}", loss_type="kto", max_steps=1, rest={"ref_model": toy.model(1)})
        return result.log_history[0]["kl"]

    once, twice = kl(1.0), kl(2.0)
    assert abs(once) > 0.01 and twice == pytest.approx(2 * once, rel=1e-4)


@pytest.mark.parametrize(
    ("metric", "kinds", "message"),
    [
        ("rewards/margins", (True, False), None),
        ("rewards/accuracies", (True, False), "no evaluation reports 'eval_rewards/accuracies'"),
        ("rewards/margins", (True,), "no evaluation reports 'eval_rewards/margins'"),
    ],
)
def test_what_unpaired_rows_can_be_best_by(toy, run, metric, kinds, message):
    rows, began = unpaired_rows(toy), []
    evaluated = [r for r in rows if r["label"] in kinds]

    class Begins:
        def on_train_begin(self, args, state, control, **kwargs):
            began.append(True)

    options = dict(loss_type="kto", eval_steps=1, save_steps=1, load_best_model_at_end=True,
                   metric_for_best_model=metric, rest={"eval_dataset": evaluated, "callbacks": [Begins()]})  # fmt: skip
    if message is None:
        assert run(rows, **options).state.best_metric is not None
        return
    with pytest.raises(ConfigError, match=message):
        run(rows, **options)
    assert not began, "it is said before training"

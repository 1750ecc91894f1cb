"""Rows that name their loss: each is trained by that one alone, whatever it is packed with."""

from functools import partial

import pytest
import torch

from fastpo import data
from fastpo.checkpoints.checkpoint import data_fingerprint
from fastpo.data.kway import Forming
from fastpo.data.packing import collate
from fastpo.errors import ConfigError, DataError, TrainingError
from fastpo.losses.table import LOSSES
from fastpo.reference.passes import reference_logps

TRAINED = [name for name, loss in LOSSES.items() if not loss.online and loss.shape == "pairs" and not loss.of_step]


@pytest.fixture
def run(sgd_run):
    return partial(sgd_run, max_steps=2, learning_rate=0.2, beta=0.5)


def logged(result, key="loss"):
    return [line[key] for line in result.log_history if key in line]


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()]).double()


def named(rows, loss, **more):
    return [row | {"loss": loss} | more for row in rows]


def sft_rows(toy, n, seed=9):
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in toy.rows(n, seed)]


def mixture(toy):
    """Pairs of two losses, completions and chosen responses of sft; weights; one prompt in rows of three kinds."""
    pairs = toy.rows(12)
    rows = named(pairs[:5], "dpo") + named(pairs[5:8], "ipo") + named(pairs[8:10], "sft")
    rows += named(sft_rows(toy, 4), "sft")
    rows = [row | {"weight": 0.5 + 0.25 * (i % 5)} for i, row in enumerate(rows)]
    for k in (5, 11):
        rows[k]["prompt"] = rows[0]["prompt"]
    return rows[::2] + rows[1::2]


# ------------------------------------------------------------------------------------------------ against plain PyTorch


def logp(toy, model, prompt, response):
    """[tokens] fp64 of the response and its end, by the model's own logits."""
    tokenizer = toy.tokenizer()
    ids = tokenizer(prompt + response + "<eos>")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


def expected(toy, rows, model, ref):
    """dpo + 0.5 ipo + 0.25 sft of the rows: a mean over all pairs, and over the tokens of the sft rows."""
    pairs, nll, tokens = [], [], 0
    for row in rows:
        if row["loss"] == "sft":
            own = logp(toy, model, row["prompt"], row.get("completion") or row["chosen"])
            nll.append(-row["weight"] * own.sum())
            tokens += len(own)
            continue
        own = [logp(toy, model, row["prompt"], row[k]) for k in ("chosen", "rejected")]
        with torch.no_grad():
            base = [logp(toy, ref, row["prompt"], row[k]).sum()[None] for k in ("chosen", "rejected")]
        sums, lengths = [x.sum()[None] for x in own], [torch.tensor([float(len(x))]).double() for x in own]
        more = {"chosen_len": lengths[0], "rejected_len": lengths[1]}
        loss = LOSSES[row["loss"]](*sums, *base, beta=0.5, **(more if row["loss"] == "ipo" else {}))
        pairs.append({"dpo": 1.0, "ipo": 0.5}[row["loss"]] * row["weight"] * loss.sum())
    return torch.stack(pairs).mean() + 0.25 * torch.stack(nll).sum() / tokens


def test_steps_of_plain_pytorch(toy, run):
    rows = mixture(toy)
    model, ref = toy.model().double(), toy.model(1).double()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.2), []
    for _ in range(3):
        loss = expected(toy, rows, model, ref)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    options = {"loss_type": ["dpo", "ipo", "sft"], "loss_weights": [1.0, 0.5, 0.25], "max_steps": 3}
    result = run(rows, **options, max_tokens=90, rest={"ref_model": toy.model(1)})
    assert logged(result) == pytest.approx(losses, rel=1e-5)
    want = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(result), want, atol=5e-6, rtol=1e-4)


def test_packing_changes_nothing(toy, run):
    rows = mixture(toy)
    cuts = (
        {"per_device_train_batch_size": 8, "max_tokens": 100_000},
        {"per_device_train_batch_size": 8, "max_tokens": 1},
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_tokens": 60,
            "share_prompts": "always",
        },
    )
    more = dict(loss_type=["sft", "dpo", "ipo"], rest={"eval_dataset": rows[:9], "ref_model": toy.model(1)},
                eval_steps=1, eval_strategy="steps", token_metrics=True)  # fmt: skip
    runs = [run(rows, **more, **cut) for cut in cuts]
    for other in runs[1:]:
        for key in ("loss", "eval_loss", "grad_norm", "rewards/margins", "logps/chosen", "mean_token_accuracy"):
            assert logged(runs[0], key)
            assert logged(other, key) == pytest.approx(logged(runs[0], key), rel=2e-5, abs=5e-6), key
        torch.testing.assert_close(weights(other), weights(runs[0]), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ against single losses


ALONE: dict[str, object] = {}  # the run of `sft`, which is beside every loss below


@pytest.mark.parametrize("loss", TRAINED)
def test_a_loss_beside_sft_is_the_sum_of_both_apart(toy, run, loss):
    """Of every loss that rows may name: the loss of the first step and its gradient."""
    pairs = [row | {"win_prob": 0.6 + 0.05 * i, "greedy": row["rejected"] if i % 2 else " w1 w2"}
             for i, row in enumerate(toy.rows(5))]  # fmt: skip
    own = LOSSES[loss]
    read = {"greedy"} if "greedy_logps" in own.needs else {"win_prob"} if own.win_prob or own.pair_prob else set()
    pairs = [{k: v for k, v in row.items() if k in {"prompt", "chosen", "rejected", *read}} for row in pairs]
    singles = sft_rows(toy, 4)
    models = {"ref_model": toy.model(1)} if own.reference else {}
    more = {"prev_model": toy.model(2)} if own.previous else {}
    options = {"max_steps": 1, "beta": 0.5 if "beta" in own.defaults else None, "rest": models | more}
    rows = named(pairs, loss) + named(singles, "sft")  # sampo draws by the number of a row
    both = run(rows, loss_type=[loss, "sft"], loss_weights=[0.5, 2.0], max_tokens=70, **options)
    first = run(pairs, loss_type=loss, loss_weights=[0.5], **options)
    if "sft" not in ALONE:
        ALONE["sft"] = run(singles, loss_type="sft", loss_weights=[2.0], max_steps=1, beta=None)
    second = ALONE["sft"]
    start = torch.cat([p.detach().flatten() for p in toy.model().parameters()]).double()
    assert logged(both)[0] == pytest.approx(logged(first)[0] + logged(second)[0], rel=2e-5)
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert logged(both, key)[0] == pytest.approx(logged(first, key)[0], rel=2e-5, abs=5e-6), key
    moved = weights(first) + weights(second) - 2 * start
    assert moved.abs().max() > 1e-3 or loss.startswith(("sppo", "inpo"))
    torch.testing.assert_close(weights(both) - start, moved, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("losses", [["rpo", "dpo"], ["orpo", "cpo"], ["slic", "simpo"], ["sppo", "dpo"]])
def test_two_losses_of_pairs_are_the_mean_over_all_pairs(toy, run, losses):
    """An NLL of a loss's own is that of its rows, of orpo with their prompts."""
    pairs = [row | ({"win_prob_chosen": 0.7, "win_prob_rejected": 0.2} if losses[0] == "sppo" else {})
             for row in toy.rows(4)]  # fmt: skip
    others = toy.rows(3, seed=4)
    others[0]["prompt"] = pairs[0]["prompt"]
    models = {"rest": {"ref_model": toy.model(1)}} if "dpo" in losses else {}
    options = {"max_steps": 1, "loss_kwargs": {"nll_reduction": "seq_mean"} if "slic" in losses else None}
    options["beta"] = None if "slic" in losses else 0.5
    nll = next((n for name in losses if (n := LOSSES[name].nll)), None)
    rows = named(pairs, losses[0]) + named(others, losses[1])
    both = logged(run(rows[::2] + rows[1::2], loss_type=losses, max_tokens=80, **models, **options))[0]
    apart = []
    for part, name in ((pairs, losses[0]), (others, losses[1])):
        whole = logged(run(part, loss_type=name, **(models if LOSSES[name].reference else {}), **(
            options if LOSSES[name].nll else options | {"loss_kwargs": None})))[0]  # fmt: skip
        of_pairs = whole
        if LOSSES[name].nll and options["loss_kwargs"] is None:  # a mean over tokens: of the loss's own rows
            of_pairs = logged(run(part, loss_type=name, loss_kwargs={LOSSES[name].nll: 0.0},
                                  **(models if LOSSES[name].reference else {}), max_steps=1))[0]  # fmt: skip
        apart.append(len(part) / 7 * of_pairs + (whole - of_pairs))
    assert both == pytest.approx(sum(apart), rel=2e-5), nll


def test_a_start_away_from_the_reference_is_refused(toy, run, monkeypatch):
    """With the losses of those rows of the batch that have one."""
    real = reference_logps
    monkeypatch.setattr(
        "fastpo.reference.passes.reference_logps", lambda *a, **k: [[p + 0.5 for p in row] for row in real(*a, **k)]
    )
    with pytest.raises(TrainingError, match=r"should start at its reference, .* loss \[[\d.]+\] instead of \[0.6931\]"):
        run(named(toy.rows(3), "dpo") + named(sft_rows(toy, 2), "sft"), loss_type=["ipo", "dpo", "sft"])


def test_own_metrics_of_an_evaluation(toy, run):
    """Of every pair, whatever its loss; rows of sft have none."""
    rows = mixture(toy)
    seen = []
    options = {"loss_type": ["dpo", "ipo", "sft"], "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    run(rows, **options, rest={"eval_dataset": rows, "compute_metrics": lambda e: seen.append(e) or {}})
    assert seen[0].rows.tolist() == [i for i, row in enumerate(rows) if row["loss"] != "sft"]
    assert seen[0].rejected_logps.shape == seen[0].ref_chosen_logps.shape == (8,)


def test_all_rows_of_one_loss(toy, run):
    """Are a run with that loss alone, and with one loss the column says nothing."""
    rows = toy.rows(6)
    base = run(rows, loss_type="dpo", loss_weights=[0.5])
    for given, options in ((named(rows, "sigmoid"), {"loss_type": ["dpo", "ipo"], "loss_weights": [0.5, 1.0]}),
                           (named(rows, "dpo"), {"loss_type": "dpo", "loss_weights": [0.5]})):  # fmt: skip
        other = run(given, **options)
        assert logged(other) == pytest.approx(logged(base), rel=1e-6)
        torch.testing.assert_close(weights(other), weights(base), atol=1e-7, rtol=1e-6)
    summed = run(rows, loss_type=["dpo", "ipo"])
    assert logged(run(rows, loss_type=["dpo", "ipo"])) == logged(summed) != logged(base)


def test_k_responses(toy, run):
    """Pairs of some rows, the winners of others, and single answers of others still."""
    rows = toy.kway_rows(8, sizes=(2, 3, 4))
    singles = sft_rows(toy, 2)
    given = [row | {"loss": ("dpo", "sft", "ipo")[i % 3], "weight": 0.5 + i % 2} for i, row in enumerate(rows)]
    one = {"prompt": singles[1]["prompt"], "responses": [{"text": singles[1]["completion"]}]}
    given += [row | {"loss": "sft", "weight": 2.0} for row in (singles[0], one)]
    flat = []
    for row in given[:8]:
        found = [(a["text"], b["text"]) for a in row["responses"] for b in row["responses"] if a["score"] > b["score"]]
        keys = {k: row[k] for k in ("prompt", "loss", "weight")}
        if row["loss"] == "sft":
            flat += [keys | {"completion": text} for text in dict.fromkeys(a for a, _ in found)]
        else:
            flat += [keys | {"chosen": a, "rejected": b} for a, b in found]
    flat += [row | {"loss": "sft", "weight": 2.0} for row in singles]
    more = {"loss_type": ["dpo", "ipo", "sft"], "rest": {"ref_model": toy.model(1)}, "max_tokens": 100}
    a, b = run(given, pair_policy="all", **more), run(flat, **more)
    assert logged(a) == pytest.approx(logged(b), rel=1e-5)
    torch.testing.assert_close(weights(a), weights(b), atol=2e-6, rtol=2e-5)


def test_reference_sums_from_the_data(toy, run):
    """Rows of sft have none."""
    import fastpo

    pairs, singles = toy.rows(5), sft_rows(toy, 3)
    logps = fastpo.sequence_logps(toy.model(1), pairs, processing_class=toy.tokenizer())
    sums = [row | {"ref_chosen_logps": float(w.sum()), "ref_rejected_logps": float(ll.sum())}
            for row, (w, ll) in zip(pairs, logps, strict=True)]  # fmt: skip
    options = {"loss_type": ["dpo", "sft"]}
    base = run(named(singles, "sft") + named(pairs, "dpo"), **options, rest={"ref_model": toy.model(1)})
    assert logged(run(named(singles, "sft") + named(sums, "dpo"), **options)) == pytest.approx(logged(base), rel=1e-5)
    parts = {"answers": {"dataset": named(singles, "sft")}, "pairs": {"dataset": named(sums, "dpo")}}
    assert logged(run(parts, **options)) == pytest.approx(logged(base), rel=1e-5)
    sums[2]["ref_chosen_logps"] = None
    with pytest.raises(DataError, match="row 2: column 'ref_chosen_logps' is None, expected a finite number"):
        run(named(sums, "dpo"), **options)


# --------------------------------------------------------------------------------------------------------------- data

LOSS_COLUMNS = {"dpo": ["weight"], "sppo": ["weight", "win_prob", "win_prob_chosen", "win_prob_rejected"],
                "selm": ["weight", "greedy"], "sft": ["weight"]}  # fmt: skip
PAIR = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"}


def prepared(toy, rows, forming=None, **options):
    options = {"losses": LOSS_COLUMNS, "columns": ["weight", "win_prob", "greedy"]} | options
    return data.prepare_examples(rows, toy.tokenizer(), forming=forming or Forming(), **options)


def test_what_a_row_of_each_loss_reads(toy):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": "w1", "completion": " w9", "loss": "sft", "weight": 0.5},
        PAIR | {"loss": "dpo", "win_prob": None, "greedy": None},
        PAIR | {"loss": "sppo", "win_prob": 0.7},
        PAIR | {"loss": "selm", "greedy": " w6"},
        PAIR | {"loss": "sft"},
        {"prompt": "w1", "chosen": " w8", "loss": "sft"},
    ]
    every = {key for row in rows for key in row}
    filled = datasets.Dataset.from_list([{key: row.get(key) for key in every} for row in rows])
    ones = [row | {"weight": row.get("weight", 1.0)} for row in rows]
    for given in (ones, filled.map(lambda row: {"weight": row["weight"] or 1.0})):
        examples, report = prepared(toy, given)
        assert [e.loss for e in examples] == ["sft", "dpo", "sppo", "selm", "sft", "sft"]
        assert [len(e.responses) for e in examples] == [1, 2, 2, 3, 1, 1] and [len(e.pairs) for e in examples] == [
            0, 1, 1, 1, 0, 0]  # fmt: skip
        assert examples[0].response_columns == {"weight": [0.5]} and examples[2].pair_columns["win_prob"] == [0.7]
        assert "win_prob" not in examples[1].pair_columns and examples[3].greedy == 2
        assert report.by_loss == {"sft": 3, "dpo": 1, "sppo": 1, "selm": 1}
        assert "by sft 3, dpo 1, sppo 1, selm 1" in report.summary() and not report.warnings
    batch = collate(examples, range(6))
    assert batch.losses == {"sft": (), "dpo": (0,), "sppo": (1,), "selm": (2,)}
    assert batch.win_prob_chosen[1] == pytest.approx(0.7) and len(batch.greedy) == 3
    assert "loss" in data.describe_example(examples[1], toy.tokenizer())
    other = [*examples]
    other[1] = examples[2]
    assert data_fingerprint(examples) != data_fingerprint(other)
    single, _ = prepared(toy, [PAIR | {"loss": "dpo", "weight": 1.0}], losses={"dpo": ["weight"]})
    assert single[0].loss is None


def test_token_ids_of_the_sft_rows(toy):
    rows = [PAIR | {"loss": "dpo", "prompt_ids": [5, 6], "chosen": [7], "rejected": [8], "weight": 1.0},
            {"prompt_ids": [5, 6], "completion": [9, 9], "loss": "sft", "weight": 1.0},
            {"prompt_ids": [5, 6], "chosen": [9, 8], "loss": "sft", "weight": 1.0}]  # fmt: skip
    examples, _ = prepared(toy, rows)
    assert [[r.tolist() for r in e.responses] for e in examples] == [[[7], [8]], [[9, 9]], [[9, 8]]]
    both = [{"prompt_ids": [5], "loss": loss, "responses": [{"token_ids": ids, "score": s, "finished": False}
                                                            for ids, s in (([7], 1), ([8], 0), ([7], 3))]}
            for loss in ("dpo", "sft")]  # fmt: skip
    (pair, single), report = prepared(toy, both)
    assert len(pair.responses) == 2 and [r.tolist() for r in single.responses] == [[7]] and not single.pairs
    assert report.merged == 2 and report.unfinished == 3
    weighted = {"prompt_ids": [5], "loss": "sft", "pairs": [[0, 1, 0.5], [2, 1, 2.0], [0, 2, 3.0]],
                "responses": [{"token_ids": [k]} for k in (7, 8, 9)]}  # fmt: skip
    (single,), _ = prepared(toy, [weighted], Forming("explicit"))
    assert [r.tolist() for r in single.responses] == [[7], [9]] and single.response_columns == {"weight": [0.5, 2.0]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR | {"loss": "dpo"}, PAIR | {"loss": "sppp"}],
         "row 1: 'loss' is 'sppp', which is not in loss_type; did you mean 'sppo'?"),
        ([PAIR | {"loss": "dpo"}, PAIR | {"loss": "ipo"}], "row 1: 'loss' is 'ipo', which is not in loss_type"),
        ([PAIR | {"loss": "dpo"}, PAIR | {"loss": 3}], "row 1: 'loss' is 3, which is not in loss_type; it has 'dpo'"),
        ([PAIR | {"loss": "dpo"}, PAIR], "row 1 names no 'loss', which other rows do"),
        ([PAIR | {"loss": "dpo"}, PAIR | {"loss": None}], "row 1 names no 'loss', which other rows do"),
        ([PAIR] * 1000 + [PAIR | {"loss": "dpo"}], "row 1000 names a 'loss', which the rows before do not"),
        ([PAIR | {"loss": "dpo"}, {"prompt": "w1", "loss": "sft"}],
         "row 1: 'completion' and 'chosen' are None, and the row's loss is sft"),
        ([PAIR | {"loss": "dpo"}, {"prompt": "w1", "completion": "", "loss": "sft"}], "row 1: 'completion' is empty"),
        ([PAIR | {"loss": "dpo"}, {"prompt": "w1", "completion": " w2", "loss": "dpo"}],
         "row 1 has no column 'chosen'"),
        ([PAIR | {"loss": "sppo", "win_prob": 0.5}, PAIR | {"loss": "sppo", "win_prob": None}],
         "row 1: column 'win_prob' is None, expected a number from 0 to 1"),
        ([PAIR | {"loss": "dpo", "weight": 1}, {"prompt": "w1", "completion": " w2", "loss": "sft", "weight": -1}],
         "row 1: column 'weight' is -1, expected a finite number, at least 0"),
    ],
)  # fmt: skip
def test_bad_names(toy, rows, message):
    with pytest.raises(DataError, match=message) as caught:
        prepared(toy, rows)
    assert "\n" not in str(caught.value)


def test_a_column_of_other_things_is_not_read(toy):
    examples, report = prepared(toy, [PAIR | {"loss": 0.5}])
    assert examples[0].loss is None
    assert report.warnings == ["the column 'loss' is not used: it names none of loss_type"]


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        (["aot", "dpo"], "aot reads a number of the whole step: train with aot alone, or leave the column out"),
        (["dpo", "aot_unpaired"], "aot_unpaired reads a number of the whole step"),
        (["exo_rw", "sft"], "exo_rw reads whole lists of responses"),
        (["apo_zero_unpaired", "sft"], "apo_zero_unpaired takes unpaired rows"),
        (["kto", "bco"], "kto reads a number of the whole step"),
    ],
)
def test_losses_that_couple_rows_are_refused(toy, run, losses, why):
    with pytest.raises(ConfigError, match=f"rows name their loss .column 'loss'., and {why}"):
        run(named(toy.rows(4), losses[0]), loss_type=losses, beta=None)


def test_data_sets_of_which_one_names_no_loss(toy, run):
    parts = {"a": {"dataset": named(toy.rows(3), "dpo")}, "b": {"dataset": toy.rows(3, 2)}}
    with pytest.raises(DataError, match="the rows of b name no 'loss', which those of other data sets do"):
        run(parts, loss_type=["dpo", "sft"])


def test_a_row_without_the_column_that_its_loss_needs(toy, run):
    with pytest.raises(DataError, match="loss_type='sppo' needs the column 'win_prob' or 'win_prob_chosen'"):
        run(named(toy.rows(2), "sppo") + named(toy.rows(2), "dpo"), loss_type=["sppo", "dpo"])

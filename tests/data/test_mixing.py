"""Several data sets as one run's data, and data that are read once: generators and streams."""

import json
from collections import Counter

import pytest
import yaml

import fastpo
from fastpo.data import mixing, prepare_examples
from fastpo.errors import ConfigError, DataError


@pytest.fixture
def sets(toy, tmp_path):
    """Paths of 40 and of 20 rows."""
    for name, count, seed in (("a", 40, 1), ("b", 20, 2)):
        lines = [json.dumps(row) for row in toy.rows(count, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}


def prepared(toy, *counts):
    """(parts, their examples and reports) of sets with so many rows."""
    parts = [mixing.Part(f"set{k}", toy.rows(count, seed=k)) for k, count in enumerate(counts)]
    return parts, [prepare_examples(part.dataset, toy.tokenizer()) for part in parts]


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([40, 20], [0.5, 0.5], [20, 20]),
        ([40, 20], [0.7, 0.3], [40, 17]),  # the first is the scarcest for its share
        ([100, 10], [9, 1], [90, 10]),
        ([10, 10, 10], [1, 1, 2], [5, 5, 10]),
    ],
)
def test_shares(sizes, weights, counts):
    assert mixing.shares(sizes, weights) == counts


def test_weights_are_shares_of_a_seeded_choice(toy):
    parts, own = prepared(toy, 40, 20)
    parts = [mixing.replace(part, weight=weight) for part, weight in zip(parts, (0.5, 0.5), strict=True)]
    examples, report = mixing.mix(parts, own, seed=3, wanted=[])
    ids = [e.prompt_ids.tobytes() for e in examples]
    of = [{e.prompt_ids.tobytes() for e in part[0]} for part in own]
    assert [sum(i in one for i in ids) for one in of] == [20, 20] and max(Counter(ids).values()) == 1
    assert report.mixed == "20 of 40 from set0, 20 of 20 from set1"
    assert sum(i in of[0] for i in ids[:20]) in range(5, 16)  # interleaved, not one set after the other
    again = [e.prompt_ids.tobytes() for e in mixing.mix(parts, own, seed=3, wanted=[])[0]]
    other = [e.prompt_ids.tobytes() for e in mixing.mix(parts, own, seed=4, wanted=[])[0]]
    assert again == ids != other
    for example, number in zip(examples, report.kept_rows, strict=True):  # each row's number in its own set
        assert any(example is part[0][number] for part in own)


def test_fraction_takes_the_first_rows(toy):
    parts, own = prepared(toy, 40, 10)
    parts = [mixing.replace(part, weight=1.0, first=True) for part in parts]
    examples, _ = mixing.mix(parts, own, seed=0, wanted=[])
    assert {id(e) for e in examples} == {id(e) for part in own for e in part[0][:10]}


def test_trl_concatenates_without_fractions(toy):
    parts, own = prepared(toy, 5, 3)
    examples, _ = mixing.mix(parts, own, seed=0, wanted=[])
    assert [id(e) for e in examples] == [id(e) for part in own for e in part[0]]


def test_columns_of_some(toy):
    rows, more = toy.rows(4, 1), [row | {"weight": 2.0} for row in toy.rows(4, 2)]
    parts = [mixing.Part("plain", rows), mixing.Part("weighed", more)]
    own = [prepare_examples(part.dataset, toy.tokenizer()) for part in parts]
    examples, _ = mixing.mix(parts, own, seed=0, wanted=["weight"])
    assert [e.pair_columns["weight"] for e in examples] == [[1.0]] * 4 + [[2.0]] * 4
    logps = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows]
    own = [prepare_examples(part, toy.tokenizer()) for part in (rows, logps)]
    with pytest.raises(DataError, match="weighed has 'ref_chosen_logps', 'ref_rejected_logps' and plain has not"):
        mixing.mix(parts, own, seed=0, wanted=["ref_chosen_logps"])


def test_mixture_of_layouts_is_trained(toy, sets, tmp_path):
    stack = [{"question": r["prompt"], "response_j": r["chosen"], "response_k": r["rejected"]} for r in toy.rows(12, 6)]
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <eos>{% endfor %}"
    args = dict(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, bf16=False, report=False, save_final=False)
    mixture = {"plain": (sets["a"], 1), "stack": {"dataset": stack, "weight": 3}}
    result = fastpo.train(toy.model(), mixture, processing_class=tokenizer, args=args)
    assert result.metrics["train_loss"] == pytest.approx(0.6931, abs=1e-3)


def test_named_sets_are_in_the_runs_file(toy, sets, sgd_run, tmp_path, caplog):
    caplog.set_level("INFO", logger="fastpo")
    spec = [{"path": sets["a"], "weight": 0.5}, {"path": sets["b"], "weight": 0.5, "columns": [
        "prompt", "chosen", "rejected"]}]  # fmt: skip
    sgd_run(spec, max_steps=1, output_dir=str(tmp_path / "out"))
    assert any("20 of 40 from " in r.getMessage() and "20 of 20 from " in r.getMessage() for r in caplog.records)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["train_dataset"] == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, b: [(a, 1), b], "give all data sets of a mixture a weight, or none: .*b.jsonl has none"),
        (lambda a, b: [(a, 1), (b, -1)], "the weight of .*b.jsonl must be a positive number, not -1"),
        (lambda a, b: [(a, 1), (b, float("nan"))], "must be a positive number, not nan"),
        (lambda a, b: [{"path": a, "wieght": 1}, {"path": b}], "unknown key 'wieght' .*did you mean 'weight'"),
        (lambda a, b: [{"path": a, "weight": 1, "fraction": 1}], "has 'weight' and 'fraction': give one"),
        (lambda a, b: [a, a.replace("a.jsonl", "aa.jsonl")], "no such file: .*aa.jsonl: did you mean .*a.jsonl"),
        (lambda a, b: [{"path": a, "columns": ["prompt", "choosen"]}], "a.jsonl: .*has no column 'choosen', only"),
        (lambda a, b: {"x": (a, 1e-6), "y": (b, 1)}, "leaves none of the 40 rows of x"),
    ],
)
def test_bad_mixtures(toy, sets, sgd_run, make, message):
    with pytest.raises(DataError, match=message) as caught:
        sgd_run(make(sets["a"], sets["b"]), max_steps=1)
    assert "\n" not in str(caught.value)


def test_pairs_do_not_mix_with_completions(toy, sgd_run):
    single = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in toy.rows(4)]
    with pytest.raises(DataError, match="x has pairs and y has single completions"):
        sgd_run({"x": {"dataset": toy.rows(4)}, "y": {"dataset": single}}, loss_type="sft", max_steps=1)


def test_rows_with_a_path_are_rows():
    for row in ({"path": "src/a.py", "prompt": "p", "chosen": "a", "rejected": "b"}, {"path": "x", "text": "t"}):
        assert mixing.parts_of([row]) is None
    assert mixing.parts_of({"prompt": ["a"], "chosen": ["b"]}) is None


def test_command_line(toy, sets, tmp_path, capsys):
    from fastpo import cli

    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"model": "m", "datasets": [{"path": sets["a"], "fraction": 0.5}]}))
    assert cli.main(["train", "--config", str(config), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train_dataset"] == [{"path": sets["a"], "fraction": 0.5}]
    given = json.dumps([{"path": sets["a"], "weight": 1}])
    assert cli.main(["train", "--model", "m", "--train-dataset", given, "--print-config"]) == 0
    assert cli.main(["train", "--model", "m", "--train-dataset", "[1, 2]", "--print-config"]) == 2
    assert "train_dataset must be a path or a name, or several with weights" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ streams


def losses(result):
    return [line["loss"] for line in result.log_history if "loss" in line]


def test_a_stream_is_read_as_far_as_the_run_needs_and_trained_in_its_order(toy, sgd_run, caplog):
    datasets = pytest.importorskip("datasets", reason="streams are of that library")
    rows = toy.rows(200)
    options = dict(max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=0.5)
    expected = sgd_run(rows[:24], train_sampling_strategy="sequential", **options)
    taken = []

    def endless():
        for row in iter(lambda: rows[len(taken) % 200], None):
            taken.append(row)
            yield row

    caplog.set_level("INFO", logger="fastpo")
    for stream in (datasets.Dataset.from_list(rows).to_iterable_dataset(), endless()):
        result = sgd_run(stream, **options)
        assert losses(result) == losses(expected) != []
        assert any("trained in their order" in r.getMessage() for r in caplog.records)
        caplog.clear()
    assert len(taken) <= 1032  # the rows looked at first, and chunks of a thousand


def test_rows_that_are_dropped_are_replaced_from_further_on(toy, sgd_run):
    datasets = pytest.importorskip("datasets", reason="streams are of that library")
    rows = toy.rows(40)
    rows[1] = rows[1] | {"chosen": rows[1]["rejected"]}
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    options = dict(max_steps=2, per_device_train_batch_size=4, invalid_rows="drop", learning_rate=0.5)
    whole = [row for row in rows if row["chosen"] != row["rejected"]][:8]
    expected = sgd_run(whole, train_sampling_strategy="sequential", **options)
    assert losses(sgd_run(stream, **options)) == losses(expected)


def test_a_stream_needs_max_steps_and_a_generator_has_an_end(toy, sgd_run):
    datasets = pytest.importorskip("datasets", reason="streams are of that library")
    stream = datasets.Dataset.from_list(toy.rows(8)).to_iterable_dataset()
    with pytest.raises(ConfigError, match="set max_steps, or pass a Dataset, or list.dataset.take.n"):
        sgd_run(stream, num_train_epochs=1)
    with pytest.raises(ConfigError, match="cannot be part of a mixture"):
        sgd_run({"a": {"dataset": stream}, "b": {"dataset": toy.rows(8)}}, max_steps=1)
    expected = sgd_run(toy.rows(8), num_train_epochs=1)
    assert losses(sgd_run((row for row in toy.rows(8)), num_train_epochs=1)) == losses(expected)


def test_an_evaluation_stream_is_read_to_its_end(toy, sgd_run):
    datasets = pytest.importorskip("datasets", reason="streams are of that library")
    rows = toy.rows(8)
    both = [
        sgd_run(rows, {"eval_dataset": given}, max_steps=1, eval_strategy="steps", eval_steps=1)
        for given in (rows, datasets.Dataset.from_list(rows).to_iterable_dataset())
    ]
    found = [[line["eval_loss"] for line in result.log_history if "eval_loss" in line] for result in both]
    assert found[0] == found[1] != []


def test_data_frames_are_trained(toy, sgd_run):
    pandas = pytest.importorskip("pandas")
    expected = losses(sgd_run(toy.rows(8), max_steps=1))
    assert losses(sgd_run(pandas.DataFrame(toy.rows(8)), max_steps=1)) == expected


def test_a_resumed_stream_goes_on(toy, sgd_run, tmp_path):
    datasets = pytest.importorskip("datasets", reason="streams are of that library")
    options = dict(per_device_train_batch_size=4, learning_rate=0.5, output_dir=str(tmp_path / "out"), max_steps=4)
    stream = datasets.Dataset.from_list(toy.rows(100)).to_iterable_dataset()
    whole = sgd_run(stream, save_strategy="steps", save_steps=2, **options)
    resumed = sgd_run(stream, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"), **options)
    assert losses(resumed) == losses(whole)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weight": 1e308}, "row 3: column 'weight' is 1e.308, expected a finite number, at least 0 and within 1e.09"),
        ({"weight": 3e38}, "row 3: column 'weight' is 3e.38"),
        ({"weight": 10**400}, "row 3: column 'weight' is 1000"),
        ({"weight": 10**5000}, "row 3: column 'weight' is a int of thousands of digits"),
        ({"ref_chosen_logps": -1e308, "ref_rejected_logps": -5.0}, "row 3: column 'ref_chosen_logps' is -1e.308"),
        ({"ref_chosen_logps": float("nan"), "ref_rejected_logps": -5.0}, "row 3: column 'ref_chosen_logps' is nan"),
        ({"ref_chosen_logps": float("-inf"), "ref_rejected_logps": -5.0}, "row 3: column 'ref_chosen_logps' is -inf"),
        ({"chosen_token_weights": [1e300], "rejected_token_weights": [1.0]}, "row 3: column 'chosen_token_weights'"),
    ],
    ids=range(8),
)
def test_numbers_that_fp32_cannot_train_with(toy, sgd_run, more, message):
    fill = {name: -5.0 if "logps" in name else 1.0 for name in more}
    rows = [row | (more if k == 3 else fill) for k, row in enumerate(toy.rows(8))]
    if "chosen_token_weights" in more:
        rows = [
            row | {f"{side}_token_weights": [1.0] * (len(row[side].split()) + 1) for side in ("chosen", "rejected")}
            | (more if k == 3 else {}) for k, row in enumerate(toy.rows(8))
        ]  # fmt: skip
    with pytest.raises(DataError, match=message):
        sgd_run(rows, max_steps=1)

"""Loading of rows, and what each row must hold. No tokenizer here: see test_data.py."""

import gzip
import json
import sys

import pytest

from fastpo.errors import DataError
from fastpo.rows import common_length, extract_prompt, load_rows, nearest

ROWS = [
    {"prompt": "the sky is", "chosen": " blue", "rejected": " gréen"},
    {"prompt": "grass is", "chosen": " green", "rejected": " blue"},
]


def test_files(tmp_path):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    files = {
        "rows.jsonl": lines.encode(),
        "blank_lines.jsonl": ("\n" + lines + "\n\n").encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "rows.jsonl.gz": gzip.compress(lines.encode()),
        "rows.json": json.dumps(ROWS, indent=1).encode(),
        "lines.json": lines.encode(),
        "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert load_rows(path) == ROWS, name
        assert load_rows(str(path)) == ROWS, name
    one = tmp_path / "one.json"
    one.write_text(json.dumps(ROWS[0]))
    assert load_rows(one) == ROWS[:1]


def test_json_lines_need_no_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    assert load_rows(path) == ROWS[:1]
    with pytest.raises(DataError, match=r"loading 'org/name' needs the package datasets: pip install 'fastpo\[data\]'"):
        load_rows("org/name")


def test_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow")
    import pyarrow

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert load_rows(path) == ROWS
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="needs the package pyarrow"):
        load_rows(path)


def test_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets extra")
    rows = datasets.Dataset.from_list(ROWS)
    assert load_rows(rows) is rows
    both = datasets.DatasetDict(train=rows, test=rows)
    with pytest.raises(DataError, match="splits 'train', 'test': pass one of them"):
        load_rows(both)
    assert load_rows(both, split="test") is both["test"]
    assert list(load_rows(rows.to_iterable_dataset())) == ROWS

    both.save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "rows")
    assert load_rows(tmp_path / "both").to_list() == ROWS
    assert load_rows(tmp_path / "rows").to_list() == ROWS
    with pytest.raises(DataError, match="no split 'validation'; its splits are 'train', 'test'"):
        load_rows(tmp_path / "both", split="validation")


def test_hub_errors_are_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the datasets extra")

    def offline(name, config_name):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError) as caught:
        load_rows("org/name")
    expected = "cannot load the dataset 'org/name', which is no file or folder here, from the hub: "
    assert str(caught.value) == f"{expected}ConnectionError: no network"
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config_name: datasets.DatasetDict(dev=datasets.Dataset.from_list(ROWS))
    )
    with pytest.raises(DataError, match="no split 'train'; its splits are 'dev'"):
        load_rows("org/name")
    assert load_rows("org/name", split="dev").to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', r"rows.jsonl, line 2: Expecting value"),
        ("rows.jsonl", "{}\n[1]\n", r"line 2: expected an object, found a list"),
        ("rows.json", '{\n"data": []\n}', r"expected a list of objects, or one object a line"),
        ("rows.json", "[1, 2", r"rows.json: Expecting"),
        ("rows.json", "[1, 2]", r"row 0 is a int, not a dict"),
        ("rows.csv", "a,b", r"unknown kind of file, expected one of .jsonl"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("missing.jsonl", "no such file: missing.jsonl"),
        ("not a/hub id", "neither a file nor the id of a hub dataset"),
        ("not a/hub/id", "no such file or folder: not a/hub/id: there is no folder not a/hub"),
        ({"prompt": ["a"], "chosen": ["b"]}, "cannot read rows from a dict"),
        ([{"prompt": "a"}, "b"], "row 1 is a str, not a dict"),
    ],
)
def test_not_rows(dataset, message):
    with pytest.raises(DataError, match=message):
        load_rows(dataset)


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: 1+1? A: 2", "Q: 1+1? A: 3", ("Q: 1+1? A:", " 2", " 3")),  # backs off one space
        ("Q  2", "Q  3", ("Q ", " 2", " 3")),  # and only one
        ("cat", "car", ("ca", "t", "r")),
        ("abc", "xyz", ("", "abc", "xyz")),
        ("ends with a space ", "other", ("", "ends with a space ", "other")),
        ("A: yes", "A: yes!", ("A: ye", "s", "s!")),  # one begins the other: the last shared character stays
        (
            [turn("user", "q"), turn("assistant", "a")],
            [turn("user", "q"), turn("assistant", "b")],
            ([turn("user", "q")], [turn("assistant", "a")], [turn("assistant", "b")]),
        ),
        (
            [turn("user", "q"), turn("assistant", "a")],
            [turn("user", "q"), turn("assistant", "a"), turn("user", "more")],
            ([turn("user", "q")], [turn("assistant", "a")], [turn("assistant", "a"), turn("user", "more")]),
        ),
    ],
    ids=["space", "two_spaces", "no_space", "nothing_shared", "trailing_space", "prefix", "turns", "turns_prefix"],
)
def test_extract_prompt(chosen, rejected, expected):
    assert extract_prompt(chosen, rejected) == expected


def test_common_length():
    for a, b, length in [("", "", 0), ("a", "", 0), ("ab", "ab", 2), ("abc", "abd", 2), ([1, 2], [1, 2, 3], 2)]:
        assert common_length(a, b) == length


def test_nearest():
    assert nearest("prompt", ["Prompt", "chosen"], 0.85) == "Prompt"
    assert nearest("prompt", ["prompt_id"], 0.85) is None
    assert nearest("score_chosen", ["chosen_scores", "chosen_score"], 0.8) == "chosen_score"

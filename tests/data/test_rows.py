"""Loading of rows, and what each row must hold. No tokenizer here: see data/test_prepare.py."""

import gzip
import json
import sys

import pytest

from fastpo.data.rows import InvalidRow, common_length, extract_prompt, parse_row, read_schema
from fastpo.data.sources import Stream, column_names, load_rows
from fastpo.errors import DataError, nearest

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


# -------------------------------------------------------------------------------------------------------------- sources


def test_frames_become_plain_python():
    """Missing texts are None, arrays lists; a missing number stays NaN, which its column's check names."""
    pandas = pytest.importorskip("pandas")
    numpy = pytest.importorskip("numpy")
    frame = pandas.DataFrame(
        {"prompt": ["a", None],
         "turns": [numpy.array([turn("user", "b")], object), []],
         "score": [1.5, float("nan")], "label": [True, False]}
    )  # fmt: skip
    first, second = load_rows(frame)
    assert first == {"prompt": "a", "turns": [{"role": "user", "content": "b"}], "score": 1.5, "label": True}
    assert second["prompt"] is None and second["turns"] == [] and second["score"] != second["score"]
    assert type(first["label"]) is bool and type(first["score"]) is float
    with pytest.raises(DataError, match="two columns of one name: 'a', 'a'"):
        load_rows(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


def test_what_is_read_once():
    rows = load_rows(row for row in ROWS)
    assert isinstance(rows, Stream) and column_names(rows) == ["prompt", "chosen", "rejected"]
    assert rows.head(1) == ROWS[:1] and list(rows) == ROWS
    bad = load_rows(iter([ROWS[0], "text"]))
    with pytest.raises(DataError, match="row 1 is a str, not a dict of columns"):
        list(bad)

    class Items:  # as torch.utils.data.Dataset
        def __len__(self):
            return 2

        def __getitem__(self, k):
            return ROWS[k]

    assert load_rows(Items()) == ROWS
    with pytest.raises(DataError, match=r"a dict of columns write datasets.Dataset.from_dict"):
        load_rows({"prompt": ["a"], "chosen": ["b"]})


def test_patterns_and_paths(tmp_path, monkeypatch):
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl", ROWS[0])):
        (tmp_path / name).write_text(json.dumps(row))
    assert load_rows(tmp_path / "*.jsonl") == ROWS
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected")
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_rows("~/a.jsonl") == ROWS[:1]
    for path, message in [
        ("c.jsonl", "no such file: c.jsonl: did you mean "),
        ("./c", "no such file or folder: ./c"),
        ("data/train", "no such file or folder: data/train"),  # `data` is a folder here: no hub id is meant
        ("nowhere/x/y", "no such file or folder: nowhere/x/y: there is no folder nowhere/x"),
        ("nowhere/rows.parquet", "no such file: nowhere/rows.parquet: there is no folder nowhere"),
        ("~/missing.jsonl", "no such file: ~/missing.jsonl"),
        ("*.parquet", "no file matches .*parquet"),
        ("https://host/rows", "is an address: download it"),
        ("", "the path of the data is empty"),
        ("rows.csv", r"unknown kind of file, .*pass datasets.load_dataset.'csv', data_files='rows.csv', split='train'"),
        ("rows.arrow", "no such file: rows.arrow"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load_rows(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"\xff\xfe{", "rows.jsonl is not UTF-8: byte 0xff at 0"),
        ("rows.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 1000)[:-12], "not a whole gzip file"),
        ("rows.parquet", b"PAR1", "rows.parquet: "),
        ("rows.jsonl", b'{"weight": ' + b"1" * 5000 + b"}", "rows.jsonl, line 1: ValueError"),
        ("rows.jsonl", b'{"a":' * 100_000, "rows.jsonl, line 1: RecursionError"),
    ],
    ids=range(6),
)
def test_damaged_files(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow.parquet")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        ("json", ["2024-01-02", "2024-01-03"], "found a datetime .*holds dates or times.*pass the file's path itself"),
        ("csv", ["007", "8"], "found a int .7.: the column holds numbers.*features=datasets.Features"),
    ],
)
def test_texts_that_datasets_read_as_something_else(tmp_path, kind, texts, message):
    """The error's way out is tried: the texts are as they were."""
    datasets = pytest.importorskip("datasets", reason="the datasets extra")
    row = {"prompt": "when", "chosen": texts[0], "rejected": texts[1]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) if kind == "json" else ",".join(row) + "\n" + ",".join(row.values()))
    load = {"data_files": str(path), "split": "train", "cache_dir": str(tmp_path / "cache")}
    given = datasets.load_dataset(kind, **load)
    with pytest.raises(DataError, match=message) as caught:
        read_schema(given.column_names, list(given), "preference", [])
    assert "row 0: " in str(caught.value) and "\n" not in str(caught.value)
    if kind == "csv":
        features = datasets.Features({name: datasets.Value("string") for name in row})
        mended = list(datasets.load_dataset(kind, features=features, **load))
    else:
        mended = load_rows(path)
    assert mended == [row]
    read_schema(list(row), mended, "preference", [])


def test_the_number_of_the_row_that_decides():
    rows = [{"prompt": None, "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": 3, "rejected": "b"}]
    with pytest.raises(DataError, match="row 1: column 'chosen' must be a text"):
        read_schema(["prompt", "chosen", "rejected"], rows, "preference", [])


def test_lone_surrogates():
    """JSON can hold them, tokenizers cannot take them."""
    schema = read_schema(list(ROWS[0]), ROWS, "preference", [])
    row = json.loads('{"prompt": "a", "chosen": "b \\ud83d", "rejected": "c"}')
    with pytest.raises(
        InvalidRow, match="row 4: column 'chosen' is not valid Unicode: a lone surrogate .* at character 2"
    ):
        parse_row(row, 4, schema)

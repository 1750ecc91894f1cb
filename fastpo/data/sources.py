"""Where rows come from: lists, files, folders, hub data sets, data frames, generators and streams.

What is at hand becomes a list of dicts or stays a `datasets.Dataset`; what can only be read once, in order, becomes a
`Stream`.
"""

import glob
import gzip
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpo.data import arrow
from fastpo.errors import DataError, one_line, quoted

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_HEAD_ROWS = 32  # rows that are looked at to recognise a layout
_NO_TEXT = ("Image", "Video", "Audio", "Pdf", "Nifti")  # features of `datasets` that nobody reads, slow to decode

# What to write for files of other kinds.
_OTHER_FILES = {
    ".csv": "datasets.load_dataset('csv', data_files={0!r}, split='train')",
    ".tsv": "datasets.load_dataset('csv', data_files={0!r}, sep='\\t', split='train')",
    ".arrow": "datasets.Dataset.from_file({0!r})",
    ".txt": "datasets.load_dataset('text', data_files={0!r}, split='train')",
    ".zst": "datasets.load_dataset('json', data_files={0!r}, split='train')",
    ".zip": "datasets.load_dataset('json', data_files={0!r}, split='train')",
    ".feather": "pandas.read_feather({0!r})",
    ".pkl": "pandas.read_pickle({0!r})",
    ".xlsx": "pandas.read_excel({0!r})",
}


class Stream:
    """Rows that are read once, in order. `head` looks ahead; iterating gives all of them, the head's too."""

    def __init__(self, rows: Iterable[Any], kind: str, endless: bool = False):
        self.kind = kind
        self.endless = endless  # whether it may have no end, so that it is not read without a limit
        self._rest = iter(rows)
        self._seen: list[Mapping] = []

    def head(self, count: int) -> list[Mapping]:
        """The first rows, `count` of them or as many as there are."""
        missing = count - len(self._seen)
        if missing > 0:
            self._seen += itertools.islice(self._checked(len(self._seen)), missing)
        return self._seen[:count]

    def __iter__(self) -> Iterator[Mapping]:
        seen, self._seen = self._seen, []
        yield from seen
        yield from self._checked(len(seen))

    def _checked(self, start: int) -> Iterator[Mapping]:
        for number, row in enumerate(self._rest, start=start):
            yield _row(row, number)


def _row(row: Any, number: int) -> Mapping:
    if not isinstance(row, Mapping):
        raise DataError(f"row {number} is a {type(row).__name__}, not a dict of columns")
    return row


def load_rows(dataset: Any, *, split: str | None = None, config_name: str | None = None, **options: Any) -> Any:
    """A `datasets.Dataset`, a list of dicts, or a `Stream` for what is read once; of a path, or a hub id too.

    `split` defaults to train for a hub id; `options` are those of `datasets.load_dataset` (data_dir, data_files).
    """
    if isinstance(dataset, str | os.PathLike):
        return _load_path(os.fspath(dataset), split, config_name, options)
    hf = sys.modules.get("datasets")  # an object of that library means that it is imported
    if hf is not None:
        if isinstance(dataset, hf.Dataset):
            return dataset
        if isinstance(dataset, hf.DatasetDict | hf.IterableDatasetDict):
            if split in dataset:
                return load_rows(dataset[split])
            kind = type(dataset).__name__
            raise DataError(f"a {kind} with the splits {quoted(dataset)}: pass one of them, as dataset['...']")
        if isinstance(dataset, hf.IterableDataset):
            return Stream(dataset, "IterableDataset", endless=True)
    frame = _frame_rows(dataset)
    if frame is not None:
        return frame
    if isinstance(dataset, list | tuple):
        return [_row(row, number) for number, row in enumerate(dataset)]
    if not isinstance(dataset, Mapping | str | bytes):
        if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):  # as those of torch.utils.data
            return [_row(dataset[number], number) for number in range(len(dataset))]
        if hasattr(dataset, "__iter__"):
            return Stream(dataset, type(dataset).__name__)
    hint = ""
    if isinstance(dataset, Mapping) and dataset and all(isinstance(v, list | tuple) for v in dataset.values()):
        hint = ": for a dict of columns write datasets.Dataset.from_dict(...)"
    raise DataError(
        f"cannot read rows from a {type(dataset).__name__}: pass a datasets.Dataset, a list of dicts, a DataFrame, a "
        f"generator, a path ({', '.join(SUFFIXES)}) or a hub id{hint}"
    )


def column_names(rows: Any) -> list[str]:
    """Names of the columns; for a list of dicts all that occur in any row, for a stream all of its first rows."""
    if not isinstance(rows, list | Stream):
        return list(rows.column_names)
    names: dict[str, None] = {}
    for row in rows.head(_HEAD_ROWS) if isinstance(rows, Stream) else rows:
        if row.keys() - names.keys():
            names.update(dict.fromkeys(row))
    return [str(name) for name in names]


def head_rows(rows: Any) -> list[Mapping]:
    """The first rows, with the columns that may hold text."""
    if isinstance(rows, Stream):
        return rows.head(_HEAD_ROWS)
    if isinstance(rows, list):
        return rows[:_HEAD_ROWS]
    names = [name for name in rows.column_names if type(rows.features[name]).__name__ not in _NO_TEXT]
    if not names:
        return []
    batch = rows.with_format(None).select_columns(names)[:_HEAD_ROWS]
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def first_rows(rows: Any, read: Collection[str], count: int) -> list[Mapping]:
    """The first rows, `count` of them or as many as there are, with the columns that are read."""
    return rows.head(count) if isinstance(rows, Stream) else next(chunks(rows, read, count), (0, []))[1]


def chunks(rows: Any, read: Collection[str], size: int) -> Iterator[tuple[int, list[Mapping]]]:
    """(number of the first row, rows), `size` of them at a time; of a Dataset without columns that nobody reads."""
    if isinstance(rows, list):
        for start in range(0, len(rows), size):
            yield start, rows[start : start + size]
        return
    if isinstance(rows, Stream):
        start, rest = 0, iter(rows)
        while part := list(itertools.islice(rest, size)):
            yield start, part
            start += len(part)
        return
    names = [name for name in rows.column_names if name in read]
    if not names:
        return
    plain = rows.with_format(None).select_columns(names)
    for start in range(0, len(plain), size):
        batch = plain[start : start + size]
        yield start, [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def check_path(name: str | os.PathLike[str]) -> str | None:
    """The suffix of a file of rows that is there, None for a folder or hub id; DataError where it is none of them."""
    name = os.fspath(name)
    if not name.strip():
        raise DataError("the path of the data is empty")
    path = Path(name).expanduser()
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)
    if path.is_file():
        if suffix is None:
            other = next((line for end, line in _OTHER_FILES.items() if name.endswith(end)), None)
            hint = f"; pass {other.format(name)}" if other else ""
            raise DataError(f"{name}: unknown kind of file, expected one of {', '.join(SUFFIXES)}{hint}")
        return suffix
    if path.is_dir():
        return None
    if _files(name):
        return "*"
    if any(mark in name for mark in "*?["):
        raise DataError(f"no file matches {name}")
    if suffix is not None or path.suffix in _OTHER_FILES:
        raise DataError(f"no such file: {name}{_in_folder(path)}")
    if "://" in name:
        raise DataError(f"{name} is an address: download it, or pass datasets.load_dataset('json', data_files=...)")
    parts = Path(name).parts
    local = name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or "\\" in name or len(parts) > 2
    if local or (len(parts) == 2 and Path(parts[0]).is_dir()):
        raise DataError(f"no such file or folder: {name}{_in_folder(path)}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"neither a file nor the id of a hub dataset: {name}")
    return None


def _in_folder(path: Path) -> str:
    """What lies there instead of a path, for an error."""
    import difflib

    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.6)
    return f": did you mean {path.parent / close[0]}?" if close else ""


def _files(pattern: str) -> list[str]:
    """The files that a pattern such as data/*.jsonl names, sorted."""
    if not any(mark in pattern for mark in "*?["):
        return []
    return sorted(name for name in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(name))


def _load_path(name: str, split: str | None, config_name: str | None, options: Mapping[str, Any]) -> Any:
    path = Path(name).expanduser()
    suffix = check_path(name)
    if suffix == "*":
        return [row for file in _files(name) for row in _load_file(Path(file), check_path(file))]
    if suffix is not None:
        return _load_file(path, suffix)
    try:
        import datasets
    except ImportError:
        raise DataError(f"loading '{name}' needs the package datasets: pip install 'fastpo[data]'") from None
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                split = split or "train"
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else name, config_name, **options)
            split = split or "train"
    except Exception as error:  # the library raises a dozen kinds: no network, no such id, no such configuration, ...
        what = "" if path.is_dir() else ", which is no file or folder here, from the hub"
        raise DataError(f"cannot load the dataset '{name}'{what}: {one_line(error)}") from error
    if split is not None and isinstance(loaded, datasets.DatasetDict) and split not in loaded:
        raise DataError(f"the dataset '{name}' has no split '{split}'; its splits are {quoted(loaded)}")
    return load_rows(loaded, split=split)


def _load_file(path: Path, suffix: str | None) -> list[dict]:
    try:
        return _load_parquet(path) if suffix == ".parquet" else _load_json(path)
    except DataError:
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {one_line(error)}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or one_line(error)}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
    except (ValueError, RecursionError) as error:  # Arrow's errors are ValueErrors
        raise DataError(f"{path}: {one_line(error)}") from None


def _load_json(path: Path) -> list[dict]:
    """One object a line, or one list of objects."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8-sig")
    if ".jsonl" not in path.name:
        try:
            rows = json.loads(text)
            if isinstance(rows, list):
                return [dict(_row(row, number)) for number, row in enumerate(rows)]
            if "\n" in text.strip():
                raise DataError(f"{path}: expected a list of objects, or one object a line")
        except json.JSONDecodeError as error:
            if not text.lstrip().startswith("{"):  # many files called .json hold one object a line
                raise DataError(f"{path}: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: {error.msg} at column {error.colno}") from None
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, objects a thousand deep
                raise DataError(f"{path}, line {number}: {one_line(error)}") from None
            if not isinstance(rows[-1], dict):
                raise DataError(f"{path}, line {number}: expected an object, found a {type(rows[-1]).__name__}")
    return rows


def _load_parquet(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"reading {path.name} needs the package pyarrow: pip install 'fastpo[data]'") from None
    return arrow.table_rows(pyarrow.parquet.read_table(path))


def _frame_rows(data: Any) -> list[dict] | None:
    """The rows of a DataFrame of pandas or polars, or of an Arrow table; None for anything else."""
    library = type(data).__module__.partition(".")[0]
    if library == "polars" and hasattr(data, "collect"):
        data = data.collect()
    if library == "polars" and hasattr(data, "to_dicts"):
        return data.to_dicts()
    if library == "pyarrow" and hasattr(data, "to_pylist") and hasattr(data, "column_names"):
        return arrow.table_rows(data)
    if library != "pandas" or not hasattr(data, "columns"):
        return None
    names = [str(name) for name in data.columns]
    if len(set(names)) < len(names):
        raise DataError(f"the DataFrame has two columns of one name: {quoted(names)}")
    columns = []
    for k in range(len(names)):
        series = data.iloc[:, k]
        numeric = getattr(series.dtype, "kind", "O") in "iufb"
        columns.append([_plain(value, numeric) for value in series.tolist()])
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _plain(value: Any, numeric: bool = False) -> Any:
    """A cell as plain Python: arrays are lists, what pandas has for a missing text is None."""
    if isinstance(value, float) and math.isnan(value) and not numeric:
        return None
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item, numeric=True) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item, numeric=True) for item in value]
    return _plain(value.tolist(), numeric=True) if type(value).__module__ == "numpy" else value

"""Any source of rows as one `datasets.Dataset`: hub data sets, local files, factories, rows in memory.

Local files are read here, not by `datasets.load_dataset`: nothing is cached on the disk, nothing needs a network, and a
malformed line is named. They are held in memory. Not done here: streaming, compressed files, images.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.importing import import_object

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}


def load_rows(
    source: Any, *, split: str = "train", name: str | None = None, column_mapping: Mapping[str, str] | None = None
) -> Dataset:
    """The rows of `source`, with a `prompt` column.

    source:         a hub name; a .jsonl, .json, .parquet or .csv file, a glob or a folder of them, or a folder written
                    by `save_to_disk`; a `datasets.Dataset` or `DatasetDict`; a list of dicts; or "module:function",
                    called without arguments, that returns one of these.
    split:          split of a hub data set or `DatasetDict`. In a folder it picks the files named after it, when files
                    are named after splits at all. A slice as in "train[:1000]" or "train[90%:]" applies to any source.
    name:           configuration of a hub data set.
    column_mapping: old name -> new name.

    Raises FileNotFoundError for a file or hub data set that is not there, ValueError for one that cannot be used.
    """
    rows = _open(source, split, name)
    if len(rows) == 0:
        raise ValueError(f"the data set {_describe(source)} is empty (split {split!r})")
    rows = _rename(rows, column_mapping or {})
    if "prompt" not in rows.column_names:
        raise ValueError(
            f"the data set has no column 'prompt', only {rows.column_names}; name the one that holds the problem, "
            "such as column_mapping: {question: prompt}"
        )
    return rows


def _open(source: Any, split: str, name: str | None) -> Dataset:
    """`source` as one Dataset, split and slice applied, columns as they are."""
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_from_disk

    base = split.partition("[")[0]
    if isinstance(source, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(source))
        if os.path.isdir(path) and any(os.path.exists(f"{path}/{f}.json") for f in ("dataset_info", "dataset_dict")):
            return _open(load_from_disk(path), split, name)
        if files := _local_files(path, base):
            return _slice(_read_files(files), split)
        if ":" in path:
            made = import_object(path)
            return _open(made() if callable(made) else made, split, name)
        return _load_from_hub(path, name, split)
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        raise ValueError(
            "a streaming data set cannot be shuffled and resumed by position: load it without streaming=True, "
            "or take a part of it into a list of dicts"
        )
    if isinstance(source, DatasetDict):
        if base not in source:
            raise ValueError(f"the data set has no split {base!r}, only {list(source)}")
        source = source[base]
    if isinstance(source, Dataset):
        return _slice(source, split)
    if isinstance(source, list) and all(isinstance(row, dict) for row in source):
        return _slice(_from_dicts(source, "the list of rows"), split)
    raise ValueError(f"a data set must be a name, a file, a Dataset or a list of dicts, not {_describe(source)}")


def _describe(source: Any) -> str:
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else f"of type {type(source).__name__}"


def _load_from_hub(path: str, name: str | None, split: str) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        reason = str(error).partition("\n")[0]
        raise kind(f"data set {path!r} is no local file or folder, and the Hub gave none: {reason}") from error


def _slice(rows: Dataset, split: str) -> Dataset:
    """Applies the bracketed part of `split`, with the Hub's meaning, to rows that have no splits."""
    if "[" not in split:
        return rows
    from datasets import ReadInstruction

    base = split.partition("[")[0]
    parts = ReadInstruction.from_spec(split).to_absolute({base: len(rows)})
    return rows.select([i for part in parts for i in range(part.from_, part.to)])


def _rename(rows: Dataset, mapping: Mapping[str, str]) -> Dataset:
    """`rows` with columns renamed; swaps are fine, overwriting is not."""
    columns = rows.column_names
    if unknown := [old for old in mapping if old not in columns]:
        raise ValueError(f"column_mapping: the data set has no column {unknown}, only {columns}")
    renamed = [mapping.get(column, column) for column in columns]
    if twice := sorted({column for column in renamed if renamed.count(column) > 1}):
        raise ValueError(f"column_mapping: two columns would be named {twice}; the data set has {columns}")
    return rows.rename_columns(dict(mapping)) if mapping else rows


def _local_files(path: str, split: str) -> list[Path]:
    """The data files `path` stands for; empty when it does not look like a path at all."""
    if os.path.isdir(path):
        files = sorted(f for f in Path(path).iterdir() if f.suffix in READERS and f.name[0] not in "._")
        if not files:
            raise FileNotFoundError(f"folder {path!r} has no data files ({', '.join(READERS)})")
        return _files_of_split(files, split)
    if os.path.exists(path):
        files = [Path(path)]
    elif glob.has_magic(path):
        files = sorted(Path(f) for f in glob.glob(path, recursive=True) if os.path.isfile(f))
        if not files:
            raise FileNotFoundError(f"no file matches {path!r}")
    elif Path(path).suffix in READERS or path[:1] in ("/", "."):
        folder = Path(path).parent
        if not folder.is_dir():
            raise FileNotFoundError(f"data file {path!r} does not exist, nor does the folder {str(folder)!r}")
        near = difflib.get_close_matches(Path(path).name, os.listdir(folder), cutoff=0.5)
        hint = f"; nearest there: {', '.join(near)}" if near else ""
        raise FileNotFoundError(f"data file {path!r} does not exist{hint}")
    else:
        return []
    if wrong := [f for f in files if f.suffix not in READERS]:
        raise ValueError(f"data file {str(wrong[0])!r}: unknown format, expected {', '.join(READERS)}")
    return files


def _files_of_split(files: list[Path], split: str) -> list[Path]:
    """Those named after `split`; all of them if none is named after any split (never train and test together)."""

    def named(words: tuple[str, ...]) -> list[Path]:
        return [f for f in files if set(words) & set(re.split(r"[^a-z0-9]+", f.stem.lower()))]

    own = next((words for words in SPLIT_WORDS.values() if split in words), (split.lower(),))
    if of_split := named(own):
        return of_split
    if any(named(words) for words in SPLIT_WORDS.values()):
        raise ValueError(f"no file of split {split!r} in {str(files[0].parent)!r}, only {[f.name for f in files]}")
    return files


def _read_files(files: list[Path]) -> Dataset:
    from datasets import concatenate_datasets

    parts = []
    for path in files:
        try:
            parts.append(READERS[path.suffix](path))
        except ValueError as error:  # pyarrow's errors are ValueErrors and do not name the file
            text = str(error).partition("\n")[0]
            raise ValueError(text if str(path) in text else f"data file {str(path)!r}: {text}") from error
    if len(parts) == 1:
        return parts[0]
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        names = ", ".join(str(f) for f in files)
        raise ValueError(f"the columns of {names} do not fit together: {str(error).splitlines()[0]}") from error


def _read_json(path: Path) -> Dataset:
    """A JSON list of objects, or JSON lines, whichever the file holds; its suffix does not decide."""
    rows: list[Any] = []
    with path.open("rb") as file:
        if file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            rows = _parse_json(path.read_bytes(), path, 1)
        else:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parse_json(line.rstrip(), path, number))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"data file {str(path)!r}: row {number} is not an object but {type(row).__name__}")
    return _from_dicts(rows, f"data file {str(path)!r}")


def _parse_json(data: bytes, path: Path, first_line: int) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"data file {str(path)!r}, line {line}: malformed JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise ValueError(f"data file {str(path)!r}, line {line}: not UTF-8") from error


def _read_parquet(path: Path) -> Dataset:
    import pyarrow.parquet
    from datasets import Dataset

    return Dataset(pyarrow.parquet.read_table(path))


def _read_csv(path: Path) -> Dataset:
    import pyarrow.csv
    from datasets import Dataset

    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return Dataset(pyarrow.csv.read_csv(path, parse_options=options))


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _from_dicts(rows: list[dict[str, Any]], where: str) -> Dataset:
    """All columns of all rows (`Dataset.from_list` keeps the first row's only); None where a row lacks one."""
    from datasets import Dataset

    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    try:
        return Dataset.from_dict(columns)
    except (ValueError, TypeError, OverflowError) as error:
        for name, values in columns.items():
            try:
                Dataset.from_dict({name: values})
            except (ValueError, TypeError, OverflowError) as reason:
                raise ValueError(f"{where}: the values of column {name!r} do not fit together: {reason}") from reason
        raise ValueError(f"{where}: {error}") from error

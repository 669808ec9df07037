"""Every kind of source, and every way in which one can be wrong."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from fastgrpo.rows import load_rows

GSM8K = Path(__file__).parents[1] / "data" / "gsm8k_train.jsonl"
QUESTION = {"question": "prompt"}
ROWS = [
    {"prompt": "1+1=", "answer": "2", "meta": {"level": 1, "tags": ["a", "b"]}},
    {"prompt": "2+3=", "answer": "5", "meta": {"level": 2, "tags": []}},
]


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=2))
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_files(folder: Path) -> dict[str, str]:
    """The same rows in every format that holds nested columns."""
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(folder / "saved_dict")
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + write_jsonl(folder / "plain.jsonl", ROWS).read_bytes())
    return {
        "json": str(write_json(folder / "rows.json", ROWS)),
        "jsonl": str(write_jsonl(folder / "rows.jsonl", ROWS)),
        "jsonl under the name json": str(write_jsonl(folder / "lines.json", ROWS)),
        "jsonl with a byte order mark": str(folder / "bom.jsonl"),
        "parquet": str(folder / "rows.parquet"),
        "save_to_disk": str(folder / "saved"),
        "save_to_disk of a DatasetDict": str(folder / "saved_dict"),
    }


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    for kind, path in make_files(tmp_path).items():
        assert load_rows(path).to_list() == ROWS, kind
        assert load_rows(Path(path)).to_list() == ROWS, kind
    assert load_rows(ROWS).to_list() == ROWS
    assert load_rows(Dataset.from_list(ROWS)).to_list() == ROWS
    assert load_rows(DatasetDict({"train": Dataset.from_list(ROWS)})).to_list() == ROWS


def test_csv_with_quotes_and_newlines(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('question,answer,level\n"a, ""b""\nc",x,1\nd,,2\n')
    assert load_rows(tmp_path / "rows.csv", column_mapping=QUESTION).to_list() == [
        {"prompt": 'a, "b"\nc', "answer": "x", "level": 1},
        {"prompt": "d", "answer": "", "level": 2},
    ]


def test_local_files_are_read_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_files(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("local files must not go through load_dataset, which writes a cache")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    for path in files.values():
        load_rows(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_keep_columns_that_the_first_one_lacks(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": 3}]
    expected = [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": 3}]
    assert load_rows(rows).to_list() == expected
    assert load_rows(write_jsonl(tmp_path / "rows.jsonl", rows)).to_list() == expected


def test_folder_and_glob(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part-1.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "part-0.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert load_rows(tmp_path).to_list() == ROWS
    assert load_rows(f"{tmp_path}/part-*.jsonl").to_list() == ROWS
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load_rows(f"{tmp_path}/none-*.jsonl")
    with pytest.raises(ValueError, match=r"README\.md'.*unknown format, expected \.jsonl"):
        load_rows(f"{tmp_path}/*.md")


def test_folder_never_mixes_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "gsm8k_train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "gsm8k_test.jsonl", ROWS[1:])
    assert load_rows(tmp_path).to_list() == ROWS[:1]
    assert load_rows(tmp_path, split="test").to_list() == ROWS[1:]
    with pytest.raises(ValueError, match=r"no file of split 'validation'.*gsm8k_test\.jsonl"):
        load_rows(tmp_path, split="validation")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no data files \(\.jsonl"):
        load_rows(tmp_path)


@pytest.mark.parametrize(("split", "expected"), [("train[:3]", [0, 1, 2]), ("train[-2:]", [8, 9]), ("t[80%:]", [8, 9])])
def test_slices_apply_to_any_source(tmp_path: Path, split: str, expected: list[int]) -> None:
    rows = [{"prompt": str(i)} for i in range(10)]
    for source in (rows, Dataset.from_list(rows), write_jsonl(tmp_path / "rows.jsonl", rows)):
        assert load_rows(source, split=split)["prompt"] == [str(i) for i in expected]


@pytest.fixture
def factories() -> Any:
    module = types.ModuleType("factories_for_test_data")
    module.dataset = lambda: Dataset.from_list(ROWS)  # type: ignore[attr-defined]
    module.rows = lambda: ROWS  # type: ignore[attr-defined]
    module.constant = ROWS  # type: ignore[attr-defined]
    module.splits = lambda: DatasetDict({"dev": Dataset.from_list(ROWS)})  # type: ignore[attr-defined]
    module.path = lambda: str(GSM8K)  # type: ignore[attr-defined]
    module.number = lambda: 3  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module.__name__
    del sys.modules[module.__name__]


def test_factories(factories: str) -> None:
    for function in ("dataset", "rows", "constant"):
        assert load_rows(f"{factories}:{function}").to_list() == ROWS
    assert load_rows(f"{factories}:splits", split="dev").to_list() == ROWS
    assert len(load_rows(f"{factories}:path", column_mapping=QUESTION)) == 48
    with pytest.raises(ValueError, match="no split 'train', only \\['dev'\\]"):
        load_rows(f"{factories}:splits")
    with pytest.raises(ValueError, match="not of type int"):
        load_rows(f"{factories}:number")
    with pytest.raises(ValueError, match="no attribute 'datasett'"):
        load_rows(f"{factories}:datasett")


def test_column_mapping() -> None:
    rows = [{"a": "x", "b": "y"}]
    assert load_rows(rows, column_mapping={"a": "prompt"}).to_list() == [{"prompt": "x", "b": "y"}]
    swapped = load_rows([{"prompt": "x", "answer": "y"}], column_mapping={"prompt": "answer", "answer": "prompt"})
    assert swapped.to_list() == [{"answer": "x", "prompt": "y"}]
    with pytest.raises(ValueError, match=r"no column \['c'\], only \['a', 'b'\]"):
        load_rows(rows, column_mapping={"c": "prompt"})
    with pytest.raises(ValueError, match=r"two columns would be named \['b'\]"):
        load_rows(rows, column_mapping={"a": "b"})
    with pytest.raises(ValueError, match=r"two columns would be named \['prompt'\]"):
        load_rows(rows, column_mapping={"a": "prompt", "b": "prompt"})


def test_missing_prompt_column_names_the_others() -> None:
    with pytest.raises(ValueError, match=r"no column 'prompt', only \['question', 'answer'\].*column_mapping"):
        load_rows(GSM8K)


def test_missing_file_names_the_nearest() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"gsm8k_trian\.jsonl' does not exist; nearest there: gsm8k_train\.jsonl"
    ):
        load_rows(str(GSM8K.with_name("gsm8k_trian.jsonl")))
    with pytest.raises(FileNotFoundError, match="nor does the folder '/no/such/folder'"):
        load_rows("/no/such/folder/rows.jsonl")


def test_hub_name_offline_is_one_clear_line() -> None:
    with pytest.raises(FileNotFoundError, match=r"'no-such-owner/none' is no local file or folder") as caught:
        load_rows("no-such-owner/none")
    assert "\n" not in str(caught.value)


def test_hub_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: str, name: str | None, *, split: str) -> Dataset:
        calls.append((path, name, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("openai/gsm8k", name="main", split="train[:10]").to_list() == ROWS
    assert calls == [("openai/gsm8k", "main", "train[:10]")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"rows\.jsonl', line 3: malformed JSON"),
        ("rows.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', r"rows\.json', line 2: malformed JSON"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n', r"rows\.jsonl', line 2: not UTF-8"),
        ("rows.jsonl", b'{"prompt": "a"}\n["b"]\n', r"rows\.jsonl': row 2 is not an object but list"),
        (
            "rows.jsonl",
            b'{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "x"}',
            r"rows\.jsonl': the values of column 'n'",
        ),
        ("rows.parquet", b"nonsense", r"rows\.parquet': .*[Pp]arquet"),
        ("rows.csv", b"prompt,b\na\n", r"rows\.csv': .*columns"),
        ("rows.jsonl", b"", r"rows\.jsonl' is empty"),
        ("rows.csv", b"prompt\n", r"rows\.csv' is empty"),
        ("rows.txt", b"a", "unknown format"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bad_objects() -> None:
    with pytest.raises(ValueError, match="a streaming data set cannot be shuffled and resumed"):
        load_rows(Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(ValueError, match="is empty"):
        load_rows(Dataset.from_dict({"prompt": []}))
    with pytest.raises(ValueError, match="not of type dict"):
        load_rows({"prompt": ["a"]})
    with pytest.raises(ValueError, match="not of type NoneType"):
        load_rows(None)

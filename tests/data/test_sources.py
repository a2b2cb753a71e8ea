from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from guidetune.data import sources
from guidetune.data.sources import Broken, SourceSpec, read
from guidetune.errors import BadInput

ROWS = [{"question": "2+2?", "answer": "4"}, {"question": "naïve\n東京", "answer": 'a,b"c'}]


def write(path: Path, rows: list[dict]) -> None:
    name = path.name.removesuffix(".gz")
    plain = path.with_name(name)
    if name.endswith(".jsonl"):
        plain.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    elif name.endswith(".json"):
        plain.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif name.endswith((".csv", ".tsv")):
        with open(plain, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), plain)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


def rows_of(path: str | Path, root: Path, **more: object) -> list:
    return list(read(SourceSpec(path=str(path), **more), root))


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str, gz: str) -> None:
    write(tmp_path / f"rows.{kind}{gz}", ROWS)
    assert [row for _, row in rows_of(f"rows.{kind}{gz}", tmp_path)] == ROWS
    assert [row for _, row in rows_of(f"rows.{kind}{gz}", tmp_path, limit=1)] == ROWS[:1]


_cell = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"q": _cell, "a": _cell.filter(bool)}), min_size=1, max_size=5), data=st.data())
def test_readers_give_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("rows")
    kind = data.draw(st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.parquet", "x.jsonl.gz", "x.csv.gz"]))
    write(folder / kind, rows)
    assert [row for _, row in rows_of(kind, folder)] == rows


@settings(max_examples=40, deadline=None)
@given(data=st.binary(min_size=1, max_size=200), kind=st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_any_bytes_give_rows_broken_rows_or_bad_input(tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: str) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / f"x.{kind}").write_bytes(data)
    try:
        for _, row in read(SourceSpec(path=f"x.{kind}"), folder):
            assert isinstance(row, (dict, Broken))
    except BadInput:
        pass


def test_the_content_decides_between_json_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "array.jsonl").write_text('[\n{"a": 1},\n{"a": 2}]')
    (tmp_path / "wrapped.json").write_text('{"version": 1, "data": [{"a": 1}, {"a": 2}]}')
    (tmp_path / "noname").write_text('{"a": 1}\n{"a": 2}\n')
    for name in ("lines.json", "array.jsonl", "wrapped.json", "noname"):
        assert [r["a"] for _, r in rows_of(name, tmp_path)] == [1, 2]
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}')
    assert [line for line, _ in rows_of("bom.jsonl", tmp_path)] == [1, 3]


def test_broken_rows_are_named_by_line_and_nothing_else_is_lost(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}\n')
    rows = rows_of("x.jsonl", tmp_path)
    assert [line for line, _ in rows] == [1, 2, 3, 4, 5]
    assert [r.reason for _, r in rows if isinstance(r, Broken)] == [sources.BROKEN_JSON, sources.NOT_A_ROW, sources.BAD_UTF8]
    (tmp_path / "x.csv").write_bytes(b"a,b\n1,2\n3\n\xff,4\n5,6\n")
    rows = rows_of("x.csv", tmp_path)
    assert [r.reason for _, r in rows if isinstance(r, Broken)] == [sources.BROKEN_CSV, sources.BAD_UTF8]
    assert [r for _, r in rows if isinstance(r, dict)] == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.jsonl", b"", "empty file"),
        ("x.jsonl", b"\n\n", "no rows"),
        ("x.json", b'[{"a": 1},\n{"a": ]', "broken JSON on line 2"),
        ("x.json", b'["\xff"]', "not UTF-8: byte 0xff on line 1"),
        ("x.json", b"[]", "no rows"),
        ("x.csv", b"a,a\n1,2\n", "more than once"),
        ("x.parquet", b"not parquet at all", "not a parquet file"),
        ("x.jsonl.gz", b"\x1f\x8b\x08\x00broken", "gzip"),
        ("x.bin", b"\x00\x01\x02", "cannot tell the format"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=says):
        rows_of(name, tmp_path)


def test_a_truncated_gzip_is_an_error_not_fewer_rows(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 5000)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="not a complete gzip"):
        rows_of("x.jsonl.gz", tmp_path)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(BadInput, match=r"trian\.jsonl.*did you mean 'train.jsonl'"):
        rows_of("trian.jsonl", tmp_path)
    with pytest.raises(BadInput, match="folder .* does not exist"):
        rows_of("nowhere/at/all/train.jsonl", tmp_path)


def test_recipe_folder_comes_before_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "cwd").mkdir()
    write(tmp_path / "cwd" / "x.jsonl", [{"a": "cwd"}])
    monkeypatch.chdir(tmp_path / "cwd")
    assert rows_of("x.jsonl", tmp_path / "recipe")[0][1] == {"a": "cwd"}
    write(tmp_path / "recipe" / "x.jsonl", [{"a": "recipe"}])
    assert rows_of("x.jsonl", tmp_path / "recipe")[0][1] == {"a": "recipe"}
    assert rows_of(tmp_path / "cwd" / "x.jsonl", tmp_path / "recipe")[0][1] == {"a": "cwd"}


def test_a_folder_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", ROWS)
    write(tmp_path / "set" / "test.jsonl", ROWS[:1])
    assert [row for _, row in rows_of("set", tmp_path)] == ROWS
    assert [row for _, row in rows_of("set", tmp_path, split="test")] == ROWS[:1]
    with pytest.raises(BadInput, match="split 'nothing'"):
        rows_of("set", tmp_path, split="nothing")
    one = sources.digest(SourceSpec(path="set"), tmp_path)
    write(tmp_path / "set" / "test.jsonl", ROWS)
    assert sources.digest(SourceSpec(path="set"), tmp_path) != one


def test_many_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number, name in enumerate(("b-00.jsonl", "b-01.jsonl.gz", "b-02.parquet", "b-10.csv", "a.jsonl")):
        write(tmp_path / "set" / name, [{"q": f"{number}{k}", "a": "x"} for k in range(3)])
    shards = rows_of("set/b-*", tmp_path)
    assert [row["q"] for _, row in shards] == [f"{number}{k}" for number in range(4) for k in range(3)]
    assert [number for number, _ in shards[:9]] == list(range(1, 10))
    assert [row["q"] for _, row in rows_of("set/b-*", tmp_path, limit=4)] == ["00", "01", "02", "10"]
    assert [row["q"] for _, row in rows_of("s*/a.jsonl", tmp_path)] == ["40", "41", "42"]
    (tmp_path / "set" / "b-01.jsonl").write_text('{"q": "1"}\n{broken\n')
    broken = [row for _, row in rows_of("set/b-*.jsonl*", tmp_path) if isinstance(row, Broken)]
    assert len(broken) == 1 and broken[0].detail.startswith("b-01.jsonl line 2: ")
    one = sources.digest(SourceSpec(path="set/b-*"), tmp_path)
    write(tmp_path / "set" / "b-03.jsonl", ROWS)
    assert sources.digest(SourceSpec(path="set/b-*"), tmp_path) != one
    with pytest.raises(BadInput, match="no file matches 'set/c-\\*'"):
        rows_of("set/c-*", tmp_path)
    assert [SourceSpec(path=p).label for p in ("d/train-*.parquet", "d/*.jsonl.gz", "d/**/*.csv")] == ["train", "d", "d"]


def test_a_folder_of_shards_is_streamed_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for number in range(3):
        write(tmp_path / "set" / f"train-{number:05d}-of-00003.parquet", [{"q": f"{number}{k}", "a": "x"} for k in range(2)])
    write(tmp_path / "set" / "test-00000-of-00001.parquet", [{"q": "t", "a": "x"}])
    assert [row["q"] for _, row in rows_of("set", tmp_path)] == ["00", "01", "10", "11", "20", "21"]
    assert [row["q"] for _, row in rows_of("set", tmp_path, split="test")] == ["t"]
    assert not (tmp_path / "cache").exists() or not [p for p in (tmp_path / "cache").rglob("*.arrow")]
    assert [row["q"] for _, row in rows_of("set", tmp_path, split="train[:50%]")] == ["00", "01", "10"]


def test_files_that_only_datasets_reads_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    turns = [[{"role": "user", "content": f"{k}"}, {"role": "assistant", "content": None}] for k in range(2500)]
    table = pa.table({"m": turns})
    with pa.OSFile(str(tmp_path / "set" / "train.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert [row for _, row in rows_of("set", tmp_path)] == table.to_pylist()
    assert not [p for p in (tmp_path / "cache").rglob("*.arrow")]


_value = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
_turns = st.lists(st.fixed_dictionaries({"role": _value, "content": _value}) | st.none(), max_size=3)
_row = st.fixed_dictionaries({"t": _value, "m": st.none() | _turns, "n": st.none() | st.integers(-5, 5)})


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(_row, min_size=1, max_size=6), start=st.integers(0, 3))
def test_columns_give_the_same_values_as_arrow_itself(rows: list[dict], start: int) -> None:
    import pyarrow as pa

    turn = pa.struct([("role", pa.string()), ("content", pa.large_string())])
    schema = pa.schema([("t", pa.string()), ("m", pa.list_(turn)), ("n", pa.int64())])
    for batch in pa.Table.from_pylist(rows, schema=schema).to_batches():
        assert list(sources._arrow_rows(batch.slice(start))) == batch.slice(start).to_pylist()


def test_bad_utf8_in_parquet_costs_its_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    pq.write_table(pa.table({"a": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}), tmp_path / "x.parquet")
    rows = [row for _, row in rows_of("x.parquet", tmp_path)]
    assert rows[0] == {"a": "good"} and rows[2] == {"a": "fine"} and isinstance(rows[1], Broken) and rows[1].reason == sources.BAD_UTF8


def test_a_saved_dataset_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in rows_of("saved", tmp_path)] == ROWS


def test_a_hub_id_that_cannot_be_had_is_bad_input(tmp_path: Path) -> None:
    spec = SourceSpec(path="nobody-here/no-such-set")
    assert sources.locate(spec, tmp_path) is None
    with pytest.raises(BadInput, match="`datasets` could not read 'nobody-here/no-such-set'"):
        rows_of(spec.path, tmp_path)


def test_options_are_checked() -> None:
    for bad in (
        {"path": "x", "mapp": {}},
        {"path": "x", "map": {"usr": "q"}},
        {"path": "x", "map": {"user": "q"}},
        {"path": "x", "map": {"user": "q", "assistant": "a", "messages": "m"}},
        {"path": "x", "weight": 0},
        {"path": "x", "limit": 0},
    ):
        with pytest.raises(ValidationError):
            SourceSpec.model_validate(bad)
    with pytest.raises(ValidationError, match="did you mean 'user'"):
        SourceSpec.model_validate({"path": "x", "map": {"usr": "q"}})
    assert SourceSpec.model_validate("a/train.jsonl.gz").label == "train"
    specs = [SourceSpec(path="a/train.jsonl"), SourceSpec(path="b/train.json"), SourceSpec(path="org/set")]
    assert sources.labels(specs) == ["train", "train-2", "set"]


def test_reading_is_streamed(tmp_path: Path) -> None:
    import tracemalloc

    with open(tmp_path / "x.jsonl", "w") as file:
        for _ in range(40_000):
            file.write('{"question": "' + "q" * 200 + '", "answer": "a"}\n')
    tracemalloc.start()
    count = sum(1 for _ in read(SourceSpec(path="x.jsonl"), tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000 and peak < 1_000_000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"columns": {"id": "key"}}, "cannot be called 'id'"),
        ({"tags": {"phase": 1}}, "cannot be called 'phase'"),
        ({"tags": {"a.b": 1}}, "cannot be called 'a.b'"),
        ({"columns": {"x": "a"}, "tags": {"x": "b"}}, "'x' is both a column and a tag"),
    ],
)
def test_names_that_columns_and_tags_cannot_have(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSpec(path="x.jsonl", **more)

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guidetune.data import keys, rows
from guidetune.data.keys import KeyTable
from guidetune.data.rows import EncodedRow, EncodedRows, RowWriter
from guidetune.errors import BadInput

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(_texts, min_size=1, max_size=30), data=st.data())
def test_any_ids_come_back_in_their_places(tmp_path_factory: pytest.TempPathFactory, ids: list[str], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("ids")
    with pytest.MonkeyPatch.context() as patch, RowWriter(folder / rows.FILE) as writer:
        patch.setattr(rows, "BATCH_ROWS", 7)  # several batches
        for k, id in enumerate(ids):
            writer.write(id, ids[-1 - k], [k, k], [0.0, 1.0])
    stored = EncodedRows.open(folder)
    assert stored.ids == ids and list(stored.ids) == ids and len(stored.ids) == len(ids) and stored.sources == ids[::-1]
    k = data.draw(st.integers(-len(ids), len(ids) - 1))
    assert stored.ids[k] == ids[k] and stored.ids[k:] == ids[k:] and stored.ids[np.int64(k)] == ids[k]
    assert [row.id for row in stored] == ids
    assert stored.ids != [*ids, "x"] and stored.ids != ["other", *ids[1:]] or ids[0] == "other"
    with pytest.raises(IndexError):
        stored.ids[len(ids)]


def test_what_is_known_of_all_rows_is_mapped_and_not_read(tmp_path: Path) -> None:
    with RowWriter(tmp_path / rows.FILE) as writer:
        for k in range(3 * rows.BATCH_ROWS + 5):
            writer.write(f"r{k}", "s", [k // 2] * (1 + k % 3), [0.0] + [0.5] * (k % 3))
    stored = EncodedRows.open(tmp_path)
    for values in (stored.index, stored.lengths, stored.supervised):
        base = values
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) or "mmap" in type(base).__name__
        assert not values.flags.writeable
    assert stored.lengths.tolist() == [1 + k % 3 for k in range(len(stored))]
    assert stored.supervised.tolist() == [k % 3 for k in range(len(stored))]
    tokens = {(k // 2, 1 + k % 3) for k in range(len(stored))}
    assert stored.duplicates == len(stored) - len(tokens)
    assert stored._views == [None] * len(stored._views)  # no row's tokens have been looked at


def test_one_digest_however_the_rows_were_written(tmp_path: Path) -> None:
    made = [EncodedRow(f"é{k}", "s", np.arange(k % 5 + 1, dtype=np.int32), np.ones(k % 5 + 1, np.float32)) for k in range(50)]
    for name, step in (("one", 1), ("seven", 7), ("all", 50)):
        (tmp_path / name).mkdir()
        with RowWriter(tmp_path / name / rows.FILE) as writer:
            for a in range(0, 50, step):
                part = made[a : a + step]
                lengths = np.array([len(r.input_ids) for r in part])
                tokens, weights = np.concatenate([r.input_ids for r in part]), np.concatenate([r.loss_weight for r in part])
                writer.write_many([r.id for r in part], [r.source for r in part], lengths, tokens, weights)
    stored = [EncodedRows.open(tmp_path / name) for name in ("one", "seven", "all")]
    assert len({s.digest for s in stored} | {EncodedRows.from_rows(made).digest}) == 1
    # Neither the border between two ids nor that between two rows may be moved.
    moved = [EncodedRow("é01", "s", made[0].input_ids, made[0].loss_weight), *made[1:]]
    assert EncodedRows.from_rows(moved).digest != stored[0].digest
    one, other = ([EncodedRow(id, "s", made[0].input_ids, made[0].loss_weight) for id in ids] for ids in (["ab", "c"], ["a", "bc"]))
    assert EncodedRows.from_rows(one).digest != EncodedRows.from_rows(other).digest


def test_a_lost_or_foreign_index_is_said(tmp_path: Path) -> None:
    with RowWriter(tmp_path / rows.FILE) as writer:
        writer.write("a", "s", [1, 2], [0.0, 1.0])
        writer.write("b", "s", [3], [0.0])
    index = (tmp_path / rows.INDEX_FILE).read_bytes()
    (tmp_path / rows.INDEX_FILE).write_bytes(index[:16])
    with pytest.raises(BadInput, match="do not belong together"):
        EncodedRows.open(tmp_path)
    (tmp_path / rows.INDEX_FILE).write_bytes(index[16:] + index[:16])
    with pytest.raises(BadInput, match="differ in length"):
        EncodedRows.open(tmp_path)[0]
    (tmp_path / rows.INDEX_FILE).unlink()
    with pytest.raises(BadInput, match="do not belong together"):
        EncodedRows.open(tmp_path)


def test_several_processes_read_one_folder(tmp_path: Path) -> None:
    with RowWriter(tmp_path / rows.FILE) as writer:
        for k in range(100):
            writer.write(f"r{k}", "s", [k, k], [0.0, 1.0])
    mine = EncodedRows.open(tmp_path)
    (tmp_path / rows.FILE).chmod(0o444)
    code = (
        "import sys, json; from pathlib import Path; from guidetune.data.rows import EncodedRows; "
        "r = EncodedRows.open(Path(sys.argv[1])); print(json.dumps([r.digest, sum(int(x.input_ids.sum()) for x in r), r.ids[99]]))"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for other in others:
        assert json.loads(other.communicate(timeout=60)[0]) == [mine.digest, 2 * sum(range(100)), "r99"]


_keys = st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=8)


@settings(max_examples=60, deadline=None)
@given(batches=_keys, words=st.integers(1, 2), on_disk=st.booleans())
def test_key_table_is_a_set_and_a_counter(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], words: int, on_disk: bool
) -> None:
    path = tmp_path_factory.mktemp("keys") / "table" if on_disk else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_FIRST", 4)  # it has to grow
        patch.setattr(keys, "_KEEP", 64)
        seen: dict[tuple[int, ...], int] = {}
        table, counter = KeyTable(path, words), KeyTable(path.with_name("counter") if path else None, words, values=1)
        for batch in batches:
            # few low words, so that slots collide; equal low words with different high ones
            made = [(k % 6 + 1,) if words == 1 else (k % 6 + 1, k) for k in batch]
            _, new = table.insert(np.array(made, dtype=np.uint64).reshape(-1, words))
            counts = counter.count(np.array(made, dtype=np.uint64).reshape(-1, words))
            for key, first, count in zip(made, new.tolist(), counts.tolist(), strict=True):
                assert first == (key not in seen)
                seen[key] = seen.get(key, 0) + 1
                assert count == seen[key]
        assert len(table) == len(seen)
        table.close()
        counter.close()
    assert path is None or not list(path.parent.iterdir())

"""Artefact stages, the registry, encoded rows on disk, progress lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guidetune import registry
from guidetune.artefacts import derive_seed, fingerprint, finished, read_json, stage, write_json, write_text_atomic
from guidetune.data.rows import EncodedRow, EncodedRows, RowWriter
from guidetune.errors import BadInput
from guidetune.progress import Bar


def test_a_stage_is_made_once_and_again_for_another_key(tmp_path: Path) -> None:
    made = []

    def build(work: Path) -> dict:
        made.append(sorted(p.name for p in work.iterdir() if not p.name.startswith(".")))
        (work / "x").write_text(str(len(made)))
        return {"n": len(made)}

    first = stage(tmp_path / "s", {"a": 1}, build)
    again = stage(tmp_path / "s", {"a": 1}, build)
    assert not first.reused and again.reused and first.result == again.result == {"n": 1}
    other = stage(tmp_path / "s", {"a": 2}, build)
    assert not other.reused and (tmp_path / "s/x").read_text() == "2"
    assert made == [[], []]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_broken_stage_publishes_nothing_and_goes_on_from_its_own_work(tmp_path: Path) -> None:
    def breaks(work: Path) -> None:
        (work / "half").write_text("1")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        stage(tmp_path / "s", {"a": 1}, breaks)
    assert not (tmp_path / "s").exists() and finished(tmp_path / "s") is None

    seen = []
    stage(tmp_path / "s", {"a": 1}, lambda work: seen.append((work / "half").exists()))
    with pytest.raises(RuntimeError):
        stage(tmp_path / "t", {"a": 1}, breaks)
    stage(tmp_path / "t", {"a": 2}, lambda work: seen.append((work / "half").exists()))
    assert seen == [True, False]


def test_a_failed_remake_leaves_the_old_artefact(tmp_path: Path) -> None:
    stage(tmp_path / "s", {"a": 1}, lambda work: (work / "x").write_text("old") and None)

    def breaks(work: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stage(tmp_path / "s", {"a": 2}, breaks)
    assert (tmp_path / "s/x").read_text() == "old" and finished(tmp_path / "s", {"a": 1})


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="cannot write"):
        stage(tmp_path / "file" / "s", {}, lambda work: None)


def test_text_that_utf8_cannot_carry_is_written_as_escapes(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "t", "a\ud800b")
    assert (tmp_path / "t").read_text() == "a\\ud800b"
    with pytest.raises(ValueError):
        write_json(tmp_path / "j", {"x": float("nan")})
    assert not (tmp_path / "j").exists() and len(list(tmp_path.iterdir())) == 1


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8)
)
@settings(max_examples=60, deadline=None)
def test_fingerprints_follow_content_not_order(value: object) -> None:
    assert fingerprint({"a": value, "b": 1}) == fingerprint({"b": 1, "a": json.loads(json.dumps(value))})
    assert fingerprint([value]) != fingerprint([value, None])


def test_seeds_name_their_purpose() -> None:
    assert derive_seed(1, "order", 0) == derive_seed(1, "order", 0)
    assert len({derive_seed(s, p, k) for s in range(5) for p in ("order", "dropout") for k in range(5)}) == 50


def test_registry_names_builds_and_refuses() -> None:
    assert {"gift", "dft", "stm"} <= set(registry.names("token_weights"))
    gift = registry.build("token_weights", {"method": "gift", "power": 2})
    assert gift.power == 2.0 and registry.build("token_weights", gift) is gift
    with pytest.raises(BadInput, match="did you mean 'gift'"):
        registry.build("token_weights", "gitf")
    with pytest.raises(BadInput, match="did you mean 'power'"):
        registry.build("token_weights", {"method": "gift", "powr": 2})
    with pytest.raises(BadInput) as several:
        registry.build("token_weights", {"method": "gift", "power": -1, "floor": 7, "nothing": 1})
    assert len(several.value.problems) == 3
    for wrong in (3, {"power": 1}, {"method": 3}, None, {"method": "gift", 3: 4}):
        with pytest.raises(BadInput):
            registry.build("token_weights", wrong)
    with pytest.raises(BadInput, match="not a token_weights"):
        registry.build("token_weights", registry.build("params", "lora"))
    with pytest.raises(Exception, match="frozen"):
        gift.power = 3.0


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_every_method_documents_itself(kind: str) -> None:
    for name in registry.names(kind):
        cls = registry.get(kind, name)
        assert (cls.kind, cls.name) == (kind, name) and cls.summary and cls.__doc__
        assert registry.source_file(cls).stem == name
        for option, field in cls.model_fields.items():
            assert field.description, f"{kind} {name}: option {option} has no description"


def test_nothing_heavy_is_imported_at_start() -> None:
    code = (
        "import sys, guidetune, guidetune.cli, guidetune.registry, guidetune.artefacts, guidetune.progress;"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'matplotlib', 'numpy', 'peft'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


rows_strategy = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(0, 1, width=32)), min_size=1, max_size=12),
    min_size=1,
    max_size=20,
)


@given(rows_strategy)
@settings(max_examples=40, deadline=None)
def test_rows_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    folder = tmp_path_factory.mktemp("rows")
    with RowWriter(folder / "rows.arrow") as writer:
        for i, row in enumerate(rows):
            writer.write(f"r{i}", "s", [t for t, _ in row], [w for _, w in row])
    data = EncodedRows.open(folder)
    assert len(data) == len(rows) and data.ids == [f"r{i}" for i in range(len(rows))]
    for got, row in zip(data, rows, strict=True):
        assert got.input_ids.tolist() == [t for t, _ in row]
        np.testing.assert_array_equal(got.loss_weight, np.array([w for _, w in row], np.float32))
    assert data.lengths.tolist() == [len(row) for row in rows]
    assert data.supervised.tolist() == [sum(np.float32(w) > 0 for _, w in row) for row in rows]
    assert data.digest == EncodedRows.from_rows(list(data)).digest


def test_rows_across_batches_and_damaged_files(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "rows.arrow") as writer:
        for i in range(9000):
            writer.write(str(i), "s", [i] * (i % 3 + 1), [0.0] * (i % 3 + 1))
    data = EncodedRows.open(tmp_path)
    assert all(data[i].input_ids[0] == i for i in (0, 4095, 4096, 8191, 8192, 8999))
    with pytest.raises(IndexError):
        data[9000]
    whole = (tmp_path / "rows.arrow").read_bytes()
    (tmp_path / "rows.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="complete Arrow file"):
        EncodedRows.open(tmp_path)
    with pytest.raises(BadInput, match="no encoded rows"):
        EncodedRows.open(tmp_path / "nowhere")
    changed = EncodedRows.from_rows([EncodedRow("a", "s", np.array([1, 2], np.int32), np.array([0, 1], np.float32))])
    other = EncodedRows.from_rows([EncodedRow("a", "s", np.array([1, 2], np.int32), np.array([0, 0.5], np.float32))])
    assert changed.digest != other.digest


def test_progress_lines_say_rate_and_remaining_time() -> None:
    bar = Bar("guide", 1000, "tok")
    bar.start -= 10
    bar.advance(500, loss=1.23456)
    assert bar.line() == "guide 50 %: 50 tok/s, loss 1.235, 10 s left"


def test_manifest_holds_key_and_time(tmp_path: Path) -> None:
    stage(tmp_path / "s", {"path": Path("x"), "set": {2, 1}}, lambda work: {"ok": 1})
    manifest = read_json(tmp_path / "s/manifest.json")
    assert manifest["key"] == {"path": "x", "set": [1, 2]} and manifest["seconds"] >= 0

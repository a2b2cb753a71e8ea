from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guidetune.data import side
from guidetune.data.side import Embeddings, EmbeddingsWriter, SideTable, SideWriter
from guidetune.errors import BadInput

_ids = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), unique=True, max_size=30)
_numbers = st.one_of(st.none(), st.floats())


@settings(max_examples=30)
@given(ids=_ids, data=st.data())
def test_values_come_back_by_id(tmp_path_factory: pytest.TempPathFactory, ids: list[str], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("side") / "scores.parquet"
    values = data.draw(st.lists(_numbers, min_size=len(ids), max_size=len(ids)))
    texts = data.draw(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), min_size=len(ids), max_size=len(ids)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side, "GROUP_ROWS", 4)  # several row groups
        with SideWriter(path, {"loss": float, "answer": str}, {"model": "m"}) as out:
            for a in range(0, len(ids), 3):
                out.write(ids[a : a + 3], loss=values[a : a + 3], answer=texts[a : a + 3])
        table = SideTable.open(path)
        assert list(table.ids()) == ids and len(table) == len(ids) and table.facts == {"model": "m"}
        asked = data.draw(st.permutations([*ids, "not there\0"]))
        found = dict(zip(asked, table.values("loss", asked), strict=True))
        said = dict(zip(asked, table.values("answer", asked), strict=True))
    for id, value, text in zip(ids, values, texts, strict=True):
        # missing stays missing, NaN stays a number
        assert found[id] == value or (value is not None and math.isnan(value) and math.isnan(found[id]))
        assert said[id] == text
    assert found["not there\0"] is None and said["not there\0"] is None
    assert sorted(p.name for p in path.parent.iterdir()) == ["scores.parquet"]


def test_errors_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    with pytest.raises(BadInput, match="the id 'b' is given twice"), SideWriter(path, {"x": float}) as out:
        out.write(["a", "b"], x=[1.0, 2.0])
        out.write(["b"], x=np.array([3.0]))
    assert not list(tmp_path.iterdir())  # nothing is published from a failed block
    with pytest.raises(ValueError, match="2 values of 'x' for 1 ids"), SideWriter(path, {"x": float}) as out:
        out.write(["a"], x=[1.0, 2.0])
    with pytest.raises(BadInput, match="no side table"):
        SideTable.open(path)
    path.write_text("text")
    with pytest.raises(BadInput, match="not a Parquet file"):
        SideTable.open(path)
    pq.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(BadInput, match="needs a column `id` of text; it has key"):
        SideTable.open(path)
    pq.write_table(pa.table({"id": ["a", "b", "a"], "score": [1, None, 2], "text": ["x", "y", "z"]}), path)
    with pytest.raises(BadInput, match="the id 'a' is there twice"):
        SideTable.open(path)
    pq.write_table(pa.table({"id": ["a", "b"], "score": [1, None], "text": ["x", "y"]}), path)  # any Parquet file will do
    table = SideTable.open(path)
    assert table.values("score", ["b", "a"]) == [None, 1] and table.columns == {"score": int, "text": str}
    with pytest.raises(BadInput, match="did you mean 'score'"):
        table.values("scores", ["a"])
    with pytest.raises(BadInput, match="holds text"):
        table.numbers("text")


def test_embeddings_by_id(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(700, 5)).astype(np.float32)
    ids = [f"r{k}" for k in range(700)]
    with EmbeddingsWriter(tmp_path, 5, {"encoder": "e"}) as out:
        for a in range(0, 700, 90):
            out.write(ids[a : a + 90], vectors[a : a + 90])
    stored = Embeddings.open(tmp_path)
    assert len(stored) == 700 and stored.facts == {"encoder": "e"} and list(stored.ids()) == ids
    assert isinstance(stored.vectors, np.memmap)
    assert (stored.take(["r699", "r3"]) == vectors[[699, 3]].astype(np.float16)).all()
    with pytest.raises(BadInput, match="1 of 2 rows have no embedding, e.g. 'x'"):
        stored.take(["r0", "x"])
    with pytest.raises(ValueError, match="row b: an embedding is not finite"), EmbeddingsWriter(tmp_path, 1) as out:
        out.write(["a", "b"], np.array([[1.0], [1e6]]))
    with pytest.raises(BadInput, match="do not belong together"):
        Embeddings.open(tmp_path)

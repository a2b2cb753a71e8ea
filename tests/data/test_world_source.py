"""Rows of the embedded world as a source of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from guidetune import world
from guidetune.data.sources import SourceSpec, digest, read
from guidetune.errors import BadInput


def test_a_set_of_the_world_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDETUNE_CACHE", str(tmp_path))
    spec = SourceSpec(path="world:arithmetic", limit=20)
    rows = [row for _, row in read(spec, tmp_path)]
    expected = world.items("arithmetic", "train")[:20]
    assert [row["id"] for row in rows] == [item.id for item in expected]
    assert rows[0]["messages"][-1]["content"] == expected[0].answer
    before = digest(spec, tmp_path)
    assert digest(spec, tmp_path) == before
    assert digest(SourceSpec(path="world:knowledge"), tmp_path) != before


def test_an_unknown_set_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="arithmetic"):
        list(read(SourceSpec(path="world:aritmetic"), tmp_path))

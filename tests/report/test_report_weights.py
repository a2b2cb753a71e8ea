"""Token weights on real rows: from rows and guidance that the pipeline itself has written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from guidetune.report import heatmap, html

RECIPE = """
name: rows
models: {base: world:base, instruct: world:instruct}
data: {train: [{path: world:arithmetic, limit: 30}]}
tune: {on: base, params: lora, weights: [gift], max_length: 512}
"""
ARMS = {
    "gift": [{"method": "gift", "power": 0.5, "floor": 0.01}],
    "same": [{"method": "gift", "power": 0.5, "floor": 0.01}],
    "stm": [{"method": "stm", "max_perplexity": 2.5}],
    "dft": [{"method": "dft"}],
    "both": [{"method": "gift"}, {"method": "stm"}],
    "sft": [],
    "own": [{"method": "gone"}],
}
RESULTS = {"arms": {name: {"status": "ok", "recipe": {"tune": {"weights": weights}}} for name, weights in ARMS.items()}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from guidetune import pipeline
    from guidetune.recipe import load

    folder = tmp_path_factory.mktemp("weights")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    pipeline.guide(load(folder / "recipe.yaml"), folder / "run")
    return folder / "run"


def test_weights_are_those_of_the_methods_on_the_stored_confidence(run: Path) -> None:
    from guidetune.data.rows import EncodedRows
    from guidetune.guidance import Guidance

    shown, missing = heatmap.collect(run, RESULTS)
    assert [heat.arms for heat in shown] == [["gift", "same"], ["stm"], ["both"]]
    assert [text.split(":")[0] for text in missing] == ["dft", "own"] and "follow the model in training" in missing[0]
    rows, store = EncodedRows.open(run / "data"), Guidance.open(run / "guidance" / "instruct")
    by_id = {row.id: (i, row) for i, row in enumerate(rows)}
    gift, stm, both = shown
    assert [row.which for row in gift.rows] == ["little trusted", "typical", "well trusted"]
    assert gift.rows[0].mean_confidence < gift.rows[1].mean_confidence < gift.rows[2].mean_confidence
    for one, other, product in zip(gift.rows, stm.rows, both.rows, strict=True):
        i, row = by_id[one.id]
        q = np.exp(store.row(i).astype(np.float32))
        assert one.mean_confidence == pytest.approx(float(q.mean()), abs=1e-6)
        got = [[token.weight for token in part.tokens if token.weight is not None] for part in (one, other, product)]
        assert got[0] == pytest.approx(np.maximum(q, 0.01) ** 0.5, abs=1e-6)
        kept = (1 / q <= 2.5).astype(float)
        assert got[1] == kept.tolist()
        assert got[2] == pytest.approx(np.maximum(q, 1e-4) * kept, abs=1e-6)
        assert all(0 <= token.level < heatmap.LEVELS for token in one.tokens)
        assert len(got[0]) == int((row.loss_weight > 0).sum())


def test_every_weight_is_on_the_page_as_a_number(run: Path) -> None:
    text = html.render(run, RESULTS)
    (gift, _, _), _ = heatmap.collect(run, RESULTS)
    tokens = [token for row in gift.rows for token in row.tokens]
    assert text.count('class="v"') == 3 * len(tokens)
    assert 'class="t w8"' in text and 'class="t w0"' not in text.split("stm, max_perplexity")[0].split("</p>")[0]
    assert "same" in text and "Not shown: dft: its weights follow the model in training" in text


def test_rows_and_guidance_that_do_not_belong_together_are_not_shown(run: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(run, torn)
    manifest = json.loads((torn / "guidance" / "instruct" / "manifest.json").read_text(encoding="utf-8"))
    manifest["key"]["rows"] = "of another run"
    (torn / "guidance" / "instruct" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shown, missing = heatmap.collect(torn, RESULTS)
    assert shown == [] and "the rows that its guidance was made for are not in the run folder" in missing[0]
    shutil.rmtree(torn / "guidance")
    assert "holds no guidance of instruct" in heatmap.collect(torn, RESULTS)[1][0]

"""The same questions give the same log-likelihoods and outputs as lm-evaluation-harness (where it is installed)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluate.py"


@pytest.mark.slow
def test_choices_and_outputs_are_those_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    spec = importlib.util.spec_from_file_location("evaluate_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    bench: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = bench.made_up_rows(40)
    bench.write_rows(rows, (40, 40, 12), tmp_path)
    bench.build_model("world", rows, tmp_path / "model")
    ours, theirs = (dict(run(tmp_path, 24, "float32", 8)) for run in (bench.run_guidetune, bench.run_lm_eval))
    for task in bench.TASKS:
        found = bench.agreement(task, ours[task], theirs[task], rows[task])
        assert found["disagreeing"] == 0
        if task != "generate":
            assert found["largest_difference"] < 1e-3  # sums of some hundred tokens
            assert ours[task]["scores"]["acc"] == theirs[task]["scores"]["acc"]

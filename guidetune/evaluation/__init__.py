"""Evaluation: tasks put to a model, judged item by item, with intervals and paired tests.

Start reading at `evaluate.py`; its function `evaluate` is also `guidetune.evaluate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "EvalSettings": "guidetune.evaluation.evaluate",
    "plan": "guidetune.evaluation.evaluate",
    "paired_results": "guidetune.evaluation.evaluate",
    "table": "guidetune.evaluation.results",
    "Task": "guidetune.evaluation.task",
    "Item": "guidetune.evaluation.task",
    "Output": "guidetune.evaluation.task",
    "TaskContext": "guidetune.evaluation.task",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""HumanEval: complete a Python function from its signature and docstring (arXiv 2107.03374)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from guidetune.evaluation.code import CodeTask, Problem
from guidetune.evaluation.task import Item, ask, column, fill
from guidetune.registry import method


@method(kind="task", name="humaneval", paper="2107.03374", summary="Python functions from their docstrings, judged by running their tests.")
class HumanEval(CodeTask):
    """164 functions with unit tests. Needs `allow_code`. With several samples: unbiased pass@k, and maj@k by equal behaviour."""

    template: str = Field(
        "Complete the following Python function. Answer with the whole function in one ```python block.\n\n```python\n{prompt}```",
        description="Prompt of a chat; {column} is replaced.",
    )
    system: str | None = Field(None, description="System message.")

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        prompt, entry = str(column(row, "prompt")), str(column(row, "entry_point"))
        problem = Problem(prompt, entry, str(column(row, "test")), f"check({entry})")
        solution = row.get("canonical_solution")
        gold = (solution if self.format == "plain" else f"```python\n{prompt}{solution}\n```") if solution is not None else None
        identity = str(row.get("task_id", number))
        if self.format == "plain":
            return Item(identity, text=prompt, reference=solution, gold=gold, payload=problem)
        return Item(identity, ask(fill(self.template, row), self.system), reference=solution, gold=gold, payload=problem)

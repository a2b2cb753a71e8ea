"""MBPP: short Python functions from one sentence and three tests (arXiv 2108.07732)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from guidetune.evaluation.code import CodeTask, Problem
from guidetune.evaluation.task import Item, RowTask, TaskContext, ask, column, fill
from guidetune.registry import method

PARTS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974), "all": (1, 974)}
SHOTS = (2, 3, 4)  # the paper's three examples


@method(kind="task", name="mbpp", paper="2108.07732", summary="Short Python functions from a sentence and three tests, judged by running.")
class MBPP(CodeTask):
    """974 problems, of which the paper tests 11 to 510. Needs `allow_code`. The tests are shown in the prompt, as in the paper."""

    part: Literal["test", "validation", "train", "prompt", "all"] = Field("test", description="The paper's split, by task_id.")
    shots: NonNegativeInt = Field(0, le=3, description="Solved examples before the question: the paper's problems 2, 3 and 4.")
    template: str = Field(
        "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n",
        description="Prompt; {column} and {tests} are replaced.",
    )
    closing: str = Field("Answer with the code in one ```python block.", description="Last line of a chat's prompt.")
    system: str | None = Field(None, description="System message.")

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        tests = [str(test) for test in column(row, "test_list")]
        asked = fill(self.template, {**row, "tests": "\n".join(tests)})
        code = str(row["code"]).replace("\r\n", "\n") if row.get("code") is not None else None
        setup = str(row.get("test_setup_code") or "").replace("\r\n", "\n")
        problem = Problem("", None, "\n".join([setup, *tests]))
        meta = {"task_id": int(column(row, "task_id"))}
        identity = str(meta["task_id"])
        if self.format == "plain":
            gold = f"{code}\n[DONE]" if code else None
            return Item(identity, text=f"{asked}[BEGIN]\n", reference=code, gold=gold, meta=meta, payload=problem)
        prompt = ask(f"{asked}\n{self.closing}", self.system)
        gold = f"```python\n{code}\n```" if code else None
        return Item(identity, prompt, reference=code, gold=gold, meta=meta, payload=problem)

    def items(self, ctx: TaskContext) -> list[Item]:
        found = RowTask.items(self.model_copy(update={"shots": 0}), ctx)  # the examples are the paper's, from another part
        examples = [item for item in found if item.meta["task_id"] in SHOTS][: self.shots]
        low, high = PARTS[self.part]
        return [self._shown(item, examples) for item in found if low <= item.meta["task_id"] <= high]

    def _shown(self, item: Item, examples: list[Item]) -> Item:
        if not examples:
            return item
        if self.format == "plain":
            before = "".join(f"{one.text}{one.gold}\n\n\n" for one in examples)
            return replace(item, text=before + str(item.text))
        turns = [turn for one in examples for turn in (one.messages[-1], {"role": "assistant", "content": one.gold})]
        return replace(item, messages=(*item.messages[:-1], *turns, item.messages[-1]))

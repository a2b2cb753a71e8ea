"""Item sets of the embedded world, each with its own verifiable check."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from guidetune.errors import BadInput
from guidetune.evaluation.task import Item, Output, Task, TaskContext, ask, column, read_rows
from guidetune.registry import method


@method(kind="task", name="world", summary="A set of the embedded world, or a file exported from it.")
class World(Task):
    """Problems with a verifiable answer; the score breaks down by skill and difficulty."""

    mode: ClassVar[str] = "generate"
    default_new_tokens: ClassVar[int] = 160

    set: str | None = Field(None, description="Name of an item set (`guidetune world` lists them).")
    path: str | None = Field(None, description="A file written by `guidetune world export`, in place of a set.")
    split: Literal["train", "test"] = Field("test", description="Side of the set; the two share no problem.")
    n: PositiveInt | None = Field(None, description="Items drawn (default: the set's usual number).")
    seed: NonNegativeInt = Field(0, description="Seed of the draw.")

    @property
    def runs_code(self) -> bool:  # type: ignore[override]
        """Whether answers are programs; of a file nobody knows before it is read, so `items` refuses those."""
        return self.set in ("programs", "completions")

    @model_validator(mode="after")
    def _one_origin(self) -> World:
        if (self.set is None) == (self.path is None):
            raise ValueError("give either set or path")
        return self

    def default_label(self) -> str:
        return self.set or Path(str(self.path)).name.split(".")[0]

    def items(self, ctx: TaskContext) -> list[Item]:
        from guidetune import world

        if self.path is not None:
            from guidetune.data.sources import SourceSpec

            rows = [row for _, row in read_rows(SourceSpec(path=self.path, limit=self.n), ctx)]
            if any(row.get("check") == "program" for row in rows):
                raise BadInput(f"task {self.label or self.name}: {self.path} asks for programs; read it with the task mbpp or humaneval")
        else:
            rows = [world.row(item) for item in world.items(str(self.set), self.split, self.n, self.seed)]
        return [
            Item(
                str(column(row, "id")),
                ask(column(row, "prompt")),
                reference=column(row, "gold"),
                gold=column(row, "answer"),
                meta={key: column(row, key) for key in ("skill", "category", "difficulty")},
                payload=row,
            )
            for row in rows
        ]

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        from guidetune import world

        return {"correct": int(world.grade(item.payload, output.text))}

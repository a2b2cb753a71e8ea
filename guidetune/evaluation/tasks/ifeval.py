"""IFEval: instructions that a program can verify (arXiv 2311.07911)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.errors import BadInput
from guidetune.evaluation.instructions import arguments_of, follows, follows_loosely
from guidetune.evaluation.task import Item, Output, RowTask, ask, column
from guidetune.registry import method


@method(
    kind="task", name="ifeval", paper="2311.07911", summary="Prompts with instructions that a program can verify, strictly and loosely."
)
class IFEval(RowTask):
    """Each prompt holds one or more of 25 kinds of instructions.

    `prompt_strict`: all of a prompt's instructions are followed; `inst_strict`: the share of all instructions. `prompt_loose` and
    `inst_loose` try eight variants of the response (without its first line, its last line, or both; each without asterisks). An empty
    response follows nothing. The rules and what differs from the reference: `guidetune/evaluation/instructions.py`.
    """

    mode: ClassVar[str] = "generate"
    default_new_tokens: ClassVar[int] = 1280

    system: str | None = Field(None, description="System message.")
    score_by: Literal["strict", "loose"] = Field("strict", description="The main score, at the level of prompts.")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return f"prompt_{self.score_by}"

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        kinds, given = column(row, "instruction_id_list"), column(row, "kwargs")
        if not isinstance(kinds, list) or not isinstance(given, list) or len(kinds) != len(given) or not kinds:
            raise BadInput("instruction_id_list and kwargs are two lists of the same length, with an instruction at least")
        wanted = [(str(kind), arguments_of(str(kind), arguments)) for kind, arguments in zip(kinds, given, strict=True)]
        return Item(str(row.get("key", number)), ask(str(column(row, "prompt")), self.system), reference=wanted)

    def demonstration(self, item: Item) -> str | None:
        return None

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        strict = [follows(kind, output.text, arguments) for kind, arguments in item.reference]
        loose = [follows_loosely(kind, output.text, arguments) for kind, arguments in item.reference]
        levels = {"strict": int(all(strict)), "loose": int(all(loose))}
        return {
            "correct": levels[self.score_by],
            "prompt_strict": levels["strict"],
            "prompt_loose": levels["loose"],
            "followed": [strict, loose],
        }

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        pairs = [one["followed"] for line in lines for one in line.get("samples", [line])]
        pooled = [[followed for pair in pairs for followed in pair[place]] for place in (0, 1)]
        return {name: sum(flags) / len(flags) for name, flags in zip(("inst_strict", "inst_loose"), pooled, strict=True)}

"""Tool calls in the form of the Berkeley Function-Calling Leaderboard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from guidetune.data.sources import SourceSpec
from guidetune.errors import BadInput
from guidetune.evaluation.task import Item, Output, RowTask, TaskContext, column, read_rows
from guidetune.evaluation.toolcalls import (
    REWARDS,
    Call,
    argument_f1,
    error_class,
    first_allowed,
    match_calls,
    python_text,
    read_calls,
    with_dots,
)  # fmt: skip
from guidetune.registry import method

SYSTEM = (
    "You can call these functions:\n{functions}\n\n"
    "When functions of this list answer the request, reply with the calls only, as [name(key=value, ...), ...] with Python literals. "
    "When none does, or something that a call needs is not given, say so in words and call nothing."
)


@method(kind="task", name="bfcl", summary="Tool calls against allowed values, by BFCL's rules (abstract syntax match).")
class BFCL(RowTask):
    """`correct`: the calls match by BFCL's rules: one call (simple, multiple), all in any order (parallel), or none (irrelevance).

    Calls are read from JSON, tags and Python (`guidetune.evaluation.toolcalls`); `unrepaired` counts only outputs that needed no mending.
    `strict` asks for verbatim values; `reward` is TL-Training's mean reward (arXiv 2412.15495). Items without a right call reward a model
    that never calls: `call_rate` and the categories show it.
    """

    mode: ClassVar[str] = "generate"

    answers_path: str | None = Field(
        None, description="File of allowed values; default: possible_answer__NAME or possible_answer/NAME beside."
    )
    system: str = Field(SYSTEM, description="System message; {functions} are the tools' schemas as JSON.")

    def deciding(self) -> dict[str, Any]:
        return {key: value for key, value in super().deciding().items() if key != "answers_path"}  # what it holds is in the items

    def items(self, ctx: TaskContext) -> list[Item]:
        if self.shots or self.header or self.where:
            raise BadInput(f"task {self.label or self.name}: shots, header and where are not for tool calls; write examples into system")
        golds = self._golds(ctx)
        found = []
        for line, row in read_rows(SourceSpec(path=self.path, split=self.split, subset=self.subset), ctx):
            identity = str(column(row, "id"))
            category = identity.rpartition("_")[0] or identity
            if golds is None and "irrelevance" not in category:
                raise BadInput(
                    f"task {self.label or self.name}: {self.path} has no file of allowed values beside it; name it with answers_path"
                )
            if golds is not None and identity not in golds:
                raise BadInput(f"task {self.label or self.name}: {self.path}, line {line}: no allowed values for {identity!r}")
            found.append(self._item(row, identity, category, golds[identity] if golds is not None else []))
        return found

    def _golds(self, ctx: TaskContext) -> dict[str, list[dict[str, Any]]] | None:
        if self.answers_path is not None:
            place: Path | None = ctx.find(self.answers_path)
        else:
            here = ctx.find(self.path)
            beside = [here.with_name(f"possible_answer__{here.name}"), here.parent / "possible_answer" / here.name]
            place = next((path for path in beside if path.is_file()), None)
        if place is None:
            return None
        rows = (row for _, row in read_rows(SourceSpec(path=str(place)), ctx))
        return {str(column(row, "id")): list(column(row, "ground_truth")) for row in rows}

    def _item(self, row: Mapping[str, Any], identity: str, category: str, golds: list[dict[str, Any]]) -> Item:
        functions = column(row, "function")
        turns = column(row, "question")
        messages = [dict(message) for message in (turns[0] if turns and isinstance(turns[0], list) else turns)]
        system = self.system.replace("{functions}", json.dumps(functions, ensure_ascii=False))
        if messages and messages[0]["role"] == "system":
            system = f"{messages.pop(0)['content']}\n\n{system}"
        gold = python_text([_declared(first_allowed(one), one, functions) for one in golds]) if golds else "No function answers that."
        return Item(
            identity,
            ({"role": "system", "content": system}, *messages),
            reference=golds,
            gold=gold,
            meta={"category": category},
            payload=functions,
        )

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        functions, golds = item.payload, item.reference
        parsed = read_calls(output.text)
        calls = with_dots(parsed.calls, [function["name"] for function in functions])
        verdict, detail = match_calls(calls, functions, golds)
        if verdict == "no_call" and not output.finished:
            verdict = "truncated"
        wanted = [first_allowed(one) for one in golds]
        classes = [error_class(calls[i] if i < len(calls) else None, gold, functions) for i, gold in enumerate(wanted)]
        exact = sorted(map(_text, calls)) == sorted(map(_text, wanted))
        return {
            "correct": int(verdict == "valid"),
            "unrepaired": int(verdict == "valid" and not parsed.repairs),
            "strict": int(exact),
            "call_rate": int(bool(calls)),
            "reward": sum(REWARDS[one] for one in classes) / len(classes) if classes else (1.0 if not calls else -1.5),
            "error": verdict,
            "detail": detail,
            "repairs": list(parsed.repairs),
            "calls": [{"name": call.name, "arguments": dict(call.arguments)} for call in calls],
            "answer": json.dumps(sorted(map(_text, calls))),
        }

    def notes(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        rate, due = (100 * sum(values) / len(lines) for values in ([x["call_rate"] for x in lines], [bool(x["reference"]) for x in lines]))
        return [f"a tool was called on {rate:.1f} % of the items, and should have been on {due:.1f} %"]

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Mean over categories (BFCL's non-live rule), F1 of argument names and values, and the share of every error class."""
        groups: dict[str, list[float]] = {}
        for line in lines:
            groups.setdefault(line["meta"]["category"], []).append(line["correct"])
        found = {"macro": sum(sum(values) / len(values) for values in groups.values()) / len(groups)}
        if all("calls" in line for line in lines):
            calls = [[Call(one["name"], one["arguments"]) for one in line["calls"]] for line in lines]
            golds = [[first_allowed(one) for one in line["reference"]] for line in lines]
            found |= {"argument_f1": argument_f1(calls, golds, False), "value_f1": argument_f1(calls, golds, True)}
            for name, count in sorted(Counter(line["error"] for line in lines if line["error"] != "valid").items()):
                found[f"error: {name}"] = count / len(lines)
        return found


def _declared(call: Call, gold: Mapping[str, Any], functions: Sequence[Mapping[str, Any]]) -> Call:
    """Without the optional arguments that the tool's schema lacks (the published answers hold two)."""
    schema = next((f for f in functions if f["name"] == call.name), {})
    known = schema.get("parameters", {}).get("properties", {})
    return Call(call.name, {key: value for key, value in call.arguments.items() if key in known or "" not in gold[call.name][key]})


def _text(call: Call) -> str:
    return json.dumps([call.name, dict(call.arguments)], sort_keys=True, default=str)

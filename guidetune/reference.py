"""What there is to write in a recipe, generated from the types: `guidetune methods`, docs/recipe.md and docs/methods.md.

python -m guidetune.reference           write the pages of docs/ again
python -m guidetune.reference --check   exit code 1 when a page is out of date
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from guidetune import registry
from guidetune.errors import BadInput


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML would say it: `number`, `cut | drop`, `list of text`."""
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything", Path: "path"}
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in plain:
        return plain[annotation]
    if origin is Literal:
        return " | ".join(str(value) for value in inside)
    if origin is typing.Annotated:
        return type_name(inside[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(part) for part in inside))
    if origin in (list, set, frozenset) or (origin is tuple and inside[-1:] == (...,)):
        return f"list of {type_name(inside[0])}" if inside else "list"
    if origin is tuple:
        return f"list of {len(inside)} {type_name(inside[0])}s"
    if origin is dict or annotation is dict or "Mapping" in str(origin):
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, registry.Method):
        return "method"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__.removesuffix("Spec").removesuffix("Settings").lower()
    return getattr(annotation, "__name__", str(annotation))


def default_of(info: FieldInfo) -> str:
    """A default as YAML would write it; `required` when there is none."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, default=str, ensure_ascii=False)


def options(cls: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(name, type, default, description) of every field."""
    return [(name, type_name(info.annotation), default_of(info), info.description or "") for name, info in cls.model_fields.items()]


def methods(kind: str | None = None) -> Iterator[type[registry.Method]]:
    """Every method of one kind, or of all, by kind and name."""
    for one in [kind] if kind else registry.KINDS:
        for name in registry.names(one):
            yield registry.get(one, name)


def find(name: str) -> list[type[registry.Method]]:
    """The methods called `name` (`kind/name` picks one kind), or all methods of the kind of that name.

    Raises:
        BadInput: neither a method nor a kind, with the nearest name.
    """
    kind, _, short = name.rpartition("/")
    if kind:
        return [registry.get(kind, short)] if kind in registry.KINDS else _unknown(name)
    if name in registry.KINDS:
        return list(methods(name))
    found = [registry.get(one, name) for one in registry.KINDS if name in registry.names(one)]
    return found or _unknown(name)


def _unknown(name: str) -> typing.NoReturn:
    everything = sorted({n for kind in registry.KINDS for n in registry.names(kind)} | set(registry.KINDS))
    raise BadInput(f"no method or kind is called {name!r}{registry.nearest(name, everything)}")


def example(cls: type[registry.Method]) -> str:
    """One line of YAML: the method with its first options at their defaults."""
    shown = []
    for name, info in cls.model_fields.items():
        if info.is_required():
            shown.append(f"{name}: ...")
        elif len(shown) < 3 and info.get_default(call_default_factory=True) is not None:
            shown.append(f"{name}: {default_of(info)}")
    return f"{{method: {cls.name}, {', '.join(shown)}}}" if shown else cls.name


def paper_of(cls: type[registry.Method]) -> str:
    return f"arXiv {cls.paper}" if cls.paper else ""


def method_markdown(cls: type[registry.Method], level: int = 3) -> str:
    paper = f" ([{paper_of(cls)}](https://arxiv.org/abs/{cls.paper}))" if cls.paper else ""
    lines = [f"{'#' * level} {cls.name}", "", cls.summary + paper, ""]
    if (doc := _own_doc(cls)) is not None:
        lines += [doc, ""]
    lines += ["```yaml", example(cls), "```", ""]
    if cls.model_fields:
        lines += [*_table(cls), ""]
    return "\n".join(lines)


def _own_doc(cls: type) -> str | None:
    import inspect

    return inspect.cleandoc(cls.__doc__) if "__doc__" in cls.__dict__ and cls.__doc__ else None


def _table(cls: type[BaseModel]) -> list[str]:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, description in options(cls):
        rows.append(f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(description)} |")
    return rows


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def recipe_markdown() -> str:
    """docs/recipe.md."""
    from guidetune import recipe

    lines = [
        "# The recipe",
        "",
        "Generated from the types by `make docs`; do not edit.",
        "",
        "A recipe is one YAML file (YAML 1.2: `on` and `no` are words, `2e-4` is a number). Unknown keys are refused. Relative paths",
        "start at the recipe's folder, or else at the working folder. Any key can be changed on the command line:",
        "`--set tune.lr=1e-4`, `--set tune.weights=[dft]`, `--set evaluate.task.0.limit=100`; the index after the last one adds an",
        "item. A relative path given there starts at the working folder when something is there. The run folder keeps the recipe with",
        "every default filled in as `recipe.yaml`, which runs again from anywhere.",
        "",
        "```yaml",
        "models: {base: meta-llama/Llama-3.1-8B, instruct: meta-llama/Llama-3.1-8B-Instruct}",
        "data:",
        "  train: [{path: gsm8k/train.jsonl, map: {user: question, assistant: answer}}]",
        "tune: {on: base, weights: [gift], lr: 2e-4}",
        "evaluate: {task: [{method: gsm8k, path: gsm8k/test.jsonl}]}",
        "```",
        "",
        "## Top level",
        "",
        *_table(recipe.Recipe),
        "",
    ]
    parts: list[tuple[str, type[BaseModel]]] = [
        ("models", recipe.Models),
        ("data", recipe.Data),
        ("data.train, data.validation: a source", recipe.SourceSpec),
        ("guide", recipe.Guide),
        ("tune", recipe.Tune),
        ("transfer", recipe.Transfer),
        ("evaluate", recipe.Evaluate),
        ("evaluate.validation", recipe.Validation),
    ]
    for title, cls in parts:
        lines += [f"## {title}", "", *([doc, ""] if (doc := _own_doc(cls)) else []), *_table(cls), ""]
    lines += [
        "A method is written as its name, `gift`, or with options, `{method: gift, power: 2}`. `guidetune methods` lists them; see",
        "[methods](methods.md).",
        "",
        "## Arms of compare",
        "",
        "An arm is the recipe with these keys changed and nothing else. A recipe can add its own under `arms`:",
        "`arms: {gentle: {tune.lr: 5e-5}}`; see [compare](compare.md).",
        "",
        "| arm | what it is | changes |",
        "|---|---|---|",
    ]
    for name, arm in recipe.ARMS.items():
        changes = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in arm.changes.items())
        lines.append(f"| `{name}` | {_cell(arm.description)} | {_cell(changes)} |")
    return "\n".join(lines) + "\n"


def methods_markdown() -> str:
    """docs/methods.md."""
    lines = ["# Methods", "", "Generated from the classes by `make docs`; do not edit. `guidetune methods NAME` shows the same.", ""]
    for kind in registry.KINDS:
        found = list(methods(kind))
        if found:
            lines += [f"## {kind}", "", *(method_markdown(cls) for cls in found)]
    return "\n".join(lines).rstrip("\n") + "\n"


PAGES = {"recipe.md": recipe_markdown, "methods.md": methods_markdown}


def main(arguments: list[str]) -> int:
    from guidetune.artefacts import write_text_atomic

    docs = Path(__file__).resolve().parent.parent / "docs"
    stale = 0
    for name, render in PAGES.items():
        text, page = render(), docs / name
        if page.is_file() and page.read_text(encoding="utf-8") == text:
            continue
        if "--check" in arguments:
            print(f"docs/{name} is out of date; run `make docs`", file=sys.stderr)
            stale = 1
        else:
            write_text_atomic(page, text)
            print(f"wrote docs/{name}")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

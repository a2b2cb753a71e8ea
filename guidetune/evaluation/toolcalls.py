"""Tool calls: reading them from an output in the usual formats, and judging them.

Two judges: BFCL's AST match against sets of allowed values (`ast_match`, `match_calls`), and an exact one with the error classes and
rewards of TL-Training (`error_class`; arXiv 2412.15495). Pure functions.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_THINKING = re.compile(r"\A.*?</think(?:ing)?>", re.DOTALL)
_FENCE = re.compile(r"```[^\n`]*\n?(.*?)```", re.DOTALL)
_TAGGED = re.compile(r"<(tool_call|function_call|functioncall)>\s*(.*?)\s*(?:</\1>|(?=<\1>)|\Z)", re.DOTALL)
_NAMED = re.compile(r"<function=([^>\s]+)>\s*(.*?)\s*</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PREFIX = re.compile(r"\[TOOL_CALLS\]|<\|python_tag\|>|\bfunctools(?=\[)")
_CALL = re.compile(r"^[ \t]*(\[?[ \t]*[A-Za-z_][\w.]*\(.*\)[ \t]*\]?)[ \t]*$", re.MULTILINE)

PLACES = 100  # brackets in prose at which JSON is looked for


@dataclass(frozen=True)
class Call:
    """One call. An argument that is no literal is kept as its source text."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Parsed:
    """The calls of an output; `repairs` names what had to be taken away or mended to read them."""

    calls: tuple[Call, ...]
    repairs: tuple[str, ...] = ()


def read_calls(text: str) -> Parsed:
    """The calls in an output; none when nothing in it can be read as one.

    Read are JSON (`{"name", "arguments"}`, also `parameters`, OpenAI's `{"function": {...}}` with arguments as text, `{name: {...}}`;
    alone, in a list, in `<tool_call>` or `<function_call>` tags, after `[TOOL_CALLS]` or `<|python_tag|>`), `<function=name>` and Python:
    `[f(a=1), g.h(b='x')]`. Around them thinking, code fences and prose are taken away, and trailing commas or Python's literals in JSON
    mended; each is a repair.
    """
    repairs: list[str] = []
    if _THINKING.match(text):
        text = _THINKING.sub("", text, count=1)
        repairs.append("thinking")
    text = text.strip()
    if tagged := _TAGGED.findall(text):
        found = [_read(body, repairs) for _, body in tagged]
        if all(found):
            return Parsed(tuple(call for calls in found for call in calls or ()), tuple(repairs))
    if named := _NAMED.findall(text):
        found = [_named(name, body, repairs) for name, body in named]
        if all(found):
            return Parsed(tuple(call for calls in found for call in calls or ()), tuple(repairs))
    if prefix := _PREFIX.search(text):
        text = text[prefix.end() :].strip()
    if calls := _read(text, repairs):
        return Parsed(calls, tuple(repairs))
    for block in _FENCE.findall(text):
        if calls := _read(block.strip(), repairs):
            return Parsed(calls, (*repairs, "fence"))
    lines = [found for match in _CALL.finditer(text) if (found := _python(match[1]))]
    if lines:
        return Parsed(tuple(call for calls in lines for call in calls), (*repairs, "prose"))
    for start in [i for i, c in enumerate(text) if c in "[{"][:PLACES]:
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if calls := _from_json(value):
            return Parsed(calls, (*repairs, "prose"))
    return Parsed(())


def _read(text: str, repairs: list[str]) -> tuple[Call, ...] | None:
    value, mended = _json(text)
    if mended is not None and (calls := _from_json(value)):
        repairs += mended
        return calls
    return _python(text)


def _json(text: str) -> tuple[Any, list[str] | None]:
    """The value and what was mended; (None, None) when it is not JSON."""
    if not text.startswith(("{", "[")):
        return None, None
    try:
        return json.loads(text), []
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(re.sub(r",\s*([}\]])", r"\1", text)), ["trailing comma"]
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text), ["python literals"]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None, None


def _from_json(value: Any) -> tuple[Call, ...] | None:
    if isinstance(value, list):
        found = [_from_json(one) for one in value]
        return tuple(call for calls in found for call in calls or ()) if found and all(found) else None
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("tool_calls"), list):
        return _from_json(value["tool_calls"])
    if isinstance(value.get("function"), Mapping):
        return _from_json(value["function"])
    name = value.get("name", value.get("function"))
    for key in ("arguments", "parameters", "args"):
        if isinstance(name, str) and key in value:
            arguments = value[key]
            if isinstance(arguments, str):
                arguments = _json(arguments)[0]
            return (Call(name, dict(arguments)),) if isinstance(arguments, Mapping) else None
    if value and all(isinstance(inner, Mapping) for inner in value.values()):
        return tuple(Call(str(key), dict(inner)) for key, inner in value.items())
    return None


def _named(name: str, body: str, repairs: list[str]) -> tuple[Call, ...] | None:
    """`<function=name>` with JSON arguments, or with `<parameter=key>` tags whose values are JSON or text."""
    if parameters := _PARAMETER.findall(body):
        return (Call(name, {key: _value_or_text(value) for key, value in parameters}),)
    value, mended = _json(body) if body else ({}, [])
    if mended is None or not isinstance(value, Mapping):
        return None
    repairs += mended
    return (Call(name, dict(value)),)


def _value_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _python(text: str) -> tuple[Call, ...] | None:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]
        calls = [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tuple(call for call in calls if call is not None) if calls and all(call is not None for call in calls) else None


def _python_call(node: ast.AST) -> Call | None:
    """A call with keyword arguments only: positional ones name no parameter."""
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        return None
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", name):
        return None
    return Call(name, {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords})


def _literal(node: ast.AST) -> Any:
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_literal(item) for item in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values
    if isinstance(node, ast.Dict):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ast.unparse(node)


def with_dots(calls: Sequence[Call], offered: Sequence[str]) -> tuple[Call, ...]:
    """Names that a template wrote with `_` for `.` get their dots back."""
    places = {name.replace(".", "_"): name for name in offered if "." in name}
    return tuple(call if call.name in offered else Call(places.get(call.name, call.name), call.arguments) for call in calls)


# ---------------------------------------------------------------------------------------------------------------------
# BFCL's AST match

TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict, "object": dict, "any": str,
}  # fmt: skip
_DELETED = str.maketrans("", "", " ,./-_*^")


def normal_string(text: str) -> str:
    """Without the characters ` ,./-_*^`, in lower case, with double quotes. (So "1.5" is "15": BFCL's rule, kept for comparison.)"""
    return text.translate(_DELETED).lower().replace("'", '"')


def _normal(value: Any) -> Any:
    return normal_string(value) if isinstance(value, str) else value


def _type_fault(value: Any, allowed: Sequence[Any], wanted: type, inner: type | None) -> tuple[bool, bool]:
    """(the type is wrong, the value is a variable); types are compared exactly, so True is no integer."""
    first = next((type(one) for one in allowed if one != ""), None)
    if type(value) is not wanted:
        return (False, True) if first is not None and type(value) is first else (True, False)
    variable = first is not None and first is not wanted
    if inner is not None and not any(
        not isinstance(one, list) or all(not _type_fault(item, one, inner, None)[0] for item in value) for one in allowed
    ):
        return True, False
    return False, variable


def _dict_equal(value: Mapping[str, Any], allowed: Any) -> bool:
    if not isinstance(allowed, Mapping):
        return False
    for key, given in value.items():
        if key not in allowed or _normal(given) not in [_normal(one) for one in allowed[key]]:
            return False
    return all(key in value or "" in options for key, options in allowed.items())


def _value_equal(value: Any, allowed: Sequence[Any], wanted: type, inner: type | None) -> bool:
    if wanted is dict:
        return any(_dict_equal(value, one) for one in allowed)
    if wanted is list and inner is dict:
        return any(
            isinstance(one, list) and len(one) == len(value) and all(_dict_equal(a, b) for a, b in zip(value, one, strict=True))
            for one in allowed
        )
    if wanted is str:
        return normal_string(value) in [_normal(one) for one in allowed]
    if wanted is list:
        return [_normal(item) for item in value] in [[_normal(item) for item in one] for one in allowed if isinstance(one, list)]
    return value in allowed


def ast_match(call: Call, function: Mapping[str, Any], gold: Mapping[str, Mapping[str, Sequence[Any]]]) -> tuple[str, str]:
    """BFCL's check of one call: ("valid", "") or (error class, detail), the first that applies.

    Args:
        function: the tool's schema: `name`, `parameters: {properties, required}`.
        gold: `{function name: {argument: allowed values}}`; "" among them means that the argument may be left out.
    """
    ((name, answers),) = gold.items()
    schema = function.get("parameters", {})
    properties = schema.get("properties", {})
    if call.name != name:
        return "wrong_func_name", f"{call.name} for {name}"
    for key in schema.get("required", []):
        if key not in call.arguments:
            return "missing_required", key
    for key, given in call.arguments.items():
        if key not in properties or key not in answers:
            return "unexpected_param", key
        allowed, kind = answers[key], properties[key].get("type", "any")
        wanted = TYPES.get(kind, str)
        inner = (
            TYPES.get(properties[key]["items"].get("type", "any")) if kind in ("array", "tuple") and "items" in properties[key] else None
        )
        value = list(given) if isinstance(given, tuple) and kind == "tuple" else given
        if kind == "float" and type(value) is int:
            value = float(value)
        wrong, variable = _type_fault(value, allowed, wanted, inner)
        if wrong:
            return "type_error", f"{key}: {type(given).__name__} for {kind}"
        try:
            equal = value in allowed if variable else _value_equal(value, allowed, wanted, inner)
        except (AttributeError, TypeError):  # an inner value of another shape than the schema's
            equal = False
        if not equal:
            return "value_error", f"{key}: {str(given)[:80]}"
    for key, allowed in answers.items():
        if key not in call.arguments and "" not in allowed:
            return "missing_optional", key
    return "valid", ""


def match_calls(calls: Sequence[Call], functions: Sequence[Mapping[str, Any]], golds: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """All calls against all golds, in any order: gold after gold takes the first unused call that fits it.

    One gold is BFCL's `simple` and `multiple`, several its `parallel`; none is `irrelevance`, where any call is wrong.
    """
    if not golds:
        return ("unwanted_call", calls[0].name) if calls else ("valid", "")
    if not calls:
        return "no_call", ""
    if len(calls) != len(golds):
        return "wrong_count", f"{len(calls)} calls for {len(golds)}"
    schemas = {function["name"]: function for function in functions}
    unused = list(calls)
    for gold in golds:
        name = next(iter(gold))
        verdicts = [ast_match(call, schemas.get(name, {}), gold) for call in unused]
        fit = next((i for i, verdict in enumerate(verdicts) if verdict[0] == "valid"), None)
        if fit is None:
            # the fault of the call that was meant: the one of that name
            return next((v for v in verdicts if v[0] != "wrong_func_name"), verdicts[0])
        unused.pop(fit)
    return "valid", ""


def first_allowed(gold: Mapping[str, Mapping[str, Sequence[Any]]]) -> Call:
    """The gold as a call: the first value allowed for each argument; one that may only be left out is left out."""
    ((name, answers),) = gold.items()
    return Call(name, {key: _first(allowed) for key, allowed in answers.items() if any(one != "" for one in allowed)})


def _first(allowed: Sequence[Any]) -> Any:
    value = next(one for one in allowed if one != "")

    def inner(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: _first(one) for key, one in value.items() if isinstance(one, list) and any(x != "" for x in one)}
        if isinstance(value, list):
            return [inner(item) for item in value]
        return value

    return inner(value)


def python_text(calls: Sequence[Call]) -> str:
    """`[f(a=1), g(b='x')]`"""
    return "[" + ", ".join(f"{c.name}({', '.join(f'{key}={value!r}' for key, value in c.arguments.items())})" for c in calls) + "]"


# ---------------------------------------------------------------------------------------------------------------------
# Exact judgement and the error classes of TL-Training

REWARDS: dict[str, float] = {
    "correct": 1.0,
    "wrong value": -0.25,
    "redundant": -0.5,
    "missing": -0.5,
    "hallucinated parameter": -0.8,
    "redundant + missing": -1.0,
    "hallucinated + one": -1.3,
    "wrong tool": -1.5,
    "hallucinated + redundant + missing": -1.8,
    "hallucinated tool": -2.0,
    "unparsable": -2.0,
}


def error_class(call: Call | None, gold: Call, functions: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a call, one class of `REWARDS`: names and keys compared verbatim, values as JSON with their types."""
    declared = {f["name"]: set(f.get("parameters", {}).get("properties", {})) for f in functions}
    if call is None:
        return "unparsable"
    if call.name not in declared:
        return "hallucinated tool"
    if call.name != gold.name:
        return "wrong tool"
    extra = set(call.arguments) - set(gold.arguments)
    hallucinated = bool(extra - declared[call.name])
    redundant, missing = bool(extra & declared[call.name]), bool(set(gold.arguments) - set(call.arguments))
    if hallucinated:
        return {0: "hallucinated parameter", 1: "hallucinated + one", 2: "hallucinated + redundant + missing"}[redundant + missing]
    if redundant or missing:
        return "redundant + missing" if redundant and missing else "redundant" if redundant else "missing"
    return "correct" if _json_text(call.arguments) == _json_text(gold.arguments) else "wrong value"


def _json_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def argument_f1(calls: Sequence[Sequence[Call]], golds: Sequence[Sequence[Call]], values: bool) -> float:
    """Micro F1 over all items' (call name, argument), or (call name, argument, value)."""

    def facts(found: Sequence[Call]) -> Counter[tuple[str, ...]]:
        return Counter((c.name, key, *([_json_text(value)] if values else [])) for c in found for key, value in c.arguments.items())

    shared = total = 0
    for found, gold in zip(calls, golds, strict=True):
        a, b = facts(found), facts(gold)
        shared += sum((a & b).values())
        total += sum(a.values()) + sum(b.values())
    return 2 * shared / total if total else 1.0

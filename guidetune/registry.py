"""Methods: one file each, found by file name, imported when first used.

A method is a frozen pydantic model whose fields are its options:

    @method(kind="token_weights", name="gift", paper="2605.01256", summary="...")
    class Gift(TokenWeights):
        power: float = Field(1.0, description="Exponent of the confidence.")

In a recipe it is written `gift` or `{method: gift, power: 2.0}`.
"""

from __future__ import annotations

import difflib
import hashlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from guidetune.errors import BadInput

# kind -> package whose modules are its methods. A new kind is one row here; a new method is only its own file.
KINDS: dict[str, str] = {
    "operation": "guidetune.data.operations",
    "scorer": "guidetune.scorers",
    "params": "guidetune.params",
    "token_weights": "guidetune.objectives.token_weights",
    "phases": "guidetune.phases",
    "task": "guidetune.evaluation.tasks",
    "weightspace": "guidetune.weightspace.presets",
    "tracker": "guidetune.tracking",
}


class Method(BaseModel):
    """Base of every method: immutable, unknown options refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    paper: ClassVar[str | None] = None
    summary: ClassVar[str] = ""
    origin: ClassVar[str | None] = None  # the user's own Python file that it comes from

    def spec(self) -> dict[str, Any]:
        """The method as it stands in a resolved recipe: its name (of a user's own: its file) and every option."""
        return {"method": self.origin or self.name, **self.model_dump(mode="json")}


M = TypeVar("M", bound=type[Method])
_loaded: dict[tuple[str, str], type[Method]] = {}
_own: dict[str, list[type[Method]]] = {}  # module of a user's own file -> what it registers


def method(*, kind: str, name: str, summary: str, paper: str | None = None) -> Callable[[M], M]:
    """Register a class as the method `name` of `kind`; `paper` is an arXiv id or None."""

    def register(cls: M) -> M:
        cls.kind, cls.name, cls.paper, cls.summary = kind, name, paper, summary
        _loaded[kind, name] = cls
        return cls

    return register


@cache
def names(kind: str) -> list[str]:
    """Names of all methods of a kind, from the file names alone (nothing is imported)."""
    if kind not in KINDS:
        raise BadInput(f"unknown kind of method {kind!r}; there are: {', '.join(KINDS)}")
    spec = find_spec(KINDS[kind])
    if spec is None or not spec.submodule_search_locations:
        return []
    found = [m.name for m in pkgutil.iter_modules(list(spec.submodule_search_locations)) if not m.name.startswith("_")]
    return sorted(found)


def get(kind: str, name: str) -> type[Method]:
    """The class of a method, or of a user's own in the Python file `name`; BadInput with the nearest name when there is none."""
    if name.endswith(".py"):
        return load_file(kind, Path(name))
    if (kind, name) in _loaded:
        return _loaded[kind, name]
    if name not in names(kind):
        raise BadInput(f"unknown {kind} {name!r}{nearest(name, names(kind))}")
    import_module(f"{KINDS[kind]}.{name}")
    if (kind, name) not in _loaded:
        raise RuntimeError(f"{KINDS[kind]}.{name} does not register a {kind} named {name!r}")
    return _loaded[kind, name]


def build(kind: str, spec: str | Mapping[str, Any] | Method) -> Any:
    """An instance from `name`, `{method: name, **options}` or an instance; all option errors at once as BadInput."""
    if isinstance(spec, Method):
        if spec.kind != kind:
            raise BadInput(f"{spec.name!r} is a {spec.kind}, not a {kind}")
        return spec
    if isinstance(spec, str):
        spec = {"method": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("method"), str):
        raise BadInput(f"a {kind} is written as its name or as {{method: name, option: value}}, not {spec!r}")
    cls = get(kind, spec["method"])
    options = {k: v for k, v in spec.items() if k != "method"}
    try:
        return cls(**options)
    except ValidationError as error:
        raise BadInput(option_problems(cls, error)) from None
    except TypeError:
        raise BadInput(f"{kind} {spec['method']!r}: option names must be strings, got {list(options)}") from None


def load_file(kind: str, path: Path) -> type[Method]:
    """The method of `kind` that a user's own Python file registers with `@method`.

    The file is run: name only files that you trust.

    Raises:
        BadInput: no such file, a file that does not run, or one that does not register exactly one new method of the kind.
    """
    try:
        path = path.expanduser().resolve()
        source = path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{kind} file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    name = f"_own_{path.stem}_{hashlib.sha256(str(path).encode() + source).hexdigest()[:12]}"
    if name not in _own:
        _own[name] = _run_file(name, path)
    found = [cls for cls in _own[name] if cls.kind == kind]
    if len(found) != 1:
        several = f"registers several: {', '.join(cls.name for cls in found)}; put each in a file of its own"
        none = f"registers none; decorate its class with @method(kind={kind!r}, name=..., summary=...)"
        raise BadInput(f"{path}: a {kind} file registers one {kind}, and this one {several if found else none}")
    found[0].origin = str(path)
    return found[0]


def _run_file(name: str, path: Path) -> list[type[Method]]:
    """The methods that a file registers; they are known by the file and not by their names."""
    before = dict(_loaded)
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = {key: cls for key, cls in _loaded.items() if cls.__module__ == name}
        for kind, called in found:
            if called in names(kind):
                raise BadInput(f"{path}: there is a {kind} called {called!r} already; give yours another name")
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, BadInput):
            raise
        raise BadInput(own_fault(str(path), "the file does not run", error)) from error
    finally:
        _loaded.update(before)
        for key in [key for key, cls in _loaded.items() if cls.__module__ == name]:
            del _loaded[key]
    return list(found.values())


def own_fault(origin: str, what: str, error: Exception) -> str:
    """An error in a user's own file as `file:line: what: error`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == origin]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{origin}{f':{line}' if line else ''}: {what}: {type(error).__name__}: {error}"


def option_problems(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each option that does not fit."""
    label = getattr(cls, "name", cls.__name__) or cls.__name__
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{label}: unknown option {where!r}{nearest(where, list(cls.model_fields))}")
        else:
            given = "" if fault["type"] == "missing" else f" = {fault['input']!r}"
            lines.append(f"{label}: {where}{given}: {fault['msg']}")
    return lines


def nearest(word: str, among: list[str]) -> str:
    """` (did you mean 'x'?)`, or the list of what there is."""
    close = difflib.get_close_matches(str(word), among, n=1, cutoff=0.55)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (there are: {', '.join(among)})" if among else ""


def source_file(cls: type[Method]) -> Path:
    """The file that defines a method (its digest is the method's code version)."""
    import inspect

    return Path(inspect.getfile(cls))

"""YAML 1.2 for files that people write: the 1.1 rules of PyYAML would read `on` as true, `no` as false and `2e-4` as text."""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS: list[tuple[str, str, list[str]]] = [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
]
TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would misread."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    Loader.add_implicit_resolver(TAG + _name, re.compile(_pattern), _first)
    if _name in ("int", "float"):
        Dumper.add_implicit_resolver(TAG + _name, re.compile(_pattern), _first)

# not of YAML 1.2, but what people write to share options between parts of a file
Loader.add_implicit_resolver(TAG + "merge", re.compile(r"^<<$"), ["<"])


def load(text: str) -> Any:
    """The plain values of a text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=Loader)

"""Rendering of Jinja chat templates: deterministic, sandboxed, with `{% generation %}` spans as character ranges.

Private to `chat.py`, which is the only module that may ask for a rendered conversation.
"""

from __future__ import annotations

import datetime
import json
import re
import traceback
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A template that asks for today's date would give other tokens tomorrow; this is the default date written in the Llama 3.1
# and 3.2 templates themselves.
FIXED_DATE = datetime.datetime(2024, 7, 26)

# Wrapped around what `{% generation %}` encloses and taken out again after rendering.
_OPEN, _CLOSE = "\ue0f0gt(\ue0f1", "\ue0f1)gt\ue0f0"
_MARK = re.compile(f"({re.escape(_OPEN)}|{re.escape(_CLOSE)})")

PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
)


class TemplateRefusal(Exception):
    """The template itself raised, for example on a role it does not know."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        return _OPEN + caller() + _CLOSE


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment.from_string(source)


class Template:
    """A compiled chat template with the tokenizer's special tokens and fixed variables bound.

    Raises:
        TemplateRefusal: the source is not valid Jinja (with the line).
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self.source = source
        self.variables = dict(variables)
        self.has_markers = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        try:
            self._template = _compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefusal(error.message or "syntax error", error.lineno) from None
        self._names = {**self._template.globals, "tools": None, "documents": None, **self.variables}

    def render(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the [start, end) character ranges inside `{% generation %}` blocks.

        Raises:
            TemplateRefusal: the template raised an error on these messages.
        """
        names = {**self._names, "messages": messages, "add_generation_prompt": generation_prompt}
        try:
            try:
                # `Template.render` would wrap the globals in a chain of maps for every row: half of a rendering's time.
                compiled = self._template
                context = jinja2.runtime.new_context(compiled.environment, compiled.name, compiled.blocks, names, shared=True)
                text = "".join(compiled.root_render_func(context))
            except Exception:
                text = self._template.render(names)  # the same error, with the template's own lines in its traceback
        except Exception as error:  # a template is foreign code: whatever it raises is its refusal of this conversation
            frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
            message = getattr(error, "message", None) or str(error) or type(error).__name__
            raise TemplateRefusal(message, frames[-1] if frames else None) from None
        if not self.has_markers or _OPEN not in text:
            return text, []
        spans, parts, length = [], [], 0
        for part in _MARK.split(text):
            if part == _OPEN:
                start = length
            elif part == _CLOSE:
                spans.append((start, length))
            else:
                parts.append(part)
                length += len(part)
        return "".join(parts), spans

    def line_of(self, *needles: str) -> int:
        """The first line of the source that mentions one of `needles`, tried in order; 1 when none does."""
        lines = self.source.split("\n")
        for needle in needles:
            for number, line in enumerate(lines, 1):
                if needle in line:
                    return number
        return 1

    def quote(self, line: int | None) -> str:
        """`line N: <its text>` for error messages."""
        if line is None:
            return "unknown line"
        lines = self.source.split("\n")
        text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        return f"line {line}: {text[:120]}{'…' if len(text) > 120 else ''}"

"""What a prepare folder holds, to look at: the ledger, the tokens with their targets in colour, and an export."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guidetune.artefacts import atomic_lines, read_json
from guidetune.data import ledger as ledger_files
from guidetune.data.figures import figures
from guidetune.data.prepare import TOKENIZER
from guidetune.data.rows import EncodedRow, EncodedRows
from guidetune.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from guidetune.guidance.store import Guidance

_CONTEXT = 6  # tokens before a token that its text may depend on
_LONGEST = 1200  # tokens of one row that are shown
_MEMBERS = 24  # members of a mix, values of a column that are shown
_UNEVEN = 0.6  # balance of labels below which they are called uneven


class TokenTexts:
    """Token ids to text, token by token; `tokenizer` is a Hugging Face tokenizer or the folder of a prepare stage."""

    def __init__(self, tokenizer: Any) -> None:
        if isinstance(tokenizer, (str, Path)):
            from tokenizers import Tokenizer

            file = Path(tokenizer) / TOKENIZER
            if not file.is_file():
                raise BadInput(f"no {TOKENIZER} in {tokenizer}; run `guidetune data` on the recipe again")
            backend = Tokenizer.from_file(str(file))
            self._decode = lambda ids: backend.decode(ids, skip_special_tokens=False)
        else:
            self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text(self, ids: Iterable[int]) -> str:
        """The text of a stretch of tokens."""
        return self._decode([int(i) for i in ids])

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The text that each token adds; tokens that are parts of one character give it with the last of them."""
        ids = [int(i) for i in ids]
        out: list[str] = []
        start = 0
        for k in range(len(ids)):
            context = max(0, start - _CONTEXT)
            before, after = self._decode(ids[context:start]), self._decode(ids[context : k + 1])
            if after.endswith("\ufffd") and k - start < 3 and k + 1 < len(ids):
                out.append("")
                continue
            out.append(after[len(before) :] if after.startswith(before) else self._decode(ids[start : k + 1]))
            start = k + 1
        return out


def show_row(row: EncodedRow, texts: TokenTexts, log_prob: np.ndarray | None = None) -> Text:
    """One row as text: what is learnt stands between ▶ and ◀, green, or by the teacher's confidence from red (0) to green (1)."""
    from rich.text import Text

    out = Text(no_wrap=False)
    supervised = row.loss_weight > 0
    out.append(f"{row.id}", style="bold")
    out.append(f"  {row.source}, {len(row.input_ids)} tokens, {int(supervised.sum())} learnt\n", style="dim")
    position, inside = 0, False
    words = texts.tokens(row.input_ids[:_LONGEST])
    for k, word in enumerate(words):
        if supervised[k] != inside:
            out.append("▶" if supervised[k] else "◀", style="bold cyan")
            inside = bool(supervised[k])
        style = "dim"
        if supervised[k]:
            style = "green"
            if log_prob is not None:
                style = _confidence_style(float(np.exp(np.float32(log_prob[position]))))
            # Neighbouring tokens are told apart.
            style += " underline" if position % 2 else ""
            position += 1
        out.append(_visible(word), style=style)
    if len(row.input_ids) > _LONGEST:
        out.append(f" … {len(row.input_ids) - _LONGEST} more tokens", style="dim")
    elif inside:
        out.append("◀", style="bold cyan")
    return out


def _confidence_style(p: float) -> str:
    red, green = round(255 * min(1.0, 2 - 2 * p)), round(200 * min(1.0, 2 * p))
    return f"rgb({red},{green},60)"


def _visible(word: str) -> str:
    """White space at a token's end and control characters made visible; line breaks stay."""
    word = word.replace("\r", "␍").replace("\t", "→\t").replace("\n", "⏎\n")
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in word)


def audit(
    folder: Path,
    show: int = 3,
    guidance: Guidance | None = None,
    test_texts: Iterable[str] | None = None,
    found: Mapping[str, Any] | None = None,
) -> Group:
    """What each operation did, ledger, lengths, stop tokens, duplicates, leaks (with `test_texts`), shares and the first `show` rows.

    `found` are the folder's `figures`, where they are known already.

    Raises:
        BadInput: the folder holds no prepared data.
    """
    from rich.console import Group
    from rich.text import Text

    folder = Path(folder)
    rows = EncodedRows.open(folder)
    totals = read_json(folder / ledger_files.FILE)
    found = figures(folder, test_texts) if found is None else found
    parts: list[Any] = [ledger_table(totals)]
    if totals.get("operations"):
        parts.append(steps_table(totals["operations"]))
        for part in totals["operations"]:
            parts += _step_lines(part, show)
    for reason, count in totals["dropped"].items():
        line = Text(f"dropped {count:,}: {reason}", style="yellow")
        for example in totals["examples"].get(reason, []):
            line.append(f"\n  {example['source']} line {example['line']}: {example['why']}", style="dim")
        parts.append(line)
    lengths, used = totals["lengths"], totals["used"]
    parts.append(Text(f"length in tokens: half of the rows up to {lengths['p50']}, 95 % up to {lengths['p95']}, longest {lengths['max']}"))
    stops = totals["ends_with_stop"]
    parts.append(Text(f"rows whose last target is a stop token: {stops:,} of {used:,}", style="" if stops == used else "red"))
    if totals["control_text"]:
        why = next(iter(totals["examples"].get("control token in the text", [])), {}).get("why", "")
        parts.append(Text(f"rows whose own text is read as a control token: {totals['control_text']:,} (e.g. {why})", style="yellow"))
    if totals["trimmed_turns"]:
        parts.append(Text(f"turns after the last answer, left out: {totals['trimmed_turns']:,}"))
    same = found["duplicates"]
    parts.append(Text(f"exact duplicates of an earlier row: {same:,}", style="yellow" if same else ""))
    if (near := found["near_duplicates"]) is not None:
        parts.append(Text(f"exact and near-duplicates of an earlier row: {near['rows']:,}", style="yellow" if near["rows"] else ""))
        parts += [Text(f"  {pair['id']} of {pair['of']}: {_one_line(pair['text'])}", style="dim") for pair in near["examples"]]
    if (leaky := found.get("leaks")) is not None:
        parts.append(Text(f"rows with a prompt of the test set: {leaky['rows']:,}", style="red" if leaky["rows"] else ""))
        parts += [Text(f"  {leak['id']}: {_one_line(leak['text'])}", style="dim") for leak in leaky["examples"]]
    parts += _share_lines(found)
    parts += [Text(f"note: {note}") for note in totals.get("template", {}).get("notes", [])]
    texts = TokenTexts(folder) if show else None
    for k in range(min(show, len(rows))):
        parts += [Text(""), show_row(rows[k], texts, guidance.row(k) if guidance is not None else None)]
    return Group(*parts)


def steps_table(operations: Sequence[Mapping[str, Any]]) -> Table:
    """Rows before and after each operation, in order."""
    from rich.table import Table

    table = Table(title="operations", title_justify="left")
    table.add_column("operation")
    for name in ("rows in", "made", "dropped", "rows out"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for part in operations:
        why = ", ".join(f"{n:,} {reason}" for reason, n in part["dropped"].items())
        numbers = (part["in"], part["made"], sum(part["dropped"].values()), part["out"])
        table.add_row(part["method"], *(f"{n:,}" for n in numbers), why)
    return table


def _step_lines(part: Mapping[str, Any], show: int) -> list[Text]:
    """The figures that an operation noted, and what it did to its first rows."""
    from rich.text import Text

    lines = []
    for name, value in part["facts"].items():
        if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
            lines.append(Text(f"{part['method']}: {name}"))
            lines += [Text(f"  {key}: {_facts(inner)}", style="dim") for key, inner in list(value.items())[:_MEMBERS]]
            if len(value) > _MEMBERS:
                lines.append(Text(f"  and {len(value) - _MEMBERS} more, in ledger.json", style="dim"))
        elif value not in ({}, [], None):
            lines.append(Text(f"{part['method']}: {name}: {_facts(value)}"))
    for example in part["examples"][: min(show, 1)]:
        lines.append(Text(f"{part['method']}: row {example['id']}"))
        for what in ("before", "after"):
            turns = " ‖ ".join(f"{role}: {_one_line(text)}" for role, text in example[what]) or "(no conversation yet)"
            lines.append(Text(f"  {what}: {turns}", style="dim"))
    return lines


def _facts(value: Any) -> str:
    """Figures in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_facts(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(_facts(part) for part in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _one_line(text: str, longest: int = 100) -> str:
    text = _visible(" ".join(text.split()))
    return text if len(text) <= longest else f"{text[:longest]}…"


def _share_lines(found: Mapping[str, Any]) -> list[Text]:
    """Labels, languages, columns and diversity."""
    from rich.text import Text

    def said(shares: Mapping[str, float]) -> str:
        shown = [f"{name} {100 * share:.3g} %" for name, share in list(shares.items())[:_MEMBERS]]
        return ", ".join(shown) + (f" and {len(shares) - _MEMBERS} more" if len(shares) > _MEMBERS else "")

    lines = []
    for source, part in found["labels"].items():
        uneven = part["balance"] < _UNEVEN
        counts = ", ".join(f"{_one_line(label, 20)} {n:,}" for label, n in part["counts"].items())
        text = f"labels of {source}: {part['labels']} ({counts}); balance {part['balance']:.2f} of 1"
        lines.append(Text(f"{text}: very uneven" if uneven else text, style="yellow" if uneven else ""))
    lines += [Text(f"{name}: {said(shares)}") for name, shares in found["columns"].items()]
    if found["languages"]:
        lines.append(Text(f"languages: {said(found['languages'])}"))
    diversity = found["diversity"]
    shown = ", ".join(f"{name} {value:.2f}" for name, value in diversity.items() if isinstance(value, float))
    if shown:
        lines.append(Text(f"diversity of {diversity['of_rows']:,} rows: {shown}"))
    return lines


def ledger_table(totals: dict[str, Any]) -> Table:
    """Read, made, used, cut and dropped rows of each source."""
    from rich.table import Table

    made = totals.get("made", 0)

    table = Table(title="rows", title_justify="left")
    table.add_column("source")
    for name in ("read", *(["made"] if made else []), "used", "of which cut", "dropped", "tokens", "learnt"):
        table.add_column(name, justify="right")
    sources = totals["sources"]
    for name, tally in [*sources.items(), *([("all", totals)] if len(sources) > 1 else [])]:
        numbers = [tally["read"], tally["used"], tally["cut"], sum(tally["dropped"].values()), tally["tokens"], tally["supervised_tokens"]]
        table.add_row(name, *(f"{n:,}" for n in [*numbers[:1], *([tally["made"]] if made else []), *numbers[1:]]))
    return table


def export(folder: Path, path: Path, guidance: Guidance | None = None) -> int:
    """`export_rows` with the tokenizer that is kept beside the rows."""
    return export_rows(folder, folder, path, guidance)


def export_rows(folder: Path, tokenizer: Any, path: Path, guidance: Guidance | None = None) -> int:
    """Write one JSON object per row and return their number.

    Keys: `id`, `source`, `input_ids`, `loss_weight` (equal lengths), `pieces` [{"text", "supervised"}] and, with guidance,
    `log_prob` of the supervised tokens in order.
    """
    rows, texts = EncodedRows.open(Path(folder)), TokenTexts(tokenizer)
    if guidance is not None and len(guidance) != len(rows):
        raise BadInput(f"the guidance holds {len(guidance)} rows, {folder} {len(rows)}: they do not belong together")
    with atomic_lines(Path(path)) as write:
        for k, row in enumerate(rows):
            values: dict[str, Any] = {
                "id": row.id,
                "source": row.source,
                "input_ids": row.input_ids.tolist(),
                "loss_weight": row.loss_weight.tolist(),
                "pieces": [
                    {"text": texts.text(row.input_ids[a:b]), "supervised": supervised} for a, b, supervised in _stretches(row.loss_weight)
                ],
            }
            if guidance is not None:
                values["log_prob"] = [round(float(v), 6) for v in guidance.row(k)]
            write(json.dumps(values, ensure_ascii=False))
    return len(rows)


def _stretches(loss_weight: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """(start, end, supervised) of the runs of equal supervision."""
    supervised = loss_weight > 0
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(supervised)]
    for a, b in zip(edges, edges[1:], strict=False):
        if b > a:
            yield a, b, bool(supervised[a])

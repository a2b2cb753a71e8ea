"""Build what the measurements read: rows, tokenizer, base and teacher of a shape, kept in a folder."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import data
from shapes import SHAPES, Shape

VERSION = 1  # raise it when the same arguments give other rows or weights


def build_rows(shape: Shape, folder: Path, source: Path | None, rows: int, seed: int) -> dict[str, Any]:
    """Make `folder`/rows (encoded rows and their tokenizer) unless it is there; returns the statistics of the rows.

    Raises:
        BadInput: the rows of `source` cannot be read.
    """
    from guidetune.artefacts import stage
    from guidetune.data.rows import EncodedRows

    def build(work: Path) -> dict[str, Any]:
        pairs = data.read(source, rows) if source else data.generate(rows, seed)
        tokenizer = data.build_tokenizer(pairs, shape.vocab)
        tokenizer.save_pretrained(work)
        data.encode(pairs, tokenizer, work)
        encoded = EncodedRows.open(work)
        return {**data.statistics(encoded.lengths, encoded.supervised), "vocabulary_used": len(tokenizer)}

    key = {"source": str(source), "rows": rows, "seed": seed, "vocab": shape.vocab, "version": VERSION}
    return stage(folder / "rows", key, build).result


def build_models(shape: Shape, folder: Path, seed: int) -> None:
    """Make `folder`/base and `folder`/teacher, random weights of different seeds, unless they are there."""
    from guidetune.artefacts import stage

    def build(work: Path, number: int) -> dict[str, Any]:
        shape.save(work, 2 * seed + number)
        return {}

    for number, role in enumerate(("base", "teacher")):
        key = {"shape": shape.__dict__, "seed": seed, "number": number, "version": VERSION}
        stage(folder / role, key, partial(build, number=number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-only", action="store_true", help="no models")
    given = parser.parse_args()
    from guidetune.errors import BadInput

    shape = SHAPES[given.shape]
    try:
        found = build_rows(shape, given.folder, given.data, given.rows, given.seed)
        if not given.rows_only:
            build_models(shape, given.folder, given.seed)
    except BadInput as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

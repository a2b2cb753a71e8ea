"""Build what the measurements read: rows, tokenizer, base and teacher of a shape, kept in a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import data
from shapes import SHAPES, Shape


def prepare(shape: Shape, folder: Path, source: Path | None, rows: int, seed: int) -> dict[str, Any]:
    """Make `base`, `teacher` and `rows` in `folder` unless they are there; returns the statistics of the rows.

    Raises:
        BadInput: the rows of `source` cannot be read.
    """
    from guidetune.artefacts import stage
    from guidetune.data.rows import EncodedRows

    def write_rows(work: Path) -> dict[str, Any]:
        pairs = data.read(source, rows) if source else data.generate(rows, seed)
        tokenizer = data.build_tokenizer(pairs, shape.vocab)
        tokenizer.save_pretrained(work)
        data.encode(pairs, tokenizer, work)
        encoded = EncodedRows.open(work)
        return {**data.statistics(encoded.lengths, encoded.supervised), "vocabulary_used": len(tokenizer)}

    def write_model(work: Path, seed: int) -> dict[str, Any]:
        shape.save(work, seed)
        return {}

    made = stage(folder / "rows", {"source": str(source), "rows": rows, "seed": seed, "vocab": shape.vocab, "version": 1}, write_rows)
    for number, role in enumerate(("base", "teacher")):
        key = {"shape": shape.__dict__, "seed": seed, "number": number}
        stage(folder / role, key, lambda work, number=number: write_model(work, 2 * seed + number))
    return made.result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from guidetune.errors import BadInput

    try:
        print(json.dumps(prepare(SHAPES[given.shape], given.folder, given.data, given.rows, given.seed)))
    except BadInput as error:
        print(json.dumps({"error": str(error)}))

"""The world as ordinary files: model folders and task sets in JSON lines."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

from guidetune.artefacts import fingerprint, write_text_atomic
from guidetune.errors import BadInput
from guidetune.world.corpus import BY_NAME
from guidetune.world.items import Item, Skill, distinct
from guidetune.world.targets import ROWS, TARGETS

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("base", "instruct")
GENERAL_ROWS = {"train": 2000, "test": 480}
SKILL_ROWS = {"train": 500, "test": 100}


def path(name: str) -> Path:
    """The folder of the shipped `base` or `instruct` model."""
    if name not in MODELS:
        raise BadInput(f"the embedded world has no model {name!r}; it has {' and '.join(MODELS)}")
    folder = WEIGHTS / name
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} holds no model; run `guidetune world build` to make the pair again")
    return folder


def _skills() -> dict[str, Skill]:
    return {**BY_NAME, **{skill.name: skill for skill in TARGETS}}


def sets() -> dict[str, str]:
    """Name -> description of every item set: the general skills, their balanced mixture `general`, and the target tasks."""
    return {
        **{name: skill.definition for name, skill in BY_NAME.items()},
        "general": f"All {len(BY_NAME)} general skills in equal parts.",
        **{skill.name: skill.definition for skill in TARGETS},
    }


@cache
def _cached(name: str, split: str, count: int, seed: int) -> tuple[Item, ...]:
    if name != "general":
        return tuple(distinct(_skills()[name], split, count, seed))
    share = -(-count // len(BY_NAME))
    columns = [_cached(skill, split, share, seed) for skill in BY_NAME]
    mixed = [column[i] for i in range(share) for column in columns if i < len(column)]
    return tuple(mixed[:count])


def items(name: str, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
    """`n` distinct items of a set (see `sets`), training or test split; `n=None` gives the set's usual size."""
    if name not in sets():
        from difflib import get_close_matches

        near = get_close_matches(name, sets(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sets())}"
        raise BadInput(f"the embedded world has no set {name!r}; {hint}")
    if n is None:
        usual = {"general": GENERAL_ROWS} | ROWS
        n = usual.get(name, SKILL_ROWS).get(split, 0)
    return list(_cached(name, split, n, seed))


def row(item: Item) -> dict[str, object]:
    """An item as the plain record that `export` writes and `grade` reads."""
    return {
        "id": item.id,
        "prompt": item.prompt,
        "answer": item.answer,
        "messages": item.messages,
        "gold": item.gold,
        "check": item.check,
        "skill": item.skill,
        "category": item.category,
        "difficulty": item.difficulty,
        "meta": item.meta,
    }


def export(folder: str | Path) -> dict[str, Path]:
    """Write `base/` and `instruct/` as ordinary model folders and every target and general set as `<set>.<split>.jsonl`."""
    folder = Path(folder)
    written = {}
    for name in MODELS:
        shutil.copytree(path(name), folder / name, dirs_exist_ok=True)
        written[name] = folder / name
    return written | export_rows(folder)


def export_rows(folder: str | Path) -> dict[str, Path]:
    """The rows of `export` alone."""
    folder = Path(folder)
    written = {}
    for name in (*(skill.name for skill in TARGETS), "general"):
        for split in ("train", "test"):
            written[f"{name}.{split}"] = folder / f"{name}.{split}.jsonl"
            write_text_atomic(written[f"{name}.{split}"], _lines(name, split))
    return written


def _lines(name: str, split: str) -> str:
    return "".join(json.dumps(row(item), ensure_ascii=False) + "\n" for item in items(name, split))


def rows_file(name: str, split: str = "train") -> Path:
    """A file with the rows of a set, in the user's cache: what a recipe's `path: world:arithmetic` stands for.

    Raises:
        BadInput: there is no such set, or it has no such rows.
    """
    from guidetune.models.fingerprints import cache_folder

    text = _lines(name, split)
    if not text:
        raise BadInput(f"the world's set {name!r} has no {split} rows")
    file = cache_folder() / "world" / f"{fingerprint(text)[:16]}.{name}.{split}.jsonl"
    if not file.is_file():
        write_text_atomic(file, text)
    return file


def describe() -> dict[str, object]:
    """What the world holds: sets with category and definition, and the published report of the shipped pair, if built."""
    from guidetune.artefacts import read_json

    report = WEIGHTS / "report.json"
    return {
        "sets": {name: {"category": skill.category, "definition": skill.definition} for name, skill in _skills().items()},
        "report": read_json(report) if report.exists() else None,
    }

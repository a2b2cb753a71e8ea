"""The world as ordinary files: model folders and task sets in JSON lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from guidetune.artefacts import fingerprint, write_text_atomic
from guidetune.errors import BadInput
from guidetune.world.corpus import BY_NAME
from guidetune.world.generators import graded, languages, passages, programs, tasks
from guidetune.world.items import Item, Skill, distinct
from guidetune.world.pairs import MODELS, pair
from guidetune.world.targets import ROWS, TARGETS

WEIGHTS = Path(__file__).parent / "weights"
GENERAL_ROWS = {"train": 2000, "test": 480}
SKILL_ROWS = {"train": 500, "test": 100}
DATA_SIDE = (languages, passages, graded, tasks, programs)
"""Generators for the data-side systems: what they draw is in neither corpus nor instruct set of the first pair."""

MIXTURES: dict[str, list[str]] = {
    "general": list(BY_NAME),
    **{name: skills for module in (languages, tasks) for name, skills in module.MIXTURES.items()},
}
"""Mixture -> the skills it holds in equal parts."""

USUAL_ROWS = {"general": GENERAL_ROWS} | ROWS | {name: rows for module in DATA_SIDE for name, rows in module.ROWS.items()}


def path(name: str) -> Path:
    """The folder of a shipped model, such as `base` or `instruct`."""
    if name not in MODELS:
        raise BadInput(f"the embedded world has no model {name!r}; it has {', '.join(MODELS)}")
    folder = WEIGHTS / name
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} holds no model; run `guidetune world build --pair NAME` to make its pair again")
    return folder


def _skills() -> dict[str, Skill]:
    return {**BY_NAME, **{skill.name: skill for skill in (*TARGETS, *(skill for module in DATA_SIDE for skill in module.SKILLS))}}


def sets() -> dict[str, str]:
    """Name -> description of every item set: the general skills, the targets, the data-side sets, and the balanced mixtures."""
    return {
        **{name: skill.definition for name, skill in _skills().items()},
        **{name: f"{len(skills)} skills in equal parts: {skills[0]} to {skills[-1]}." for name, skills in MIXTURES.items()},
    }


@cache
def _cached(name: str, split: str, count: int, seed: int) -> tuple[Item, ...]:
    if name not in MIXTURES:
        return tuple(distinct(_skills()[name], split, count, seed))
    skills = MIXTURES[name]
    share = -(-count // len(skills))
    columns = [_cached(skill, split, share, seed) for skill in skills]
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
        n = USUAL_ROWS.get(name, SKILL_ROWS).get(split, 0)
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
        **item.columns,
    }


def export(folder: str | Path) -> dict[str, Path]:
    """Write models as ordinary folders, the sets of `USUAL_ROWS` as `<set>.<split>.jsonl`, and the files of `export_tasks`."""
    folder = Path(folder)
    written = {}
    for name in MODELS:
        if (WEIGHTS / name).is_dir():  # a pair that is only described is exported once it is built
            shutil.copytree(path(name), folder / name, dirs_exist_ok=True)
            written[name] = folder / name
    return written | export_rows(folder) | export_tasks(folder)


def export_rows(folder: str | Path) -> dict[str, Path]:
    """The rows of `export` alone."""
    folder = Path(folder)
    written = {}
    for name in USUAL_ROWS:
        for split in ("train", "test"):
            written[f"{name}.{split}"] = folder / f"{name}.{split}.jsonl"
            write_text_atomic(written[f"{name}.{split}"], _lines(name, split))
    return written


def export_tasks(folder: str | Path, names: Iterable[str] = tuple(tasks.TASKS)) -> dict[str, Path]:
    """Super-NaturalInstructions' own layout: `tasks/<task>.json` for the tasks of `names`, and which tasks make up each split.

    A file's first 100 instances are the test split's, as in arXiv 2306.05539, the others the training split's.
    `splits/train_tasks.txt` names the tasks that the second pair has met, `splits/test_tasks.txt` those that it has not.
    """
    folder = Path(folder)
    files = {}
    for name in names:
        task = tasks.TASKS[name]
        positive, negative = tasks.examples(name)
        content = {
            "Contributors": [],
            "Source": ["the embedded world"],
            "Categories": [task.category],
            "Definition": [task.definition],
            "Input_language": ["English"],
            "Output_language": ["English"],
            "Instruction_language": ["English"],
            "Positive Examples": positive,
            "Negative Examples": negative,
            "Instances": [
                {"id": item.id, "input": item.columns["input"], "output": item.columns["output"]}
                for split in ("test", "train")
                for item in items(name, split)
            ],
        }  # fmt: skip
        files[name] = folder / "tasks" / f"{name}.json"
        write_text_atomic(files[name], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for split in ("train", "test"):
        listed = [name for name in tasks.TASKS if tasks.met(name) == (split == "train")]
        files[f"{split} tasks"] = folder / "splits" / f"{split}_tasks.txt"
        write_text_atomic(files[f"{split} tasks"], "".join(f"{name}\n" for name in listed))
    return files


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


def describe(name: str = "general") -> dict[str, object]:
    """What the world holds: sets with category and definition, and of the pair of that name the published report, if it is built."""
    from guidetune.artefacts import read_json

    report = WEIGHTS / pair(name).report
    skills, definitions = _skills(), sets()
    return {
        "sets": {
            one: {"category": skills[one].category if one in skills else "mixture", "definition": definitions[one]} for one in definitions
        },
        "report": read_json(report) if report.exists() else None,
    }

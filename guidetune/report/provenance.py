"""What a run left on disk and what it was made from: sizes and fingerprints of its stages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidetune.artefacts import MANIFEST, finished
from guidetune.report import numbers
from guidetune.report.findings import REFERENCE, arms_of, mapping


@dataclass(frozen=True)
class Stage:
    """One finished artefact folder: what it is, the fingerprint of everything it was made from, seconds and bytes."""

    path: str
    stage: str
    fingerprint: str
    seconds: float | None
    bytes: int


def size(path: Path) -> int:
    """Bytes of all files below `path` but the report; a file with several names counts once, links to elsewhere do not count."""
    total, seen = 0, set()
    for folder, _, files in os.walk(path):
        for name in files:
            if name == "report.html":  # else no two pages of a run were the same
                continue
            try:
                facts = os.stat(Path(folder) / name, follow_symlinks=False)
            except OSError:
                continue
            if (facts.st_dev, facts.st_ino) not in seen:
                seen.add((facts.st_dev, facts.st_ino))
                total += facts.st_size
    return total


def disk_of(run: Path, name: str, arm: Mapping[str, Any], kind: Any) -> int | None:
    """Bytes of an arm's folder; of `run`, which keeps its one arm at the top, of the folders the arm names."""
    own = run / "arms" / name
    if own.is_dir():
        return size(own)
    if kind == "run" and name != REFERENCE:
        known = [run / value for key, value in mapping(arm.get("paths")).items() if isinstance(value, str) and (run / value).exists()]
        return sum(size(path) if path.is_dir() else path.stat().st_size for path in known) or None
    return None


def stages(run: Path) -> list[Stage]:
    """Every finished stage below the run folder in the order of the pipeline; of repeats with other seeds, none."""
    found = []
    for path in sorted(run.glob(f"**/{MANIFEST}")):
        manifest = finished(path.parent)
        if manifest is None or any(part.startswith(".") or part == "seeds" for part in path.relative_to(run).parts):
            continue
        key = mapping(manifest.get("key"))
        stage = str(key.get("stage") or ("transfer" if "transfer" in key else path.parent.name))
        print_ = str(manifest.get("fingerprint") or "")
        if print_:
            seconds = numbers.finite(manifest.get("seconds"))
            found.append(Stage(path.parent.relative_to(run).as_posix(), stage, print_, seconds, size(path.parent)))
    order = {name: place for place, name in enumerate(("prepare", "guide", "tune", "transfer", "evaluate"))}
    return sorted(found, key=lambda one: (order.get(one.stage, 9), one.path))


def fingerprints(run: Path, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, fingerprint): the evaluated model of every arm, the guidance and the rows."""
    found = [(f"model of arm {name}", str(arm["fingerprint"])) for name, arm in arms_of(results).items() if arm.get("fingerprint")]
    for folder in sorted((run / "guidance").glob("*")):
        key = mapping((finished(folder) or {}).get("key"))
        found += [
            (f"{what} of the guidance {folder.name}", str(key[part]))
            for what, part in (("teacher", "teacher"), ("rows", "rows"))
            if key.get(part)
        ]
    return found

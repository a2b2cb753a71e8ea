"""The index of runs: what was run on this machine, where, and how it ended.

Every run folder says itself what it is (`run.json`, `recipe.yaml`, `results.json`). The index is a SQLite file that remembers where the
folders are and what stood in them, so that listing hundreds of runs is quick; it is a cache, made again from the folders when it is
lost or broken, and a run never fails because of it. It lies in the user's data folder, or in `GUIDETUNE_HOME`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from guidetune.artefacts import finished, leaves, read_json, write_json
from guidetune.errors import BadInput
from guidetune.progress import say
from guidetune.registry import nearest

HOME = "GUIDETUNE_HOME"
MARK = "run.json"
STATES = ("running", "ok", "failed", "interrupted", "unknown", "gone")
SORTS = ("started", "seconds", "name", "kind", "status", "task", "general", "folder")
VERSION = 1  # of the table: an index of another version is made again
WAIT = 10.0  # seconds that a process waits for another to finish writing
CLOCK = 5.0  # seconds by which two readings of a process's start may differ
DEEPEST = 6  # levels below a folder at which `scan` stops looking
# What a run writes into its folder, besides stages, which are known by their manifests. `delete` leaves everything else.
OWN_FILES = frozenset({MARK, "recipe.yaml", "results.json", "report.html", "metrics.jsonl", ".pair.json"})
OWN_FOLDERS = frozenset({"tracking"})

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One run folder. Times are seconds since the epoch; `arms` has the mean score of each arm on the task and in general."""

    folder: str
    kind: str
    name: str
    status: str
    started: float | None = None
    seconds: float | None = None
    error: str | None = None
    base: str | None = None
    instruct: str | None = None
    arms: dict[str, dict[str, float | None]] | None = None
    stamp: str = ""  # changes when the files do

    @property
    def id(self) -> str:
        """Eight hex digits that name the folder."""
        return hashlib.sha256(self.folder.encode(errors="surrogateescape")).hexdigest()[:8]

    @property
    def best(self) -> str | None:
        """The arm with the highest task score; of several, not the untouched model."""
        known = {name: arm for name, arm in (self.arms or {}).items() if arm.get("task") is not None}
        tuned = {name: arm for name, arm in known.items() if name != "instruct"} or known
        return max(tuned, key=lambda name: tuned[name]["task"] or 0.0) if tuned else None

    def score(self, group: str) -> float | None:
        """The best arm's mean score of a group."""
        return (self.arms or {}).get(self.best or "", {}).get(group)


# ---------------------------------------------------------------------------------------------------------------------
# A run tells of itself


def started(folder: Path, kind: str, name: str) -> None:
    """Note in the folder, and in the index, that this process has begun a run there. Never fails."""

    def note() -> None:
        mark = _mark(folder)
        if _state(mark) == "running" and mark.get("pid") != os.getpid():
            say(f"warning: process {mark.get('pid')} is at work in {folder} too; two runs in one folder spoil each other")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "process_started": _process_start(os.getpid())}
        write_json(folder / MARK, {"kind": kind, "name": name, "status": "running", "started": time.time(), **me})
        remember(folder)

    _gently(note)


def ended(folder: Path, error: BaseException | None = None) -> None:
    """Note how the run that this process began has ended; nothing when it began none there. Never fails."""

    def note() -> None:
        mark = _mark(folder)
        if _state(mark) != "running" or mark.get("pid") != os.getpid() or mark.get("host") != socket.gethostname():
            return  # not this process's run
        status = "ok" if error is None else "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
        text = None if error is None else (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
        write_json(folder / MARK, {**mark, "status": status, "ended": time.time(), "error": text})
        remember(folder)

    _gently(note, level=1)  # `started` has said it


def _gently(work: Callable[[], None], level: int = 0) -> None:
    try:
        work()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        say(f"note: this run could not be entered in the index of runs ({reason}); `guidetune runs scan DIR` finds it later", level)


def remember(folder: Path) -> None:
    """Enter a run folder in the index, or bring its entry up to date."""
    run = describe(folder)
    if run is not None:
        _note_place(Path(run.folder).parent)
        _with_index(lambda index: _enter(index, run))


# ---------------------------------------------------------------------------------------------------------------------
# What a folder says


def describe(folder: Path) -> Run | None:
    """The run in a folder, from its own files alone; None when it is no run folder."""
    folder = Path(os.path.abspath(folder))
    mark, results = _mark(folder), _json(folder / "results.json")
    arms = results.get("arms")
    evaluated = isinstance(results.get("tasks"), dict) and "model" in results
    if not mark and not (isinstance(arms, dict) and "recipe" in results) and not evaluated:
        # begun by a version that left no mark, and never finished
        if not ((folder / "recipe.yaml").is_file() and (folder / ".pair.json").is_file()):
            return None
    recipe = results.get("recipe") if isinstance(results.get("recipe"), dict) else _recipe(folder)
    models = recipe.get("models") if isinstance(recipe.get("models"), dict) else results.get("models")
    models = models if isinstance(models, dict) else {}
    kind = mark.get("kind") or results.get("kind") or ("eval" if evaluated else "run")
    started, seconds = mark.get("started"), None
    if isinstance(mark.get("ended"), (int, float)) and isinstance(started, (int, float)):
        seconds = mark["ended"] - started
    if started is None:
        started = _time(results.get("created")) or _changed(folder / "results.json") or _changed(folder / "recipe.yaml")
        seconds = results.get("seconds") if isinstance(results.get("seconds"), (int, float)) else None
    status = _state(mark)
    if not mark:
        states = [arm.get("status") for arm in arms.values() if isinstance(arm, dict)] if isinstance(arms, dict) else []
        status = "failed" if "failed" in states else "ok" if states or evaluated else "unknown"
    return Run(
        folder=str(folder),
        kind=str(kind),
        name=str(mark.get("name") or results.get("name") or recipe.get("name") or folder.name),
        status=status,
        started=started,
        seconds=seconds,
        error=mark.get("error"),
        base=models.get("base"),
        instruct=results.get("model") if evaluated else models.get("instruct"),
        arms=_means(results),
        stamp=_stamp(folder),
    )


def _means(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for arm, groups in scores(results).items():
        entry = results.get("arms", {}).get(arm, {})
        found[arm] = {}
        for group in ("task", "general"):
            tasks = [one for one in groups.get(group, {}).values() if one.get("score") is not None and one.get("higher_is_better", True)]
            mean = sum(one["score"] for one in tasks) / len(tasks) if tasks else None
            found[arm][group] = entry.get(f"{group}_mean", mean)
    return found


def scores(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{arm: {group: {task: TaskResult}}} of any results file; the model of an `eval` is one arm called `model`."""
    if isinstance(results.get("tasks"), dict):
        return {"model": {"task": results["tasks"]}}
    arms = results.get("arms")
    arms = {name: arm for name, arm in arms.items() if isinstance(arm, dict)} if isinstance(arms, dict) else {}
    return {
        name: {group: arm[group] if isinstance(arm.get(group), dict) else {} for group in ("task", "general")} for name, arm in arms.items()
    }


def _state(mark: Mapping[str, Any]) -> str:
    """`running` only while the process that said so is alive; a killed one is `interrupted`."""
    status = mark.get("status")
    if status != "running":
        return status if status in STATES else "unknown"
    if mark.get("host") != socket.gethostname():
        return "running"  # nothing can be known of another machine's processes
    began = _process_start(mark.get("pid"))
    noted = mark.get("process_started")
    if began is None or (isinstance(noted, (int, float)) and abs(began - noted) > CLOCK):
        return "interrupted"  # gone, or its number was given to another process
    return "running"


def _process_start(pid: Any) -> float | None:
    """When the process with this number began, or None when there is none (a zombie has ended)."""
    import psutil

    try:
        process = psutil.Process(int(pid))
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _mark(folder: Path) -> dict[str, Any]:
    mark = _json(Path(folder) / MARK)
    return mark if "status" in mark and "kind" in mark else {}


def _recipe(folder: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _time(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _stamp(folder: Path) -> str:
    parts = []
    for name in (MARK, "results.json", "recipe.yaml"):
        try:
            stat = (folder / name).stat()
            parts.append(f"{stat.st_mtime_ns}:{stat.st_size}")
        except OSError:
            parts.append("-")
    return " ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The index file


def home() -> Path:
    """Where the index is kept: `GUIDETUNE_HOME`, or the user's data folder for guidetune."""
    if os.environ.get(HOME):
        return Path(os.environ[HOME]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "guidetune"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "guidetune"
    given = os.environ.get("XDG_DATA_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".local" / "share") / "guidetune"


def _file() -> Path:
    return home() / "runs.sqlite"


@contextmanager
def _index() -> Iterator[sqlite3.Connection]:
    home().mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(_file(), timeout=WAIT, isolation_level=None)) as index:
        index.execute("PRAGMA journal_mode=WAL").fetchone()  # readers do not wait for writers; disks that cannot do it keep their mode
        index.execute("PRAGMA synchronous=NORMAL")
        if index.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            _make(index)
        yield index


def _make(index: sqlite3.Connection) -> None:
    """A new index, from the folders in which runs have been seen."""
    index.execute("BEGIN IMMEDIATE")  # of several processes one makes it, and the others find it made
    try:
        if index.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            index.execute("DROP TABLE IF EXISTS runs")
            index.execute("CREATE TABLE runs (folder TEXT PRIMARY KEY, stamp TEXT NOT NULL, run TEXT NOT NULL)")
            for place in _places():
                for folder in find(place, 1):
                    if (run := describe(folder)) is not None:
                        _enter(index, run)
            index.execute(f"PRAGMA user_version={VERSION}")
        index.execute("COMMIT")
    except BaseException:
        index.execute("ROLLBACK")
        raise


def _with_index(work: Callable[[sqlite3.Connection], Result]) -> Result:
    """`work` on the index; a broken file is put aside and made again from the folders."""
    try:
        with _index() as index:
            return work(index)
    except sqlite3.OperationalError:
        raise  # busy, read-only, full: not the file's fault
    except sqlite3.DatabaseError as error:
        say(f"note: the index of runs is broken ({error}) and is made again from the run folders; the old one is kept as *.broken")
    for suffix in ("", "-wal", "-shm"):
        part = _file().with_name(_file().name + suffix)
        try:
            os.replace(part, part.with_name(part.name + ".broken"))
        except FileNotFoundError:
            continue  # another process was faster
    with _index() as index:
        return work(index)


def _enter(index: sqlite3.Connection, run: Run) -> None:
    index.execute(
        "INSERT INTO runs VALUES (?, ?, ?) ON CONFLICT(folder) DO UPDATE SET stamp = excluded.stamp, run = excluded.run",
        (run.folder, run.stamp, json.dumps(asdict(run))),
    )


def _places() -> list[Path]:
    """Folders in which runs have been seen: kept as plain text beside the index, so that it can be made again."""
    try:
        lines = (home() / "places.txt").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [Path(line) for line in dict.fromkeys(lines) if line]


def _note_place(place: Path) -> None:
    if place not in _places() and "\n" not in str(place):
        home().mkdir(parents=True, exist_ok=True)
        with open(home() / "places.txt", "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{place}\n")  # one short write: lines of several processes do not mix


def _row(text: str) -> Run | None:
    try:
        row = json.loads(text)
        return Run(**{field.name: row[field.name] for field in fields(Run)})
    except (ValueError, KeyError, TypeError):
        return None


def every() -> list[Run]:
    """All runs of the index, each as its folder stands now: changed folders are read again, vanished ones are `gone`.

    Where the index can be neither read nor made, the folders in which runs have been seen are looked through instead, and `runs`.
    """

    def read(index: sqlite3.Connection) -> list[Run]:
        found = []
        for folder, stamp, text in index.execute("SELECT folder, stamp, run FROM runs").fetchall():
            known = _row(text)
            if known is None or known.status == "running" or stamp != _stamp(Path(folder)):
                now = describe(Path(folder))
                if now is not None:
                    try:
                        _enter(index, now)
                    except sqlite3.OperationalError:
                        pass  # read-only or busy: only a cache
                elif known is not None:
                    now = Run(**{**asdict(known), "status": "gone"})
                known = now
            if known is not None:
                found.append(known)
        return found

    try:
        return _with_index(read)
    except (sqlite3.Error, OSError) as error:
        say(f"note: the index of runs cannot be used ({error}); its folders are looked through instead")
    folders = dict.fromkeys(folder for place in [*_places(), Path("runs")] for folder in find(place, 1))
    return [run for folder in folders if (run := describe(folder)) is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Finding runs


def find(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Run folders at or below a folder, at most `depth` levels down; links are not followed and runs not searched."""
    folder = Path(os.path.abspath(folder))
    if describe(folder) is not None:
        yield folder
        return
    if depth < 1:
        return
    try:
        below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."))
    except OSError:
        return
    for path in below:
        yield from find(Path(path), depth - 1)


def scan(folders: Sequence[Path]) -> list[Run]:
    """Enter every run folder below these folders in the index, and forget entries whose folders are gone.

    Raises:
        BadInput: a folder that is not there, or an index that cannot be written.
    """
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise BadInput([f"runs scan: there is no folder {folder}" for folder in missing])
    found = [run for folder in folders for path in find(folder) if (run := describe(path)) is not None]

    def enter(index: sqlite3.Connection) -> None:
        for run in found:
            _note_place(Path(run.folder).parent)
            _enter(index, run)
        gone = [folder for (folder,) in index.execute("SELECT folder FROM runs").fetchall() if describe(Path(folder)) is None]
        index.executemany("DELETE FROM runs WHERE folder = ?", [(folder,) for folder in gone])

    try:
        _with_index(enter)
    except (sqlite3.Error, OSError) as error:
        raise BadInput(f"the index of runs {_file()} cannot be written: {error}; set {HOME} to a folder that can be") from None
    return found


def select(
    runs: Sequence[Run],
    *,
    status: Sequence[str] = (),
    kind: Sequence[str] = (),
    name: str | None = None,
    model: str | None = None,
    arm: str | None = None,
    since: str | None = None,
    sort: str = "started",
    reverse: bool = False,
    limit: int | None = None,
) -> list[Run]:
    """The runs that fit all filters, newest, longest and best first, texts in their order.

    `name` is a pattern with `*` and `?`, `model` a part of a model's name, `since` a date or a number of days such as `7d`.

    Raises:
        BadInput: an unknown status or order, or a date that is none.
    """
    from fnmatch import fnmatch

    problems = [f"runs --status: unknown status {one!r}{nearest(one, list(STATES))}" for one in status if one not in STATES]
    if sort not in SORTS:
        problems.append(f"runs --sort: unknown order {sort!r}{nearest(sort, list(SORTS))}")
    after = None
    if since is not None:
        try:
            after = time.time() - 86400 * float(since[:-1]) if since.endswith("d") else datetime.fromisoformat(since).timestamp()
        except (ValueError, OverflowError, OSError):
            problems.append(f"runs --since: {since!r} is neither a date like 2026-11-20 nor a number of days like 7d")
    if problems:
        raise BadInput(problems)

    def fits(run: Run) -> bool:
        return (
            (not status or run.status in status)
            and (not kind or run.kind in kind)
            and (name is None or fnmatch(run.name, name))
            and (model is None or any(model in part for part in (run.base, run.instruct) if part))
            and (arm is None or arm in (run.arms or {}))
            and (after is None or (run.started or 0.0) >= after)
        )

    def key(run: Run) -> Any:
        if sort in ("task", "general"):
            value = run.score(sort)
            return value if value is not None else float("-inf")
        value = getattr(run, sort)
        return (value or 0.0) if sort in ("started", "seconds") else value

    found = sorted(filter(fits, runs), key=lambda run: run.started or 0.0, reverse=True)
    descending = sort in ("started", "seconds", "task", "general")
    found.sort(key=key, reverse=descending != reverse)
    return found[:limit]


def pick(reference: str) -> Run:
    """The run that a user names: its folder, its id (or the beginning of it), or its name where only one has it.

    Raises:
        BadInput: there is none, or there are several.
    """
    if (run := describe(Path(reference))) is not None:
        return run
    known = every()
    found = [run for run in known if reference in (run.id, run.folder)] or [run for run in known if run.name == reference]
    if not found and len(reference) >= 3:
        found = [run for run in known if run.id.startswith(reference)]
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput([f"{len(found)} runs are called {reference}; name one by its id:", *(f"  {run.id}  {run.folder}" for run in found)])
    if Path(reference).is_dir():
        raise BadInput(f"{reference} is not a run folder; `guidetune runs scan {reference}` looks for runs below it")
    names = list(dict.fromkeys([run.name for run in known]))[:50]
    raise BadInput(f"no run {reference!r}{nearest(reference, names) if names else '; the index is empty: guidetune runs scan DIR'}")


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


@dataclass(frozen=True)
class Pair:
    """One task of one arm in two runs. `test` is `statistics.paired` (a minus b) where both answered the same items, else `why` not."""

    arms: tuple[str, str]
    group: str
    task: str
    a: dict[str, Any] | None
    b: dict[str, Any] | None
    test: dict[str, Any] | None = None
    why: str = ""


@dataclass(frozen=True)
class Difference:
    """`keys`: (dotted key of the recipe, value in a, value in b), only those that differ; a missing one is `...`."""

    a: Run
    b: Run
    keys: list[tuple[str, Any, Any]]
    pairs: list[Pair]


def diff(a: Run, b: Run, arms: tuple[str, str] | None = None) -> Difference:
    """What differs between two runs: keys of their recipes, and results of the arms that both have (or of the two named).

    Raises:
        BadInput: an arm that a run does not have.
    """
    results = [_json(Path(run.folder) / "results.json") for run in (a, b)]
    trees = [
        dict(leaves(found.get("recipe") if isinstance(found.get("recipe"), dict) else _recipe(Path(run.folder))))
        for run, found in zip((a, b), results, strict=True)
    ]
    keys = [
        (key, trees[0].get(key, ...), trees[1].get(key, ...))
        for key in dict.fromkeys([*trees[0], *trees[1]])
        if trees[0].get(key, ...) != trees[1].get(key, ...)
    ]
    left, right = (scores(found) for found in results)
    if arms is not None:
        problems = [
            f"runs diff: {run.name} has no arm {arm!r}{nearest(arm, list(there))}"
            for run, arm, there in zip((a, b), arms, (left, right), strict=True)
            if arm not in there
        ]
        if problems:
            raise BadInput(problems)
        couples = [arms]
    else:
        couples = [(name, name) for name in left if name in right]
        alone = [[name for name in side if name not in other and name != "instruct"] for side, other in ((left, right), (right, left))]
        if not any(name != "instruct" for name, _ in couples) and len(alone[0]) == len(alone[1]) == 1:
            couples.append((alone[0][0], alone[1][0]))  # one run of each: they are what the user wants to compare
    pairs = []
    for x, y in couples:
        for group in dict.fromkeys([*left[x], *right[y]]):
            ours, theirs = left[x].get(group, {}), right[y].get(group, {})
            for task in dict.fromkeys([*ours, *theirs]):
                places = [_items_place(run, found, arm, group) for run, found, arm in zip((a, b), results, (x, y), strict=True)]
                pairs.append(_pair((x, y), group, task, ours.get(task), theirs.get(task), places))
    return Difference(a, b, keys, pairs)


def _pair(arms: tuple[str, str], group: str, task: str, a: Any, b: Any, places: Sequence[Path]) -> Pair:
    from guidetune.evaluation.evaluate import paired_results, read_items

    if a is None or b is None:
        return Pair(arms, group, task, a, b, why="only one has it")
    try:
        asked = [
            {line["id"]: (line.get("prompt"), line.get("reference")) for line in read_items(place, one)}
            for place, one in zip(places, (a, b), strict=True)
        ]
        if asked[0] != asked[1]:  # equal ids are no proof: files often number their rows
            common = sum(asked[1].get(key, ...) == value for key, value in asked[0].items())
            return Pair(arms, group, task, a, b, why=f"not the same items ({common} in common of {len(asked[0])} and {len(asked[1])})")
        return Pair(arms, group, task, a, b, paired_results(places[0], a, places[1], b))
    except (BadInput, OSError, ValueError, KeyError, TypeError) as error:
        return Pair(arms, group, task, a, b, why=(str(error).splitlines() or [type(error).__name__])[0])


def _items_place(run: Run, results: Mapping[str, Any], arm: str, group: str) -> Path:
    """The folder that a TaskResult's `items` starts from."""
    if "tasks" in results:
        return Path(run.folder)
    return Path(run.folder) / results["arms"][arm].get("paths", {}).get("evaluation", "evaluation") / group


# ---------------------------------------------------------------------------------------------------------------------
# Deleting


def deletable(run: Run) -> tuple[list[Path], list[Path]]:
    """(what the run wrote into its folder, what else is there and stays).

    Raises:
        BadInput: the folder is a link, no run folder, or in use.
    """
    folder = Path(run.folder)
    if folder.is_symlink():
        raise BadInput(f"{folder} is a link, and links are not followed; delete the run by its own folder {folder.resolve()}")
    if not folder.is_dir() or (now := describe(folder)) is None:
        raise BadInput(f"{folder} is not a run folder; nothing was deleted")
    if now.status == "running":
        where = _mark(folder)
        raise BadInput(f"{folder}: the run is at work (process {where.get('pid')} on {where.get('host')}); stop it first")
    if Path.cwd() == folder or folder in Path.cwd().parents:
        raise BadInput(f"{folder} is the current folder or holds it; go elsewhere first")
    own, others = [], []
    for entry in sorted(folder.iterdir()):
        (own if _is_own(entry) else others).append(entry)
    return own, others


def _is_own(entry: Path) -> bool:
    """Written by guidetune: a known file, or a folder with a stage's manifest in it. Links never are."""
    if entry.is_symlink():
        return False
    if entry.is_file():
        return entry.name in OWN_FILES or (entry.name.startswith((".writable-", ".")) and entry.name.endswith(".part"))
    if entry.name in OWN_FOLDERS:
        return True
    if (entry / ".key").is_file() and entry.name.endswith(".partial"):
        return True
    for at, below, files in os.walk(entry):
        if "manifest.json" in files and "fingerprint" in (finished(Path(at)) or {}):
            return True
        below[:] = [name for name in below if at.count(os.sep) - str(entry).count(os.sep) < 5]
    return False


def delete(run: Run) -> list[Path]:
    """Delete what the run wrote, and its entry; returns what else was in the folder and is left there.

    Nothing outside the folder is touched: links in it are removed, never followed.

    Raises:
        BadInput: see `deletable`; or something could not be deleted.
    """
    if run.status != "gone":
        own, others = deletable(run)
        try:
            # the mark last: a deletion that was cut short can be repeated
            for entry in sorted(own, key=lambda path: path.name in (MARK, "results.json", "recipe.yaml")):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if not others:
                Path(run.folder).rmdir()
        except OSError as error:
            raise BadInput(f"{error.filename or run.folder} could not be deleted: {error.strerror or error}") from None
    else:
        others = []
    _gently(lambda: _with_index(lambda index: index.execute("DELETE FROM runs WHERE folder = ?", (run.folder,)) and None))
    return others

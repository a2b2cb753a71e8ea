"""Experiment trackers: what a run measures, shown in TensorBoard, Weights & Biases or trackio, through accelerate's tracker classes.

A tracker never changes a run. Training writes `metrics.jsonl` as it always does; a thread beside it reads the file and passes on what is
new, so a slow or broken tracker costs neither time nor results: it is given up with a warning. What was passed on is noted beside the run,
and a run that is continued goes on in the same tracker run without saying anything twice. Only rank 0 tracks.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from guidetune.artefacts import fingerprint, read_json, write_json
from guidetune.errors import BadInput
from guidetune.progress import say
from guidetune.registry import Method

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

FOLDER = "tracking"  # in the run's folder: notes of what was passed on, and the files of trackers that write some
EVERY = 1.0  # seconds between looks at metrics.jsonl
LAST = 60.0  # seconds that a finished arm waits for its trackers


class Tracker(Method):
    """Base of every tracker."""

    packages: ClassVar[tuple[str, ...]] = ()  # what must be installed

    def obstacle(self) -> str | None:
        """Why it cannot be used here, or None; asked before anything expensive starts."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} is not installed; pip install {' '.join(missing)}, or pip install 'guidetune[track]' for all"
        return None

    def open(self, run: TrackedRun) -> GeneralTracker:
        """A started tracker of accelerate that logs to this run and has stored its recipe; the same `run.id` again goes on with it."""
        raise TypeError(f"tracker {type(self).__name__} does not define open()")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of one arm.

    Args:
        job: name of the whole run or comparison.
        arm: name of the arm in it.
        folder: for files, if it writes some.
        id: stays when the run is continued.
        fresh: nothing has been logged under this id.
        config: the resolved recipe of the arm, dotted keys and plain values.
    """

    job: str
    arm: str
    folder: Path
    id: str
    fresh: bool
    config: Mapping[str, Any]


def check(trackers: Sequence[Tracker]) -> None:
    """Raises BadInput when a tracker cannot be used, or is named twice."""
    problems = [f"track: {one.name}: {why}" for one in trackers if (why := one.obstacle()) is not None]
    names = [one.name for one in trackers]
    problems += [f"track: {name} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise BadInput(problems)


@contextmanager
def tracked(
    trackers: Sequence[Tracker], job: str, arm: str, out: Path, metrics: Path, config: Mapping[str, Any]
) -> Iterator[dict[str, float]]:
    """Track one arm of the run in `out`: inside, every line that appears in `metrics`; at the end, what the block put into the dict.

    Nothing that a tracker does is raised here.
    """
    results: dict[str, float] = {}
    try:
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it whether this is the main process
    except Exception as error:  # a launch environment that accelerate cannot use
        say(f"warning: this run is not tracked: {error}")
        trackers = []
    workers = [_Worker(one, job, arm, out, metrics, config, results) for one in trackers]
    for worker in workers:
        worker.start()
    try:
        yield results
    finally:
        for worker in workers:
            worker.finished.set()
        for worker in workers:
            worker.join(LAST)
            if worker.is_alive():
                say(f"warning: tracking with {worker.tracker.name} has not finished after {LAST:.0f} s; the run goes on without it")


class _Worker(threading.Thread):
    """One tracker of one arm. A daemon: a tracker that hangs does not keep the process alive."""

    def __init__(
        self, tracker: Tracker, job: str, arm: str, out: Path, metrics: Path, config: Mapping[str, Any], results: Mapping[str, float]
    ) -> None:
        super().__init__(name=f"track {tracker.name}", daemon=True)
        self.tracker, self.job, self.arm, self.metrics, self.config, self.results = tracker, job, arm, metrics, config, results
        self.folder = out / FOLDER
        self.note = self.folder / f"{arm.replace('/', '-')}.{tracker.name}.json"
        self.finished = threading.Event()

    def run(self) -> None:
        try:
            self._follow()
        except BaseException as error:  # whatever a tracker's library raises, SystemExit included
            reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
            say(f"warning: tracking with {self.tracker.name} has stopped: {reason}; the run goes on, and its numbers are in its folder")

    def _follow(self) -> None:
        mark = fingerprint([self.config, self.tracker.spec()])
        state = self._state()
        resumed = state.get("config") == mark
        if not resumed:  # another recipe is another experiment, and starts a tracker run of its own
            state = {"id": secrets.token_hex(8), "config": mark, "step": -1, "attempt": state.get("attempt", 0) + 1}
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.arm if state["attempt"] == 1 else f"{self.arm}.{state['attempt']}"
        target = self.tracker.open(TrackedRun(self.job, name, self.folder, state["id"], not resumed, self.config))
        try:
            write_json(self.note, state)
            last = False
            while not last:
                last = self.finished.wait(EVERY)
                self._pass_on(target, state, last)
            if self.results and state.get("results") != (found := fingerprint(self.results)):
                target.log(dict(self.results), step=max(0, state["step"]))
                write_json(self.note, state | {"results": found})
        finally:
            target.finish()

    def _state(self) -> dict[str, Any]:
        try:
            state = read_json(self.note)
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _pass_on(self, target: GeneralTracker, state: dict[str, Any], last: bool) -> None:
        """Log the steps that are new. The newest waits for the next look: its validation may still be under way."""
        steps = [(step, values) for step, values in read_steps(self.metrics) if step > state["step"]]
        for step, values in steps if last else steps[:-1]:
            target.log(values, step=step)
            state["step"] = step
        if steps:
            write_json(self.note, state)


def read_steps(metrics: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, what was measured at it) of a metrics.jsonl: `train/...` and `validation/loss`. A line that is being written is left out."""
    try:
        raw = metrics.read_bytes()
    except OSError:
        return
    steps: dict[int, dict[str, float]] = {}
    for line in raw[: raw.rfind(b"\n") + 1].splitlines():
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        validation = row.pop("validation_loss", None)
        values = {f"train/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        if isinstance(validation, (int, float)):
            values["validation/loss"] = validation
        steps.setdefault(step, {}).update(values)
    yield from sorted(steps.items())


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved recipe as dotted keys with plain values, which is what trackers store."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list) and any(isinstance(one, (Mapping, list)) for one in value):
            for i, inner in enumerate(value):
                walk(inner, f"{key}.{i}")
        else:
            found[key] = (
                value if isinstance(value, (bool, int, float, str)) else "null" if value is None else json.dumps(value, default=str)
            )

    walk(tree, "")
    return found


def measures(entry: Mapping[str, Any], guidance: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a finished arm: scores with the ends of their intervals, means, costs, and the teacher's confidence."""
    found: dict[str, float] = {}

    def put(key: str, value: Any) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = value

    for group in ("task", "general"):
        for label, result in (entry.get(group) or {}).items():
            put(f"evaluate/{group}/{label}", result.get("score"))
            for end, value in zip(("low", "high"), result.get("ci") or (), strict=False):
                put(f"evaluate/{group}/{label}/{end}", value)
            for name, value in (result.get("metrics") or {}).items():
                if name != result.get("metric"):
                    put(f"evaluate/{group}/{label}/{name}", value)
        put(f"evaluate/{group}_mean", entry.get(f"{group}_mean"))
    for name, value in (entry.get("cost") or {}).items():
        put(f"cost/{name}", value)
    for name in ("mean_confidence", "supervised_tokens", "below_0.05", "seconds"):
        put(f"guidance/{name}", guidance.get(name))
    return found

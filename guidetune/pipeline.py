"""The pipeline: prepare → guide → tune → transfer → evaluate → report. Read this first.

Every stage is a function of its inputs that writes one folder; a stage whose inputs have not changed is not run again. So a
killed run continues by being started again, and the arms of a comparison share what they have in common.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune import runs, threads
from guidetune.artefacts import (
    StageResult,
    copied,
    digest_file,
    fingerprint,
    finished,
    read_json,
    shared_stage,
    stage,
    write_json,
    write_text_atomic,
)
from guidetune.errors import BadInput, RunFailed
from guidetune.progress import say
from guidetune.registry import source_file

if TYPE_CHECKING:
    from guidetune.comparison.budget import Budget
    from guidetune.comparison.scales import Selection, Sweep
    from guidetune.data.chat import Chat
    from guidetune.data.rows import EncodedRows
    from guidetune.engine.distributed import Group
    from guidetune.engine.settings import TuneSettings
    from guidetune.evaluation.evaluate import EvalSettings, Planned
    from guidetune.guidance import Guidance
    from guidetune.models.handle import ModelHandle
    from guidetune.phases import Phase
    from guidetune.recipe import Evaluate, Recipe
    from guidetune.weightspace.apply import Plan
    from guidetune.weightspace.sources import Delta

REFERENCE = "instruct"  # the arm every other is compared with
ENGINE_VERSION = 2  # part of every tune and guide key: raise it when the same inputs give other numbers
NOT_THE_RESULT = {"checkpoint_every", "micro_tokens", "gradient_checkpointing"}  # settings of speed and memory
LOW_CONFIDENCE, MANY_LOW = 0.3, 0.3
PAIR_DISTANCE_BYTES = 8_000_000_000


# ---------------------------------------------------------------------------------------------------------------------
# The two ways through


def run(recipe: Recipe, out: Path | None = None) -> Path:
    """One arm through all stages, beside the untouched instruct model; returns the run's folder.

    Raises:
        BadInput: before anything expensive has started, with every reason.
        RunFailed: a stage could not be finished; the same command continues.
    """
    from guidetune.recipe import shape

    out = Path(out or Path("runs") / recipe.name)
    arms = {} if recipe.evaluate is None or recipe.tune is None else {REFERENCE: _untuned(recipe)}
    arms[shape(recipe)] = recipe
    return _execute("run", recipe, arms, out, _How())


def compare(
    recipe: Recipe,
    arms: Sequence[str],
    out: Path | None = None,
    seeds: int = 1,
    *,
    grid: Sequence[str] = (),
    jobs: int = 1,
    scales: Sequence[float] = (),
    selection: Selection | None = None,
    unequal_budget: bool = False,
) -> Path:
    """Several arms on equal data, budget and seeds, side by side; returns the run's folder.

    An arm that fails does not stop the others; the failure is in the results, and raised at the end.

    Args:
        seeds: every arm that tunes is repeated with this many seeds.
        grid: values of keys, as `tune.lr=1e-4,3e-4`: a grid of every arm that tunes.
        jobs: arms to run at a time, each in a process of its own; fewer where memory does not allow so many.
        scales: also merge every tuned arm at these scales, without tuning again; `selection` says how one is picked.
        unequal_budget: go on when the arms would see different numbers of rows, tokens or steps.

    Raises:
        BadInput: before anything expensive has started, with every reason.
        RunFailed: some arm failed; the others' results and the report are there.
    """
    from guidetune.recipe import arms as arm_recipes

    out = Path(out or Path("runs") / recipe.name)
    how = _How(seeds, jobs, tuple(scales), selection, unequal_budget)
    return _execute("compare", recipe, arm_recipes(recipe, list(arms), grid), out, how)


@dataclass(frozen=True)
class _How:
    """How a comparison is done; its fields are `compare`'s arguments."""

    seeds: int = 1
    jobs: int = 1
    scales: tuple[float, ...] = ()
    selection: Selection | None = None
    unequal_budget: bool = False
    reference: bool = True  # the untouched model is among the arms: its results are there, of this very comparison


def demo(out: Path = Path("runs/demo"), max_memory: str | None = None) -> Path:
    """The main job on the embedded pair: instruct, sft, graft and gift on the world's own rows."""
    from guidetune import world
    from guidetune.recipe import DEFAULT_ARMS, load

    limit = [f"max_memory={max_memory}"] if max_memory else []
    return compare(load(Path(world.__file__).parent / "demo.yaml", limit), list(DEFAULT_ARMS), Path(out))


def _recorded(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Tell the index of runs how the run ended that `execute` began in the folder `out`, whatever the way."""

    @functools.wraps(execute)
    def run(*args: Any, **options: Any) -> Any:
        out = Path(inspect.signature(execute).bind(*args, **options).arguments["out"])
        try:
            done = execute(*args, **options)
        except BaseException as error:
            runs.ended(out, error)
            raise
        runs.ended(out)
        return done

    return run


def _tracked(work: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Show the recipe's trackers the numbers of an arm while it is worked on; rank 0 alone."""

    @functools.wraps(work)
    def arm(self: _Job, name: str, arm: Recipe, repeat: int = 0, **options: Any) -> dict[str, Any]:
        if not self.recipe.track or not _group().main:
            return work(self, name, arm, repeat, **options)
        from guidetune.tracking import flatten, measures, tracked

        config = flatten(arm.model_dump(mode="json", exclude={"arms", "track"}))
        label = f"{name}/seed-{repeat}" if repeat else name
        metrics = self.place(name, repeat) / "metrics.jsonl"
        with tracked(self.recipe.track, self.recipe.name, label, self.out, metrics, config) as results:
            entry = work(self, name, arm, repeat, **options)
            results.update(measures(entry, self.guidance))
        return entry

    return arm


@_recorded
def _execute(kind: str, recipe: Recipe, arms: Mapping[str, Recipe], out: Path, how: _How) -> Path:
    from guidetune.comparison import budget, contrasts

    threads.settle()
    began = time.monotonic()
    group = _group()
    _check_place(out)
    job = _Job(recipe, out, kind)
    how = replace(how, reference=REFERENCE in arms)
    job.check(arms, how)
    job.plan_memory(arms)
    budgets = job.budgets(arms)
    unequal = budget.differences(budgets)
    if unequal and not how.unequal_budget and kind == "compare":
        raise BadInput([*unequal, "a comparison of such arms says little; make them equal, or allow it with --unequal-budget"])
    group.once(lambda: write_text_atomic(out / "recipe.yaml", recipe.resolved_yaml()))
    if group.main:
        runs.started(out, kind, recipe.name)
    results = job.opening()
    results |= {"budget": {name: spent.as_dict() for name, spent in budgets.items()}, "budget_equal": not unequal}
    failed: list[str] = []
    job.guide_first(arms)
    run_all = job.apart if how.jobs > 1 and kind == "compare" else job.in_turn
    results["arms"] = run_all(arms, how, failed)

    def close() -> None:
        for entry in results["arms"].values():
            if entry.get("seeds"):
                entry["over_seeds"] = _over_seeds(entry)
        results["comparison"] = contrasts.compare_arms(out, results["arms"])
        results["comparison"]["verdict"] += unequal
        swept = {name: entry.pop("scales") for name, entry in results["arms"].items() if entry.get("scales")}
        if swept:
            results["scales"] = swept
        results.update(job.closing())
        results["seconds"] = round(time.monotonic() - began, 1)
        write_json(out / "results.json", results)
        _report(out, results)

    group.once(close)
    if failed:
        raise RunFailed("\n".join([*failed, f"the other arms are in {out / 'report.html'}; the same command tries again"]))
    return out


def _again(arm: Recipe, k: int) -> Recipe:
    """The arm with its k-th further seed."""
    assert arm.tune is not None
    return arm.model_copy(update={"tune": arm.tune.model_copy(update={"seed": arm.tune.seed + k})})


def _try(work: Callable[[], dict[str, Any]], failed: list[str], name: str, arm: Recipe) -> dict[str, Any]:
    """The results of one arm, or the reason why it has none. Ctrl-C still stops everything."""
    from guidetune.engine.distributed import everywhere

    try:
        return work()
    except (BadInput, RunFailed, OSError, RuntimeError, ValueError, MemoryError) as error:
        if os.environ.get("GUIDETUNE_DEBUG") or not everywhere(error):
            raise
        return _failure(str(error) or type(error).__name__, failed, name, arm)


def _failure(text: str, failed: list[str], name: str, arm: Recipe) -> dict[str, Any]:
    failed.append(f"arm {name} failed: {text}")
    say(f"arm {name} failed: {text}")
    return {"status": "failed", "error": text, "description": arm.description, "task": {}, "general": {}, "cost": {}}


def _untuned(recipe: Recipe) -> Recipe:
    from guidetune.recipe import arms

    return arms(recipe, [REFERENCE])[REFERENCE]


@dataclass(frozen=True)
class _Tuning:
    """One run of the training loop: all rows, or those of a phase."""

    rows: EncodedRows
    settings: TuneSettings
    guidance: Mapping[str, Guidance]
    validation: EncodedRows | None
    estimate: dict[str, Any] | None
    start: StageResult | None = None  # the phase before, whose weights it begins with
    course: tuple[int, int] | None = None  # with the optimiser carried over: (steps before, steps of all phases)
    label: str = "tune"


# ---------------------------------------------------------------------------------------------------------------------
# The stages of one job


@dataclass
class _Job:
    """One run or comparison: what its arms share."""

    recipe: Recipe
    out: Path
    kind: str
    ordered: bool = False  # one arm, at the order of another process, which has said everything about the data
    ledger: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)
    pair: dict[str, Any] = field(default_factory=dict)
    _chat: Chat | None = None
    _rows: dict[str, tuple[Path, EncodedRows]] = field(default_factory=dict)
    _plans: dict[str, list[Planned]] = field(default_factory=dict)
    _evaluated: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    _folders: dict[str, Path] = field(default_factory=dict)
    _places: dict[str, Path] = field(default_factory=dict)  # what a stage's folder holds -> that folder
    _told: set[str] = field(default_factory=set)
    _outlines: dict[str, Any] = field(default_factory=dict)

    # -- one after the other, or in processes of their own ------------------------------------------------------------

    def in_turn(self, arms: Mapping[str, Recipe], how: _How, failed: list[str]) -> dict[str, dict[str, Any]]:
        """Every arm, then its further seeds, in this process."""
        found: dict[str, dict[str, Any]] = {}
        first = [name for name in arms if how.scales and name == REFERENCE]  # every sweep starts from it
        for name in dict.fromkeys([*first, *arms]):
            arm = arms[name]
            if self.kind == "run":  # nothing else to save: the error is the user's to see as it is
                found[name] = self.arm(name, arm)
            else:
                found[name] = _try(lambda arm=arm, name=name: self.arm(name, arm, how=how), failed, name, arm)
        found = {name: found[name] for name in arms}
        for k, name, again in _repeats(arms, found, how.seeds):
            assert again.tune is not None
            entry = _try(lambda again=again, name=name, k=k: self.arm(name, again, k), failed, f"{name} (seed {again.tune.seed})", again)
            found[name].setdefault("seeds", []).append({"seed": again.tune.seed, **entry})
        return found

    def apart(self, arms: Mapping[str, Recipe], how: _How, failed: list[str]) -> dict[str, dict[str, Any]]:
        """As `in_turn`, several at a time. What they share is made here first."""
        from guidetune.comparison import jobs

        if _group().size > 1:
            raise BadInput(
                "--jobs runs arms in processes of their own, and this is one of several that share each arm; leave one of the two"
            )
        for arm in arms.values():
            try:
                if arm.tune is not None and arm.data.validation:
                    self.prepare(arm, "validation")
                for teacher in _teachers(arm):
                    self.guide(arm, teacher)
            except (BadInput, RunFailed, OSError, RuntimeError, ValueError, MemoryError):
                pass  # the arm will meet the same error and report it as its own
        at_a_time, share = self._room(arms, how.jobs)
        threads_each = max(1, int(os.environ.get("OMP_NUM_THREADS") or threads.available_cores()) // at_a_time)

        def order(name: str, arm: Recipe, repeat: int) -> jobs.Order:
            label = f"{name} (seed {arm.tune.seed})" if repeat and arm.tune else name
            spec = {
                "arm": name,
                "recipe": arm.model_dump(mode="json"),
                "shared": self.recipe.model_dump(mode="json"),
                "root": str(arm.root),
                "out": str(self.out),
                "repeat": repeat,
                "scales": list(how.scales) if not repeat else [],
                "reference": how.reference,
                "selection": how.selection.model_dump() if how.selection else None,
                "limit": share,
                "places": {key: str(path) for key, path in self._places.items()},
                "folders": {key: str(path) for key, path in self._folders.items()},
                "told": sorted(self._told),
            }
            # arms that tune alike go one after the other: the second one finds the work done
            return jobs.Order(label, spec, alike=fingerprint([spec["recipe"][part] for part in ("data", "guide", "tune")]))

        def result(done: jobs.Done, label: str, arm: Recipe) -> dict[str, Any]:
            return done.entry if done.entry is not None else _failure(done.error, failed, label, arm)

        found: dict[str, dict[str, Any]] = {}
        if how.scales and REFERENCE in arms:  # every sweep starts from it
            found[REFERENCE] = _try(lambda: self.arm(REFERENCE, arms[REFERENCE], how=how), failed, REFERENCE, arms[REFERENCE])
        first = {name: order(name, arm, 0) for name, arm in arms.items() if name not in found}
        done = jobs.run(list(first.values()), at_a_time, threads_each, self.out)
        found |= {name: result(done[one.label], one.label, arms[name]) for name, one in first.items()}
        found = {name: found[name] for name in arms}
        later = [(name, again, order(name, again, k)) for k, name, again in _repeats(arms, found, how.seeds)]
        done = jobs.run([one for _, _, one in later], at_a_time, threads_each, self.out)
        for name, again, one in later:
            assert again.tune is not None
            found[name].setdefault("seeds", []).append({"seed": again.tune.seed, **result(done[one.label], one.label, again)})
        return found

    def _room(self, arms: Mapping[str, Recipe], wanted: int) -> tuple[int, tuple[int, bool] | None]:
        """How many arms fit beside each other, and the memory of each."""
        budget, strict = self._budget()
        wanted = min(wanted, len(arms))
        if budget is None:
            return wanted, None
        for count in range(wanted, 1, -1):
            if all(self._fits(arm, budget // count) for arm in arms.values()):
                if count < wanted:
                    say(f"memory: {count} arms at a time instead of {wanted}")
                return count, (budget // count, strict)
        if wanted > 1:
            say(f"memory: one arm at a time instead of {wanted}")
        return 1, (budget, strict)

    def _fits(self, arm: Recipe, budget: int) -> bool:
        """Whether an arm can be done within so many bytes, by the estimates that `plan_memory` uses."""
        before = self._limit
        self._limit = (budget, True)  # strict: what does not fit is refused
        try:
            if arm.tune is not None:
                self._tune_settings(arm, tell=False)
            self._evaluate_tokens(arm)
        except BadInput:
            return False
        except (RunFailed, OSError, RuntimeError, ValueError, MemoryError):
            return True  # the arm will fail by itself, with its reason
        finally:
            self._limit = before
        return True

    # -- before anything expensive ------------------------------------------------------------------------------------

    def check(self, arms: Mapping[str, Recipe], how: _How) -> None:
        """Everything that can be known to be wrong before the first stage, all at once."""
        problems: list[str] = []

        def attempt(work: Callable[[], Any]) -> Any:
            try:
                return work()
            except BadInput as error:
                problems.extend(p for p in error.problems if p not in problems)
                return None

        if self.recipe.track:
            from guidetune.tracking import check

            attempt(lambda: check(self.recipe.track))
        self.pair = attempt(lambda: _group().once(lambda: self._check_pair(arms))) or {}
        for arm in arms.values():
            if arm.evaluate is not None:
                for group in ("task", "general"):
                    attempt(lambda arm=arm, group=group: self._plan(arm, group))
            for teacher in _teachers(arm):
                attempt(lambda teacher=teacher: self._resolve(teacher))
            attempt(lambda arm=arm: _check_bits(arm))
            if how.scales:
                attempt(lambda arm=arm: self._sweep_plan(arm, how))
        _group().agree(BadInput(problems) if problems else None)

    def _check_pair(self, arms: Mapping[str, Recipe]) -> dict[str, Any]:
        from guidetune.models.pair import check_pair
        from guidetune.models.sources import resolve, weight_files

        models = self.recipe.models
        size = sum(f.stat().st_size for spec in (models.base, models.instruct) for f in weight_files(resolve(spec).path))
        key = {"base": self._fingerprint("base"), "instruct": self._fingerprint("instruct"), "version": 1}
        cached = self.out / ".pair.json"
        try:
            known = read_json(cached)
            if known["key"] == key:
                return known["facts"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        report = check_pair(models.base, models.instruct, distance=size <= PAIR_DISTANCE_BYTES)
        moves = any(arm.tune is not None and arm.transfer is not None and arm.tune.on != arm.transfer.into for arm in arms.values())
        if report.problems and (moves or any(arm.tune is not None and arm.tune.weights for arm in arms.values())):
            raise BadInput([f"{models.base} and {models.instruct} do not fit: {p}" for p in report.problems])
        for warning in report.warnings:
            say(f"note: {warning}")
        write_json(cached, {"key": key, "facts": report.facts})
        return report.facts

    # -- memory -------------------------------------------------------------------------------------------------------

    def plan_memory(self, arms: Mapping[str, Recipe]) -> None:
        """Choose settings that fit, for every stage of every arm, before any model is loaded.

        Raises:
            BadInput: `max_memory` is given and some stage cannot be done within it, with what it needs.
        """
        problems: list[str] = []
        for arm in arms.values():
            try:
                for teacher in _teachers(arm):
                    self._guide_tokens(arm, teacher)
                if arm.tune is not None:
                    self._tune_settings(arm)
                self._evaluate_tokens(arm)
            except BadInput as error:
                if self.recipe.max_memory is not None:
                    problems += [p for p in error.problems if p not in problems]
            except (RunFailed, OSError, RuntimeError, ValueError, MemoryError):
                pass  # an arm that cannot be prepared fails by itself, with its reason, and the others go on
        if problems:
            raise BadInput(problems)

    def budgets(self, arms: Mapping[str, Recipe]) -> dict[str, Budget]:
        """What each arm that tunes will see; arms whose rows cannot be prepared fail later, with their reason."""
        from guidetune.comparison import budget

        found = {}
        for name, arm in arms.items():
            if arm.tune is not None:
                try:
                    rows = self.prepare(arm)[1]
                    parts = [(phase.settings, rows.take(phase.rows)) for phase in self.phases(arm)] if arm.tune.phases else []
                    found[name] = budget.total(budget.of(*part) for part in parts or [(arm.tune.settings(), rows)])
                except (BadInput, RunFailed, OSError, RuntimeError, ValueError, MemoryError):
                    continue
        return found

    def _budget(self) -> tuple[int | None, bool]:
        """Bytes this process may take in all (on a GPU: of its memory), and whether the user has set them; rank 0's for all."""
        if self._limit is None:
            self._limit = _group().once(self._measured_budget)
        return self._limit

    _limit: tuple[int | None, bool] | None = None

    def _measured_budget(self) -> tuple[int | None, bool]:
        from guidetune.engine import memory
        from guidetune.models.loading import pick_device
        from guidetune.weightspace.store import parse_size

        if self.recipe.max_memory is not None:
            return parse_size(self.recipe.max_memory), True
        if (free := memory.free_memory(pick_device())) is None:
            return None, False
        # processes of one machine share its memory; a GPU has one
        sharing = _group().size if pick_device() == "cpu" else 1
        return int(memory.USABLE * free) // sharing + self._own_memory(), False

    def _own_memory(self) -> int:
        """What this process takes beside the models: nothing on a GPU."""
        from guidetune.engine import memory
        from guidetune.models.loading import pick_device

        if self._process is None:
            import peft  # noqa: F401  (and transformers: every stage will have loaded them)

            self._process = memory.resident() if pick_device() == "cpu" else 0
        return self._process

    _process: int | None = None

    def _outline(self, name: str, dtype: str, params: Any = None, quantize: str = "none") -> Any:
        """The model in shapes only; None where it cannot be had, which is said once."""
        from guidetune.engine.memory import Outline

        key = fingerprint([self._spec(name), dtype, params.spec() if params else None, quantize])
        if key not in self._outlines:
            try:
                self._outlines[key] = Outline.of(self._resolve(name).path, dtype, params, quantize)
            except BadInput:
                raise
            except Exception as error:  # a method of the user's own may need real weights to attach
                self._no_estimate(error)
                self._outlines[key] = None
        return self._outlines[key]

    def _no_estimate(self, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if self.recipe.max_memory is not None:
            raise BadInput(f"max_memory: the memory of this model cannot be estimated ({reason}); run without the limit") from None
        if "memory" not in self._told:
            self._told.add("memory")
            say(f"note: memory cannot be estimated: {reason}", level=1)

    def _fits_plainly(self, name: str, tokens: int, budget: int | None, strict: bool) -> bool:
        """So much room that no estimate is needed; the estimate itself costs a second or two."""
        from guidetune.engine.memory import plainly_fits

        if strict:
            return False
        return budget is None or plainly_fits(self._resolve(name).config, self._parameters(name), tokens, budget)

    def _tight(self, estimate: Any, budget: int, strict: bool) -> None:
        """It does not fit: refuse where the user has set the limit, else warn."""
        from guidetune.engine import memory

        if strict:
            raise memory.refusal(estimate, budget)
        if estimate.what not in self._told:
            self._told.add(estimate.what)
            say(f"warning: {estimate.what} may need {estimate.text()}, and about {memory.gigabytes(budget)} is free; {memory.ADVICE}")

    def _tune_settings(self, arm: Recipe, tell: bool = True) -> tuple[TuneSettings, dict[str, Any] | None]:
        """The arm's settings, changed where they would not fit (which is told), and the estimate."""
        from guidetune.engine import memory

        tune = arm.tune
        assert tune is not None
        settings = tune.settings()
        plain = settings if settings.gradient_checkpointing != "auto" else settings.model_copy(update={"gradient_checkpointing": False})
        _, rows = self.prepare(arm)
        longest = int(rows.lengths.max(initial=1))
        budget, strict = self._budget()
        if self._fits_plainly(tune.on, max(settings.micro_tokens, longest), budget, strict):
            return plain, None
        dtype = "float32" if not tune.params.frozen_base else self._frozen_dtype(tune.on, settings.dtype)
        outline = self._outline(tune.on, dtype, tune.params, settings.quantize)
        if outline is None or budget is None:
            return plain, None
        fixed = tune.reducer == "micro"
        try:
            chosen, estimate, fits = memory.fit_tune(outline, settings, longest, budget, fixed_tokens=fixed, process=self._own_memory())
        except Exception as error:
            self._no_estimate(error)
            return plain, None
        if not fits:
            self._tight(estimate, budget, strict)
        changes = []
        if estimate.recompute and settings.gradient_checkpointing == "auto":
            changes.append("gradient checkpointing is on")
        if chosen.micro_tokens != settings.micro_tokens:
            changes.append(f"micro-batches have {chosen.micro_tokens:,} tokens instead of {settings.micro_tokens:,}")
        if estimate.frugal:
            changes.append("freed memory is given back at once (slower)")
        if tell and changes and (text := " and ".join(changes)) not in self._told:
            self._told.add(text)
            say(f"memory: {text}; training needs about {estimate.text()}")
        return chosen, estimate.as_dict()

    def _guide_tokens(self, arm: Recipe, teacher: str) -> int:
        """Tokens of one forward pass of the teacher."""
        _, rows = self.prepare(arm)
        # int8 starts from the stored weights
        dtype = self._frozen_dtype(teacher, "auto" if arm.guide.dtype == "int8" else arm.guide.dtype)
        return self._pass_tokens("guidance", teacher, dtype, arm.guide.batch_tokens, int(rows.lengths.max(initial=1)))

    def _evaluate_tokens(self, arm: Recipe) -> int:
        """Tokens of one batch of an evaluation, the cache of its keys and values included."""
        from guidetune.models.checkpoint import Checkpoint

        if arm.evaluate is None:
            return 0
        with Checkpoint(self._resolve(REFERENCE).path) as checkpoint:
            stored = {info.dtype for info in checkpoint.tensors.values()}
        dtype = "bfloat16" if stored & {"BF16", "F16"} else "float32"
        tokens = arm.evaluate.batch_tokens
        return self._pass_tokens("evaluation", REFERENCE, dtype, tokens, min(tokens, self._max_length(arm)), cached=True)

    def _pass_tokens(self, what: str, name: str, dtype: str, tokens: int, longest: int, cached: bool = False) -> int:
        from guidetune.engine import memory

        budget, strict = self._budget()
        if self._fits_plainly(name, max(tokens, longest), budget, strict):
            return tokens
        outline = self._outline(name, dtype)
        if outline is None or budget is None:
            return tokens
        try:
            chosen, estimate, fits = memory.fit_pass(outline, what, tokens, longest, budget, process=self._own_memory(), cached=cached)
        except Exception as error:
            self._no_estimate(error)
            return tokens
        if not fits:
            self._tight(estimate, budget, strict)
        return chosen

    # -- names and models ---------------------------------------------------------------------------------------------

    def _spec(self, name: str) -> str:
        """The model behind `base`, `instruct`, or a model's own name."""
        return getattr(self.recipe.models, name) if name in ("base", "instruct") else name

    def _resolve(self, name: str) -> Any:
        from guidetune.models.sources import resolve

        return resolve(self._spec(name))

    def _fingerprint(self, name: str) -> str:
        from guidetune.models.fingerprints import fingerprint as model_fingerprint

        def known() -> str:  # rank 0 may have it already from work it did alone
            if name not in self._prints:
                self._prints[name] = model_fingerprint(self._spec(name))
            return self._prints[name]

        return _group().once(known)

    _prints: dict[str, str] = field(default_factory=dict)

    @property
    def chat(self) -> Chat:
        """One chat format for training, guidance and evaluation: the instruct model's."""
        if self._chat is None:
            from guidetune.data.chat import Chat
            from guidetune.models.loading import load_tokenizer

            self._chat = Chat(load_tokenizer(self.recipe.models.instruct))
        return self._chat

    # -- prepare ------------------------------------------------------------------------------------------------------

    def prepare(self, arm: Recipe, split: str = "train") -> tuple[Path, EncodedRows]:
        """Encoded rows of a split; arms with the same data settings share them."""
        from guidetune.data.prepare import PrepareSettings, prepare
        from guidetune.data.rows import EncodedRows

        data = arm.data
        specs = data.train if split == "train" else data.validation
        settings = PrepareSettings(
            max_length=self._max_length(arm),
            over_length=data.over_length,
            cut_answer=data.cut_answer,
            max_dropped=data.max_dropped,
            seed=arm.seed,
            keep=sorted({column for scorer in _scorers(arm).values() for column in scorer.columns}) if split == "train" else [],
            loss_on=data.loss_on,
        )
        operations = [o for o in data.operations if split == "train" or getattr(o, "renders", False)]
        key = fingerprint([split, [s.model_dump(mode="json") for s in specs], [o.spec() for o in operations], settings])
        if key not in self._rows:
            folder = self._place(self.out / ("data" if split == "train" else "validation"), key)
            group = _group()
            done = group.once(lambda: prepare(specs, operations, self.chat, settings, folder, arm.root, self.recipe.models.model_dump()))
            if split == "train" and group.main and not self.ordered:
                if not self.ledger:
                    self.ledger = read_json(done.path / "ledger.json")
                _say_ledger(done)
            if split == "train" and not self.ordered:
                group.agreed(lambda: self._warn_of_leaks(done.path, data.leaks) if group.main else None)
            # every process maps the file itself: rows are never sent
            self._rows[key] = (done.path, group.agreed(lambda: EncodedRows.open(done.path)))
        return self._rows[key]

    def _place(self, folder: Path, key: str) -> Path:
        """The folder of one stage's result: the plain name for the first, a name of its own for each other."""
        place = f"{folder.name}-{key}"
        if place not in self._places:
            taken = folder in self._places.values()
            self._places[place] = folder.with_name(f"{folder.name}-{key[:8]}") if taken else folder
        return self._places[place]

    def _warn_of_leaks(self, folder: Path, leaks_are: str) -> None:
        """Say so, or stop, when training rows have a prompt that the evaluation asks: scores on it would measure memory."""
        from guidetune.data.prepare import leaks

        asked = [m["content"] for items in self._plans.values() for p in items for i in p.items for m in i.messages if m["role"] == "user"]
        found = leaks(folder, asked)
        self.ledger["leaks"] = found.rows
        if found.rows:
            some = ", ".join(leak.id for leak in found.examples)
            text = f"{found.rows:,} training rows have a prompt that the evaluation asks ({some}); take them out of one of the two"
            if leaks_are == "refuse":
                raise BadInput(f"{text}, or set data.leaks: warn")
            say(f"warning: {text}")

    def _max_length(self, arm: Recipe) -> int:
        """The recipe's limit, or the model's context where that is shorter."""
        asked = arm.tune.max_length if arm.tune is not None else (arm.data.max_length or 2048)
        config = self._resolve("instruct").config
        context = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
        if context and asked > context:
            say(f"note: max_length {asked} is longer than the model's context; rows are held to {context} tokens", level=1)
            return int(context)
        return asked

    # -- score --------------------------------------------------------------------------------------------------------

    def score(self, arm: Recipe, name: str) -> StageResult:
        """The side table of one score of the arm's rows; computed once for the same scorer, models and rows, in any run beside this one."""
        from guidetune.data.prepare import COLUMNS, read_records
        from guidetune.data.side import SideTable
        from guidetune.scorers import ScoreContext, score

        scorer = _scorers(arm)[name]
        folder, rows = self.prepare(arm)
        tokens = max([arm.guide.batch_tokens, *(self._guide_tokens(arm, model) for model in scorer.models)])
        stores: dict[str, Guidance] = {teacher: self.guide(arm, teacher) for teacher in scorer.teachers}
        key = {
            "stage": "score",
            "version": ENGINE_VERSION,
            "scorer": scorer.deciding(),
            "code": digest_file(source_file(type(scorer))),
            "rows": rows.digest,
            "texts": digest_file(folder / "records.jsonl"),
            "columns": digest_file(folder / COLUMNS) if scorer.columns else None,
            "chat": self.chat.digest if scorer.uses_chat else None,
            "models": {model: self._fingerprint(model) for model in scorer.models},
            "guidance": {teacher: self._fingerprint(teacher) for teacher in scorer.teachers},
        }
        held: dict[str, Any] = {}

        def open_model(model: str) -> Any:
            if model not in held:
                from guidetune.models.handle import open_handle

                group = _group()
                held[model] = group.agreed(lambda: open_handle(self._spec(model), device=group.loading_device))
                group.place(held[model].model)
            return held[model]

        def close() -> None:
            while held:
                _release(held.popitem()[1])

        def build(work: Path) -> dict[str, Any]:
            context = ScoreContext(self.chat, open_model, stores.__getitem__, tokens, close)
            columns = SideTable.open(folder / COLUMNS) if scorer.columns else None
            return score(scorer, rows, read_records(folder), context, work, name, columns)

        place = self._place(self.out / "scores" / _slug_of(name), fingerprint(key))
        shared = self.out.parent / ".store" / f"score-{fingerprint(key)[:16]}"
        group = _group()
        if scorer.models:  # every process has a part of each batch
            done = group.follow(lambda build: shared_stage(shared, place, key, build), build)
        else:
            done = group.once(lambda: shared_stage(shared, place, key, build))
        if f"score/{name}" not in self._told and not self.ordered:
            self._told.add(f"score/{name}")
            _say_score(name, done)
        return done

    def phases(self, arm: Recipe) -> list[Phase]:
        """The arm's phases in the order of training."""
        from guidetune.scorers import read

        assert arm.tune is not None and arm.tune.phases is not None
        rows = self.prepare(arm)[1]
        plan: Any = arm.tune.phases
        scores = read(self.score(arm, plan.by).path, list(rows.ids)) if plan.scored else None
        return plan.plan(rows, scores, arm.tune.settings())

    # -- guide --------------------------------------------------------------------------------------------------------

    def guide(self, arm: Recipe, teacher: str) -> Guidance:
        """The teacher's log-probabilities of the arm's rows; computed once for the same teacher and rows, in any run beside this one."""
        from guidetune.guidance import Guidance, GuideSettings, teach

        _, rows = self.prepare(arm)
        settings = GuideSettings(**{**arm.guide.model_dump(), "batch_tokens": self._guide_tokens(arm, teacher)})
        dtype = self._frozen_dtype(teacher, settings.dtype)
        key = {
            "stage": "guide",
            "version": ENGINE_VERSION,
            "teacher": self._fingerprint(teacher),
            "rows": rows.digest,
            "dtype": dtype,
        }

        def build(work: Path) -> dict[str, Any]:
            model = self._load(teacher, dtype)
            try:
                _group().place(model)
                return teach(model, rows, settings, work, label=f"guide ({teacher})")
            finally:
                _release(model)

        folder = self._place(self.out / "guidance" / _slug(teacher), rows.digest)
        shared = self.out.parent / ".store" / f"guide-{fingerprint(key)[:16]}"
        done = _group().follow(lambda build: shared_stage(shared, folder, key, build), build)
        self._folders[f"guidance/{teacher}"] = done.path
        summary = {**done.result, "teacher": self._spec(teacher), "seconds": done.seconds}
        if not self.guidance:
            self.guidance = summary
        if teacher not in self._told:
            self._told.add(teacher)
            _say_confidence(summary)
        return Guidance.open(done.path)

    def guide_first(self, arms: Mapping[str, Recipe]) -> None:
        """The instruct model's pass before any arm, where some arm needs it: the report sorts every arm's learning signal by it."""
        for arm in arms.values():
            if REFERENCE in _teachers(arm):
                try:
                    self.guide(arm, REFERENCE)
                except (BadInput, RunFailed, OSError, RuntimeError, ValueError, MemoryError):
                    pass  # the arm that needs it will meet the same error and report it as its own
                return

    # -- tune ---------------------------------------------------------------------------------------------------------

    def tune(self, arm: Recipe, folder: Path) -> tuple[StageResult, dict[str, float]]:
        """The trained adapter (or model), and the seconds its stages took."""
        tune = arm.tune
        assert tune is not None
        _, rows = self.prepare(arm)
        validation = self.prepare(arm, "validation")[1] if arm.data.validation else None
        stores = {teacher: self.guide(arm, teacher) for teacher in _teachers(arm)}
        analysed = dict(stores)
        if not analysed and (known := self._folders.get(f"guidance/{REFERENCE}")):
            from guidetune.guidance import Guidance

            # no weight reads it; it sorts this arm's learning signal into the same confidence bins
            store = Guidance.open(known)
            of_these = ((finished(known) or {}).get("key") or {}).get("rows") == rows.digest
            analysed = {REFERENCE: store} if of_these else {}
        settings, estimate = self._tune_settings(arm)
        one = _Tuning(rows, settings, analysed, validation, estimate)
        seconds = {"guide_s": sum(read_json(self._folders[f"guidance/{t}"] / "manifest.json")["seconds"] for t in stores)}
        if tune.phases is None:
            return self._tune_rows(arm, folder, one), seconds
        return self._tune_phases(arm, folder, one), seconds

    def _tune_phases(self, arm: Recipe, folder: Path, whole: _Tuning) -> StageResult:
        """One run of the training loop after the other, each from the weights that the one before has left; the last one's adapter."""
        from guidetune.phases import joined, table
        from guidetune.phases._guidance import PhaseGuidance

        assert arm.tune is not None and arm.tune.phases is not None
        phases = self.phases(arm)
        carried = arm.tune.phases.optimiser == "carried"
        total, before = sum(phase.steps for phase in phases), 0
        done: list[StageResult] = []
        for place, phase in enumerate(phases, 1):
            say(f"phase {place} of {len(phases)} ({phase.name}): {len(phase.rows):,} rows, {phase.steps:,} steps", level=0)
            changed = {name: getattr(phase.settings, name) for name in ("lr", "epochs", "seed")}
            one = _Tuning(
                whole.rows.take(phase.rows),
                whole.settings.model_copy(update=changed),
                {teacher: PhaseGuidance(store, phase.rows) for teacher, store in whole.guidance.items()},
                whole.validation,
                whole.estimate,
                start=done[-1] if done else None,
                course=(before, total) if carried else None,
                label=f"tune {place}/{len(phases)}",
            )
            done.append(self._tune_rows(arm, folder / "phases" / str(place), one))
            before += phase.steps
        group = _group()
        group.once(lambda: joined([part.path.parent / "metrics.jsonl" for part in done], folder / "metrics.jsonl"))

        def build(work: Path) -> dict[str, Any]:
            last = done[-1].path
            for file in last.iterdir():
                if file.name not in ("manifest.json", "checkpoint.safetensors"):
                    _linked(file, work / file.name)
            return _whole_of([part.result for part in done], table(phases, whole.rows), [part.seconds for part in done])

        key = {"stage": "phases", "parts": [part.manifest["fingerprint"] for part in done]}
        return group.once(lambda: stage(folder / "adapter", key, build))

    def _tune_rows(self, arm: Recipe, folder: Path, one: _Tuning) -> StageResult:
        """The trained adapter (or model) of one run of the training loop."""
        from guidetune.engine import Objective, Part, fit, memory
        from guidetune.engine.distributed import full_state
        from guidetune.params import PROVENANCE

        tune = arm.tune
        assert tune is not None
        rows, settings, validation, estimate, start = one.rows, one.settings, one.validation, one.estimate, one.start
        dtype = "float32" if not tune.params.frozen_base else self._frozen_dtype(tune.on, settings.dtype)
        reducer = tune.reducer or "tokens"
        key = {
            "stage": "tune",
            "version": ENGINE_VERSION,
            "model": self._fingerprint(tune.on),
            "rows": rows.digest,
            "validation": validation.digest if validation else None,
            "params": tune.params.spec(),
            "weights": [w.spec() for w in tune.weights],
            "methods": [digest_file(source_file(type(m))) for m in (tune.params, *tune.weights)],
            "reducer": reducer,
            # not `analysed`: an arm that was tuned before is not tuned again for the sake of its analysis
            "guidance": {t: self._fingerprint(t) for t in _teachers(arm)},
            "settings": {
                k: v for k, v in settings.model_dump().items() if k not in NOT_THE_RESULT or (reducer, k) == ("micro", "micro_tokens")
            },
            "dtype": dtype,
        }
        if one.course is not None or start is not None:
            key |= {"start": start.manifest["fingerprint"] if start else None, "course": one.course}

        def build(work: Path) -> dict[str, Any]:
            model = self._load(tune.on, dtype, settings.quantize)
            try:
                tune.params.prepare(model, rows)
                attached = tune.params.attach(model, seed=_seed(settings.seed, "params"))
                if start is not None:
                    attached.load(start.path)
                objective = Objective(tune.weights, reducer, one.guidance, frozenset(self.chat.stop_token_ids))
                part = Part(*one.course, state=start.path if start else None) if one.course else None
                with memory.sparing(bool(estimate and estimate["frugal"])):
                    result = fit(
                        attached,
                        rows,
                        settings,
                        objective,
                        work=work,
                        metrics=folder / "metrics.jsonl",
                        validation=validation,
                        label=one.label,
                        part=part,
                    )
                origin = {"base": self._spec(tune.on), "base_fingerprint": self._fingerprint(tune.on), "method": "guidetune", "tune": key}
                state = full_state(attached.model) if not tune.params.frozen_base else None

                def save() -> None:
                    attached.save(work, state) if state is not None else attached.save(work)
                    write_json(work / PROVENANCE, origin)
                    if part is None:
                        (work / "checkpoint.safetensors").unlink(missing_ok=True)

                group.once(save)
                return {**result.as_dict(), "peak_rss_mb": _peak_rss_mb(), "memory_estimate": estimate}
            finally:
                _release(model)

        folder.mkdir(parents=True, exist_ok=True)
        group = _group()
        twin = group.once(lambda: self._tuned_alike(folder / "adapter", key))
        if twin is not None:  # graft and re-adapt, for example, differ only in what is done with the adapter
            group.once(lambda: copied(twin, folder, "adapter", ("metrics.jsonl",)))
            say(f"tune: the same as in {self._relative(twin.parent)}, not done again")
        return group.follow(lambda build: stage(folder / "adapter", key, build), build)

    def _tuned_alike(self, adapter: Path, key: Mapping[str, Any]) -> Path | None:
        """A finished adapter of another arm of this run that was made from the same key, unless this one is finished itself."""
        if finished(adapter, key) is not None:
            return None
        plain = [*self.out.glob("arms/*/adapter"), *self.out.glob("arms/*/seeds/*/adapter"), self.out / "adapter"]
        others = [*plain, *(part for one in plain for part in one.parent.glob("phases/*/adapter"))]
        return next((other for other in sorted(others) if other != adapter and finished(other, key) is not None), None)

    def _parameters(self, name: str) -> int:
        from guidetune.models.checkpoint import Checkpoint

        with Checkpoint(self._resolve(name).path) as checkpoint:
            return sum(info.numel for info in checkpoint.tensors.values())

    def _frozen_dtype(self, name: str, asked: str) -> str:
        from guidetune.engine.precision import frozen_dtype
        from guidetune.models.loading import pick_device

        return frozen_dtype(asked, self._parameters(name), pick_device())

    def _load(self, name: str, dtype: str, quantize: str = "none") -> Any:
        from guidetune.models.loading import load_model

        group = _group()
        return group.agreed(lambda: load_model(self._spec(name), dtype=dtype, device=group.loading_device, quantize=quantize))

    # -- transfer -----------------------------------------------------------------------------------------------------

    def transfer(self, arm: Recipe, adapter: Path, folder: Path) -> StageResult:
        """A complete model folder: the receiving model plus what was learnt."""
        from guidetune.weightspace.apply import transfer

        assert arm.tune is not None and arm.transfer is not None
        options = arm.transfer
        trained_on = self._spec(arm.tune.on)
        _, rows = self.prepare(arm)
        probes = [rows[i].input_ids.tolist() for i in range(min(8, len(rows)))]
        delta, scale = self._learnt(arm, adapter, options.scale)
        return _group().once(
            lambda: transfer(
                delta,
                self._spec(options.into),
                folder / "model",
                scale=scale,
                dtype=options.dtype,
                max_shard=options.max_shard,
                rounding=options.rounding,
                seed=arm.seed,
                base=trained_on,
                verify_rows=probes,
            )
        )

    def _learnt(self, arm: Recipe, adapter: Path, scale: float) -> tuple[Path | Delta, float]:
        """What is added to the receiving model at this scale, and the factor that is still to be applied."""
        from guidetune.models.checkpoint import Checkpoint
        from guidetune.weightspace.merged import Merged, added
        from guidetune.weightspace.sources import Delta
        from guidetune.weightspace.stages import Preset

        assert arm.tune is not None and arm.transfer is not None
        trained_on, into = self._spec(arm.tune.on), self._spec(arm.transfer.into)
        # a fully tuned model is a folder of its own; what it learnt is its difference to where it started
        lora = (adapter / "adapter_config.json").is_file()
        if arm.transfer.into_scale == 1 and arm.transfer.method is None:
            return (adapter if lora else Delta.difference(adapter, trained_on)), scale
        learnt = Delta.adapter(adapter, trained_on) if lora else Delta.difference(adapter, trained_on)
        if (method := arm.transfer.method) is not None:
            assert isinstance(method, Preset)
            return Merged(method, [(1.0, learnt)], Checkpoint(self._resolve(arm.transfer.into).path), arm.seed), scale
        # base + a (into - base) + s learnt = into + (a - 1) (into - base) + s learnt
        return added([(scale, learnt), (arm.transfer.into_scale - 1, Delta.difference(into, trained_on))], into), 1.0

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def _plan(self, arm: Recipe, group: str) -> list[Planned]:
        from guidetune.evaluation.evaluate import plan

        assert arm.evaluate is not None
        key = fingerprint([group, arm.evaluate.model_dump(mode="json")])
        if key not in self._plans:
            self._plans[key] = plan(getattr(arm.evaluate, group), _eval_settings(arm.evaluate, arm.seed), arm.root)
        return self._plans[key]

    def evaluate(self, arm: Recipe, spec: str | Path, out: Path) -> dict[str, Any]:
        """`{"task": {...}, "general": {...}}` of one model."""
        from guidetune.evaluation.evaluate import evaluate
        from guidetune.models.handle import open_handle

        if arm.evaluate is None:
            return {"task": {}, "general": {}}
        group = _group()
        handle = group.agreed(lambda: open_handle(spec, device=group.loading_device))
        settings = _eval_settings(arm.evaluate, arm.seed).model_copy(update={"batch_tokens": self._evaluate_tokens(arm)})
        try:
            group.place(handle.model)
            # of the untouched model once for all runs beside this one
            store = self.out.parent / ".store" if arm.tune is None else None
            found = {kind: evaluate(handle, self._plan(arm, kind), out / kind, settings, arm.root, store) for kind in ("task", "general")}
        finally:
            _release(handle)
        return {**found, "fingerprint": handle.fingerprint}

    # -- an arm -------------------------------------------------------------------------------------------------------

    def place(self, name: str, repeat: int = 0) -> Path:
        """The folder of an arm, or of its repetition with another seed."""
        own = self.out if self.kind == "run" and name != REFERENCE else self.out / "arms" / name
        return own / "seeds" / str(repeat) if repeat else own

    @_tracked
    def arm(self, name: str, arm: Recipe, repeat: int = 0, how: _How | None = None) -> dict[str, Any]:
        """One arm through its stages; `repeat` > 0 is the same arm with another seed. A sweep over scales adds `scales` to its results."""
        folder = self.place(name, repeat)
        say(
            f"arm {name}" + (f", seed {arm.tune.seed}" if repeat and arm.tune else "") + (f": {arm.description}" if arm.description else "")
        )
        entry: dict[str, Any] = {"status": "ok", "error": None, "description": arm.description, "cost": {}, "paths": {}}
        entry["recipe"] = arm.model_dump(mode="json", exclude={"arms"})
        cost: dict[str, Any] = entry["cost"]
        model: str | Path = self._spec("instruct")
        if arm.tune is not None:
            tuned, spent = self.tune(arm, folder)
            result = dict(tuned.result)
            entry["signal"] = result.pop("signal", [])
            phases = result.pop("phases", None)
            entry["tune"] = result
            cost.update(spent, tune_s=tuned.seconds, tokens=result["tokens"], steps=result["steps"], peak_rss_mb=result["peak_rss_mb"])
            entry["paths"] |= {"adapter": self._relative(tuned.path), "metrics": self._relative(folder / "metrics.jsonl")}
            model = tuned.path
            if arm.transfer is not None:
                moved = self.transfer(arm, tuned.path, folder)
                entry["transfer"] = {k: v for k, v in moved.result.items() if k != "tensors"}
                entry["paths"]["model"] = self._relative(moved.path)
                cost["transfer_s"] = moved.seconds
                model = moved.path
        start = time.monotonic()
        scores = self.evaluate(arm, model, folder / "evaluation")
        cost["evaluate_s"] = round(sum(t.get("cost", {}).get("seconds", 0.0) for g in ("task", "general") for t in scores[g].values()), 3)
        cost["evaluate_wall_s"] = round(time.monotonic() - start, 3)
        entry |= scores
        entry["paths"]["evaluation"] = self._relative(folder / "evaluation")
        for group in ("task", "general"):
            entry[f"{group}_mean"] = _mean([t["score"] for t in scores[group].values() if t.get("higher_is_better", True)])
        if arm.tune is not None and phases is not None:
            entry["phases"] = self._after_phases(arm, phases, folder, entry)
        if how is not None and how.scales and arm.evaluate is not None:
            start = time.monotonic()
            entry["scales"] = self._sweep(name, arm, tuned.path if arm.tune is not None else None, folder, entry, how)
            cost["scales_s"] = round(time.monotonic() - start, 3)
        return entry

    def _after_phases(self, arm: Recipe, phases: list[dict[str, Any]], folder: Path, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The phases with the scores of the model after each; those of the last one are the arm's own."""
        assert arm.tune is not None and arm.tune.phases is not None
        if arm.evaluate is None:
            return phases
        planned = {group: self._plan(arm, group) for group in ("task", "general")}
        scored = []
        for place, phase in enumerate(phases, 1):
            found: Mapping[str, Any] | None = entry if place == len(phases) else None
            if found is None and arm.tune.phases.evaluate:
                own = folder / "phases" / str(place)
                say(f"after phase {place}", level=1)
                if arm.transfer is not None:
                    with self._merged(arm, own / "adapter", folder) as at:
                        found = self._scores(arm, at(arm.transfer.scale), planned, own / "evaluation")
                else:
                    found = self.evaluate(arm, own / "adapter", own / "evaluation")
            means = {}
            for group in ("task", "general") if found is not None else ():
                results = found[group]  # type: ignore[index]
                means[group] = {label: result["score"] for label, result in results.items()}
                means[f"{group}_mean"] = _mean([r["score"] for r in results.values() if r.get("higher_is_better", True)])
            scored.append({**phase, **means})
        return scored

    # -- scales -------------------------------------------------------------------------------------------------------

    def _sweep_plan(self, arm: Recipe, how: _How) -> Sweep:
        from guidetune.comparison.scales import Selection, plan_sweep
        from guidetune.evaluation.evaluate import plan

        if arm.evaluate is None:
            raise BadInput("--scales: the recipe has no evaluate section to pick a scale by")
        settings = _eval_settings(arm.evaluate, arm.seed)
        test = {group: self._plan(arm, group) for group in ("task", "general")}
        separate = {group: plan(getattr(arm.evaluate.validation, group), settings, arm.root) for group in ("task", "general")}
        return plan_sweep(test, separate, how.selection or Selection(), arm.seed)

    def _sweep(
        self, name: str, arm: Recipe, adapter: Path | None, folder: Path, entry: Mapping[str, Any], how: _How
    ) -> dict[str, Any] | None:
        """What was learnt, merged at each scale and evaluated; of the untouched model only the validation tasks, where there are some."""
        from guidetune.comparison.scales import Point, report
        from guidetune.models.handle import open_handle

        sweep = self._sweep_plan(arm, how)
        own = Path(entry["paths"]["evaluation"])
        untouched = self.out / "arms" / REFERENCE
        if adapter is None:
            if sweep.separate is not None and name == REFERENCE:
                handle = _group().agreed(lambda: open_handle(self._spec("instruct"), device=_group().loading_device))
                _group().place(handle.model)
                self._scores(arm, handle, sweep.separate, untouched / "validation")
                _release(handle)
            return None
        if arm.transfer is None:
            say(f"note: arm {name} is not moved to a model, so it has no scale to change")
            return None
        known: dict[float, tuple[Mapping[str, Any], Path]] = {arm.transfer.scale: (entry, self.out / own)}
        group = _group()
        start = held = None
        if how.reference and arm.transfer.into == "instruct" and arm.transfer.into_scale == 1:  # scale 0 is the untouched model
            start = group.once(lambda: self._finished_scores(sweep.test, untouched / "evaluation"))
            held = group.once(lambda: self._finished_scores(sweep.separate or {}, untouched / "validation"))
        if start is not None:
            known[0.0] = (start, untouched / "evaluation")
        points = []
        with self._merged(arm, adapter, folder) as at:
            for scale in sorted({0.0, *how.scales}):
                say(f"arm {name}: scale {scale:g}", level=1)
                place = folder / "scales" / f"{scale:g}"
                found, where = known.get(scale) or (self._scores(arm, at(scale), sweep.test, place), place)
                point = Point(scale, found, where)
                if sweep.separate is not None:
                    of_start = held if scale == 0 else None
                    point.validation = of_start or self._scores(arm, at(scale), sweep.separate, place / "validation")
                points.append(point)
        samples = arm.evaluate.samples if arm.evaluate is not None else 1
        return group.once(lambda: report(sweep, points, name, samples, arm.seed))

    @contextmanager
    def _merged(self, arm: Recipe, adapter: Path, folder: Path) -> Iterator[Callable[[float], Any]]:
        """A function that gives a model handle at a scale; the model is loaded at the first call, and its weights change with each.

        Where weights cannot be exchanged in memory (several processes share the model, the merge unties tensors, vLLM loads from disk)
        the model of a scale is written, and removed when the next one is asked for.
        """
        from guidetune.comparison import scales
        from guidetune.evaluation.engines import vllm_obstacle
        from guidetune.models.checkpoint import Checkpoint
        from guidetune.models.handle import open_handle
        from guidetune.weightspace.apply import make_plan, transfer
        from guidetune.weightspace.sources import Delta

        assert arm.tune is not None and arm.transfer is not None and arm.evaluate is not None
        options, into, base = arm.transfer, self._spec(arm.transfer.into), self._spec(arm.tune.on)
        group = _group()
        served = arm.evaluate.engine == "vllm" or (arm.evaluate.engine == "auto" and vllm_obstacle() is None)
        held: dict[str, Any] = {}
        written = folder / ".scaled"
        with ExitStack() as stack:
            target = stack.enter_context(Checkpoint(self._resolve(options.into).path))

            def planned(scale: float) -> Plan:
                learnt, factor = self._learnt(arm, adapter, scale)
                delta = learnt if isinstance(learnt, Delta) else Delta.adapter(learnt, base)
                stack.callback(delta.close)
                made = make_plan(delta, target, factor or 1.0, options.dtype, options.rounding, arm.seed)
                return scales.scaled(made, factor)

            in_memory = group.size == 1 and not served and not planned(1.0).untie

            def exchanged(scale: float) -> Any:
                if "handle" not in held:
                    dtype = options.dtype
                    held["handle"] = open_handle(into, dtype=dtype, device=group.loading_device)
                    held["handle"].folder = None  # what is on disk is another model
                    group.place(held["handle"].model)
                plan = planned(scale)
                scales.set_weights(held["handle"].model, plan)
                content = [self._fingerprint(options.into), plan.delta.describe(), scale, options.dtype, options.rounding, arm.seed]
                held["handle"].fingerprint = fingerprint(["scaled", *content])
                return held["handle"]

            def from_disk(scale: float) -> Any:
                _release(held.pop("handle", None))
                learnt, factor = self._learnt(arm, adapter, scale)
                done = group.once(
                    lambda: transfer(
                        learnt, into, written, scale=factor, dtype=options.dtype, rounding=options.rounding, seed=arm.seed, base=base
                    )
                )
                held["handle"] = group.agreed(lambda: open_handle(done.path, device=group.loading_device))
                group.place(held["handle"].model)
                return held["handle"]

            def at(scale: float) -> Any:
                if held.get("scale") != scale:
                    held["handle"] = exchanged(scale) if in_memory else from_disk(scale)
                    held["scale"] = scale
                return held["handle"]

            try:
                yield at
            finally:
                _release(held.pop("handle", None))
                group.once(lambda: shutil.rmtree(written, ignore_errors=True))

    def _scores(self, arm: Recipe, handle: ModelHandle, planned: Mapping[str, Sequence[Planned]], out: Path) -> dict[str, Any]:
        from guidetune.evaluation.evaluate import evaluate

        assert arm.evaluate is not None
        settings = _eval_settings(arm.evaluate, arm.seed).model_copy(update={"batch_tokens": self._evaluate_tokens(arm)})
        return {group: evaluate(handle, tasks, out / group, settings, arm.root) for group, tasks in planned.items()}

    @staticmethod
    def _finished_scores(planned: Mapping[str, Sequence[Planned]], out: Path) -> dict[str, dict[str, Any]] | None:
        """Results that an arm of this run has left, as `evaluate` gives them; None when some are missing."""
        from guidetune.evaluation.evaluate import finished_results

        found = {group: finished_results(tasks, out / group) for group, tasks in planned.items()}
        return None if None in found.values() else found  # type: ignore[return-value]

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self.out)

    # -- the results file ---------------------------------------------------------------------------------------------

    def opening(self) -> dict[str, Any]:
        return {
            "name": self.recipe.name,
            "kind": self.kind,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "recipe": self.recipe.model_dump(mode="json"),
            "models": {"base": self.recipe.models.base, "instruct": self.recipe.models.instruct, "pair": self.pair},
            "arms": {},
        }

    def closing(self) -> dict[str, Any]:
        return {"guidance": self.guidance, "ledger": self.ledger, "versions": versions(), "machine": machine()}


# ---------------------------------------------------------------------------------------------------------------------
# Single stages, for their own verbs


def ordered(order: Mapping[str, Any]) -> dict[str, Any]:
    """One arm, as another process has ordered it (see `comparison.jobs`): its entry of results.json."""
    from guidetune.comparison.scales import Selection
    from guidetune.recipe import from_mapping

    root = Path(order["root"])
    job = _Job(from_mapping(order["shared"], root), Path(order["out"]), "compare", ordered=True)
    job._places = {key: Path(path) for key, path in order["places"].items()}
    job._folders = {key: Path(path) for key, path in order["folders"].items()}
    job._told = set(order["told"])
    job._limit = tuple(order["limit"]) if order["limit"] else None  # type: ignore[assignment]
    selection = Selection(**order["selection"]) if order["selection"] else None
    how = _How(scales=tuple(order["scales"]), selection=selection, reference=order["reference"])
    return job.arm(order["arm"], from_mapping(order["recipe"], root), order["repeat"], how=how)


def prepare_data(recipe: Recipe, out: Path | None = None) -> StageResult:
    """The prepare stage alone."""
    threads.settle()
    out = Path(out or Path("runs") / recipe.name)
    _check_place(out)
    path, _ = _Job(recipe, out, "run").prepare(recipe)
    return StageResult(path, True, finished(path) or {})


def guide(recipe: Recipe, out: Path | None = None, export: Path | None = None) -> str:
    """The teacher pass alone; returns a text with the confidence histogram. `export` writes the scores as JSON lines."""
    threads.settle()
    out = Path(out or Path("runs") / recipe.name)
    _check_place(out)
    job = _Job(recipe, out, "run")
    lines = []
    for teacher in _teachers(recipe) or [REFERENCE]:
        job.guidance = {}
        job.guide(recipe, teacher)
        folder = job._folders[f"guidance/{teacher}"]
        lines.append(histogram_text(job.guidance))
        if export is not None:
            from guidetune.guidance import export as export_scores

            target = export if len(_teachers(recipe)) <= 1 else export.with_name(f"{export.stem}.{_slug(teacher)}{export.suffix}")
            rows = job.prepare(recipe)[1]
            count = _group().once(lambda folder=folder, rows=rows, target=target: export_scores(folder, rows, target))
            lines.append(f"{count:,} rows written to {target}")
        lines.append(f"guidance: {folder}")
    return "\n".join(lines)


@_recorded
def evaluate_model(spec: str, section: Evaluate, out: Path) -> dict[str, Any]:
    """Score any model on the tasks of an evaluation section; results.json and the items go to `out`."""
    threads.settle()
    from guidetune.evaluation.evaluate import evaluate, plan
    from guidetune.models.handle import open_handle
    from guidetune.models.sources import resolve

    out = Path(out)
    _check_place(out)
    source = resolve(spec)
    settings = _eval_settings(section, 0)
    planned = plan([*section.task, *section.general], settings, Path.cwd())
    group = _group()
    if group.main:
        runs.started(out, "eval", out.name)
    handle = group.agreed(lambda: open_handle(source, device=group.loading_device))
    group.place(handle.model)
    results = evaluate(handle, planned, out, settings, Path.cwd())
    group.once(
        lambda: write_json(
            out / "results.json",
            {"model": spec, "fingerprint": handle.fingerprint, "tasks": results, "versions": versions(), "machine": machine()},
        )
    )
    return results


def score(recipe: Recipe, out: Path | None = None, export: Path | None = None) -> str:
    """Every score that the recipe names, and its phases, as a text with histograms. `export` writes `id` and scores as JSON lines."""
    import json

    from guidetune.artefacts import atomic_lines
    from guidetune.phases import table
    from guidetune.scorers import histogram, read

    threads.settle()
    out = Path(out or Path("runs") / recipe.name)
    _check_place(out)
    job = _Job(recipe, out, "run")
    names = list(_scorers(recipe))
    if not names:
        raise BadInput("the recipe names no score; add data: {scores: {name: scorer}}, such as {length: length}")
    lines: list[str] = []
    found = {}
    rows = job.prepare(recipe)[1]
    for name in names:
        done = job.score(recipe, name)
        found[name] = read(done.path, list(rows.ids))
        lines += [*histogram(name, done.result), f"scores: {done.path}"]
    if recipe.tune is not None and recipe.tune.phases is not None:
        for place, phase in enumerate(table(job.phases(recipe), rows), 1):
            spread = (
                ""
                if phase["score_low"] is None
                else f", scores {phase['score_low']:g} to {phase['score_high']:g}, mean {phase['score_mean']:.4g}"
            )
            lines.append(
                f"phase {place} ({phase['name']}): {phase['rows']:,} rows, {phase['supervised_tokens']:,} supervised tokens{spread}"
            )
    if export is not None:
        with atomic_lines(Path(export)) as write:
            for k, id in enumerate(rows.ids):
                write(json.dumps({"id": id, **{name: None if v[k] != v[k] else float(v[k]) for name, v in found.items()}}))
        lines.append(f"{len(rows):,} rows written to {export}")
    return "\n".join(lines)


def histogram_text(summary: Mapping[str, Any]) -> str:
    """The confidence of a teacher in the targets, as text."""
    counts = summary["histogram"]["counts"]
    edges = summary["histogram"]["edges"]
    most = max([*counts, 1])
    lines = [_confidence_line(summary)]
    for lo, hi, count in zip(edges[:-1], edges[1:], counts, strict=True):
        lines.append(f"  {lo:4.2f}–{hi:4.2f} {'█' * round(40 * count / most):<40} {count:>10,}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Small parts


def _group() -> Group:
    """The processes of this run; joined on the first call."""
    from guidetune.engine.distributed import current

    return current()


def _teachers(recipe: Recipe) -> list[str]:
    """Teachers of the token weights."""
    return list(dict.fromkeys(t for w in (recipe.tune.weights if recipe.tune else []) for t in w.teachers))


def _scorers(recipe: Recipe) -> dict[str, Any]:
    """Every score that the recipe names, and the one that its phases ask for."""
    phases: Any = recipe.tune.phases if recipe.tune else None
    asked = [phases.by] if phases is not None and phases.scored else []
    return {name: recipe.scorer(name) for name in dict.fromkeys([*recipe.data.scores, *asked])}


def _linked(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _whole_of(parts: Sequence[Mapping[str, Any]], phases: list[dict[str, Any]], seconds: Sequence[float]) -> dict[str, Any]:
    """What several runs of the training loop measured together; `phases` is what each was, with its own figures."""
    first, last = parts[0], parts[-1]
    whole = dict(last) | {name: sum(part[name] for part in parts) for name in ("steps", "tokens", "seconds", "weighted_loss")}
    whole |= {"loss_first": first["loss_first"], "peak_rss_mb": max(part["peak_rss_mb"] for part in parts), "validation": []}
    before = 0
    for place, (part, phase, spent) in enumerate(zip(parts, phases, seconds, strict=True)):
        # the model at the start of a phase is that at the end of the one before, which has been validated
        whole["validation"] += [{**v, "step": v["step"] + before} for v in part["validation"] if v["step"] or not place]
        before += part["steps"]
        phase |= {name: part[name] for name in ("loss_first", "loss_last", "tokens")} | {"seconds": spent}
    bins = list(zip(*(part["signal"] for part in parts), strict=True)) if all(part["signal"] for part in parts) else []
    shares = {"tokens": [part["tokens"] for part in parts], "signal": [part["weighted_loss"] for part in parts]}
    whole["signal"] = [
        {
            **{end: same[0][end] for end in ("lo", "hi")},
            **{name: sum(b[name] * w for b, w in zip(same, by, strict=True)) / max(sum(by), 1e-300) for name, by in shares.items()},
        }
        for same in bins
    ]
    return whole | {"phases": phases}


def _check_bits(arm: Recipe) -> None:
    """Raises BadInput when the machine cannot hold a model in the bits the recipe asks for."""
    from guidetune.engine.kernels import check_kernels
    from guidetune.models import quantized
    from guidetune.models.loading import pick_device

    if arm.guide.dtype == "int8" and _teachers(arm):
        quantized.check_int8(pick_device())
    if arm.tune is not None:
        check_kernels(arm.tune.kernels, pick_device())
    if arm.tune is not None and arm.tune.quantize != "none":
        quantized.check_bitsandbytes(pick_device(), f"tune.quantize: {arm.tune.quantize}")
        if not arm.tune.params.frozen_base:
            raise BadInput(
                f"tune.quantize: {arm.tune.quantize} needs a frozen base; params {arm.tune.params.name} trains the weights themselves"
            )


def _eval_settings(section: Evaluate, seed: int) -> EvalSettings:
    from guidetune.evaluation.evaluate import EvalSettings

    names = set(EvalSettings.model_fields) & set(type(section).model_fields)
    return EvalSettings(seed=seed, **{name: getattr(section, name) for name in names})


def _seed(seed: int, purpose: str) -> int:
    from guidetune.artefacts import derive_seed

    return derive_seed(seed, purpose)


def _slug(teacher: str) -> str:
    if teacher in ("base", "instruct"):
        return teacher
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(teacher).name)[:40].strip("-.") or "teacher"
    return f"{plain}-{fingerprint(teacher)[:8]}"


def _repeats(arms: Mapping[str, Recipe], found: Mapping[str, Mapping[str, Any]], seeds: int) -> Iterator[tuple[int, str, Recipe]]:
    """(k, arm, its recipe) of every further seed of the arms that tune and did not fail."""
    for k in range(1, seeds):
        for name, arm in arms.items():
            if arm.tune is not None and found[name]["status"] == "ok":
                yield k, name, _again(arm, k)


def _check_place(out: Path) -> None:
    """Make the run's folder and prove, on every rank, that it can be written to.

    Raises:
        BadInput: it cannot.
    """

    def refusing(work: Callable[[], None]) -> Callable[[], None]:
        def attempt() -> None:
            try:
                out.mkdir(parents=True, exist_ok=True)
                work()
            except OSError as error:
                raise BadInput(f"cannot write to {out}: {error.strerror or error}; choose another --out") from None

        return attempt

    def sweep() -> None:
        for torn in [*out.glob(".*.part"), *out.glob(".writable-*")]:  # what a kill left of an earlier run
            torn.unlink(missing_ok=True)

    def probe() -> None:
        descriptor, name = tempfile.mkstemp(prefix=".writable-", dir=out)
        try:
            os.write(descriptor, b"x")
        finally:
            os.close(descriptor)
            os.unlink(name)

    group = _group()
    group.once(refusing(sweep))  # one rank alone: it would take another's probe for something torn
    group.agreed(refusing(probe))


def _release(model: Any) -> None:
    """Teacher and student are never in memory together."""
    import gc

    if hasattr(model, "model") and hasattr(model, "chat"):
        model.model = None
    del model
    gc.collect()


def _report(out: Path, results: Mapping[str, Any]) -> None:
    from guidetune import report

    for name, entry in results["arms"].items():
        model = entry.get("paths", {}).get("model")
        if model:
            write_text_atomic(out / model / "README.md", report.model_card(results, name))
    report.write(out)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _over_seeds(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation (n − 1) of every score over the seeds that finished."""
    import statistics

    runs = [entry, *(s for s in entry["seeds"] if s["status"] == "ok")]

    def spread(values: list[float | None]) -> dict[str, Any]:
        known = [v for v in values if v is not None]
        return {"mean": _mean(known), "sd": statistics.stdev(known) if len(known) > 1 else None, "scores": known}

    out: dict[str, Any] = {"n": len(runs)}
    for group in ("task", "general"):
        out[group] = {label: spread([r[group].get(label, {}).get("score") for r in runs]) for label in entry[group]}
        out[f"{group}_mean"] = spread([r.get(f"{group}_mean") for r in runs])
    return out


def _say_ledger(done: StageResult) -> None:
    total = done.result
    dropped = sum(total.get("dropped", {}).values())
    text = (
        f"data: {total.get('read', 0):,} rows read, {total.get('used', 0):,} used, {total.get('cut', 0):,} of them cut, {dropped:,} dropped"
    )
    say(text + ("" if not dropped else " (" + ", ".join(f"{n:,} {why}" for why, n in total["dropped"].items()) + ")"))


def _confidence_line(summary: Mapping[str, Any]) -> str:
    return (
        f"teacher {summary['teacher']}: mean confidence {summary['mean_confidence']:.3f}"
        f" over {summary['supervised_tokens']:,} target tokens, {100 * summary['below_0.05']:.1f} % of them below 0.05"
    )


def _slug_of(name: str) -> str:
    """A name of the user's as the name of a folder."""
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)[:60].strip("-.")
    return plain if plain == name else f"{plain or 'score'}-{fingerprint(name)[:8]}"


def _say_score(name: str, done: StageResult) -> None:
    found = done.result
    spread = f"mean {found['mean']:.3g}, {found['low']:.3g} to {found['high']:.3g}" if "mean" in found else "none"
    missing = (
        f", {found['missing']:,} rows without ({', '.join(f'{n:,} {why}' for why, n in found['why'].items())})" if found["missing"] else ""
    )
    say(f"score {name}: {found['n'] - found['missing']:,} rows, {spread}{missing}")
    for note in found["notes"]:
        say(f"  {note}")


def _say_confidence(summary: Mapping[str, Any]) -> None:
    say(_confidence_line(summary))
    if summary["mean_confidence"] < LOW_CONFIDENCE or summary["below_0.05"] > MANY_LOW:
        say(
            "warning: the teacher knows little of this domain; guided weights will hold back what is new to it."
            " Compare with the arms sft and graft before you trust the result."
        )


def _peak_rss_mb() -> int:
    try:  # of this process alone: the resource module's figure begins at that of the process that started it
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024)
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024))


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version()}
    for name in ("guidetune", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "datasets", "math-verify"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def machine() -> dict[str, Any]:
    """What the run ran on."""
    import platform

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    found: dict[str, Any] = {"system": platform.platform(), "cpu": cpu, "cores": threads.available_cores(), "memory_gb": round(memory, 1)}
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found

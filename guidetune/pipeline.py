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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune import runs, threads
from guidetune.artefacts import StageResult, digest_file, fingerprint, finished, publish, read_json, stage, write_json, write_text_atomic
from guidetune.errors import BadInput, RunFailed
from guidetune.progress import say
from guidetune.registry import source_file

if TYPE_CHECKING:
    from guidetune.data.chat import Chat
    from guidetune.data.rows import EncodedRows
    from guidetune.engine.distributed import Group
    from guidetune.engine.settings import TuneSettings
    from guidetune.evaluation.evaluate import EvalSettings, Planned
    from guidetune.guidance import Guidance
    from guidetune.recipe import Evaluate, Recipe

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
    return _execute("run", recipe, arms, out, seeds=1)


def compare(recipe: Recipe, arms: Sequence[str], out: Path | None = None, seeds: int = 1) -> Path:
    """Several arms on equal data, budget and seeds, side by side; returns the run's folder.

    An arm that fails does not stop the others; the failure is in the results, and raised at the end.

    Raises:
        BadInput: before anything expensive has started, with every reason.
        RunFailed: some arm failed; the others' results and the report are there.
    """
    from guidetune.recipe import arms as arm_recipes

    out = Path(out or Path("runs") / recipe.name)
    return _execute("compare", recipe, arm_recipes(recipe, list(arms)), out, seeds)


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
def _execute(kind: str, recipe: Recipe, arms: Mapping[str, Recipe], out: Path, seeds: int) -> Path:
    threads.settle()
    began = time.monotonic()
    group = _group()
    _check_place(out)
    job = _Job(recipe, out, kind)
    job.check(arms)
    job.plan_memory(arms)
    group.once(lambda: write_text_atomic(out / "recipe.yaml", recipe.resolved_yaml()))
    if group.main:
        runs.started(out, kind, recipe.name)
    results = job.opening()
    failed: list[str] = []
    job.guide_first(arms)
    for name, arm in arms.items():
        if kind == "run":  # nothing else to save: the error is the user's to see as it is
            results["arms"][name] = job.arm(name, arm)
        else:
            results["arms"][name] = _try(lambda arm=arm, name=name: job.arm(name, arm), failed, name, arm)
    for k in range(1, seeds):
        for name, arm in arms.items():
            if arm.tune is not None and results["arms"][name]["status"] == "ok":
                again = arm.model_copy(update={"tune": arm.tune.model_copy(update={"seed": arm.tune.seed + k})})
                entry = _try(
                    lambda again=again, name=name, k=k: job.arm(name, again, k), failed, f"{name} (seed {arm.tune.seed + k})", again
                )
                results["arms"][name].setdefault("seeds", []).append({"seed": again.tune.seed, **entry})

    def close() -> None:
        job.compare_with_reference(results["arms"])
        for entry in results["arms"].values():
            if entry.get("seeds"):
                entry["over_seeds"] = _over_seeds(entry)
        results.update(job.closing())
        results["seconds"] = round(time.monotonic() - began, 1)
        write_json(out / "results.json", results)
        _report(out, results)

    group.once(close)
    if failed:
        raise RunFailed("\n".join([*failed, f"the other arms are in {out / 'report.html'}; the same command tries again"]))
    return out


def _try(work: Callable[[], dict[str, Any]], failed: list[str], name: str, arm: Recipe) -> dict[str, Any]:
    """The results of one arm, or the reason why it has none. Ctrl-C still stops everything."""
    from guidetune.engine.distributed import everywhere

    try:
        return work()
    except (BadInput, RunFailed, OSError, RuntimeError, ValueError, MemoryError) as error:
        if os.environ.get("GUIDETUNE_DEBUG") or not everywhere(error):
            raise
        text = str(error) or type(error).__name__
        failed.append(f"arm {name} failed: {text}")
        say(f"arm {name} failed: {text}")
        return {"status": "failed", "error": text, "description": arm.description, "task": {}, "general": {}, "cost": {}}


def _untuned(recipe: Recipe) -> Recipe:
    from guidetune.recipe import arms

    return arms(recipe, [REFERENCE])[REFERENCE]


# ---------------------------------------------------------------------------------------------------------------------
# The stages of one job


@dataclass
class _Job:
    """One run or comparison: what its arms share."""

    recipe: Recipe
    out: Path
    kind: str
    ledger: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)
    pair: dict[str, Any] = field(default_factory=dict)
    _chat: Chat | None = None
    _rows: dict[str, tuple[Path, EncodedRows]] = field(default_factory=dict)
    _plans: dict[str, list[Planned]] = field(default_factory=dict)
    _evaluated: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    _folders: dict[str, Path] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    _outlines: dict[str, Any] = field(default_factory=dict)

    # -- before anything expensive ------------------------------------------------------------------------------------

    def check(self, arms: Mapping[str, Recipe]) -> None:
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

    def _tune_settings(self, arm: Recipe) -> tuple[TuneSettings, dict[str, Any] | None]:
        """The arm's settings, changed where they would not fit, and the estimate."""
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
        if changes and (text := " and ".join(changes)) not in self._told:
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
        )
        key = fingerprint([split, [s.model_dump(mode="json") for s in specs], [o.spec() for o in data.operations], settings])
        if key not in self._rows:
            folder = self.out / ("data" if split == "train" else "validation")
            if any(known == folder for known, _ in self._rows.values()):
                folder = folder.with_name(f"{folder.name}-{key[:8]}")
            operations = data.operations if split == "train" else []
            group = _group()
            done = group.once(lambda: prepare(specs, operations, self.chat, settings, folder, arm.root))
            if split == "train" and group.main:
                if not self.ledger:
                    self.ledger = read_json(done.path / "ledger.json")
                _say_ledger(done)
                self._warn_of_leaks(done.path)
            # every process maps the file itself: rows are never sent
            self._rows[key] = (done.path, group.agreed(lambda: EncodedRows.open(done.path)))
        return self._rows[key]

    def _warn_of_leaks(self, folder: Path) -> None:
        """Say so when training rows have a prompt that the evaluation asks: scores on it would measure memory."""
        from guidetune.data.prepare import leaks

        asked = [m["content"] for items in self._plans.values() for p in items for i in p.items for m in i.messages if m["role"] == "user"]
        found = leaks(folder, asked)
        self.ledger["leaks"] = found.rows
        if found.rows:
            some = ", ".join(leak.id for leak in found.examples)
            say(f"warning: {found.rows:,} training rows have a prompt that the evaluation asks ({some}); take them out of one of the two")

    def _max_length(self, arm: Recipe) -> int:
        """The recipe's limit, or the model's context where that is shorter."""
        asked = arm.tune.max_length if arm.tune is not None else (arm.data.max_length or 2048)
        config = self._resolve("instruct").config
        context = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
        if context and asked > context:
            say(f"note: max_length {asked} is longer than the model's context; rows are held to {context} tokens", level=1)
            return int(context)
        return asked

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

        folder = self.out / "guidance" / _slug(teacher)
        shared = self.out.parent / ".store" / f"guide-{fingerprint(key)[:16]}"
        done = _group().follow(lambda build: _shared_stage(shared, folder, key, build), build)
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
        from guidetune.engine import Objective, fit, memory
        from guidetune.engine.distributed import full_state
        from guidetune.params import PROVENANCE

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
            "guidance": {t: self._fingerprint(t) for t in stores},
            "settings": {
                k: v for k, v in settings.model_dump().items() if k not in NOT_THE_RESULT or (reducer, k) == ("micro", "micro_tokens")
            },
            "dtype": dtype,
        }

        def build(work: Path) -> dict[str, Any]:
            model = self._load(tune.on, dtype, settings.quantize)
            try:
                tune.params.prepare(model, rows)
                attached = tune.params.attach(model, seed=_seed(settings.seed, "params"))
                objective = Objective(tune.weights, reducer, analysed, frozenset(self.chat.stop_token_ids))
                with memory.sparing(bool(estimate and estimate["frugal"])):
                    result = fit(attached, rows, settings, objective, work=work, metrics=folder / "metrics.jsonl", validation=validation)
                origin = {"base": self._spec(tune.on), "base_fingerprint": self._fingerprint(tune.on), "method": "guidetune", "tune": key}
                state = full_state(attached.model) if not tune.params.frozen_base else None

                def save() -> None:
                    attached.save(work, state) if state is not None else attached.save(work)
                    write_json(work / PROVENANCE, origin)
                    (work / "checkpoint.safetensors").unlink(missing_ok=True)

                group.once(save)
                return {**result.as_dict(), "peak_rss_mb": _peak_rss_mb(), "memory_estimate": estimate}
            finally:
                _release(model)

        folder.mkdir(parents=True, exist_ok=True)
        group = _group()
        done = group.follow(lambda build: stage(folder / "adapter", key, build), build)
        return done, {"guide_s": sum(read_json(self._folders[f"guidance/{t}"] / "manifest.json")["seconds"] for t in stores)}

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
        from guidetune.weightspace.sources import Delta

        assert arm.tune is not None and arm.transfer is not None
        options = arm.transfer
        trained_on = self._spec(arm.tune.on)
        _, rows = self.prepare(arm)
        probes = [rows[i].input_ids.tolist() for i in range(min(8, len(rows)))]
        # a fully tuned model is a folder of its own; what it learnt is its difference to where it started
        delta = adapter if (adapter / "adapter_config.json").is_file() else Delta.difference(adapter, trained_on)
        return _group().once(
            lambda: transfer(
                delta,
                self._spec(options.into),
                folder / "model",
                scale=options.scale,
                dtype=options.dtype,
                max_shard=options.max_shard,
                rounding=options.rounding,
                seed=arm.seed,
                base=trained_on,
                verify_rows=probes,
            )
        )

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
            found = {kind: evaluate(handle, self._plan(arm, kind), out / kind, settings, arm.root) for kind in ("task", "general")}
        finally:
            _release(handle)
        return {**found, "fingerprint": handle.fingerprint}

    # -- an arm -------------------------------------------------------------------------------------------------------

    def place(self, name: str, repeat: int = 0) -> Path:
        """The folder of an arm, or of its repetition with another seed."""
        own = self.out if self.kind == "run" and name != REFERENCE else self.out / "arms" / name
        return own / "seeds" / str(repeat) if repeat else own

    @_tracked
    def arm(self, name: str, arm: Recipe, repeat: int = 0) -> dict[str, Any]:
        """One arm through its stages; `repeat` > 0 is the same arm with another seed."""
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
        return entry

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self.out)

    def compare_with_reference(self, arms: dict[str, dict[str, Any]]) -> None:
        """Paired tests, item by item, of every arm (and every seed of it) against the untouched instruct model."""
        from guidetune.evaluation.evaluate import paired_results

        reference = arms.get(REFERENCE)
        if not reference or reference["status"] != "ok":
            return
        everyone = [(n, e) for n, e in arms.items() if n != REFERENCE] + [(n, s) for n, e in arms.items() for s in e.get("seeds", [])]
        for _, entry in everyone:
            if entry["status"] != "ok":
                continue
            for group in ("task", "general"):
                for label, result in entry[group].items():
                    other = reference[group].get(label)
                    if other is None:
                        continue
                    places = [self.out / e["paths"]["evaluation"] / group for e in (entry, reference)]
                    try:
                        result["vs_instruct"] = paired_results(places[0], result, places[1], other)
                    except BadInput as error:
                        say(f"note: {label}: {error}")

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
    return list(dict.fromkeys(t for w in (recipe.tune.weights if recipe.tune else []) for t in w.teachers))


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


def _shared_stage(shared: Path, folder: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> StageResult:
    """A stage kept in a store beside the runs, so that other runs find it, and shown in this run's folder."""
    manifest = finished(folder, key)
    if manifest is not None:
        return StageResult(folder, True, manifest)
    done = stage(shared, key, build)
    work = folder.with_name(f".{folder.name}.partial")
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    for file in done.path.iterdir():
        try:
            os.link(file, work / file.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, work / file.name)
    publish(work, folder)
    return StageResult(folder, done.reused, done.manifest)


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

"""evaluate(): put tasks to a model and keep every item's result.

Each task is one artefact folder `<out>/<label>/` with `items.jsonl` (one line per item) and a manifest; it is reused when model,
chat template, items, options and code are the same. Results under other settings are kept in `<out>/.earlier`. A killed evaluation goes
on from the items it had finished.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from guidetune.artefacts import StageResult, derive_seed, digest_file, fingerprint, finished, shared_stage, stage, write_text_atomic
from guidetune.engine.distributed import current
from guidetune.errors import BadInput, RunFailed
from guidetune.evaluation.results import judge, summarise
from guidetune.evaluation.statistics import paired
from guidetune.evaluation.task import Item, Output, Task, TaskContext
from guidetune.progress import Bar, progress
from guidetune.registry import own_fault, source_file

if TYPE_CHECKING:
    from guidetune.evaluation.engines import Engine, Generate
    from guidetune.evaluation.scoring import Continuation
    from guidetune.models.handle import ModelHandle

ITEMS = "items.jsonl"
OUTPUTS = "outputs.jsonl"
EARLIER = ".earlier"  # results of a task under other settings


class EvalSettings(BaseModel):
    """How every task of an evaluation is run. A task's own `limit` and `max_new_tokens` come first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_tokens: PositiveInt = Field(16384, description="Rows x tokens of one batch, new tokens included; changes speed and memory only.")
    max_new_tokens: PositiveInt | None = Field(None, description="Longest generated answer (default: the task's).")
    samples: PositiveInt = Field(1, description="Generated answers per item; above 1 the score is Avg@k, with pass@k and maj@k.")
    temperature: NonNegativeFloat = Field(0.0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability.")
    top_k: NonNegativeInt = Field(0, description="Sample from this many likeliest tokens; 0: all.")
    seed: NonNegativeInt = Field(0, description="Seed of samples, of item limits and of bootstrap intervals.")
    limit: PositiveInt | None = Field(None, description="At most this many items per task, drawn by the seed.")
    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="What generates; auto: vLLM where it is installed and there is a GPU, else hf."
    )
    allow_code: bool = Field(False, description="Tasks may run programs that the model wrote, in a sandbox.")

    @model_validator(mode="after")
    def _samples_differ(self) -> EvalSettings:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples = {self.samples} would all be the same at temperature 0; set temperature, e.g. 1.0")
        return self


@dataclass(frozen=True)
class Planned:
    """A task with its label and the items it will put."""

    label: str
    task: Task
    items: tuple[Item, ...]


def plan(tasks: Sequence[Task], settings: EvalSettings | None = None, root: Path = Path(".")) -> list[Planned]:
    """Read the items of all tasks, without a model: call it before anything expensive starts.

    Raises:
        BadInput: labels that clash, files that cannot be read, rows that do not fit; all of them at once.
    """
    settings = settings or EvalSettings()
    problems: list[str] = []
    found: list[Planned] = []
    for task in tasks:
        label = task.label or task.default_label()
        if not label.strip(". ") or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in label):
            problems.append(f"task label {label!r} cannot be a file name; give another label")
            continue
        if any(other.label == label for other in found):
            problems.append(f"two tasks are called {label!r}; give one of them a label")
            continue
        if task.runs_code and not settings.allow_code:
            problems.append(f"task {label} runs programs that the model wrote; allow it with --allow-code, or evaluate.allow_code: true")
            continue
        try:
            items = _limited(task.items(TaskContext(Path(root))), task.limit or settings.limit, settings.seed)
            if task.origin is not None and items:
                _rehearse(task, items[0])
        except BadInput as error:
            problems += error.problems
            continue
        except Exception as error:
            if task.origin is None:
                raise
            problems.append(own_fault(task.origin, f"task {label} fails before the model has said anything", error))
            continue
        if not items:
            problems.append(f"task {label} has no items")
        common = Counter(item.id for item in items).most_common(1)
        if common and common[0][1] > 1:
            problems.append(f"task {label}: {common[0][1]} items have the id {common[0][0]!r}; name a column of unique ids, or none")
        found.append(Planned(label, task, tuple(items)))
    if settings.engine == "vllm" and any(one.task.mode == "generate" for one in found):
        from guidetune.evaluation.engines import vllm_obstacle

        if (obstacle := vllm_obstacle()) is not None:
            problems.append(f"evaluate.engine: {obstacle}")
    if problems:
        raise BadInput(problems)
    return found


def _rehearse(task: Task, item: Item) -> None:
    """Judge one made-up output with a user's own task: its mistakes are told before the model runs."""
    loglik = tuple(-1.0 for _ in item.choices or ())
    made_up = {"generate": Output(text="x"), "loglik": Output(loglik=loglik, prior_loglik=loglik), "nll": Output(nll=1.0, tokens=1)}
    mode = getattr(task, "mode", None)
    if mode not in ANSWER:
        raise BadInput(f"{task.origin}: mode = {mode!r}: a task says how a model answers, by mode = {', '.join(map(repr, ANSWER))}")
    if mode not in made_up:
        return
    verdict = task.score(item, task.perfect(item) or made_up[mode])
    correct = verdict.get("correct") if isinstance(verdict, dict) else None
    if not isinstance(correct, (int, float)):
        raise BadInput(f"{task.origin}: score() gave {verdict!r}; it gives a mapping with a number `correct`")


def _limited(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    """`limit` items by a hash of (seed, id), in file order: files are often sorted, so their first rows are no fair sample."""
    if limit is None or len(items) <= limit:
        return items
    chosen = sorted(range(len(items)), key=lambda i: derive_seed(seed, "limit", items[i].id))[:limit]
    return [items[i] for i in sorted(chosen)]


def evaluate(
    handle: ModelHandle,
    tasks: Sequence[Task] | Sequence[Planned],
    out: Path,
    settings: EvalSettings | None = None,
    root: Path = Path("."),
    store: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every task on one model; `{label: TaskResult}`. Results are kept in `store` too, where there is one, for other runs to find.

    A TaskResult is `{"score", "ci": [lo, hi], "n", "metric", "higher_is_better", "metrics": {...}, "by": {"skill": {name: {"score", "n"}},
    ...}, "items": file relative to `out`, "cost": {"seconds", "tokens", "cut"}}`. The item file has one line per item: `id, prompt, output,
    reference, correct, meta` and what the task adds.

    Raises:
        BadInput: before the model is used: see `plan`; a chat task for a model without a chat template.
        RunFailed: the model gives no numbers, or one row does not fit into memory.
    """
    settings = settings or EvalSettings()
    plans = [task for task in tasks if isinstance(task, Planned)]
    if len(plans) != len(tasks):
        plans = plan(list(tasks), settings, root)  # type: ignore[arg-type]
    if handle.chat is None and (asked := [one.label for one in plans if any(item.messages for item in one.items)]):
        raise BadInput(f"{handle.spec} has no chat template, which {', '.join(asked)} need; give it the instruct model's template")
    from guidetune.evaluation.engines import choose, generator

    engine = choose(settings.engine if any(one.task.mode == "generate" for one in plans) else "hf", handle.folder is not None)
    with generator(handle, engine) as generate:
        return {one.label: _run(handle, one, Path(out), settings, engine, generate, store) for one in plans}


def _run(
    handle: ModelHandle, planned: Planned, out: Path, settings: EvalSettings, engine: Engine, generate: Generate, store: Path | None
) -> dict[str, Any]:
    task = planned.task
    samples = settings.samples if task.mode == "generate" else 1
    new_tokens = task.max_new_tokens or settings.max_new_tokens or task.default_new_tokens

    group = current()

    def build(work: Path) -> dict[str, Any]:
        store = _Store(work)
        group.exchange(None)  # all have read what is there before anyone adds to it
        total = len(planned.items) * samples
        with progress(f"evaluate {planned.label}", total=total, unit="items", done=len(store.done)) as bar:
            ANSWER[task.mode](handle, planned, settings, store, bar, new_tokens=new_tokens, generate=generate)
        return group.once(lambda: finish(work, store))

    def finish(work: Path, store: _Store) -> dict[str, Any]:
        store.gather()
        answers = [[store.done[item.id, sample] for sample in range(samples)] for item in planned.items]
        tokens = sum(output.tokens for outputs in answers for output in outputs)
        cut = sum(any(output.cut for output in outputs) for outputs in answers)
        verdicts = iter(task.scores([(item, output) for item, outputs in zip(planned.items, answers, strict=True) for output in outputs]))
        lines = [
            judge(task, item, outputs, [next(verdicts) for _ in outputs]) for item, outputs in zip(planned.items, answers, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        write_text_atomic(work / ITEMS, text)
        store.remove()
        return {**summarise(task, lines, samples, settings.seed), "cost": {"tokens": tokens, "cut": cut}}

    key: dict[str, Any] = {
        "stage": "evaluate",
        "code": code_version(type(task)),
        "model": handle.fingerprint,
        "dtype": str(handle.model.dtype),
        "chat": handle.chat.digest if handle.chat is not None else None,
        "task": task.deciding(),
        "items": fingerprint([_content(item) for item in planned.items]),
        "seed": settings.seed,
    }
    if task.mode == "own":
        key |= {"new_tokens": task.max_new_tokens or settings.max_new_tokens, "outside": task.outside()}
    if task.mode == "generate":
        key |= {"new_tokens": new_tokens, "samples": samples, "temperature": settings.temperature}
        if settings.temperature > 0:
            key |= {"top_p": settings.top_p, "top_k": settings.top_k}
        if engine != "hf":
            key["engine"] = engine

    def lead(build: Callable[[Path], dict[str, Any]]) -> StageResult:
        if store is None:
            return stage(out / planned.label, key, build)
        return shared_stage(store / f"evaluate-{fingerprint(key)[:16]}", out / planned.label, key, build)

    group.once(lambda: _swap_in(out, planned.label, key))
    return _task_result(group.follow(lead, build))


def _task_result(done: StageResult) -> dict[str, Any]:
    return {**done.result, "items": f"{done.path.name}/{ITEMS}", "cost": {"seconds": done.seconds, **done.result["cost"]}}


def finished_results(planned: Sequence[Planned], out: Path) -> dict[str, dict[str, Any]] | None:
    """What `evaluate` gave for these tasks and left in `out`, without the model; None when a task is not there with all its items."""
    found = {}
    for one in planned:
        manifest = finished(out / one.label)
        if manifest is None or manifest["key"].get("items") != fingerprint([_content(item) for item in one.items]):
            return None
        found[one.label] = _task_result(StageResult(out / one.label, True, manifest))
    return found


def _swap_in(out: Path, label: str, key: dict[str, Any]) -> None:
    """Put a finished result of other settings aside, and bring back one of these: going to and fro between settings runs nothing twice."""
    folder, earlier, there = out / label, out / EARLIER, finished(out / label)
    back = earlier / f"{label}-{fingerprint(key)[:16]}"
    try:
        if there is not None and there["fingerprint"] != fingerprint(key):
            aside = earlier / f"{label}-{there['fingerprint'][:16]}"
            earlier.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        if not folder.exists() and finished(back, key) is not None:
            back.rename(folder)
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror or error}; choose another --out") from None


def _content(item: Item) -> list[Any]:
    content = [item.id, [dict(message) for message in item.messages], item.text, item.reference, item.choices, dict(item.meta)]
    return [*content, item.contexts, _content(item.prior) if item.prior is not None else None]


@cache
def code_version(task: type[Task]) -> str:
    """Digest of the files that decide a task's result: this package's modules and the task's own."""
    files = set(Path(__file__).parent.glob("*.py"))
    files |= {source_file(cls) for cls in task.__mro__ if issubclass(cls, Task)}
    return fingerprint(sorted(digest_file(file) for file in files))


class _Store:
    """Finished outputs of a running evaluation, one JSON line each; what a killed one had written is read back.

    Each of several processes writes a file of its own; all are read by all, whatever their number was.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.done: dict[tuple[str, int], Output] = {}
        rank = current().rank
        self.path = work / (OUTPUTS if rank == 0 else f"{OUTPUTS}.{rank}")
        self.gather()
        raw = self.path.read_bytes() if self.path.exists() else b""
        self._file = open(self.path, "wb")
        self._file.write(raw[: raw.rfind(b"\n") + 1])  # a kill may have cut the last line
        self._file.flush()

    def gather(self) -> None:
        """Read what all processes have written."""
        for path in sorted(self.work.glob(f"{OUTPUTS}*")):
            raw = path.read_bytes()
            for line in raw[: raw.rfind(b"\n") + 1].splitlines():
                row = json.loads(line)
                key = (row.pop("id"), row.pop("sample"))
                row |= {name: tuple(row[name]) for name in ("loglik", "prior_loglik") if row[name] is not None}
                row["windows"] = tuple((nll, count) for nll, count in row["windows"])
                row["responses"] = tuple(row["responses"])
                self.done[key] = Output(**row)

    def add(self, item: Item, output: Output, sample: int = 0) -> None:
        self.done[item.id, sample] = output
        self._file.write(json.dumps({"id": item.id, "sample": sample, **asdict(output)}).encode() + b"\n")
        self._file.flush()

    def remove(self) -> None:
        self._file.close()
        for path in self.work.glob(f"{OUTPUTS}*"):
            path.unlink()

    def open_items(self, items: Iterable[Item]) -> list[Item]:
        return [item for item in items if (item.id, 0) not in self.done]


def _generate(
    handle: ModelHandle, planned: Planned, settings: EvalSettings, store: _Store, bar: Bar, *, new_tokens: int, generate: Generate
) -> None:
    from guidetune.evaluation.generation import Sampling, context_length

    sampling = None
    if settings.temperature > 0:
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k)
    jobs = [(item, s) for item in planned.items for s in range(settings.samples) if (item.id, s) not in store.done]
    asked = list({item.id: item for item, _ in jobs}.values())
    prompts = dict(zip((item.id for item in asked), _prompts(handle, asked), strict=True))
    prompt_lengths = [float(len(prompts[item.id]) + new_tokens) for item, _ in jobs]
    jobs = current().share(jobs, prompt_lengths)

    def answer() -> None:
        completions = generate(
            [prompts[item.id] for item, _ in jobs],
            max_new_tokens=new_tokens,
            stop=_stops(handle),
            batch_tokens=settings.batch_tokens,
            sampling=sampling,
            seeds=[derive_seed(settings.seed, "sample", item.id, s) for item, s in jobs] if sampling else None,
            context=context_length(handle.model),
            tick=lambda rows, _: bar.advance(rows) if rows else None,
        )
        for place, completion in completions:
            item, sample = jobs[place]
            text = handle.tokenizer.decode(list(completion.tokens), skip_special_tokens=True)
            store.add(item, Output(text, len(completion.tokens), completion.finished, completion.cut), sample)

    group = current()
    answer() if group.lockstep else group.agreed(answer)


def _prompts(handle: ModelHandle, items: Sequence[Item]) -> list[list[int]]:
    if handle.chat is not None and all(item.messages for item in items):
        return handle.chat.prompts([item.messages for item in items])
    return [handle.tokenizer(item.text)["input_ids"] if item.text is not None else handle.chat.prompt(item.messages) for item in items]  # type: ignore[union-attr]


def _stops(handle: ModelHandle) -> list[int]:
    if handle.chat is not None:
        return handle.chat.stop_token_ids
    return [handle.tokenizer.eos_token_id] if handle.tokenizer.eos_token_id is not None else []


def _loglik(handle: ModelHandle, planned: Planned, settings: EvalSettings, store: _Store, bar: Bar, **_: Any) -> None:
    from guidetune.evaluation.generation import context_length
    from guidetune.evaluation.scoring import continuation_log_probs

    context = context_length(handle.model)
    for items in _slices(store.open_items(planned.items)):
        priors = [item.prior for item in items if item.prior is not None]
        documents, cuts = _fit(_continuations(handle, [*items, *priors]), context)
        scores = continuation_log_probs(handle.model, documents, batch_tokens=settings.batch_tokens, tick=lambda rows, _: bar.advance(rows))
        logliks = [tuple(sum(values) for values in choices) for choices in scores]
        of_priors = iter(logliks[len(items) :])
        for item, loglik, cut in zip(items, logliks, cuts, strict=False):
            prior = next(of_priors) if item.prior is not None else None
            _expect_numbers([*loglik, *(prior or ())], item)
            store.add(item, Output(loglik=loglik, prior_loglik=prior, cut=cut))


def _slices(items: list[Item], size: int = 1024) -> Iterable[list[Item]]:
    """Large enough to sort by length, small enough that a killed evaluation loses little."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _continuations(handle: ModelHandle, items: Sequence[Item]) -> list[list[Continuation]]:
    """Each item's choices as continuations: after the assistant header in a chat, after a space in plain text.

    Of an empty text (the prior of a plain question) the continuation is the choice after the space, predicted from BOS.
    """
    from guidetune.data.chat import Refused
    from guidetune.evaluation.scoring import Continuation

    documents: list[list[Continuation]] = []
    chats = [[*item.messages, {"role": "assistant", "content": choice}] for item in items if item.messages for choice in item.choices or ()]
    encoded = iter(handle.chat.encode_many(chats) if handle.chat is not None else ())
    contexts = {id(item): item.contexts or (item.text,) * len(item.choices or ()) for item in items if not item.messages}
    pairs = [
        (before, choice)
        for item in items
        if not item.messages
        for before, choice in zip(contexts[id(item)], item.choices or (), strict=True)
    ]
    texts = list(dict.fromkeys(text for before, choice in pairs for text in (before, f"{before} {choice}")))
    ids = dict(zip(texts, handle.tokenizer(texts)["input_ids"], strict=True)) if texts else {}  # one call: most of its cost is the call
    for item in items:
        document = []
        for place, choice in enumerate(item.choices or ()):
            if item.messages:
                row = next(encoded)
                if isinstance(row, Refused):
                    raise BadInput(f"task item {item.id}, choice {choice!r}: {row.reason}: {row.detail}")
                # The choice is what training would learn, without the stop token.
                end = max(i for i, target in enumerate(row.target) if target) + (0 if row.ends_with_stop else 1)
                document.append(Continuation(tuple(row.input_ids[:end]), row.prompt_length))
            else:
                context = contexts[id(item)][place]
                before, whole = ids[context], ids[f"{context} {choice}"]
                if not before:
                    start = _first_token(handle)
                    before, whole = [start], [start, *whole]
                document.append(Continuation(tuple(whole), min(len(before), len(whole) - 1)))
        documents.append(document)
    return documents


def _fit(documents: list[list[Continuation]], context: int | None) -> tuple[list[list[Continuation]], list[int]]:
    """Cut contexts that are too long from the middle; (documents, tokens cut from each)."""
    from guidetune.evaluation.generation import cut_middle
    from guidetune.evaluation.scoring import Continuation

    fitted, cuts = [], []
    for document in documents:
        room = max(1, context - max(len(choice.ids) - choice.start for choice in document)) if context is not None else None
        cut = 0
        kept = []
        for choice in document:
            if room is not None and choice.start > room:
                cut = choice.start - room
                choice = Continuation((*cut_middle(choice.ids[: choice.start], room), *choice.ids[choice.start :]), room)
            kept.append(choice)
        fitted.append(kept)
        cuts.append(cut)
    return fitted, cuts


def _first_token(handle: ModelHandle) -> int:
    for token in (handle.tokenizer.bos_token_id, handle.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BadInput(f"the tokenizer of {handle.spec} has neither BOS nor EOS, so nothing can predict the first token of a text")


def _nll(handle: ModelHandle, planned: Planned, settings: EvalSettings, store: _Store, bar: Bar, **_: Any) -> None:
    from guidetune.evaluation.generation import context_length
    from guidetune.evaluation.scoring import target_log_probs

    context = context_length(handle.model)
    for items in _slices(store.open_items(planned.items)):
        rows: list[list[int]] = []
        targets: list[list[int]] = []
        owners: list[tuple[int, int]] = []  # item, tokens cut
        for place, item in enumerate(items):
            for row, wanted, cut in _nll_rows(handle, planned.task, item, context):
                rows.append(row)
                targets.append(wanted)
                owners.append((place, cut))
        scores = target_log_probs(handle.model, rows, targets, batch_tokens=settings.batch_tokens)
        parts: list[list[tuple[float, int]]] = [[] for _ in items]
        cuts = [0] * len(items)
        for (place, cut), values in zip(owners, scores, strict=True):
            parts[place].append((-sum(values), len(values)))
            cuts[place] += cut
        for item, windows, cut in zip(items, parts, cuts, strict=True):
            nll, tokens = sum(nll for nll, _ in windows), sum(count for _, count in windows)
            _expect_numbers([nll], item)
            store.add(item, Output(nll=nll, tokens=tokens, cut=cut, windows=tuple(windows) if len(windows) > 1 else ()))
        bar.advance(len(items))


def _nll_rows(handle: ModelHandle, task: Task, item: Item, context: int | None) -> Iterable[tuple[list[int], list[int], int]]:
    """(ids, target positions, tokens cut) of an item: one row of a conversation, or the windows of a text."""
    from guidetune.data.chat import Refused
    from guidetune.evaluation.scoring import rolling_windows

    if item.text is not None:
        length = getattr(task, "window", None) or context or 2048
        tokens = handle.tokenizer(item.text, add_special_tokens=False, verbose=False)["input_ids"]
        if not tokens:
            raise BadInput(f"task item {item.id} has no tokens")
        for ids, scored in rolling_windows(tokens, _first_token(handle), min(length, context or length)):
            yield ids, list(range(len(ids) - scored, len(ids))), 0
        return
    assert handle.chat is not None
    row = handle.chat.encode(item.messages)
    length = min(getattr(task, "max_length", None) or context or len(row.input_ids), context or len(row.input_ids))
    fitted = handle.chat.cut(item.messages, row, length, cut_answer=True)
    if isinstance(fitted, Refused):
        raise BadInput(f"task item {item.id}: {fitted.reason}: {fitted.detail}; raise max_length")
    encoded, cut = fitted
    yield encoded.input_ids, [place for place, target in enumerate(encoded.target) if target], cut


def _own(handle: ModelHandle, planned: Planned, settings: EvalSettings, store: _Store, bar: Bar, **_: Any) -> None:
    for item, output in planned.task.respond(handle, store.open_items(planned.items), settings):
        _expect_numbers([*(output.loglik or ()), *([] if output.nll is None else [output.nll])], item)
        store.add(item, output)
        bar.advance(1)
    current().exchange(None)  # rank 0 reads what all have written


def _expect_numbers(values: Iterable[float], item: Item) -> None:
    if any(value != value for value in values):
        raise RunFailed(f"the model's log-probabilities on item {item.id} are not numbers (NaN): its weights are damaged")


# How a model answers, by the task's mode.
ANSWER: dict[str, Callable[..., None]] = {"generate": _generate, "loglik": _loglik, "nll": _nll, "own": _own}


def read_items(out: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The item lines of a TaskResult that was written below `out`."""
    # not splitlines(): an answer may hold U+2028 and its like, which JSON leaves as they are
    return [json.loads(line) for line in (Path(out) / result["items"]).read_text(encoding="utf-8").split("\n") if line]


def paired_results(a_out: Path, a: dict[str, Any], b_out: Path, b: dict[str, Any]) -> dict[str, Any]:
    """`statistics.paired` of two TaskResults of the same task, items matched by id; per-token results are weighted by tokens.

    `diff` is in the unit of the score (for perplexity: of `nll_per_token`).

    Raises:
        BadInput: the two were not evaluated on the same items.
    """
    left = {line["id"]: line for line in read_items(a_out, a)}
    right = {line["id"]: line for line in read_items(b_out, b)}
    if left.keys() != right.keys() or a["metric"] != b["metric"]:
        raise BadInput(f"{a['items']} and {b['items']} are not results of the same items; evaluate both with the same tasks and settings")
    x = [left[key]["correct"] for key in left]
    y = [right[key]["correct"] for key in left]
    weights = [left[key]["tokens"] for key in left] if "nll" in next(iter(left.values())) else None
    return paired(x, y, weights, a["higher_is_better"])

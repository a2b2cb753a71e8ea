"""Any task of lm-evaluation-harness, on our models and into our results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import AliasChoices, Field, NonNegativeInt, PrivateAttr

from guidetune.artefacts import digest_file
from guidetune.errors import BadInput
from guidetune.evaluation.task import Item, Output, Task, TaskContext
from guidetune.registry import method, nearest

if TYPE_CHECKING:
    from guidetune.evaluation.evaluate import EvalSettings
    from guidetune.models.handle import ModelHandle

# From the mean of -ll / weight to the score, for metrics whose values are (log-likelihood, weight).
PER_WEIGHT = {"word_perplexity": exp, "byte_perplexity": exp, "bits_per_byte": lambda nats: nats / log(2)}


@method(kind="task", name="lm_eval", summary="A task of lm-evaluation-harness by its name (extra `eval`).")
class LmEval(Task):
    """Prompts, few-shot examples, filters and metrics are lm-eval's, so scores equal its own; scoring and generation are ours.

    The results are kept item by item like those of any task, so that paired tests work. Of a group every item counts the same and
    `category` is its task. The score must be a metric that is a mean over items (or a perplexity); what a task only gives for the whole
    corpus (BLEU, F1) stands beside it. A folder's `!function` code is run when its task is loaded: use folders that you trust.
    """

    mode: ClassVar[str] = "own"
    shorthand: ClassVar[str] = "task"

    task: str = Field(min_length=1, description="Name of a task, group or tag.")
    folder: str | None = Field(None, description="Folder of task files (YAML); null: the tasks that come with lm-eval.")
    best_by: str | None = Field(
        None,
        validation_alias=AliasChoices("best_by", "metric"),
        description="Metric that is the main score; `metric` is another name for it (default: the task's first that can be).",
    )
    filter: str | None = Field(None, description="Answer filter whose metrics count (default: the task's first).")
    shots: NonNegativeInt | None = Field(None, description="Few-shot examples (default: the task's own number).")
    chat: bool = Field(False, description="Ask through the model's chat template, examples as turns; lm-eval's default is plain text.")
    system: str | None = Field(None, description="System message, with chat; before the prompt without.")
    allow_code: bool = Field(False, description="Permit tasks that run code which the model wrote, in this process.")

    _tasks: dict[str, Any] = PrivateAttr(default_factory=dict)
    _better: bool = PrivateAttr(True)

    @property
    def metric(self) -> str:
        return self.best_by or "score"

    @property
    def higher_is_better(self) -> bool:
        return self._better

    def default_label(self) -> str:
        return self.task

    def scale(self, mean: float) -> float:
        return PER_WEIGHT[self.metric](mean) if self.metric in PER_WEIGHT else mean

    def outside(self) -> Any:
        found: dict[str, Any] = {}
        try:
            found["lm_eval"] = version("lm_eval")
        except PackageNotFoundError:
            pass
        if self.folder is not None and Path(self.folder).is_dir():
            files = sorted(path for path in Path(self.folder).rglob("*") if path.suffix in (".py", ".yaml", ".yml") and path.is_file())
            found["files"] = [digest_file(path) for path in files]
        return found

    def items(self, ctx: TaskContext) -> list[Item]:
        if find_spec("lm_eval") is None:
            raise BadInput("task lm_eval: the package lm_eval is not installed; pip install 'guidetune[eval]'")
        from guidetune.evaluation import harness

        folder = None
        if self.folder is not None:
            places = [(ctx.root / Path(self.folder).expanduser()).resolve(), Path(self.folder).expanduser().resolve()]
            folder = next((place for place in places if place.is_dir()), None)
            if folder is None:
                raise BadInput(
                    f"task {self.task}: there is no folder {self.folder!r}: looked for {' and '.join(map(str, dict.fromkeys(places)))}"
                )
            object.__setattr__(self, "folder", str(folder))
        if not self._tasks:
            self._tasks.update(harness.load(self.task, folder, self.shots))
        problems = [
            f"task {name} runs code that the model wrote, in this process; set allow_code: true if you accept that"
            for name, task in self._tasks.items()
            if getattr(task, "UNSAFE_CODE", False) and not self.allow_code
        ]
        problems += [f"task {name} is not about text" for name, task in self._tasks.items() if getattr(task, "MULTIMODAL", False)]
        if problems:
            raise BadInput(problems)
        self._choose_metric()
        found = []
        for name, task in self._tasks.items():
            for number, requests in harness.requests(task, system=self.system).items():
                doc, first = requests[0].doc, requests[0]
                meta: dict[str, Any] = {"category": name} if len(self._tasks) > 1 else {}
                if first.request_type == "generate_until":
                    meta["generation"] = harness.plain(first.args[1])
                found.append(
                    Item(
                        f"{name}/{number}" if len(self._tasks) > 1 else str(number),
                        text=first.args[0],
                        reference=harness.plain(task.doc_to_target(doc)),
                        choices=tuple(one.args[1] for one in requests) if first.request_type == "loglikelihood" else None,
                        meta=meta,
                        payload=(name, number, doc, requests),
                    )
                )
        return found

    def _choose_metric(self) -> None:
        """The metric that is the score.

        Raises:
            BadInput: there is none of this name, or none that is a mean over items.
        """
        from guidetune.evaluation import harness

        first = next(iter(self._tasks.values()))
        known = [name for name in first.aggregation() if all(name in task.aggregation() for task in self._tasks.values())]
        fit = [name for name in known if name in PER_WEIGHT or all(harness.is_mean(task, name) for task in self._tasks.values())]
        given = self.best_by
        if given is not None and given not in known:
            raise BadInput(f"task {self.task} has no metric {given!r}{nearest(given, known)}")
        if given is not None and given not in fit:
            raise BadInput(f"task {self.task}: {given} is no mean over items, so it cannot be the score{nearest('', fit)}")
        if not fit:
            raise BadInput(f"task {self.task} has only metrics of the whole corpus ({', '.join(known)}), and no score for each item")
        if given is None:
            object.__setattr__(self, "best_by", fit[0])
        self._better = bool(first.higher_is_better().get(self.metric, True))

    def respond(self, handle: ModelHandle, items: Sequence[Item], settings: EvalSettings) -> Iterator[tuple[Item, Output]]:
        from guidetune.engine.distributed import current
        from guidetune.evaluation import harness

        if self.chat and handle.chat is None:
            raise BadInput(f"task {self.task}: {handle.spec} has no chat template; set chat: false")
        model = harness.OurModel(
            handle,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
            chat=self.chat,
            max_new_tokens=self.max_new_tokens or settings.max_new_tokens,
        )
        asked = {name: harness.requests(task, model, self.system) for name, task in self._tasks.items()} if self.chat else {}
        group = current()
        for start in range(0, len(items), 1024):  # a killed evaluation loses little
            part = list(items[start : start + 1024])
            kinds = {item.payload[3][0].request_type for item in part}
            if kinds == {"generate_until"}:  # each process takes some; log-likelihoods are dealt out further below
                part = group.share(part, [float(len(item.text or "")) for item in part])
            owned = {item.id: asked[item.payload[0]][item.payload[1]] if asked else item.payload[3] for item in part}

            def work(part: list[Item] = part, owned: dict[str, Any] = owned) -> list[Output]:
                return _ask(model, [owned[item.id] for item in part])

            dealt = kinds == {"generate_until"} and not group.lockstep
            yield from zip(part, group.agreed(work) if dealt else work(), strict=True)

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        from guidetune.evaluation import harness

        name, _, doc, requests = item.payload
        answers = [[tuple(one) if isinstance(one, list) else one for one in given] for given in output.responses]
        found = harness.metrics(self._tasks[name], doc, requests, answers)
        chosen = self.filter or next(iter(found))
        if chosen not in found:
            raise BadInput(f"task {self.task} has no filter {chosen!r}{nearest(chosen, list(found))}")
        line: dict[str, Any] = {}
        corpus: dict[str, Any] = {}
        for filter, values in found.items():
            for metric, value in values.items():
                key = metric if filter == chosen else f"{metric},{filter}"
                value = harness.plain(value)
                if isinstance(value, (bool, int, float)):
                    line[key] = float(value)
                elif filter == chosen:
                    corpus[metric] = value
        if self.metric in PER_WEIGHT:
            loglik, weight = corpus[self.metric]
            line |= {"correct": -loglik / max(1, weight), "nll": -loglik, "tokens": weight}
        elif self.metric in line:
            line["correct"] = line[self.metric]
        else:
            raise BadInput(f"task {self.task} gave no {self.metric!r} for item {item.id}; it gave {', '.join([*line, *corpus])}")
        if corpus:
            line["corpus"] = corpus
        return {"correct": line.pop("correct"), **line}

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of the whole corpus, by lm-eval's own aggregation; of a single task only, as groups mix them in their own ways."""
        from guidetune.evaluation import harness

        if len(self._tasks) != 1:
            groups: dict[str, list[float]] = {}
            for line in lines:
                groups.setdefault(line["meta"]["category"], []).append(line["correct"])
            return {"macro": sum(sum(group) / len(group) for group in groups.values()) / len(groups)}
        (task,) = self._tasks.values()
        found = {}
        for metric in task.aggregation():
            if metric in PER_WEIGHT or not harness.is_mean(task, metric):
                values = [line.get("corpus", {}).get(metric, line.get(metric)) for line in lines]
                value = harness.aggregate(task, metric, [tuple(one) if isinstance(one, list) else one for one in values])
                if value is not None:
                    found[metric] = value
        return found


def _ask(model: Any, groups: Sequence[Sequence[Any]]) -> list[Output]:
    """The answers to the requests of each item, all requests of one kind together."""
    answers: dict[int, list[Any]] = {}
    kinds: dict[str, list[Any]] = {}
    for requests in groups:
        for one in requests:
            kinds.setdefault(one.request_type, []).extend([one] * (one.repeats or 1))
    for kind, asked in kinds.items():
        for one, answer in zip(asked, getattr(model, kind)(asked), strict=True):
            answers.setdefault(id(one), []).append(answer)
    outputs = []
    for requests in groups:
        responses = tuple([list(a) if isinstance(a, tuple) else a for a in answers[id(one)]] for one in requests)
        kind, first = requests[0].request_type, responses[0][0]
        if kind == "generate_until":
            outputs.append(Output(text=first, responses=responses))
        elif kind == "loglikelihood":
            outputs.append(Output(loglik=tuple(given[0][0] for given in responses), responses=responses))
        else:
            outputs.append(Output(nll=-first, responses=responses))
    return outputs

"""lm-evaluation-harness on our models: its tasks, prompts, filters and metrics; our scoring and generation.

Imports lm_eval, so import it only where that is known to be there. Nothing here seeds the process's random generators, bootstraps, or asks
the network for more than a task's data; whatever a task's own code draws is undone afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from guidetune.artefacts import derive_seed
from guidetune.errors import BadInput
from guidetune.evaluation.generation import Sampling, context_length, generate
from guidetune.evaluation.scoring import Continuation, continuation_scores, rolling_windows
from guidetune.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task as HarnessTask

    from guidetune.models.handle import ModelHandle

FEWSHOT_SEED = 1234  # lm-eval's own default, so that the examples are the same
DEFAULT_LENGTH = 2048  # lm-eval's, for a model that names no length
DEFAULT_NEW_TOKENS = 256  # lm-eval's, for a task that names none
PLAIN = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}


class OurModel(TemplateLM):
    """lm-eval's model interface over a `ModelHandle`.

    Requests mean what they mean to its `HFLM`: the same tokens, cut from the left where they do not fit. Results are equal but for
    rounding.

    >>> lm_eval.simple_evaluate(model=OurModel(handle), tasks=["my_task"], task_manager=..., bootstrap_iters=0)  # doctest: +SKIP
    """

    def __init__(
        self,
        handle: ModelHandle,
        *,
        batch_tokens: int = 16384,
        seed: int = 0,
        chat: bool = False,
        max_new_tokens: int | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.max_new_tokens = max_new_tokens
        self.handle, self.tokenizer, self.batch_tokens, self.seed, self.chat = handle, handle.tokenizer, batch_tokens, seed, chat
        self.tick = tick or (lambda rows: None)
        self._device = handle.device
        limit = getattr(self.tokenizer, "model_max_length", None)
        known = context_length(handle.model)
        self.max_length = known or (int(limit) if isinstance(limit, int) and limit < 10**9 else DEFAULT_LENGTH)

    # -- tokens -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.handle.spec.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._encode([string], add_special_tokens)[string]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> dict[str, list[int]]:
        """Ids of every text; one that begins with BOS, as chat templates write it, gets no second one."""
        prefix = self.tokenizer.decode(self.prefix_token_id) if self.prefix_token_id is not None else None
        groups: dict[bool, list[str]] = {}
        for text in dict.fromkeys(texts):
            special = add_special_tokens if add_special_tokens is not None else not (prefix and text.startswith(prefix))
            groups.setdefault(special, []).append(text)
        found: dict[str, list[int]] = {}
        for special, group in groups.items():
            # one call: most of its cost is the call
            found.update(zip(group, self.tokenizer(group, add_special_tokens=special, verbose=False)["input_ids"], strict=True))
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        if self.handle.chat is not None:
            options |= {"chat_template": self.handle.chat.template.source, **self.handle.chat.template.variables}
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise BadInput(f"lm_eval: the chat template of {self.handle.spec} refuses this conversation: {error}") from None

    # -- requests -----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            before, after = request.args
            spaces = len(before) - len(before.rstrip())
            # a space at the border belongs to the continuation's first word
            pairs.append((before[: len(before) - spaces], before[len(before) - spaces :] + after) if before.strip() else (before, after))
        texts = [text for before, after in pairs if before for text in (before, before + after)]
        ids, alone = self._encode(texts), self._encode([after for before, after in pairs if not before], add_special_tokens=False)
        rows = []
        for before, after in pairs:
            if before:
                start, whole = len(ids[before]), ids[before + after]
            else:
                own = alone[after]
                start, whole = 1, (own if own[:1] == [self.prefix_token_id] else [self.prefix_token_id, *own])
            rows.append(((before, after), whole[:start], whole[start:]))
        return self._rate(rows, [(request.task_name, request.doc_id) for request in requests])

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        return self._rate(requests, [tuple(before) for _, before, _ in requests])

    def _rate(self, requests: Sequence[tuple[Any, list[int], list[int]]], owners: Sequence[Any]) -> list[tuple[float, bool]]:
        """Requests of one document share the run of what they have in common."""
        documents: dict[Any, list[int]] = {}
        rows = []
        for place, ((text, before, after), owner) in enumerate(zip(requests, owners, strict=True)):
            whole = [*before, *after][-(self.max_length + 1) :]
            start = len(whole) - len(after)
            if start < 1 or not after:
                raise BadInput(
                    f"lm_eval: the continuation {str(text[1] if text else '')[:60]!r} has {len(after)} tokens; 1 to {self.max_length} fit"
                )
            rows.append(Continuation(tuple(whole), start))
            documents.setdefault(owner, []).append(place)
        groups = list(documents.values())
        scores = continuation_scores(
            self.handle.model,
            [[rows[i] for i in group] for group in groups],
            batch_tokens=self.batch_tokens,
            tick=lambda n, _: self.tick(n),
        )
        found = {i: score for group, part in zip(groups, scores, strict=True) for i, score in zip(group, part, strict=True)}
        return [found[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        ids = self._encode([request.args[0] for request in requests])
        rows, owners = [], []
        for place, request in enumerate(requests):
            for window, scored in rolling_windows(ids[request.args[0]], self.prefix_token_id, self.max_length):
                rows.append((None, window[: len(window) - scored], window[len(window) - scored :]))
                owners.append(place)
        totals = [0.0] * len(requests)
        # every window is a document of its own
        for place, (value, _) in zip(owners, self._rate(rows, range(len(rows))), strict=True):
            totals[place] += value
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(place)
        for group in groups.values():
            for k, text in self._generate([requests[i] for i in group]):
                answers[group[k]] = text
        return [answers[i] for i in range(len(requests))]

    def _generate(self, requests: Sequence[Instance]) -> Iterator[tuple[int, str]]:
        """Answers to requests with the same options."""
        asked = normalize_gen_kwargs(requests[0].args[1], DEFAULT_NEW_TOKENS)
        strange = [key for key in asked if key not in PLAIN]
        if strange:
            raise BadInput(f"lm_eval: the generation option {strange[0]!r} is not known here; there are: {', '.join(sorted(PLAIN))}")
        stops = handle_stop_sequences(asked.get("until"), eos=self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))
        new = self.max_new_tokens or int(asked["max_gen_toks"])
        room = self.max_length - new
        if room < 1:
            raise BadInput(f"lm_eval: the task asks for {new} new tokens, and the model has {self.max_length} positions")
        ids = self._encode([request.args[0] for request in requests])
        sampling = None
        if asked.get("do_sample") and asked.get("temperature", 1.0) > 0:
            sampling = Sampling(asked.get("temperature", 1.0), asked.get("top_p", 1.0), asked.get("top_k", 0))

        def met(tokens: Sequence[int]) -> bool:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            return any(stop and stop in text for stop in stops)

        completions = generate(
            self.handle.model,
            [ids[request.args[0]][-room:] for request in requests],
            max_new_tokens=new,
            stop=self._stop_ids(),
            batch_tokens=self.batch_tokens,
            sampling=sampling,
            seeds=[derive_seed(self.seed, "lm_eval", r.task_name, r.doc_id, r.idx, i) for i, r in enumerate(requests)]
            if sampling
            else None,
            context=self.max_length,
            until=met,
        )
        for place, completion in completions:
            text = self.tokenizer.decode(list(completion.tokens), skip_special_tokens=True)
            self.tick(1)
            yield place, postprocess_generated_text(text, stops, None)

    def _stop_ids(self) -> list[int]:
        """What ends an answer in `model.generate`, and in a chat the template's own end of a turn."""
        ids = {self.eot_token_id}
        also = getattr(getattr(self.handle.model, "generation_config", None), "eos_token_id", None)
        ids.update(also if isinstance(also, (list, tuple)) else [] if also is None else [also])
        if self.chat and self.handle.chat is not None:
            ids.update(self.handle.chat.stop_token_ids)
        return sorted(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def load(name: str, folder: Path | None, shots: int | None) -> dict[str, HarnessTask]:
    """The tasks behind a name (several, when it is a group or a tag), of a folder or else of those that come with lm-eval.

    A data file that a task of the folder names relatively may lie in the current folder or in the task's.

    Raises:
        BadInput: no such task, with the nearest name; or one that cannot be loaded, with lm-eval's reason.
    """
    import datasets

    with undisturbed(), _no_bars(datasets):
        manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
        if name not in manager.all_tasks:
            where = f" in {folder}" if folder else ""
            raise BadInput(f"lm_eval has no task {name!r}{where}{nearest(name, manager.all_tasks[:2000])}")
        try:
            try:
                tasks = manager.load([name])["tasks"]
            except FileNotFoundError:
                if folder is None:
                    raise
                with contextlib.chdir(folder):
                    tasks = manager.load([name])["tasks"]
        except Exception as error:  # lm-eval, datasets and the task's own code raise whatever they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(f"the lm_eval task {name!r} cannot be loaded: {reason}") from None
        for task in tasks.values():
            if shots is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=shots or 0)
    return tasks


def requests(task: HarnessTask, model: OurModel | None = None, system: str | None = None) -> dict[int, list[Instance]]:
    """The requests of every document, in lm-eval's own wording; through the chat template of `model` when one is given.

    Few-shot examples are drawn document by document, so all documents are gone through, whatever is asked in the end.
    """
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    template = model.apply_chat_template if model is not None else None
    found: dict[int, list[Instance]] = {}
    with undisturbed():
        for number, doc in task.doc_iterator(rank=0, limit=None, world_size=1):
            context = task.fewshot_context(
                doc,
                num_fewshot=task.config.num_fewshot or 0,
                system_instruction=system,
                apply_chat_template=template is not None,
                fewshot_as_multiturn=template is not None,
                chat_template=template,
                gen_prefix=task.doc_to_prefix(doc),
            )
            made = task.construct_requests(
                doc=doc,
                ctx=context,
                metadata=(task.config.task, number, task.config.repeats),
                apply_chat_template=template is not None,
                chat_template=template,
            )
            found[number] = sorted(made, key=lambda one: one.idx) if isinstance(made, list) else [made]
    return found


def metrics(task: HarnessTask, doc: Any, instances: Sequence[Instance], responses: Sequence[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """{filter: {metric: value}} of one document, by the task's own filters and rules."""
    from dataclasses import replace

    answered = [replace(one, resps=list(given), filtered_resps={}) for one, given in zip(instances, responses, strict=True)]
    with undisturbed():
        for ensemble in task._filters:
            ensemble.apply(answered)
        names = list(answered[0].filtered_resps)
        return {name: task.process_results(doc, [one.filtered_resps[name] for one in answered]) for name in names}


def aggregate(task: HarnessTask, metric: str, values: Sequence[Any]) -> float | None:
    """lm-eval's own aggregation of a metric's values; None where it gives no number."""
    try:
        with undisturbed():
            found = task.aggregation()[metric](list(values))
        return float(found) if isinstance(found, (int, float, np.floating, np.integer)) else None
    except Exception:  # an aggregation that wants other values, or a package that is not there
        return None


def is_mean(task: HarnessTask, metric: str) -> bool:
    """Whether a metric's score is the plain mean of its values."""
    from lm_eval.api.metrics import mean, nanmean

    return task.aggregation().get(metric) in (mean, nanmean)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The process's random generators as they were before; only errors of lm-eval's are logged."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    disabled = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def plain(value: Any) -> Any:
    """A metric's value as JSON can hold it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value

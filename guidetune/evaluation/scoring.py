"""Log-likelihoods of given tokens: continuations of a shared prefix, and targets anywhere in a row.

Rows are packed without padding, and what they share runs once (`evaluation.prefix`): the prompt of a question for all its options, and a
few-shot header for all its questions. The vocabulary-sized head runs only on the rows that are asked for, once for all the targets that a
row predicts, a bounded number at a time, and in fp32.

Both are checked on the model at hand before they are used: `Scorer` compares its own head with the model's logits, and a small packed
batch with the same rows one by one. A model that fails (state-space layers, unknown heads) is answered by padded rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from guidetune.engine.distributed import current
from guidetune.errors import BadInput
from guidetune.evaluation import prefix
from guidetune.evaluation.generation import evaluating, halving
from guidetune.models.architecture import Parts, parts, plain, transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_ELEMENTS = 1 << 23  # logits formed at a time (32 MB in fp32)
# Tokens of a packed batch on a CPU, where larger ones leave its cache: measured 1.2 times as fast as 16,384, in two thirds of the memory.
CPU_TOKENS = 2048
SHARED_HEADER = 16  # tokens from which a common beginning of several questions is worth a level of its own


@dataclass(frozen=True)
class Continuation:
    """Tokens of context and continuation, tokenised as one text; the continuation is `ids[start:]`."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Branch:
    """A row and the places of its targets; `places[i] >= 1`."""

    ids: Sequence[int]
    places: Sequence[int]


@dataclass
class _Bundle:
    """Branches that share their first `shared` tokens, of which `header` are shared with other bundles too (`headers[group]`)."""

    branches: list[_Branch]
    shared: int
    header: int = 0
    group: int | None = None

    @property
    def own(self) -> int:
        """Tokens to run besides the header."""
        return self.shared - self.header + sum(max(0, len(b.ids) - 1 - self.shared) for b in self.branches)

    @property
    def longest(self) -> int:
        return max(len(branch.ids) for branch in self.branches)


class Scorer:
    """Log-probabilities of target tokens under a causal language model, in fp32.

    `greedy`: each comes as a pair with 1.0 where no other token is likelier, else 0.0.
    """

    def __init__(self, model: PreTrainedModel, greedy: bool = False) -> None:
        self.model, self.greedy = model, greedy
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        try:
            self.head: Parts | None = parts(model)
        except BadInput:
            self.head = None
        else:
            # A logit in 16 bits has two to three digits; the head's few rows can afford fp32.
            if self.head.weight.dtype.itemsize < 4:
                self.head = replace(self.head, weight=self.head.weight.float())
        self.rebuilt = self._check_head()
        self.shares = self.rebuilt and self._check_sharing()

    @torch.inference_mode()
    def _check_head(self) -> bool:
        """Whether backbone and head, put together here, give the model's own logits (one short forward of each)."""
        if self.head is None:
            return False
        ids = self._probe(8)[None]
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        try:
            found = self.logits(self.head.backbone(input_ids=ids, use_cache=False).last_hidden_state)
        except (AttributeError, TypeError, RuntimeError):
            return False
        # The model scales and caps in its own dtype, this class in fp32.
        return found.shape == expected.shape and self._close(found, expected, 1e-3, 2e-2)

    @torch.inference_mode()
    def _check_sharing(self) -> bool:
        """Whether a packed batch gives the hidden states of the same rows one by one."""
        inner = plain(self.model)
        if not prefix.declared(inner):
            return False
        ids = self._probe(40).tolist()
        header, prompts, tails = ids[:9], (ids[9:14], ids[14:21]), ((ids[21:24], ids[24:25], ids[25:30]), (ids[30:32], (), ids[32:36]))
        trees = [prefix.Tree(0, prompt, tail) for prompt, tail in zip(prompts, tails, strict=True)]
        packed = prefix.pack(trees, [header], self.device)
        try:
            with prefix.installed(inner):
                found = self._hidden(packed)
        except (prefix.NotShareable, TypeError, ValueError, RuntimeError):
            return False
        if not prefix.windows_declared(inner) <= packed.windows:
            return False  # its layers leave the window to the mask, which is not built here
        rows, expected_places, found_places = [], [], []
        for prompt, tail, starts in zip(prompts, tails, packed.tail_starts, strict=True):
            for tokens, start in zip(tail, starts, strict=True):
                rows.append([*header, *prompt, *tokens])
                expected_places += [(len(rows) - 1, len(rows[-1]) - 1 - i) for i in range(len(tokens))]
                found_places += [start + len(tokens) - 1 - i for i in range(len(tokens))]
        expected = self._rows_hidden(rows)[tuple(torch.tensor(expected_places, device=self.device).T)]
        return self._close(found[torch.tensor(found_places, device=self.device)], expected, 1e-3, 1e-1)

    def _rows_hidden(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states [B, T, H] of rows padded on the right, or the model's logits [B, T, V] where the head is not rebuilt.

        Positions are left to the model: its own rule also holds for state-space layers, which take none.
        """
        ids = torch.zeros((len(rows), max(len(row) for row in rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        arguments = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}
        return self.head.backbone(**arguments).last_hidden_state if self.rebuilt else self.model(**arguments).logits  # type: ignore[union-attr]

    def _probe(self, count: int) -> torch.Tensor:
        # Well-spread ids: neighbours in the vocabulary are often unused tokens with equal embeddings.
        return (torch.arange(1, count + 1, device=self.device) * 7919) % self.vocabulary

    def _close(self, found: torch.Tensor, expected: torch.Tensor, full: float, half: float) -> bool:
        tolerance = full if plain(self.model).dtype in (torch.float32, torch.float64) else half
        return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())

    def _hidden(self, packed: prefix.Packed) -> torch.Tensor:
        """Hidden states [N, H] of a packed batch; call inside `ready`."""
        with prefix.running(packed):
            out = self.head.backbone(input_ids=packed.ids[None], position_ids=packed.positions[None], use_cache=False)  # type: ignore[union-attr]
        return out.last_hidden_state[0]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode, with the shared-prefix attention where the model takes it."""
        with evaluating(self.model), prefix.installed(plain(self.model)) if self.shares else nullcontext():
            yield

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`cap * tanh(scale * (W h + b) / cap)` in fp32, for hidden states [..., H]."""
        head = self.head
        assert head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            z = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight).float()
            return transform(z if head.bias is None else z + head.bias.float(), head)

    def log_probs(self, states: torch.Tensor, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log softmax(z(states[rows]))[targets] in fp32 [N] ([N, 2] when `greedy`); a state of several targets meets the head once.

        states: [R, H] hidden states, or the model's logits [R, V] where the head is not rebuilt.
        """
        unique, of = np.unique(rows, return_inverse=True)
        order = np.argsort(of, kind="stable")
        found = np.empty((len(rows), 2) if self.greedy else len(rows), dtype=np.float32)
        chunk = max(16, HEAD_ELEMENTS // max(1, self.vocabulary))
        for first in range(0, len(unique), chunk):
            part = states.index_select(0, torch.from_numpy(unique[first : first + chunk]).to(states.device))
            logits = self.logits(part) if self.rebuilt else part.float()
            pairs = order[np.searchsorted(of, first, sorter=order) : np.searchsorted(of, first + chunk, sorter=order)]
            row = torch.from_numpy(of[pairs] - first).to(logits.device)
            target = torch.from_numpy(targets[pairs]).to(logits.device)
            values = logits[row, target] - logits.logsumexp(-1)[row]
            if self.greedy:
                values = torch.stack([values, (logits[row, target] >= logits.amax(-1)[row]).to(values)], dim=-1)
            found[pairs] = values.cpu().numpy()
        return found

    @torch.inference_mode()
    def shared(self, bundles: list[_Bundle], headers: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """Per bundle and branch, log p of the targets, from one packed batch."""
        trees = [
            prefix.Tree(b.group, b.branches[0].ids[b.header : b.shared], [branch.ids[b.shared : -1] for branch in b.branches])
            for b in bundles
        ]
        packed = prefix.pack(trees, headers, self.device)
        rows, targets = [], []
        for b, prompt, tails in zip(bundles, packed.prompt_starts, packed.tail_starts, strict=True):
            header = packed.header_starts[b.group] if b.group is not None else 0
            for branch, tail in zip(b.branches, tails, strict=True):
                at = np.asarray(branch.places) - 1  # the place that predicts
                rows.append(np.where(at < b.header, header + at, np.where(at < b.shared, prompt + at - b.header, tail + at - b.shared)))
                targets += [branch.ids[place] for place in branch.places]
        found = iter(self.log_probs(self._hidden(packed), np.concatenate(rows), np.asarray(targets, dtype=np.int64)).tolist())
        return [[[next(found) for _ in branch.places] for branch in b.branches] for b in bundles]

    @torch.inference_mode()
    def padded(self, bundles: list[_Bundle]) -> list[list[list[float]]]:
        """The same from rows of their own, padded on the right; rows with equal inputs run once."""
        inputs: dict[tuple[int, ...], int] = {}
        at = [[inputs.setdefault(tuple(branch.ids[:-1]), len(inputs)) for branch in b.branches] for b in bundles]
        states = self._rows_hidden(list(inputs))
        width = states.shape[1]
        rows = [
            i * width + np.asarray(branch.places) - 1
            for b, place in zip(bundles, at, strict=True)
            for branch, i in zip(b.branches, place, strict=True)
        ]
        targets = [branch.ids[place] for b in bundles for branch in b.branches for place in branch.places]
        found = iter(self.log_probs(states.flatten(0, 1), np.concatenate(rows), np.asarray(targets, dtype=np.int64)).tolist())
        return [[[next(found) for _ in branch.places] for branch in b.branches] for b in bundles]


def _score(
    model: PreTrainedModel, bundles: list[_Bundle], batch_tokens: int, tick: Callable[[int, int], None] | None, greedy: bool = False
) -> list[list[list[Any]]]:
    """Longest first, in batches of `batch_tokens` tokens; the results in the order of `bundles`."""
    scores: dict[int, list[list[Any]]] = {}
    if not bundles:
        return []
    with evaluating(model):
        scorer = Scorer(model, greedy)
    with scorer.ready():
        if scorer.shares:
            headers = _find_headers(bundles)
            if scorer.device.type == "cpu":
                # A batch runs its headers once more, so it is long beside them.
                batch_tokens = min(batch_tokens, max([CPU_TOKENS, *(8 * len(header) for header in headers)]))
            groups = _packed_batches(bundles, headers, batch_tokens)

            def work(part: list[int]) -> list[list[list[float]]]:
                return scorer.shared([bundles[i] for i in part], headers)
        else:
            groups = _padded_batches(bundles, batch_tokens)

            def work(part: list[int]) -> list[list[list[float]]]:
                return scorer.padded([bundles[i] for i in part])

        def score(part: list[int]) -> list[list[list[float]]]:
            found = halving(work, part)
            if tick is not None:
                tick(len(part), sum(len(branch.places) for i in part for branch in bundles[i].branches))
            return found

        # several processes share the batches, which are those of a single one
        groups = list(groups)
        costs = [float(sum(len(branch.ids) for i in part for branch in bundles[i].branches)) for part in groups]
        for part, found in zip(groups, current().dealt(groups, costs, score), strict=True):
            scores.update(zip(part, found, strict=True))
    return [scores[i] for i in range(len(bundles))]


def _find_headers(bundles: list[_Bundle]) -> list[Sequence[int]]:
    """Give bundles that begin alike a common header, where that saves tokens; the headers.

    In the order of their tokens, bundles with a common beginning are neighbours. A group of n with a header of h tokens saves
    (n - 1) h of them: a bundle joins while that grows.
    """
    order = sorted(range(len(bundles)), key=lambda i: tuple(bundles[i].branches[0].ids[: bundles[i].shared]))
    headers: list[Sequence[int]] = []
    group: list[int] = []
    length = 0

    def close() -> None:
        if len(group) > 1:
            for i in group:
                bundles[i].header, bundles[i].group = length, len(headers)
            headers.append(bundles[group[0]].branches[0].ids[:length])

    for i in order:
        if group:
            a, b = bundles[group[-1]], bundles[i]
            # A prompt keeps one token of its own.
            limit = max(0, min(a.shared, b.shared) - 1)
            common = len(commonprefix([a.branches[0].ids[:limit], b.branches[0].ids[:limit]]))
            common = min(common, length) if len(group) > 1 else common
            if common >= SHARED_HEADER and len(group) * common >= (len(group) - 1) * length:
                group.append(i)
                length = common
                continue
            close()
        group, length = [i], 0
    close()
    return headers


def _packed_batches(bundles: list[_Bundle], headers: list[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Groups of at most `budget` packed tokens: header by header, longest first; a larger bundle is a group of its own."""
    longest: dict[int | None, int] = {}
    for b in bundles:
        longest[b.group] = max(longest.get(b.group, 0), b.longest)
    key = {i: (-longest[b.group] if b.group is not None else -b.longest, b.group or -1, -b.own, i) for i, b in enumerate(bundles)}
    batch: list[int] = []
    size, seen = 0, set[int | None]()
    for i in sorted(range(len(bundles)), key=key.__getitem__):
        b = bundles[i]
        more = b.own + (len(headers[b.group]) if b.group is not None and b.group not in seen else 0)
        if batch and size + more > budget:
            yield batch
            batch, size, seen = [], 0, set()
            more = b.own + (len(headers[b.group]) if b.group is not None else 0)
        batch.append(i)
        size += more
        seen.add(b.group)
    if batch:
        yield batch


def _padded_batches(bundles: list[_Bundle], budget: int) -> Iterator[list[int]]:
    """Groups with rows x longest row <= `budget`, longest first; a larger bundle is a group of its own."""
    batch: list[int] = []
    rows = 0
    for i in sorted(range(len(bundles)), key=lambda i: (-bundles[i].longest, i)):
        more = len({tuple(branch.ids[:-1]) for branch in bundles[i].branches})
        if batch and (rows + more) * bundles[batch[0]].longest > budget:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += more
    if batch:
        yield batch


def continuation_log_probs(
    model: PreTrainedModel,
    documents: Sequence[Sequence[Continuation]],
    *,
    batch_tokens: int = 16384,
    tick: Callable[[int, int], None] | None = None,
) -> list[list[list[float]]]:
    """Per document and continuation, the log-probability of each continuation token.

    What a document's continuations have in common runs once, and a beginning that documents share (few-shot examples) once in a batch.
    Continuations of one token that share all the rest (lettered choices) cost one row of the prompt's tokens and nothing else.

    Raises:
        BadInput: a continuation without a token, or without a token before it.
    """
    return _rate(model, documents, batch_tokens, tick, greedy=False)


def continuation_scores(
    model: PreTrainedModel,
    documents: Sequence[Sequence[Continuation]],
    *,
    batch_tokens: int = 16384,
    tick: Callable[[int, int], None] | None = None,
) -> list[list[tuple[float, bool]]]:
    """Per document and continuation, its summed log-probability, and whether greedy decoding would give it token by token.

    Raises:
        BadInput: as `continuation_log_probs`, with which it shares everything else.
    """
    found = _rate(model, documents, batch_tokens, tick, greedy=True)
    return [[(sum(value for value, _ in one), all(first for _, first in one)) for one in document] for document in found]


def _rate(
    model: PreTrainedModel,
    documents: Sequence[Sequence[Continuation]],
    batch_tokens: int,
    tick: Callable[[int, int], None] | None,
    greedy: bool,
) -> list[list[list[Any]]]:
    bundles: list[_Bundle] = []
    owners: list[list[int]] = []  # the branch of each choice
    for number, document in enumerate(documents):
        if not len(document) or any(not 1 <= choice.start < len(choice.ids) for choice in document):
            raise BadInput(f"document {number}: needs continuations, each with at least one token of context and one of its own")
        # Equal options are one branch: rounded apart, their tie would not go to the first.
        unlike = {choice: i for i, choice in enumerate(dict.fromkeys(document))}
        owners.append([unlike[choice] for choice in document])
        branches = [_Branch(choice.ids, range(choice.start, len(choice.ids))) for choice in unlike]
        # Nothing in common is possible too: a tokeniser may merge across the border.
        limit = min(len(branch.ids) for branch in branches) - 1
        bundles.append(_Bundle(branches, len(commonprefix([branch.ids[:limit] for branch in branches]))))
    scores = _score(model, bundles, batch_tokens, tick, greedy)
    return [[branches[i] for i in owner] for branches, owner in zip(scores, owners, strict=True)]


def target_log_probs(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 16384,
    tick: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Per row, the log-probability of the tokens at the positions `targets[i]` (each >= 1) given all tokens before them.

    Longest rows first, without padding where the model allows it; the head sees only the places that predict a target.

    Raises:
        BadInput: a row without targets, or a target without a token before it.
    """
    for number, places in enumerate(targets):
        if not len(places) or any(not 1 <= place < len(rows[number]) for place in places):
            raise BadInput(f"row {number}: needs targets, each with a token before it; positions run from 1 to {len(rows[number]) - 1}")
    bundles = [_Bundle([_Branch(row, places)], len(row) - 1) for row, places in zip(rows, targets, strict=True)]
    return [branches[0] for branches in _score(model, bundles, batch_tokens, tick)]


def rolling_windows(tokens: Sequence[int], first: int, length: int) -> list[tuple[list[int], int]]:
    """Windows of at most `length` inputs that together score every token of a text exactly once.

    Each window is `(ids, scored)`: its last `scored` ids are targets. `first` (BOS or EOS) stands before the first token; later
    windows begin with the last token already scored, and the last window is filled up with earlier context.
    """
    if length < 1:
        raise ValueError("a window needs at least one input")
    text = [first, *tokens]  # the token at place i of `tokens` is text[i + 1]
    windows, done = [], 0
    while done < len(tokens):
        scored = min(length, len(tokens) - done)
        end = done + scored + 1
        windows.append((text[max(0, end - length - 1) : end], scored))
        done += scored
    return windows

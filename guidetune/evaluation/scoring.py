"""Log-likelihoods of given tokens: continuations of a shared prefix, and targets anywhere in a row.

The vocabulary-sized head runs only on the rows that are asked for, a bounded number at a time. `Scorer` rebuilds the head from the
model's config (soft-capping and scaling included) and compares it with the model's own logits once; a head it cannot rebuild is
answered by the model itself, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from guidetune.engine.distributed import current
from guidetune.errors import BadInput
from guidetune.evaluation.generation import batches, evaluating, growing_cache, halving, pad_left

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

HEAD_ELEMENTS = 1 << 25  # logits formed at a time (128 MB in fp32)


@dataclass(frozen=True)
class Continuation:
    """Tokens of context and continuation, tokenised as one text; the continuation is `ids[start:]`."""

    ids: tuple[int, ...]
    start: int


class Scorer:
    """Log-probabilities of target tokens under a causal language model, in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PEFT model wraps the one with the head
        self.body = causal.get_decoder()
        self.head = causal.get_output_embeddings()
        config = causal.config.get_text_config(decoder=True)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.device = model.get_input_embeddings().weight.device
        self._rebuilt: bool | None = None

    def rebuilt(self) -> bool:
        """Whether body and head, put together here, give the model's own logits (one short forward, first time only)."""
        if self._rebuilt is None:
            self._rebuilt = self._check()
        return self._rebuilt

    @torch.inference_mode()
    def _check(self) -> bool:
        if self.head is None or self.body is self.model:
            return False
        ids = torch.arange(1, 9, device=self.device)[None] % self.head.weight.shape[0]
        ids = ids % self.model.get_input_embeddings().weight.shape[0]
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        try:
            found = self.logits(self.body(input_ids=ids, use_cache=False).last_hidden_state)
        except (AttributeError, TypeError, RuntimeError):
            return False
        if found.shape != expected.shape:
            return False
        # The model scales and caps in its own dtype, this class in fp32.
        tolerance = 1e-3 if self.head.weight.dtype in (torch.float32, torch.float64) else 2e-2
        return bool((found - expected).abs().max() <= tolerance * expected.abs().max())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`cap * tanh(scale * W h / cap)` in fp32, for hidden states [..., H]."""
        logits = self.head(hidden.to(self.head.weight.dtype)).float() * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def states(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """What `log_probs` reads: hidden states [B, T, H], or the model's logits [B, T, V] when the head is not rebuilt."""
        arguments = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "use_cache": cache is not None,
            "past_key_values": cache,
        }
        return self.body(**arguments).last_hidden_state if self.rebuilt() else self.model(**arguments).logits

    def log_probs(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log softmax(z)[target] in fp32 [N], for states [N, H] that predict targets [N]."""
        chunk = max(1, HEAD_ELEMENTS // max(1, self.vocabulary))
        found = []
        for rows, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
            logits = self.logits(rows) if self.rebuilt() else rows.float()
            found.append(logits.gather(-1, wanted[:, None]).squeeze(-1) - logits.logsumexp(-1))
        return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]


def continuation_log_probs(
    model: PreTrainedModel,
    documents: Sequence[Sequence[Continuation]],
    *,
    batch_tokens: int = 16384,
    tick: Callable[[int, int], None] | None = None,
) -> list[list[list[float]]]:
    """Per document and continuation, the log-probability of each continuation token.

    What a document's continuations have in common runs once; the rest runs on its cache. Continuations of one token that share
    all the rest (lettered choices) cost one forward pass per document and no second one. Several processes share the batches.

    Raises:
        BadInput: a continuation without a token, or without a token before it.
    """
    for number, document in enumerate(documents):
        for choice in document:
            if not 1 <= choice.start < len(choice.ids):
                raise BadInput(f"document {number}: a continuation needs at least one token of context and one of its own")
    prefixes = [_shared_prefix(document) for document in documents]
    order = sorted(range(len(documents)), key=lambda i: (-max(len(choice.ids) for choice in documents[i]), i))
    scores: dict[int, list[list[float]]] = {}
    scorer = Scorer(model)

    def size(i: int) -> int:
        # Prefix once, and then each choice with its copy of the cache.
        return prefixes[i] if _single(documents[i], prefixes[i]) else sum(len(choice.ids) for choice in documents[i])

    with evaluating(model):
        groups = list(batches(order, size, batch_tokens))

        def score(group: list[int]) -> list[list[list[float]]]:
            found = halving(lambda part: _score_group(scorer, [documents[i] for i in part], [prefixes[i] for i in part]), group)
            if tick is not None:
                tick(len(group), sum(len(choice.ids) - prefixes[i] for i in group for choice in documents[i]))
            return found

        for group, found in zip(groups, current().dealt(groups, [sum(map(size, g)) for g in groups], score), strict=True):
            scores.update(zip(group, found, strict=True))
    return [scores[i] for i in range(len(documents))]


def _shared_prefix(document: Sequence[Continuation]) -> int:
    """Length of the longest common prefix that still leaves each continuation all of its own tokens."""
    limit = min(choice.start for choice in document)
    first = document[0].ids
    for length in range(limit):
        if any(choice.ids[length] != first[length] for choice in document):
            return length
    return limit


def _single(document: Sequence[Continuation], prefix: int) -> bool:
    return all(len(choice.ids) == prefix + 1 for choice in document)


@torch.inference_mode()
def _score_group(scorer: Scorer, documents: list[Sequence[Continuation]], prefixes: list[int]) -> list[list[list[float]]]:
    device = scorer.device
    # A document whose choices differ from the first token on (a tokeniser that merges across the border) is scored choice by choice.
    if any(prefix == 0 for prefix in prefixes):
        flat = [[choice] for document in documents for choice in document]
        found = iter(_score_group(scorer, flat, [choice[0].start for choice in flat]))
        return [[next(found)[0] for _ in document] for document in documents]

    # Right-aligned prefixes: the last place of every row predicts the first token after its prefix.
    ids, mask = pad_left([document[0].ids[:prefix] for document, prefix in zip(documents, prefixes, strict=True)], device)
    single = all(_single(document, prefix) for document, prefix in zip(documents, prefixes, strict=True))
    cache = None if single else growing_cache(scorer.model)
    hidden = scorer.states(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    owner = [d for d, document in enumerate(documents) for _ in document]
    choices = [choice for document in documents for choice in document]
    tails = [choice.ids[prefixes[d] :] for d, choice in zip(owner, choices, strict=True)]

    source = torch.tensor(owner, device=device)
    states, targets = [hidden[source, -1]], [torch.tensor([tail[0] for tail in tails], device=device)]
    width = max(len(tail) for tail in tails) - 1
    if width:
        assert cache is not None
        cache.batch_select_indices(source)
        block = torch.zeros((len(tails), width), dtype=torch.long, device=device)
        real = torch.zeros_like(block)
        for row, tail in enumerate(tails):
            block[row, : len(tail) - 1] = torch.tensor(tail[:-1], device=device)
            real[row, : len(tail) - 1] = 1
        positions = mask.sum(-1)[source][:, None] + torch.arange(width, device=device)
        later = scorer.states(block, torch.cat([mask[source], real], dim=1), positions, cache)
        rows, columns = real.nonzero(as_tuple=True)  # row-major: the order of the tails' tokens
        states.append(later[rows, columns])
        targets.append(torch.tensor([token for tail in tails for token in tail[1:]], dtype=torch.long, device=device))
    found = scorer.log_probs(torch.cat(states), torch.cat(targets)).tolist()

    first, rest = found[: len(tails)], iter(found[len(tails) :])
    per_choice = []
    for d, choice, tail, start in zip(owner, choices, tails, first, strict=True):
        values = [start, *(next(rest) for _ in tail[1:])]
        per_choice.append(values[choice.start - prefixes[d] :])
    result: list[list[list[float]]] = [[] for _ in documents]
    for d, values in zip(owner, per_choice, strict=True):
        result[d].append(values)
    return result


def target_log_probs(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 16384,
    tick: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Per row, the log-probability of the tokens at the positions `targets[i]` (each >= 1) given all tokens before them.

    Rows are padded on the right, longest first; the head sees only the places that predict a target. Several processes share
    the batches.
    """
    for number, places in enumerate(targets):
        if not len(places) or any(not 1 <= place < len(rows[number]) for place in places):
            raise BadInput(f"row {number}: needs targets, each with a token before it; positions run from 1 to {len(rows[number]) - 1}")
    scorer = Scorer(model)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    scores: dict[int, list[float]] = {}
    with evaluating(model):
        groups = list(batches(order, lambda i: len(rows[i]), batch_tokens))

        def score(group: list[int]) -> list[list[float]]:
            found = halving(lambda part: _score_rows(scorer, [rows[i] for i in part], [targets[i] for i in part]), group)
            if tick is not None:
                tick(len(group), sum(len(targets[i]) for i in group))
            return found

        for group, found in zip(groups, current().dealt(groups, [sum(len(rows[i]) for i in g) for g in groups], score), strict=True):
            scores.update(zip(group, found, strict=True))
    return [scores[i] for i in range(len(rows))]


@torch.inference_mode()
def _score_rows(scorer: Scorer, rows: list[Sequence[int]], targets: list[Sequence[int]]) -> list[list[float]]:
    device = scorer.device
    width = max(len(row) for row in rows) - 1  # the last token of a row is only ever a target
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row) - 1] = torch.as_tensor(row[:-1])
        mask[i, : len(row) - 1] = 1
    positions = torch.arange(width, device=device)[None].expand(len(rows), -1)
    hidden = scorer.states(ids.to(device), mask.to(device), positions)  # [B, T, H]
    owner = torch.tensor([i for i, places in enumerate(targets) for _ in places], dtype=torch.long)
    place = torch.tensor([p for places in targets for p in places], dtype=torch.long)
    wanted = torch.tensor([int(row[p]) for row, places in zip(rows, targets, strict=True) for p in places], dtype=torch.long, device=device)
    found = iter(scorer.log_probs(hidden[owner.to(device), (place - 1).to(device)], wanted).tolist())
    return [[next(found) for _ in places] for places in targets]


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

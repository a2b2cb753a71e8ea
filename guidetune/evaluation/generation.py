"""Batched generation: greedy, or sampled with one seed per row.

A loop of its own rather than `model.generate`: finished rows leave the batch (and its cache), samples of one prompt share the
prefill, and a sampled row depends on its own seed, not on its neighbours. Greedy tokens equal those of `model.generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from guidetune.engine.distributed import current
from guidetune.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROW = 64  # tokens of room added when the cache is full
SHRINK_AT = 0.8  # finished rows leave when the active share of the batch falls below this


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: `softmax(z / temperature)`, cut to the `top_k` likeliest and the smallest set of mass `top_p`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """Generated tokens without the stop token. `finished`: a stop token was met; `cut`: tokens removed from the prompt."""

    tokens: tuple[int, ...]
    finished: bool
    cut: int = 0


@dataclass(frozen=True)
class _Row:
    index: int
    prompt: tuple[int, ...]
    cut: int
    room: int
    seed: int


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions the model was made for (`max_position_embeddings`), or None when its config names none."""
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own training flag comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def cut_middle(ids: Sequence[int], length: int) -> tuple[int, ...]:
    """The first and last halves of `ids`, `length` tokens in all: instructions stand at the ends of a prompt, so the middle goes."""
    if len(ids) <= length:
        return tuple(ids)
    head = length // 2
    return (*ids[:head], *ids[len(ids) - (length - head) :])


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    batch_tokens: int = 16384,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    context: int | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Yield `(index of the prompt, Completion)` batch by batch, longest prompts first; of several processes each does its batches.

    Args:
        prompts: token ids, generation prompt included.
        stop: ids that end a completion; they are not part of it.
        batch_tokens: rows x (longest prompt + new tokens) of one batch; halved and tried again when memory runs out.
        sampling: None is greedy.
        seeds: one per prompt, for sampling. A row draws by inverse CDF from its own stream, so that its result does not depend on
            which rows share its batch, but for rounding of the logits.
        context: positions the model has. Prompts that leave no room for `max_new_tokens` keep at least half of it, and are cut
            from the middle to fit.
        tick: called with (rows just finished, tokens just generated).

    Raises:
        BadInput: an empty prompt, or sampling options out of range.
        RunFailed: one row alone does not fit into memory.
    """
    if sampling is not None and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("sampling needs one seed for each prompt")
    if sampling is not None and not (sampling.temperature > 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
        raise BadInput(f"sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0, not {sampling}")
    rows = []
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise BadInput(f"prompt {index} is empty: there is nothing to continue")
        kept = tuple(prompt) if context is None else cut_middle(prompt, max(context - max_new_tokens, context // 2, 1))
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(kept))
        rows.append(_Row(index, kept, len(prompt) - len(kept), room, seeds[index] if seeds is not None else 0))
    rows.sort(key=lambda row: (-len(row.prompt), row.index))
    stop_ids = frozenset(stop)
    with evaluating(model):
        planned = list(batches(rows, lambda row: len(row.prompt) + row.room, batch_tokens))
        for batch in current().share(planned, [sum(len(row.prompt) + row.room for row in batch) for batch in planned]):
            done = halving(lambda part: _decode(model, part, stop_ids, sampling, tick), batch)
            yield from ((row.index, completion) for row, completion in zip(batch, done, strict=True))


Row = TypeVar("Row")
Result = TypeVar("Result")


def batches(rows: Sequence[Row], length: Callable[[Row], int], budget: int) -> Iterator[list[Row]]:
    """Consecutive groups with rows x longest length <= `budget`; a longer row is a group of its own."""
    group: list[Row] = []
    longest = 0
    for row in rows:
        grown = max(longest, length(row))
        if group and grown * (len(group) + 1) > budget:
            yield group
            group, grown = [], length(row)
        group.append(row)
        longest = grown
    if group:
        yield group


def halving(work: Callable[[list[Row]], list[Result]], rows: list[Row]) -> list[Result]:
    """`work(rows)`; when the accelerator's memory runs out, the two halves one after the other."""
    try:
        return work(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise RunFailed("a single row does not fit into the device's memory; use a smaller dtype, or lower max_new_tokens") from None
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    return [*halving(work, rows[:middle]), *halving(work, rows[middle:])]


@torch.inference_mode()
def _decode(
    model: PreTrainedModel,
    rows: list[_Row],
    stop: frozenset[int],
    sampling: Sampling | None,
    tick: Callable[[int, int], None] | None,
) -> list[Completion]:
    device = model.get_input_embeddings().weight.device
    unique = list(dict.fromkeys(row.prompt for row in rows))
    ids, mask = pad_left(unique, device)
    cache = growing_cache(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = out.logits[:, -1]
    if bool(torch.isnan(logits).any()):
        raise RunFailed("the model's logits are not numbers (NaN): its weights are damaged, or its dtype is too small for it")
    if len(unique) < len(rows):  # samples of one prompt share its prefill
        place = {prompt: i for i, prompt in enumerate(unique)}
        shared = torch.tensor([place[row.prompt] for row in rows], device=device)
        cache.batch_select_indices(shared)
        logits, mask = logits[shared], mask[shared]

    longest = max(row.room for row in rows)
    mask = torch.cat([mask, mask.new_ones(len(rows), longest)], dim=1)  # [B, T + new]
    position = mask[:, : ids.shape[1]].sum(-1)
    uniforms = torch.from_numpy(np.stack([_uniforms(row.seed, longest) for row in rows])) if sampling else None  # [B, new]
    tokens: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    active = list(range(len(rows)))  # batch place -> row
    open_rows = {i for i, row in enumerate(rows) if row.room > 0}
    for step in range(longest):
        chosen = logits.argmax(-1) if sampling is None else draw(logits, uniforms[:, step], sampling)  # type: ignore[index]
        added = closed = 0
        for i, token in zip(active, chosen.tolist(), strict=True):
            if i not in open_rows:
                continue
            if token in stop:
                finished[i] = True
            else:
                tokens[i].append(token)
                added += 1
            if finished[i] or len(tokens[i]) == rows[i].room:
                open_rows.discard(i)
                closed += 1
        if tick is not None:
            tick(closed, added)
        if not open_rows:
            break
        if len(open_rows) <= SHRINK_AT * len(active):
            keep = torch.tensor([place for place, i in enumerate(active) if i in open_rows], device=device)
            active = [i for i in active if i in open_rows]
            cache.batch_select_indices(keep)
            chosen, mask, position = chosen[keep], mask[keep], position[keep]
            uniforms = uniforms[keep] if uniforms is not None else None
        logits = model(
            input_ids=chosen[:, None],
            attention_mask=mask[:, : ids.shape[1] + step + 1],
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        position = position + 1
    return [Completion(tuple(tokens[i]), finished[i], row.cut) for i, row in enumerate(rows)]


def _uniforms(seed: int, count: int) -> np.ndarray:
    # One counter-based stream per row, drawn on the host: the same on every device and in every batch.
    return np.random.Generator(np.random.Philox(seed)).random(count)


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Token ids [B] by inverse CDF: the first token at which the cumulated probability exceeds `uniform` [B] in [0, 1).

    logits [B, V]; probabilities are cumulated in vocabulary order, in float64 where the device has it.
    """
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    scaled = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    probs = scaled.softmax(-1).to(precise)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= sampling.top_p, 0.0))
    cumulated = probs.cumsum(-1)
    target = uniform[:, None].to(cumulated) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [B, T], right-aligned; the padding id is masked and so does not matter."""
    width = max(len(row) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


class GrowingLayer(DynamicLayer):
    """A cache layer with spare room: a new token is written in place instead of copying the whole cache at each step.

    keys and values are views [B, heads, T, head_dim] of buffers with room for more tokens.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[torch.Tensor] = []
        self._length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < end:
            self._grow(key_states, value_states, end + GROW)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self._length = end
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _grow(self, key_states: torch.Tensor, value_states: torch.Tensor, room: int) -> None:
        new = []
        for states in (key_states, value_states):
            new.append(states.new_empty((*states.shape[:-2], room, states.shape[-1])))
        for buffer, old in zip(new, self._buffers, strict=False):
            buffer[..., : self._length, :] = old[..., : self._length, :]
        self._buffers = new

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length() > 0:
            self._buffers = [buffer[indices] for buffer in self._buffers]
            self.keys, self.values = (buffer[..., : self._length, :] for buffer in self._buffers)


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own cache (sliding windows and all), with plain layers replaced by `GrowingLayer`."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache

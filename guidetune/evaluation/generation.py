"""Batched generation: greedy, or sampled with one seed per row.

A loop of its own rather than `model.generate`: finished rows leave the batch (and its cache) and waiting prompts take their places,
samples of one prompt share the prefill, and a sampled row depends on its own seed, not on its neighbours. The work of Python in a step does
not grow with the batch. Greedy tokens equal those of `model.generate`.
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

from guidetune.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROW = 64  # tokens of room added when the cache is full
TURN_AT = 0.85  # finished rows leave, and waiting ones take their places, when the active share of the batch falls below this
LOOK = 8  # steps between two questions to `until`
# Tokens of prompts run at a time on a CPU, where larger products leave its cache.
CPU_TOKENS = 2048
TOO_LARGE = "a single row does not fit into the device's memory; use a smaller dtype, or lower max_new_tokens"


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
class PromptRow:
    """A prompt that fits: `cut` tokens were removed from it, and its answer has room for `room` tokens."""

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


def fit_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None, max_new_tokens: int, context: int | None) -> list[PromptRow]:
    """Prompts as rows that leave room for their answers; see `generate`.

    Raises:
        BadInput: an empty prompt.
    """
    rows = []
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise BadInput(f"prompt {index} is empty: there is nothing to continue")
        kept = tuple(prompt) if context is None else cut_middle(prompt, max(context - max_new_tokens, context // 2, 1))
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(kept))
        rows.append(PromptRow(index, kept, len(prompt) - len(kept), room, seeds[index] if seeds is not None else 0))
    return rows


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
    until: Callable[[Sequence[int]], bool] | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Yield `(index of the prompt, Completion)` as rows finish; prompts are taken longest first.

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
        until: asked of a row's new tokens now and then (every `LOOK` steps); True ends the row, which is then not `finished`. For what no
            single token shows, such as a stop string.

    Raises:
        BadInput: an empty prompt, or sampling options out of range.
        RunFailed: one row alone does not fit into memory.
    """
    if sampling is not None and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("sampling needs one seed for each prompt")
    if sampling is not None and not (sampling.temperature > 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
        raise BadInput(f"sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0, not {sampling}")
    rows = fit_prompts(prompts, seeds, max_new_tokens, context)
    rows.sort(key=lambda row: (-len(row.prompt), row.index))
    with evaluating(model):
        most = len(rows)
        while rows:
            decoder = _Decoder(model, stop, sampling, tick, until)
            done: set[int] = set()
            try:
                for row, completion in decoder.run(rows, batch_tokens, most):
                    done.add(row.index)
                    yield row.index, completion
                return
            except torch.OutOfMemoryError:
                if decoder.attempted <= 1:
                    raise RunFailed(TOO_LARGE) from None
            most = decoder.attempted // 2
            rows = [row for row in rows if row.index not in done]
            del decoder
            torch.cuda.empty_cache()


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
            raise RunFailed(TOO_LARGE) from None
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    return [*halving(work, rows[:middle]), *halving(work, rows[middle:])]


class _Decoder:
    """Rows decoded together: place b of the batch holds `rows[b]`, right-aligned in the cache's T columns.

    mask: [B, T + room ahead], position: [B] tokens of the row so far, count: [B] new ones, tokens: [B, longest + 1], open: bool [B].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop: Sequence[int],
        sampling: Sampling | None,
        tick: Callable[[int, int], None] | None,
        until: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.model, self.sampling, self.tick, self.until = model, sampling, tick, until
        self.steps = 0
        self.device = model.get_input_embeddings().weight.device
        self.stop = torch.tensor(sorted(set(stop)), dtype=torch.long, device=self.device)
        self.rows: list[PromptRow] = []
        self.attempted = 0  # rows of the largest batch tried last
        self.longest = 0

    @torch.inference_mode()
    def run(self, rows: list[PromptRow], budget: int, most: int) -> Iterator[tuple[PromptRow, Completion]]:
        """Decode all rows, at most `most` and `budget` tokens (rows x longest) at a time."""
        waiting = [row for row in rows if row.room > 0]
        yield from ((row, Completion((), False, row.cut)) for row in rows if row.room <= 0)
        self.longest = max((row.room for row in waiting), default=0)
        taken = 0
        while taken < len(waiting) or self.rows:
            if not self.rows:
                group = self._next(waiting, taken, budget, most)
                self._start(group)
                capacity, taken = len(group), taken + len(group)
            closed, stopped = self._choose()
            for b in closed:
                yield self.rows[b], Completion(tuple(self.tokens[b, : int(self.count[b])].tolist()), stopped[b], self.rows[b].cut)
            if closed:
                keep = self.open.nonzero().squeeze(1)
                active = len(keep)
                if active == 0:
                    self.rows = []
                    continue
                if taken < len(waiting) and mergeable(self.cache) and active <= TURN_AT * capacity:
                    self._keep(keep)
                    group = self._next(waiting, taken, budget, most)
                    if group:
                        self._advance()  # the kept rows' chosen tokens enter the cache before new rows join
                        self._join(group)
                        taken += len(group)
                        capacity = max(capacity, len(self.rows))
                        continue
                elif active <= TURN_AT * len(self.rows):
                    self._keep(keep)
            self._advance()

    def _next(self, waiting: list[PromptRow], taken: int, budget: int, most: int) -> list[PromptRow]:
        """The waiting rows that still fit beside those in work."""
        group: list[PromptRow] = []
        width = max((len(row.prompt) + row.room for row in self.rows), default=0)
        for row in waiting[taken:]:
            width = max(width, len(row.prompt) + row.room)
            count = len(self.rows) + len(group) + 1
            if count > most or (count > 1 and count * width > budget):
                break
            group.append(row)
        return group

    def _start(self, rows: list[PromptRow]) -> None:
        """A batch of these rows alone; the last logits of their prompts choose the first tokens."""
        self.rows, self.attempted = rows, len(rows)
        self.cache, mask, self.logits = self._prefill([row.prompt for row in rows])
        self.width = mask.shape[1]
        self.mask = torch.cat([mask, mask.new_ones(len(rows), self.longest)], dim=1)
        self.position = mask.sum(-1)
        self.count = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        self.room = torch.tensor([row.room for row in rows], device=self.device)
        self.tokens = torch.zeros((len(rows), self.longest + 1), dtype=torch.long, device=self.device)
        self.open = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        if self.sampling is not None:  # [B, longest + 1]; a row that has finished may draw once more, for nothing
            drawn = np.stack([_uniforms(row.seed, self.longest + 1) for row in rows])
            self.uniforms = torch.from_numpy(drawn).to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Cache, mask [B, T] and last logits [B, V] of prompts; samples of one prompt share its run."""
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        groups = [list(place)]
        if self.device.type == "cpu" and mergeable(growing_cache(self.model)):
            groups = list(batches(groups[0], len, CPU_TOKENS))
        parts = [self._run(group) for group in groups]
        cache, mask, logits = parts[0]
        if len(parts) > 1:
            width = max(part[1].shape[1] for part in parts)
            _join_caches([part[0] for part in parts], width)
            mask = torch.cat([right_aligned(part[1], width) for part in parts])
            logits = torch.cat([part[2] for part in parts])
        if bool(torch.isnan(logits).any()):
            raise RunFailed("the model's logits are not numbers (NaN): its weights are damaged, or its dtype is too small for it")
        if len(place) < len(prompts):
            shared = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
            cache.batch_select_indices(shared)
            mask, logits = mask[shared], logits[shared]
        return cache, mask, logits

    def _run(self, prompts: list[tuple[int, ...]]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        ids, mask = pad_left(prompts, self.device)
        cache = growing_cache(self.model)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return cache, mask, out.logits[:, -1]

    def _choose(self) -> tuple[list[int], dict[int, bool]]:
        """Choose each row's next token; the places that finish with it, and whether by a stop token."""
        if self.sampling is None:
            chosen = self.logits.argmax(-1)
        else:
            chosen = draw(self.logits, self.uniforms.gather(1, self.count[:, None]).squeeze(1), self.sampling)
        stopped = torch.isin(chosen, self.stop) & self.open
        going = self.open & ~stopped
        self.chosen = chosen
        self.tokens.scatter_(1, self.count[:, None], chosen[:, None])
        self.count = self.count + going
        closed = stopped | (going & (self.count == self.room))
        self.steps += 1
        if self.until is not None and self.steps % LOOK == 0:
            for b in (going & ~closed).nonzero().squeeze(1).tolist():
                closed[b] = self.until(self.tokens[b, : int(self.count[b])].tolist())
        self.open = self.open & ~closed
        added, finished = torch.stack([going.sum(), closed.sum()]).tolist()
        if self.tick is not None:
            self.tick(finished, added)
        places = closed.nonzero().squeeze(1).tolist() if finished else []
        return places, {b: bool(stopped[b]) for b in places}

    def _advance(self) -> None:
        """Run the chosen tokens."""
        self.width += 1
        self.logits = self.model(
            input_ids=self.chosen[:, None],
            attention_mask=self.mask[:, : self.width],
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.position = self.position + 1

    def _keep(self, keep: torch.Tensor) -> None:
        """Only these places of the batch go on."""
        self.rows = [self.rows[b] for b in keep.tolist()]
        self.cache.batch_select_indices(keep)
        names = ["mask", "position", "count", "room", "tokens", "open", "chosen", *(["uniforms"] if self.sampling else [])]
        for name in names:
            setattr(self, name, getattr(self, name)[keep])

    def _join(self, rows: list[PromptRow]) -> None:
        """Run new prompts and put them behind the rows in work; columns that no row needs any more go."""
        self.attempted = len(self.rows) + len(rows)
        new = _Decoder(self.model, (), self.sampling, None)
        new.longest = self.longest
        new._start(rows)
        width = max(int(self.position.max()), new.width)
        _join_caches([self.cache, new.cache], width)
        mask = torch.cat([right_aligned(part.mask[:, : part.width], width) for part in (self, new)])
        self.mask, self.width = torch.cat([mask, mask.new_ones(len(mask), self.longest)], dim=1), width
        self.rows = [*self.rows, *rows]
        for name in ["logits", "position", "count", "room", "tokens", "open", *(["uniforms"] if self.sampling else [])]:
            setattr(self, name, torch.cat([getattr(self, name), getattr(new, name)]))


def mergeable(cache: DynamicCache) -> bool:
    """Whether rows of two such caches can stand in one: every layer keeps all of its columns."""
    return bool(cache.layers) and all(type(layer) is GrowingLayer for layer in cache.layers)


def _join_caches(caches: Sequence[DynamicCache], width: int) -> None:
    """Rows of all caches into the first one, right-aligned in `width` columns."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layers[0].join(layers[1:], width)


def right_aligned(mask: torch.Tensor, width: int) -> torch.Tensor:
    """The last `width` columns of [B, T]; where it has fewer, zeros before them."""
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))


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

    def join(self, others: Sequence[GrowingLayer], width: int) -> None:
        """Put other layers' rows behind these, all right-aligned in `width` columns; what is left of them is cut or empty."""
        parts = [self, *others]
        buffers = []
        for states in zip(*(part._buffers for part in parts), strict=True):
            count = sum(state.shape[0] for state in states)
            # Zeros, not garbage: a masked key weighs nothing, but nothing times NaN is NaN.
            buffer = states[0].new_zeros((count, states[0].shape[1], width + GROW, states[0].shape[3]))
            first = 0
            for part, state in zip(parts, states, strict=True):
                kept = min(width, part._length)
                buffer[first : first + state.shape[0], :, width - kept : width] = state[:, :, part._length - kept : part._length]
                first += state.shape[0]
            buffers.append(buffer)
        self._buffers, self._length = buffers, width
        self.keys, self.values = (buffer[..., :width, :] for buffer in buffers)


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own cache (sliding windows and all), with plain layers replaced by `GrowingLayer`."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache

"""The algebra of merging: sources → (mask) → sparsify → scale → combine, one tensor at a time, in pieces that fit the processor's cache.

    D = combine_i( c_i(layer) · sparsify_i(τ_i) ),     Y = round(W + λ D)

W is the anchor's tensor, τ_i the update of source i. A published method is a preset (kind `weightspace`): the stages it is made of.
A stage that must know a whole tensor first (a threshold, a norm, an angle) is asked to `prepare` it and reads its pieces once or
twice; one that must know the whole model has a `survey`. Nothing holds more than a few pieces, whatever the model's size.

Arithmetic is fp32 in the order of the sources. Random numbers depend on (seed, source, tensor, element) alone. So piece sizes,
threads and shards change no byte.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, PlainSerializer

from guidetune import registry
from guidetune.errors import BadInput
from guidetune.registry import Method

PIECE_VALUES = 1 << 18  # small enough for the processor's cache, and for the allocator to use the same memory again
HELD_BYTES = 32 << 20  # updates of a tensor are kept between its passes up to this size, else read again


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one tensor: the updates of its sources, fp32, and the anchor's rows."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    taus: tuple[torch.Tensor, ...]
    anchor: Callable[[], torch.Tensor]

    @property
    def first(self) -> int:
        """Index in the flattened tensor of this piece's first value."""
        return self.start * prod(self.shape[1:])


@dataclass
class View:
    """One tensor of a merge, as stages see it. `sources`: the ids of those that change it; `weights`: theirs, in the same order."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    layer: tuple[int, int] | None
    seed: int
    read: Callable[[int, int], tuple[torch.Tensor, ...]] = field(repr=False)
    anchor: Callable[[int, int], torch.Tensor] = field(repr=False)
    _held: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def piece(self, start: int, stop: int) -> Piece:
        taus = self._held.get(start)
        if taus is None or len(taus[0]) != stop - start:
            taus = self.read(start, stop)
            if self.numel * 4 * len(self.sources) <= HELD_BYTES:
                self._held[start] = taus
        return Piece(self.name, self.shape, start, stop, taus, lambda: self.anchor(start, stop))

    def pieces(self) -> Iterator[Piece]:
        for start, stop in ranges(self.shape):
            yield self.piece(start, stop)

    def release(self) -> None:
        """Forget the updates that are held."""
        self._held.clear()


def ranges(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The row ranges a tensor is worked on in: a function of its shape only. A vector is one range."""
    if len(shape) < 2:
        return [(0, shape[0] if shape else 1)]
    step = max(1, PIECE_VALUES // max(1, prod(shape[1:])))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


class Sparsifier:
    """τ → τ̂ with some values dropped (and the rest rescaled). Stateless; what `prepare` returns comes back in `apply`.

    `reads`: how often it reads a tensor before `apply`, at most.
    """

    @property
    def reads(self) -> int:
        return 0

    def survey(self, views: Iterable[View]) -> Any:
        """Whatever must be known of the whole model; None: nothing, and the model is not read."""
        return None

    def prepare(self, view: View, survey: Any) -> Any:
        """Whatever must be known of the tensor."""
        return None

    def apply(self, i: int, tau: torch.Tensor, piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        """τ̂ of source i in this piece. `tau` must stay as it is."""
        return tau


class Combiner(ABC):
    """D of one piece from the sparsified and weighted updates. `plain`: of a single source it is w τ. `reads`: as a sparsifier's.

    `every_source`: a source that leaves a tensor as it is counts there too, with an update of zero.
    """

    plain: ClassVar[bool] = False
    every_source: ClassVar[bool] = False

    @property
    def reads(self) -> int:
        return 0

    def prepare(self, view: View, taus: Callable[[], Iterator[tuple[Piece, list[torch.Tensor]]]]) -> Any:
        """Whatever must be known of the tensor; `taus()` reads its sparsified, unweighted updates piece by piece."""
        return None

    def coefficients(self, weights: Sequence[float]) -> list[float] | None:
        """c_i where D = Σ c_i τ̂_i with numbers that do not depend on the updates; else None."""
        return None

    @abstractmethod
    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        """D of this piece. `taus` must stay as they are."""


Scale = Callable[[View], float]


class Mask(ABC):
    """τ → what is kept of it, value by value, by what was decided beforehand: sparsifiers and combiners see no more than that."""

    @abstractmethod
    def apply(self, source: str, name: str, first: int, tau: torch.Tensor) -> torch.Tensor:
        """The masked update of a source: `tau` holds values of the tensor `name` from `first` on, counted in the flattened tensor."""

    def over(self, view: View) -> View:
        """The view of a tensor through this mask."""
        width = prod(view.shape[1:])

        def read(start: int, stop: int) -> tuple[torch.Tensor, ...]:
            taus = view.read(start, stop)
            return tuple(self.apply(source, view.name, start * width, tau) for source, tau in zip(view.sources, taus, strict=True))

        return replace(view, read=read, _held={})


@dataclass(frozen=True)
class Stages:
    """What a preset is made of. `scale(view)` multiplies D of a tensor; `factor` all of D."""

    combine: Combiner
    sparsify: Sparsifier = field(default_factory=Sparsifier)
    scale: Scale | None = None
    factor: float = 1.0
    # LiNeS' shallow value by the ratio of norms: (survey of the model) → Scale
    scale_from: Callable[[Iterable[View], Callable[[View], Iterator[tuple[Piece, torch.Tensor]]]], Scale] | None = None
    mask: Mask | None = None  # what is kept of each source's update, before anything else is made of it

    @property
    def reads(self) -> int:
        """How often a tensor is read at most, the last time to be written."""
        before = self.sparsify.reads + self.combine.reads
        return before + 1 + (0 if self.scale_from is None else before + 1)

    def memory(self, sources: int, threads: int) -> int:
        """Bytes at work beside the libraries, at most: what each thread holds of a tensor, and the temporaries of a piece."""
        return threads * (HELD_BYTES + 4 * PIECE_VALUES * (4 * sources + 8))

    def coefficients(self, view: View) -> list[float] | None:
        """c_i of a tensor's sources where its D is Σ c_i τ_i, known without reading them; else None."""
        found = self.combine.coefficients(view.weights)
        if found is None or type(self.sparsify) is not Sparsifier or self.scale_from is not None:
            return None
        factor = self.factor * (1.0 if self.scale is None else self.scale(view))
        return [factor * c for c in found]

    @property
    def plain(self) -> bool:
        """Of a single source: its update times its weight and `factor`, nothing else."""
        untouched = self.mask is None and type(self.sparsify) is Sparsifier
        return self.combine.plain and untouched and self.scale is None and self.scale_from is None


class Preset(Method):
    """A published method of merging: a frozen set of options that returns its stages."""

    sources_needed: ClassVar[tuple[int, int | None]] = (1, None)

    def stages(self) -> Stages:
        raise TypeError(f"preset {type(self).__name__} does not define stages()")

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of a merge: the options, and of presets that learn what was learnt."""
        inner = {name: getattr(self, name) for name in type(self).model_fields}
        return {**self.spec(), **{name: one.identity() for name, one in inner.items() if isinstance(one, Preset)}}


On = Annotated[Method, BeforeValidator(lambda value: registry.build("weightspace", value)), PlainSerializer(lambda preset: preset.spec())]
"""An option that is a preset itself."""


class Merger:
    """Stages at work on the tensors of a merge."""

    def __init__(self, stages: Stages, views: Mapping[str, View]) -> None:
        self.stages = stages
        self.views = views if stages.mask is None else {name: stages.mask.over(view) for name, view in views.items()}
        self._survey = stages.sparsify.survey(self.views.values())
        self._scale = stages.scale
        self._prepared: dict[str, tuple[Any, Any]] = {}
        if stages.scale_from is not None:
            self._scale = stages.scale_from(self.views.values(), self._combined)

    def update(self, name: str, start: int, stop: int) -> torch.Tensor:
        """D of rows [start, stop)."""
        view = self.views[name]
        parts = []
        for a, b in ranges(view.shape):  # always in the same pieces: what stages know of a tensor is kept by piece
            if a < stop and start < b:
                part = self._combine(view, view.piece(a, b))
                parts.append(part if not view.shape else part[max(start, a) - a : min(stop, b) - a])
        d = parts[0] if len(parts) == 1 else torch.cat(parts)
        factor = self.stages.factor * (1.0 if self._scale is None else self._scale(view))
        return d if factor == 1.0 else d * factor

    def close(self, name: str) -> None:
        """Forget what is held of a tensor that is finished."""
        self._prepared.pop(name, None)
        self.views[name].release()

    def updates(self, name: str) -> Iterator[tuple[Piece, Callable[[], list[torch.Tensor]]]]:
        """The pieces of a tensor, and a function for each that gives the sparsified, unweighted updates of its sources."""
        view = self.views[name]
        for start, stop in ranges(view.shape):

            def read(start: int = start, stop: int = stop) -> list[torch.Tensor]:
                mine, _ = self._prepare(view)
                return self._sparse(view, view.piece(start, stop), mine)

            yield Piece(name, view.shape, start, stop, (), lambda start=start, stop=stop: view.anchor(start, stop)), read
        self.close(name)

    def _sparse(self, view: View, piece: Piece, prepared: Any) -> list[torch.Tensor]:
        return [self.stages.sparsify.apply(i, tau, piece, view, prepared) for i, tau in enumerate(piece.taus)]

    def _prepare(self, view: View) -> tuple[Any, Any]:
        if view.name not in self._prepared:
            mine = self.stages.sparsify.prepare(view, self._survey)

            def taus() -> Iterator[tuple[Piece, list[torch.Tensor]]]:
                for piece in view.pieces():
                    yield piece, self._sparse(view, piece, mine)

            self._prepared[view.name] = mine, self.stages.combine.prepare(view, taus)
        return self._prepared[view.name]

    def _combine(self, view: View, piece: Piece) -> torch.Tensor:
        sparsify, combine = self._prepare(view)
        return self.stages.combine.combine(self._sparse(view, piece, sparsify), view.weights, piece, view, combine)

    def _combined(self, view: View) -> Iterator[tuple[Piece, torch.Tensor]]:
        for piece in view.pieces():
            yield piece, self._combine(view, piece)
        self.close(view.name)


_NUMBERED = re.compile(r"^(?P<stack>(?:[^.]+\.)*?[^.]+)\.(?P<index>\d+)\.")


def layers(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Parameter → (l, L): its block, counted from 1, of how many; parameters outside the blocks are left out.

    The blocks are the outermost numbered modules. Raises BadInput where a model has two such stacks (vision and text).
    """
    found: dict[str, dict[str, int]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            found.setdefault(match["stack"], {})[name] = int(match["index"])
    if len(found) > 1:
        raise BadInput(f"the model has several stacks of layers ({', '.join(sorted(found))}): a factor by depth is not defined")
    for members in found.values():
        order = {index: place + 1 for place, index in enumerate(sorted(set(members.values())))}
        return {name: (order[index], len(order)) for name, index in members.items()}
    return {}

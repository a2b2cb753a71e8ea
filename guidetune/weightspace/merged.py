"""Several updates joined by a weight-space preset: one update like any other, computed piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from guidetune import registry
from guidetune.errors import BadInput
from guidetune.models.checkpoint import Checkpoint
from guidetune.models.names import ParameterNames
from guidetune.models.sources import ModelSource, resolve
from guidetune.weightspace.scale import Weight
from guidetune.weightspace.sources import Delta, fingerprint_of
from guidetune.weightspace.stages import Merger, Preset, View, layers


class Merged(Delta):
    """What `preset` makes of `parts`, (weight, update) each. `anchor`: the model it is added to, for presets that look at it.

    Sources are put in the order of what they are, not of the list, so that the list's order changes no byte; presets whose
    result depends on the order of two models take it from the list.
    """

    def __init__(self, preset: Preset, parts: Iterable[tuple[float | Weight, Delta]], anchor: Checkpoint, seed: int = 0) -> None:
        self.preset, self.anchor, self.seed = preset, anchor, seed
        self.parts = list(parts)
        least, most = preset.sources_needed
        if len(self.parts) < least or (most is not None and len(self.parts) > most):
            wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
            raise BadInput(f"{preset.name} needs {wanted} sources, there are {len(self.parts)}")
        ids = [fingerprint_of(delta) for _, delta in self.parts]
        if len(set(ids)) < len(ids):
            raise BadInput("a source is given twice; give it once, with the sum of the weights")
        self.ids = ids
        self._order = sorted(range(len(ids)), key=lambda i: ids[i]) if most is None else list(range(len(ids)))
        self._merger: Merger | None = None
        self._lock = threading.Lock()
        self._collect()

    def _collect(self) -> None:
        self.shapes = {}
        for i in self._order:
            self.shapes.update(self.parts[i][1].shapes)

    def fit(self, names: ParameterNames) -> list[str]:
        problems = [problem for _, part in self.parts for problem in part.fit(names)]
        self._collect()
        self._names = names
        return problems

    def merger(self) -> Merger:
        with self._lock:
            if self._merger is None:
                stages = self.preset.stages()
                by_depth = stages.scale is not None or stages.scale_from is not None
                self._merger = Merger(stages, self.views(by_depth))
            return self._merger

    def views(self, by_depth: bool = False) -> dict[str, View]:
        """Every changed tensor as stages see it. `by_depth`: with its place among the blocks, also where no weight goes by it."""
        by_depth |= any(isinstance(weight, Weight) for weight, _ in self.parts)
        depth = layers(self.anchor.names.shapes) if by_depth else {}
        return {name: self._view(name, shape, depth) for name, shape in self.shapes.items()}

    def labels(self) -> list[str]:
        """A name for each source, in the order of the list: what its files are called, told apart by numbers where they are alike."""
        from guidetune.weightspace.apply import read_folders

        folders = [read_folders(part)[:1] for _, part in self.parts]
        names = [f"{folder[0].parent.name}/{folder[0].name}" if folder else "update" for folder in folders]
        return [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names, 1)]

    def _view(self, name: str, shape: tuple[int, ...], depth: dict[str, tuple[int, int]]) -> View:
        every = self.preset.stages().combine.every_source
        chosen = [i for i in self._order if every or name in self.parts[i][1].shapes]

        def rows(i: int, start: int, stop: int) -> torch.Tensor:
            if name in self.parts[i][1].shapes:
                return self.parts[i][1].rows(name, start, stop).contiguous()
            return torch.zeros(stop - start, *shape[1:]) if shape else torch.zeros(())

        def read(start: int, stop: int) -> tuple[torch.Tensor, ...]:
            found = tuple(rows(i, start, stop) for i in chosen)
            for i, tau in zip(chosen, found, strict=True):
                if not bool(torch.isfinite(tau.sum())) and not bool(torch.isfinite(tau).all()):
                    raise BadInput(f"source {i + 1}: the update of {name} holds values that are not finite; nothing was published")
            return found

        place = self.anchor.names.file_of.get(name, name)
        return View(
            name,
            shape,
            tuple(self.ids[i] for i in chosen),
            tuple(w(name, depth.get(name)) if isinstance(w := self.parts[i][0], Weight) else w for i in chosen),
            depth.get(name),
            self.seed,
            read,
            lambda start, stop: self.anchor.float_rows(place, start, stop).float(),
        )

    def terms(self, name: str) -> list[tuple[float, Delta]] | None:
        """(c_i, update) of a parameter where what is made of it is Σ c_i τ_i; None where the preset does more."""
        merger = self.merger()
        found = merger.stages.coefficients(merger.views[name])
        chosen = [self.parts[i][1] for i in self._order if name in self.parts[i][1].shapes]
        return None if found is None else list(zip(found, chosen, strict=True))

    def members(self) -> list[Delta]:
        return [member for _, part in self.parts for member in part.members()]

    def begin(self) -> None:
        self.merger()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.merger().update(name, start, stop)

    def done(self, name: str) -> None:
        if self._merger is not None:
            self._merger.close(name)
        for _, part in self.parts:
            part.done(name)

    def same(self, a: str, b: str) -> bool:
        return all(part.same(a, b) for _, part in self.parts)

    def checks(self) -> list[str]:
        return [problem for _, part in self.parts for problem in part.checks()]

    def describe(self) -> dict[str, Any]:
        weights = self.describe_weights()
        parts: Sequence[Any] = [[weights[i], self.parts[i][1].describe()] for i in self._order]
        return {"merge": self.preset.identity(), "parts": parts, "seed": self.seed}

    def describe_weights(self) -> list[Any]:
        """The sources' weights, in the order of the list."""
        return [asdict(w) if isinstance(w, Weight) else w for w, _ in self.parts]

    def close(self) -> None:
        for _, part in self.parts:
            part.close()
        self.anchor.close()


def added(parts: Iterable[tuple[float, Delta]], into: str | Path | ModelSource) -> Merged:
    """Σ weight · update for the model `into`, exactly: products are added, never the factors A and B."""
    return Merged(registry.build("weightspace", "sum"), parts, Checkpoint(resolve(into).path))

"""Averages of models weighted by statistics of each: diagonal Fisher information, or the inner products of a linear layer's inputs.

What was collected lies in safetensors files of a learnt folder, one model's worth or less for each source, and is read by rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from guidetune import artefacts
from guidetune.errors import RunFailed
from guidetune.models.checkpoint import TensorFiles, TensorInfo, read_header
from guidetune.weightspace.stages import Combiner, Piece, View
from guidetune.weightspace.store import Entry, SafetensorsWriter

INDEX = "statistics.json"


class Collection:
    """Statistics in a folder: `write` while learning, `close` when all is there; `open` to read them."""

    def __init__(self, folder: Path, sources: Sequence[str], labels: Sequence[str]) -> None:
        self.folder, self.sources, self.labels = folder, list(sources), list(labels)
        self._files: dict[str, list[str]] = {id: [] for id in sources}

    def write(self, source: str, tensors: dict[str, torch.Tensor]) -> None:
        """Some statistics of a source, fp32, as one more file.

        Raises:
            RunFailed: a value is not finite.
        """
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                label = self.labels[self.sources.index(source)]
                raise RunFailed(f"the statistics of {name} in {label} are not finite: its weights or these rows make values too large")
        file = f"source-{self.sources.index(source) + 1}-{len(self._files[source]) + 1}.safetensors"
        with SafetensorsWriter(self.folder / file, [Entry(name, "F32", tuple(t.shape)) for name, t in tensors.items()]) as writer:
            for name, tensor in tensors.items():
                writer.write(name, 0, tensor.detach().cpu().float().contiguous().numpy().tobytes())
        self._files[source].append(file)

    def close(self, names: dict[str, str], **more: Any) -> None:
        """`names`: parameter -> the name its statistics have."""
        sources = [{"source": label, "id": id, "files": self._files[id]} for label, id in zip(self.labels, self.sources, strict=True)]
        artefacts.write_json(self.folder / INDEX, {"sources": sources, "names": names, **more})

    @staticmethod
    def open(folder: Path, parameter: str) -> dict[str, TensorFiles] | None:
        """By source, files in which the statistics of a parameter are called `parameter`; None where there are none of it."""
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        own = index["names"].get(parameter)
        if own is None:
            return None
        found: dict[str, TensorFiles] = {}
        for source in index["sources"]:
            infos: dict[str, TensorInfo] = {}
            for file in source["files"]:
                infos |= read_header(folder / file)
            found[source["id"]] = TensorFiles({parameter: infos[own]})
        return found


@dataclass(frozen=True)
class FisherMean(Combiner):
    """Σ w_i F_i τ_i / Σ w_i F_i, value by value, F_i at least `floor`."""

    every_source: ClassVar[bool] = True

    folder: Path
    floor: float

    def prepare(self, view: View, taus: Callable[[], Any]) -> Any:
        return Collection.open(self.folder, view.name)

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        total, share = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
        for id, tau, weight in zip(view.sources, taus, weights, strict=True):
            fisher = prepared[id].rows(view.name, piece.start, piece.stop).clamp_min_(self.floor).mul_(weight)
            share += fisher
            total.addcmul_(fisher, tau)
        return total.div_(share.masked_fill_(share == 0, 1.0))


@dataclass(frozen=True)
class RegressionMean(Combiner):
    """Of linear weights W_i [out, in]: the W of least Σ w_i ‖X_i Wᵀ − X_i W_iᵀ‖², from the Gram matrices G_i = X_iᵀ X_i [in, in].

        W = (Σ w_i W_i G'_i) (Σ w_i G'_i)⁻¹,    G' = a G + (1 − a) diag(G) + δ m I,  m the mean of all diagonals

    As updates: D = Σ τ_i M_i with M_i = w_i G'_i (Σ w_j G'_j)⁻¹, solved in fp64 once for a tensor. The damping is the same for every
    source, so where no input ever goes the models are averaged, as is whatever has no Gram matrix.
    """

    every_source: ClassVar[bool] = True

    folder: Path
    off_diagonal: float
    damping: float

    def prepare(self, view: View, taus: Callable[[], Any]) -> Any:
        files = Collection.open(self.folder, view.name)
        if files is None:
            return None
        grams = [files[id].rows(view.name).double() for id in view.sources]
        return regression_maps(grams, view.weights, self.off_diagonal, self.damping, view.name)

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        total = torch.zeros_like(taus[0])
        for i, (tau, weight) in enumerate(zip(taus, weights, strict=True)):
            total.add_(tau @ prepared[i] if prepared is not None else tau * (weight / sum(weights)))
        return total


def regression_maps(
    grams: Sequence[torch.Tensor], weights: Sequence[float], off_diagonal: float, damping: float, name: str = "a layer"
) -> list[torch.Tensor]:
    """M_i = w_i G'_i (Σ w_j G'_j)⁻¹, fp32 [in, in], from G_i in fp64; see `RegressionMean`.

    Raises:
        RunFailed: the sum cannot be inverted.
    """
    diagonals = [gram.diagonal() for gram in grams]
    mean = float(torch.stack(diagonals).mean())
    shaped = []
    for gram, diagonal in zip(grams, diagonals, strict=True):
        own = gram * off_diagonal
        own.diagonal().copy_(diagonal + damping * mean)
        shaped.append(own)
    total = torch.zeros_like(shaped[0])
    for own, weight in zip(shaped, weights, strict=True):
        total.add_(own, alpha=weight)
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed):
        raise RunFailed(f"the input products of {name} cannot be inverted: raise `damping`, or give more rows")
    # G S⁻¹ = (S⁻¹ G)ᵀ: both are symmetric
    return [torch.cholesky_solve(own, factor).T.mul(weight).float().contiguous() for own, weight in zip(shaped, weights, strict=True)]

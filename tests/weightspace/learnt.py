"""What presets that learn would have learnt, made up: so that their merge is held to the properties of every other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from guidetune.weightspace.coefficients import Coefficients, Table
from guidetune.weightspace.learning import learner, with_learnt
from guidetune.weightspace.masks import MaskWriter, write_manifest
from guidetune.weightspace.stages import Preset
from guidetune.weightspace.statistics import Collection, FisherMean


def given(preset: Preset, ids: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> Preset:
    """The preset with something learnt where it needs that: factors of one, masks of everything, or random statistics."""
    own = learner(preset)
    if own is None:
        return preset
    folder = Path(tempfile.mkdtemp(prefix="learnt-"))
    combine = own.stages().combine
    if own.stages().mask is not None:
        with MaskWriter(folder / "all.safetensors", shapes) as writer:
            for name, shape in shapes.items():
                writer.write(name, torch.ones(tuple(shape), dtype=torch.bool))
        write_manifest(folder, {"all.safetensors": writer}, dict.fromkeys(ids, "all.safetensors"))
        return with_learnt(preset, folder)
    if isinstance(combine, Coefficients):
        Table({id: {name: [1.0] * getattr(own, "parts", 1) for name in shapes} for id in ids}, getattr(own, "parts", 1)).save(folder, ids)
        return with_learnt(preset, folder)
    found = Collection(folder, ids, ids)
    chosen = {n: tuple(s) for n, s in shapes.items() if isinstance(combine, FisherMean) or (len(s) == 2 and "embed" not in n)}
    for k, id in enumerate(ids):
        draw = torch.Generator().manual_seed(k)
        if isinstance(combine, FisherMean):
            found.write(id, {name: torch.rand(shape, generator=draw) for name, shape in chosen.items()})
        else:
            inputs = {name: torch.randn(50, shape[1], generator=draw) for name, shape in chosen.items()}
            found.write(id, {name: x.T @ x for name, x in inputs.items()})
    found.close({name: name for name in chosen})
    return with_learnt(preset, folder)

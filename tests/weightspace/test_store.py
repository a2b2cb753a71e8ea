"""The safetensors writer against the reference reader, for any set of tensors, shards and write order."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from guidetune.errors import BadInput
from guidetune.models.checkpoint import Checkpoint, TensorFiles, read_header
from guidetune.weightspace.rounding import round_to, uniform
from guidetune.weightspace.store import Entry, SafetensorsWriter, parse_size, plan_shards, shard_names, write_index

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}
entries = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda s: s != "__metadata__" and s.isprintable()),
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(entries, st.integers(0, 2**32))
def test_written_files_read_back(tmp_path_factory: pytest.TempPathFactory, spec: dict, seed: int) -> None:
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    draw = random.Random(seed)
    tensors = {name: (torch.rand(shape) * 9).to(DTYPES[code]) for name, (code, shape) in spec.items()}
    pieces = []
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        cut = draw.randint(0, len(raw))
        pieces += [(name, 0, raw[:cut]), (name, cut, raw[cut:])]
    draw.shuffle(pieces)
    with SafetensorsWriter(path, [Entry(name, code, tuple(shape)) for name, (code, shape) in spec.items()]) as writer:
        for name, offset, data in pieces:
            writer.write(name, offset, data)
    with safe_open(path, "pt") as reference:
        assert set(reference.keys()) == set(tensors) and reference.metadata() == {"format": "pt"}
        with TensorFiles(read_header(path)) as own:
            for name, tensor in tensors.items():
                assert torch.equal(reference.get_tensor(name), tensor)
                assert torch.equal(own.rows(name), tensor)
                if tensor.dim() and len(tensor) > 1:
                    assert torch.equal(own.rows(name, 1, 2), tensor[1:2])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 100))
def test_shards_hold_every_tensor_once_in_order(sizes: list[int], room: int) -> None:
    made = [Entry(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(made, room)
    assert [entry for shard in shards for entry in shard] == made
    assert all(sum(e.nbytes for e in shard) <= room or len([e for e in shard if e.nbytes]) == 1 for shard in shards)
    assert all(shards)


def test_index_and_names(tmp_path: Path) -> None:
    shards = [[Entry("a", "F32", (2,))], [Entry("b", "BF16", (3, 2)), Entry("c", "U8", ())]]
    write_index(tmp_path, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 8 + 12 + 1
    assert index["weight_map"] == {"a": shard_names(2)[0], "b": shard_names(2)[1], "c": shard_names(2)[1]}
    assert shard_names(1) == ["model.safetensors"] and shard_names(2)[1] == "model-00002-of-00002.safetensors"


def test_a_missing_byte_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not written"), SafetensorsWriter(tmp_path / "x", [Entry("a", "F32", (2,))]) as writer:
        writer.write("a", 0, b"\0" * 4)
    with pytest.raises(ValueError, match="listed twice"):
        SafetensorsWriter(tmp_path / "y", [Entry("a", "F32", (2,)), Entry("a", "F32", (2,))])


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5 kb", 1500), (7, 7), ("9000", 9000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5 XB", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(BadInput, match="5GB, 512MiB"):
        parse_size(text)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    for content in (data, struct.pack("<Q", len(data)) + data):
        path.write_bytes(content)
        try:
            read_header(path)
        except BadInput:
            continue


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [100, 104]}},
        {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
        {"a": 3},
        [1],
    ],
)
def test_lying_headers(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(BadInput, match="damaged"):
        read_header(tmp_path / "x.safetensors")


def test_index_may_not_point_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}}))
    with pytest.raises(BadInput, match="outside"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4000, generator=generator) * 10.0 ** torch.randint(-9, 3, (4000,), generator=generator)
    exact[:5] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-9])
    made = torch.stack([round_to(exact, dtype, "stochastic", (seed, "w"), 0).float() for seed in range(400)])
    near = exact.to(dtype)
    up, down = (torch.nextafter(near.float(), torch.tensor(sign)).to(dtype) for sign in (torch.inf, -torch.inf))
    gap = (near.float() - exact).abs()
    # Only the two neighbours of the exact value are ever chosen, and their mean is the exact value.
    step = made.amax(0) - made.amin(0)
    assert bool(((made.amin(0) <= exact) & (exact <= made.amax(0)) | (gap < 0.02 * step.clamp_min(1e-30)) | (step == 0)).all())
    error = (made.double().mean(0) - exact.double()).abs()
    assert bool((error <= 0.2 * step.double() + gap.double() * (step == 0)).all())
    assert torch.equal(made[:, exact == near.float()], near.float()[exact == near.float()].expand(400, -1))
    assert up.shape == down.shape
    # The random number belongs to the place, not to the piece.
    whole = round_to(exact, dtype, "stochastic", (3, "w"), 0)
    parts = torch.cat([round_to(exact[i : i + 700], dtype, "stochastic", (3, "w"), i) for i in range(0, 4000, 700)])
    assert torch.equal(whole.view(torch.int16), parts.view(torch.int16))


def test_uniform_numbers_are_uniform() -> None:
    u = uniform((0, "w"), 0, 100_000)
    assert 0 <= float(u.min()) and float(u.max()) < 1 and abs(float(u.mean()) - 0.5) < 0.005
    assert abs(float(u.var()) - 1 / 12) < 0.002 and abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.02
    assert not torch.equal(u, uniform((1, "w"), 0, 100_000)) and not torch.equal(u, uniform((0, "v"), 0, 100_000))

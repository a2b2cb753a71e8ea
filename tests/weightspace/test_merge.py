"""Merging whole models: nothing but the plan decides the bytes, and broken inputs leave nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guidetune import registry
from guidetune.errors import BadInput, RunFailed
from guidetune.weightspace import apply, stages
from guidetune.weightspace.plan import MergePlan, merge, preview
from tests.models.pairs import make_adapter, save
from tests.tiny import tiny_model
from tests.weightspace.mergekit import models, read


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    return models(tmp_path_factory.mktemp("models"))


def plan(tuned: tuple[str, list[str]], method: Any, order: tuple[int, ...] = (0, 1, 2), **options: Any) -> MergePlan:
    base, folders = tuned
    parts = [{"model": folders[k], "weight": 0.3 + 0.1 * k} for k in order]
    return MergePlan.model_validate({"anchor": base, "sources": parts, "method": method, "out_dtype": "bfloat16", **options})


@pytest.mark.parametrize(
    "method", ["ties", {"method": "dare", "density": 0.5, "sign": "elect"}, {"method": "lines", "on": "breadcrumbs"}, "sce"]
)
def test_threads_shards_pieces_and_order_change_no_byte(
    tuned: tuple[str, list[str]], method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "available_cores", lambda: 1)
    merge(plan(tuned, method), tmp_path / "a")
    monkeypatch.setattr(apply, "available_cores", lambda: 4)
    merge(plan(tuned, method, (2, 0, 1), max_shard="40KB"), tmp_path / "b")
    monkeypatch.setattr(stages, "HELD_BYTES", 0)
    if method != "sce":  # energies are summed piece by piece
        monkeypatch.setattr(stages, "PIECE_VALUES", 500)
    merge(plan(tuned, method), tmp_path / "c")
    a, b, c = (read(tmp_path / name) for name in "abc")
    for name in a:
        assert torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]), name


def test_adapters_and_models_mix_and_lines_scales_the_adapter(tuned: tuple[str, list[str]], tmp_path: Path) -> None:
    base, folders = tuned
    adapter = make_adapter(Path(base), tmp_path / "adapter")
    lines = {"anchor": base, "sources": [{"adapter": str(adapter)}], "method": {"method": "lines", "alpha": 0.2}, "out_dtype": "float32"}
    merge(MergePlan.model_validate(lines), tmp_path / "scaled")
    merge(MergePlan.model_validate({**lines, "method": "sum"}), tmp_path / "plain")
    w, scaled, full = (read(Path(p)) for p in (base, tmp_path / "scaled", tmp_path / "plain"))
    depth = stages.layers(w)
    for name in w:
        factor = 0.2 + 0.8 * ((depth[name][0] - 1) / (depth[name][1] - 1)) if name in depth else 0.2
        torch.testing.assert_close(scaled[name], w[name] + factor * (full[name] - w[name]), rtol=1e-5, atol=1e-6)
    both = {**lines, "sources": [{"adapter": str(adapter)}, {"model": folders[0]}], "method": "ties"}
    assert merge(MergePlan.model_validate(both), tmp_path / "both").result["tensors_moved"] > 0


def broken(tmp_path: Path, change: Any, **options: Any) -> str:
    folder = save(tiny_model(**{"family": "llama", **options}), tmp_path / "broken")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors, file)
    return str(folder)


def poison(tensors: dict[str, torch.Tensor], file: Path) -> None:
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def cut(tensors: dict[str, torch.Tensor], file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def shards(tensors: dict[str, torch.Tensor], file: Path) -> list[Path]:
    file.unlink()
    tiny_model("llama").save_pretrained(file.parent, max_shard_size="20KB")
    return sorted(file.parent.glob("model-*.safetensors"))


def lose_a_shard(tensors: dict[str, torch.Tensor], file: Path) -> None:
    shards(tensors, file)[1].unlink()


def cut_a_shard(tensors: dict[str, torch.Tensor], file: Path) -> None:
    last = shards(tensors, file)[-1]
    last.write_bytes(last.read_bytes()[:-100])


def nothing(tensors: dict[str, torch.Tensor], file: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (poison, {}, "not finite"),
        (cut, {}, "damaged"),
        (cut_a_shard, {}, "damaged"),
        (lose_a_shard, {}, "is incomplete: model-00002-of-.* is in model.safetensors.index.json but not in the folder"),
        (nothing, {"vocab": 160}, "is \\[160.*|vocabularies of 160 and 128 tokens"),
        (nothing, {"num_hidden_layers": 3}, "lacks model.layers"),
        (nothing, {"family": "phi3"}, "lacks model.layers"),
        (nothing, {"family": "mistral"}, "is a mistral model and .* a llama model"),
        (nothing, {"family": "qwen3", "head_dim": 8}, "q_norm"),
    ],
    ids=["nan", "truncated", "truncated-shard", "missing-shard", "vocabulary", "depth", "architecture", "same-names", "near-architecture"],
)
@pytest.mark.parametrize("method", ["sum", "ties"])
def test_broken_sources_leave_nothing(
    tuned: tuple[str, list[str]], method: str, change: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base, folders = tuned
    bad = broken(tmp_path, change, **options)
    spec = {"anchor": base, "sources": [{"model": folders[0]}, {"model": bad}], "method": method}
    with pytest.raises((BadInput, RunFailed), match=words):
        merge(MergePlan.model_validate(spec), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial/*.safetensors"))


def test_a_source_given_twice_is_refused(tuned: tuple[str, list[str]], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="given twice"):
        merge(plan(tuned, "ties", (0, 0)), tmp_path / "out")
    base, folders = tuned
    shutil.copytree(folders[0], tmp_path / "copy")  # the same weights under another name
    twice = {"anchor": base, "sources": [{"model": folders[0]}, {"model": str(tmp_path / "copy"), "weight": 2}]}
    with pytest.raises(BadInput, match="given twice"):
        merge(MergePlan.model_validate(twice), tmp_path / "out")
    with pytest.raises(BadInput, match="needs 2 sources, there are 3"):
        merge(plan(tuned, "slerp"), tmp_path / "out")


def test_tied_against_untied(tuned: tuple[str, list[str]], tmp_path: Path) -> None:
    """A head of its own is an update of its own: the result is stored untied, and says so; an adapter is refused (test_refusals)."""
    base, _ = tuned
    tied = save(tiny_model("llama", tie_word_embeddings=True, seed=3), tmp_path / "tied")
    done = merge(MergePlan.model_validate({"anchor": str(tied), "sources": [{"model": base}]}), tmp_path / "out")
    assert done.result["untied"] and any("stored untied" in text for text in done.result["warnings"])
    got, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(Path(base) / "model.safetensors")
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-6)
    done = merge(MergePlan.model_validate({"anchor": base, "sources": [{"model": str(tied)}]}), tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    torch.testing.assert_close(back["lm_head.weight"], back["model.embed_tokens.weight"], rtol=0, atol=1e-6)


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tuned: tuple[str, list[str]], tmp_path: Path) -> None:
    text = preview(plan(tuned, "ties"))
    size = sum(tensor.numel() * 2 for tensor in read(Path(tuned[0])).values())
    assert f"writes: {size / 1e9:.2f} GB" in text and "up to 5 times" in text and "21 changed, 0 copied" in text
    with pytest.raises(BadInput, match="lacks model.layers"):
        bad = broken(tmp_path, lambda *_: None, num_hidden_layers=3)
        preview(MergePlan.model_validate({"anchor": tuned[0], "sources": [{"model": bad}]}))
    with pytest.raises(BadInput, match="scales by depth itself"):
        registry.build("weightspace", {"method": "lines", "on": "lines"})


@pytest.mark.parametrize("method", ["ties", {"method": "lines", "alpha": "norm", "on": "ties"}, "model_stock"])
def test_no_update_is_held_longer_than_its_tensor_is_worked_on(
    tuned: tuple[str, list[str]], method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, most = set(), []
    real = stages.View.piece

    def piece(self: stages.View, start: int, stop: int) -> stages.Piece:
        found = real(self, start, stop)
        held.add(self.name) if self._held else held.discard(self.name)
        most.append(len(held))
        return found

    def release(self: stages.View) -> None:
        self._held.clear()
        held.discard(self.name)

    monkeypatch.setattr(stages.View, "piece", piece)
    monkeypatch.setattr(stages.View, "release", release)
    monkeypatch.setattr(apply, "available_cores", lambda: 1)
    merge(plan(tuned, method), tmp_path / "out", verify="weights")
    assert max(most) == 1 and not held

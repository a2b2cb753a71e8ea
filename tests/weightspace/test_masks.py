"""Learned masks: the oracles of SOMF's and grafting's cards, the files that keep them, and both methods from the command line."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from guidetune import registry
from guidetune.errors import BadInput
from guidetune.weightspace import apply, combine, stages
from guidetune.weightspace.masks import (
    MaskFile,
    MaskWriter,
    StoredMasks,
    concrete,
    graft_slope,
    mean_rescaled,
    open_masks,
    overlap,
    relaxed_graft,
    write_manifest,
)
from guidetune.weightspace.plan import MergePlan, merge, parse_plan, preview
from guidetune.weightspace.stages import Merger, Stages, View
from tests.models.pairs import make_adapter, save
from tests.tiny import tiny_model

# -- mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, mean", [(1.0, 0.795), (0.5, 0.851)])
def test_a_concrete_draw_is_above_one_half_with_the_logits_probability(temperature: float, mean: float) -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    drawn = concrete(torch.full_like(uniform, 2.0), uniform, temperature)
    assert float((drawn > 0.5).float().mean()) == pytest.approx(1 / (1 + exp(-2)), abs=0.003)
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.002)
    sharp = concrete(torch.full_like(uniform, 2.0), uniform, 1e-4)
    assert float(((sharp > 1e-3) & (sharp < 1 - 1e-3)).float().mean()) < 1e-3


def test_a_masked_update_keeps_its_scale_and_an_empty_mask_gives_none() -> None:
    tau = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mean_rescaled(torch.ones(5, 7), tau), tau)
    torch.testing.assert_close(mean_rescaled(torch.full((5, 7), 0.3), tau), tau)
    assert torch.equal(mean_rescaled(torch.zeros(5, 7), tau), torch.zeros(5, 7))


def test_the_gradient_of_the_masked_weights_is_right_for_fixed_draws() -> None:
    generator = torch.Generator().manual_seed(2)
    uniform, tau, logits = (torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: mean_rescaled(concrete(x, uniform, 0.5), tau), (logits,))


def test_the_value_that_breaks_safety_is_masked_out_and_the_other_stays() -> None:
    """Two values, the first of which lowers the safe margin by 5 times itself: its probability goes to 0, the other's rises."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        uniform = torch.rand(2, generator=generator).clamp(1e-6, 1 - 1e-6)
        loss = -torch.nn.functional.logsigmoid(-5 * mean_rescaled(concrete(logits, uniform, 0.5), torch.ones(2))[0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    probability = torch.sigmoid(logits.detach())
    assert float(probability[0]) < 0.1 and float(probability[1]) > 0.4


def test_a_graft_starts_at_its_base_mask_and_its_slope_is_the_derivative() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(50, generator=generator, dtype=torch.float64, requires_grad=True)
    base = (torch.rand(50, generator=generator) < 0.3).double()
    gamma = relaxed_graft(scores, base, 10.0)
    away = (gamma - base).abs()
    assert 4.5e-5 < float(away.min()) and float(away.max()) < 1.3e-4
    assert torch.equal(relaxed_graft(scores + 20, base, 10.0).round(), 1 - base)
    target, delta = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    target[0] = delta[0] = 0.0
    (0.5 * (gamma * delta - target) ** 2).sum().backward()
    slope = (gamma.detach() * delta - target) * delta * graft_slope(scores.detach(), base, 10.0)
    torch.testing.assert_close(scores.grad, slope)
    assert scores.grad is not None and scores.grad[0] == 0  # no update, no matter


@pytest.mark.parametrize("seed", range(5))
def test_a_learnt_graft_lies_between_the_best_mask_and_the_largest_values(seed: int) -> None:
    """L = ½ Σ h (θ − θ*)², tuned to θ*: the best k values are those with the largest h δ²; learning only adds values, those first."""
    generator = torch.Generator().manual_seed(seed)
    d, k = 200, 10
    h = 10 ** (4 * torch.rand(d, generator=generator, dtype=torch.float64) - 2)
    delta = torch.randn(d, generator=generator, dtype=torch.float64)

    def loss(mask: torch.Tensor) -> float:
        return float((0.5 * h * (mask.double() * delta - delta) ** 2).sum())

    def first(order: torch.Tensor, n: int) -> torch.Tensor:
        return torch.zeros(d, dtype=torch.bool).index_fill_(0, order[:n], True)

    by_size, by_gain = delta.abs().argsort(descending=True), (h * delta**2).argsort(descending=True)
    base = first(by_size, k)
    scores = torch.rand(d, generator=generator, dtype=torch.float64)
    sizes = set()
    for _ in range(100):
        gradient = h * (relaxed_graft(scores, base.double(), 10.0) * delta - delta)
        scores -= 100 * gradient * delta * graft_slope(scores, base.double(), 10.0)
        learnt = base ^ (scores > 10)
        n = int(learnt.sum())
        sizes.add(n)
        assert loss(first(by_gain, n)) - 1e-9 <= loss(learnt) <= loss(first(by_size, n)) + 1e-9
    assert len(sizes) > 3  # it did learn


# -- files ------------------------------------------------------------------------------------------------------------


def store(folder: Path, **masks: dict[str, torch.Tensor]) -> dict[str, MaskFile]:
    writers = {}
    for source, tensors in masks.items():
        with MaskWriter(folder / f"{source}.safetensors", {name: mask.shape for name, mask in tensors.items()}) as writer:
            for name, mask in tensors.items():
                writer.write(name, mask)
        writers[f"{source}.safetensors"] = writer
    write_manifest(folder, writers, {source: f"{source}.safetensors" for source in masks})
    return open_masks(folder)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_masks_come_back_bit_for_bit_from_any_place(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), max_size=3)))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.4
    folder = tmp_path_factory.mktemp("masks")
    with MaskWriter(folder / "m.safetensors", {"w": shape}) as writer:
        left = mask.flatten()
        while len(left):
            part = data.draw(st.integers(1, len(left)))
            writer.write("w", left[:part])
            left = left[part:]
    write_manifest(folder, {"m.safetensors": writer}, {"s": "m.safetensors"})
    read = open_masks(folder)["s"]
    assert (folder / "m.safetensors").stat().st_size < 400 + mask.numel() // 8
    first = data.draw(st.integers(0, mask.numel() - 1))
    count = data.draw(st.integers(1, mask.numel() - first))
    assert torch.equal(read.bits("w", first, count), mask.flatten()[first : first + count])
    assert read.kept["w"] == int(mask.sum())
    read.files.close()


def through(folder: Path, taus: dict[str, torch.Tensor], rescale: bool = False) -> torch.Tensor:
    """Σ of the updates of one tensor "w" by source, through the masks of a folder."""
    names = tuple(sorted(taus))
    shape = tuple(taus[names[0]].shape)
    view = View(
        "w", shape, names, (1.0,) * len(names), None, 0, lambda a, b: tuple(taus[n][a:b] for n in names), lambda a, b: torch.zeros(1)
    )
    merger = Merger(Stages(combine.Sum(), mask=StoredMasks(folder, rescale)), {"w": view})
    return merger.update("w", 0, shape[0])


def test_grafts_of_a_mask_and_of_its_complement_are_the_whole_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    tau, mask = torch.randn(9, 5, generator=generator), torch.rand(9, 5, generator=generator) < 0.3
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    store(tmp_path / "a", s={"w": mask})
    store(tmp_path / "b", s={"w": ~mask})
    kept, rest = through(tmp_path / "a", {"s": tau}), through(tmp_path / "b", {"s": tau})
    assert torch.equal(kept + rest, tau) and torch.equal(kept != 0, mask)
    torch.testing.assert_close(through(tmp_path / "a", {"s": tau}, rescale=True), mean_rescaled(mask.float(), tau))
    monkeypatch.setattr(stages, "PIECE_VALUES", 11)  # pieces that end inside a byte
    assert torch.equal(through(tmp_path / "a", {"s": tau}), kept)


def test_overlap_is_the_share_of_the_other_region(tmp_path: Path) -> None:
    a = {"w": torch.tensor([True, True, True, False]), "v": torch.tensor([True])}
    b = {"w": torch.tensor([False, True, False, True])}
    masks = store(tmp_path, a=a, b=b, c={"w": torch.zeros(4, dtype=torch.bool)})
    expected = [[1.0, 0.5, None], [0.25, 1.0, None], [0.0, 0.0, None]]
    assert overlap(list(masks.values())) == expected
    manifest = json.loads((tmp_path / "masks.json").read_text())
    assert manifest["overlap"] == expected and manifest["files"]["a.safetensors"]["tensors"]["w"]["share"] == 0.75
    assert manifest["files"]["a.safetensors"]["share"] == 0.8


def test_masks_that_are_not_those_of_the_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no masks"):
        open_masks(tmp_path)
    store(tmp_path, a={"w": torch.ones(20, dtype=torch.bool)})
    with MaskWriter(tmp_path / "a.safetensors", {"v": (20,)}) as writer:
        writer.write("v", torch.ones(20, dtype=torch.bool))
    with pytest.raises(BadInput, match=r"a\.safetensors does not hold the masks that its manifest lists, first v"):
        open_masks(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(BadInput, match=r"a\.safetensors"):
        open_masks(tmp_path)


# -- from the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor, two models tuned from it (random changes), an adapter, and rows with two replies each."""
    root = tmp_path_factory.mktemp("masks")
    save(tiny_model(tie_word_embeddings=True), root / "anchor")
    for seed, name in enumerate(("one", "two")):
        model = tiny_model(tie_word_embeddings=True)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        save(model, root / name)
    make_adapter(root / "anchor", root / "adapter")
    rows = [{"prompt": f"say {k}", "safe": f"no {k}", "unsafe": f"yes, {k}!"} for k in range(12)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def rows(root: Path, answer: str) -> list[dict[str, Any]]:
    return [{"path": str(root / "rows.jsonl"), "map": {"user": "prompt", "assistant": answer}}]


GRAFTING = {"method": "grafting", "keep": 0.1, "steps": 4, "batch": 8, "lr": 3e8}
SOMF = {"method": "somf", "steps": 3, "batch": 4, "lr": 0.1}


def plan(root: Path, method: dict[str, Any], sources: tuple[str, ...] = ("one",), tasks: list[Any] | None = None, **more: Any) -> str:
    parts = [{"adapter" if name == "adapter" else "model": str(root / name)} for name in sources]
    if tasks is None:
        somf = method["method"] == "somf"
        tasks = [rows(root, "safe"), rows(root, "unsafe")] if somf else [rows(root, "safe")] * len(sources)
    text = {"anchor": str(root / "anchor"), "sources": parts, "method": method, "out_dtype": "float32", **more}
    return yaml.safe_dump({**text, "data": {"tasks": tasks}} if tasks else text)


def written(plan: MergePlan, out: Path) -> None:
    merge(plan, out, verify="none")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method, source", [(GRAFTING, "one"), (SOMF, "one"), (SOMF, "adapter")])
def test_the_verb_learns_a_mask_and_merges_what_it_keeps(root: Path, tmp_path: Path, method: dict[str, Any], source: str) -> None:
    from tests.test_cli import ended

    (tmp_path / "plan.yaml").write_text(plan(root, method, (source,)))
    assert ended(["-q", "merge", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 0
    written(parse_plan(plan(root, {"method": "sum"}, (source,), [])), tmp_path / "whole")
    anchor, whole, got = (weights(folder) for folder in (root / "anchor", tmp_path / "whole", tmp_path / "out"))
    learnt = tmp_path / "out-learnt" / "learnt"
    (mask,) = open_masks(learnt).values()
    inside = {name for name in got if name.endswith("proj.weight")}
    assert inside <= mask.shapes.keys()
    for name, value in got.items():
        keep = torch.zeros_like(value, dtype=torch.bool) if name not in mask.shapes else mask.bits(name, 0, value.numel()).view(value.shape)
        share = mask.share(name) if name in mask.shapes and method is SOMF else 1.0
        assert torch.equal(value[~keep], anchor[name][~keep])
        torch.testing.assert_close(
            value[keep], (anchor[name] + (whole[name] - anchor[name]) / max(share, 1e-9))[keep], rtol=1e-5, atol=1e-6
        )
    report = json.loads((learnt / "masks.json").read_text())
    (file,) = report["files"].values()
    assert 0 < file["kept"] < file["values"] and file["share"] == file["kept"] / file["values"]
    if method is GRAFTING:
        (graft,) = report["grafts"]
        assert graft["start"] == int(0.1 * graft["candidates"]) < graft["kept"] and graft["loss"]["graft"] < graft["loss"]["start"]
    else:
        assert report["masked"]["loss"] < report["unmasked"]["loss"]


def test_neither_threads_nor_shards_nor_pieces_nor_a_second_time_change_a_byte(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in (SOMF, GRAFTING):
        name = method["method"]
        text = plan(root, method, ("one", "two"))
        written(parse_plan(text), tmp_path / f"{name}-a")
        monkeypatch.setattr(apply, "available_cores", lambda: 4)
        written(parse_plan(plan(root, method, ("one", "two"), max_shard="40KB")), tmp_path / f"{name}-b")
        learnt = tmp_path / f"{name}-a-learnt" / "learnt"
        again = parse_plan(plan(root, {**method, "learnt": str(learnt)}, ("two", "one"), []))
        with monkeypatch.context() as context:
            context.setattr(stages, "PIECE_VALUES", 333)
            written(again, tmp_path / f"{name}-c")
        a, b, c = (weights(tmp_path / f"{name}-{k}") for k in "abc")
        assert all(torch.equal(a[key], b[key]) and torch.equal(a[key], c[key]) for key in a)
        assert not (tmp_path / f"{name}-c-learnt").exists()


def test_grafts_share_no_value_and_a_later_one_leaves_the_earlier_alone(root: Path, tmp_path: Path) -> None:
    written(parse_plan(plan(root, GRAFTING, ("one", "two"))), tmp_path / "both")
    both = json.loads((tmp_path / "both-learnt/learnt/masks.json").read_text())
    assert both["overlap"] == [[1.0, 0.0], [0.0, 1.0]]
    written(parse_plan(plan(root, {**GRAFTING, "overlap": "mean"}, ("one", "two"))), tmp_path / "mean")
    mean = json.loads((tmp_path / "mean-learnt/learnt/masks.json").read_text())
    assert 0 < mean["overlap"][0][1] < 1

    written(parse_plan(plan(root, GRAFTING, ("one",))), tmp_path / "first")
    folder = tmp_path / "first-learnt" / "learnt"
    text = yaml.safe_load(plan(root, {**GRAFTING, "outside": [str(folder)]}, ("two",)))
    text["sources"][0]["minus"] = str(root / "anchor")
    text["anchor"] = str(tmp_path / "first")
    written(parse_plan(yaml.safe_dump(text)), tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    (mask,) = open_masks(folder).values()
    changed = 0
    for name in mask.shapes:
        keep = mask.bits(name, 0, first[name].numel()).view(first[name].shape)
        assert torch.equal(first[name][keep], second[name][keep])  # bit for bit
        changed += int((first[name] != second[name]).sum())
    assert changed > 0


def test_one_update_is_grafted_for_several_tasks_by_their_union(root: Path, tmp_path: Path) -> None:
    written(parse_plan(plan(root, GRAFTING, ("one",), [rows(root, "safe"), rows(root, "unsafe")])), tmp_path / "out")
    report = json.loads((tmp_path / "out-learnt/learnt/masks.json").read_text())
    a, b, union = (report["files"][f"{name}.safetensors"]["kept"] for name in ("graft-1", "graft-2", "union"))
    common = report["overlap"][0][1] * b
    assert union == a + b - round(common) and list(report["sources"].values()) == ["union.safetensors"]


def test_what_cannot_be_learnt_is_said_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    def refused(text: str, match: str) -> None:
        for work in (lambda: written(parse_plan(text), tmp_path / "out"), lambda: preview(parse_plan(text))):
            with pytest.raises(BadInput, match=match):
                work()
        assert not (tmp_path / "out").exists()

    refused(plan(root, SOMF, tasks=[]), "somf learns from data, and there are none")
    refused(plan(root, SOMF, tasks=[rows(root, "safe")]), "two lists of rows, safe replies and unsafe ones")
    apart = tmp_path / "apart.jsonl"
    apart.write_text(json.dumps({"prompt": "other", "completion": "x"}) + "\n")
    refused(plan(root, SOMF, tasks=[rows(root, "safe"), [{"path": str(apart)}]]), "no safe reply has an unsafe one to the same prompt")
    refused(plan(root, GRAFTING, tasks=[[{"path": str(apart)}]]), "has 1 rows")
    refused(plan(root, GRAFTING, ("one", "two"), [rows(root, "safe")]), "2 sources, and rows of 1 tasks")
    save(tiny_model(num_hidden_layers=3), tmp_path / "deeper")
    refused(plan(root, GRAFTING, (str(tmp_path / "deeper"),)), "lacks model.layers.2")
    refused(plan(root, GRAFTING, (str(tmp_path / "gone"),)), "gone")


def test_somf_needs_its_own_rows_in_a_recipe_and_says_so_before_tuning(tmp_path: Path) -> None:
    from guidetune.pipeline import run
    from guidetune.recipe import from_mapping

    recipe = {
        "models": {"base": "world:base", "instruct": "world:instruct"},
        "data": {"train": [{"path": "world:knowledge", "limit": 8}]},
        "tune": {"on": "instruct", "max_steps": 1, "batch": 8, "max_length": 256},
        "transfer": {"into": "instruct", "method": {"method": "somf"}},
    }
    with pytest.raises(BadInput, match=r"transfer\.data of a recipe"):
        run(from_mapping(recipe, tmp_path), tmp_path / "run")
    with pytest.raises(BadInput, match=r"transfer\.data.*method that learns"):
        from_mapping({**recipe, "transfer": {"into": "instruct", "data": [["world:harmful"]]}}, tmp_path)


def test_a_recipe_learns_the_mask_after_tuning(tmp_path: Path) -> None:
    from guidetune.pipeline import run
    from guidetune.recipe import from_mapping

    pairs = [{"path": "world:harmful", "limit": 8, "map": {"user": "prompt", "assistant": reply}} for reply in ("answer", "meta.rejected")]
    recipe = {
        "models": {"base": "world:base", "instruct": "world:instruct"},
        "data": {"train": [{"path": "world:knowledge", "limit": 8}]},
        "tune": {"on": "instruct", "epochs": 2, "batch": 8, "max_length": 256, "lr": 1e-3},
        "transfer": {"into": "instruct", "method": {"method": "somf", "steps": 1, "batch": 4}, "data": [[pairs[0]], [pairs[1]]]},
    }
    out = run(from_mapping(recipe, tmp_path), tmp_path / "run")
    report = json.loads((out / "learnt" / "masks.json").read_text())
    assert report["pairs"] == 8 and 0 < report["files"]["mask.safetensors"]["share"] < 1
    assert registry.build("weightspace", "somf").steps == 500 and (out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("fusion", [{"method": "ties", "scale": 0.4}, {"method": "dare", "density": 0.8, "scale": 0.3}, None])
def test_several_tasks_are_joined_after_the_mask(root: Path, tmp_path: Path, fusion: dict[str, Any] | None) -> None:
    """The mask learns through the method that joins the tasks, and what is written is that method's merge of the masked updates."""
    written(parse_plan(plan(root, {**SOMF, "fusion": fusion}, ("one", "two"))), tmp_path / "out")
    learnt = tmp_path / "out-learnt" / "learnt"
    masks = open_masks(learnt)
    assert len(masks) == 2 and len({mask.path for mask in masks.values()}) == 1  # one mask for both
    anchor, one, two, got = (weights(folder) for folder in (root / "anchor", root / "one", root / "two", tmp_path / "out"))
    mask = next(iter(masks.values()))
    if fusion is None:
        for name, value in got.items():
            keep = mask.bits(name, 0, value.numel()).view(value.shape)
            joined = 0.3 * ((one[name] - anchor[name]) + (two[name] - anchor[name])) * keep / mask.share(name)
            torch.testing.assert_close(value, anchor[name] + joined, rtol=1e-5, atol=1e-6)
    report = json.loads((learnt / "masks.json").read_text())
    assert 0 < report["files"]["mask.safetensors"]["share"] < 1
    assert all(
        torch.equal(got[name][~keep], anchor[name][~keep])
        for name in got
        for keep in [mask.bits(name, 0, got[name].numel()).view(got[name].shape)]
    )

"""Merges that learn from data: the oracles of their cards, the artefact they leave, and what they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from guidetune import artefacts, cli, pipeline, recipe, registry
from guidetune.data.rows import EncodedRows, RowWriter
from guidetune.engine import attention
from guidetune.errors import BadInput, RunFailed
from guidetune.models.checkpoint import Checkpoint
from guidetune.models.loading import load_model
from guidetune.models.sources import resolve
from guidetune.weightspace.coefficients import Blend, Table, part_of
from guidetune.weightspace.learning import Study, TaskRows, batch_loss, entropy, nll, taught
from guidetune.weightspace.merged import Merged
from guidetune.weightspace.plan import MergePlan, merge, preview
from guidetune.weightspace.sources import Delta
from guidetune.weightspace.stages import Piece
from guidetune.weightspace.statistics import Collection, regression_maps
from tests.models.pairs import make_adapter, save
from tests.tiny import tiny_model
from tests.weightspace.mergekit import read


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters and a full fine-tune of it, and rows of two tasks."""
    folder = tmp_path_factory.mktemp("learn")
    base = save(tiny_model(), folder / "base")
    for k in (1, 2):
        make_adapter(base, folder / f"adapter{k}", seed=k)
        rows = [{"prompt": f"what is {k} times {n}?", "completion": f"it is {k * n}"} for n in range(12)]
        (folder / f"task{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"prompts{k}.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
        tuned = tiny_model()
        draw = torch.Generator().manual_seed(40 + k)
        with torch.no_grad():
            for p in tuned.parameters():
                p += 0.05 * torch.randn(p.shape, generator=draw)
        save(tuned, folder / f"tuned{k}")
    return folder


def plan(place: Path, method: Any, kind: str = "adapter", **changes: Any) -> MergePlan:
    sources = [{kind if kind == "adapter" else "model": str(place / f"{kind}{k}")} for k in (1, 2)]
    data = {"tasks": [{"path": str(place / f"task{k}.jsonl")} for k in (1, 2)], "max_length": 128}
    tree = {"anchor": str(place / "base"), "sources": sources, "method": method, "out_dtype": "float32", "data": data}
    return MergePlan.model_validate({**tree, **changes})


def study(place: Path, method: Any, rows: Path | None = None, kind: str = "adapter") -> Study:
    """As `taught` makes it; with rows of two tasks from `merge`'s own reading."""
    from guidetune.weightspace.plan import _joined, _task_rows

    made = plan(place, method, kind)
    target = resolve(made.anchor)
    preset = registry.build("weightspace", method)
    return Study.of(preset, _joined(made), target, _task_rows(made, rows or place / "rows"))


def encoded(folder: Path, documents: list[list[int]], prompt: int) -> TaskRows:
    """Rows of given tokens, all but the first `prompt` of each supervised."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = RowWriter(folder / "rows.arrow")
    for k, ids in enumerate(documents):
        writer.write(f"r{k}", "made", ids, [0.0] * prompt + [1.0] * (len(ids) - prompt))
    writer.close()
    return TaskRows("made", EncodedRows.open(folder), folder)


# Coefficients


@pytest.mark.parametrize(("by_block", "parts"), [(True, 1), (True, 3), (False, 1)])
def test_the_gradient_of_coefficients_is_that_of_autograd(place: Path, by_block: bool, parts: int) -> None:
    found = study(place, "atlas", kind="tuned")
    ids = torch.randint(7, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    with found.composed() as composed:
        composed.model.double()
        blend = Blend(composed, found.merged.ids, by_block, parts)
        blend.values.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        blend.write()
        composed.model(input_ids=ids, labels=ids).loss.backward()
        got = blend.gradient()
        # the same model as a function of the coefficients, differentiated by torch
        values = blend.values.clone().requires_grad_(True)
        weights = {}
        for name, parameter in composed.parameters.items():
            j = blend.blocks.index(name) if by_block else 0
            change = torch.zeros(parameter.shape, dtype=torch.float64)
            for piece, _, taus in composed.pieces(name):
                part = part_of(piece, parts, 0)
                for tau, id in zip(taus, blend.view(name).sources, strict=True):
                    row = values[blend.ids.index(id), j]
                    term = tau.double() * (row[0] if part is None else row[part])
                    change = change + torch.nn.functional.pad(
                        term.flatten(), (piece.first, parameter.numel() - piece.first - term.numel())
                    ).view(parameter.shape)
            # the value is that of the blended weight, to the last bit; only the gradient comes from here
            weights[name] = parameter.detach() + change - change.detach()
        loss = functional_call(composed.model, weights, (), {"input_ids": ids, "labels": ids}).loss
        expected = torch.autograd.grad(loss, values)[0]
    assert float(expected.abs().min()) > 0
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_every_value_is_in_one_part_and_parts_are_about_equal() -> None:
    whole = Piece("w", (300, 200), 0, 300, (), lambda: torch.zeros(0))
    part = part_of(whole, 5, seed=1)
    assert part is not None and part.min() == 0 and part.max() == 4
    assert all(abs(int((part == k).sum()) - 12_000) < 600 for k in range(5))
    later = part_of(Piece("w", (300, 200), 100, 300, (), lambda: torch.zeros(0)), 5, seed=1)
    assert torch.equal(part[100:], later)
    vector = part_of(Piece("norm", (7,), 0, 7, (), lambda: torch.zeros(0)), 2, seed=1)
    assert vector is not None and vector.shape == (7,)  # vectors have parts too
    assert not torch.equal(part, part_of(Piece("v", (300, 200), 0, 300, (), lambda: torch.zeros(0)), 5, seed=1))


def given_table(place: Path, folder: Path, value: Callable[[int, str], list[float]], parts: int = 1) -> dict[str, Any]:
    """A plan's method with coefficients that were not learnt but given."""
    found = study(place, {"method": "atlas", "parts": parts})
    ids = found.merged.ids

    def build(work: Path) -> dict[str, Any]:
        Table({id: {name: value(i, name) for name in found.merged.shapes} for i, id in enumerate(ids)}, parts).save(work, ["a", "b"])
        return {}

    artefacts.stage(folder, found.key(), build)
    return {"method": "atlas", "parts": parts, "learnt": str(folder)}


def test_coefficients_of_zero_one_and_c(place: Path, tmp_path: Path) -> None:
    def written(name: str, value: Callable[[int, str], list[float]], parts: int = 1) -> dict[str, torch.Tensor]:
        method = given_table(place, tmp_path / f"{name}-learnt", value, parts)
        return read(merge(plan(place, method, data=None), tmp_path / name, verify="none").path)

    base = read(place / "base")
    zero = written("zero", lambda i, name: [0.0])
    assert all(torch.equal(zero[name], base[name]) for name in base)
    one = written("one", lambda i, name: [float(i == 0)])
    first = read(merge(plan(place, "sum", sources=[{"adapter": str(place / "adapter1")}]), tmp_path / "first", verify="none").path)
    c = written("c", lambda i, name: [0.4])
    parts = written("parts", lambda i, name: [0.4] * 3, parts=3)
    sum_ = read(merge(plan(place, {"method": "task_arithmetic", "scale": 0.4}), tmp_path / "sum", verify="none").path)
    for name in base:
        torch.testing.assert_close(one[name], first[name], rtol=0, atol=1e-7)
        torch.testing.assert_close(c[name], sum_[name], rtol=0, atol=1e-7)
        torch.testing.assert_close(parts[name], c[name], rtol=0, atol=1e-7)


def test_what_was_learnt_for_others_is_refused(place: Path, tmp_path: Path) -> None:
    method = given_table(place, tmp_path / "learnt", lambda i, name: [0.5])
    with pytest.raises(BadInput, match="for another anchor or for other sources"):
        merge(plan(place, method, kind="tuned"), tmp_path / "out")
    with pytest.raises(BadInput, match="for another anchor or for other sources"):
        preview(plan(place, method, kind="tuned"))
    with pytest.raises(BadInput, match="holds nothing that was learnt"):
        merge(plan(place, {"method": "atlas", "learnt": str(tmp_path / "none")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Losses


def test_entropy_is_that_of_the_predictions_and_so_is_its_gradient(place: Path, tmp_path: Path) -> None:
    documents = torch.randint(7, 100, (3, 11), generator=torch.Generator().manual_seed(3)).tolist()
    task = encoded(tmp_path / "rows", documents, 4)
    found = study(place, "atlas", kind="tuned")
    with found.composed() as composed, composed.forward() as forward:
        got = batch_loss(forward, task.rows, np.arange(3), entropy)
        head = composed.parameters["lm_head.weight"].grad.clone()
        composed.clear()
        plain = load_model(found.target, dtype="float32", device="cpu").requires_grad_(True)
        log_prob = plain(input_ids=torch.tensor(documents)).logits[:, 3:-1].log_softmax(-1)
        expected = -(log_prob.exp() * log_prob).sum(-1).mean()
        expected.backward()
        assert got == pytest.approx(float(expected), rel=1e-5)
        torch.testing.assert_close(head, plain.lm_head.weight.grad, rtol=1e-3, atol=1e-6)
        again = batch_loss(forward, task.rows, np.arange(3), nll, backward=False)
        assert again == pytest.approx(float(-log_prob.gather(-1, torch.tensor(documents)[:, 4:, None]).mean()), rel=1e-5)
        assert all(p.grad is None for p in composed.parameters.values())


# aTLAS


def sharp_base(folder: Path) -> Path:
    """A model whose predictions are far from uniform, so that few rows tell models apart."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 6
    return save(model, folder)


def spoken(model: Any, folder: Path, count: int) -> TaskRows:
    """Rows that a model wrote: its own coefficients are the best there are."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(7, 100, (count, 2), generator=draw)
    with torch.no_grad():
        for _ in range(14):
            ids = torch.cat([ids, torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1, generator=draw)], 1)
    return encoded(folder, ids.tolist(), 2)


def atlas(base: Path, adapters: list[Path], task: TaskRows, folder: Path, **options: Any) -> dict[str, Any]:
    preset = registry.build("weightspace", {"method": "atlas", **options})
    merged = Merged(preset, [(1.0, Delta.adapter(one, base)) for one in adapters], Checkpoint(resolve(base).path))
    return json.loads((taught(merged, resolve(base), [task], folder) / "coefficients.json").read_text())


@pytest.mark.slow
def test_atlas_finds_which_update_each_block_needs(tmp_path: Path) -> None:
    # the model behind the rows has τ_1 in its first layer and τ_2 in its second
    base = sharp_base(tmp_path / "base")
    adapters = [make_adapter(base, tmp_path / f"adapter{k}", seed=10 + k, size=0.3) for k in (1, 2)]
    target = load_model(base, dtype="float32", device="cpu")
    names = dict(target.named_parameters())
    with Checkpoint(base) as anchor, torch.no_grad():
        for k, adapter in enumerate(adapters):
            delta = Delta.adapter(adapter, base)
            delta.fit(anchor.names)
            for name, shape in delta.shapes.items():
                if f".layers.{k}." in name:
                    names[name] += delta.rows(name, 0, shape[0])
    task = spoken(target, tmp_path / "rows", 320)
    options = {"steps": 120, "batch": 32, "limit": None, "weight_decay": 0.0}
    by_block = atlas(base, adapters, task, tmp_path / "tensor", by="tensor", **options)
    wanted, other = [], []
    for k, source in enumerate(by_block["sources"]):
        for name, value in source["coefficients"].items():
            (wanted if f".layers.{k}." in name else other).append(value)
    assert np.mean(wanted) > 0.75 and abs(np.mean(other)) < 0.25, (wanted, other)
    isotropic = atlas(base, adapters, task, tmp_path / "source", by="source", **options)
    assert by_block["held_out"][-1]["loss"] < min(check["loss"] for check in isotropic["held_out"])


def test_atlas_never_keeps_worse_than_the_anchor(tmp_path: Path) -> None:
    base = sharp_base(tmp_path / "base")
    task = spoken(load_model(base, dtype="float32", device="cpu"), tmp_path / "rows", 40)
    adapters = [make_adapter(base, tmp_path / "adapter", seed=1, size=0.3)]
    table = atlas(base, adapters, task, tmp_path / "learnt", steps=4, lr=3.0, check_every=1)
    losses = [check["loss"] for check in table["held_out"]]
    assert len(losses) == 5 and losses[0] == min(losses) < losses[-1]
    assert all(value == 0 for value in table["sources"][0]["coefficients"].values())


def test_a_pool_of_one_leaves_one_source_in_each_block(place: Path, tmp_path: Path) -> None:
    merge(plan(place, {"method": "atlas", "steps": 3, "pool": 1, "held_out": 0.0}), tmp_path / "out", verify="none")
    table = json.loads((tmp_path / "out-learnt/learnt/coefficients.json").read_text())
    one, two = (source["coefficients"] for source in table["sources"])
    assert all((one[name] != 0) != (two[name] != 0) for name in one)


# AdaMerging


def test_adamerging_starts_by_depth_and_lowers_the_entropy(place: Path, tmp_path: Path) -> None:
    lines = {"method": "adamerging", "lines": [0.1, 0.8], "steps": 1, "lr": 1e-9}
    merge(plan(place, lines), tmp_path / "lines", verify="none")
    coefficients = json.loads((tmp_path / "lines-learnt/learnt/coefficients.json").read_text())["sources"][1]["coefficients"]
    assert all(value == pytest.approx(0.1 if ".layers.0." in name else 0.9, abs=1e-6) for name, value in coefficients.items())
    prompts = {"tasks": [str(place / "prompts1.jsonl"), str(place / "prompts2.jsonl")], "unlabelled": True}
    merge(plan(place, {"method": "adamerging", "steps": 12, "lr": 0.05, "batch": 12}, data=prompts), tmp_path / "ada", verify="none")
    lost = [json.loads(line)["loss"] for line in (tmp_path / "ada-learnt/learnt/losses.jsonl").read_text().splitlines()]
    assert len(lost) == 12 and lost[-1] < lost[0] - 0.005
    with pytest.raises(BadInput, match="which one coefficient for each source"):
        registry.build("weightspace", {"method": "adamerging", "by": "source", "lines": [0.1, 0.9]})


def test_prompts_are_read_without_answers(place: Path) -> None:
    from guidetune.weightspace.plan import _task_rows

    prompts = {"tasks": [str(place / "prompts1.jsonl"), str(place / "task1.jsonl")], "unlabelled": True}
    bare, answered = _task_rows(plan(place, "atlas", data=prompts), place / "unlabelled")
    full = _task_rows(plan(place, "atlas"), place / "rows")[0]
    for k in range(12):
        a, b, c = bare.rows[k], answered.rows[k], full.rows[k]
        assert a.loss_weight.tolist() == [0.0] * (len(a.input_ids) - 1) + [1.0]
        # the same prompt as in training; what comes after it is only looked at from before
        assert a.input_ids[:-1].tolist() == b.input_ids[:-1].tolist() == c.input_ids[: len(a.input_ids) - 1].tolist()
        assert int(np.flatnonzero(c.loss_weight)[0]) == len(a.input_ids) - 1


# Fisher


def test_fisher_squares_the_gradient_of_each_row(place: Path, tmp_path: Path) -> None:
    documents = torch.randint(7, 100, (2, 10), generator=torch.Generator().manual_seed(4)).tolist()
    documents.append(documents[0])  # of a sum over the batch the square would hold twice its product with itself
    task = encoded(tmp_path / "rows", documents, 5)
    found = study(place, {"method": "fisher", "labels": "data"}, kind="tuned")
    with found.composed() as composed:
        composed.write_source(found.merged.ids[1])
        got = found.preset._information(composed, found, task)
    plain = load_model(place / "tuned2", dtype="float32", device="cpu").requires_grad_(True)
    expected, at_once = {}, {}
    log_prob = plain(input_ids=torch.tensor(documents)).logits[:, 4:-1].log_softmax(-1)
    rows = log_prob.gather(-1, torch.tensor(documents)[:, 5:, None]).sum((1, 2))
    names = [name for name, _ in plain.named_parameters()]
    for k in range(3):
        for name, grad in zip(names, torch.autograd.grad(rows[k], list(plain.parameters()), retain_graph=True), strict=True):
            expected[name] = expected.get(name, 0) + grad**2 / 3
            at_once[name] = at_once.get(name, 0) + grad
    for name in names:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2, atol=1e-5 * float(expected[name].max()))
    summed = at_once["lm_head.weight"] ** 2 / 3
    assert float((summed - expected["lm_head.weight"]).abs().sum()) > 0.2 * float(expected["lm_head.weight"].abs().sum())


def test_fisher_samples_have_the_expectation_as_their_mean(place: Path, tmp_path: Path) -> None:
    document = torch.randint(7, 100, (6,), generator=torch.Generator().manual_seed(6)).tolist()
    task = encoded(tmp_path / "rows", [document], 5)  # one token is predicted: all it can be are few enough to sum over
    found = study(place, {"method": "fisher", "samples": 150}, kind="tuned")
    with found.composed() as composed:
        got = found.preset._information(composed, found, task)
    plain = load_model(place / "base", dtype="float32", device="cpu").requires_grad_(True)
    log_prob = plain(input_ids=torch.tensor([document])).logits[0, 4].log_softmax(-1)
    total = dict.fromkeys((name for name, _ in plain.named_parameters()), 0.0)
    for y in range(len(log_prob)):
        grads = torch.autograd.grad(log_prob[y], list(plain.parameters()), retain_graph=True)
        for name, grad in zip(total, grads, strict=True):
            total[name] += float(log_prob[y].detach().exp()) * float((grad**2).sum())
    assert sum(float(f.sum()) for f in got.values()) == pytest.approx(sum(total.values()), rel=0.15)
    for name, trace in total.items():
        assert float(got[name].sum()) == pytest.approx(trace, rel=0.35), name


def test_fisher_of_equal_information_is_the_average(place: Path, tmp_path: Path) -> None:
    found = study(place, "fisher", kind="tuned")

    def learnt(name: str, values: tuple[float, float]) -> dict[str, torch.Tensor]:
        def build(work: Path) -> dict[str, Any]:
            held = Collection(work, found.merged.ids, ["a", "b"])
            for id, value in zip(found.merged.ids, values, strict=True):
                held.write(id, {n: torch.full(shape, value) for n, shape in found.merged.shapes.items()})
            held.close({n: n for n in found.merged.shapes})
            return {}

        artefacts.stage(tmp_path / name, found.key(), build)
        method = {"method": "fisher", "learnt": str(tmp_path / name)}
        return read(merge(plan(place, method, kind="tuned", data=None), tmp_path / f"{name}-out", verify="none").path)

    soup = read(merge(plan(place, "linear", kind="tuned"), tmp_path / "soup", verify="none").path)
    equal, one, floored = learnt("equal", (0.3, 0.3)), learnt("one", (1e3, 1e-12)), learnt("floored", (1e-9, 1e-8))
    tuned = read(place / "tuned1")
    for name in soup:
        torch.testing.assert_close(equal[name], soup[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(floored[name], soup[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(one[name], tuned[name], rtol=0, atol=1e-5)


# RegMean


def test_regmean_maps() -> None:
    draw = torch.Generator().manual_seed(0)
    x = [torch.randn(40, 6, generator=draw, dtype=torch.float64) for _ in range(2)]
    w = [torch.randn(5, 6, generator=draw, dtype=torch.float64) for _ in range(2)]
    grams = [one.T @ one for one in x]

    def merged(grams: list[torch.Tensor], a: float = 1.0, damping: float = 0.0, weights: tuple[float, ...] = (1.0, 1.0)) -> torch.Tensor:
        return sum(one @ m.double() for one, m in zip(w, regression_maps(grams, weights, a, damping), strict=True))

    best = torch.linalg.lstsq(torch.cat(x), torch.cat([one @ weight.T for one, weight in zip(x, w, strict=True)])).solution.T
    torch.testing.assert_close(merged(grams), best, rtol=1e-5, atol=1e-5)
    eye = torch.eye(6, dtype=torch.float64)
    for a in (0.0, 0.5, 1.0):
        torch.testing.assert_close(merged([3 * eye, 3 * eye], a), (w[0] + w[1]) / 2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged([3 * eye, eye]), (3 * w[0] + w[1]) / 4, rtol=1e-6, atol=1e-6)
    diagonals = [gram.diagonal() for gram in grams]
    torch.testing.assert_close(merged(grams, 0.0), (w[0] * diagonals[0] + w[1] * diagonals[1]) / sum(diagonals), rtol=1e-5, atol=1e-5)
    # one model is itself; directions without any input are averaged
    torch.testing.assert_close(regression_maps(grams[:1], [0.7], 0.9, 0.0)[0], torch.eye(6), rtol=0, atol=1e-5)
    flat = [torch.diag(torch.tensor([1.0, 2.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)) for _ in range(2)]
    torch.testing.assert_close(merged(flat, 0.9, 1e-3), (w[0] + w[1]) / 2, rtol=1e-5, atol=1e-5)
    with pytest.raises(RunFailed, match="cannot be inverted"):
        merged(flat)


@pytest.mark.parametrize(("held", "padded"), [("4GB", False), ("20KB", True)])
def test_regmean_collects_the_inputs_of_every_linear_layer(
    place: Path, tmp_path: Path, held: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:  # as for architectures whose documents cannot lie in one row
        monkeypatch.setattr(attention, "supported", lambda model: False)
    merge(plan(place, {"method": "regmean", "held": held, "per_token": False}, kind="tuned"), tmp_path / "out", verify="none")
    folder = tmp_path / "out-learnt/learnt"
    result = json.loads((folder / "manifest.json").read_text())["result"]
    assert result["linear_layers"] == 15 and result["products"] == 9 and (result["passes"] > 1) == (held == "20KB")
    plain = load_model(place / "tuned1", dtype="float32", device="cpu")
    rows = EncodedRows.open(tmp_path / "out-learnt/data-1")
    sums: dict[str, torch.Tensor] = {}
    chosen = ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight")
    for name in chosen:
        plain.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, name=name: sums.__setitem__(name, sums.get(name, 0) + args[0][0].T @ args[0][0])
        )
    with torch.no_grad():
        for k in range(len(rows)):
            plain(input_ids=torch.from_numpy(rows[k].input_ids.astype(np.int64))[None])
    index = json.loads((folder / "statistics.json").read_text())
    for name in chosen:
        found: dict[str, torch.Tensor] = {}
        for file in index["sources"][0]["files"]:
            found |= load_file(folder / file)
        torch.testing.assert_close(found[index["names"][name]], sums[name], rtol=1e-4, atol=1e-3)
    assert "lm_head.weight" in index["names"] and set(index["averaged"]) == {n for n in read(place / "base") if "norm" in n or "embed" in n}


# The way of a plan


METHODS: dict[str, dict[str, Any]] = {
    "fisher": {"limit": 4},
    "regmean": {"limit": 6},
    "adamerging": {"steps": 3, "batch": 4},
    "atlas": {"steps": 3, "batch": 4, "parts": 2},
}


@pytest.mark.parametrize("name", METHODS)
def test_from_the_command_line(name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {
        "anchor": str(place / "base"),
        "sources": [{"adapter": str(place / f"adapter{k}")} for k in (1, 2)],
        "method": {"method": name, **METHODS[name]},
        "data": {"tasks": [[{"path": "task1.jsonl"}], "task2.jsonl"], "max_length": 128},
    }
    for k in (1, 2):
        (tmp_path / f"task{k}.jsonl").write_bytes((place / f"task{k}.jsonl").read_bytes())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(["merge", str(tmp_path / "plan.yaml"), *words])
        assert not caught.value.code
        return capsys.readouterr().out

    text = run("--dry-run")
    assert "learns: " in text and "forward" in text and "MB" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.yaml", "task1.jsonl", "task2.jsonl"]
    run("--out", str(tmp_path / "out"))
    learnt = tmp_path / "out-learnt/learnt"
    before = (learnt / "manifest.json").stat().st_mtime_ns
    values = read(tmp_path / "out")
    assert any(not torch.equal(values[n], w) for n, w in read(place / "base").items())
    # nothing is learnt twice, and the order of the sources changes nothing
    run("--out", str(tmp_path / "out"))
    assert (learnt / "manifest.json").stat().st_mtime_ns == before
    tree["method"]["learnt"] = "out-learnt/learnt"  # beside the plan
    tree["sources"].reverse()
    del tree["data"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    run("--out", str(tmp_path / "again"))
    again = read(tmp_path / "again")
    assert all(torch.equal(values[n], again[n]) for n in values) and not (tmp_path / "again-learnt").exists()


def test_tied_embeddings_are_one_block(place: Path, tmp_path: Path) -> None:
    base = save(tiny_model("gemma3", tie_word_embeddings=True), tmp_path / "base")
    tuned = tiny_model("gemma3", tie_word_embeddings=True)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    save(tuned, tmp_path / "tuned")
    sources = [{"model": str(tmp_path / "tuned")}]
    method = {"method": "atlas", "steps": 2, "batch": 4, "held_out": 0.0}
    merge(plan(place, method, anchor=str(base), sources=sources), tmp_path / "out", verify="full")
    source = json.loads((tmp_path / "out-learnt/learnt/coefficients.json").read_text())["sources"][0]
    w, t, got = (read(tmp_path / name) for name in ("base", "tuned", "out"))
    assert "lm_head.weight" not in got and len(w) == len(got)
    for name in got:
        factor = source["coefficients"][name]
        assert factor != 0
        torch.testing.assert_close(got[name], w[name] + factor * (t[name] - w[name]), rtol=0, atol=1e-6)


def test_lines_on_a_method_that_learns(place: Path, tmp_path: Path) -> None:
    fisher = {"method": "fisher", "limit": 2}
    plain = merge(plan(place, fisher), tmp_path / "plain", verify="none")
    made = plan(place, {"method": "lines", "alpha": 0.0, "on": fisher})
    assert "learns: 4 forward and 4 backward passes" in preview(made)
    lines = merge(made, tmp_path / "lines", verify="none")
    base, a, b = (read(folder) for folder in (place / "base", plain.path, lines.path))
    assert all(torch.equal(b[name], base[name] if ".layers.1." not in name else a[name]) for name in base)


def test_the_documented_methods_and_plan_are_understood() -> None:
    text = (Path(__file__).parents[2] / "docs/merge.md").read_text(encoding="utf-8").split("## Merges that learn")[1].split("\n## ")[0]
    written = re.findall(r"`(\{method: [^`]*\})`", text)
    assert {registry.build("weightspace", yaml.safe_load(one)).name for one in written} == set(METHODS)
    shown = MergePlan.model_validate(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]))
    assert shown.data is not None and shown.data.unlabelled and len(shown.data.tasks) == 2 == len(shown.sources)


def test_refusals_come_before_anything_is_learnt(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadInput, match="adamerging learns from data, and there are none; add data"):
        merge(plan(place, "adamerging", data=None), out)
    with pytest.raises(BadInput, match=r"rows of each source's own task: 2 sources"):
        preview(plan(place, "fisher", data={"tasks": [str(place / "task1.jsonl")]}))
    with pytest.raises(BadInput, match=r"data.tasks.0: no data at"):
        merge(plan(place, "regmean", data={"tasks": [str(place / "none.jsonl"), str(place / "task1.jsonl")]}), out)
    with pytest.raises(BadInput, match=r"data.tasks.1: .*columns"):
        merge(plan(place, "regmean", data={"tasks": [str(place / "task1.jsonl"), str(place / "prompts2.jsonl")]}), out)
    silent = tmp_path / "silent.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    silent.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(BadInput):
        merge(plan(place, "atlas", data={"tasks": [str(silent)]}), out)
    with pytest.raises(BadInput, match="too few to hold"):
        merge(plan(place, {"method": "atlas", "limit": 3}), out)
    with pytest.raises(BadInput, match="no model at"):
        merge(plan(place, "fisher", sources=[{"model": str(place / "tuned1"), "minus": str(tmp_path / "gone")}] * 2), out)
    other = save(tiny_model(hidden_size=48), tmp_path / "other")
    with pytest.raises(BadInput, match="is \\[|shape|fit together|lacks"):
        merge(plan(place, "fisher", sources=[{"model": str(place / "tuned1")}, {"model": str(other)}]), out)
    with pytest.raises(BadInput, match="at least 2"):
        merge(plan(place, "regmean", sources=[{"model": str(place / "tuned1")}]), out)
    assert not out.exists() and not (tmp_path / "out-learnt/learnt").exists()


@pytest.mark.parametrize("name", METHODS)
def test_statistics_that_are_not_finite_stop_it(name: str, place: Path, tmp_path: Path) -> None:
    tensors = load_file(place / "tuned1" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)  # finite, but nothing that it multiplies is
    save(tiny_model(), tmp_path / "huge")
    save_file(tensors, tmp_path / "huge/model.safetensors", {"format": "pt"})
    sources = [{"model": str(tmp_path / "huge")}, {"model": str(place / "tuned2")}]
    with pytest.raises(RunFailed, match="not finite"):
        merge(plan(place, {"method": name, **METHODS[name]}, sources=sources), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-learnt/learnt").exists()


@pytest.fixture(scope="module")
def world_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the embedded instruct model, tuned for a few steps on two of its tasks."""
    folder = tmp_path_factory.mktemp("world")
    for task in ("arithmetic", "knowledge"):
        tree = {
            "name": task,
            "models": {"base": "world:base", "instruct": "world:instruct"},
            "data": {"train": [{"path": f"world:{task}", "limit": 96}], "max_length": 256},
            "tune": {"on": "instruct", "params": {"rank": 8, "alpha": 16}, "lr": 2e-3, "epochs": 1, "batch": 16, "max_length": 256},
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(tree))
        pipeline.run(recipe.load(folder / f"{task}.yaml"), folder / task)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_on_the_embedded_world(name: str, world_adapters: Path, tmp_path: Path) -> None:
    options = {
        "fisher": {"limit": 12},
        "regmean": {"limit": 12},
        "adamerging": {"steps": 8, "lr": 0.02, "limit": 16},
        "atlas": {"steps": 10, "limit": 40},
    }
    tasks = ("arithmetic", "knowledge")
    tree = {
        "anchor": "world:instruct",
        "sources": [{"adapter": str(world_adapters / task / "adapter")} for task in tasks],
        "method": {"method": name, **options[name]},
        "data": {"tasks": [{"path": f"world:{task}", "limit": 60} for task in tasks], "max_length": 256},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as caught:
        cli.main(["merge", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")])
    assert not caught.value.code
    result = json.loads((tmp_path / "out-learnt/learnt/manifest.json").read_text())["result"]
    if name == "atlas":
        assert min(check["loss"] for check in result["held_out"]) < result["held_out"][0]["loss"]
    elif name == "adamerging":
        assert result["loss_last"] < result["loss_first"]
    anchor, got = load_model("world:instruct", device="cpu"), load_model(tmp_path / "out", device="cpu")
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        a, b = anchor(input_ids=ids).logits, got(input_ids=ids).logits
    assert 0 < float((a - b).abs().max()) < 20 and bool(torch.isfinite(b).all())

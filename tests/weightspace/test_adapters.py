"""Adapters written: extraction by SVD against Eckart and Young, sums of adapters against merged updates; peft reads both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from guidetune import cli
from guidetune.errors import BadInput
from guidetune.weightspace import stages
from guidetune.weightspace.adapters import extract
from guidetune.weightspace.apply import transfer
from guidetune.weightspace.plan import merge, parse_plan, preview
from guidetune.weightspace.sources import LoraDelta
from guidetune.weightspace.spectrum import low_rank
from tests.models.pairs import make_adapter, make_pair, save
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("adapters"))


def model_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(8, 28)[None]).logits


def with_peft(base: Path, adapter: Path) -> torch.Tensor:
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of keys that it does not find
        return logits(PeftModel.from_pretrained(model_of(base), str(adapter)).eval())


def matrices(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    delta = LoraDelta(folder, base, saved_modules=True)
    from guidetune.models.checkpoint import Checkpoint

    assert delta.fit(Checkpoint(base).names) == []
    return {name: delta.rows(name, 0, shape[0]) for name, shape in delta.shapes.items()}


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)])
def test_factors_are_the_best_of_their_rank(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PIECE_VALUES", 50)
    monkeypatch.setattr("guidetune.weightspace.spectrum.PIECE_VALUES", 50)
    torch.manual_seed(1)
    d = torch.randn(*shape)
    u, s, v = torch.linalg.svd(d.double(), full_matrices=False)
    for r in (1, 3, 9):
        found = low_rank(lambda i, j: d[i:j], shape, r, None)
        best = (u[:, :r] * s[:r]) @ v[:r]
        torch.testing.assert_close((found.b @ found.a).double(), best, rtol=0, atol=1e-5)
        assert float((d - found.b @ found.a).norm()) == pytest.approx(float(s[r:].norm()), rel=1e-5)  # Eckart and Young
        assert found.kept == pytest.approx(float((s[:r] ** 2).sum() / (s**2).sum()))
    for energy in (0.3, 0.9, 1.0):
        shares = (s**2).cumsum(0) / (s**2).sum()
        wanted = int((shares < energy - 1e-12).sum()) + 1
        assert low_rank(lambda i, j: d[i:j], shape, None, energy).a.shape[0] == min(wanted, len(s))
    assert low_rank(lambda i, j: d[i:j], shape, 2, 0.99).a.shape[0] == 2
    assert low_rank(lambda i, j: 0 * d[i:j], shape, None, 0.9).a.shape == (0, shape[1])


def test_a_low_rank_difference_is_extracted_exactly(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    tuned = transfer(make_adapter(base, tmp_path / "made"), base, tmp_path / "tuned").path
    for options in ({"rank": 4}, {"rank": 6}, {"energy": 1 - 1e-9}):
        out = tmp_path / "-".join(f"{k}{v}" for k, v in options.items())
        done = extract(tuned, base, out, **options)
        assert done.result["residual"] < 1e-5 and done.result["left_out"] == {}
        torch.testing.assert_close(with_peft(base, out), logits(model_of(tuned)), rtol=0, atol=2e-5)
        assert done.result["ranks"] == ([6, 6] if options == {"rank": 6} else [4, 4])
    again = extract(tuned, base, tmp_path / "rank4", rank=4)
    assert again.reused
    # back onto the base: the tuned model
    back = transfer(tmp_path / "rank4", base, tmp_path / "back").path
    for name, value in load_file(tuned / "model.safetensors").items():
        torch.testing.assert_close(load_file(back / "model.safetensors")[name], value, rtol=0, atol=1e-6)


def test_a_full_difference_by_energy_and_what_is_left_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, instruct = pair  # every tensor differs by noise
    done = extract(instruct, base, tmp_path / "out", energy=0.9)
    d = load_file(instruct / "model.safetensors"), load_file(base / "model.safetensors")
    rest = 0.0
    for name, shown in done.result["tensors"].items():
        s = torch.linalg.svdvals((d[0][name] - d[1][name]).double())
        assert float((s[: shown["rank"]] ** 2).sum()) >= 0.9 * float((s**2).sum()) > float((s[: shown["rank"] - 1] ** 2).sum())
        assert shown["residual"] == pytest.approx(float(s[shown["rank"] :].norm() / s.norm()), rel=1e-4)
        rest += float(s[shown["rank"] :].norm()) ** 2
    assert set(done.result["left_out"]) == set(d[0]) - set(done.result["tensors"])
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(done.result["left_out"])
    rest += sum(float((d[0][name] - d[1][name]).norm()) ** 2 for name in done.result["left_out"])
    whole = sum(float((d[0][name] - d[1][name]).norm()) ** 2 for name in d[0])
    assert done.result["residual"] == pytest.approx(math.sqrt(rest / whole), rel=1e-4)
    assert json.loads((tmp_path / "out/extract.json").read_text())["tensors"] == done.result["tensors"]
    # stored whole, and all of the rest at full rank: the instruct model itself
    kept = extract(instruct, base, tmp_path / "kept", rank=64, save_modules=True)
    assert kept.result["left_out"] == {} and "model.norm.weight" in kept.result["saved"] and kept.result["residual"] < 1e-5
    torch.testing.assert_close(with_peft(base, tmp_path / "kept"), logits(model_of(instruct)), rtol=0, atol=5e-5)
    small = extract(instruct, base, tmp_path / "small", rank=2, dtype="bfloat16")
    assert small.result["residual"] > done.result["residual"]


def test_extraction_of_tied_models_and_biases(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, "qwen2", tie_word_embeddings=True)
    done = extract(instruct, base, tmp_path / "out", rank=4, save_modules=True)
    reasons = {part["reason"] for part in done.result["left_out"].values()}
    assert reasons == {"tied embeddings", "bias of a linear module"}
    with_peft(base, tmp_path / "out")


def test_extraction_of_conv1d(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    models = [GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2, n_positions=64)) for _ in range(2)]
    with torch.no_grad():
        models[1].load_state_dict(models[0].state_dict())
        for name, p in models[1].named_parameters():
            if "c_attn.weight" in name or "c_fc.weight" in name:
                p += torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1]) * 0.1
    base, tuned = (save(model, tmp_path / name) for name, model in zip("bt", models, strict=True))
    assert extract(tuned, base, tmp_path / "out", rank=2).result["residual"] < 1e-5
    torch.testing.assert_close(with_peft(base, tmp_path / "out"), logits(model_of(tuned)), rtol=0, atol=2e-5)


def test_extraction_refuses(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, instruct = pair
    with pytest.raises(BadInput) as caught:
        extract(instruct, base, tmp_path / "out", energy=1.5, rank=0, dtype="int8")
    assert len(caught.value.problems) == 3
    for args, words in (
        ((instruct, base), "give a rank, or the energy"),
        ((base, base), "nothing to extract"),
        ((save(tiny_model("qwen2"), tmp_path / "q"), base), "qwen2 model and .* a llama model"),
    ):
        with pytest.raises(BadInput, match=words):
            extract(*args, tmp_path / "out", **({} if "rank" in words else {"rank": 2}))
    with pytest.raises(BadInput, match="read from"):
        extract(instruct, base, base, rank=2)
    assert not (tmp_path / "out").exists()


SOURCES = {
    "one": {"r": 4, "lora_alpha": 8},
    "two": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "three": {
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"o_proj": 1},
        "target_modules": ["o_proj", "q_proj"],
    },
}


@pytest.fixture(scope="module")
def several(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("several")
    return {name: make_adapter(pair[0], root / name, seed=i, **options) for i, (name, options) in enumerate(SOURCES.items())}


@pytest.mark.parametrize(
    "method", ["sum", "linear", "{method: task_arithmetic, scale: -0.7}", "{method: lines, alpha: 0.2, on: task_arithmetic}"]
)
def test_a_sum_of_adapters_is_the_adapter_of_the_sum(
    pair: tuple[Path, Path], several: dict[str, Path], tmp_path: Path, method: str
) -> None:
    base, instruct = pair
    weights = {"one": 0.5, "two": -1.25, "three": [1.0, 2.0]}
    sources = "\n".join(f"  - {{adapter: {several[name]}, weight: {weight}}}" for name, weight in weights.items())
    text = f"anchor: {base}\nsources:\n{sources}\nmethod: {method}\n"
    plan = parse_plan(text + "write: adapter\n")
    done = merge(plan, tmp_path / "sum")
    assert done.result["error"] < 1e-6
    model = merge(parse_plan(text), tmp_path / "model").path
    start = load_file(base / "model.safetensors")
    found = matrices(tmp_path / "sum", base)
    for name, value in load_file(model / "model.safetensors").items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value - start[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(with_peft(base, tmp_path / "sum"), logits(model_of(model)), rtol=0, atol=2e-5)
    config = json.loads((tmp_path / "sum/adapter_config.json").read_text())
    ranks = {name: 4 + 3 * ("q_proj" in name or "down_proj" in name) + 2 * ("q_proj" in name) + 5 * ("o_proj" in name) for name in found}
    assert {name: config["rank_pattern"].get(name.removesuffix(".weight"), config["r"]) for name in found} == ranks
    assert "of ranks 4 to 9" in preview(plan)
    # for the instruct sibling: the same factors
    plan = parse_plan(text.replace(str(base), str(instruct), 1) + "write: adapter\n")
    merge(plan, tmp_path / "moved")
    moved = json.loads((tmp_path / "moved/adapter_config.json").read_text())
    assert moved["base_model_name_or_path"] == str(instruct)


def test_embeddings_add_up_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    parts = [make_adapter(base, tmp_path / f"{i}", seed=i, r=i + 2, target_modules=["embed_tokens", "v_proj"]) for i in range(2)]
    text = f"anchor: {base}\nsources: [{{adapter: {parts[0]}}}, {{adapter: {parts[1]}, weight: -2}}]\n"
    assert merge(parse_plan(text + "write: adapter"), tmp_path / "sum").result["error"] < 1e-6
    one, two, both = (matrices(path, base)["model.embed_tokens.weight"] for path in (*parts, tmp_path / "sum"))
    torch.testing.assert_close(both, one - 2 * two, rtol=0, atol=1e-6)
    with_peft(base, tmp_path / "sum")


def test_sums_that_are_no_adapter(pair: tuple[Path, Path], several: dict[str, Path], tmp_path: Path) -> None:
    base, instruct = pair
    one, two = f"{{adapter: {several['one']}}}", f"{{adapter: {several['two']}}}"
    for sources, method, words in (
        ([one, two], "ties", "ties is not a weighted sum"),
        ([one, two], "{method: lines, alpha: norm}", "lines is not a weighted sum"),
        ([one, f"{{model: {instruct}, minus: {base}}}"], "sum", "sources.1 is no adapter: `write: adapter` adds up adapters"),
        ([one, one], "sum", "given twice"),
        ([one.replace("}", ", weight: 0}")], "sum", "every weight is 0"),
    ):
        plan = parse_plan(f"anchor: {base}\nsources: [{', '.join(sources)}]\nmethod: {method}\nwrite: adapter\n")
        with pytest.raises(BadInput, match=words):
            merge(plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_commands(pair: tuple[Path, Path], several: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct = map(str, pair)
    (tmp_path / "plan.yaml").write_text(f"anchor: {base}\nsources: [{{adapter: {several['one']}, weight: -1}}]\nwrite: adapter\n")
    for arguments, words in (
        (["extract", instruct, "--of", base, "--energy", "0.9", "--out", str(tmp_path / "e")], "residual of the whole difference"),
        ([str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "n")], f"adapter: {tmp_path / 'n'}"),
        (["--dry-run", str(tmp_path / "plan.yaml")], "written as one adapter"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["merge", *arguments])
        assert left.value.code == 0 and words in capsys.readouterr().out
    negative, positive = matrices(tmp_path / "n", pair[0]), matrices(several["one"], pair[0])
    assert all(torch.equal(negative[name], -positive[name]) for name in positive)

"""Transfer: the merged folder is target + update, on every architecture, for every kind of LoRA, and nothing else has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guidetune.errors import BadInput, RunFailed
from guidetune.models.fingerprints import fingerprint
from guidetune.weightspace import apply, stages
from guidetune.weightspace.apply import transfer
from guidetune.weightspace.merged import added
from guidetune.weightspace.sources import Delta, LoraDelta, TensorDelta
from tests.models.pairs import PROJECTIONS, logits, make_adapter, make_pair, plain, save, with_adapter
from tests.tiny import ARCHITECTURES, tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    base, instruct = make_pair(root)
    return base, instruct, make_adapter(base, root / "adapter")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_architecture(family: str, tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, family)
    adapter = make_adapter(base, tmp_path / "adapter")
    result = transfer(adapter, instruct, tmp_path / "out")
    expected = logits(with_adapter(instruct, adapter))
    from transformers import AutoModelForCausalLM

    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (logits(merged) - expected).abs().max() <= 1e-5
    assert (logits(plain(instruct)) - expected).abs().max() > 1e-2
    assert result.result["verification"]["relative_logit_difference"] < 1e-5
    # Into its own base it is what peft's merge gives.
    transfer(adapter, base, tmp_path / "self")
    reference = with_adapter(base, adapter).merge_and_unload().state_dict()
    for name, tensor in weights(tmp_path / "self").items():
        torch.testing.assert_close(tensor, reference[name], rtol=2e-7, atol=1e-9)


OPTIONS = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.o_proj": 16},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.0\..*(q|up)_proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_kind_of_lora(llama: tuple[Path, Path, Path], options: dict, tmp_path: Path) -> None:
    base, instruct, _ = llama
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    transfer(adapter, instruct, tmp_path / "out")
    assert (logits(plain(tmp_path / "out")) - logits(with_adapter(instruct, adapter))).abs().max() <= 1e-5


def test_conv1d_is_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = save(GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], size=0.3)
    transfer(adapter, base, tmp_path / "out")
    assert (logits(plain(tmp_path / "out")) - logits(with_adapter(base, adapter))).abs().max() <= 1e-5


def test_gemma3_with_vision_tower_uses_other_names_in_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=120)
    )
    base = save(model, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=r".*language_model.*\.(q_proj|down_proj)", size=0.3)
    names = set(weights(base))
    transfer(adapter, base, tmp_path / "out")
    assert set(weights(tmp_path / "out")) == names
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - logits(with_adapter(base, adapter))).abs().max() <= 1e-5


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_untied_when_only_one_side_has_an_update(target: str, tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in weights(instruct)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[target, "q_proj"], size=0.3)
    result = transfer(adapter, instruct, tmp_path / "out")
    assert result.result["untied"] and any("untied" in text for text in result.result["warnings"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    merged = plain(tmp_path / "out")
    assert (logits(merged) - logits(with_adapter(instruct, adapter))).abs().max() <= 1e-5
    other = {"lm_head": "model.embed_tokens.weight", "embed_tokens": "lm_head.weight"}[target]
    assert same_bytes(weights(tmp_path / "out")[other], weights(instruct)["model.embed_tokens.weight"])


def test_an_adapter_trained_tied_keeps_the_tie(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, size=0.3)
    result = transfer(adapter, instruct, tmp_path / "out")
    assert not result.result["untied"] and "lm_head.weight" not in weights(tmp_path / "out")
    assert (logits(plain(tmp_path / "out")) - logits(with_adapter(instruct, adapter))).abs().max() <= 1e-5


def test_tied_projection_adapter_keeps_the_tie(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, "gemma2")
    transfer(make_adapter(base, tmp_path / "adapter"), instruct, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_zero_and_b_zero_change_no_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    base, instruct = make_pair(tmp_path, dtype=dtype)
    file = instruct / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, :4] = -0.0  # -0.0 + 0.0 is 0.0
    save_file(tensors, file, metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter")
    transfer(adapter, instruct, tmp_path / "scaled", scale=0.0)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}, adapter / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    result = transfer(adapter, instruct, tmp_path / "zero")
    assert any("zero everywhere" in text for text in result.result["warnings"])
    before = weights(instruct)
    for out in ("scaled", "zero"):
        after = weights(tmp_path / out)
        assert set(after) == set(before) and all(same_bytes(after[name], before[name]) for name in before)
        assert (tmp_path / out / "config.json").read_bytes() == (instruct / "config.json").read_bytes()


def test_merge_is_linear_in_scale(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    for scale in (0.25, 0.5, 0.75):
        transfer(adapter, instruct, tmp_path / str(scale), scale=scale)
    w, a, b, c = (weights(p) for p in (instruct, tmp_path / "0.25", tmp_path / "0.5", tmp_path / "0.75"))
    for name in w:
        torch.testing.assert_close(a[name] + b[name] - w[name], c[name], rtol=1e-6, atol=1e-6)


def test_chat_vector_identity(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """instruct + D = (base + D) + (instruct - base)"""
    base, instruct, adapter = llama
    transfer(adapter, base, tmp_path / "tuned")
    transfer(adapter, instruct, tmp_path / "graft")
    transfer(Delta.difference(instruct, base), tmp_path / "tuned", tmp_path / "vector", verify="weights")
    a, b = weights(tmp_path / "graft"), weights(tmp_path / "vector")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_update_has_at_most_rank_r(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    transfer(adapter, instruct, tmp_path / "out")
    before, after = weights(instruct), weights(tmp_path / "out")
    for name, w in before.items():
        if any(part in name for part in PROJECTIONS):
            s = torch.linalg.svdvals(after[name].double() - w.double())
            assert s[3] > 1e-3 and s[4] < 1e-6 * max(1.0, float(w.abs().max())) * 10


def test_result_does_not_depend_on_shards_pieces_or_threads(
    llama: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, instruct, adapter = llama
    options = {"dtype": "bfloat16", "rounding": "stochastic", "seed": 5}
    transfer(adapter, instruct, tmp_path / "a", **options)
    transfer(adapter, instruct, tmp_path / "b", max_shard=9000, **options)
    monkeypatch.setattr(stages, "PIECE_VALUES", 100)
    monkeypatch.setattr(apply, "available_cores", lambda: 3)
    transfer(adapter, instruct, tmp_path / "c", max_shard="20KB", **options)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(same_bytes(a[name], b[name]) and same_bytes(a[name], c[name]) for name in a)
    transfer(adapter, instruct, tmp_path / "d", **{**options, "seed": 6})
    d = weights(tmp_path / "d")
    assert any(not same_bytes(a[name], d[name]) for name in a)


def test_sharded_output_has_an_exact_index(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    transfer(adapter, instruct, tmp_path / "out", max_shard="16KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors" and set(index["weight_map"].values()) == set(files)
    tensors = weights(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert (logits(plain(tmp_path / "out")) - logits(with_adapter(instruct, adapter))).abs().max() <= 1e-5


def test_sharded_input_gives_the_same_result(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    save(plain(instruct), tmp_path / "sharded", max_shard_size="20KB")
    assert fingerprint(tmp_path / "sharded") == fingerprint(instruct)
    transfer(adapter, tmp_path / "sharded", tmp_path / "a")
    transfer(adapter, instruct, tmp_path / "b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert set(a) == set(b) and all(same_bytes(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_output_dtype_is_one_rounding_of_the_exact_sum(tmp_path: Path, dtype: str) -> None:
    base, instruct = make_pair(tmp_path, dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    transfer(adapter, instruct, tmp_path / "out", dtype=dtype)
    delta, w, out = LoraDelta(adapter), weights(instruct), weights(tmp_path / "out")
    lora = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in out.items():
        key = "base_model.model." + name.removesuffix(".weight")
        exact = w[name].float()
        if f"{key}.lora_A.weight" in lora:
            exact = exact + 2.0 * (lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"])
        assert same_bytes(tensor, exact.to(getattr(torch, dtype)))
    delta.close()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype and str(plain(tmp_path / "out", "auto").dtype) == f"torch.{dtype}"


def test_auto_keeps_mixed_dtypes(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(instruct / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, instruct / "model.safetensors", metadata={"format": "pt"})
    transfer(make_adapter(base, tmp_path / "adapter"), instruct, tmp_path / "out")
    out = weights(tmp_path / "out")
    assert {name: t.dtype for name, t in out.items()} == {name: t.dtype for name, t in tensors.items()}


def test_untouched_tensors_and_side_files_are_the_target_s(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    (instruct / "README.md").write_text("not copied")
    transfer(adapter, instruct, tmp_path / "out")
    before, after = weights(instruct), weights(tmp_path / "out")
    for name in before:
        touched = any(part in name for part in PROJECTIONS)
        assert same_bytes(before[name], after[name]) != touched
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (instruct / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()
    (instruct / "README.md").unlink()
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "hi"}]
    made, original = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", instruct))
    assert made.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(messages, tokenize=False)


def test_report(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    result = transfer(adapter, instruct, tmp_path / "out", dtype="bfloat16").result
    report = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert report["summary"] == result
    assert set(report["tensors"]) == {name for name in weights(instruct) if any(part in name for part in PROJECTIONS)}
    before, after = weights(instruct), weights(tmp_path / "out")
    name, entry = next(iter(report["tensors"].items()))
    delta = LoraDelta(adapter)
    with apply.Checkpoint(instruct) as target:
        delta.fit(target.names)
    d, w, y = delta.rows(name, 0, len(before[name])).double(), before[name].double(), after[name].double()
    assert entry["ratio"] == pytest.approx(float(d.norm() / w.norm()), rel=1e-4)
    assert entry["error"] == pytest.approx(float((y - w - d).norm() / d.norm()), rel=1e-3)
    assert entry["gain"] == pytest.approx(float(((y - w) * d).sum() / d.square().sum()), rel=1e-3)
    assert entry["unchanged"] == pytest.approx(float((y == w).double().mean()))


def test_a_swallowed_update_is_a_problem_and_a_coarse_one_a_warning(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, dtype=torch.bfloat16)
    small = transfer(make_adapter(base, tmp_path / "small", size=0.004), instruct, tmp_path / "a").result
    assert small["gain"] < 0.9 and "adapter separate (exact), write float16 (8 times finer) or float32; stochastic" in small["problems"][0]
    middle = transfer(make_adapter(base, tmp_path / "middle", size=0.02), instruct, tmp_path / "b").result
    assert middle["error"] > 0.1 and not middle["problems"] and any("rounding to bfloat16" in text for text in middle["warnings"])
    fine = transfer(tmp_path / "small", instruct, tmp_path / "c", dtype="float32").result
    assert fine["error"] < 1e-3 and not fine["problems"]
    unbiased = transfer(tmp_path / "small", instruct, tmp_path / "d", rounding="stochastic").result
    assert abs(unbiased["gain"] - 1) < 0.5 and unbiased["error"] > small["error"]


def test_several_adapters_are_summed_exactly(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    second = make_adapter(base, tmp_path / "second", seed=2, target_modules=["q_proj", "lm_head"])
    transfer(adapter, instruct, tmp_path / "step1", scale=0.5)
    transfer(second, instruct, tmp_path / "step2", scale=-2.0)
    transfer(added([(0.5, LoraDelta(adapter)), (-2.0, LoraDelta(second))], instruct), instruct, tmp_path / "sum")
    w, a, b, c = (weights(p) for p in (instruct, tmp_path / "step1", tmp_path / "step2", tmp_path / "sum"))
    for name in w:
        torch.testing.assert_close(a[name] + b[name] - w[name], c[name], rtol=1e-6, atol=1e-6)


def test_full_difference_and_its_projections(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, _ = llama
    tuned = save(tiny_model(seed=9), tmp_path / "tuned")
    transfer(Delta.difference(tuned, base), instruct, tmp_path / "all")
    transfer(Delta.difference(tuned, base, include="projections"), instruct, tmp_path / "shadow")
    b, i, t, full, shadow = (weights(p) for p in (base, instruct, tuned, tmp_path / "all", tmp_path / "shadow"))
    for name in b:
        torch.testing.assert_close(full[name], i[name] + (t[name] - b[name]), rtol=0, atol=1e-6)
        if not any(part in name for part in PROJECTIONS):
            assert same_bytes(shadow[name], i[name])
        else:
            assert same_bytes(shadow[name], full[name])
    with pytest.raises(BadInput, match="matches no parameter"):
        Delta.difference(tuned, base, include="*.nothing")


def test_tied_difference_changes_the_shared_tensor_once(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, "gemma3")
    tuned = save(tiny_model("gemma3", seed=9), tmp_path / "tuned")
    result = transfer(Delta.difference(tuned, base), instruct, tmp_path / "out")
    assert not result.result["untied"]
    b, i, t, out = (weights(p) for p in (base, instruct, tuned, tmp_path / "out"))
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(out[name], i[name] + (t[name] - b[name]), rtol=0, atol=1e-6)


def test_saved_modules_only_when_asked(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, _ = llama
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if "lm_head" in name)
    tensors[key] = tensors[key] + 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="modules_to_save"):
        transfer(adapter, instruct, tmp_path / "out")
    transfer(adapter, instruct, tmp_path / "out", saved_modules=True)
    torch.testing.assert_close(weights(tmp_path / "out")["lm_head.weight"], weights(instruct)["lm_head.weight"] + 0.5, rtol=0, atol=1e-6)


def test_tensor_delta_and_overflow(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, _ = llama
    name = "model.norm.weight"
    transfer(TensorDelta({name: torch.ones(32)}), instruct, tmp_path / "out")
    torch.testing.assert_close(weights(tmp_path / "out")[name], weights(instruct)[name] + 1)
    with pytest.raises(RunFailed, match="too large for torch.float16"):
        transfer(TensorDelta({name: torch.full((32,), 1e6)}), instruct, tmp_path / "big", dtype="float16")
    assert not (tmp_path / "big").exists()
    with pytest.raises(BadInput, match="not finite"):
        transfer(TensorDelta({name: torch.full((32,), float("nan"))}), instruct, tmp_path / "big")


def test_a_finished_transfer_is_reused_and_a_changed_one_is_not(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    assert not transfer(adapter, instruct, tmp_path / "out").reused
    assert transfer(adapter, instruct, tmp_path / "out").reused
    assert not transfer(adapter, instruct, tmp_path / "out", scale=0.5).reused


MEASURE = """
import resource, sys
import guidetune.weightspace.verify, peft, torch
from guidetune.models.pair import check_pair
from guidetune.weightspace.apply import transfer
torch.set_num_threads(1)
check_pair(sys.argv[1], sys.argv[2], distance=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
transfer(sys.argv[3], sys.argv[2], sys.argv[4], verify="weights")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_a_few_pieces_of_one_tensor(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    base, instruct = make_pair(tmp_path, vocab=400_000, hidden_size=128, num_attention_heads=4)  # two tensors of 205 MB each
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(base), str(instruct), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout.split()[-1]) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 130_000

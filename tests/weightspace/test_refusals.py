"""Transfer refuses, with the reason and before anything is written, what it cannot do rightly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guidetune.errors import BadInput
from guidetune.models.fingerprints import fingerprint
from guidetune.weightspace.apply import transfer
from tests.models.pairs import make_adapter, make_pair, save, tiny_tokenizer
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    base, instruct = make_pair(root)
    return base, instruct, make_adapter(base, root / "adapter")


def copy_adapter(adapter: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(adapter, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return to


def rename(adapter: Path, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def refused(match: str, *args: Any, **options: Any) -> None:
    out = args[2]
    with pytest.raises(BadInput, match=match):
        transfer(*args, **options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"init_lora_weights": "olora"}, "changes the base weights"),
        ({"init_lora_weights": "corda"}, "changes the base weights"),
        ({"init_lora_weights": "loftq"}, "changes the base weights"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"some_future_option": 3}, "some_future_option=3"),
    ],
)
def test_adapters_that_are_not_plain_lora(llama: tuple[Path, Path, Path], tmp_path: Path, config: dict, match: str) -> None:
    _, instruct, adapter = llama
    refused(match, copy_adapter(adapter, tmp_path / "a", **config), instruct, tmp_path / "out")


def test_converted_initialisations_pass(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    made = copy_adapter(adapter, tmp_path / "a", init_lora_weights="pissa")
    (made / "guidetune.json").write_text(json.dumps({"base": str(base), "converted": True}))
    transfer(made, instruct, tmp_path / "out")


def test_wrong_prefix_unused_key_and_half_a_pair(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    a = copy_adapter(adapter, tmp_path / "a")
    rename(a, lambda name: name.removeprefix("base_model.model."))
    refused("peft's naming", a, instruct, tmp_path / "out")
    b = copy_adapter(adapter, tmp_path / "b")
    rename(b, lambda name: name.replace("model.layers", "model.decoder.layers"))
    refused(r"no module model\.decoder\.layers\.0.*nearest: model\.layers\.0", b, instruct, tmp_path / "out")
    c = copy_adapter(adapter, tmp_path / "c")
    rename(c, lambda name: name.replace("1.mlp.down_proj.lora_B", "1.mlp.down_proj.lora_C"))
    refused("LoRA pairs", c, instruct, tmp_path / "out")
    d = copy_adapter(adapter, tmp_path / "d")
    file = d / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if not k.endswith("0.self_attn.q_proj.lora_B.weight")}, file)
    refused("only one of its two matrices", d, instruct, tmp_path / "out")
    e = copy_adapter(adapter, tmp_path / "e", r=8)
    refused("its config says 8", e, instruct, tmp_path / "out")


def test_not_finite_and_damaged_adapters(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    a = copy_adapter(adapter, tmp_path / "a")
    file = a / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    refused("not finite", a, instruct, tmp_path / "out")
    b = copy_adapter(adapter, tmp_path / "b")
    file = b / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("damaged", b, instruct, tmp_path / "out")


def test_wrong_pairs(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, _, adapter = llama
    wide = save(tiny_model(hidden_size=48), tmp_path / "wide")
    refused("config hidden_size differs: base 32, instruct 48", adapter, wide, tmp_path / "out")
    deep = save(tiny_model(num_hidden_layers=3), tmp_path / "deep")
    refused("only the instruct model has", adapter, deep, tmp_path / "out")
    tied = save(tiny_model(tie_word_embeddings=True), tmp_path / "tied")
    refused("ties its embeddings", adapter, tied, tmp_path / "out")
    large = save(tiny_model(vocab=140), tmp_path / "large")
    refused("vocab_size differs", adapter, large, tmp_path / "out")
    other = save(tiny_model("qwen2"), tmp_path / "other")
    refused("model_type differs", adapter, other, tmp_path / "out")
    rope = save(tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), tmp_path / "rope")
    refused("rope_parameters differs", adapter, rope, tmp_path / "out")
    moved = save(tiny_model(), tmp_path / "moved")
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("2 tokens have different ids", adapter, moved, tmp_path / "out")
    transfer(adapter, moved, tmp_path / "out", allow_mismatch=True)


def test_adapter_of_another_base(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    made = copy_adapter(adapter, tmp_path / "a")
    (made / "guidetune.json").write_text(json.dumps({"base": str(base), "base_fingerprint": fingerprint(base)}))
    transfer(made, instruct, tmp_path / "right")
    other = save(tiny_model(seed=5), tmp_path / "other")
    refused("trained on another base", made, instruct, tmp_path / "out", base=other)
    refused("trained on another base", adapter, instruct, tmp_path / "out", base=other)
    result = transfer(made, instruct, tmp_path / "out", base=other, allow_mismatch=True)
    assert any("another base" in text for text in result.result["warnings"])


def test_changed_embedding_copy_is_refused(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, _ = llama
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = [name for name in tensors if "base_layer" in name]
    assert copies, "peft stores a copy of targeted embeddings"
    tensors[copies[0]] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    refused("changed copy", adapter, instruct, tmp_path / "out")


def test_quantised_target(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    shutil.copytree(instruct, tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    refused("quantised", adapter, tmp_path / "q", tmp_path / "out")


def test_places_that_cannot_be_written(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    (tmp_path / "file").write_text("x")
    for out, match in [(tmp_path / "file", "is a file"), (tmp_path / "file" / "sub", "cannot write|is a file")]:
        with pytest.raises(BadInput, match=match):
            transfer(adapter, instruct, out)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="not empty"):
        transfer(adapter, instruct, mine)
    assert (mine / "thesis.tex").read_text() == "years of work"
    for target in (instruct, adapter, base):
        with pytest.raises(BadInput, match="read from"):
            transfer(adapter, instruct, target)
    with pytest.raises(BadInput, match="read from"):
        transfer(adapter, instruct, instruct.parent)


def test_bad_options_are_listed_together(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    with pytest.raises(BadInput) as caught:
        transfer(adapter, instruct, tmp_path / "out", dtype="int8", rounding="up", verify="maybe", scale=float("nan"))
    assert len(caught.value.problems) == 4
    refused("size", adapter, instruct, tmp_path / "out", max_shard="lots")
    refused("is an adapter", adapter, adapter, tmp_path / "out")


def test_pickled_adapter(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, instruct, adapter = llama
    a = copy_adapter(adapter, tmp_path / "a")
    (a / "adapter_model.safetensors").unlink()
    torch.save({}, a / "adapter_model.bin")
    refused("pickled weights", a, instruct, tmp_path / "out")


def test_tokenizer_difference_is_found_whatever_the_weights(tmp_path: Path, llama: tuple[Path, Path, Path]) -> None:
    _, instruct, adapter = llama
    shutil.copytree(instruct, tmp_path / "i")
    tiny_tokenizer(extra=("<tool>",)).save_pretrained(tmp_path / "i")
    transfer(adapter, tmp_path / "i", tmp_path / "out")  # an added token moves no other one

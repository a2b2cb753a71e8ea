"""Loading, fingerprints and handles."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guidetune.errors import BadInput
from guidetune.models import fingerprint, load_model, load_tokenizer, open_handle, tokenizer_digest
from guidetune.models import fingerprints as fingerprints_module
from guidetune.models.checkpoint import Checkpoint
from tests.models.pairs import TEMPLATE, logits, make_adapter, make_pair, plain, save, tiny_tokenizer, with_adapter
from tests.tiny import ARCHITECTURES, tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    base, instruct = make_pair(root)
    return base, instruct, make_adapter(base, root / "adapter")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_in_files_match_the_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    save(model, tmp_path / "m")
    with Checkpoint(tmp_path / "m") as checkpoint:
        names = checkpoint.names
        assert not names.missing and not names.unexpected
        for name, p in model.named_parameters(remove_duplicate=False):
            assert torch.equal(checkpoint.parameter_rows(name), p)
    loaded = load_model(tmp_path / "m")
    assert not loaded.training and torch.equal(logits(loaded), logits(model))
    assert loaded.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")


def test_base_model_files_without_the_prefix(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    save(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with Checkpoint(tmp_path / "m") as checkpoint:
        assert not checkpoint.names.missing
        assert checkpoint.names.file_of["model.layers.0.mlp.up_proj.weight"] == "layers.0.mlp.up_proj.weight"
        assert checkpoint.names.file_of["lm_head.weight"] == "embed_tokens.weight"


def test_dtypes(llama: tuple[Path, Path, Path]) -> None:
    assert load_model(llama[1], dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(llama[1]).dtype == torch.float32
    with pytest.raises(BadInput, match="not one of auto"):
        load_model(llama[1], dtype="int3")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="no usable GPU"):
            load_model(llama[1], device="cuda")


def test_adapter_source_is_base_plus_adapter(llama: tuple[Path, Path, Path]) -> None:
    base, _, adapter = llama
    assert torch.equal(logits(load_model(adapter)), logits(with_adapter(base, adapter)))
    assert (logits(load_model(adapter)) - logits(plain(base))).abs().max() > 0.01


def test_adapter_on_the_wrong_base(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    shutil.copytree(adapter, tmp_path / "a")
    record = {"base": str(instruct), "base_fingerprint": fingerprint(base)}
    (tmp_path / "a" / "guidetune.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match="was trained on a base with fingerprint"):
        load_model(tmp_path / "a")
    load_model(tmp_path / "a", allow_mismatch=True)


def test_adapter_with_other_names_is_not_silently_the_base(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[2], tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name.replace("model.layers", "model.h"): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="does not fit its base"):
        load_model(tmp_path / "a")


def test_missing_wrong_and_truncated_weights(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[1], tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="not in its files.*model.norm.weight"):
        load_model(tmp_path / "m")
    save_file({k: v[:16] if k == "model.norm.weight" else v for k, v in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="another shape"):
        load_model(tmp_path / "m")
    save_file(tensors, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BadInput, match="cut"):
        load_model(tmp_path / "m")


def test_code_from_the_repository_is_never_run(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[1], tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    custom = {"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | custom))
    (tmp_path / "m" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BadInput, match="own code"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def test_tokenizer(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert load_tokenizer(llama[1]).chat_template == TEMPLATE and load_tokenizer(llama[2]).chat_template is None
    shutil.copytree(llama[1], tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="cannot be read"):
        load_tokenizer(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    with pytest.raises(BadInput, match="has no tokenizer"):
        load_tokenizer(tmp_path / "m")


def test_tokenizer_digest_ignores_state_and_template() -> None:
    a, b = tiny_tokenizer(), tiny_tokenizer(template=None)
    b("hello", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_digest(a) == tokenizer_digest(b)
    assert tokenizer_digest(a) != tokenizer_digest(tiny_tokenizer(extra=("<tool>",)))


def test_fingerprint_is_of_the_content(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    assert fingerprint(base) != fingerprint(instruct) != fingerprint(adapter)
    shutil.copytree(instruct, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(instruct)
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "elsewhere"}))
    assert fingerprint(tmp_path / "copy") == fingerprint(instruct)
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert fingerprint(tmp_path / "copy") != fingerprint(instruct)
    shutil.copytree(adapter, tmp_path / "adapter")
    assert fingerprint(tmp_path / "adapter") == fingerprint(adapter)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))
    assert fingerprint(tmp_path / "adapter") != fingerprint(adapter)


def test_fingerprint_cache_is_not_fooled(llama: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints_module, "CACHE_FROM", 0)
    shutil.copytree(llama[1], tmp_path / "m")
    first = fingerprint(tmp_path / "m")
    assert list((tmp_path / "cache" / "digests").iterdir())
    assert fingerprint(tmp_path / "m") == first
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(tmp_path / "m") != first
    for entry in (tmp_path / "cache" / "digests").iterdir():
        entry.write_text("broken")
    fingerprint(tmp_path / "m")
    monkeypatch.setenv("GUIDETUNE_CACHE", os.devnull)
    assert fingerprint(llama[1]) == first


def test_handle(llama: tuple[Path, Path, Path]) -> None:
    pytest.importorskip("guidetune.data.chat")
    handle = open_handle(llama[1], dtype="float32", device="cpu")
    assert handle.fingerprint == fingerprint(llama[1]) and handle.chat is not None and str(handle.device) == "cpu"
    assert open_handle(llama[0], device="cpu").chat is None
    assert open_handle(llama[0], device="cpu", template=TEMPLATE).chat is not None

"""Content fingerprints of models, adapters and tokenizers: equal weights give equal fingerprints wherever and however they are sharded."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from guidetune import artefacts
from guidetune.models.checkpoint import TensorFiles, read_header
from guidetune.models.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource, read_config, resolve, weight_files
from guidetune.progress import progress

# What a config says about where it was saved rather than about the model.
VOLATILE = {
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "transformers_version", "torch_dtype", "dtype",
    "use_cache",
}  # fmt: skip
VOLATILE_ADAPTER = VOLATILE | {
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "task_type", "lora_dropout",
}  # fmt: skip
CACHE_FROM = 64 << 20  # smaller files are hashed faster than a cache is worth
_SHOW_PROGRESS = 2 << 30


def fingerprint(spec: str | Path | ModelSource) -> str:
    """32 hex digits over every tensor's name, dtype, shape and bytes, and the config; for an adapter, over its base as well.

    Digests of large files are cached under the user's cache folder by path, size and time of change.

    Raises:
        BadInput: the model cannot be found or its files are damaged.
    """
    source = resolve(spec)
    tensors: dict[str, str] = {}
    for file in weight_files(source.path):
        tensors.update(tensor_digests(file))
    base = artefacts.fingerprint({"config": stable(source.config, VOLATILE), "tensors": tensors})
    if source.adapter is None:
        return base
    return artefacts.fingerprint({"base": base, "adapter": adapter_fingerprint(source.adapter)})


def adapter_fingerprint(folder: Path) -> str:
    """The adapter's own content, without its base: tensors and the fields of `adapter_config.json` that change the result."""
    config = stable(read_config(folder / ADAPTER_CONFIG), VOLATILE_ADAPTER)
    return artefacts.fingerprint({"config": config, "tensors": tensor_digests(folder / ADAPTER_WEIGHTS)})


def tokenizer_digest(tokenizer: Any) -> str:
    """32 hex digits over what decides the token ids: model, normaliser, added and special tokens. The chat template is not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Truncation and padding are set by whoever called the tokenizer last.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    bos = [bool(getattr(tokenizer, flag, False)) for flag in ("add_bos_token", "add_eos_token")]
    return artefacts.fingerprint({"rules": rules, "special": special, "bos_eos": bos})


def stable(config: Any, volatile: set[str]) -> Any:
    """A config without its volatile keys, at every depth."""
    if isinstance(config, dict):
        return {key: stable(value, volatile) for key, value in config.items() if key not in volatile}
    if isinstance(config, list):
        return [stable(value, volatile) for value in config]
    return config


def tensor_digests(file: Path) -> dict[str, str]:
    """{tensor name: digest of dtype, shape and bytes} of one safetensors file."""
    file = Path(file).resolve()
    stat = file.stat()
    key = {"path": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "version": 1}
    cached = cache_folder() / "digests" / f"{artefacts.fingerprint(key)}.json"
    if stat.st_size >= CACHE_FROM:
        with suppress(OSError, ValueError):
            found = artefacts.read_json(cached)
            if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
                return found
    infos = read_header(file)
    with TensorFiles(infos) as files, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        # Open before the threads do: the handle is then shared.
        for info in list(infos.values())[:1]:
            files.pread(info, 0, 0)

        def digest(name: str) -> str:
            info = infos[name]
            sha = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
            for piece in files.raw(name, 4 << 20):
                sha.update(piece)
                bar.advance(len(piece) / 1e6)
            return sha.hexdigest()[:32]

        if stat.st_size >= _SHOW_PROGRESS:
            with progress(f"hash {file.name}", total=stat.st_size / 1e6, unit="MB") as bar:
                digests = dict(zip(infos, pool.map(digest, infos), strict=True))
        else:
            bar = _Silent()
            digests = dict(zip(infos, pool.map(digest, infos), strict=True))
    if stat.st_size >= CACHE_FROM:
        with suppress(OSError):  # a read-only home only costs the next hash
            artefacts.write_json(cached, digests)
    return digests


def cache_folder() -> Path:
    """`$GUIDETUNE_CACHE`, else guidetune's folder in the user's cache."""
    if chosen := os.environ.get("GUIDETUNE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "guidetune"


class _Silent:
    def advance(self, n: float = 1, **info: Any) -> None: ...

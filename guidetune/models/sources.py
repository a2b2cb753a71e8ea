"""Where a model comes from: the embedded world, a folder, an adapter folder, or the hub."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidetune.errors import BadInput

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "guidetune.json"  # beside an adapter: {"base": spec, "base_fingerprint": hex, ...}
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Never executable and never pickled files.
HUB_ALLOWED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
# Second copies of the weights in other layouts.
HUB_IGNORED = ["original/*", "consolidated*.safetensors", "metal/*", "onnx/*", "coreml/*", "openvino/*", "flax_model*", "tf_model*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk.

    `path` is the folder with the full weights; `adapter` is the adapter folder to put on them, if any, and then
    `base_spec` and `base_fingerprint` are the base model that the adapter says it belongs to.
    """

    spec: str
    path: Path
    adapter: Path | None = None
    base_spec: str | None = None
    base_fingerprint: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.path / "config.json")


def resolve(spec: str | Path | ModelSource, base: str | Path | None = None) -> ModelSource:
    """Find a model: `world:base`, `world:instruct`, a folder, an adapter folder (its base is in it) or a hub id (`org/name[@revision]`).

    `base` replaces the base recorded in an adapter folder.

    Raises:
        BadInput: nothing is there, or only weights that are not safetensors.
    """
    if isinstance(spec, ModelSource):
        return spec
    text = str(spec).strip()
    if not text:
        raise BadInput("a model is missing: give a hub id, a model folder, an adapter folder or world:instruct")
    if text.startswith("world:"):
        return ModelSource(text, _check_model_folder(text, _world_path(text)))
    path = Path(text).expanduser()
    if path.exists():
        return _local(text, path.resolve(), base)
    if _looks_like_path(text) or not HUB_ID.fullmatch(text):
        raise BadInput(f"no model at {text!r}{_near(path)}")
    return _local(text, _hub_snapshot(text, path), base)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadInput naming the file when it is missing or broken."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); download or write the file again") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path} must hold a JSON object, not {type(config).__name__}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, else `model.safetensors`; empty when there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_config(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise BadInput(f"{index} has no usable weight_map; download the model again")
        bad = sorted(name for name in set(weight_map.values()) if Path(name).name != name)
        if bad:
            raise BadInput(f"{index} points outside its folder: {bad[0]!r}")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise BadInput(
                f"{folder} is incomplete: {', '.join(missing[:3])} is in {index.name} but not in the folder; download the model again"
            )
        return files
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _world_path(text: str) -> Path:
    from guidetune import world
    from guidetune.world.pairs import MODELS

    name = text.removeprefix("world:")
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
        hint = f"; did you mean world:{near[0]}?" if near else f"; the embedded models are {', '.join(f'world:{one}' for one in MODELS)}"
        raise BadInput(f"no embedded model {text!r}{hint}")
    return Path(world.path(name))


def _local(text: str, path: Path, base: str | Path | None) -> ModelSource:
    if path.is_file():
        raise BadInput(f"{text} is a file; give the folder that holds it, with its config.json ({path.parent})")
    has_model = (path / "config.json").is_file() and bool(weight_files(path))
    if (path / ADAPTER_CONFIG).is_file() and not (has_model and not (path / ADAPTER_WEIGHTS).is_file()):
        return _adapter(text, path, base)
    return ModelSource(text, _check_model_folder(text, path))


def _adapter(text: str, path: Path, base: str | Path | None) -> ModelSource:
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise BadInput(_no_weights(text, path, ADAPTER_WEIGHTS))
    config = read_config(path / ADAPTER_CONFIG)
    provenance = read_config(path / PROVENANCE) if (path / PROVENANCE).is_file() else {}
    recorded = str(base or provenance.get("base") or config.get("base_model_name_or_path") or "")
    if not recorded:
        raise BadInput(f"adapter {text} does not say which base model it belongs to (base_model_name_or_path in {ADAPTER_CONFIG}): name it")
    # A relative base means relative to where the adapter was made; beside the adapter is the second guess.
    beside = path / recorded
    if not recorded.startswith("world:") and not Path(recorded).expanduser().exists() and beside.exists():
        recorded = str(beside.resolve())
    try:
        source = resolve(recorded)
    except BadInput as error:
        raise BadInput([f"adapter {text}: its base model cannot be used: {problem}" for problem in error.problems]) from None
    if source.adapter is not None:
        raise BadInput(f"adapter {text} was trained on another adapter ({recorded}); merge that one first (guidetune merge)")
    return ModelSource(text, source.path, path, recorded, None if base else provenance.get("base_fingerprint"))


def _check_model_folder(text: str, path: Path) -> Path:
    if not path.is_dir():
        raise BadInput(f"no model at {text!r}: {path} is not a folder")
    if not (path / "config.json").is_file():
        parts = {"model": "config.json", "adapter": ADAPTER_CONFIG}
        inside = [str(Path(text) / name) for name, config in parts.items() if (path / name / config).is_file()]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
        if not hint and any(path.glob("*.gguf")):
            hint = "; it holds GGUF weights, which cannot be tuned or merged: give the original model folder"
        raise BadInput(f"{text} is not a model folder: it has no config.json{hint}")
    if not weight_files(path):
        raise BadInput(_no_weights(text, path, "model.safetensors"))
    return path


def _no_weights(text: str, path: Path, wanted: str) -> str:
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED and not file.name.startswith(NOT_WEIGHTS))
    if pickled:
        return (
            f"{text} has only pickled weights ({pickled[0]}), which can run any code when read; convert them to {wanted} "
            "where you trust them: model.save_pretrained(folder) in transformers writes safetensors"
        )
    return f"{text} has no weights: {wanted} is missing"


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~", os.sep)) or text.count("/") > 1 + text.count("@") or text.endswith(("/", os.sep)) or "\\" in text


def _near(path: Path) -> str:
    """', did you mean ...?' from the deepest folder of `path` that exists."""
    parent = path.absolute()
    while not parent.exists():
        child, parent = parent.name, parent.parent
    if not parent.is_dir():
        return ""
    try:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(child, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {parent / near[0]}?"
    return f"; {parent} has no {child!r}"


def _hub_snapshot(text: str, path: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = text.partition("@")
    local = _near(path) if path.parent.is_dir() and str(path.parent) != "." else ""
    hint = local if "did you mean" in local else ""
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=HUB_ALLOWED, ignore_patterns=HUB_IGNORED)
    except GatedRepoError:
        raise BadInput(f"{repo} is gated: accept its licence on its hub page, then run `hf auth login`") from None
    except RevisionNotFoundError:
        raise BadInput(f"{repo} has no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise BadInput(f"no folder and no hub model {repo!r} (a private one needs `hf auth login`){hint}") from None
    except HFValidationError as error:
        raise BadInput(f"no folder {text!r}, and it is not a hub id: {error}{hint}") from None
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub could not be reached"
        raise BadInput(f"no folder {text!r}, and no such model in the local hub cache ({why}){hint}") from None
    except Exception as error:  # the hub client raises its HTTP library's errors too, and that library changes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"no folder {text!r}, and it cannot be had from the hub: {reason}{hint}") from None
    return Path(folder)

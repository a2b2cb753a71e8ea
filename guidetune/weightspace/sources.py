"""Deltas: what is added to a model. Each gives rows of its update for a named parameter, in float32, on demand."""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from guidetune import artefacts
from guidetune.errors import BadInput
from guidetune.models.checkpoint import FLOATS, Checkpoint, TensorFiles, read_header
from guidetune.models.fingerprints import adapter_fingerprint, fingerprint
from guidetune.models.names import ParameterNames
from guidetune.models.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROVENANCE, ModelSource, read_config, resolve

if TYPE_CHECKING:
    from guidetune.weightspace.vocabulary import Vocabulary

PROJECTIONS = r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj)\.weight$"
PREFIX = "base_model.model."
DELTA_FILES = "delta-*.safetensors"
LORA_KEY = re.compile(r"(?P<path>.+)\.(?:lora_(?P<embedding>embedding_)?(?P<side>[AB]))(?:\.(?P<adapter>\w+))??(?P<weight>\.weight)?$")
# Initialisations that leave the base weights as they are, so that the adapter alone is the update.
PLAIN_INITS = (True, False, "true", "false", "gaussian", "eva", "orthogonal")
# Fields that do not change what B A means, or are read below.
KNOWN_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "eva_config",
    "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
WHY_NOT = {
    "use_dora": "DoRA rescales each row of the weight it was trained on, so its update belongs to that weight alone; merge it into its own "
    "base and transfer the difference (model minus base)",
    "lora_bias": "it trained biases of the adapter (lora_bias), which are not part of B A",
    "trainable_token_indices": "it trained single token embeddings (trainable_token_indices)",
    "target_parameters": "it adapts bare parameters of expert layers (target_parameters)",
    "layer_replication": "it repeats layers of its base (layer_replication)",
    "alora_invocation_tokens": "it is active only after certain tokens (aLoRA), which no merged weight can be",
}


class Delta(ABC):
    """An update of some parameters. `shapes` names them as the model built by transformers does."""

    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the update of one parameter, float32 [stop - start, ...] (a scalar is its own row)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What identifies the update: JSON-ready, equal for equal content."""

    def fit(self, names: ParameterNames) -> list[str]:
        """Prepare for a model with these parameters; the reasons why it cannot be added to it, if any."""
        problems = []
        for name, shape in self.shapes.items():
            found = names.shapes.get(name)
            if found is not None and found != shape:
                problems.append(f"update of {name} has shape {list(shape)}, the model's is {list(found)}")
            elif found is None and name not in _converted(names):
                problems.append(f"the model has no parameter {name}")
        return problems

    def same(self, a: str, b: str) -> bool:
        """Whether two parameters get the same update by construction (a tied pair trained as one)."""
        return a not in self.shapes and b not in self.shapes

    def checks(self) -> list[str]:
        """Faults of the update itself, such as values that are not finite."""
        return []

    def members(self) -> list[Delta]:
        """The updates this one is made of: itself, unless it joins several."""
        return [self]

    def begin(self) -> None:  # noqa: B027 (nothing to prepare here)
        """Called once before `rows` is called from several threads."""

    def done(self, name: str) -> None:  # noqa: B027 (nothing is held here)
        """No more rows of this parameter are wanted for now."""

    def close(self) -> None:  # noqa: B027 (nothing is open here)
        """Release files."""

    @staticmethod
    def adapter(folder: str | Path, base: str | Path | None = None, saved_modules: bool = False) -> LoraDelta:
        return LoraDelta(folder, base, saved_modules)

    @staticmethod
    def difference(tuned: str | Path, base: str | Path, include: str | Sequence[str] | None = None) -> Difference:
        return Difference(tuned, base, include)


class LoraDelta(Delta):
    """A LoRA adapter folder in peft's format: update = (alpha / r) B A, or alpha / sqrt(r) with rsLoRA (arXiv 2106.09685, 2312.03732).

    `rank_pattern` and `alpha_pattern` count per module; a Conv1D's or an embedding's update is transposed. Adapters whose update
    is not B A on an unchanged base are refused. `saved_modules` lets `modules_to_save` through, as the difference to the base.
    """

    def __init__(self, folder: str | Path, base: str | Path | None = None, saved_modules: bool = False) -> None:
        self.source = resolve(folder, base)
        if self.source.adapter is None:
            raise BadInput(f"{folder} is not an adapter folder (it has no {ADAPTER_CONFIG}); for a tuned model give model and minus")
        self.folder = self.source.adapter
        self.config = read_config(self.folder / ADAPTER_CONFIG)
        provenance = read_config(self.folder / PROVENANCE) if (self.folder / PROVENANCE).is_file() else {}
        self._base: Checkpoint | None = None
        self.files = TensorFiles(read_header(self.folder / ADAPTER_WEIGHTS))
        problems = refusals(self.config, converted=bool(provenance.get("converted")), saved_modules=saved_modules)
        if problems:
            raise BadInput([f"adapter {folder} cannot be transferred: {problem}" for problem in problems])
        self.pairs: dict[str, dict[str, str]] = {}  # module path -> {"A": key, "B": key, "embedding": "yes"}
        self.plain: dict[str, str] = {}  # parameter -> key: full tensors that peft saved with the adapter
        self._read_keys()
        self.saved = {name for name in self.plain if _is_saved(name, self.config.get("modules_to_save"))}
        self._kinds: dict[str, str] = {}
        self._name_of: dict[str, str] = {}
        self._last: tuple[str, torch.Tensor, torch.Tensor] | None = None
        self.shapes = {}
        self.lora_of: dict[str, str] = {}

    def _read_keys(self) -> None:
        leftover = []
        for key, info in self.files.tensors.items():
            if info.dtype not in FLOATS:
                raise BadInput(
                    f"adapter {self.folder}: tensor {key} has dtype {info.dtype}; an adapter is stored in float16, bfloat16 or float32"
                )
            if not key.startswith(PREFIX):
                leftover.append(key)
                continue
            name = key.removeprefix(PREFIX)
            match = LORA_KEY.fullmatch(name)
            if match and len(info.shape) == 2:
                pair = self.pairs.setdefault(match["path"].removesuffix(".base_layer"), {})
                if match["side"] in pair:
                    raise BadInput(f"adapter {self.folder} holds two adapters for {match['path']}; save the one you want by itself")
                pair[match["side"]] = key
                if match["embedding"]:
                    pair["embedding"] = "yes"
            elif "lora_" not in name and "token_adapter" not in name:
                self.plain[
                    name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
                ] = key
            else:
                leftover.append(key)
        if leftover:
            raise BadInput(f"adapter {self.folder}: {len(leftover)} tensors are not LoRA pairs in peft's naming, first {leftover[0]}")
        odd = [path for path, pair in self.pairs.items() if not {"A", "B"} <= set(pair)]
        if odd:
            raise BadInput(f"adapter {self.folder}: {odd[0]} has only one of its two matrices A and B; the file is incomplete")
        if not self.pairs and not self.plain:
            raise BadInput(f"adapter {self.folder} holds no tensors")

    def rank(self, path: str) -> int:
        return self.files.tensors[self.pairs[path]["A"]].shape[0]

    def scaling(self, path: str) -> float:
        """alpha / r of one module, by the patterns of the config."""
        r = _by_pattern(self.config.get("rank_pattern"), path, self.config.get("r", 8))
        alpha = _by_pattern(self.config.get("alpha_pattern"), path, self.config.get("lora_alpha", 8))
        return alpha / (sqrt(r) if self.config.get("use_rslora") else r)

    def fit(self, names: ParameterNames) -> list[str]:
        problems: list[str] = []
        shapes: dict[str, tuple[int, ...]] = {}
        self.lora_of = {}
        for path in self.pairs:
            name = f"{path}.weight"
            if name not in names.shapes:
                # Adapters made with another version may use the names of the files.
                name = names.parameter_of.get(name, name)
            if name not in names.shapes:
                problems.append(f"adapter {self.folder.name}: the model has no module {path}{_similar(path, names)}")
                continue
            if name in names.converted:
                problems.append(f"adapter {self.folder.name}: {path} is assembled from several stored tensors, which cannot be merged into")
                continue
            kind = names.kinds[name]
            if (kind == "embedding") != ("embedding" in self.pairs[path]) or kind == "other":
                problems.append(f"adapter {self.folder.name}: {path} is not the kind of module it was trained on ({kind})")
                continue
            (r, d_in), (d_out, r_b) = self.files.tensors[self.pairs[path]["A"]].shape, self.files.tensors[self.pairs[path]["B"]].shape
            shape = (d_out, d_in) if kind == "linear" else (d_in, d_out)
            expected = _by_pattern(self.config.get("rank_pattern"), path, self.config.get("r", 8))
            if r != r_b or r != expected:
                problems.append(f"adapter {self.folder.name}: {path} has A of rank {r} and B of rank {r_b}, its config says {expected}")
            elif shape != names.shapes[name]:
                problems.append(
                    f"adapter {self.folder.name}: update of {path} is {list(shape)}, the model's weight is {list(names.shapes[name])}"
                )
            elif name in shapes:
                problems.append(f"adapter {self.folder.name}: two updates for {name}")
            else:
                shapes[name], self._kinds[name], self.lora_of[name] = shape, kind, path
        for name, key in self.plain.items():
            target = name if name in names.shapes else names.parameter_of.get(name, name)
            if target not in names.shapes:
                problems.append(f"adapter {self.folder.name}: the model has no parameter {name}")
            elif name in self.saved:
                if self.files.tensors[key].shape != names.shapes[target]:
                    problems.append(
                        f"adapter {self.folder.name}: saved {name} is {list(self.files.tensors[key].shape)}, "
                        f"the model's is {list(names.shapes[target])}"
                    )
                shapes[target], self._name_of[target] = names.shapes[target], name
        self.shapes = shapes
        return problems

    def checks(self) -> list[str]:
        problems = []
        for key in self.files.tensors:
            if not bool(torch.isfinite(self.files.rows(key)).all()):
                problems.append(f"adapter {self.folder}: {key} holds values that are not finite; the training that made it had diverged")
        # peft stores copies of embeddings that it thinks were resized; unchanged copies are no update.
        for name, key in self.plain.items():
            if name not in self.saved and not self._is_base_copy(name, key):
                problems.append(
                    f"adapter {self.folder} carries a changed copy of {name}: tokens were added or the embedding was trained in full"
                )
        return problems

    def _is_base_copy(self, name: str, key: str) -> bool:
        base = self._base_checkpoint()
        if name not in base.names.file_of or base.parameter(name).shape != self.files.tensors[key].shape:
            return False
        stored, copy = base.parameter_rows(name), self.files.rows(key)
        return bool(torch.equal(stored.to(copy.dtype), copy))

    def _base_checkpoint(self) -> Checkpoint:
        if self._base is None:
            self._base = Checkpoint(self.source.path)
        return self._base

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._name_of:
            base = self._base_checkpoint().parameter_rows(name, start, stop).float()
            return self.files.rows(self.plain[self._name_of[name]], start, stop).float() - base
        path = self.lora_of[name]
        last = self._last  # several threads may ask at once: what one looks at is never another's
        if last is None or last[0] != name:
            pair = self.pairs[path]
            last = self._last = (name, self.files.rows(pair["A"]).float(), self.files.rows(pair["B"]).float())
        _, a, b = last  # [r, in], [out, r]
        product = b[start:stop] @ a if self._kinds[name] == "linear" else a.T[start:stop] @ b.T
        return product.mul_(self.scaling(path))

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] of a module's weight, float32, the scaling in B (of an embedding: in = vocabulary)."""
        path = self.lora_of[name]
        return self.files.rows(self.pairs[path]["A"]).float(), self.files.rows(self.pairs[path]["B"]).float() * self.scaling(path)

    def same(self, a: str, b: str) -> bool:
        if not (a in self.lora_of and b in self.lora_of and self.config.get("ensure_weight_tying")):
            return super().same(a, b)
        one, two = self.pairs[self.lora_of[a]], self.pairs[self.lora_of[b]]
        # peft ties them by transposition: an embedding's A [r, vocab] is the head's B [vocab, r].
        return torch.equal(self.files.rows(one["A"]).float(), self.files.rows(two["B"]).float().T) and torch.equal(
            self.files.rows(one["B"]).float(), self.files.rows(two["A"]).float().T
        )

    def describe(self) -> dict[str, Any]:
        return {"adapter": adapter_fingerprint(self.folder), "saved": sorted(self.saved)}

    def close(self) -> None:
        self.files.close()
        if self._base is not None:
            self._base.close()


class Difference(Delta):
    """A tuned model minus the model it was tuned from.

    `include` limits it: None for everything, "projections" for the seven projection matrices of each layer (Shadow-FT's full
    variant, arXiv 2505.12716), or glob patterns of parameter names.
    """

    def __init__(
        self,
        tuned: str | Path | ModelSource,
        base: str | Path | ModelSource,
        include: str | Sequence[str] | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        sources = resolve(tuned), resolve(base)
        self.vocabulary = vocabulary
        for source in sources:
            if source.adapter is not None:
                raise BadInput(f"{source.spec} is an adapter: add it as an adapter, or merge it first")
        self.tuned, self.base = (Checkpoint(source.path) for source in sources)
        self.sources: tuple[ModelSource, ModelSource] = sources
        self.include = include
        for source, checkpoint in zip(sources, (self.tuned, self.base), strict=True):
            if checkpoint.quantization:
                raise BadInput(f"{source.spec} is quantised ({checkpoint.quantization}): its difference to another model is not defined")
        places = _places(self.tuned), _places(self.base)
        problems = [f"{sources[1 - k].spec} lacks {name}" for k in (0, 1) for name in places[k] if name not in places[1 - k]]
        chosen = [name for name in places[0] if name in places[1] and _included(name, include)]
        shapes = [{name: self._shape(name, c, p) for name in chosen} for c, p in zip((self.tuned, self.base), places, strict=True)]
        problems += [
            f"{name} is {list(shapes[0][name])} and {list(shapes[1][name])}" for name in chosen if shapes[0][name] != shapes[1][name]
        ]
        if problems:
            sizes = [c.config.get("vocab_size") for c in (self.tuned, self.base)]
            if sizes[0] != sizes[1]:
                problems[7:] = [f"vocabularies of {sizes[0]} and {sizes[1]} tokens; a plan can say `tokenizer: base` or `tokenizer: union`"]
            raise BadInput([f"{sources[0].spec} minus {sources[1].spec}: {problem}" for problem in problems[:8]])
        if not chosen:
            raise BadInput(f"include {include!r} matches no parameter of {sources[0].spec}, such as {next(iter(places[0]), 'none')}")
        self.places = places
        self.shapes = {name: shapes[0][name] for name in chosen if self.tuned.tensors[places[0][name]].dtype in FLOATS}

    def _shape(self, name: str, checkpoint: Checkpoint, places: Mapping[str, str]) -> tuple[int, ...]:
        shape = checkpoint.tensors[places[name]].shape
        return shape if self.vocabulary is None else self.vocabulary.shape(name, shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self.vocabulary is not None and name in self.vocabulary.parameters:
            tuned, base = (self.vocabulary.rows(source, name, start, stop) for source in self.sources)
            return tuned - base
        tuned = self.tuned.rows(self.places[0][name], start, stop).float()
        return tuned.sub_(self.base.float_rows(self.places[1][name], start, stop).float())

    def same(self, a: str, b: str) -> bool:
        if a not in self.shapes or b not in self.shapes:
            return super().same(a, b)
        return self.places[0][a] == self.places[0][b] and self.places[1][a] == self.places[1][b]

    def describe(self) -> dict[str, Any]:
        found = {"model": fingerprint(self.sources[0]), "minus": fingerprint(self.sources[1]), "include": self.include}
        return found if self.vocabulary is None else found | self.vocabulary.describe()

    def close(self) -> None:
        self.tuned.close()
        self.base.close()


class StoredDelta(Delta):
    """An update that a plan with `write: delta` has left in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = artefacts.finished(self.folder)
        files = sorted(self.folder.glob(DELTA_FILES))
        if manifest is None or not files:
            raise BadInput(f"{folder} is not a finished delta folder: `guidetune merge` writes one from a plan with `write: delta`")
        self.key: str = manifest["fingerprint"]
        self.base: str = manifest["result"]["base"]
        self.base_fingerprint: str = manifest["result"]["base_fingerprint"]
        self.files = TensorFiles({name: info for file in files for name, info in read_header(file).items()})
        if len(self.files.tensors) != manifest["result"]["tensors"]:
            raise BadInput(f"{folder} is incomplete: it holds {len(self.files.tensors)} of {manifest['result']['tensors']} tensors")
        self.shapes = {name: info.shape for name, info in self.files.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.files.rows(name, start, stop).float()

    def describe(self) -> dict[str, Any]:
        return {"stored": self.key}

    def close(self) -> None:
        self.files.close()


class TensorDelta(Delta):
    """Updates held in memory, by parameter name."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor[start:stop] if tensor.dim() else tensor

    def checks(self) -> list[str]:
        return [f"the update of {name} is not finite" for name, tensor in self.tensors.items() if not bool(torch.isfinite(tensor).all())]

    def describe(self) -> dict[str, Any]:
        import hashlib

        return {
            name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:32] for name, tensor in sorted(self.tensors.items())
        }


def refusals(config: Mapping[str, Any], converted: bool = False, saved_modules: bool = False) -> list[str]:
    """Why an adapter with this `adapter_config.json` is not simply B A on top of an unchanged base; empty when it is."""
    problems = []
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        return [f"it is a {kind or 'nameless'} adapter, and only LoRA is a plain sum"]
    init = config.get("init_lora_weights", True)
    if not converted and (init.lower() if isinstance(init, str) else init) not in PLAIN_INITS:
        problems.append(
            f"its initialisation {init!r} changes the base weights, so B A alone is not the update; save it with "
            "path_initial_model_for_weight_conversion in peft, which makes a plain LoRA of it"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"it trained biases (bias={config['bias']!r}), which are not part of B A")
    if config.get("modules_to_save") and not saved_modules:
        problems.append(
            f"it holds fully trained modules {config['modules_to_save']} (modules_to_save); allow them explicitly to add their difference"
        )
    for key, value in config.items():
        if key not in KNOWN_FIELDS and value and value != {}:
            problems.append(WHY_NOT.get(key, f"its option {key}={value!r} changes what the adapter computes in a way not known here"))
    return problems


def _by_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """peft's rule: the first key that matches the end of the module's path, at a dot, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _is_saved(name: str, modules: Sequence[str] | None) -> bool:
    path = name.rsplit(".", 1)[0]
    return any(path == module or path.endswith("." + module) or f".{module}." in f".{path}." for module in modules or ())


def _similar(path: str, names: ParameterNames) -> str:
    import difflib

    modules = [name.removesuffix(".weight") for name, kind in names.kinds.items() if kind != "other"]
    near = difflib.get_close_matches(path, modules, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""


def _places(checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter -> stored tensor; tensors that transformers assembles parameters from stand for themselves."""
    return {**checkpoint.names.file_of, **{file: file for file in _converted(checkpoint.names)}}


def _converted(names: ParameterNames) -> list[str]:
    return [file for files in names.converted.values() for file in files]


def _included(name: str, include: str | Sequence[str] | None) -> bool:
    if include is None or include == "all":
        return True
    if include == "projections":
        return re.search(PROJECTIONS, name) is not None
    patterns = [include] if isinstance(include, str) else include
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def fingerprint_of(delta: Delta) -> str:
    return artefacts.fingerprint(delta.describe())

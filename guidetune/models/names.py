"""Names of parameters: those in the files against those in the model that transformers builds from the config.

The two differ for some architectures (prefixes, renamed modules). Adapters speak the model's names, shards the files'.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guidetune.errors import BadInput

if TYPE_CHECKING:
    from guidetune.models.checkpoint import Checkpoint

_building = threading.Lock()  # the meta device is set per thread, but transformers' lazy imports are not safe in parallel


@dataclass(frozen=True)
class ParameterNames:
    """`file_of`: parameter -> stored tensor, for parameters stored as they are; a tied one points to its partner if that is the stored one.

    `kinds`: "linear", "conv1d" (weight stored [in, out]), "embedding" or "other", by parameter.
    `tied`: parameter -> the stored parameter it shares its tensor with.
    `converted`: parameters that transformers makes from several stored tensors or by reshaping them.
    """

    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, str]
    file_of: dict[str, str]
    parameter_of: dict[str, str]
    tied: dict[str, str]
    converted: dict[str, list[str]]
    missing: list[str]
    unexpected: list[str]


def read_model_config(folder: Any) -> Any:
    """The transformers config of a model folder. Raises BadInput for architectures the installed transformers does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{folder}: its config.json cannot be used ({_first_line(error)}); models that need their own code, or a newer transformers "
            "than the installed one, are not supported"
        ) from None
    except Exception as error:
        # transformers validates config fields with classes of its own, e.g. StrictDataclassFieldValidationError
        raise BadInput(f"{folder}: its config.json is not valid: {_first_line(error)}") from None


def empty_model(folder: Any) -> Any:
    """The causal language model of a folder with parameters that have shapes but no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_model_config(folder)
    try:
        with _building, torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        reason = _first_line(error)
        raise BadInput(f"{folder}: {config.model_type} is not a causal language model that transformers can build ({reason})") from None


def parameter_names(checkpoint: Checkpoint) -> ParameterNames:
    """Match the stored tensors with the model's parameters, by the rules `from_pretrained` uses."""
    model = empty_model(checkpoint.folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    stored, converted, unexpected = _match(model, list(checkpoint.tensors))
    tied: dict[str, str] = {}
    file_of = {name: file for name, file in stored.items() if name in shapes}
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in file_of and source in file_of:
            # transformers ties two stored tensors only when they are equal.
            if _equal(checkpoint, file_of[target], file_of[source]):
                tied[target] = source
        elif source in file_of:
            tied[target], file_of[target] = source, file_of[source]
        elif target in file_of:
            tied[source], file_of[source] = target, file_of[target]
    missing = [name for name in shapes if name not in file_of and name not in converted]
    parameter_of = {file: name for name, file in stored.items()}
    return ParameterNames(shapes, _kinds(model), file_of, parameter_of, tied, converted, missing, unexpected)


def _match(model: Any, files: list[str]) -> tuple[dict[str, str], dict[str, list[str]], list[str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state: Mapping[str, Any] = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    stored: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    unexpected: list[str] = []
    for file_name in files:
        name, converter = rename_source_key(file_name, renamings, converters, prefix, state)
        if name not in state and file_name in state:
            name, converter = rename_source_key(file_name, [], [], prefix, state)
        if name not in state:
            unexpected.append(file_name)
        elif converter is not None:
            converted.setdefault(name, []).append(file_name)
        else:
            stored[name] = file_name
    return stored, converted, unexpected


def _kinds(model: Any) -> dict[str, str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = "embedding" if isinstance(module, nn.Embedding) else "linear" if isinstance(module, nn.Linear) else "other"
        kind = "conv1d" if isinstance(module, Conv1D) else kind
        for name, _ in module.named_parameters(recurse=False):
            kinds[f"{path}.{name}" if path else name] = kind if name == "weight" else "other"
    return kinds


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    first, second = checkpoint.tensors[a], checkpoint.tensors[b]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(x == y for x, y in zip(checkpoint.raw(a), checkpoint.raw(b), strict=True))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__

"""May this base and this instruct model be used together? The reasons against, the things to know, and the distance between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune.errors import BadInput
from guidetune.models.checkpoint import FLOATS, Checkpoint
from guidetune.models.names import read_model_config
from guidetune.models.sources import ModelSource, resolve
from guidetune.progress import progress

if TYPE_CHECKING:
    from rich.console import RenderableType

# Two models that differ in one of these do not compute the same function of their weights.
SHAPE_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "hidden_activation", "vocab_size", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor",
    "attention_bias", "mlp_bias", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "num_experts", "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
NOTED_KEYS = ("max_position_embeddings", "sliding_window", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
PIECE_VALUES = 1 << 20
EXAMPLES = 4


@dataclass(frozen=True)
class PairReport:
    """`problems` are reasons to refuse the pair, `warnings` are things to know, `facts` is what was found (JSON-ready)."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return not self.problems


def check_pair(base: str | Path | ModelSource, instruct: str | Path | ModelSource, distance: bool = True) -> PairReport:
    """Compare two models from their files, a piece at a time.

    With `distance`, `facts["distance"]` gives for every group of tensors and overall the relative gap
    sigma = sum|W_I - W_B| / (sum|W_I| + sum|W_B|) (Shadow-FT, arXiv 2505.12716) and relative_l2 = ||W_I - W_B|| / ||W_B||.

    Raises:
        BadInput: a model cannot be found or read at all.
    """
    sources = {"base": resolve(base), "instruct": resolve(instruct)}
    problems: list[str] = []
    warnings: list[str] = []
    for role, source in sources.items():
        if source.adapter is not None:
            raise BadInput(f"{role} {source.spec} is an adapter; a pair is made of two full models (merge it first)")
    with Checkpoint(sources["base"].path) as b, Checkpoint(sources["instruct"].path) as i:
        facts: dict[str, Any] = {
            role: {
                "spec": sources[role].spec,
                "architecture": (checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")])[0],
                "parameters": sum(info.numel for info in checkpoint.tensors.values()),
                "bytes": checkpoint.nbytes,
                "dtype": checkpoint.dtype,
                "tied_embeddings": bool(checkpoint.names.tied),
            }
            for role, checkpoint in (("base", b), ("instruct", i))
        }
        for role, checkpoint in (("base", b), ("instruct", i)):
            if checkpoint.quantization:
                problems.append(
                    f"{role} {sources[role].spec} is quantised ({checkpoint.quantization}), so nothing can be added to its weights; "
                    "use the 16-bit original"
                )
            if checkpoint.names.missing:
                problems.append(f"{role} {sources[role].spec}: its files lack {_some(checkpoint.names.missing)}")
        _compare_configs(sources, problems, warnings, facts)
        _compare_tensors(b, i, problems, facts)
        if facts["base"]["tied_embeddings"] != facts["instruct"]["tied_embeddings"]:
            tied, untied = ("base", "instruct") if facts["base"]["tied_embeddings"] else ("instruct", "base")
            problems.append(f"the {tied} model ties its embeddings and its output head, the {untied} model does not")
        _compare_tokenizers(sources, b, problems, warnings, facts)
        if distance and not facts["tensors"]["shapes_differ"]:
            facts["distance"] = _distance(b, i)
            sigma = facts["distance"]["overall"]["sigma"]
            if sigma == 0:
                warnings.append("the two models have the same weights: there is no instruction tuning to keep")
            elif sigma > 0.1:
                warnings.append(
                    f"the two models are far apart (sigma {sigma:.3f}; siblings are usually below 0.02): a delta may not carry over"
                )
    return PairReport(problems, warnings, facts)


def group_of(parameter: str) -> str:
    """The group a parameter is reported under: embeddings, attention, mlp, norms, head or other."""
    if "embed" in parameter or ".wte." in parameter or ".wpe." in parameter:
        return "embeddings"
    if "lm_head" in parameter or "embed_out" in parameter:
        return "head"
    if "norm" in parameter or ".ln_" in parameter:
        return "norms"
    if "attn" in parameter or "attention" in parameter:
        return "attention"
    return "mlp" if "mlp" in parameter or "expert" in parameter or "feed_forward" in parameter else "other"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more


def _compare_configs(sources: dict[str, ModelSource], problems: list[str], warnings: list[str], facts: dict[str, Any]) -> None:
    configs = {role: read_model_config(source.path).to_dict() for role, source in sources.items()}
    differences: list[dict[str, Any]] = []

    def compare(a: dict[str, Any], b: dict[str, Any], prefix: str) -> None:
        for key in (*SHAPE_KEYS, *NOTED_KEYS):
            if key not in a and key not in b:
                continue
            x, y = a.get(key), b.get(key)
            if x == y:
                continue
            differences.append({"key": prefix + key, "base": x, "instruct": y, "matters": key in SHAPE_KEYS})
            if key in SHAPE_KEYS:
                problems.append(f"config {prefix}{key} differs: base {x}, instruct {y}")
            elif not key.endswith("token_id"):
                warnings.append(f"config {prefix}{key} differs: base {x}, instruct {y}")
        if isinstance(a.get("text_config"), dict) and isinstance(b.get("text_config"), dict):
            compare(a["text_config"], b["text_config"], prefix + "text_config.")

    compare(configs["base"], configs["instruct"], "")
    facts["config"] = {"differences": differences, "vocab_size": {role: config.get("vocab_size") for role, config in configs.items()}}


def _compare_tensors(b: Checkpoint, i: Checkpoint, problems: list[str], facts: dict[str, Any]) -> None:
    """By the names parameters have in the model: the files may use different ones."""
    stored_b, stored_i = b.names.shapes, i.names.shapes
    only_base, only_instruct = sorted(set(stored_b) - set(stored_i)), sorted(set(stored_i) - set(stored_b))
    differ = [
        f"{name} {list(stored_b[name])} / {list(stored_i[name])}"
        for name in stored_b
        if name in stored_i and stored_b[name] != stored_i[name]
    ]
    # A stored shape can disagree with its own config, too.
    for role, checkpoint in (("base", b), ("instruct", i)):
        wrong = [name for name, file in checkpoint.names.file_of.items() if checkpoint.tensors[file].shape != checkpoint.names.shapes[name]]
        if wrong:
            problems.append(f"{role}: stored shapes disagree with its config: {_some(wrong)}")
            differ.extend(wrong)
    if only_base:
        problems.append(f"parameters that only the base has: {_some(only_base)}")
    if only_instruct:
        problems.append(f"parameters that only the instruct model has: {_some(only_instruct)}")
    if differ:
        problems.append(f"shapes differ (base / instruct): {_some(differ)}")
    facts["tensors"] = {
        "base": len(b.tensors),
        "instruct": len(i.tensors),
        "shapes_differ": len(differ) + len(only_base) + len(only_instruct),
    }


def _compare_tokenizers(
    sources: dict[str, ModelSource], b: Checkpoint, problems: list[str], warnings: list[str], facts: dict[str, Any]
) -> None:
    from guidetune.models.fingerprints import tokenizer_digest
    from guidetune.models.loading import TOKENIZER_FILES, load_tokenizer

    have = {role: any((source.path / name).is_file() for name in TOKENIZER_FILES) for role, source in sources.items()}
    found: dict[str, Any] = {}
    facts["tokenizer"] = found
    for role, present in have.items():
        if not present:
            warnings.append(f"{role} {sources[role].spec} has no tokenizer in its folder: token ids could not be compared")
    tokenizers = {role: load_tokenizer(source) for role, source in sources.items() if have[role]}
    templates = {role: tokenizer.chat_template for role, tokenizer in tokenizers.items()}
    found["chat_template"] = {role: bool(template) for role, template in templates.items()}
    found["special"] = {
        role: {
            name: {"token": str(token), "id": t.convert_tokens_to_ids(str(token))}
            for name, token in sorted(t.special_tokens_map.items())
            if isinstance(token, str)
        }
        for role, t in tokenizers.items()
    }
    found["digest"] = {role: tokenizer_digest(tokenizer) for role, tokenizer in tokenizers.items()}
    if "instruct" in tokenizers and not templates["instruct"]:
        warnings.append(
            f"instruct {sources['instruct'].spec} has no chat template: give one in the recipe, or choose an instruction-tuned model"
        )
    if len(tokenizers) < 2:
        return
    vocab = {role: tokenizer.get_vocab() for role, tokenizer in tokenizers.items()}
    moved = sorted(token for token, number in vocab["base"].items() if vocab["instruct"].get(token, number) != number)
    token_of = {role: {number: token for token, number in v.items()} for role, v in vocab.items()}
    renamed = sorted(
        n for n, token in token_of["base"].items() if n in token_of["instruct"] and token_of["instruct"][n] != token and token not in moved
    )
    lost = sorted(set(vocab["base"]) - set(vocab["instruct"]))
    added = sorted(set(vocab["instruct"]) - set(vocab["base"]))
    found |= {"size": {role: len(v) for role, v in vocab.items()}, "moved": len(moved), "renamed": len(renamed)}
    found |= {"only_base": lost[:50], "only_instruct": added[:50], "same_ids": not moved and not lost and not added}
    if moved:
        shown = [f"{token!r} {vocab['base'][token]} / {vocab['instruct'][token]}" for token in moved]
        problems.append(f"{len(moved)} tokens have different ids (base / instruct): {_some(shown)}")
    if len(renamed) > 0.01 * len(vocab["base"]):
        shown = [f"{n}: {token_of['base'][n]!r} / {token_of['instruct'][n]!r}" for n in renamed]
        problems.append(f"{len(renamed)} ids stand for different tokens (base / instruct): {_some(shown)}")
    elif renamed:
        shown = [f"{n}: {token_of['base'][n]!r} / {token_of['instruct'][n]!r}" for n in renamed]
        warnings.append(f"{len(renamed)} ids were given to other tokens in the instruct model: {_some(shown)}")
    new = [token for token in added if vocab["instruct"][token] not in token_of["base"]]
    if new:
        warnings.append(f"the instruct tokenizer has {len(new)} tokens that the base one lacks: {_some([repr(token) for token in new])}")
    if templates["instruct"]:
        _template_tokens(tokenizers["instruct"], vocab["base"], b, warnings, found)


def _template_tokens(tokenizer: Any, base_vocab: dict[str, int], b: Checkpoint, warnings: list[str], found: dict[str, Any]) -> None:
    """Does the base know the special tokens the chat template writes, and has it ever trained their embedding rows?"""
    template = tokenizer.chat_template
    text = " ".join(template.values()) if isinstance(template, dict) else str(template)
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    for name in ("bos_token", "eos_token"):
        if name in text and getattr(tokenizer, name):
            text += str(getattr(tokenizer, name))
    written = _rendered_ids(tokenizer)  # markers can also be put together from the role's name
    used = {token: number for token, number in special.items() if token in text or number in written}
    unknown = sorted(token for token, number in used.items() if base_vocab.get(token) != number)
    found["template_tokens"] = {token: {"id": number, "known_to_base": token not in unknown} for token, number in sorted(used.items())}
    if unknown:
        warnings.append(f"the base tokenizer does not know these tokens of the chat template: {_some([repr(token) for token in unknown])}")
    embedding = next((name for name, kind in b.names.kinds.items() if kind == "embedding" and name in b.names.file_of), None)
    if embedding is None or b.parameter(embedding).dtype not in FLOATS:
        return
    info = b.parameter(embedding)
    typical = float(b.parameter_rows(embedding, 0, min(info.rows, 1024)).float().norm(dim=1).median())
    untrained = []
    for token, number in used.items():
        if token in unknown or number >= info.rows:
            continue
        ratio = float(b.parameter_rows(embedding, number, number + 1).float().norm()) / max(typical, 1e-30)
        found["template_tokens"][token]["embedding_norm_ratio"] = round(ratio, 4)
        if ratio < 0.1:
            untrained.append(token)
    if untrained:
        warnings.append(
            "the base model seems never to have trained these tokens of the chat template (tiny embedding rows): "
            + _some([repr(token) for token in untrained])
        )


def _rendered_ids(tokenizer: Any) -> set[int]:
    """Token ids of a short conversation; empty when the template does not take one."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return {int(i) for i in tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]}
    except Exception:  # templates raise whatever they like
        return set()


def _distance(b: Checkpoint, i: Checkpoint) -> dict[str, Any]:
    names = [
        name for name, file in i.names.file_of.items()
        if name not in i.names.tied and name in b.names.file_of and b.parameter(name).dtype in FLOATS and i.tensors[file].dtype in FLOATS
    ]  # fmt: skip
    sums: dict[str, list[float]] = {}
    total = sum(i.parameter(name).nbytes for name in names)
    with progress("distance", total=total / 1e6, unit="MB") as bar:
        for name in names:
            info = i.parameter(name)
            step = max(1, PIECE_VALUES // max(1, info.numel // max(1, info.rows)))
            values = [0.0] * 5
            for start in range(0, info.rows, step):
                x = b.parameter_rows(name, start, start + step).float()
                y = i.parameter_rows(name, start, start + step).float()
                d = y - x
                for k, value in enumerate((d.abs().sum(), x.abs().sum(), y.abs().sum(), d.square().sum(), x.square().sum())):
                    values[k] += float(value)
                bar.advance(y.numel() * info.nbytes / max(1, info.numel) / 1e6)
            for key in ("overall", group_of(name)):
                old = sums.setdefault(key, [0.0] * 5)
                sums[key] = [a + v for a, v in zip(old, values, strict=True)]
    out: dict[str, Any] = {"overall": {"sigma": 0.0, "relative_l2": 0.0}, "groups": {}}
    for key, (d1, x1, y1, d2, x2) in sums.items():
        entry = {"sigma": d1 / (x1 + y1) if x1 + y1 else 0.0, "relative_l2": sqrt(d2 / x2) if x2 else 0.0}
        if key == "overall":
            out["overall"] = entry
        else:
            out["groups"][key] = entry
    return out


def render_doctor(report: PairReport) -> RenderableType:
    """The report for a terminal: what was compared, the distances, what to know, and the verdict."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    facts = report.facts
    table = Table("", "base", "instruct", box=None, pad_edge=False, header_style="bold")

    def row(label: str, value: Any) -> None:
        table.add_row(label, escape(str(value("base"))), escape(str(value("instruct"))))

    row("model", lambda r: facts[r]["spec"])
    row("architecture", lambda r: facts[r]["architecture"])
    row("parameters", lambda r: f"{facts[r]['parameters']:,}")
    row("stored as", lambda r: f"{facts[r]['dtype']}, {facts[r]['bytes'] / 1e9:.2f} GB")
    row("tied embeddings", lambda r: "yes" if facts[r]["tied_embeddings"] else "no")
    tokenizer = facts.get("tokenizer", {})
    if "size" in tokenizer:
        row("tokens", lambda r: f"{tokenizer['size'][r]:,}")
    row("chat template", lambda r: {True: "yes", False: "no"}.get(tokenizer.get("chat_template", {}).get(r), "no tokenizer"))
    special = tokenizer.get("special", {})
    for name in sorted({name for entries in special.values() for name in entries}):
        row(name, lambda r, name=name: "{token} ({id})".format(**special[r][name]) if name in special.get(r, {}) else "-")
    for difference in facts["config"]["differences"]:
        table.add_row(
            difference["key"],
            escape(str(difference["base"])),
            escape(str(difference["instruct"])),
            style="red" if difference["matters"] else "yellow",
        )
    parts: list[Any] = [table, Text()]
    if "distance" in facts:
        distances = Table("distance", "sigma", "relative L2", box=None, pad_edge=False, header_style="bold")
        for name, entry in [("overall", facts["distance"]["overall"]), *sorted(facts["distance"]["groups"].items())]:
            distances.add_row(name, f"{entry['sigma']:.5f}", f"{entry['relative_l2']:.5f}")
        parts += [distances, Text()]
    if tokenizer.get("template_tokens"):
        tokens = Table(
            "token of the chat template", "id", "known to base", "embedding norm / median", box=None, pad_edge=False, header_style="bold"
        )
        for token, entry in tokenizer["template_tokens"].items():
            ratio = entry.get("embedding_norm_ratio")
            tokens.add_row(
                escape(token), str(entry["id"]), "yes" if entry["known_to_base"] else "no", "-" if ratio is None else f"{ratio:.2f}"
            )
        parts += [tokens, Text()]
    parts += [Text(f"warning: {text}", style="yellow") for text in report.warnings]
    parts += [Text(f"problem: {text}", style="red") for text in report.problems]
    verdict = (
        "This pair fits." if report.fits else f"This pair does not fit: {len(report.problems)} problem{'s' * (len(report.problems) > 1)}."
    )
    parts.append(Text(verdict, style="bold green" if report.fits else "bold red"))
    return Group(*parts)

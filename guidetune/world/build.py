"""`guidetune world build`: a shipped pair, made again from the seed in resumable stages.

    tokenizer -> copying -> corpus rows -> pre-training -> instruct rows -> instruct tuning -> skill table

A pair that goes on from another one's base model has a copy of that model in the place of the first two.

Every stage is an artefact folder; started again, a killed build goes on from its last checkpoint. Both
training stages run through `guidetune.engine.fit` with full fine-tuning.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from guidetune.artefacts import StageResult, derive_seed, stage, write_json
from guidetune.progress import progress, say
from guidetune.world import tokenizer as tokenizers
from guidetune.world.corpus import Document, flat, is_chat, refrain
from guidetune.world.export import WEIGHTS
from guidetune.world.export import path as shipped
from guidetune.world.pairs import Pair, pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VERSION = 1
"""Part of every stage's key; raised when generators or recipe change."""

MAX_SHARD = "5MB"


class BuildSettings(BaseModel):
    """The recipe of the pair; the defaults made the shipped one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="Seed of corpus, initialisation and data order.")
    vocabulary: int = Field(tokenizers.VOCABULARY, ge=300, description="Entries of the tokenizer.")
    tokenizer_documents: int = Field(20_000, ge=1, description="Documents the tokenizer learns from.")
    hidden: int = Field(192, description="Width of the model.")
    layers: int = Field(4, description="Number of layers.")
    heads: int = Field(6, description="Attention heads.")
    intermediate: int = Field(512, description="Width of the feed-forward layers.")
    initializer_range: float = Field(0.02, description="Standard deviation of the initial weights.")
    copy_tokens: int = Field(64, ge=8, description="Tokens of a row of the copying stage.")
    copy_rows: int = Field(12_800, ge=1, description="Rows of the copying stage.")
    copy_batch: int = Field(16, ge=1, description="Rows of an optimiser batch.")
    copy_lr: float = Field(1e-3, gt=0, description="Peak learning rate of the copying stage.")
    row_tokens: int = Field(128, ge=8, description="Tokens of a packed pre-training row.")
    noise_weight: float = Field(0.1, ge=0, le=1, description="Loss weight of what cannot be predicted: user turns, random words, operands.")
    pretrain_rows: int = Field(32_000, ge=1, description="Packed rows of pre-training.")
    pretrain_epochs: float = Field(2, gt=0, description="Passes over them.")
    pretrain_batch: int = Field(16, ge=1, description="Rows of an optimiser batch.")
    pretrain_lr: float = Field(2e-3, gt=0, description="Peak learning rate of pre-training.")
    instruct_rows: int = Field(40_000, ge=1, description="Conversations of the instruct stage.")
    instruct_batch: int = Field(32, ge=1, description="Conversations of an optimiser batch.")
    instruct_lr: float = Field(4e-4, gt=0, description="Peak learning rate of the instruct stage.")
    test_items: int = Field(100, ge=1, description="Test items per general skill in the skill table.")
    target_items: int = Field(300, ge=1, description="Test items per target task in the skill table.")
    longest_answer: int = Field(110, ge=1, description="Tokens after which an answer of the skill table is cut.")
    stored: Literal["float32", "bfloat16"] = Field("float32", description="Data type of the weight files.")


def build(out: str | Path | None = None, settings: BuildSettings | None = None, name: str = "general") -> dict[str, Any]:
    """Make the pair of that name in `out/base` and `out/instruct` (its models' names), with a report; returns the report.

    Without `out` the package's own weights are replaced. A stage that is already there is reused; the stage folders stay in
    `out/stages` (without `out`: in `world-stages` of the current folder).

    Raises:
        BadInput: there is no pair of that name.
    """
    made = pair(name)
    settings = settings or made.settings()
    stages = Path("world-stages") if out is None else Path(out) / "stages"
    if made.start is not None:
        stages = stages / made.name
    out = WEIGHTS if out is None else Path(out)

    def run(name: str, fields: tuple[str, ...], before: list[StageResult], make: Any) -> StageResult:
        key = {
            "stage": name,
            "version": VERSION,
            "settings": {field: getattr(settings, field) for field in ("seed", *fields)},
            "from": [result.manifest["fingerprint"] for result in before],
        }
        result = stage(stages / name, key, make)
        facts = "" if name == "table" else ", ".join(f"{k} {v}" for k, v in result.result.items())
        say(f"{name}: {'found, made' if result.reused else 'made'} in {result.seconds:.0f} s; {facts}".rstrip("; "))
        return result

    begun = _from_nothing(settings, made, run) if made.start is None else _from_start(made.start, run)
    words = begun[0]  # has the tokenizer; the last one of `begun` has the model that pre-training goes on from
    corpus = run("corpus", ("row_tokens", "noise_weight", "pretrain_rows"), [words], lambda work: _corpus(work, settings, made, words.path))
    base = run(
        "base",
        ("pretrain_epochs", "pretrain_batch", "pretrain_lr", "stored"),
        [begun[-1], corpus],
        lambda work: _pretrain(work, settings, begun[-1].path, corpus.path),
    )
    lessons = run("lessons", ("instruct_rows",), [words], lambda work: _lessons(work, settings, made, words.path))
    instruct = run(
        "instruct",
        ("instruct_batch", "instruct_lr", "stored"),
        [base, lessons],
        lambda work: _instruct(work, settings, base.path, lessons.path),
    )
    table = run(
        "table",
        ("test_items", "target_items", "longest_answer"),
        [base, instruct],
        lambda work: _table(settings, made, {made.base: base.path, made.instruct: instruct.path}),
    )
    for model, result in ((made.base, base), (made.instruct, instruct)):
        _publish_model(result.path, out / model)
    report = {
        "version": VERSION,
        "settings": settings.model_dump(),
        "parameters": base.result["parameters"],
        "corpus_tokens": base.result["tokens"],
        "instruct_tokens": instruct.result["tokens"],
        "relative_distance": instruct.result["relative_distance"],
        "seconds": {result.path.name: result.seconds for result in (*begun, corpus, base, lessons, instruct, table)},
        "skills": table.result,
    }
    write_json(out / made.report, report)
    return report


Run = Callable[[str, tuple[str, ...], list[StageResult], Callable[[Path], dict[str, Any]]], StageResult]


def _from_nothing(settings: BuildSettings, made: Pair, run: Run) -> list[StageResult]:
    """Tokenizer, copying rows, and an untrained model that has learned to copy."""
    model_fields = ("hidden", "layers", "heads", "intermediate", "initializer_range")
    words = run("tokenizer", ("vocabulary", "tokenizer_documents"), [], lambda work: _tokenizer(work, settings, made))
    refrains = run("refrains", ("copy_tokens", "copy_rows"), [words], lambda work: _refrains(work, settings, words.path))
    copying = run(
        "copying",
        (*model_fields, "copy_batch", "copy_lr"),
        [words, refrains],
        lambda work: _copying(work, settings, words.path, refrains.path),
    )
    return [words, refrains, copying]


def _from_start(start: str, run: Run) -> list[StageResult]:
    """A copy of a shipped model, tokenizer included; a stage of its own, so that other bytes there make what follows again."""
    from guidetune.models.fingerprints import fingerprint

    folder = shipped(start)
    return [run(f"start-{fingerprint(str(folder))[:12]}", (), [], lambda work: _copy(folder, work))]


def _copy(folder: Path, work: Path) -> dict[str, Any]:
    shutil.copytree(folder, work, dirs_exist_ok=True)
    return {}


def _tokenizer(work: Path, settings: BuildSettings, made: Pair) -> dict[str, Any]:
    texts = (flat(document) for document in itertools.islice(made.documents(settings.seed), settings.tokenizer_documents))
    tokenizer = tokenizers.train(texts, settings.vocabulary)
    tokenizer.save_pretrained(work)
    return {"entries": len(tokenizer)}


def packed(
    stream: Iterator[Document], settings: BuildSettings, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], list[float]]]:
    """Rows of `row_tokens` ids and their loss weights: documents one after another, each closed by the end-of-document token."""
    from guidetune.data.chat import Chat

    chat = Chat(tokenizer)
    ids: list[int] = []
    weights: list[float] = []
    while True:
        batch = list(itertools.islice(stream, 2000))
        encoded = iter(chat.encode_many([document for document in batch if is_chat(document)]))
        pieces = iter(tokenizer([text for document in batch if not is_chat(document) for text, _ in document]).input_ids)
        for document in batch:
            if is_chat(document):
                one = next(encoded)
                parts = [(one.input_ids, one.target)]
            else:
                parts = [(part, [counts] * len(part)) for (_, counts), part in zip(document, pieces, strict=False)]
            for part, counts in [*parts, ([tokenizer.eos_token_id], [True])]:
                ids += part
                weights += [1.0 if count else settings.noise_weight for count in counts]
        full = len(ids) // settings.row_tokens * settings.row_tokens
        for start in range(0, full, settings.row_tokens):
            end = start + settings.row_tokens
            yield ids[start:end], [0.0, *weights[start + 1 : end]]
        ids, weights = ids[full:], weights[full:]


def _corpus(work: Path, settings: BuildSettings, made: Pair, words: Path) -> dict[str, Any]:
    from guidetune.data.rows import RowWriter

    rows = itertools.islice(packed(made.documents(settings.seed), settings, tokenizers.load(words)), settings.pretrain_rows)
    with RowWriter(work / "rows.arrow") as writer, progress("corpus", settings.pretrain_rows, "rows") as bar:
        for index, (ids, weights) in enumerate(rows):
            writer.write(f"corpus-{index}", "corpus", ids, weights)
            bar.advance()
    return {"rows": settings.pretrain_rows, "tokens": settings.pretrain_rows * settings.row_tokens}


def _refrains(work: Path, settings: BuildSettings, words: Path) -> dict[str, Any]:
    from random import Random

    from guidetune.data.rows import RowWriter

    tokenizer = tokenizers.load(words)
    length = settings.copy_tokens
    with RowWriter(work / "rows.arrow") as writer:
        for index in range(settings.copy_rows):
            said = refrain(Random(derive_seed(settings.seed, "world", "refrain", index)))
            pieces = tokenizer(said).input_ids
            ids = [token for piece in pieces for token in piece][:length]
            new = len(pieces[0]) + 1  # the second saying begins like the first; from there on everything can be copied
            writer.write(f"refrain-{index}", "refrain", ids, [0.0] * new + [1.0] * (len(ids) - new))
    return {"rows": settings.copy_rows}


def _lessons(work: Path, settings: BuildSettings, made: Pair, words: Path) -> dict[str, Any]:
    from guidetune.data.chat import Chat
    from guidetune.data.rows import RowWriter

    chat = Chat(tokenizers.load(words))
    rows = list(itertools.islice(made.conversations(settings.seed), settings.instruct_rows))
    tokens = 0
    with RowWriter(work / "rows.arrow") as writer:
        for index, encoded in enumerate(chat.encode_many(rows)):
            writer.write(f"instruct-{index}", "instruct", encoded.input_ids, [float(t) for t in encoded.target])
            tokens += len(encoded.input_ids)
    return {"rows": len(rows), "tokens": tokens}


def new_model(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model of the recipe's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=512,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "world", "initial weights"))
        model = LlamaForCausalLM(config).float()
    ends = [tokenizer.convert_tokens_to_ids(tokenizers.END), tokenizer.eos_token_id]
    model.generation_config.update(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    return model


def _fit(model: PreTrainedModel, rows_folder: Path, work: Path, label: str, **numbers: Any) -> dict[str, Any]:
    """Full fine-tuning of `model` in place through the engine; checkpoints live in `work/training` until it is done."""
    from guidetune.data.rows import EncodedRows
    from guidetune.engine.loop import fit
    from guidetune.engine.settings import TuneSettings
    from guidetune.params.full import Full

    training = work / "training"
    training.mkdir(exist_ok=True)
    attached = Full().attach(model)
    settings = TuneSettings(dtype="float32", **numbers)
    result = fit(attached, EncodedRows.open(rows_folder), settings, work=training, label=label)
    shutil.move(training / "metrics.jsonl", work / "metrics.jsonl")
    shutil.rmtree(training)
    return {"tokens": result.tokens, "steps": result.steps, "loss_last": round(result.loss_last, 4)}


def _copying(work: Path, settings: BuildSettings, words: Path, refrains: Path) -> dict[str, Any]:
    """The first, short stage: an untrained model learns to attend to what followed earlier, before it meets the corpus."""
    tokenizer = tokenizers.load(words)
    model = new_model(settings, tokenizer)
    facts = _fit(
        model, refrains, work, "copying", lr=settings.copy_lr, batch=settings.copy_batch, schedule="constant", warmup=0.06,
        betas=(0.9, 0.95), seed=settings.seed,
    )  # fmt: skip
    _save(model, tokenizer, work)
    return facts


def _pretrain(work: Path, settings: BuildSettings, copying: Path, corpus: Path) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(copying, dtype="float32")
    facts = _fit(
        model, corpus, work, "pre-train", lr=settings.pretrain_lr, epochs=settings.pretrain_epochs, batch=settings.pretrain_batch,
        schedule="cosine", warmup=0.04, weight_decay=0.05, betas=(0.9, 0.95), seed=settings.seed,
    )  # fmt: skip
    _save(model, tokenizers.load(copying), work, settings.stored)
    return {**facts, "parameters": model.num_parameters()}


def _instruct(work: Path, settings: BuildSettings, base: Path, lessons: Path) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    tokenizer = tokenizers.load(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype="float32")
    facts = _fit(
        model, lessons, work, "instruct", lr=settings.instruct_lr, batch=settings.instruct_batch, schedule="linear", warmup=0.1,
        betas=(0.9, 0.95), seed=settings.seed,
    )  # fmt: skip
    _save(model, tokenizer, work, settings.stored)
    return {**facts, "relative_distance": round(relative_distance(LlamaForCausalLM.from_pretrained(base), model), 4)}


def relative_distance(base: PreTrainedModel, instruct: PreTrainedModel) -> float:
    """Σ|W_I − W_B| / (Σ|W_I| + Σ|W_B|) over all parameters."""
    apart, size = 0.0, 0.0
    for b, i in zip(base.parameters(), instruct.parameters(), strict=True):
        apart += float((i - b).detach().abs().double().sum())
        size += float(i.detach().abs().double().sum() + b.detach().abs().double().sum())
    return apart / size


def _table(settings: BuildSettings, made: Pair, models: dict[str, Path]) -> dict[str, Any]:
    """Every skill of both models. Programs that they write are run in the sandbox of `guidetune.evaluation`."""
    from transformers import LlamaForCausalLM

    from guidetune.world.measure import measure

    sets = {**dict.fromkeys(made.general, settings.test_items), **dict.fromkeys(made.special, settings.target_items)}
    return {
        name: measure(LlamaForCausalLM.from_pretrained(folder), tokenizers.load(folder), sets, longest=settings.longest_answer)
        for name, folder in models.items()
    }


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, stored: str = "float32") -> None:
    import torch

    model.eval().to(getattr(torch, stored))
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(folder)


def _publish_model(folder: Path, out: Path) -> None:
    """Copy a stage's model files, without manifest and metrics, to an ordinary model folder."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("manifest.json", "metrics.jsonl", ".*"))

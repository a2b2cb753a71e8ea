"""Rows for the benchmarks: text with the token lengths of an instruction set, or real rows; one tokenizer per vocabulary size.

What a training step costs depends on the lengths of its rows and on how much of them is supervised, not on what they say. The
generator is fitted to 2,000 rows of Alpaca-52k as a byte-level BPE of 32,000 entries cuts them: median 134 tokens, 95th
percentile 304, 66 % of the tokens supervised.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
MAX_LENGTH = 1024
LEXICON = 9_000
EOS, PAD = "<|endoftext|>", "<|pad|>"

# What the generated rows must look like; `check` holds them to it.
EXPECTED = {"median": 134, "p95": 304, "supervised": 0.66}
TOLERANCE = {"median": 0.08, "p95": 0.10, "supervised": 0.04}


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str


def generate(rows: int, seed: int = 0) -> list[Pair]:
    """Instruction-like pairs of made-up words, by Zipf's law; the same seed gives the same rows.

    Words of the completion ~ Weibull(96, 1.32), of the instruction ~ lognormal(median 13, sigma 0.65).
    """
    rng = random.Random(f"rows {seed}")
    lexicon = _lexicon()
    ranks = np.arange(1, len(lexicon) + 1, dtype=np.float64)
    cumulative = np.cumsum(1.0 / (ranks + 8.0)).tolist()

    def sentence(words: int) -> str:
        chosen = rng.choices(lexicon, cum_weights=cumulative, k=words)
        for k in range(9, words - 1, 13):
            chosen[k] += rng.choice((",", ".", ".\n"))
        return " ".join(chosen) + "."

    return [
        Pair(
            TEMPLATE.format(sentence(3 + int(rng.lognormvariate(2.55, 0.65)))),
            sentence(2 + int(rng.weibullvariate(96.0, 1.32))),
        )
        for _ in range(rows)
    ]


def _lexicon() -> list[str]:
    """Distinct made-up words, the same in every run: short ones first, as in a language."""
    rng = random.Random("lexicon")
    onsets, vowels, codas = "b c d f g h l m n p r s t v st tr pl".split(), "a e i o u ea".split(), ["", "", "n", "r", "s", "t", "ng"]
    seen: dict[str, None] = {}
    while len(seen) < LEXICON:
        syllables = 1 + (len(seen) > 300) + (len(seen) > 4_000)
        seen["".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(syllables))] = None
    return list(seen)


def read(path: Path, rows: int) -> list[Pair]:
    """Real rows of any shape that `guidetune` reads, in the same prompt template; a conversation's first exchange.

    Raises:
        BadInput: the file is missing or not understood.
    """
    from guidetune.data import sources
    from guidetune.data.records import Dropped, Identifiers, normalise

    spec = sources.SourceSpec(path=str(path))
    identifiers, out = Identifiers(), []
    for line, raw in sources.read(spec, Path.cwd()):
        record = raw if isinstance(raw, sources.Broken) else normalise(raw, spec, spec.label, line, identifiers)
        if isinstance(record, (sources.Broken, Dropped)):
            continue
        text = {m["role"]: m["content"] for m in reversed(record.messages)}
        out.append(Pair(TEMPLATE.format(text["user"].strip()), text["assistant"].strip()))
        if len(out) == rows:
            break
    return out


def build_tokenizer(pairs: Sequence[Pair], vocab: int) -> Any:
    """Byte-level BPE of at most `vocab` entries, trained on the rows; the model's own vocabulary may be larger."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for p in pairs for text in (p.prompt, p.completion)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD)


def encode(pairs: Sequence[Pair], tokenizer: Any, folder: Path) -> None:
    """Write encoded rows for `guidetune.data.rows.EncodedRows`: prompt, completion and the end token, the prompt not supervised."""
    from guidetune.data.rows import FILE, RowWriter

    prompts = tokenizer([p.prompt for p in pairs], add_special_tokens=False)["input_ids"]
    completions = tokenizer([p.completion + EOS for p in pairs], add_special_tokens=False)["input_ids"]
    with RowWriter(folder / FILE) as writer:
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if len(prompt) >= MAX_LENGTH:
                continue
            ids = (prompt + completion)[:MAX_LENGTH]
            writer.write(f"row-{number}", "bench", ids, [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt)))


def statistics(lengths: np.ndarray, supervised: np.ndarray) -> dict[str, float]:
    """Rows, tokens, median and 95th percentile of the row length, supervised share of the tokens."""
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "mean": round(float(lengths.mean()), 1),
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "supervised": round(float(supervised.sum() / lengths.sum()), 4),
    }


def faults(found: dict[str, float]) -> list[str]:
    """Where the statistics are not those of `EXPECTED`."""
    return [
        f"{name} is {found[name]}, expected {want} within {TOLERANCE[name]:.0%}"
        for name, want in EXPECTED.items()
        if abs(found[name] / want - 1.0) > TOLERANCE[name]
    ]

"""Tiny real tokenizers and chat templates for the data tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = [
    "What is 2+2? The answer is 4. A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?",
    "user assistant system model tool Human: Assistant: USER: ASSISTANT: ### Instruction: ### Response:\n\n",
    "def f(x):\n    return x + 1\n\n\n#### 18\n<<16-3-4=9>>9 duck eggs a day. naïve café — 東京 😀",
    "   leading and trailing   spaces  \t tabs\n\nnew lines.\n",
] * 4
SPECIALS = {
    "bytes": ["<s>", "</s>", "<pad>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
}
# (bos, eos) of each family
ENDS = {
    "bytes": ("<s>", "</s>"),
    "chatml": (None, "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "gemma": ("<bos>", "<eos>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
# template file -> family of special tokens
FAMILY = {
    "alpaca": "bytes",
    "bos_inside": "bytes",
    "chatml": "chatml",
    "deepseek": "deepseek",
    "gemma": "gemma",
    "generation_markers": "chatml",
    "llama2": "bytes",
    "llama3": "llama3",
    "mistral": "bytes",
    "no_stop": "bytes",
    "olmo": "chatml",
    "phi3": "phi3",
    "qwen": "chatml",
    "strip": "chatml",
    "think": "chatml",
    "vicuna": "bytes",
    "zephyr": "bytes",
}


@cache
def byte_level(family: str = "bytes", post_processor: bool = False, extra: tuple[str, ...] = ()) -> Any:
    """A byte-level BPE as in GPT-2, Llama 3 or Qwen; with `post_processor` it puts a BOS first, as Llama 3 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [*SPECIALS[family], *extra]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos, eos = ENDS[family]
    if post_processor and bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False)


@cache
def sentencepiece_like(family: str = "bytes", scheme: str = "legacy") -> Any:
    """A BPE that puts a space before text, with bytes for what it does not know: as in Llama 2 (legacy) and Mistral (first)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    first = Tokenizer(models.BPE())
    first.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[], show_progress=False)
    words = [word for text in CORPUS for word in text.replace("\n", " ").replace("\t", " ").split(" ")]
    first.train_from_iterator(words, trainer)
    import json

    learnt = json.loads(first.to_str())["model"]
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    for token in learnt["vocab"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    # Phi-3's control tokens swallow the white space after them.
    swallow = family == "phi3"
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=swallow and t.startswith("<|")) for t in SPECIALS[family]]
    )
    bos, eos = ENDS[family]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def template_source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def chat_of(name: str, kind: str = "byte_level") -> Any:
    """A Chat of one of the templates here, on a tokenizer that has the special tokens it writes."""
    from guidetune.data.chat import Chat

    family = FAMILY[name]
    tokenizer = {
        "byte_level": lambda: byte_level(family, True),
        "legacy": lambda: sentencepiece_like(family, "legacy"),
        "first": lambda: sentencepiece_like(family, "first"),
    }[kind]()
    return Chat(tokenizer, template_source(name))

"""Model shapes of the benchmarks, and the work of one token in each.

Everything is counted in matrix-product FLOPs (2 per multiply-add) and nothing else: attention scores, norms, activations,
softmax and the optimiser are left out, so a share of the measured matrix-product limit is a lower bound of how busy the
processor was. With N the weights of the linear layers, H = vocabulary x hidden the weights of the head, s the supervised share
of the tokens, r the rank and P = Σ (in + out) over the adapted layers:

    student, one token    2 N  forward, 2 N  backward (the frozen weights need no gradient),
                          4 s H              head forward and its gradient, where a target is predicted only,
                          6 r P              LoRA: forward, gradient of its input, gradient of its weights
    teacher, one token    2 N + 2 s H        forward, where a target is predicted only

Work that an engine does beyond this (padding, head on prompt tokens, recomputation, a teacher pass repeated in every epoch) is
not useful work and counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA = 16, 32.0


@dataclass(frozen=True)
class Shape:
    """A Llama: `batch` rows make an optimiser step, `context` is the longest row."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    batch: int
    context: int = 2048
    rope_theta: float = 10_000.0

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one block: query, key, value, output, gate, up, down."""
        d, kv, f = self.hidden, self.hidden // self.heads * self.kv_heads, self.intermediate
        return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]

    @property
    def body(self) -> int:
        """N: weights of all linear layers but the head."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def head(self) -> int:
        """H: weights of the output head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights: linear layers, head, embedding (the head again where they are tied), norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.body + self.head * (1 if self.tied else 2) + norms

    def student_flops(self, supervised: float, rank: int = RANK) -> float:
        """Useful FLOPs per token of a LoRA training step; `supervised` is the share of tokens that are targets."""
        pairs = self.layers * sum(i + o for i, o in self.linears)
        return 4 * self.body + 4 * supervised * self.head + 6 * rank * pairs

    def teacher_flops(self, supervised: float) -> float:
        """Useful FLOPs per token of a teacher pass."""
        return 2 * self.body + 2 * supervised * self.head

    def config(self) -> LlamaConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )

    def random_model(self, seed: int, dtype: torch.dtype, device: str = "cpu", attention: str = "sdpa") -> LlamaForCausalLM:
        """A model with random weights, made on `device` in `dtype`."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=dtype, attn_implementation=attention)
        return model.eval()

    def save(self, folder: Path, seed: int) -> None:
        """A checkpoint in bf16, as real ones are."""
        import torch

        self.random_model(seed, torch.float32).to(torch.bfloat16).save_pretrained(folder)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 2, 4, 2, 128, 2_048, False, batch=4),
        Shape("S", 256, 8, 4, 4, 768, 32_000, False, batch=8),
        Shape("M", 576, 30, 9, 3, 1_536, 49_152, True, batch=4),  # SmolLM-135M
        Shape("1b", 2_048, 16, 32, 8, 8_192, 128_256, True, batch=64, context=8_192, rope_theta=500_000.0),  # Llama-3.2-1B
        Shape("8b", 4_096, 32, 32, 8, 14_336, 128_256, False, batch=32, context=8_192, rope_theta=500_000.0),  # Llama-3.1-8B
    )
}

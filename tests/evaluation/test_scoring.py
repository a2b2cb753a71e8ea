from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guidetune.errors import BadInput
from guidetune.evaluation.scoring import Continuation, Scorer, continuation_log_probs, rolling_windows, target_log_probs


@torch.inference_mode()
def reference(model: Any, ids: list[int]) -> list[float]:
    """log p of tokens 1.. of one row, from the model's own full logits."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return [float(logits[t - 1, ids[t]]) for t in range(1, len(ids))]


def documents_of(count: int, seed: int = 0, single: bool = False) -> list[list[Continuation]]:
    rng = Random(seed)
    found = []
    for _ in range(count):
        context = [rng.randrange(5, 400) for _ in range(rng.randrange(1, 30))]
        tails = [[rng.randrange(5, 400) for _ in range(1 if single else rng.randrange(1, 6))] for _ in range(rng.randrange(2, 5))]
        found.append([Continuation((*context, *tail), len(context)) for tail in tails])
    return found


def close(found: list[list[list[float]]], model: Any, documents: list[list[Continuation]], tolerance: float = 1e-4) -> bool:
    for scores, document in zip(found, documents, strict=True):
        for values, choice in zip(scores, document, strict=True):
            expected = reference(model, list(choice.ids))[choice.start - 1 :]
            if len(values) != len(expected) or max(abs(a - b) for a, b in zip(values, expected, strict=True)) > tolerance:
                return False
    return True


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
@pytest.mark.parametrize("single", [True, False])
def test_continuations_equal_an_unbatched_loop(llama: Any, batch_tokens: int, single: bool) -> None:
    model, documents = llama(1), documents_of(12, single=single)
    assert close(continuation_log_probs(model, documents, batch_tokens=batch_tokens), model, documents)


def test_order_of_documents_changes_nothing(llama: Any) -> None:
    model, documents = llama(1), documents_of(9)
    forward = continuation_log_probs(model, documents)
    backward = continuation_log_probs(model, documents[::-1])[::-1]
    flat = [[value for document in scores for choice in document for value in choice] for scores in (forward, backward)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-5)


def test_merged_tokens_at_the_border_are_scored_from_the_right_place(llama: Any) -> None:
    # The second choice differs from the first one before the border: the shared prefix ends there.
    model = llama(1)
    mixed = [[Continuation((7, 8, 9, 10, 11), 3), Continuation((7, 8, 20, 10), 3)], [Continuation((5, 6), 1), Continuation((9, 6, 7), 1)]]
    assert close(continuation_log_probs(model, mixed), model, mixed)


def test_single_token_choices_cost_one_forward_per_batch(llama: Any) -> None:
    model = llama(1)
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    continuation_log_probs(model, documents_of(10, single=True))
    assert len(calls) == 1 + 4  # the batch, and the checks of the head and of the sharing: two each
    hook.remove()


def small(kind: str) -> Any:
    import transformers as t

    common = {
        "vocab_size": 420, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    match kind:
        case "gemma2":  # soft-capped logits
            return t.Gemma2ForCausalLM(t.Gemma2Config(**common, head_dim=8, final_logit_softcapping=5.0, sliding_window=16)).eval()
        case "granite":  # divided logits
            return t.GraniteForCausalLM(t.GraniteConfig(**common, logits_scaling=8.0)).eval()
        case "cohere":  # multiplied logits
            return t.CohereForCausalLM(t.CohereConfig(**common, logit_scale=0.25)).eval()
        case "qwen2":
            return t.Qwen2ForCausalLM(t.Qwen2Config(**common, tie_word_embeddings=True)).eval()
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "qwen2"])
def test_scaled_and_capped_heads(kind: str) -> None:
    model, documents = small(kind), documents_of(6)
    assert Scorer(model).rebuilt
    assert close(continuation_log_probs(model, documents), model, documents)


def test_half_precision_heads_are_rebuilt_too() -> None:
    for kind in ("gemma2", "granite", "cohere", "qwen2"):
        assert Scorer(small(kind).to(torch.bfloat16)).rebuilt, kind


def test_an_unknown_head_is_answered_by_the_model_itself(llama: Any) -> None:
    from transformers import LlamaForCausalLM

    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5 + torch.arange(out.logits.shape[-1]) * 0.01
            return out

    plain = llama(1)
    model = Odd(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    documents = documents_of(6)
    assert not Scorer(model).rebuilt
    assert close(continuation_log_probs(model, documents), model, documents)
    rows = [list(document[0].ids) for document in documents]
    found = target_log_probs(model, rows, [list(range(1, len(row))) for row in rows])
    assert all(values == pytest.approx(reference(model, row), abs=1e-4) for values, row in zip(found, rows, strict=True))


def test_an_adapter_counts(llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    documents = documents_of(6)
    bare = continuation_log_probs(llama(1), documents)
    torch.manual_seed(0)
    adapted = get_peft_model(llama(1), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    found = continuation_log_probs(adapted, documents)
    assert close(found, adapted, documents)
    assert found != bare


@pytest.mark.parametrize("batch_tokens", [1, 90, 100_000])
def test_targets_equal_an_unbatched_loop(llama: Any, batch_tokens: int) -> None:
    model, rng = llama(1), Random(1)
    rows = [[rng.randrange(5, 400) for _ in range(rng.randrange(2, 40))] for _ in range(10)]
    targets = [sorted(rng.sample(range(1, len(row)), rng.randrange(1, len(row)))) for row in rows]
    found = target_log_probs(model, rows, targets, batch_tokens=batch_tokens)
    for row, places, values in zip(rows, targets, found, strict=True):
        expected = reference(model, row)
        assert values == pytest.approx([expected[place - 1] for place in places], abs=1e-4)


def test_bad_targets_are_refused(llama: Any) -> None:
    with pytest.raises(BadInput, match="row 0"):
        target_log_probs(llama(), [[5, 6]], [[0]])
    with pytest.raises(BadInput, match="document 0"):
        continuation_log_probs(llama(), [[Continuation((5, 6), 2)]])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_rolling_windows_score_every_token_once(tokens: list[int], length: int) -> None:
    windows = rolling_windows(tokens, -1, length)
    scored = [token for ids, count in windows for token in ids[len(ids) - count :]]
    assert scored == tokens
    assert all(1 <= count < len(ids) <= length + 1 for ids, count in windows)
    assert windows[0][0][0] == -1
    assert all(len(ids) == length + 1 for ids, _ in windows[1:])  # later windows, the last one too, are full of context

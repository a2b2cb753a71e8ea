from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guidetune.errors import BadInput
from guidetune.evaluation.generation import generate
from guidetune.evaluation.scoring import (
    Continuation,
    Scorer,
    continuation_log_probs,
    continuation_scores,
    rolling_windows,
    target_log_probs,
)
from tests.tiny import ARCHITECTURES, tiny_model


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


def worst(found: list[list[list[float]]], model: Any, documents: list[list[Continuation]]) -> float:
    """The largest difference to rows one by one; the likeliest choice must be the same."""
    far = 0.0
    for scores, document in zip(found, documents, strict=True):
        expected = [reference(model, list(choice.ids))[choice.start - 1 :] for choice in document]
        far = max([far, *(abs(a - b) for x, y in zip(scores, expected, strict=True) for a, b in zip(x, y, strict=True))])
        totals = [[sum(values) for values in side] for side in (scores, expected)]
        assert totals[0].index(max(totals[0])) == totals[1].index(max(totals[1]))
    return far


def few_shot(count: int, header: int, single: bool, vocab: int = 128, seed: int = 0) -> list[list[Continuation]]:
    """Questions after a common header, with ragged options or lettered ones."""
    rng = Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocab) for _ in range(n))

    first = tokens(header)
    contexts = [first + tokens(rng.randrange(1, 40)) for _ in range(count)]
    tails = [[tokens(1 if single else rng.randrange(1, 9)) for _ in range(rng.randrange(2, 6))] for _ in contexts]
    return [[Continuation(context + tail, len(context)) for tail in options] for context, options in zip(contexts, tails, strict=True)]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_shared_prefixes_give_what_rows_of_their_own_give(family: str) -> None:
    model = tiny_model(family)
    assert Scorer(model).shares
    for header, single in ((0, False), (0, True), (30, False), (30, True)):
        documents = few_shot(7, header, single)
        assert worst(continuation_log_probs(model, documents), model, documents) < 1e-5
    assert model.config._attn_implementation != "guidetune_prefix"


def test_batch_size_changes_only_the_last_bits() -> None:
    model, documents = tiny_model(), few_shot(12, 20, False)
    flat = [
        torch.tensor([v for scores in continuation_log_probs(model, documents, batch_tokens=n) for choice in scores for v in choice])
        for n in (1, 130, 100_000)
    ]
    assert all(torch.allclose(values, flat[0], rtol=1e-6, atol=1e-6) for values in flat[1:])


def test_what_is_shared_runs_once() -> None:
    model, documents = tiny_model(), few_shot(20, 50, False)
    ran = []
    hook = model.model.register_forward_pre_hook(lambda _, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True)
    continuation_log_probs(model, documents)
    hook.remove()
    own = sum(document[0].start - 50 + sum(len(choice.ids) - choice.start - 1 for choice in document) for document in documents)
    # Options may begin alike too: what they share with each other is then part of the prompt.
    assert 50 + own - 20 <= ran[-1] <= 50 + own


def test_equal_options_have_equal_scores() -> None:
    context = tuple(range(3, 40))
    document = [Continuation((*context, *tail), len(context)) for tail in ((50, 51, 52), (60, 61), (50, 51, 52))]
    first, _, last = continuation_log_probs(tiny_model(), [document])[0]
    assert first == last


def mixing(model: Any) -> Any:
    """A layer that also looks at the token before: causal, but not attention."""
    model.model.layers[0].register_forward_hook(lambda _, args, out: out + 0.5 * torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1])
    return model


def test_a_model_that_cannot_share_is_found_out_and_scored_row_by_row() -> None:
    import transformers as t

    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    models = {
        "declares attention, and mixes neighbours": mixing(tiny_model()),
        "state space": t.MambaForCausalLM(t.MambaConfig(**sizes)).eval(),
        "convolutions between attention": t.Lfm2ForCausalLM(
            t.Lfm2Config(**sizes, **{k: v for k, v in heads.items() if k != "head_dim"}, layer_types=["conv", "full_attention"])
        ).eval(),
        "attention sinks": t.GptOssForCausalLM(t.GptOssConfig(**sizes, **heads, num_local_experts=4, sliding_window=8)).eval(),
        "positions in the scores": t.BloomForCausalLM(t.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)).eval(),
    }
    for why, model in models.items():
        assert not Scorer(model).shares, why
        for single in (False, True):
            documents = few_shot(5, 20, single)
            assert worst(continuation_log_probs(model, documents, batch_tokens=300), model, documents) < 1e-5, why


def test_half_precision_weights_have_an_exact_head() -> None:
    model = tiny_model()
    documents = few_shot(6, 20, False)
    half = model.to(torch.bfloat16)
    scorer = Scorer(half)
    assert scorer.shares and scorer.head is not None and scorer.head.weight.dtype == torch.float32
    assert worst(continuation_log_probs(half, documents), tiny_model().to(torch.bfloat16).float(), documents) < 0.3


@pytest.mark.parametrize("shares", [True, False])
def test_a_continuation_is_greedy_when_decoding_gives_it(llama: Any, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw = llama(), Random(4)
    if not shares:
        monkeypatch.setattr(Scorer, "_check_sharing", lambda self: False)
    prompts = [[draw.randrange(5, 400) for _ in range(draw.randint(3, 12))] for _ in range(5)]
    answers = dict(generate(model, prompts, max_new_tokens=4, stop=[]))
    documents = []
    for i, prompt in enumerate(prompts):
        right = answers[i].tokens
        wrong = [(*right[:k], (right[k] + 1) % 400, *right[k + 1 :]) for k in range(4)]
        documents.append([Continuation((*prompt, *tokens), len(prompt)) for tokens in (right, right[:1], *wrong)])
    found = continuation_scores(model, documents)
    assert [[greedy for _, greedy in document] for document in found] == [[True, True, False, False, False, False]] * 5
    plain = continuation_log_probs(model, documents)
    assert [[total for total, _ in document] for document in found] == [[sum(values) for values in document] for document in plain]


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
    for document in ([Continuation((5, 6), 2)], [Continuation((5, 6), 0)], []):
        with pytest.raises(BadInput, match="document 0"):
            continuation_log_probs(llama(), [document])
    assert continuation_log_probs(llama(), []) == []


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_rolling_windows_score_every_token_once(tokens: list[int], length: int) -> None:
    windows = rolling_windows(tokens, -1, length)
    scored = [token for ids, count in windows for token in ids[len(ids) - count :]]
    assert scored == tokens
    assert all(1 <= count < len(ids) <= length + 1 for ids, count in windows)
    assert windows[0][0][0] == -1
    assert all(len(ids) == length + 1 for ids, _ in windows[1:])  # later windows, the last one too, are full of context

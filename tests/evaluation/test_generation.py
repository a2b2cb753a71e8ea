from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from guidetune.errors import BadInput, RunFailed
from guidetune.evaluation import generation
from guidetune.evaluation.generation import Sampling, batches, context_length, cut_middle, draw, evaluating, generate, halving
from tests.tiny import tiny_model


def prompts_of(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    rng = Random(seed)
    return [[rng.randrange(5, 400) for _ in range(rng.randrange(low, high))] for _ in range(count)]


def reference(model: Any, prompt: list[int], new: int, stop: list[int]) -> list[int]:
    """transformers' own greedy generation of one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=0
    )[0, len(prompt) :].tolist()
    return out[:-1] if out[-1] in stop else out


def collect(model: Any, prompts: list[list[int]], **options: Any) -> list[tuple[int, ...]]:
    found = dict(generate(model, prompts, **{"max_new_tokens": 24, "stop": [4], **options}))
    return [found[i].tokens for i in range(len(prompts))]


@pytest.mark.parametrize("batch_tokens", [100, 600, 100_000])
def test_greedy_tokens_equal_model_generate(llama: Any, batch_tokens: int) -> None:
    model, prompts = llama(1), prompts_of(12, 1, 40)
    stop = list(range(4, 60))  # many stop tokens: rows finish at different steps and leave the batch
    expected = [tuple(reference(model, prompt, 24, stop)) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 4
    assert collect(model, prompts, stop=stop, batch_tokens=batch_tokens) == expected


def test_greedy_equals_model_generate_with_sliding_windows(tokenizer: Any) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"], initializer_range=0.2,
    )  # fmt: skip
    model, prompts = Gemma3ForCausalLM(config).eval(), prompts_of(6, 3, 30)
    stop = list(range(4, 40))
    assert collect(model, prompts, stop=stop) == [tuple(reference(model, prompt, 24, stop)) for prompt in prompts]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_waiting_prompts_join_rows_in_work(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(family), [[token % 128 for token in prompt] for prompt in prompts_of(14, 1, 40, seed=3)]
    stop = list(range(40, 50))
    joined = []
    join = generation._Decoder._join
    monkeypatch.setattr(generation._Decoder, "_join", lambda self, rows: (joined.append(len(rows)), join(self, rows))[1])
    expected = [tuple(reference(model, prompt, 24, stop)) for prompt in prompts]
    assert collect(model, prompts, stop=stop, batch_tokens=400) == expected
    # Sliding windows forget columns, so two such batches cannot stand in one.
    assert bool(joined) == (model.config.get_text_config().to_dict().get("sliding_window") is None)


def test_long_prompts_are_run_in_groups_on_a_cpu(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = llama(4), prompts_of(9, 1, 60)
    whole = collect(model, prompts)
    monkeypatch.setattr(generation, "CPU_TOKENS", 100)
    assert collect(model, prompts) == whole


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(llama: Any) -> None:
    model, prompts = llama(1), prompts_of(7, 1, 20)
    expected = collect(model, prompts)

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        if kwargs["past_key_values"].get_seq_length() > 25 and kwargs["input_ids"].shape[0] > limit:
            raise torch.OutOfMemoryError

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    limit = 2
    assert collect(model, prompts) == expected
    limit = 0
    with pytest.raises(RunFailed, match="a single row does not fit"):
        collect(model, prompts)
    hook.remove()


def test_samples_depend_on_their_seed_and_not_on_the_batch(llama: Any) -> None:
    model, prompts = llama(2), prompts_of(5, 2, 20)
    jobs = [prompt for prompt in prompts for _ in range(4)]  # four samples of each prompt share its prefill
    seeds = list(range(len(jobs)))
    sampling = Sampling(temperature=1.0)
    together = collect(model, jobs, sampling=sampling, seeds=seeds)
    for tokens in (1, 150):
        assert together == collect(model, jobs, sampling=sampling, seeds=seeds, batch_tokens=tokens)
    assert together[7:9] == collect(model, jobs[7:9], sampling=sampling, seeds=seeds[7:9])
    assert len(set(together[:4])) == 4
    assert together != collect(model, jobs, sampling=sampling, seeds=[s + 1 for s in seeds])


def test_a_row_ends_when_it_is_told_and_the_others_go_on(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LOOK", 3)
    model, prompts = llama(), [[7, 8, 9], [11, 12], [13, 14, 15, 16], [17, 18]]
    full = dict(generate(model, prompts, max_new_tokens=20, stop=[], batch_tokens=60))
    ends = set(full[1].tokens[:5])
    cut = dict(generate(model, prompts, max_new_tokens=20, stop=[], batch_tokens=60, until=lambda tokens: bool(ends & set(tokens))))
    for i in range(4):
        place = next((k for k, token in enumerate(full[i].tokens) if token in ends), 20)
        assert cut[i].tokens == full[i].tokens[: len(cut[i].tokens)], "what is generated does not change"
        assert min(20, place + 1) <= len(cut[i].tokens) <= place + 3 and not cut[i].finished
    assert len(cut[1].tokens) < 20


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]]).expand(20_000, -1)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (0.5, 1.0, 2.0):
        share = draw(logits, uniform, Sampling(temperature)).bincount(minlength=4) / 20_000
        assert torch.allclose(share, (logits[0] / temperature).softmax(-1), atol=1e-4)
    assert set(draw(logits, uniform, Sampling(1.0, top_k=2)).tolist()) == {0, 3}
    assert set(draw(logits, uniform, Sampling(1.0, top_p=0.6)).tolist()) == {0}  # 0.63 of the mass is on token 0
    assert set(draw(logits, uniform, Sampling(1.0, top_p=0.8)).tolist()) == {0, 3}


def test_a_nearly_cold_sample_is_greedy(llama: Any) -> None:
    model, prompts = llama(3), prompts_of(4, 2, 10)
    assert collect(model, prompts, sampling=Sampling(1e-4), seeds=[1, 2, 3, 4]) == collect(model, prompts)


def test_long_prompts_are_cut_from_the_middle_and_counted(llama: Any) -> None:
    model = llama(0, max_position_embeddings=32)
    assert context_length(model) == 32
    assert cut_middle(list(range(10)), 5) == (0, 1, 7, 8, 9)
    prompt = prompts_of(1, 50, 51)[0]
    found = dict(generate(model, [prompt, prompt[:4]], max_new_tokens=8, stop=[], context=32))
    assert (found[0].cut, len(found[0].tokens)) == (50 - 24, 8)
    assert (found[1].cut, len(found[1].tokens)) == (0, 8)
    kept = dict(generate(model, [list(cut_middle(prompt, 24))], max_new_tokens=8, stop=[], context=32))
    assert kept[0].tokens == found[0].tokens
    # When the answer alone would fill the context, the prompt keeps half of it.
    assert {len(c.tokens) for _, c in generate(model, [prompt], max_new_tokens=100, stop=[], context=32)} == {16}


def test_training_mode_comes_back_and_weights_do_not_change(llama: Any, weights_hash: Any) -> None:
    model = llama(0, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = weights_hash(model)
    flags = [module.training for module in model.modules()]
    first = collect(model, prompts_of(3, 2, 10))
    assert first == collect(model, prompts_of(3, 2, 10))  # dropout was off
    assert [module.training for module in model.modules()] == flags
    assert weights_hash(model) == before
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training


def test_batches_keep_to_the_budget() -> None:
    rows = [9, 9, 5, 3, 3, 2, 1]
    groups = list(batches(rows, lambda row: row, 18))
    assert [row for group in groups for row in group] == rows
    assert all(max(group) * len(group) <= 18 for group in groups)
    assert list(batches([50, 1], lambda row: row, 18)) == [[50], [1]]


def test_a_batch_that_runs_out_of_memory_is_halved() -> None:
    sizes = []

    def work(rows: list[int]) -> list[int]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return [row * row for row in rows]

    assert halving(work, list(range(7))) == [n * n for n in range(7)]
    assert sizes[0] == 7
    with pytest.raises(RunFailed, match="a single row does not fit"):
        halving(lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError()), [1])


def test_bad_input_is_refused(llama: Any) -> None:
    with pytest.raises(BadInput, match="prompt 1 is empty"):
        collect(llama(), [[5], []])
    with pytest.raises(BadInput, match="temperature"):
        collect(llama(), [[5]], sampling=Sampling(0.0), seeds=[1])
    broken = llama(5)
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    with pytest.raises(RunFailed, match="NaN"):
        collect(broken, [[5, 6]])

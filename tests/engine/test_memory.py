"""The memory estimate: what it is made of, the settings it chooses, and (slow) real processes beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guidetune.engine import TuneSettings, memory
from guidetune.params.full import Full
from guidetune.params.lora import Lora
from tests.engine import measure_memory
from tests.tiny import ARCHITECTURES, COMMON

MB = 1_000_000


def outline(family: str = "llama", params=None, dtype: torch.dtype = torch.float32, **changes) -> memory.Outline:
    import transformers

    name, special = ARCHITECTURES[family]
    config = getattr(transformers, name)(**{"vocab_size": 128, **COMMON, **special, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return memory.Outline.shaped(model, dtype, params)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_architecture_and_way_of_training_can_be_estimated(family: str) -> None:
    for params in (Lora(rank=4), Full()):
        shape = outline(family, params)
        for layout in ("varlen", "padded"):
            whole, again = (shape.peak(512, 32, train=True, recompute=r, layout=layout) for r in (False, True))
            assert 0 < shape.peak(512, 32, train=False, layout=layout) < again < whole
            # activations are in proportion to the tokens; only what a step holds besides is not
            half = shape.peak(256, 32, train=True, layout=layout)
            assert 1.7 * half < whole < 2.05 * half
        assert not any(p.grad is not None or not p.is_meta for p in shape.model.parameters())


def test_weights_and_trained_state_are_counted_exactly() -> None:
    import transformers

    real = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **COMMON))
    parameters = sum(p.numel() for p in real.parameters())
    full = outline("llama", Full())
    assert full.trained == full.originals == 4 * parameters
    assert 0 <= full.weights - 4 * parameters < 1000  # the rotary table
    lora = outline("llama", Lora(rank=4), torch.bfloat16)
    adapter = sum(p.numel() for p in Lora(rank=4).attach(real).trainable().values())
    assert (lora.trained, lora.originals) == (4 * adapter, 0)  # fp32 masters beside bf16 weights
    assert 0 <= lora.weights - 2 * parameters - 4 * adapter < 1000
    part = outline("llama", Full(trainable=[r"layers\.1\.mlp"]))
    assert part.trained == 4 * 3 * 32 * 48
    assert part.peak(512, 32, train=True) < 0.7 * full.peak(512, 32, train=True)  # the layer below keeps nothing
    estimate = memory.tune_estimate(full, 512, 32, False, process=0)
    assert estimate.parts["gradients and AdamW moments"] == 12 * parameters and estimate.total == sum(estimate.parts.values())


def test_what_is_saved_for_a_linear_layer_is_what_autograd_saves() -> None:
    """The count against `saved_tensors_hooks` on real tensors."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    x = torch.randn(100, 64)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    known = {t.untyped_storage().data_ptr() for t in [x, *model.parameters()]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    live = memory._Live()
    live.known([x, *model.parameters()])
    with live:
        z = model(x)
    assert live.now == sum(size for at, size in saved.items() if at not in known) + z.nbytes
    del y, z
    assert live.now == 0


def test_settings_are_changed_in_order_and_only_when_they_must() -> None:
    shape = outline("llama", Lora(rank=4), hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    settings = TuneSettings(micro_tokens=4096)

    def fit(budget: float, fixed_tokens: bool = False, **changes):
        chosen, estimate, fits = memory.fit_tune(
            shape, settings.model_copy(update=changes), 64, int(budget), fixed_tokens=fixed_tokens, process=0
        )
        return chosen.gradient_checkpointing, chosen.micro_tokens, estimate.frugal, fits, estimate.total

    on, tokens, frugal, fits, whole = fit(1e12)
    assert (on, tokens, frugal, fits) == (False, 4096, False, True)
    on, tokens, frugal, fits, recomputed = fit(whole - 1)
    assert (on, tokens, frugal, fits) == (True, 4096, False, True) and recomputed < whole
    on, tokens, frugal, fits, fewer = fit(recomputed - 1)
    assert (on, tokens, frugal, fits) == (True, 2048, False, True) and fewer < recomputed
    on, tokens, frugal, fits, least = fit(10 * MB)
    assert (on, tokens, frugal, fits) == (True, 64, True, False)
    assert fit(least)[3]
    # what was asked for is kept
    assert fit(whole - 1, gradient_checkpointing=False)[:3] == (False, 2048, False)
    assert fit(1e12, gradient_checkpointing=True)[:2] == (True, 4096)
    assert fit(10 * MB, fixed_tokens=True)[1] == 4096  # part of the result there
    # no row is cut: a micro-batch holds at least the longest
    _, estimate, _ = memory.fit_tune(shape, settings, 1000, 10 * MB, process=0)
    assert estimate.tokens == 1000


def test_the_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    for folder, most, used in (("", "max", 5), ("a", 10 * MB, 4 * MB), ("a/b", "max", 1)):
        place = tmp_path / "root" / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{most}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 1\ninactive_file {MB}\n")
    assert list(memory._group_available(tmp_path / "root", own)) == [7 * MB]
    first = tmp_path / "v1" / "memory" / "job"
    first.mkdir(parents=True)
    own.write_text("5:cpu:/x\n4:memory:/job\n")
    for name, value in (("limit_in_bytes", 8 * MB), ("usage_in_bytes", 3 * MB), ("stat", f"total_inactive_file {MB}")):
        (first / f"memory.{name}").write_text(f"{value}\n")
    assert list(memory._group_available(tmp_path / "v1", own)) == [6 * MB]
    assert memory.free_memory() > 100 * MB


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(measure_memory.CASES))
def test_real_processes_take_what_was_estimated(case: str, capsys: pytest.CaptureFixture) -> None:
    """Never more than 10 % too low, never more than 40 % too high."""
    found = measure_memory.run(case)
    with capsys.disabled():
        print("\n" + measure_memory.line(case, found))
    assert 0.9 <= found["estimated"] / found["measured"] <= 1.4

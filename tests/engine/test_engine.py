"""The engine against textbook cross-entropy, and its invariances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guidetune.data.rows import EncodedRow, EncodedRows
from guidetune.engine import FitResult, Objective, TuneSettings, fit
from guidetune.engine.batching import assemble, micro_batches, optimiser_batch
from guidetune.engine.forward import opened
from guidetune.engine.loop import _accumulate
from guidetune.engine.stack import recognise
from guidetune.errors import BadInput
from guidetune.guidance import Guidance, GuideSettings, teach
from guidetune.guidance.store import offsets
from guidetune.objectives.reduce import REDUCERS
from guidetune.objectives.token_weights.dft import Dft
from guidetune.objectives.token_weights.gift import Gift
from guidetune.params.full import Full
from guidetune.params.lora import Lora
from tests.tiny import ARCHITECTURES, tiny_model

VOCAB = 96


def make_rows(n: int = 12, seed: int = 0, longest: int = 24) -> EncodedRows:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        length = int(rng.integers(4, longest))
        weight = np.zeros(length, np.float32)
        weight[int(rng.integers(1, length - 1)) :] = 1.0
        rows.append(EncodedRow(f"r{i}", "test", rng.integers(3, VOCAB, length).astype(np.int32), weight))
    return EncodedRows.from_rows(rows)


def guidance_for(rows: EncodedRows, seed: int = 1) -> Guidance:
    at = offsets(rows)
    q = np.random.default_rng(seed).uniform(0.01, 1.0, at[-1])
    return Guidance(np.log(q).astype(np.float16), at)


def lora(model: torch.nn.Module, dropout: float = 0.0, warm: bool = True):
    attached = Lora(rank=4, alpha=8, dropout=dropout).attach(model, seed=3)
    if warm:  # B = 0 would hide errors in the gradient of A
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, p in attached.trainable().items():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return attached


def textbook(model: torch.nn.Module, rows: EncodedRows, indices: np.ndarray, weight: dict[int, np.ndarray]) -> torch.Tensor:
    """Σ w ℓ / Σ w from full logits, one row at a time."""
    top, bottom = 0.0, 0.0
    for i in indices:
        row = rows[int(i)]
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, :-1].float()
        nll = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        at = np.flatnonzero(row.loss_weight > 0) - 1
        w = torch.from_numpy(weight[int(i)].astype(np.float32))
        top, bottom = top + (w * nll[at]).sum(), bottom + w.sum()
    return top / bottom


def gradients(attached, rows, indices, settings, objective, layout="varlen", checkpointing=False):
    for p in attached.trainable().values():
        p.grad = None
    attached.model.train()
    with opened(attached.model, layout, checkpointing=checkpointing) as forward:
        loss, _, _ = _accumulate(forward, rows, indices, settings, objective, 0)
    return loss, {name: p.grad.clone() for name, p in attached.trainable().items()}


def close(a: dict, b: dict, tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    scale = max(float(v.abs().max()) for v in b.values())
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= tolerance * max(scale, 1e-3), name


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_weighted_loss_and_lora_gradients_equal_textbook(family: str) -> None:
    rows, indices = make_rows(), np.arange(12)
    store = guidance_for(rows)
    attached = lora(tiny_model(family, vocab=VOCAB, seed=0))
    objective = Objective([Gift()], "weights", {"instruct": store})
    settings = TuneSettings(micro_tokens=40, batch=12)
    loss, got = gradients(attached, rows, indices, settings, objective)
    for p in attached.trainable().values():
        p.grad = None
    expected = textbook(attached.model, rows, indices, {i: np.exp(store.row(i).astype(np.float32)) for i in range(12)})
    expected.backward()
    assert abs(loss - float(expected)) <= 2e-6 * max(1.0, abs(float(expected)))
    close(got, {name: p.grad for name, p in attached.trainable().items()}, 3e-6)


@pytest.mark.parametrize("weighted", ["gift", "dft"])
@pytest.mark.parametrize("reducer", sorted(set(REDUCERS) - {"micro"}))
def test_accumulation_padding_and_order_do_not_matter(reducer: str, weighted: str) -> None:
    rows = make_rows()
    objective = Objective([Gift() if weighted == "gift" else Dft()], reducer, {"instruct": guidance_for(rows)})
    attached = lora(tiny_model("llama", vocab=VOCAB, seed=0))
    whole = gradients(attached, rows, np.arange(12), TuneSettings(micro_tokens=10_000), objective)
    for indices, tokens, layout in [
        (np.arange(12), 1, "varlen"),
        (np.arange(12)[::-1], 60, "varlen"),
        (np.arange(12), 10_000, "padded"),
        (np.arange(12)[::-1], 50, "padded"),
    ]:
        loss, grads = gradients(attached, rows, np.array(indices), TuneSettings(micro_tokens=tokens), objective, layout)
        assert loss == pytest.approx(whole[0], rel=2e-6)
        close(grads, whole[1], 2e-6)


def test_micro_reducer_is_the_mean_of_micro_batches_and_depends_on_them() -> None:
    rows = make_rows()
    objective = Objective([Gift()], "micro", {"instruct": guidance_for(rows)})
    attached = lora(tiny_model("llama", vocab=VOCAB, seed=0))
    one, _ = gradients(attached, rows, np.arange(12), TuneSettings(micro_tokens=10_000), objective)
    many, _ = gradients(attached, rows, np.arange(12), TuneSettings(micro_tokens=1), objective)
    single = [gradients(attached, rows, np.array([i]), TuneSettings(micro_tokens=10_000), objective)[0] for i in range(12)]
    assert many == pytest.approx(np.mean(single), rel=1e-6)
    assert abs(one - many) > 1e-4


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_changed_document_leaves_the_others_bit_equal(family: str) -> None:
    rows = list(make_rows(6))
    changed = list(rows)
    ids = rows[2].input_ids.copy()
    ids[0] = (ids[0] + 5) % VOCAB
    changed[2] = EncodedRow("r2", "test", ids, rows[2].loss_weight)
    model = tiny_model(family, vocab=VOCAB, seed=0).eval()
    out = []
    for data in (rows, changed):
        with torch.no_grad(), opened(model, "varlen") as forward:
            batch = assemble(EncodedRows.from_rows(data), np.arange(6), "varlen")
            with forward.documents(batch):
                out.append((forward.nll(batch), batch.row))
    (a, row), (b, _) = out
    assert torch.equal(a[row != 2], b[row != 2])
    assert not torch.equal(a[row == 2], b[row == 2])


def test_constant_confidence_and_power_zero_are_plain_tuning() -> None:
    rows = make_rows()
    at = offsets(rows)
    attached = lora(tiny_model("llama", vocab=VOCAB, seed=0))
    settings = TuneSettings(micro_tokens=64)
    plain = gradients(attached, rows, np.arange(12), settings, Objective())
    constant = Guidance(np.full(at[-1], np.log(0.25), np.float16), at)
    for weight, store in [(Gift(), constant), (Gift(power=0), guidance_for(rows)), (Gift(power=0, eos_weight=1.0), guidance_for(rows))]:
        got = gradients(attached, rows, np.arange(12), settings, Objective([weight], "weights", {"instruct": store}))
        assert got[0] == pytest.approx(plain[0], rel=1e-6)
        close(got[1], plain[1])
    tokens = gradients(attached, rows, np.arange(12), settings, Objective([Gift()], "tokens", {"instruct": constant}))
    assert tokens[0] == pytest.approx(plain[0] * float(np.exp(np.float32(constant.log_prob[0]))), rel=1e-5)


def test_first_gift_gradient_with_teacher_equal_to_student_is_dft_scaled() -> None:
    rows = make_rows()
    model = tiny_model("llama", vocab=VOCAB, seed=0)
    at = offsets(rows)
    with torch.no_grad(), opened(model) as forward:
        batch = assemble(rows, np.arange(12), "varlen")
        with forward.documents(batch):
            nll = forward.nll(batch)
    store = Guidance(-nll.numpy(), at)
    attached = lora(model, warm=False)
    settings = TuneSettings(micro_tokens=64)
    dft = gradients(attached, rows, np.arange(12), settings, Objective([Dft()], "tokens"))
    same = gradients(attached, rows, np.arange(12), settings, Objective([Gift(floor=0)], "tokens", {"instruct": store}))
    close(same[1], dft[1], 1e-5)
    gift = gradients(attached, rows, np.arange(12), settings, Objective([Gift(floor=0)], "weights", {"instruct": store}))
    ratio = len(nll) / float((-nll).exp().sum())
    close(gift[1], {k: v * ratio for k, v in dft[1].items()}, 1e-5)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    rows = make_rows()
    outcomes = []
    for checkpointing in (False, True):
        attached = lora(tiny_model(family, vocab=VOCAB, seed=0), dropout=0.2)
        outcomes.append(gradients(attached, rows, np.arange(12), TuneSettings(micro_tokens=64), Objective(), checkpointing=checkpointing))
    assert outcomes[0][0] == outcomes[1][0]
    close(outcomes[1][1], outcomes[0][1], 1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_full_tuning_gradients_equal_textbook(tied: bool) -> None:
    rows = make_rows()
    attached = Full().attach(tiny_model("llama", vocab=VOCAB, seed=0, tie_word_embeddings=tied))
    loss, got = gradients(attached, rows, np.arange(12), TuneSettings(micro_tokens=40), Objective())
    for p in attached.trainable().values():
        p.grad = None
    ones = {i: np.ones(int(rows.supervised[i])) for i in range(12)}
    expected = textbook(attached.model, rows, np.arange(12), ones)
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    close(got, {name: p.grad for name, p in attached.trainable().items()}, 3e-6)


SUBSETS = {
    "last-mlp": {"trainable": [r"layers\.1\.mlp"]},
    "norms": {"trainable": ["norm"]},
    "embeddings": {"trainable": ["embed_tokens"]},
    "head": {"trainable": ["lm_head"]},
    "all-but-embeddings": {"freeze": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("subset", SUBSETS)
def test_a_subset_has_the_gradients_of_full_tuning_and_nothing_else_has_any(subset: str, tied: bool) -> None:
    rows = make_rows()
    found = {}
    for name, options in (("all", {}), (subset, SUBSETS[subset])):
        attached = Full(**options).attach(tiny_model("llama", vocab=VOCAB, seed=0, tie_word_embeddings=tied))
        _, found[name] = gradients(attached, rows, np.arange(12), TuneSettings(micro_tokens=40), Objective())
        assert {n for n, p in attached.model.named_parameters() if p.grad is not None} == set(attached.trainable()) == set(found[name])
    tensors = len(found["all"])
    expected = {"last-mlp": 3, "norms": 5, "embeddings": 1, "head": 1, "all-but-embeddings": tensors - (1 if tied else 2)}[subset]
    assert len(found[subset]) == expected
    close(found[subset], {name: found["all"][name] for name in found[subset]}, 1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_parameters_cost_no_weight_gradient_and_lower_layers_no_backward(checkpointing: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    rows = make_rows()
    model = tiny_model("llama", vocab=VOCAB, seed=0)
    attached = Full(trainable=[r"layers\.1\.mlp\.down_proj"]).attach(model)
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    with opened(model, "varlen", checkpointing=checkpointing) as forward:
        batch = assemble(rows, np.arange(12), "varlen")
        model.train()
        with forward.documents(batch):
            with FlopCounterMode(display=False) as plain, torch.no_grad():
                forward.nll(batch)
            with FlopCounterMode(display=False) as counted:
                forward.nll(batch).sum().backward()
        layers = forward.stack.layers
        forward.stack.layers = layers[:1]  # one layer, the last: its feed-forward part runs at the target rows only
        with FlopCounterMode(display=False) as upper, torch.no_grad():
            forward.hidden(batch)
        forward.stack.layers = layers
    assert attached.trainable().keys() == {"model.layers.1.mlp.down_proj.weight"}
    n = len(batch.targets)
    dh = 2 * (-(-n // 16) * 16) * VOCAB * hidden  # the head's gradient, formed in its forward pass
    dw = 2 * (-(-n // 32) * 32) * hidden * inner  # the only weight gradient
    # with checkpointing the layer is computed once more
    again = upper.get_total_flops() if checkpointing else 0
    assert counted.get_total_flops() == plain.get_total_flops() + dh + dw + again


def run_fit(
    work: Path, settings: TuneSettings, seed: int = 0, stop=None, dropout: float = 0.1
) -> tuple[FitResult, dict[str, torch.Tensor]]:
    work.mkdir(exist_ok=True)
    rows = make_rows(20)
    attached = lora(tiny_model("llama", vocab=VOCAB, seed=seed), dropout=dropout, warm=False)
    objective = Objective([Gift()], "weights", {"instruct": guidance_for(rows)})
    result = fit(attached, rows, settings, objective, work=work, validation=make_rows(5, seed=9), stop=stop)
    return result, {n: p.detach().clone() for n, p in attached.trainable().items()}


def test_training_learns_is_deterministic_and_resumes_bit_equal(tmp_path: Path) -> None:
    settings = TuneSettings(batch=6, epochs=5, lr=1e-2, micro_tokens=60, checkpoint_every=3, validate_every=5)
    a, weights_a = run_fit(tmp_path / "a", settings)
    b, weights_b = run_fit(tmp_path / "b", settings)
    assert a.loss_last < a.loss_first
    assert all(torch.equal(weights_a[n], weights_b[n]) for n in weights_a)
    run_fit(tmp_path / "c", settings, stop=lambda step: step == 8)  # dies after step 8; the last checkpoint is of step 6
    c, weights_c = run_fit(tmp_path / "c", settings)
    assert c.steps == a.steps == 20
    assert all(torch.equal(weights_a[n], weights_c[n]) for n in weights_a)
    strip = ("seconds", "tokens_per_s")
    import json

    read = lambda p: [{k: v for k, v in json.loads(line).items() if k not in strip} for line in p.read_text().splitlines()]  # noqa: E731
    assert read(tmp_path / "a/metrics.jsonl") == read(tmp_path / "c/metrics.jsonl")
    assert sum(s["signal"] for s in a.signal) == pytest.approx(1)


def test_a_non_finite_loss_names_the_rows_and_publishes_nothing(tmp_path: Path) -> None:
    from guidetune.errors import RunFailed

    rows = list(make_rows(6))
    model = tiny_model("llama", vocab=VOCAB, seed=0)
    poison = 95
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("inf")
    ids = np.minimum(rows[4].input_ids, 90)
    ids[0] = poison
    clean = [EncodedRow(r.id, r.source, np.minimum(r.input_ids, 90), r.loss_weight) for r in rows]
    clean[4] = EncodedRow("poisoned", "test", ids, rows[4].loss_weight)
    with pytest.raises(RunFailed, match="poisoned"):
        fit(lora(model), EncodedRows.from_rows(clean), TuneSettings(batch=6), work=tmp_path)


def test_micro_batches_cover_every_row_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    for layout in ("varlen", "padded"):
        groups = micro_batches(np.arange(200), lengths, 128, layout)
        assert sorted(np.concatenate(groups).tolist()) == list(range(200))
        for g in groups:
            cost = lengths[g].sum() if layout == "varlen" else lengths[g].max() * len(g)
            assert cost <= 128 or len(g) == 1
    seen = np.concatenate([optimiser_batch(200, 32, 1, s) for s in range(7)])
    assert sorted(seen.tolist()) == list(range(200))
    assert not np.array_equal(optimiser_batch(200, 32, 1, 0), optimiser_batch(200, 32, 1, 7))


def test_teacher_pass_equals_full_logits_and_continues(tmp_path: Path) -> None:
    rows = make_rows(20)
    model = tiny_model("gemma2", vocab=VOCAB, seed=4)
    summary = teach(model, rows, GuideSettings(batch_tokens=50), tmp_path)
    stored = np.fromfile(tmp_path / "log_prob.f16", np.float16)
    expected = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            lp = model(input_ids=ids).logits[0].float().log_softmax(-1)
        at = np.flatnonzero(row.loss_weight > 0)
        expected.append(lp[at - 1, ids[0, at]].numpy())
    expected = np.concatenate(expected)
    np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=1e-4)
    assert summary["mean_confidence"] == pytest.approx(np.exp(expected).mean(), rel=1e-3)
    assert summary["supervised_tokens"] == rows.supervised.sum()


def test_a_broken_teacher_pass_goes_on_in_the_middle_of_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    from guidetune.engine.forward import Forward

    rows, model = make_rows(40), tiny_model("llama", vocab=VOCAB, seed=4)
    monkeypatch.setattr(import_module("guidetune.guidance.teach"), "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(import_module("guidetune.guidance.teach"), "SECTION", 2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    teach(model, rows, GuideSettings(batch_tokens=50), whole)
    real, calls = Forward.nll, []

    def counted(self, batch):
        calls.append(len(batch.rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Forward, "nll", counted)
    with pytest.raises(KeyboardInterrupt):
        teach(model, rows, GuideSettings(batch_tokens=50), broken)
    done = sum(calls[:4])
    calls[:] = [0] * 10
    teach(model, rows, GuideSettings(batch_tokens=50), broken)
    assert sum(calls) == 40 - done  # no row twice
    assert (whole / "log_prob.f16").read_bytes() == (broken / "log_prob.f16").read_bytes()
    # other batches: the window starts again, and the values are those
    with pytest.raises(KeyboardInterrupt):
        calls[:] = []
        teach(model, rows, GuideSettings(batch_tokens=50), broken)
    calls[:] = [0] * 10
    teach(model, rows, GuideSettings(batch_tokens=200), broken)
    assert sum(calls) == 40
    np.testing.assert_allclose(np.fromfile(broken / "log_prob.f16", np.float16), np.fromfile(whole / "log_prob.f16", np.float16), rtol=2e-3)


def test_int8_linear_layers_are_near_the_exact_ones_and_scale_with_each_token() -> None:
    from guidetune.models import quantized
    from guidetune.models.int8 import Int8Linear, to_int8

    if not quantized.has_int8():
        pytest.skip("no 8-bit products on this processor")
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(96, 64)
    x = torch.randn(40, 96, generator=generator)
    with torch.inference_mode():
        exact, got = layer(x), Int8Linear(layer)(x)
        assert (got - exact).norm() <= 0.015 * exact.norm()
        # one token a thousand times larger does not coarsen the others
        loud = x.clone()
        loud[7] *= 1000
        rest = torch.arange(40) != 7
        assert (Int8Linear(layer)(loud)[rest] - exact[rest]).norm() <= 0.015 * exact[rest].norm()
        assert Int8Linear(layer)(x.bfloat16()[None]).dtype == torch.bfloat16
    model = to_int8(tiny_model("qwen2", vocab=VOCAB))
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 14 and type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_stack_by_hand_equals_the_modules_it_replaces_dropout_included(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows()
    objective = Objective([Gift()], "weights", {"instruct": guidance_for(rows)})
    found = []
    for by_hand in (True, False):
        if not by_hand:
            monkeypatch.setattr("guidetune.engine.forward.fast_stack", lambda model, backbone: None)
        attached = lora(tiny_model(family, vocab=VOCAB, seed=0), dropout=0.3)
        found.append(gradients(attached, rows, np.arange(12), TuneSettings(micro_tokens=64), objective))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-6)
    close(found[0][1], found[1][1], 3e-6)


@pytest.mark.parametrize(("family", "by_hand"), [("llama", True), ("mistral", True), ("gemma2", False), ("olmo2", False)])
def test_which_models_run_by_hand(family: str, by_hand: bool) -> None:
    with opened(lora(tiny_model(family, vocab=VOCAB)).model) as forward:
        assert (forward.stack is not None) == by_hand


def test_a_model_that_only_looks_like_a_llama_runs_through_its_modules() -> None:
    model = tiny_model("llama", vocab=VOCAB)
    with opened(model) as forward:
        assert forward.stack is not None
    layer = model.model.layers[0]
    original = type(layer).forward
    layer.forward = lambda *args, **kwargs: original(layer, *args, **kwargs) * 1.5
    with opened(model) as forward:
        assert forward.stack is None
    del layer.forward
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: out)
    with opened(model) as forward:
        assert forward.stack is None


@pytest.mark.parametrize("kernels", ["compile", "liger"])
def test_gpu_kernels_are_refused_on_a_cpu(kernels: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"tune.kernels: {kernels} needs a CUDA GPU"):
        run_fit(tmp_path, TuneSettings(kernels=kernels))


@pytest.mark.parametrize("reducer", ["weights", "micro"])
def test_micro_batches_side_by_side_give_the_gradients_of_one_thread(reducer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(24)
    objective = Objective([Gift()], reducer, {"instruct": guidance_for(rows)})
    attached = lora(tiny_model("llama", vocab=VOCAB, seed=0), dropout=0.3)
    settings = TuneSettings(micro_tokens=80)
    alone = gradients(attached, rows, np.arange(24), settings, objective)
    monkeypatch.setattr("guidetune.engine.loop.LANE_TOKENS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with opened(attached.model) as forward:
            assert forward.lanes == 3
        both = [gradients(attached, rows, np.arange(24), settings, objective) for _ in range(2)]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert both[0][0] == both[1][0] and all(torch.equal(both[0][1][n], both[1][1][n]) for n in both[0][1])
    assert both[0][0] == pytest.approx(alone[0], rel=2e-6)
    close(both[0][1], alone[1], 2e-6)


def test_an_error_on_one_thread_is_raised_and_names_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from guidetune.errors import RunFailed

    rows = make_rows(24)
    attached = lora(tiny_model("llama", vocab=VOCAB, seed=0))
    with torch.no_grad():
        attached.model.get_base_model().model.embed_tokens.weight[int(rows[3].input_ids[0])] = float("nan")
    monkeypatch.setattr("guidetune.engine.loop.LANE_TOKENS", 1)
    monkeypatch.setattr("guidetune.engine.forward.fast_stack", lambda model, backbone: recognise(backbone))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RunFailed, match=r"the loss is not finite; rows: r\d+"):
            gradients(attached, rows, np.arange(24), TuneSettings(micro_tokens=80), Objective())
    finally:
        torch.set_num_threads(threads)

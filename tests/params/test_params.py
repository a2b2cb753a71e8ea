"""The contract of every way of training, by algebra: identity at the start, the base untouched, fold and delta agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guidetune import registry
from guidetune.errors import BadInput
from guidetune.params import Attached
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 9, 3, 17, 22, 4]])


def attach(name: str, model: torch.nn.Module) -> Attached:
    options = {"rank": 4, "alpha": 8, "dropout": 0.0} if name == "lora" else {}
    return registry.build("params", {"method": name, **options}).attach(model, seed=5)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.clone()


def disturb(attached: Attached, size: float = 0.05) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in attached.trainable().values():
            p.add_(torch.randn(p.shape, generator=g) * size)


@pytest.fixture(params=registry.names("params"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["llama", "phi3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_starts_as_the_identity_and_trains_something(name: str, family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    attached = attach(name, model)
    assert torch.equal(logits(attached.model), before)
    assert attached.trainable() and attached.penalty() is None
    assert sum(len(g["params"]) for g in attached.param_groups(1e-3, 0.0)) == len(attached.trainable())


def test_base_is_the_untouched_model(name: str, family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    attached = attach(name, model)
    disturb(attached)
    after = logits(attached.model)
    assert not torch.allclose(after, before, atol=1e-3)
    with attached.base() as base:
        assert torch.equal(logits(base), before)
    assert torch.equal(logits(attached.model), after)


def test_fold_and_delta_agree_with_the_attached_model(name: str, family: str) -> None:
    attached = attach(name, tiny_model(family))
    disturb(attached)
    expected, delta = logits(attached.model), attached.delta()
    plain = tiny_model(family)
    with torch.no_grad():
        for key, p in plain.named_parameters():
            if key in delta:
                p.add_(delta[key])
    assert set(delta) <= {key for key, _ in plain.named_parameters()}
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(attached.fold()), expected, rtol=1e-4, atol=1e-5)


def test_save_and_load_give_the_same_model(name: str, family: str, tmp_path: Path) -> None:
    attached = attach(name, tiny_model(family))
    disturb(attached)
    attached.save(tmp_path)
    again = attach(name, tiny_model(family))
    again.load(tmp_path)
    assert torch.equal(logits(again.model), logits(attached.model))
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))
    for file in tmp_path.glob("*.safetensors"):
        assert file.stat().st_mode & 0o400


def test_the_seed_alone_decides_the_start(name: str) -> None:
    first = attach(name, tiny_model()).trainable()
    torch.rand(7)  # whatever else draws numbers must not matter
    second = attach(name, tiny_model()).trainable()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_lora_scales() -> None:
    for rslora, factor in ((False, 8 / 4), (True, 8 / 4**0.5)):
        attached = registry.build("params", {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0, "rslora": rslora}).attach(tiny_model())
        disturb(attached)
        weights = attached.trainable()
        key = next(k for k in weights if "q_proj.lora_A" in k)
        delta = factor * weights[key.replace("lora_A", "lora_B")] @ weights[key]
        name = key.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
        torch.testing.assert_close(attached.delta()[name], delta.detach())


def test_bad_options_are_refused_before_work() -> None:
    with pytest.raises(BadInput, match="no_such_layer"):
        registry.build("params", {"method": "lora", "targets": ["no_such_layer"]}).attach(tiny_model())
    with pytest.raises(BadInput, match="head"):
        registry.build("params", {"method": "lora", "targets": ["lm_head", "q_proj"]}).attach(tiny_model())
    for option in ("trainable", "freeze"):
        with pytest.raises(BadInput, match=f"{option}: 'nothing_like_this' matches no parameter"):
            registry.build("params", {"method": "full", option: ["nothing_like_this"]}).attach(tiny_model())
        with pytest.raises(BadInput, match="regular expression"):
            registry.build("params", {"method": "full", option: ["("]})
    with pytest.raises(BadInput, match="leaves no parameter"):
        registry.build("params", {"method": "full", "freeze": [".*"]}).attach(tiny_model())
    with pytest.raises(BadInput, match="float32"):
        registry.build("params", "full").attach(tiny_model().bfloat16())
    with pytest.raises(BadInput, match="did you mean 'rank'"):
        registry.build("params", {"method": "lora", "rnak": 4})

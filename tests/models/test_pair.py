"""The pair check: what does not fit is a problem with its values, the rest a warning or a fact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guidetune.errors import BadInput
from guidetune.models.pair import check_pair, render_doctor
from tests.models.pairs import make_adapter, make_pair, save, tiny_tokenizer
from tests.tiny import ARCHITECTURES, tiny_model


def text_of(report: object) -> str:
    from rich.console import Console

    console = (
        Console(width=160, record=True, file=open("/dev/null", "w")) if Path("/dev/null").exists() else Console(width=160, record=True)
    )
    console.print(render_doctor(report))
    return console.export_text()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_siblings_fit_and_their_distance_is_the_formula(family: str, tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path, family)
    report = check_pair(base, instruct)
    assert report.fits, report.problems
    b, i = (load_file(p / "model.safetensors") for p in (base, instruct))
    gap = sum(float((i[n].double() - b[n].double()).abs().sum()) for n in b)
    size = sum(float(b[n].double().abs().sum() + i[n].double().abs().sum()) for n in b)
    assert report.facts["distance"]["overall"]["sigma"] == pytest.approx(gap / size, rel=1e-5)
    moved = sum(float((i[n].double() - b[n].double()).square().sum()) for n in b)
    norm = sum(float(b[n].double().square().sum()) for n in b)
    assert report.facts["distance"]["overall"]["relative_l2"] == pytest.approx((moved / norm) ** 0.5, rel=1e-5)
    assert {"embeddings", "attention", "mlp", "norms"} <= set(report.facts["distance"]["groups"])
    json.dumps(report.facts)
    shown = text_of(report)
    assert "This pair fits" in shown and "sigma" in shown and "chat template" in shown


def test_every_difference_is_named(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    other = save(tiny_model(hidden_size=48, num_hidden_layers=3, vocab=130, tie_word_embeddings=True), tmp_path / "other")
    report = check_pair(base, other)
    found = "\n".join(report.problems)
    for part in (
        "hidden_size differs: base 32, instruct 48",
        "num_hidden_layers",
        "vocab_size",
        "only the instruct model has",
        "shapes differ",
        "ties",
    ):
        assert part in found
    assert "distance" not in report.facts and "does not fit" in text_of(report)


def test_context_length_is_a_warning_and_rope_a_problem(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    long = save(tiny_model(max_position_embeddings=512), tmp_path / "long")
    report = check_pair(base, long)
    assert report.fits and any("max_position_embeddings" in text for text in report.warnings)
    rope = save(tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), tmp_path / "rope")
    assert any("rope_parameters" in text for text in check_pair(base, rope).problems)


def test_tokens(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path)
    report = check_pair(base, instruct)
    tokens = report.facts["tokenizer"]["template_tokens"]
    assert set(tokens) == {"<|user|>", "<|assistant|>", "<|end|>"} and all(entry["known_to_base"] for entry in tokens.values())
    assert report.facts["tokenizer"]["same_ids"] and report.facts["tokenizer"]["chat_template"] == {"base": False, "instruct": True}
    tiny_tokenizer(extra=("<|tool|>",), template="<|tool|>{{ messages[0]['content'] }}").save_pretrained(instruct)
    report = check_pair(base, instruct)
    assert report.fits
    found = "\n".join(report.warnings)
    assert (
        "1 tokens that the base one lacks: '<|tool|>'" in found and "does not know these tokens of the chat template: '<|tool|>'" in found
    )
    for file in (base / "tokenizer.json", base / "tokenizer_config.json"):
        file.unlink()
    assert any("has no tokenizer" in text for text in check_pair(base, instruct).warnings)


def test_untrained_marker_rows(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path)
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][6] *= 1e-4  # <|end|>
    save_file(tensors, file, metadata={"format": "pt"})
    assert any("never to have trained" in text and "<|end|>" in text for text in check_pair(base, instruct).warnings)


def test_no_template_and_identical_models(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    report = check_pair(base, base)
    assert (
        report.fits
        and any("same weights" in text for text in report.warnings)
        and any("no chat template" in text for text in report.warnings)
    )


def test_far_apart_is_a_warning(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    far = save(tiny_model(seed=77), tmp_path / "far")
    assert any("far apart" in text for text in check_pair(base, far).warnings)


def test_quantised_and_adapter(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(BadInput, match="is an adapter"):
        check_pair(base, adapter)
    path = instruct / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    assert any("quantised (awq)" in text for text in check_pair(base, instruct).problems)


def test_pieces_do_not_change_the_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guidetune.models import pair

    base, instruct = make_pair(tmp_path, dtype=torch.bfloat16)
    whole = check_pair(base, instruct).facts["distance"]["overall"]
    monkeypatch.setattr(pair, "PIECE_VALUES", 64)
    parts = check_pair(base, instruct).facts["distance"]["overall"]
    assert whole == pytest.approx(parts, rel=1e-6)

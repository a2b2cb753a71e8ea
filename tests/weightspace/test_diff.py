"""Two models compared: the numbers against their formulas on whole tensors, planted spectra, adapters as models, refusals, the page."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guidetune import cli
from guidetune.errors import BadInput
from guidetune.weightspace import stages
from guidetune.weightspace.apply import transfer
from guidetune.weightspace.diff import compare, kind_of
from guidetune.weightspace.spectrum import effective_rank
from tests.models.pairs import make_adapter, make_pair, save
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an instruct model, and an adapter trained on the base."""
    root = tmp_path_factory.mktemp("diff")
    base, instruct = make_pair(root)
    return base, instruct, make_adapter(base, root / "adapter")


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_effective_rank_of_planted_spectra(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PIECE_VALUES", 60)  # many pieces, of rows and of columns
    monkeypatch.setattr("guidetune.weightspace.spectrum.PIECE_VALUES", 60)
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 12, dtype=torch.float64))[0] for n in shape)
    for spectrum in ([1.0] * 12, [3.0] + [0.0] * 11, [4.0, 2.0, 2.0, 1.0] + [0.0] * 8, [2.0**-i for i in range(12)]):
        matrix = (u @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ v.T).float()
        p = [s / sum(spectrum) for s in spectrum if s]
        expected = math.exp(-sum(x * math.log(x) for x in p))
        assert effective_rank(lambda a, b, m=matrix: m[a:b], shape) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(lambda a, b: torch.zeros(b - a, shape[1]), shape) == 0.0


def test_numbers_are_those_of_the_formulas(three: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, adapter = three
    transfer(adapter, base, tmp_path / "tuned")
    whole = compare(tmp_path / "tuned", instruct, base)
    monkeypatch.setattr(stages, "PIECE_VALUES", 64)
    pieces = compare(adapter, instruct, base)  # an adapter is the model that it makes of its base
    m, a, b = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "tuned", instruct))
    for one, other in zip(whole.tensors, pieces.tensors, strict=True):
        x, y = a[one["name"]] - m[one["name"]], b[one["name"]] - m[one["name"]]
        expected = {
            "norm_a": x.norm(), "norm_b": y.norm(), "norm_difference": (x - y).norm(), "relative_b": y.norm() / m[one["name"]].norm(),
        }  # fmt: skip
        if x.any():
            expected["cosine"] = torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)
            both = (x != 0) & (y != 0)
            expected["sign_agreement"] = ((x.sign() == y.sign()) & both).sum() / both.sum()
        for key, value in expected.items():
            assert one[key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (one["name"], key)
            assert other[key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (one["name"], key)
        assert not x.any() or 1 <= one["rank_a"] <= 4.01  # the adapter's rank is 4
    total = math.sqrt(sum(float((b[name] - m[name]).norm()) ** 2 for name in m))
    assert whole.all["norm_b"] == pytest.approx(total, rel=1e-5)
    for groups in (whole.layers, whole.kinds):
        assert math.sqrt(sum(group["norm_b"] ** 2 for group in groups)) == pytest.approx(total, rel=1e-5)
        assert sum(group["tensors"] for group in groups) == len(m) == whole.all["tensors"]
    assert [group["layer"] for group in whole.layers] == [None, 1, 2]


def test_a_model_and_itself(three: tuple[Path, Path, Path]) -> None:
    found = compare(three[0], three[0], rank="none")
    assert found.all["norm_difference"] == 0 == found.all["changed"] and found.all["cosine"] == pytest.approx(1)
    assert found.all["sign_agreement"] == 1 and all(tensor["rank_difference"] is None for tensor in found.tensors)
    assert kind_of("model.layers.3.mlp.down_proj.weight") == "mlp.down_proj" and kind_of("model.embed_tokens.weight") == "embed_tokens"


def test_refusals_and_what_is_left_out(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, _ = three
    with pytest.raises(BadInput, match="llama model and .* a qwen2 model"):
        compare(base, save(tiny_model("qwen2"), tmp_path / "qwen"))
    with pytest.raises(BadInput, match="not one of auto, exact, none"):
        compare(base, instruct, rank="fast")  # type: ignore[arg-type]
    large = compare(base, save(tiny_model(vocab=140), tmp_path / "large"))
    assert "shapes differ: [128, 32], [140, 32]" in large.left_out["model.embed_tokens.weight"] and large.tensors
    tied = compare(base, save(tiny_model(tie_word_embeddings=True), tmp_path / "tied"))
    assert "lm_head.weight" not in tied.left_out  # the tied model's head is its embedding
    broken = tmp_path / "broken"
    shutil.copytree(instruct, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"model\.norm\.weight of .*broken holds values that are not finite"):
        compare(base, broken, base)


def test_the_command(three: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct, adapter = (str(path) for path in three)
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", "diff", adapter, instruct, "--base", base, "--out", str(tmp_path / "d"), "--json", str(tmp_path / "d.json")])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "mlp.down_proj" in shown and "outside the layers" in shown and "diff.html" in shown
    found = json.loads((tmp_path / "d.json").read_text())
    assert found == json.loads((tmp_path / "d/diff.json").read_text()) and found["base"] == base
    page = (tmp_path / "d/diff.html").read_text()
    assert page.count("<svg") == 2 and "://" not in page and "aria-labelledby" in page
    assert (tmp_path / "d/tensors.csv").read_text().splitlines()[0].startswith("name,layer,kind,shape,norm_a")
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", "diff", base, str(tmp_path / "nothing")])
    assert left.value.code == 2

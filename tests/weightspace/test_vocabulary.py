"""Models of different vocabularies: rows go by token; what each kind of tokenizer, source and fault gives."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from guidetune.errors import BadInput
from guidetune.models.loading import load_model, load_tokenizer
from guidetune.weightspace.plan import merge, parse_plan, preview
from guidetune.weightspace.vocabulary import gather
from tests.models.pairs import make_adapter
from tests.tiny import tiny_model
from tests.weightspace.mergekit import UNION, VOCABULARY, rows_of, union_plan, vocabularies, written


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return vocabularies(tmp_path_factory.mktemp("vocabulary"))


def plan_text(models: dict[str, Path], **more: Any) -> str:
    sources = [{"model": str(models["one"]), "weight": 0.5}, {"model": str(models["two"]), "weight": 0.25}]
    return yaml.safe_dump({"anchor": str(models["anchor"]), "sources": sources, **more})


@cache
def contents(folder: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    return load_tokenizer(str(folder)).get_vocab(), load_file(folder / "model.safetensors")


def row(folder: Path, name: str, token: str) -> torch.Tensor | None:
    vocabulary, tensors = contents(folder)
    return tensors[name][vocabulary[token]].float() if token in vocabulary else None


def expected(models: dict[str, Path], name: str, token: str) -> torch.Tensor:
    a, *others = (row(models[key], name, token) for key in ("anchor", "one", "two"))
    known = [other for other in others if other is not None]
    start = a if a is not None else sum(known) / len(known)
    return start + sum(w * (other - start) for w, other in zip((0.5, 0.25), others, strict=True) if other is not None)


@pytest.mark.parametrize("kind", ["base", "union"])
def test_rows_follow_their_tokens(three: dict[str, Path], tmp_path: Path, kind: str) -> None:
    plan = parse_plan(plan_text(three, tokenizer=kind))
    assert "added to" in preview(plan)
    out = merge(plan, tmp_path / "out").path
    tokenizer, tensors = load_tokenizer(str(out)), load_file(out / "model.safetensors")
    anchor = load_tokenizer(str(three["anchor"]))
    new = {"<b>": 103, "<c>": 104} if kind == "union" else {}
    assert tokenizer.get_vocab() == anchor.get_vocab() | new and tokenizer.chat_template == anchor.chat_template
    assert tokenizer("x<b>y").input_ids == (anchor("x").input_ids + [103] + anchor("y").input_ids if new else anchor("x<b>y").input_ids)
    assert load_model(str(out), dtype="float32", device="cpu").config.vocab_size == 103 + len(new)
    for name in VOCABULARY:
        assert tensors[name].shape[0] == 103 + len(new)
        for token, number in tokenizer.get_vocab().items():
            torch.testing.assert_close(tensors[name][number], expected(three, name, token), rtol=0, atol=1e-6)
    # everything else is merged as without
    for name in set(tensors) - set(VOCABULARY):
        w, a, b = (load_file(three[key] / "model.safetensors")[name] for key in ("anchor", "one", "two"))
        torch.testing.assert_close(tensors[name], w + 0.5 * (a - w) + 0.25 * (b - w), rtol=0, atol=1e-6)


def test_a_source_alone_gives_its_own_rows(three: dict[str, Path], tmp_path: Path) -> None:
    text = yaml.safe_dump(
        {"anchor": str(three["anchor"]), "sources": [{"model": str(three["one"])}], "tokenizer": "union", "method": "ties"}
    )
    out = merge(parse_plan(text.replace("method: ties", "method: {method: ties, density: 1.0}")), tmp_path / "out").path
    for token in ("<a>", "<b>", "q"):
        torch.testing.assert_close(row(out, VOCABULARY[1], token), row(three["one"], VOCABULARY[1], token), rtol=0, atol=1e-6)


def test_tied_embeddings_and_16_bits(tmp_path: Path) -> None:
    models = {
        name: written(tmp_path / name, 104, seed, extra, torch.bfloat16, tie_word_embeddings=True)
        for seed, (name, extra) in enumerate({"anchor": ("<a>",), "one": ("<b>", "<a>"), "two": ("<b>",)}.items())
    }
    out = merge(parse_plan(plan_text(models, tokenizer="union")), tmp_path / "out")
    tensors = load_file(out.path / "model.safetensors")
    assert "lm_head.weight" not in tensors and not out.result["untied"] and tensors[VOCABULARY[0]].dtype == torch.bfloat16
    for token in ("<a>", "<b>", "z"):  # the anchor's part of a new row is stored in 16 bits before the update is added
        torch.testing.assert_close(row(out.path, VOCABULARY[0], token), expected(models, VOCABULARY[0], token), rtol=2**-7, atol=1e-3)


def bpe(folder: Path, merges: list[tuple[str, str]], seed: int) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["</s>", *"abcdef", *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tiny_model(vocab=len(tokens), seed=seed).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return folder


def test_ordinary_tokens_join_with_their_merges(tmp_path: Path) -> None:
    anchor = bpe(tmp_path / "anchor", [("a", "b"), ("c", "d")], 0)
    other = bpe(tmp_path / "other", [("c", "d"), ("a", "b"), ("ab", "cd")], 1)
    text = yaml.safe_dump({"anchor": str(anchor), "sources": [{"model": str(other)}]})
    with pytest.raises(BadInput, match="vocabularies of 10 and 9 tokens; .*tokenizer: union"):
        merge(parse_plan(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = merge(parse_plan(text + "tokenizer: union\n"), tmp_path / "out").path
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcdabe").input_ids) == ["abcd", "ab", "e"]
    torch.testing.assert_close(row(out, VOCABULARY[0], "abcd"), row(other, VOCABULARY[0], "abcd"), rtol=0, atol=1e-6)
    torch.testing.assert_close(row(out, VOCABULARY[0], "ab"), row(other, VOCABULARY[0], "ab"), rtol=0, atol=1e-6)


def test_mergekits_way_of_saying_it(three: dict[str, Path], tmp_path: Path) -> None:
    plan = union_plan(three)
    out = merge(parse_plan(yaml.safe_dump(plan)), tmp_path / "out").path
    for name, values in json.loads(UNION.read_text()).items():  # as mergekit 0.1.5 gave them
        for token, first in rows_of(out, name).items():
            assert first == pytest.approx(values[token], rel=3e-7, abs=3e-7)
    del plan["tokenizer_source"]
    for said in ({"tokenizer_source": "union"}, {"tokenizer": {"source": "union"}}):
        assert parse_plan(yaml.safe_dump(plan | said)).tokenizer == "union"
    assert parse_plan(yaml.safe_dump(plan)).tokenizer is None
    for said, words in (
        ({"tokenizer": {"source": "union", "tokens": {}}}, "tokenizer.tokens is not supported"),
        ({"tokenizer": {"source": "base", "pad_to_multiple_of": 8}}, "pad_to_multiple_of is not supported"),
        ({"tokenizer_source": "some/model"}, "base or union"),
        ({"chat_template": "chatml"}, "the base model's is kept"),
    ):
        with pytest.raises(BadInput, match=words):
            parse_plan(yaml.safe_dump(plan | said))


def test_refusals(three: dict[str, Path], tmp_path: Path) -> None:
    moved = written(tmp_path / "moved", 103, 4, ("<a>",))
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["p"], words["q"] = words["q"], words["p"]
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    for change, words in (
        ({}, r"embed_tokens.weight is \[112, 32\] and \[103, 32\]"),
        ({"sources": [{"model": str(moved)}]}, "have other vocabularies .2 tokens have different ids, .*tokenizer: union"),
        ({"tokenizer": "both"}, "tokenizer"),
        ({"tokenizer": "union", "write": "delta"}, "leave it out"),
        ({"tokenizer": "union", "sources": [{"model": str(three["one"]), "minus": str(three["two"])}]}, "leave `minus` out"),
    ):
        with pytest.raises(BadInput, match=words):
            merge(parse_plan(plan_text(three, **change)), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    bare = written(tmp_path / "bare", 103, 3, ())
    (bare / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        merge(parse_plan(plan_text({**three, "two": bare}, tokenizer="union")), tmp_path / "out")


def test_rows_in_another_order() -> None:
    table = torch.arange(20.0).view(10, 2)
    order = torch.tensor([3, 4, 5, -1, 0, 1, -1, -1, 9, 2])
    found = gather(lambda a, b: table[a:b], order, (2,))
    for new, old in enumerate(order.tolist()):
        assert found[new].tolist() == (table[old].tolist() if old >= 0 else [0, 0])


def test_stored_deltas_and_models_with_adapters(three: dict[str, Path], tmp_path: Path) -> None:
    base, instruct = (written(tmp_path / name, 103, seed, ("<a>",)) for seed, name in enumerate(("base", "instruct")))
    adapter = make_adapter(base, tmp_path / "adapter")
    text = {"anchor": str(base), "sources": [{"adapter": str(adapter)}, {"model": str(instruct), "weight": 0.5}], "method": "ties"}
    whole = merge(parse_plan(yaml.safe_dump(text)), tmp_path / "whole").path
    merge(parse_plan(yaml.safe_dump({**text, "write": "delta", "max_shard": "20KB"})), tmp_path / "delta")
    stored = yaml.safe_dump({"anchor": str(base), "sources": [{"delta": str(tmp_path / "delta")}]})
    again = merge(parse_plan(stored), tmp_path / "again").path
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(again / "model.safetensors")[name], value)
    with pytest.raises(BadInput, match="not a finished delta folder"):
        merge(parse_plan(stored.replace("/delta", "/adapter")), tmp_path / "x")
    next((tmp_path / "delta").glob("delta-*.safetensors")).unlink()
    with pytest.raises(BadInput, match="is incomplete"):
        merge(parse_plan(stored), tmp_path / "x")
    assert "delta-" in str(sorted((tmp_path / "delta").iterdir())) and json.loads((again / "transfer.json").read_text())
    # a model that is a base with an adapter: as its merged self
    tuned = merge(
        parse_plan(yaml.safe_dump({"anchor": str(instruct), "sources": [{"adapter": str(adapter), "of": str(base)}]})), tmp_path / "t"
    )
    parts = {
        str(adapter): {"model": str(adapter)},  # on the base it records
        f"{instruct}+{adapter}": {"model": f"{instruct}+{adapter}"},
    }
    for spec, part in parts.items():
        done = merge(
            parse_plan(yaml.safe_dump({"anchor": str(base), "sources": [part], "allow_mismatch": True})), tmp_path / f"o{len(spec)}"
        )
        got = load_file(done.path / "model.safetensors")
        start, lora = load_file(base / "model.safetensors"), load_file(tuned.path / "model.safetensors")
        own = load_file(instruct / "model.safetensors")
        for name in got:
            wanted = lora[name] if "+" in spec else start[name] + lora[name] - own[name]
            torch.testing.assert_close(got[name], wanted, rtol=0, atol=2e-6)

"""The merge plan: what it means, and that every fault in it is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from guidetune.errors import BadInput
from guidetune.weightspace.plan import AdapterSource, MergePlan, ModelSource, merge, parse_plan
from tests.models.pairs import make_adapter, make_pair, save
from tests.tiny import tiny_model

GOOD = """\
anchor: world:instruct
sources:
  - {adapter: runs/x/adapter, of: world:base, weight: 0.5}
  - {model: M, minus: B}
method: task_arithmetic
out_dtype: float32
"""


def test_the_documented_plan() -> None:
    plan = parse_plan(GOOD)
    assert plan.sources[0] == AdapterSource(adapter="runs/x/adapter", of="world:base", weight=0.5)
    assert plan.sources[1] == ModelSource(model="M", minus="B", weight=1.0)
    assert plan.method.name == "task_arithmetic" and plan.out_dtype == "float32"
    assert parse_plan("anchor: a\nsources: [{adapter: b}]\n").method.name == "sum"
    assert parse_plan("anchor: a\nsources: [{adapter: b}]\nmethod: {method: task_arithmetic, scale: 0.4}").method.scale == 0.4


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "anchor: a\nsources: [{adapter: b}]\nmethod: task_arithmetics",
            r"plan:3: method: no merge method 'task_arithmetics' \(did you mean 'task_arithmetic'\?\)",
        ),
        ("anchor: a\nsources: [{adapter: b}]\nmethod: {method: sum, scale: 2}", r"plan:3: method.*unknown key|plan:3: method.*scale"),
        (
            "anchor: a\nsources:\n- {adapter: b}\n- {adapter: c, wieght: 2}",
            r"plan:4: sources\.1\.wieght: unknown key; did you mean weight\?",
        ),
        ("anchor: a\nsources:\n- {adapter: b, weight: heavy}", r"plan:3: sources\.0\.weight: .*'heavy'"),
        ("anchor: a\nsources:\n- {minus: b}", r"plan:3: sources\.0\.model: Field required"),
        ("anchor: a\nsources:\n- {weight: 2}", "either adapter, or model and minus"),
        ("anchor: a\nsources:\n- {adapter: b, weight: .nan}", r"sources\.0\.weight"),
        ("anchor: a\nsources: []", "sources"),
        ("sources: [{adapter: b}]\nancor: a", r"plan:1: anchor: Field required"),
        ("sources: [{adapter: b}]\nancor: a", r"plan:2: ancor: unknown key; did you mean anchor\?"),
        ("anchor: a\nsources: [{adapter: b}]\nmethod: {method: []}", r"plan:3: method: .*name of a merge method, not list"),
        ("anchor: [", "not valid YAML"),
        ("- a", "mapping"),
        ("", "mapping"),
    ],
)
def test_faults_have_lines(text: str, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        parse_plan(text)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from(["anchor", "sources", "method", "adapter", "model", "minus", "weight", "x"]), x, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_document_is_a_plan_or_bad_input(data: object) -> None:
    try:
        assert isinstance(parse_plan(yaml.safe_dump(data)), MergePlan)
    except BadInput as error:
        assert error.problems and all(problem.startswith("plan") for problem in error.problems)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_plan_or_bad_input(text: str) -> None:
    try:
        parse_plan(text)
    except BadInput as error:
        assert error.problems


def test_merge_is_anchor_plus_weighted_deltas(tmp_path: Path) -> None:
    base, instruct = make_pair(tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter")
    tuned = save(tiny_model(seed=4), tmp_path / "tuned")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "anchor: instruct\nsources:\n- {adapter: adapter, of: base, weight: 0.5}\n- {model: tuned, minus: base, weight: -0.25}\n"
        "method: {method: task_arithmetic, scale: 2.0}\n"
    )
    result = merge(plan, tmp_path / "out")
    assert result.result["verification"]["relative_logit_difference"] < 1e-4
    i, b, t, out = (load_file(p / "model.safetensors") for p in (instruct, base, tuned, tmp_path / "out"))
    lora = load_file(adapter / "adapter_model.safetensors")
    for name in i:
        expected = i[name].double() + 2.0 * -0.25 * (t[name] - b[name]).double()
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in lora:
            expected += 2.0 * 0.5 * 2.0 * (lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double())
        torch.testing.assert_close(out[name].double(), expected, rtol=1e-5, atol=2e-6)


def test_all_missing_sources_are_named(tmp_path: Path) -> None:
    _, instruct = make_pair(tmp_path)
    with pytest.raises(BadInput) as caught:
        merge(MergePlan(anchor=str(instruct), sources=[{"adapter": "./a"}, {"model": "./b", "minus": str(instruct)}]), tmp_path / "out")
    assert len(caught.value.problems) == 2 and not (tmp_path / "out").exists()

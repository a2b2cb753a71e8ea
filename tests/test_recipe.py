"""Recipes: what is read, what is refused and in which words, and what an arm changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guidetune import recipe as recipes
from guidetune import registry
from guidetune.errors import BadInput
from guidetune.recipe import ARMS, DEFAULT_ARMS, Recipe, arms, evaluation, from_mapping, load, parse, shape

ROOT = Path(__file__).resolve().parent.parent
SMALL = """\
models: {base: world:base, instruct: world:instruct}
data:
  train:
    - {path: rows.jsonl, map: {user: question, assistant: answer}}
tune:
  on: base
  weights: [gift]
evaluate:
  task: [{method: gsm8k, path: test.jsonl}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("rows.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"question": "1+1?", "answer": "#### 2"}\n', encoding="utf-8")
    return tmp_path


def problems(text: str, root: Path, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(BadInput) as caught:
        parse(text, "r.yaml", root, overrides or [])
    return caught.value.problems


def one(text: str, root: Path, overrides: list[str] | None = None) -> str:
    found = problems(text, root, overrides)
    assert len(found) == 1, found
    return found[0]


# What is read


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_parses_and_has_all_default_arms(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    assert shape(recipe) == "gift" or not path.stem.startswith(("gift", "world"))
    assert set(arms(recipe)) == set(DEFAULT_ARMS) and all(arms(recipe, list(recipe.arms) or ["gift"]).values())


def test_the_demo_recipe_parses_where_its_rows_were_exported(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    for name in ("arithmetic", "knowledge"):
        (tmp_path / "world" / f"{name}.train.jsonl").write_text("{}\n", encoding="utf-8")
    text = (ROOT / "guidetune" / "world" / "demo.yaml").read_text(encoding="utf-8")
    assert shape(parse(text, "demo.yaml", tmp_path)) == "gift"


def test_defaults_are_those_of_gift(folder: Path) -> None:
    recipe = parse(SMALL, "small.yaml", folder)
    tune = recipe.tune
    assert recipe.name == "small" and tune is not None
    assert (tune.lr, tune.epochs, tune.batch, tune.max_length, tune.warmup) == (2e-4, 1, 256, 2048, 0.1)
    assert (tune.schedule, tune.clip, tune.seed, tune.reducer, recipe.seed) == ("linear", 1.0, 42, "weights", 42)
    assert (tune.params.name, tune.params.rank, tune.params.alpha) == ("lora", 64, 128)
    gift = tune.weights[0]
    assert (gift.name, gift.power, gift.floor, gift.eos_weight) == ("gift", 1.0, 1e-4, "teacher")
    assert recipe.transfer is not None and recipe.transfer.into == "instruct"


def test_plain_tuning_reduces_over_tokens_and_dft_keeps_its_own_reducer(folder: Path) -> None:
    assert parse(SMALL, root=folder, overrides=["tune.weights=[]"]).tune.reducer == "tokens"
    assert parse(SMALL, root=folder, overrides=["tune.weights=[dft]"]).tune.reducer == "tokens"
    assert parse(SMALL, root=folder, overrides=["tune.reducer=sequence"]).tune.reducer == "sequence"


def test_yaml_words_and_numbers_are_read_as_written(folder: Path) -> None:
    text = SMALL.replace("  weights: [gift]\n", "  weights: [gift]\n  lr: 2e-4\n  epochs: 1\n  warmup: .1\n")
    recipe = parse(text + "description: no\n", root=folder)
    assert recipe.tune.lr == 2e-4 and recipe.tune.warmup == 0.1
    assert recipe.tune.on == "base"  # YAML 1.1 would make the key `on` true
    assert recipe.description == "no"  # and this false


def test_lengths_and_seeds_have_one_value(folder: Path) -> None:
    both = parse(SMALL, root=folder, overrides=["data.max_length=64", "seed=7"])
    assert both.tune.max_length == both.data.max_length == 64 and both.tune.seed == 7
    assert parse(SMALL, root=folder, overrides=["tune.max_length=64"]).data.max_length == 64
    assert parse(SMALL, root=folder, overrides=["tune.seed=9", "seed=7"]).tune.seed == 9
    assert "tune.max_length says 32" in one(SMALL, folder, ["data.max_length=64", "tune.max_length=32"])


def test_the_resolved_recipe_runs_again_from_anywhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = parse(SMALL, "small.yaml", folder, ["tune.weights.0.power=2", "arms={soft: {tune.lr: 1e-5}}"])
    text = first.resolved_yaml()
    again = parse(text, "recipe.yaml", tmp_path_factory.mktemp("elsewhere"))
    assert again.model_dump() == first.model_dump()
    assert again.resolved_yaml() == text
    assert yaml.safe_load(text)["tune"]["on"] == "base"  # other YAML readers see the same keys
    # The stored default reducer is not taken for a choice when the weights change.
    assert arms(again, ["dft", "gift"])["dft"].tune.reducer == "tokens"
    assert arms(again, ["soft"])["soft"].tune.lr == 1e-5


def test_model_folders_beside_the_recipe_become_absolute(folder: Path) -> None:
    (folder / "mine").mkdir()
    recipe = parse(SMALL.replace("base: world:base", "base: mine"), root=folder)
    assert recipe.models.base == str(folder / "mine") and recipe.models.instruct == "world:instruct"


def test_a_recipe_from_plain_values(folder: Path) -> None:
    recipe = from_mapping(yaml.safe_load(SMALL.replace("on: base", "'on': base")), folder)
    assert shape(recipe) == "gift"
    with pytest.raises(BadInput, match="models: is missing"):
        from_mapping({"data": {"train": [str(folder / "rows.jsonl")]}})


def test_recipe_sections_do_not_drift_from_the_stages_settings() -> None:
    from guidetune.data.prepare import PrepareSettings
    from guidetune.guidance.teach import GuideSettings
    from guidetune.objectives.reduce import REDUCERS

    for section, stage in ((recipes.Guide, GuideSettings), (recipes.Data, PrepareSettings)):
        for name, info in stage.model_fields.items():
            # the recipe has one seed, one length for data and tune, names scores, and its rows have answers
            if name in ("seed", "max_length", "keep", "unlabelled"):
                continue
            assert section.model_fields[name].default == info.default, name
            assert section.model_fields[name].annotation == info.annotation, name
    assert set(recipes.Reducer.__args__) == set(REDUCERS)


# What is refused, with its line, its value and the nearest name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("on: base", "on: bas"), "r.yaml:6: tune.on = 'bas': must be 'base' or 'instruct' (did you mean 'base'?)"),
        (("on: base", "lrr: 1"), "r.yaml:6: tune.lrr = 1: unknown key (did you mean 'lr'?)"),
        (("on: base", "lr: fast"), "r.yaml:6: tune.lr = 'fast': must be a valid number"),
        (("on: base", "lr: .nan"), "r.yaml:6: tune.lr = nan: must be a finite number"),
        (("on: base", "epochs: true"), "r.yaml:6: tune.epochs = True: must be a valid number"),
        (("on: base", "batch: 1.5"), "r.yaml:6: tune.batch = 1.5: must be a valid integer"),
        (("on: base", "betas: [0.9, 1.5]"), "r.yaml:6: tune.betas.1 = 1.5: must be less than 1"),
        (("on: base", "params: {rnk: 8}"), "r.yaml:6: tune.params.rnk = 8: unknown option of lora (did you mean 'rank'?)"),
        (("on: base", "params: lorra"), "r.yaml:6: tune.params = 'lorra': unknown params (did you mean 'lora'?)"),
        (("[gift]", "[gfit]"), "r.yaml:7: tune.weights.0 = 'gfit': unknown token_weights (did you mean 'gift'?)"),
        (("[gift]", "[{method: gift, power: -1}]"), "r.yaml:7: tune.weights.0.power = -1: must be greater than or equal to 0"),
        (("{method: gsm8k, path: test.jsonl}", "gsm8k"), "r.yaml:9: evaluate.task.0: gsm8k needs the option 'path'"),
        (("tune:", "tun:"), "r.yaml:5: tun = {'on': 'base', 'weights': ['gift']}: unknown key (did you mean 'tune'?)"),
        (("base: world:base, ", ""), "r.yaml:1: models.base: is missing"),
        (("assistant: answer", "assistant: answer, asistant: x"), "did you mean 'assistant'?"),
    ],
)
def test_one_fault_one_line(folder: Path, change: tuple[str, str], expected: str) -> None:
    assert expected in one(SMALL.replace(*change), folder)


def test_missing_files_are_found_before_anything_starts(folder: Path) -> None:
    found = problems(SMALL.replace("rows.jsonl", "row.jsonl").replace("test.jsonl", "tset.jsonl"), folder)
    assert [p.split(": ")[0] for p in found] == ["r.yaml:4", "r.yaml:9"]
    assert "data.train.0.path = 'row.jsonl'" in found[0] and "did you mean 'rows.jsonl'" in found[0]
    assert "evaluate.task.0.path = 'tset.jsonl'" in found[1] and "did you mean 'test.jsonl'" in found[1]


def test_all_faults_come_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = SMALL.replace("base: world:base", "bse: world:base").replace("on: base", "on: bas")
    text = text.replace("[gift]", "[gfit, {method: gift, powr: 2}]")
    text = text.replace("test.jsonl", "none.jsonl") + "arms:\n  hot: {tune.lr: -1}\n  cold: {tune: {epoch: 2}}\n"
    found = problems(text, folder, ["tune.batchh=3"])
    assert len(found) == 9, found
    lines = [int(p.split(":")[1]) for p in found[:-1]]
    assert lines == sorted(lines)
    assert found[-1] == "--set: tune.batchh = 3: unknown key (did you mean 'batch'?)"
    assert "r.yaml:11: tune.lr = -1: must be greater than 0 (arm hot)" in found
    assert "r.yaml:12: tune.epoch = 2: unknown key (did you mean 'epochs'?) (arm cold)" in found


def test_a_key_given_twice_is_refused_with_both_lines(folder: Path) -> None:
    assert one(SMALL + "tune: {lr: 1}\n", folder) == "r.yaml:10: tune: the same key twice, first at r.yaml:5; keep one"


# Ten lists, each of nine aliases of the one before: 9^10 values when written out.
BOMB = b"a: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 108))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n- b\n", "holds a list"),
        (b"hello", "holds the text 'hello'"),
        (b"a: [1, 2\nb: 3\n", "not valid YAML"),
        (b"name: \xff\xfe", "byte 0xff is not UTF-8"),
        (b"name: a\x00b", "not allowed in YAML"),
        (b"x: " + b"[" * 5000, "not valid YAML"),
        (b"x: " + b"[" * 60 + b"]" * 60, "levels"),
        (BOMB, "not a recipe"),
        (b"a: &a [*a]\n", "not a recipe"),
        (b"name: !!python/object/apply:os.system [ls]\n", ""),
        (b"#" * (300 * 1024), "KB"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, raw: bytes, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(BadInput) as caught:
        load(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_places_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "gift.yaml").write_text(SMALL, encoding="utf-8")
    with pytest.raises(BadInput, match="did you mean 'gift.yaml'"):
        load(tmp_path / "gfit.yaml")
    with pytest.raises(BadInput, match="is a folder"):
        load(tmp_path)
    with pytest.raises(BadInput):
        load("nul\0byte.yaml")


# --set


def test_overrides_reach_every_place(folder: Path) -> None:
    recipe = parse(
        SMALL,
        "r.yaml",
        folder,
        [
            "tune.lr=1e-4",
            "tune.weights.0.power=2",
            "evaluate.task.0.limit=10",
            "evaluate.task.1={method: world, set: general}",
            "tune.params.rank=8",
            "guide.batch_tokens=100",
        ],
    )
    assert (recipe.tune.lr, recipe.tune.weights[0].power, recipe.evaluate.task[0].limit) == (1e-4, 2, 10)
    assert [task.name for task in recipe.evaluate.task] == ["gsm8k", "world"]
    assert recipe.tune.params.rank == 8 and recipe.guide.batch_tokens == 100
    assert parse(SMALL, root=folder, overrides=["tune="]).tune is None


def test_a_path_in_an_override_starts_at_the_working_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.chdir(here)
    assert parse(SMALL, root=folder).data.train[0].path == str(folder / "rows.jsonl")
    assert parse(SMALL, root=folder, overrides=["data.train.0.path=rows.jsonl"]).data.train[0].path == str(here / "rows.jsonl")
    assert parse(SMALL, root=folder, overrides=["data.train.0.path=test.jsonl"]).data.train[0].path == str(folder / "test.jsonl")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tune.lr", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("tune..lr=3", "write it as key=value"),
        ("tune.lr=[1", "not valid YAML"),
        ("tune.lr=fast", "--set: tune.lr = 'fast': must be a valid number"),
        ("tune.weights.3=gift", "tune.weights has 1 items; the next one is tune.weights.1, not 3"),
        ("tune.weights.first=gift", "tune.weights is a list of 1"),
        ("tune.on.x=1", "tune.on is 'base', which has no 'x' in it"),
        ("modles.base=x", "unknown key (did you mean 'models'?)"),
    ],
)
def test_overrides_that_lead_nowhere(folder: Path, override: str, expected: str) -> None:
    assert expected in "\n".join(problems(SMALL, folder, [override]))


# Arms


def test_an_arm_changes_what_its_row_says_and_nothing_else(folder: Path) -> None:
    recipe = parse(SMALL, root=folder, overrides=["tune.weights.0.power=3", "tune.lr=5e-5", "seed=3"])
    for name, made in arms(recipe, list(ARMS)).items():
        allowed = {"description", *(key.split(".")[0] for key in ARMS[name].changes)}
        before, after = recipe.model_dump(), made.model_dump()
        assert {key for key in before if before[key] != after[key]} <= allowed, name
        if made.tune is not None:
            changed = {key for key in before["tune"] if before["tune"][key] != after["tune"][key]}
            assert changed <= {"on", "weights", "reducer"}, name


def test_the_four_arms_of_the_paper(folder: Path) -> None:
    made = arms(parse(SMALL, root=folder, overrides=["tune.weights.0.power=3"]), DEFAULT_ARMS)
    assert made["instruct"].tune is None
    assert [(a.tune.on, [w.name for w in a.tune.weights], a.tune.reducer) for a in (made["sft"], made["graft"], made["gift"])] == [
        ("instruct", [], "tokens"),
        ("base", [], "tokens"),
        ("base", ["gift"], "weights"),
    ]
    assert made["gift"].tune.weights[0].power == 3  # the recipe's own options stay
    plain = arms(parse(SMALL, root=folder, overrides=["tune.weights=[]", "tune.on=instruct"]), ["gift"])["gift"]
    assert (plain.tune.on, plain.tune.weights[0].power, plain.tune.reducer) == ("base", 1.0, "weights")


def test_a_recipes_own_arms(folder: Path) -> None:
    text = SMALL + "arms:\n  gentle: {description: slow, tune.lr: 5e-5, tune: {epochs: 2}}\n"
    text += "  gift: {tune.weights: [{method: gift, power: 2}]}\n"
    made = arms(parse(text, root=folder), ["gentle", "gift"])
    assert (made["gentle"].tune.lr, made["gentle"].tune.epochs, made["gentle"].description) == (5e-5, 2, "slow")
    assert made["gift"].tune.weights[0].power == 2  # the recipe's arm comes before the built-in one


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["gfit"], "unknown arm 'gfit' (did you mean 'gift'?)"), ([], "name at least one"), (["sft", "sft"], "'sft' is named twice")],
)
def test_arms_that_cannot_be(folder: Path, names: list[str], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        arms(parse(SMALL, root=folder), names)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ARMS)
def test_every_built_in_arm_is_recognised_by_its_shape(folder: Path, name: str) -> None:
    assert shape(arms(parse(SMALL, root=folder), [name])[name]) == name


def test_every_built_in_arm_names_methods_that_exist() -> None:
    for name, arm in ARMS.items():
        for spec in arm.changes.get("tune.weights", []):
            assert registry.build("token_weights", spec), name


# The eval verb's tasks


def test_tasks_of_a_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    section = evaluation(["gsm8k:path=test.jsonl,limit=5,{method: world, set: general, label: w}"], None, ["limit=7", "task.0.label=g"])
    assert [(t.name, t.label) for t in section.task] == [("gsm8k", "g"), ("world", "w")]
    assert section.task[0].limit == 5 and section.limit == 7
    assert Path(evaluation(["gsm8k"], Path("test.jsonl")).task[0].path) == folder / "test.jsonl"


def test_task_data_from_a_folder(folder: Path) -> None:
    (folder / "medmcqa.jsonl").write_text("{}\n", encoding="utf-8")
    (folder / "gsm8k").mkdir()
    (folder / "test.jsonl").rename(folder / "gsm8k" / "test.jsonl")
    section = evaluation(["gsm8k,medmcqa"], folder)
    assert [Path(task.path).relative_to(folder).as_posix() for task in section.task] == ["gsm8k/test.jsonl", "medmcqa.jsonl"]


@pytest.mark.parametrize(
    ("tasks", "overrides", "expected"),
    [
        (["gsm8"], [], "did you mean 'gsm8k'?"),
        ([], [], "name at least one"),
        (["gsm8k"], [], "gsm8k needs the option 'path'"),
        (["gsm8k:path"], [], "write an option as"),
        (["{method: gsm8k, path: nowhere.jsonl, lmit: 3}"], [], "did you mean 'limit'?"),
        (["{method: world, set: general}"], ["limt=3"], "did you mean 'limit'?"),
    ],
)
def test_tasks_that_cannot_be(folder: Path, tasks: list[str], overrides: list[str], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        evaluation(tasks, None, overrides)
    assert expected in str(caught.value)


# Whatever is in the file: a recipe or BadInput, never another exception

WORDS = """name models base instruct data train path tune on weights params lr betas evaluate task arms method gift seed max_length
    transfer into << no 1 a.b tune.lr""".split()
KEYS = st.sampled_from([*WORDS, ""])
VALUES = st.sampled_from(["rows.jsonl", "world:base", "~x", "\0", "lora"])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), KEYS, VALUES)
PLACES = "tune tune.weights tune.params data.train data models evaluate.task arms arms.x arms.x.tune.weights".split()
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25)
PATIENT = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def survives(text: str, root: Path, overrides: tuple[str, ...] = ()) -> None:
    try:
        made = parse(text, "r.yaml", root, overrides)
    except BadInput as error:
        assert error.problems and all(isinstance(p, str) and p for p in error.problems)
    else:
        assert isinstance(made, Recipe) and parse(made.resolved_yaml(), "x.yaml", root).model_dump() == made.model_dump()


@PATIENT
@given(tree=TREES)
def test_any_tree(folder: Path, tree: Any) -> None:
    survives(yaml.safe_dump(tree), folder)


@PATIENT
@given(cut=st.integers(0, len(SMALL)), length=st.integers(0, 12), put=st.text(alphabet="{}[]:,-&*!|>'\"%@`#\n \tabo019.~?\\", max_size=8))
def test_any_edit_of_the_text(folder: Path, cut: int, length: int, put: str) -> None:
    survives(SMALL[:cut] + put + SMALL[cut + length :], folder)


@PATIENT
@given(
    where=st.lists(KEYS | st.sampled_from(["0", "1", "9", "-1"]), min_size=1, max_size=4),
    value=st.text(max_size=8) | TREES.map(yaml.safe_dump),
)
def test_any_override(folder: Path, where: list[str], value: str) -> None:
    survives(SMALL, folder, (f"{'.'.join(where)}={value}",))


@PATIENT
@given(where=st.sampled_from(PLACES), value=TREES)
def test_any_value_in_a_known_place(folder: Path, where: str, value: Any) -> None:
    survives(SMALL, folder, (f"{where}={yaml.safe_dump(value, default_flow_style=True)}",))


def test_an_arm_may_start_from_another(folder: Path) -> None:
    text = SMALL + "arms:\n  mine: {from: gift-base, tune: {params: {rank: 8}}}\n  slow: {from: mine, tune.lr: 1e-5, description: slow}\n"
    made = arms(parse(text, root=folder), ["mine", "slow", "gift-base"])
    assert [(m.tune.params.rank, m.tune.weights[0].teacher) for m in made.values()] == [(8, "base"), (8, "base"), (64, "base")]
    assert made["slow"].tune.lr == 1e-5 and made["slow"].description == "slow"
    with pytest.raises(BadInput, match="'gift-base-teacher' is named twice"):
        arms(parse(SMALL, root=folder), ["gift-base", "gift-base-teacher"])


def test_grids(folder: Path) -> None:
    text = SMALL + "arms: {g: {from: sft, grid: {tune.lr: [1e-4, 3e-4], tune.params.rank: [4, 8]}}}\n"
    recipe = parse(text, root=folder)
    made = arms(recipe, ["instruct", "g"])
    assert list(made)[1:] == ["g-lr=0.0001-rank=4", "g-lr=0.0001-rank=8", "g-lr=0.0003-rank=4", "g-lr=0.0003-rank=8"]
    assert [(m.tune.lr, m.tune.params.rank) for m in list(made.values())[1:]] == [(1e-4, 4), (1e-4, 8), (3e-4, 4), (3e-4, 8)]
    assert {m.tune.on for m in list(made.values())[1:]} == {"instruct"}
    assert list(arms(recipe, ["g-lr=0.0003-rank=4"])) == ["g-lr=0.0003-rank=4"]
    again = parse(recipe.resolved_yaml(), "recipe.yaml", folder)
    assert list(arms(again, ["g"])) == list(made)[1:]
    # on the command line: of every arm that tunes
    made = arms(recipe, ["instruct", "gift"], ["tune.lr=1e-4,3e-4"])
    assert list(made) == ["instruct", "gift-lr=0.0001", "gift-lr=0.0003"] and made["gift-lr=0.0003"].tune.lr == 3e-4
    assert list(arms(recipe, ["sft"], ["tune.weights=[[gift],[]]"])) == ["sft-weights=gift", "sft-weights=none"]


@pytest.mark.parametrize(
    "own, expected",
    [
        ("x: {tune.params.rnak: 8}", r"unknown option of lora \(did you mean 'rank'\?\).*\(arm x\)"),
        ("x: {from: gfit}", r"r.yaml:\d+: arms.x.from: unknown arm 'gfit' \(did you mean 'gift'\?\)"),
        ("{x: {from: y}, y: {from: x}}", "goes in a circle"),
        ("x: {grid: {tune.lr: 1e-4}}", r"r.yaml:\d+: arms.x.grid: write the values of each key as a list"),
        ("x: {grid: {tune.lr: [1e-4, -1]}}", r"tune.lr = -1.*\(arm x-lr=-1\)"),
        ("x: {grid: {tune.batch: [" + ", ".join(map(str, range(1, 102))) + "]}}", "101 arms are more than the 100"),
        ("../../x: {tune.lr: 1e-4}", "an arm has a plain name:"),
    ],
)
def test_arms_that_cannot_be_written(folder: Path, own: str, expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        parse(SMALL + f"arms:\n  {own}\n", "r.yaml", folder)


def test_grids_that_cannot_be(folder: Path) -> None:
    for grid, expected in (("tune.lr", "write it as key=value,value"), ("tune.lrr=1,2", "did you mean 'lr'")):
        with pytest.raises(BadInput, match=expected):
            arms(parse(SMALL, root=folder), ["gift"], [grid])

"""The command line: how fast it starts, its exit codes, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from guidetune import cli, registry

ROOT = Path(__file__).resolve().parent.parent
VERBS = [
    "demo",
    "run",
    "compare",
    "claims",
    "data",
    "guide",
    "report",
    "merge",
    "eval",
    "chat",
    "serve",
    "doctor",
    "runs",
    "methods",
    "world",
]


def guidetune(*arguments: str, cwd: Path | None = None, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guidetune", *arguments],
        cwd=cwd or ROOT, input=text, capture_output=True, text=True, encoding="utf-8", timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


# Start-up


def test_help_is_instant() -> None:
    guidetune("--help")  # byte code is compiled once, at installation or at the first call
    before = os.times()
    done = guidetune("--help")
    after = os.times()
    assert done.returncode == 0
    spent = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    assert spent < 0.5, f"{spent:.2f} s of processor time"
    for verb in VERBS:
        assert re.search(rf"^  {verb} ", done.stdout, re.MULTILINE), verb
    assert not re.search(r"^  \w+ .*\.\.\.$", done.stdout, re.MULTILINE), "a summary is cut off"


HEAVY = ("torch", "transformers", "datasets", "pyarrow", "matplotlib", "peft", "pandas", "numpy", "pydantic", "yaml")


def loaded_by(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & set(HEAVY)


def test_the_command_imports_nothing_heavy() -> None:
    assert loaded_by("import guidetune, guidetune.cli, guidetune.errors, guidetune.progress, guidetune.artefacts") == set()


def test_reading_a_recipe_imports_no_tensors() -> None:
    assert loaded_by("import guidetune.recipe") <= {"pydantic", "yaml"}


@pytest.mark.parametrize(
    "verb", [[v] for v in VERBS] + [["world", v] for v in ("build", "export", "describe")] + [["runs", "diff"]], ids=" ".join
)
def test_every_verb_has_help(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*verb, "--help"])
    assert not caught.value.code
    assert f"Usage: guidetune {' '.join(verb)}" in capsys.readouterr().out


def test_version() -> None:
    import guidetune as package

    assert guidetune("--version").stdout.strip() == f"guidetune {package.__version__}"


# Exit codes and messages


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.yaml"
    path.write_text("models: {base: world:base, instrct: x}\ndata: {train: [{path: nowhere.jsonl}]}\ntune: {lrr: 1}\n", encoding="utf-8")
    return path


def test_a_bad_recipe_says_everything_at_once_and_exits_2(broken: Path) -> None:
    done = guidetune("run", str(broken), "--set", "tune.batchh=3")
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    for line in (
        f"{broken}:1: models.instrct = 'x': unknown key (did you mean 'instruct'?)",
        f"{broken}:1: models.instruct: is missing",
        f"{broken}:2: data.train.0.path = 'nowhere.jsonl': ",
        f"{broken}:3: tune.lrr = 1: unknown key (did you mean 'lr'?)",
        "--set: tune.batchh = 3: unknown key (did you mean 'batch'?)",
    ):
        assert line in done.stderr


@pytest.mark.parametrize("verb", ["run", "compare", "data", "guide"])
def test_every_verb_with_a_recipe_refuses_a_bad_one(verb: str, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, str(broken)])
    assert caught.value.code == 2
    assert "did you mean 'instruct'?" in capsys.readouterr().err


def test_debug_shows_the_traceback_wherever_it_stands(broken: Path) -> None:
    for arguments in (["--debug", "run", str(broken)], ["run", str(broken), "--debug"]):
        done = guidetune(*arguments)
        assert done.returncode != 0 and "Traceback" in done.stderr and "BadInput" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu", "x.yaml"], "No such command 'rnu'"),
        (["run"], "Missing argument"),
        (["run", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["compare", "recipes/gift-gsm8k.yaml", "--arms", "sft,gfit"], "unknown arm 'gfit' (did you mean 'gift'?)"),
        (["compare", "recipes/gift-gsm8k.yaml", "--arms", ","], "name at least one"),
        (
            ["compare", "recipes/world-arithmetic.yaml", "--grid", "tune.lr=fast"],
            "tune.lr = 'fast': must be a valid number (arm sft-lr=fast)",
        ),
        (["compare", "recipes/world-arithmetic.yaml", "--scales", "0:1"], "write numbers such as 0,0.25,0.5 or from:to:step"),
        (["compare", "recipes/world-arithmetic.yaml", "--scales", "1", "--pick", "best"], "--pick best: the rules are retain and mean"),
        (["claims", "gfit"], "no claims of a paper 'gfit' (did you mean 'gift'?)"),
        (["compare", "recipes/gift-gsm8k.yaml", "--seeds", "0"], "--seeds"),
        (["run", "recipes/gift-gsm8k.yaml", "--max-memory", "lots"], "--max-memory lots: write a size like 8GB"),
        (["methods", "gfit"], "did you mean 'gift'?"),
        (["eval", "world:instruct", "--tasks", "gsm8"], "did you mean 'gsm8k'?"),
        (["eval", "world:instruct", "--tasks", "gsm8k:path=nowhere.jsonl"], "nowhere.jsonl"),
        (["merge", "--out", "x"], "either a PLAN or --adapter"),
        (["merge", "--adapter", "a", "--out", "x"], "--into"),
        (["merge", "plan.yaml", "--scale", "2", "--out", "x"], "belong to --adapter"),
        (["merge", "plan.yaml"], "--out DIR"),
        (["chat", "world:instruct", "--max-new-tokens", "0", "--prompt", "x"], "--max-new-tokens = 0"),
        (["chat", "world:instruct", "--prompt", " "], "--prompt is empty"),
        (["chat", "world:instrct", "--prompt", "x"], "did you mean world:instruct?"),
        (["serve", "world:instrct"], "did you mean world:instruct?"),
        (["serve", "world:instruct", "--key-env", "NOT_SET_ANYWHERE"], "environment variable is not set"),
        (["doctor", "./nowhere", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input_exits_2_with_one_message(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2, err
    assert expected in err and "Traceback" not in err and out == ""


def outcome(body: str) -> subprocess.CompletedProcess[str]:
    """The command line around a verb whose work is `body`."""
    code = f"""
        from guidetune import cli

        @cli.app.command("probe")
        @cli.verb
        def probe() -> None:
            from guidetune.errors import BadInput, RunFailed
            {body}

        cli.main(["probe"])
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ("print('done')", 0, ""),
        ("raise RunFailed('loss is nan in row 7')", 1, "error: loss is nan in row 7"),
        ("raise BadInput(['first', 'second'])", 2, "error:\n  first\n  second"),
        ("raise KeyboardInterrupt", 130, "run the same command to continue"),
        ("raise MemoryError", 1, "out of memory"),
        ("raise KeyError('x')", 1, "error:\n  KeyError: 'x'\n  This is unexpected"),
        ("open('/nowhere/at/all')", 1, "No such file or directory: /nowhere/at/all"),
        ("raise BrokenPipeError", 141, ""),
    ],
)
def test_outcomes(body: str, code: int, expected: str) -> None:
    done = outcome(body)
    assert done.returncode == code, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    if not expected:
        assert done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_a_verb_with_130_and_says_how_to_continue() -> None:
    code = """
        import time
        from guidetune import cli

        @cli.app.command("probe")
        @cli.verb
        def probe() -> None:
            print("up", flush=True)
            time.sleep(60)

        cli.main(["probe"])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "run the same command to continue" in err and "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m guidetune methods token_weights | head -n 1"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("kind")


def test_a_terminal_that_cannot_show_a_character_ends_nothing() -> None:
    done = guidetune("methods", "gift", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Exponent" in done.stdout


# methods


def test_methods_lists_every_registered_method() -> None:
    done = guidetune("methods")
    assert done.returncode == 0, done.stderr
    for kind in registry.KINDS:
        for name in registry.names(kind):
            assert re.search(rf"\b{name}\b", done.stdout), (kind, name)


def test_one_method_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["methods", "token_weights/gift"])
    out = capsys.readouterr().out
    assert not caught.value.code
    assert "arXiv 2605.01256" in out and "{method: gift, power: 1.0" in out
    for option, info in registry.get("token_weights", "gift").model_fields.items():
        assert re.search(rf"^{option} ", out, re.MULTILINE) and (info.description or "")[:20] in out


# Verbs that do light work


def ended(arguments: list[str]) -> int:
    """The exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def test_doctor_of_a_tiny_pair(tiny_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct = tiny_pair
    assert ended(["doctor", str(base), str(instruct), "--out", str(tmp_path / "doctor.json")]) == 0
    assert "sigma" in capsys.readouterr().out
    assert json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))["problems"] == []
    config = json.loads((instruct / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = 5e5
    config.pop("rope_parameters", None)
    (instruct / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert ended(["doctor", str(base), str(instruct)]) == 1


def test_chat_answers_once(tiny_pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["-q", "chat", str(tiny_pair[1]), "--prompt", "hello", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_chat_answers_the_lines_of_a_pipe_side_by_side(tiny_pair: tuple[Path, Path]) -> None:
    base, instruct = map(str, tiny_pair)
    lines = guidetune("chat", instruct, base, "--max-new-tokens", "4", text="hello\n\n/system be brief\nagain\n/nonsense\n/quit\nnever\n")
    assert lines.returncode == 0, lines.stderr
    assert lines.stdout.count(f"[{instruct}]") == 2 and lines.stdout.count(f"[{base}]") == 2
    assert "be brief" in lines.stderr and "unknown command /nonsense" in lines.stderr and "no chat template of its own" in lines.stderr


def test_chat_keeps_each_models_conversation_and_is_repeatable(tiny_pair: tuple[Path, Path]) -> None:
    import io

    from guidetune.chat import Answering, chat

    _, instruct = map(str, tiny_pair)

    def talk(temperature: float) -> list[list[dict[str, str]]]:
        return chat([instruct, instruct], system="s", how=Answering(4, temperature), turns=io.StringIO("one\ntwo\n"), out=io.StringIO())

    first = talk(0.0)
    assert first == talk(0.0) and first[0] == first[1]
    assert [m["role"] for m in first[0]] == ["system", "user", "assistant", "user", "assistant"]
    assert talk(1.0) == talk(1.0)


def test_chat_stops_before_the_context_is_full(tiny_pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["chat", str(tiny_pair[1]), "--prompt", "word " * 400, "--max-new-tokens", "4"]) == 2
    assert "/reset starts a new one" in capsys.readouterr().err


@pytest.fixture
def tiny_pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base without and an instruct model with a chat template: 2 layers of width 32, byte-level tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=marks[2:])
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folders = []
    for seed, name in enumerate(("base", "instruct")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        if name == "instruct":
            fast.chat_template = (
                "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}"
            )
        fast.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    return folders[0], folders[1]


# The verbs of a whole job, on a pair of toys


@pytest.fixture
def toy_recipe(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    base, instruct = tiny_pair
    template = json.loads((instruct / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    if template is None:
        template = (instruct / "chat_template.jinja").read_text(encoding="utf-8")
    assert "assistant" in template
    rows = [{"question": f"{i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(8)]
    for name, part in (("train.jsonl", rows[:6]), ("test.jsonl", rows[5:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    path = tmp_path / "toy.yaml"
    path.write_text(
        f"models: {{base: {base.name}, instruct: {instruct.name}}}\n"
        "data: {train: [train.jsonl]}\n"
        "tune: {params: {rank: 2, alpha: 4}, weights: [gift], lr: 1e-2, batch: 3, max_length: 128}\n"
        "evaluate: {task: [{method: gsm8k, path: test.jsonl}], max_new_tokens: 4}\n",
        encoding="utf-8",
    )
    return path


def test_the_verbs_of_a_whole_job(toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = str(toy_recipe), tmp_path / "run"

    def say(*arguments: str) -> str:
        code = ended(["-q", *arguments])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    audit = say("data", recipe, "--out", str(out), "--show", "1", "--export", str(tmp_path / "rows.jsonl"))
    assert "6 rows written" in audit and "rows with a prompt of the test set: 1" in audit
    exported = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(exported) == 6 and all(len(row["input_ids"]) == len(row["loss_weight"]) for row in exported)

    assert "mean confidence" in say("guide", recipe, "--out", str(out), "--export", str(tmp_path / "scores.jsonl"))
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in scores] == [row["id"] for row in exported]

    shown = say("run", recipe, "--out", str(out), "--set", "tune.epochs=2")
    assert "gift" in shown and "instruct" in shown and f"report: {out / 'report.html'}" in shown
    for name in ("recipe.yaml", "results.json", "report.html", "metrics.jsonl", "adapter/adapter_model.safetensors", "model/config.json"):
        assert (out / name).is_file(), name
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(results["arms"]) == {"instruct", "gift"} and results["recipe"]["tune"]["epochs"] == 2

    # The stored recipe is the whole job: it runs again from elsewhere and finds everything done.
    before = (out / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    say("run", str(out / "recipe.yaml"), "--out", str(out))
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before

    merged = say("merge", "--adapter", str(out / "adapter"), "--into", str(tmp_path / "instruct"), "--out", str(tmp_path / "merged"))
    assert str(tmp_path / "merged") in merged and (tmp_path / "merged" / "config.json").is_file()
    scored = say(
        "eval",
        str(tmp_path / "merged"),
        "--tasks",
        f"gsm8k:path={tmp_path / 'test.jsonl'}",
        "--set",
        "max_new_tokens=4",
        "--out",
        str(tmp_path / "scored"),
    )
    assert "gsm8k" in scored and (tmp_path / "scored").is_dir()


def test_compare_shows_every_arm_and_a_failing_one_ends_with_1(
    toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = str(toy_recipe), tmp_path / "compared"
    assert ended(["-q", "compare", recipe, "--arms", "instruct,graft,gift", "--out", str(out)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert all(arm in shown for arm in ("instruct", "graft", "gift")) and "report.html" in shown
    assert list(json.loads((out / "results.json").read_text(encoding="utf-8"))["arms"]) == ["instruct", "graft", "gift"]

    wild = ["compare", recipe, "--arms", "instruct,wild", "--set", "arms={wild: {tune.lr: 1e38, tune.clip: null, tune.epochs: 4}}"]
    assert ended(["-q", *wild, "--out", str(tmp_path / "wild")]) == 1
    said = capsys.readouterr()
    assert "wild" in said.err and "instruct" in said.out and "Traceback" not in said.err

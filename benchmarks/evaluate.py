"""guidetune's evaluation against lm-evaluation-harness: the same questions, model and scores; how fast and in how much memory.

    python benchmarks/evaluate.py --quick                      a few minutes: the embedded world model and S (23 M)
    python benchmarks/evaluate.py --json evaluate-cpu.json     more items, and M (135 M)

Three tasks, from local files: `mcq` rates the options' texts (ARC-easy: acc and acc_norm), `mcq_letter` rates lettered options (MedMCQA),
`generate` is greedy generation (GSM8K). Real questions are taken from --data when they are there, else seeded made-up ones of about their
length. S and M have random weights: speed and agreement are measured, not skill.

Each side runs in a process of its own, sides take turns, and everything is repeated. In a process each task is first run on a few items,
then timed: from questions to scores, tokenisation and bookkeeping included, without imports and loading. Figures are items per CPU-second
(all threads); memory is the peak of the resident set during the task. Needs the extra: pip install 'guidetune[bench]'.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("guidetune", "lm_eval")
TASKS = ("mcq", "mcq_letter", "generate")
WARM_UP = 4  # items before the clock starts
LM_BATCH = {"mcq": 16, "mcq_letter": 8, "generate": 32}  # lm-eval's fastest of 1, 8, 16, 32 and 64 on S, one thread

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SHAPES = {"S": (256, 1024, 8, 8, 8, 32_000, False), "M": (576, 1536, 30, 9, 3, 49_152, True)}
# items of mcq, mcq_letter, generate; new tokens
SIZES = {
    "quick": {"world": (200, 150, 64, 96), "S": (120, 80, 24, 48)},
    "full": {"world": (1000, 1000, 256, 128), "S": (600, 400, 96, 96), "M": (80, 60, 16, 48)},
}

YAML = {
    "mcq": """
task: mcq
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/mcq.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "mcq_letter": """
task: mcq_letter
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/mcq_letter.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nChoices:\\n\
{{% for choice in choices %}}{{{{'ABCD'[loop.index0]}}}}. {{{{choice}}}}\\n{{% endfor %}}Answer:"
doc_to_choice: [A, B, C, D]
doc_to_target: gold
metric_list: [{{metric: acc}}]
""",
    "generate": """
task: generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/generate.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [{eos}], do_sample: false, max_gen_toks: {new_tokens}}}
metric_list: [{{metric: exact_match}}]
""",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Questions and models


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def real_rows(data: Path) -> dict[str, list[dict[str, Any]]] | None:
    """ARC-easy, MedMCQA and GSM8K from a folder, or None when one is missing."""
    arc = data / "general_qa" / "arc_easy.jsonl.gz"
    med = data / "medmcqa" / "dev_single_choice.jsonl"
    gsm = data / "gsm8k" / "test.jsonl"
    if not all(path.is_file() for path in (arc, med, gsm)):
        return None
    return {
        "mcq": [
            {"question": row["query"].removeprefix("Question: "), "choices": row["choices"], "gold": row["gold"]} for row in _lines(arc)
        ],
        "mcq_letter": [
            {"question": row["question"], "choices": [row["options"][letter] for letter in "ABCD"], "gold": "ABCD".index(row["answer_idx"])}
            for row in _lines(med)
        ],
        "generate": [{"question": row["question"], "answer": row["answer"]} for row in _lines(gsm)],
    }


def made_up_rows(count: int = 3000) -> dict[str, list[dict[str, Any]]]:
    """Seeded questions of made-up words with about the lengths of the real ones."""
    rng = Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(4000)]

    def text(mean: float, spread: float, least: int = 1) -> str:
        return " ".join(rng.choices(words, k=max(least, round(rng.gauss(mean, spread)))))

    def question(mean: float, spread: float, options: tuple[float, float]) -> dict[str, Any]:
        choices: list[str] = []
        while len(choices) < 4:
            if (choice := text(*options)) not in choices:
                choices.append(choice)
        return {"question": text(mean, spread, 4) + "?", "choices": choices, "gold": rng.randrange(4)}

    return {
        "mcq": [question(20, 8, (4, 3)) for _ in range(count)],
        "mcq_letter": [question(14, 8, (3, 2)) for _ in range(count)],
        "generate": [{"question": text(45, 18, 10), "answer": f"#### {rng.randrange(1000)}"} for _ in range(count)],
    }


def write_rows(rows: dict[str, list[dict[str, Any]]], sizes: tuple[int, ...], folder: Path) -> None:
    """The first items of each task that are unlike, so that no cache of either side answers one twice."""
    for task, count in zip(TASKS, sizes, strict=False):
        chosen = list({row["question"]: row for row in rows[task]}.values())[:count]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def build_model(name: str, rows: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """A model folder: the shipped world model, or a random one with a byte-level BPE of the questions."""
    import torch

    if name == "world":
        from guidetune.world.export import path

        shutil.copytree(path("instruct"), folder)
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, kv_heads, vocab, tied = SHAPES[name]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = (" ".join([row["question"], *row.get("choices", [row.get("answer", "")])]) for task in TASKS for row in rows[task])
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=2048, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.05,  # wider than usual: the likeliest token should lead by more than rounding
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# One side, in its own process


def _peak_mb(reset: bool = False) -> float:
    """Peak resident memory; since the last reset where the system can tell (Linux)."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    _peak_mb(reset=True)
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "peak_rss_mb": round(_peak_mb(), 1)}


def run_guidetune(folder: Path, new_tokens: int, dtype: str, _: int) -> Iterator[tuple[str, dict[str, Any]]]:
    from guidetune.evaluation.evaluate import EvalSettings, evaluate, read_items
    from guidetune.models.handle import open_handle
    from guidetune.registry import build

    handle = open_handle(folder / "model", dtype=dtype)
    mcq = {"method": "mcq", "options": "choices", "answer": "gold", "format": "plain"}
    specs = {
        "mcq": {**mcq, "choose": "text", "template": "Question: {question}\nAnswer:"},
        "mcq_letter": {**mcq, "choose": "letter", "template": "Question: {question}\nChoices:\n{choices}\nAnswer:"},
        "generate": {"method": "gsm8k", "max_new_tokens": new_tokens},
    }
    for name, spec in specs.items():
        task = build("task", {**spec, "path": str(folder / f"{name}.jsonl"), "label": name})
        with tempfile.TemporaryDirectory() as out:
            evaluate(handle, [task], Path(out) / "warm", EvalSettings(limit=WARM_UP))
            results, cost = _timed(lambda task=task, out=out: evaluate(handle, [task], Path(out), EvalSettings()))
            lines = read_items(Path(out), results[name])
        if name == "generate":
            yield name, {**cost, "items": len(lines), "output": [line["output"] for line in lines]}
        else:
            metrics = {key: results[name]["metrics"][key] for key in ("acc", "acc_norm")}
            yield name, {**cost, "items": len(lines), "scores": metrics, "loglik": [line["choices_loglik"] for line in lines]}


def run_lm_eval(folder: Path, new_tokens: int, dtype: str, batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    import logging

    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    for name, text in YAML.items():
        filled = text.format(folder=folder, eos=json.dumps(tokenizer.eos_token), new_tokens=new_tokens)
        (tasks / f"{name}.yaml").write_text(filled, encoding="utf-8")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = HFLM(pretrained=str(folder / "model"), device="cpu", dtype=dtype)

    def run(name: str, limit: int | None) -> Any:
        return simple_evaluate(
            model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True, limit=limit,
            apply_chat_template=name == "generate", verbosity="ERROR",
        )  # fmt: skip

    for name in TASKS:
        lm.batch_size_per_gpu = batch or LM_BATCH[name]
        run(name, WARM_UP)
        found, cost = _timed(lambda name=name: run(name, None))
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        if name == "generate":
            yield name, {**cost, "items": len(samples), "output": [sample["resps"][0][0] for sample in samples]}
        else:
            scores = {key: found["results"][name].get(f"{key},none") for key in ("acc", "acc_norm")}
            loglik = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
            yield name, {**cost, "items": len(samples), "scores": scores, "loglik": loglik}


def child(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    run = {"guidetune": run_guidetune, "lm_eval": run_lm_eval}[arguments.side]
    # Progress bars and tables of either side are not what is measured.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = dict(run(Path(arguments.work), arguments.new_tokens, arguments.dtype, arguments.lm_batch))
    Path(arguments.json).write_text(json.dumps(found), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def start(side: str, folder: Path, new_tokens: int, options: argparse.Namespace, out: Path, dtype: str = "float32") -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet["HF_DATASETS_CACHE"] = str(folder / "cache")
    threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [
        sys.executable, __file__, "--side", side, "--work", folder, "--new-tokens", new_tokens, "--json", out, "--dtype", dtype,
        "--threads", options.threads, "--lm-batch", options.lm_batch,
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, **quiet, **threads, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{side} failed on {folder.name}:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def best(logliks: list[float], lengths: list[int] | None = None) -> int:
    values = [value / length for value, length in zip(logliks, lengths, strict=True)] if lengths else logliks
    return max(range(len(values)), key=values.__getitem__)


def agreement(task: str, ours: dict[str, Any], theirs: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Items with another choice (by acc, and by acc_norm) or another output, and the largest difference of a log-likelihood."""
    if task == "generate":
        return {"disagreeing": sum(a != b for a, b in zip(ours["output"], theirs["output"], strict=True))}
    pairs = list(zip(ours["loglik"], theirs["loglik"], strict=True))
    found = {
        "disagreeing": sum(best(a) != best(b) for a, b in pairs),
        "largest_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
        "scores": {"guidetune": ours["scores"], "lm_eval": theirs["scores"]},
    }
    if task == "mcq":
        lengths = [[len(choice) for choice in row["choices"]] for row in rows]
        found["disagreeing_norm"] = sum(best(a, n) != best(b, n) for (a, b), n in zip(pairs, lengths, strict=True))
    return found


def compare(name: str, rows: dict[str, list[dict[str, Any]]], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All repeats of one model; sides take turns, and the first one changes."""
    *sizes, new_tokens = SIZES["quick" if options.quick else "full"][name]
    folder.mkdir()
    write_rows(rows, tuple(sizes), folder)
    build_model(name, rows, folder / "model")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(options.repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            runs[side].append(start(side, folder, new_tokens, options, folder / "out.json"))
            print(f"  {name}: {side}, repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for task in TASKS:
        asked = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
        rates = {side: [run[task]["items"] / run[task]["cpu_s"] for run in runs[side]] for side in SIDES}
        ratios = [a / b for a, b in zip(rates["guidetune"], rates["lm_eval"], strict=True)]
        found[task] = {
            "items": runs["guidetune"][0][task]["items"],
            "items_per_cpu_s": {side: statistics.median(rates[side]) for side in SIDES},
            "peak_rss_mb": {side: statistics.median(run[task]["peak_rss_mb"] for run in runs[side]) for side in SIDES},
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "repeats": options.repeats,
            **agreement(task, runs["guidetune"][0][task], runs["lm_eval"][0][task], asked),
        }
    return found


def table(results: dict[str, Any]) -> str:
    lines = [f"{'model':6} {'task':11} {'guidetune':>10} {'lm-eval':>8}  items per CPU-second    ratio (spread)    peak MB   disagreeing"]
    for model, tasks in results.items():
        for task, one in tasks.items():
            rate, rss, (low, high) = one["items_per_cpu_s"], one["peak_rss_mb"], one["ratio_spread"]
            wrong = f"{one['disagreeing']}" + (f" / {one['disagreeing_norm']} (norm)" if "disagreeing_norm" in one else "")
            lines.append(
                f"{model:6} {task:11} {rate['guidetune']:10.1f} {rate['lm_eval']:8.1f} {'':21} {one['ratio']:5.2f} ({low:.2f}-{high:.2f})"
                f"   {rss['guidetune']:.0f} / {rss['lm_eval']:.0f}   {wrong} of {one['items']}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few items, the world model and S")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--models", help="some of world,S,M")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each side; 1 gives the steadiest CPU times")
    parser.add_argument("--lm-batch", type=int, default=0, help="lm-eval's batch size (default: its fastest for each task)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with the real questions")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--new-tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        child(options)
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        print("lm-evaluation-harness is not installed; it comes with the extra: pip install 'guidetune[bench]'", file=sys.stderr)
        return 2
    sizes = SIZES["quick" if options.quick else "full"]
    names = options.models.split(",") if options.models else list(sizes)
    if unknown := [name for name in names if name not in sizes]:
        print(f"no model {', '.join(unknown)} in this mode; there are {', '.join(sizes)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    rows = real_rows(options.data)
    source = "real" if rows is not None else "made up"
    rows = rows or made_up_rows()
    with tempfile.TemporaryDirectory() as work:
        results = {name: compare(name, rows, options, Path(work) / name) for name in names}
    print(table(results))
    main_model = results.get("S") or next(iter(results.values()))
    wrong = sum(one["disagreeing"] + one.get("disagreeing_norm", 0) for tasks in results.values() for one in tasks.values())
    print(f"items on which the two disagree, in float32: {wrong}")
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval")}
        report = {
            "ratios": {f"{task}_vs_lm_eval": round(main_model[task]["ratio"], 3) for task in TASKS},
            "disagreeing": wrong,
            "questions": source,
            "threads": options.threads,
            "lm_eval_batch": options.lm_batch or LM_BATCH,
            "models": results,
            "versions": {**versions, "python": platform.python_version()},
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        }
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

"""Preparing data at scale: rows per CPU-second, tokens per CPU-second and memory for growing numbers of rows.

    python benchmarks/prepare.py                          # 50,000, 500,000 and 2,000,000 rows; 4 GB of scratch space
    python benchmarks/prepare.py --quick --json out.json
    python benchmarks/prepare.py --rows 50000 --incumbents 0 --mixed 50000 1000000

Rows are synthetic chats in several parquet files: words of a made-up vocabulary of 20,000 with Zipf frequencies, log-normal lengths,
all drawn from one seed. The tokenizer is a byte-level BPE trained on the same text. Every measurement is a process of its own.

Peaks are those of the kernel: VmHWM is resident memory with the pages of mapped files in it; anonymous memory (RssAnon), which is
what a program cannot give back, is sampled every 20 ms. What an empty job of 200 rows needs is measured too: the growth per row is
over the larger sizes.

`--mixed` sizes are rows of 20 sources of unequal size (the k-th has 1/k of the first) as questions and answers in columns, taken through
one of three templates each, a capped mix of as many rows as there are, and encoding.

Incumbents on the smaller size, with the same rows and tokenizer: `datasets.map` over `apply_chat_template(tokenize=True)`, and the
preparation of TRL's `SFTTrainer` (its constructor, stopped where training would begin).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SOURCES = 20  # of the mixed rows
FILES, BLOCK, SEED = 8, 10_000, 17  # at most 8 files, of row groups of 10,000 rows whatever the size


# ---------------------------------------------------------------------------------------------------------------------
# The rows


def vocabulary(size: int = 20_000) -> Any:
    """Made-up words of one to four syllables, the shorter the more frequent."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s")]
    words: dict[str, None] = {}
    while len(words) < size:
        count = 1 + (len(words) > 200) + (len(words) > 4000) * int(rng.integers(0, 2))
        words["".join(rng.choice(syllables, count))] = None
    return np.array(list(words), dtype=object)


def texts(words: Any, lengths: Any, rng: Any) -> list[str]:
    """One text of each length (in words)."""
    import numpy as np

    ranks = np.exp(rng.random(int(lengths.sum())) * np.log(len(words))).astype(np.int64) - 1  # P(rank) ~ 1 / rank
    drawn, out, at = words[ranks], [], 0
    for length in lengths.tolist():
        out.append(" ".join(drawn[at : at + length].tolist()).capitalize() + ".")
        at += length
    return out


def write_rows(folder: Path, rows: int) -> int:
    """`rows` chats in parquet files of equal length; returns the bytes written."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    words = vocabulary()
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("messages", pa.list_(turn))])
    done, files = 0, min(FILES, max(2, rows // (2 * BLOCK)))
    for number in range(files):
        share = rows * (number + 1) // files - rows * number // files
        with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", schema, compression="snappy") as writer:
            while share:
                count = min(share, BLOCK)
                rng = np.random.default_rng([SEED, done])
                asked = texts(words, 1 + rng.lognormal(2.3, 0.6, count).astype(np.int64), rng)
                answered = texts(words, 1 + rng.lognormal(3.0, 0.7, count).astype(np.int64), rng)
                contents = np.empty(2 * count, dtype=object)
                contents[::2], contents[1::2] = asked, answered
                roles = pa.array(["user", "assistant"] * count)
                turns = pa.StructArray.from_arrays([roles, pa.array(contents, pa.string())], fields=list(turn))
                column = pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * count + 1, 2, dtype=np.int32)), turns)
                writer.write_batch(pa.record_batch([column], schema=schema))
                share, done = share - count, done + count
    return sum(file.stat().st_size for file in folder.iterdir())


def write_sources(folder: Path, rows: int) -> int:
    """About `rows` rows of columns in one parquet file for each of 20 sources; returns the bytes written."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    words = vocabulary()
    whole = sum(1 / k for k in range(1, SOURCES + 1))
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    for number in range(1, SOURCES + 1):
        left, done = max(1, round(rows / number / whole)), 0
        with pq.ParquetWriter(folder / f"source-{number:02d}.parquet", schema, compression="snappy") as writer:
            while left:
                count = min(left, BLOCK)
                rng = np.random.default_rng([SEED, number, done])
                asked = texts(words, 1 + rng.lognormal(2.3, 0.6, count).astype(np.int64), rng)
                answered = texts(words, 1 + rng.lognormal(3.0, 0.7, count).astype(np.int64), rng)
                writer.write_batch(pa.record_batch([pa.array(asked), pa.array(answered)], schema=schema))
                left, done = left - count, done + count
    return sum(file.stat().st_size for file in folder.iterdir())


def train_tokenizer(folder: Path, size: int = 16_000) -> None:
    """A byte-level BPE of the rows' words, with ChatML's control tokens and a chat template."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words, rng = vocabulary(), np.random.default_rng(SEED)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(words, np.full(20_000, 40), rng), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: each in a process of its own


class Memory:
    """Peak anonymous memory of this process since `start`, sampled; the kernel keeps only the peak of all resident pages."""

    def __init__(self, every: float = 0.02) -> None:
        self.peak, self._every, self._on = 0, every, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._on:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(self._every)

    def stop(self) -> int:
        self._on = False
        self._thread.join()
        return max(self.peak, status("RssAnon"))


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def measured(work: Any) -> dict[str, Any]:
    """Run `work() -> (rows, tokens)` and say what it took."""
    watch, before, start = Memory(), time.process_time(), time.monotonic()
    rows, tokens = work()
    cpu, wall = time.process_time() - before, time.monotonic() - start
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu += children.ru_utime + children.ru_stime
    return {
        "rows": rows,
        "tokens": tokens,
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "rows_per_cpu_s": round(rows / cpu, 1),
        "tokens_per_cpu_s": round(tokens / cpu, 1),
        "tokenizers_parallelism": os.environ.get("TOKENIZERS_PARALLELISM", "not set"),
        "peak_anonymous_mb": round(watch.stop() / 2**20, 1),
        "peak_resident_mb": round(status("VmHWM") / 2**20, 1),
    }


def guidetune_prepare(data: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """`guidetune data`: ids, duplicates of ids, ledger, conversations, targets, digest."""
    import pyarrow.parquet  # noqa: F401 (imported before the clock starts, as the incumbents' libraries are)
    from transformers import PreTrainedTokenizerFast

    from guidetune.data.chat import Chat
    from guidetune.data.prepare import PrepareSettings, prepare

    chat = Chat(PreTrainedTokenizerFast.from_pretrained(tokenizer))
    settings = PrepareSettings(max_length=1024)

    def work() -> tuple[int, int]:
        totals = prepare([{"path": str(data / "*.parquet")}], [], chat, settings, scratch / "out", scratch).result
        return totals["used"], totals["tokens"]

    result = measured(work)
    sizes = {file.name: file.stat().st_size for file in sorted((scratch / "out").iterdir())}
    return {**result, "bytes_on_disk_per_row": round(sum(sizes.values()) / result["rows"], 1)}


def guidetune_mix(data: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """`guidetune data` of 20 sources: one of three templates for each row, a capped mix of as many rows as were read, encoding."""
    import pyarrow.parquet  # noqa: F401
    from transformers import PreTrainedTokenizerFast

    from guidetune.data.chat import Chat
    from guidetune.data.prepare import PrepareSettings, prepare

    chat = Chat(PreTrainedTokenizerFast.from_pretrained(tokenizer))
    files = sorted(data.glob("*.parquet"))
    rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    asked = ("{question}", "Question: {question}\nAnswer:", "Answer in a few words.\n{question}")
    templates = {f"t{k}": {"user": user, "assistant": "{answer}"} for k, user in enumerate(asked)}
    operations = [
        {"method": "template", "templates": templates},
        {"method": "mix", "cap": max(1, rows // SOURCES), "rows": rows},
    ]

    def work() -> tuple[int, int]:
        specs = [{"path": str(file)} for file in files]
        totals = prepare(specs, operations, chat, PrepareSettings(max_length=1024), scratch / "out", scratch).result
        return totals["used"], totals["tokens"]

    return measured(work)


def guidetune_read(data: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """What training does to prepared rows: open them, draw 200 optimiser batches of 64 rows of a shuffled epoch, read their tokens."""
    from guidetune.data.rows import EncodedRows
    from guidetune.engine.batching import optimiser_batch  # imports torch: most of this job's memory

    def work() -> tuple[int, int]:
        rows, tokens = EncodedRows.open(scratch / "out"), 0
        for step in range(200):
            for i in optimiser_batch(len(rows), 64, 42, step):
                tokens += len(rows[int(i)].input_ids)
        return 200 * 64, tokens

    return measured(work)


def tokens_of(rows: Any) -> int:
    """All tokens of a `datasets` set."""
    import pyarrow.compute as pc

    return sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in rows.with_format("arrow").iter(10_000))


def datasets_map(data: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """`datasets.map`, batched: chat template and tokens with the mask of the assistant's tokens; no ids, no ledger."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        out = fast.apply_chat_template(batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": out["input_ids"], "assistant_masks": out["assistant_masks"]}

    def work() -> tuple[int, int]:
        files = sorted(str(file) for file in data.glob("*.parquet"))
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(scratch / "cache"))
        rows = rows.map(encode, batched=True, remove_columns=["messages"])
        return len(rows), tokens_of(rows)

    return measured(work)


def trl_sft(data: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """TRL: the constructor of `SFTTrainer` with assistant-only loss on a model of no size, up to where training would begin."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(fast), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )

    def work() -> tuple[int, int]:
        files = sorted(str(file) for file in data.glob("*.parquet"))
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(scratch / "cache"))
        where = {"output_dir": str(scratch / "trl"), "report_to": [], "use_cpu": True, "bf16": False}
        config = SFTConfig(assistant_only_loss=True, max_length=1024, **where)
        made = SFTTrainer(model, args=config, train_dataset=rows, processing_class=fast).train_dataset
        return len(made), tokens_of(made)

    return measured(work)


JOBS = {job.__name__: job for job in (guidetune_prepare, guidetune_mix, guidetune_read, datasets_map, trl_sft)}


# ---------------------------------------------------------------------------------------------------------------------


def in_own_process(job: str, data: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    arguments = [sys.executable, __file__, "--job", job, str(data), str(tokenizer), str(scratch)]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(sizes: list[int], mixed: list[int], incumbents: int, scratch: Path, keep: Callable[[dict[str, Any]], None]) -> None:
    """Hand each measurement to `keep` as it comes."""
    tokenizer = scratch / "tokenizer"
    train_tokenizer(tokenizer)

    def measure(job: str, rows: int, data: Path, place: Path, size: int) -> None:
        entry = {"job": job, "size": rows, "source_bytes": size, **in_own_process(job, data, tokenizer, place)}
        keep(entry)
        speed = f"{entry['rows_per_cpu_s']:>7,.0f} rows and {entry['tokens_per_cpu_s']:>9,.0f} tokens per CPU-second"
        memory = f"anonymous {entry['peak_anonymous_mb']:>6,.1f} MB, resident {entry['peak_resident_mb']:>6,.1f} MB"
        print(f"{job:18} {rows:>9,} rows: {speed}, {memory}", flush=True)

    for rows in sizes:
        place = scratch / str(rows)
        data = place / "data"
        size = write_rows(data, rows)
        jobs = ["guidetune_prepare", "guidetune_read", *(("datasets_map", "trl_sft") if rows == incumbents else ())]
        for job in jobs:
            measure(job, rows, data, place, size)
        shutil.rmtree(place)
    for rows in mixed:
        place = scratch / f"mixed-{rows}"
        size = write_sources(place / "data", rows)
        measure("guidetune_mix", rows, place / "data", place, size)
        shutil.rmtree(place)


def growth(entries: list[dict[str, Any]], job: str, field: str) -> float | None:
    """Bytes per row by which a peak grows from the smallest size of more than 10,000 rows to the largest."""
    of_job = sorted((e for e in entries if e["job"] == job and e["size"] > 10_000), key=lambda e: e["size"])
    if len(of_job) < 2:
        return None
    a, b = of_job[0], of_job[-1]
    return round((b[field] - a[field]) * 2**20 / (b["size"] - a["size"]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20,000 and 80,000 rows")
    parser.add_argument("--rows", type=int, nargs="+", help="other sizes")
    parser.add_argument("--mixed", type=int, nargs="*", help="other sizes of the rows of 20 sources (none: leave them out)")
    parser.add_argument("--incumbents", type=int, metavar="ROWS", help="the size at which they are measured (default: the first; 0: none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there; those of other sizes in it stay")
    parser.add_argument("--scratch", type=Path, help="folder for the rows (default: a temporary one)")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job, *places = options.job
        print(json.dumps(JOBS[job](*map(Path, places))))
        return
    sizes = options.rows or ([20_000, 80_000] if options.quick else [50_000, 500_000, 2_000_000])
    mixed = options.mixed if options.mixed is not None else [20_000] if options.quick else [] if options.rows else [50_000, 1_000_000]
    incumbents = sizes[0] if options.incumbents is None else options.incumbents
    entries: list[dict[str, Any]] = json.loads(options.json.read_text())["measurements"] if options.json and options.json.exists() else []

    def keep(entry: dict[str, Any]) -> None:
        others = [e for e in entries if (e["job"], e["size"]) != (entry["job"], entry["size"])]
        entries[:] = sorted([*others, entry], key=lambda e: e["size"])
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report(entries), indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="prepare-") as scratch:
        run(sizes, mixed, incumbents, Path(scratch), keep)
    print("growth of the peaks in bytes per row:", json.dumps(report(entries)["growth"]))


def report(entries: list[dict[str, Any]]) -> dict[str, Any]:
    from importlib.metadata import version

    jobs, fields = ("guidetune_prepare", "guidetune_mix", "guidetune_read"), ("peak_anonymous_mb", "peak_resident_mb")
    return {
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "pyarrow", "datasets", "trl")},
        "growth": {f"{job} {field.removesuffix('_mb')} bytes per row": growth(entries, job, field) for job in jobs for field in fields},
        "measurements": entries,
    }


if __name__ == "__main__":
    main()

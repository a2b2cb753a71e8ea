"""Translation of a parallel corpus: BLEU, chrF, chrF++ and TER by sacrebleu, COMET with a local checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from guidetune.errors import BadInput, RunFailed
from guidetune.evaluation.metrics import sentence_chrf, translation
from guidetune.evaluation.task import Item, Output, RowTask, TaskContext, ask, breakdown, column, fill, texts
from guidetune.registry import method

# How sacrebleu splits languages that do not put spaces between words (BLEU only).
TOKENIZE = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "de": "German", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French", "he": "Hebrew",
    "hi": "Hindi", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@method(kind="task", name="translation", summary="Translation of a parallel corpus, by BLEU, chrF, chrF++ and TER with their signatures.")
class Translation(RowTask):
    """Two columns of a file are a text and its translation.

    The score is the mean over sentences of chrF++ / 100, which paired tests can compare; `bleu` (13a, exponential smoothing), `chrf`,
    `chrf++` and `ter` are sacrebleu's figures of the whole corpus, with their signatures in `notes`. `comet_path` adds `comet`, by
    the `comet-score` command of unbabel-comet (which needs an older transformers: install it in an environment of its own).
    """

    mode: ClassVar[str] = "generate"
    metric: ClassVar[str] = "sentence_chrf++"
    default_new_tokens: ClassVar[int] = 256

    source: str = Field(description="Column of the text, such as es.")
    target: str = Field(description="Column of its translation, such as en.")
    languages: tuple[str, str] | None = Field(None, description="Their names in the prompt (default: by the columns' names).")
    template: str = Field(
        "Translate from {source_language} to {target_language}. Answer with the translation only.\n\n{source}",
        description="Prompt; {source}, {source_language}, {target_language} or any column.",
    )
    system: str | None = Field(None, description="System message.")
    tokenize: str | None = Field(None, description="sacrebleu's tokenizer for BLEU (default: by the target: 13a, zh, ja-mecab, ko-mecab).")
    comet_path: str | None = Field(None, description="Checkpoint of a COMET model (a .ckpt file).")
    comet_command: str = Field("comet-score", description="The comet-score program, where it is not on the PATH.")
    id: str | None = Field(None, description="Column of a unique id (default: the row's number).")
    category: str | None = Field(None, description="Column to break the score down by.")

    def items(self, ctx: TaskContext) -> list[Item]:
        problems = []
        try:
            translation(["a"], ["a"], self._tokenize)
        except Exception as error:  # an unknown name, or an extra package that is not installed: sacrebleu's own words
            problems.append(f"task {self.label or self.name}: tokenize = {self._tokenize!r}: {error}")
        if self.comet_path is not None and shutil.which(self.comet_command) is None:
            how = "install unbabel-comet in an environment of its own and name its program in comet_command"
            problems.append(f"task {self.label or self.name}: there is no program {self.comet_command!r}; {how}")
        if self.comet_path is not None and not (self.comet_path.endswith(".ckpt") and Path(self.comet_path).is_file()):
            problems.append(f"task {self.label or self.name}: comet_path = {self.comet_path!r} is no .ckpt file; give a local checkpoint")
        if problems:
            raise BadInput(problems)
        return super().items(ctx)

    @property
    def _tokenize(self) -> str:
        return self.tokenize or TOKENIZE.get(self.target.lower().split("-")[0].split("_")[0], "13a")

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        source, target = (" ".join(texts(column(row, name), name)) for name in (self.source, self.target))
        if not source.strip() or not target.strip():
            raise BadInput(f"{self.source} or {self.target} is empty")
        languages = self.languages or [LANGUAGES.get(name.lower(), name) for name in (self.source, self.target)]
        names = dict(zip(("source_language", "target_language"), languages, strict=True))
        prompt = ask(fill(self.template, {**row, **names, "source": source}), self.system)
        return Item(
            self.identity(row, number),
            prompt,
            reference=target,
            gold=target,
            meta={"source": source, **breakdown(row, category=self.category)},
        )

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        return {"correct": sentence_chrf(output.text.strip(), item.reference)}

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        answers = [(line, str(one["output"]).strip()) for line in lines for one in line.get("samples", [line])]
        hypotheses, references = [text for _, text in answers], [line["reference"] for line, _ in answers]
        found = translation(hypotheses, references, self._tokenize)
        del found["signatures"]
        if self.comet_path is not None:
            found["comet"] = self._comet([line["meta"]["source"] for line, _ in answers], hypotheses, references)
        return found

    def notes(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        return [f"{name}: {signature}" for name, signature in translation(["a"], ["a"], self._tokenize)["signatures"].items()]

    def _comet(self, sources: list[str], hypotheses: list[str], references: list[str]) -> float:
        """The mean of the segments' scores."""
        import torch

        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("source.txt", "hypothesis.txt", "reference.txt")]
            for path, texts in zip(paths, (sources, hypotheses, references), strict=True):
                path.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
            out = Path(folder) / "scores.json"
            files = [str(path) for path in paths]
            gpus = "1" if torch.cuda.is_available() else "0"
            command = [
                self.comet_command,
                "--gpus",
                gpus,
                "-s",
                files[0],
                "-t",
                files[1],
                "-r",
                files[2],
                "--model",
                str(self.comet_path),
                "--to_json",
            ]
            done = subprocess.run([*command, str(out)], capture_output=True, text=True, errors="replace")
            if done.returncode != 0 or not out.is_file():
                raise RunFailed(f"{self.comet_command} failed: {(done.stderr or done.stdout)[-500:].strip()}")
            scores = [segment["COMET"] for segments in json.loads(out.read_text(encoding="utf-8")).values() for segment in segments]
        return float(sum(scores) / len(scores))

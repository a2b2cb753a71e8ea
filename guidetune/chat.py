"""Talk to one or several models side by side: the same turn goes to each, and each keeps its own conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from guidetune.artefacts import derive_seed
from guidetune.errors import BadInput
from guidetune.progress import say
from guidetune.report.text import clean

if TYPE_CHECKING:
    from guidetune.models import ModelHandle

HELP = "/reset  forget the conversation    /system TEXT  set the system prompt and start again    /quit  leave"


@dataclass(frozen=True)
class Answering:
    """How answers are made. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 42

    def check(self) -> None:
        """Raises BadInput for numbers no answer can be made with."""
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"--max-new-tokens = {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"--temperature = {self.temperature}: must be 0 (greedy) or more")
        if problems:
            raise BadInput(problems)


@dataclass
class Voice:
    """One model and its side of the conversation."""

    label: str
    handle: ModelHandle
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, turn: str, how: Answering, out: IO[str]) -> str:
        """Stream the answer to `turn` to `out` and remember both.

        Raises:
            BadInput: the conversation no longer fits into the model's context.
        """
        import torch

        from guidetune.evaluation.generation import context_length

        messages = [*self.messages, {"role": "user", "content": turn}]
        prompt = self.handle.chat.prompt(messages)
        context = context_length(self.handle.model)
        room = how.max_new_tokens if context is None else min(how.max_new_tokens, context - len(prompt))
        if room < 1:
            raise BadInput(f"{self.label}: the conversation has {len(prompt)} tokens, the model reads {context}; /reset starts a new one")
        ids = torch.tensor([prompt], device=self.handle.device)
        sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0} if how.temperature > 0 else {"do_sample": False}
        torch.manual_seed(derive_seed(how.seed, "chat", self.label, len(messages)))
        with torch.inference_mode():
            made = self.handle.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                eos_token_id=self.handle.chat.stop_token_ids,
                pad_token_id=self.handle.chat.stop_token_ids[0],
                streamer=_streamer(self.handle.tokenizer, out),
                **sampling,
            )
        text = self.handle.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text


def _streamer(tokenizer: Any, out: IO[str]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            out.write(clean(text))  # a model may write terminal control codes; they are shown, not obeyed
            out.flush()

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def open_voices(models: Sequence[str], dtype: str = "auto", device: str = "auto") -> list[Voice]:
    """Load the models. One without a chat template of its own borrows that of the first model that has one.

    Raises:
        BadInput: no model, or no chat template among them.
    """
    from guidetune.data.chat import Chat
    from guidetune.models import open_handle

    if not models:
        raise BadInput("name at least one model, for example: guidetune chat world:instruct")
    handles = [open_handle(model, dtype=dtype, device=device) for model in models]
    template = next((h.chat.template.source for h in handles if h.chat is not None), None)
    if template is None:
        raise BadInput(f"{', '.join(models)}: no chat template; name the instruct model, or both: guidetune chat INSTRUCT BASE")
    for handle in handles:
        if handle.chat is None:
            say(f"{handle.spec} has no chat template of its own; using that of the first model that has one")
            handle.chat = Chat(handle.tokenizer, template)
    labels = [model if list(models).count(model) == 1 else f"{model} ({i + 1})" for i, model in enumerate(models)]
    return [Voice(label, handle) for label, handle in zip(labels, handles, strict=True)]


def chat(
    models: Sequence[str],
    prompt: str | None = None,
    system: str | None = None,
    how: Answering | None = None,
    dtype: str = "auto",
    device: str = "auto",
    turns: IO[str] | None = None,
    out: IO[str] | None = None,
) -> list[list[dict[str, str]]]:
    """Answer `prompt` once, or every line of `turns` (default: standard input) until it ends; returns the conversations.

    Raises:
        BadInput: as `open_voices`, or an empty prompt.
    """
    out = sys.stdout if out is None else out
    how = how or Answering()
    how.check()
    if prompt is not None and not prompt.strip():
        raise BadInput("--prompt is empty; give the text of the turn")
    voices = open_voices(models, dtype, device)
    _start(voices, system)
    lines = [prompt] if prompt is not None else _turns(sys.stdin if turns is None else turns, out)
    for line in lines:
        turn = line.strip()
        if not turn:
            continue
        word, _, rest = turn.partition(" ")
        if prompt is None and word.startswith("/"):
            if word in ("/quit", "/exit"):
                break
            if word == "/reset":
                _start(voices, system)
                say("new conversation")
            elif word == "/system":
                system = rest.strip() or None
                _start(voices, system)
                say("new conversation" + (f", system prompt: {system}" if system else " without a system prompt"))
            else:
                say(HELP if word == "/help" else f"unknown command {word}; {HELP}")
            continue
        _round(voices, turn, how, out)
    return [voice.messages for voice in voices]


def _round(voices: Sequence[Voice], turn: str, how: Answering, out: IO[str]) -> None:
    """One turn to every model; a conversation that no longer fits is said, and the others go on."""
    full: list[str] = []
    for voice in voices:
        if len(voices) > 1:
            out.write(f"[{voice.label}] ")
        try:
            voice.answer(turn, how, out)
        except BadInput as error:
            full += error.problems
            say(str(error))
        out.write("\n")
        out.flush()
    if len(full) == len(voices) and not any(m["role"] == "assistant" for v in voices for m in v.messages):
        raise BadInput(full)  # the very first turn fits nowhere


def _start(voices: Sequence[Voice], system: str | None) -> None:
    for voice in voices:
        voice.messages = [{"role": "system", "content": system}] if system else []


def _turns(source: IO[str], out: IO[str]) -> Iterator[str]:
    """Lines as they come; on a terminal with a prompt and line editing."""
    if source is not sys.stdin or not source.isatty():
        yield from source
        return
    try:
        import readline  # noqa: F401  (input() then has history and editing)
    except ImportError:
        pass  # Windows has its own line editing
    say(HELP)
    while True:
        try:
            yield input("> ")
        except EOFError:
            out.write("\n")
            return

"""Conversations to tokens and back: the one encode function of training, guidance, evaluation and chat.

A conversation is rendered once as a whole. Sentinel contents in a second rendering show where the template puts each assistant
text, so no markers are needed; `{% generation %}` markers narrow the supervised part when the template has them. The text is then
cut at every prompt/answer boundary and the pieces are tokenised apart, so that no token merges across a boundary and
`prompt(messages)` is an exact token prefix of `encode(messages + [answer])`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from guidetune.artefacts import fingerprint
from guidetune.data.templates import PLAIN, Template, TemplateRefusal
from guidetune.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

EMPTY_ANSWER = "empty answer"
NOT_TEXT = "content is not text"
NO_ANSWER = "no assistant text to learn from"
SURROGATE = "lone surrogate"
REFUSED = "refused by the chat template"
NOT_FOUND = "assistant text not found in the rendered template"
NO_TOKENS = "answer gives no tokens"
TOO_LONG_ANSWER = "answer longer than max_length"

_USER, _ANSWER = "Qz7userGuidetuneqZ{}end", "Qz7answerGuidetuneqZ{}end"
_ANSWER_PATTERN = re.compile(r"Qz7answerGuidetuneqZ(\d+)end")
# Left contexts for tokenizers that put a space before whatever text starts with (SentencePiece style).
_ANCHORS = ("\n", "\t", "|", "a")
_REMEMBERED = 4096  # role sequences, and short texts, of which the template's text and the tokens are remembered
_SHORT = 32  # characters
_MIN_KEPT = 16  # tokens that a cut leaves at each end of a message, while it can


class Piece(NamedTuple):
    """A stretch of the rendered text that was tokenised on its own: input_ids[start:end]."""

    text: str
    target: bool
    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens. `target[t]` marks the tokens to learn; target[0] is never set.

    `prompt_length` is the number of tokens before the last assistant turn; `ends_with_stop` says that the last target is a
    stop token; `appended_eos` that the template wrote none and the tokenizer's was added.
    """

    input_ids: list[int]
    target: list[bool]
    pieces: list[Piece] = field(repr=False)
    prompt_length: int
    ends_with_stop: bool
    appended_eos: bool = False

    @property
    def supervised(self) -> int:
        return sum(self.target)

    def prompt_only(self) -> Encoded:
        """The tokens up to the first one of the last answer, which is the only target: where a prediction is looked at, not learnt from."""
        end = next((at for at in range(self.prompt_length, len(self.target)) if self.target[at]), self.prompt_length) + 1
        pieces = [piece._replace(end=min(piece.end, end)) for piece in self.pieces if piece.start < end]
        return Encoded(self.input_ids[:end], [False] * (end - 1) + [True], pieces, self.prompt_length, False)


@dataclass(frozen=True)
class Refused:
    """A conversation that cannot be encoded: `reason` is one of few, `detail` says what is wrong with this one."""

    reason: str
    detail: str


class _Span(NamedTuple):
    """Character ranges of one assistant turn: prompt ends at `boundary`, targets are [start, end) (end includes the stop)."""

    boundary: int
    start: int
    content_end: int
    end: int
    train: bool
    stop: bool


class _Layout(NamedTuple):
    text: str
    spans: list[_Span]
    closed: bool  # the last message is an assistant turn


class Chat:
    """A tokenizer with its chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: Jinja source to use in place of the tokenizer's own; `"plain"` for prompt, newline, answer, end of sequence.
        variables: extra template variables, such as `{"enable_thinking": False}`.

    Raises:
        BadInput: there is no template, it is not valid Jinja, or assistant turns cannot be found in what it renders.

    Example:
        >>> chat = Chat(tokenizer)
        >>> chat.encode([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]).target
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = str(getattr(tokenizer, "name_or_path", "") or "tokenizer")
        source = PLAIN if template == "plain" else template or _own_template(tokenizer)
        if not source:
            raise BadInput(
                f'{self.name} has no chat template; take the instruct model\'s tokenizer, or give a template (or "plain") by name'
            )
        specials = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        try:
            self.template = Template(source, {**specials, **(variables or {})})
        except TemplateRefusal as error:
            raise BadInput(f"chat template of {self.name}: {error} (line {error.line})") from None
        self._added = _added_tokens(tokenizer)
        self._bos: int | None = tokenizer.bos_token_id
        alternatives = "|".join(re.escape(t) for t in sorted(self._added, key=len, reverse=True)) or "(?!)"
        self._added_head = re.compile(rf"\s*({alternatives})")
        self._added_anywhere = re.compile(alternatives)
        self._added_tail = re.compile(rf"({alternatives})(\s*)\Z")
        self.notes: list[str] = []
        self._skeletons: dict[tuple[str, ...], list[str] | None] = {}
        self._short: dict[str, list[int]] = {}
        self._as_parts = False
        self.tool_role = "tool"
        self._probe()
        self._anchors = self._choose_anchors()

    # What the template does, learnt from sentinel conversations

    def _probe(self) -> None:
        user = [{"role": "user", "content": _USER.format(k)} for k in range(2)]
        answer = [{"role": "assistant", "content": _ANSWER.format(k)} for k in range(2)]
        one = self._probe_render([user[0], answer[0]], 1)
        if one is None:
            self._as_parts = True  # vision-style templates read content as a list of typed parts
            one = self._probe_render([user[0], answer[0]], 1)
        if one is None:
            line = self.template.line_of("assistant", "content", "messages")
            raise BadInput(
                f"chat template of {self.name} does not write the assistant's text ({self.template.quote(line)}); "
                "mend the template or give another one"
            )
        two = self._probe_render([user[0], answer[0], user[1], answer[1]], 2)
        self._tails: dict[str, int] = {}
        lead = self._learn_lead([user[0]], one[0])
        self.generation_prompt = "row" if lead is None else "template"
        if lead is None:
            self.notes.append("the template's generation prompt is not how its rows go on; prompts are taken from rendered rows instead")
        self.lead = lead or ""
        if two is not None:
            self._learn_lead([user[0]], two[0])
            self._learn_lead([user[0], answer[0], user[1]], two[0] + answer[0]["content"] + two[1])
        self._stops = self._learn_stops(one[1], two, user)
        eos = self.tokenizer.eos_token
        closing = self._stop_match(one[1], 0)
        self.stop_text = closing.group(1) if closing else eos
        self.appends_eos = closing is None
        if self.stop_text is None:
            raise BadInput(
                f"chat template of {self.name} writes no stop token after the answer and the tokenizer has no eos_token; "
                "set the tokenizer's eos_token"
            )
        if self.appends_eos:
            literal = one[1].strip()
            seen = f" (it writes {literal[:40]!r}, which is not one token)" if literal else ""
            self.notes.append(f"the template ends no answer with a stop token{seen}; {eos!r} is appended to the last one")
        if self.lead.strip():
            self.notes.append(f"the template puts {self.lead!r} between the generation prompt and the answer; it is learnt too")
        ids = [self.tokenizer.convert_tokens_to_ids(t) for t in dict.fromkeys([self.stop_text, *self._stops, eos]) if t]
        self.stop_token_ids: list[int] = [i for i in dict.fromkeys(ids) if isinstance(i, int)]
        if not self._tool_role_known(user, answer):
            self.tool_role = "user"  # tool results are given as user turns

    def _probe_render(self, messages: list[Message], answers: int) -> list[str] | None:
        try:
            segments = _split_answers(self._render(messages)[0], answers)
        except TemplateRefusal as error:
            if answers == 1 and self._as_parts:
                raise BadInput(
                    f"chat template of {self.name} fails on a user and an assistant turn: {error} ({self.template.quote(error.line)})"
                ) from None
            return None
        return segments

    def _learn_lead(self, messages: list[Message], before: str) -> str | None:
        """What the template writes between its generation prompt and the answer, such as a space; remembered by its context.

        None: the generation prompt does not stand before the answer in a rendered row.
        """
        try:
            prompt, closed = self._render(messages, True)[0], self._render(messages)[0]
        except TemplateRefusal:
            prompt, closed = "", ""
        if not prompt or not before.startswith(prompt):
            return None
        lead = before[len(prompt) :]
        if prompt == closed and lead.strip():
            # The template ignores add_generation_prompt: what follows is the assistant's header, not something to learn.
            return None
        context = prompt[-24:]
        for message in messages:
            context = context.rsplit(message["content"][-8:], 1)[-1]
        if lead:
            self._tails[context + lead] = len(lead)
        return lead

    def _learn_stops(self, suffix: str, two: list[str] | None, user: list[Message]) -> list[str]:
        """Tokens that end an assistant turn: the one after the last answer, the one after an earlier answer, EOS."""
        found = []
        first = self._added_head.match(suffix)
        if first:
            found.append(first.group(1))
            earlier = self._added_head.match(two[1]) if two else None
            if two and earlier and earlier.group(1) != first.group(1):
                # A template may close earlier answers with another token; the header of the next turn is no stop.
                header = two[1].split(user[1]["content"])[0]
                if not two[0].split(user[0]["content"])[0].endswith(header):
                    found.append(earlier.group(1))
        if self.tokenizer.eos_token:
            found.append(self.tokenizer.eos_token)
        return list(dict.fromkeys(found))

    def _tool_role_known(self, user: list[Message], answer: list[Message]) -> bool:
        result = "Qz7toolGuidetuneqZ"
        try:
            text, _ = self._render([user[0], answer[0], {"role": "tool", "content": result}, answer[1]])
        except TemplateRefusal:
            return False
        return result in text and all(a["content"] in text for a in answer)

    @cached_property
    def _stop_head(self) -> re.Pattern[str]:
        return re.compile(r"\s*(" + "|".join(re.escape(s) for s in sorted(self._stops, key=len, reverse=True)) + ")")

    def _stop_match(self, text: str, position: int) -> re.Match[str] | None:
        return self._stop_head.match(text, position) if self._stops else None

    @cached_property
    def adds_bos(self) -> bool:
        """The tokenizer itself puts a BOS first (a post-processor, as in Llama)."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    @cached_property
    def digest(self) -> str:
        """Changes with anything that could change the tokens: template, variables, tokenizer."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        return fingerprint(
            {"encode": 1, "template": self.template.source, "variables": self.template.variables, "tokenizer": fingerprint(vocabulary)}
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What was learnt about the template, for reports."""
        return {
            "stop": self.stop_text,
            "stop_token_ids": self.stop_token_ids,
            "appends_eos": self.appends_eos,
            "adds_bos": self.adds_bos,
            "markers": self.template.has_markers,
            "generation_prompt": self.generation_prompt,
            "tool_role": self.tool_role,
            "notes": self.notes,
        }

    # Conversations to characters

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        plain = []
        for message in messages:
            if "train" not in message and not self._as_parts and message["role"] != "tool":
                plain.append(message)
                continue
            item = {k: v for k, v in message.items() if k != "train"}
            if item["role"] == "tool" and self.tool_role != "tool":
                item["role"] = self.tool_role
            if self._as_parts and isinstance(item["content"], str):
                item["content"] = [{"type": "text", "text": item["content"]}]
            plain.append(item)
        return self.template.render(plain, generation_prompt)

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The conversation as the template writes it.

        Raises:
            BadInput: the template refuses it.
        """
        try:
            return self._render(messages, generation_prompt)[0]
        except TemplateRefusal as error:
            raise BadInput(f"chat template of {self.name}: {error} ({self.template.quote(error.line)})") from None

    def _layout(self, messages: Sequence[Message]) -> _Layout | Refused:
        """Where each assistant turn lies in the rendered text."""
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            return Refused(NO_ANSWER, "no assistant turn")
        for k, message in enumerate(messages):
            if not isinstance(message.get("content"), str):
                return Refused(NOT_TEXT, f"turn {k + 1} of {len(messages)} is {type(message.get('content')).__name__}")
        for k in turns:
            if not messages[k]["content"].strip() and messages[k].get("train", True):
                return Refused(EMPTY_ANSWER, f"assistant turn {k + 1} of {len(messages)} is empty")
        try:
            text, marks = self._render(messages)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return Refused(SURROGATE, f"character {text[error.start]!r} cannot be written as UTF-8")
            places = self._places(text, messages)
            segments = None
            if places is None:
                hidden = list(messages)
                for j, k in enumerate(turns):
                    hidden[k] = {**messages[k], "content": _ANSWER.format(j)}
                segments = _split_answers(self._render(hidden)[0], len(turns))
            spans: list[_Span] = []
            position = 0
            for j, k in enumerate(turns):
                found = None
                if places is not None:
                    start, end = places[k]
                    found = start - self._lead_length(text, position, start), end
                elif segments is not None:
                    found = self._walk(text, position, segments[j], segments[j + 1], messages[k]["content"])
                found = found or self._anchor(text, messages, k)
                if found is None and len(marks) == len(turns):
                    found = self._from_mark(text, marks[j])
                if found is None:
                    line = self.template.line_of("assistant", "content")
                    return Refused(NOT_FOUND, f"assistant turn {k + 1} of {len(messages)}; template {self.template.quote(line)}")
                boundary, position = found
                span = self._close(text, boundary, position, bool(messages[k].get("train", True)))
                spans.append(self._narrow(span, marks) if self.template.has_markers else span)
        except TemplateRefusal as error:
            return Refused(REFUSED, f"{error} ({self.template.quote(error.line)})")
        if any(later.boundary < span.end for span, later in zip(spans, spans[1:], strict=False)):
            return Refused(NOT_FOUND, "assistant turns overlap in the rendered text")
        return _Layout(text, spans, turns[-1] == len(messages) - 1)

    def _places(self, text: str, messages: Sequence[Message]) -> list[tuple[int, int]] | None:
        """Where each message's content lies in `text`, when that is the template's own text with the contents in it as they are.

        What a template writes around the contents of a sequence of roles is learnt once. None: it does not explain all of `text`,
        as with templates that look into the contents; those are found by rendering the conversation again.
        """
        roles = tuple([message["role"] for message in messages])
        if roles not in self._skeletons:
            if len(self._skeletons) >= _REMEMBERED:
                self._skeletons.clear()
            hidden = [{"role": role, "content": _ANSWER.format(k)} for k, role in enumerate(roles)]
            try:
                self._skeletons[roles] = _split_answers(self._render(hidden)[0], len(roles))
            except TemplateRefusal:
                self._skeletons[roles] = None
        skeleton = self._skeletons[roles]
        if skeleton is None:
            return None
        places, position = [], 0
        for before, message in zip(skeleton, messages, strict=False):
            start = position + len(before)
            written = message["content"]
            if not text.startswith(written, start):
                written = written.strip()
            if not text.startswith(before, position) or not text.startswith(written, start):
                return None
            position = start + len(written)
            places.append((start, position))
        return places if text.startswith(skeleton[-1], position) and len(text) == position + len(skeleton[-1]) else None

    def _lead_length(self, text: str, start: int, end: int) -> int:
        return max((n for tail, n in self._tails.items() if text.endswith(tail, start, end)), default=0)

    def _walk(self, text: str, position: int, before: str, after: str, content: str) -> tuple[int, int] | None:
        """(boundary, end of content), when the template writes the content as it is or stripped."""
        if not text.startswith(before, position):
            return None
        start = position + len(before)
        for written in (content, content.strip(), content.rstrip(), content.lstrip()):
            end = start + len(written)
            if text.startswith(written, start) and text.startswith(after, end):
                return start - self._lead_length(before, 0, len(before)), end
        return None

    def _anchor(self, text: str, messages: Sequence[Message], k: int) -> tuple[int, int] | None:
        """(boundary, end of content) of a turn whose content the template changes, from what stays the same around it."""
        hidden = list(messages)
        hidden[k] = {**messages[k], "content": _ANSWER.format(0)}
        segments = _split_answers(self._render(hidden)[0], 1)
        if segments is None:
            return None
        before, after = segments
        boundary = len(before) - self._lead_length(before, 0, len(before))
        end = len(text) - len(after)
        if boundary < end and text.startswith(before[:boundary]) and text.endswith(after):
            return boundary, end
        return None

    def _from_mark(self, text: str, mark: tuple[int, int]) -> tuple[int, int]:
        start, end = mark
        closing = [m for m in re.finditer(self._stop_head, text[start:end])]
        return (start, start + closing[-1].start()) if closing else (start, end)

    def _close(self, text: str, boundary: int, content_end: int, train: bool) -> _Span:
        stop = self._stop_match(text, content_end)
        return _Span(boundary, boundary, content_end, stop.end() if stop else content_end, train, stop is not None)

    def _narrow(self, span: _Span, marks: list[tuple[int, int]]) -> _Span:
        """Keep what the markers enclose. A header they enclose is not learnt, and a stop token they leave out is."""
        inside = [(max(s, span.start), min(e, span.end)) for s, e in marks if s < span.content_end and e > span.boundary]
        if not inside:
            return span._replace(train=False)
        start, end = inside[0][0], inside[-1][1]
        return span._replace(start=start, end=span.end if end >= span.content_end else end, stop=span.stop and end >= span.content_end)

    def _cut_points(self, layout: _Layout) -> tuple[list[tuple[str, bool]], bool]:
        """The text in pieces (text, is target), and whether the tokenizer's EOS closes the last one."""
        text, spans, closed = layout
        pieces, position = [], 0
        for span in spans:
            pieces.append((text[position : span.boundary], False))
            pieces.append((text[span.boundary : span.start], False))
            pieces.append((text[span.start : span.end], span.train))
            position = span.end
        append = closed and spans[-1].end == spans[-1].content_end
        if not append:  # nothing may stand between the answer and the stop token that is appended
            pieces.append((text[position:], False))
        return [p for p in pieces if p[0]], append

    # Characters to tokens

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Tokens and targets of one conversation.

        Raises:
            BadInput: it cannot be encoded (see `encode_many` for many conversations of which some may be bad).
        """
        result = self.encode_many([messages])[0]
        if isinstance(result, Refused):
            raise BadInput(f"{result.reason}: {result.detail}")
        return result

    def encode_many(self, conversations: Iterable[Sequence[Message]]) -> list[Encoded | Refused]:
        """Encode conversations with one batched tokenizer call; a bad one becomes `Refused` in its place."""
        results: list[Encoded | Refused | None] = []
        plans: list[tuple[int, list[tuple[str, bool]], bool, _Layout]] = []
        for conversation in conversations:
            layout = self._layout(conversation)
            if isinstance(layout, Refused):
                results.append(layout)
            elif not any(span.train for span in layout.spans):
                results.append(Refused(NO_ANSWER, "every assistant turn is marked train: false"))
            else:
                pieces, append = self._cut_points(layout)
                plans.append((len(results), pieces, append, layout))
                results.append(None)
        tokens = self._tokenise([[text for text, _ in pieces] for _, pieces, _, _ in plans])
        for (index, pieces, append, layout), ids in zip(plans, tokens, strict=True):
            results[index] = self._assemble(pieces, ids, append, layout)
        return results  # type: ignore[return-value]

    def _assemble(self, pieces: list[tuple[str, bool]], tokens: list[list[int]], append: bool, layout: _Layout) -> Encoded | Refused:
        input_ids: list[int] = []
        target: list[bool] = []
        placed: list[Piece] = []
        tokens = self._with_bos(tokens)
        start = 0
        for (text, is_target), ids in zip(pieces, tokens, strict=True):
            end = start + len(ids)
            placed.append(Piece(text, is_target, start, end))
            input_ids += ids
            target += [is_target] * len(ids)
            start = end
        if append and layout.spans[-1].train:
            eos = self.tokenizer.eos_token_id
            last = max(k for k, piece in enumerate(placed) if piece.target)
            placed[last] = placed[last]._replace(text=placed[last].text + self.tokenizer.eos_token, end=placed[last].end + 1)
            input_ids.append(eos)
            target.append(True)
        if target[:1] == [True]:
            target[0] = False  # nothing comes before the first token, so it cannot be predicted
        if not any(target):
            return Refused(NO_TOKENS, "the assistant's text has no tokens of its own")
        final = layout.spans[-1].boundary
        length = position = 0
        for text, _, _, end in placed:
            if position >= final:
                break
            position, length = position + len(text), end
        last_target = len(target) - 1
        while not target[last_target]:
            last_target -= 1
        return Encoded(input_ids, target, placed, length, input_ids[last_target] in self.stop_token_ids, append)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the next assistant turn is generated.

        Raises:
            BadInput: the conversation cannot be rendered.
        """
        return self.prompts([messages])[0]

    def prompts(self, conversations: Iterable[Sequence[Message]]) -> list[list[int]]:
        """`prompt` of many conversations with one batched tokenizer call."""
        plans = []
        for number, conversation in enumerate(conversations, 1):
            layout = self._layout([*conversation, {"role": "assistant", "content": "Qz7nextGuidetuneqZ"}])
            if isinstance(layout, Refused):
                raise BadInput(f"conversation {number}: {layout.reason}: {layout.detail}")
            text, spans, _ = layout
            pieces, _ = self._cut_points(_Layout(text[: spans[-1].boundary], spans[:-1], False))
            plans.append([text for text, _ in pieces])
        return [[token for ids in self._with_bos(tokens) for token in ids] for tokens in self._tokenise(plans)]

    def _with_bos(self, tokens: list[list[int]]) -> list[list[int]]:
        """Exactly one BOS where the tokenizer wants one, whether the template writes it or not."""
        bos = self._bos
        if bos is None or not tokens:
            return tokens
        head = tokens[0]
        while head[:2] == [bos, bos]:
            head = head[1:]
        if self.adds_bos and head[:1] != [bos]:
            head = [bos, *head]
        return [head, *tokens[1:]]

    def _choose_anchors(self) -> list[str]:
        """Left contexts to tokenise a continuation in; none for tokenizers that read text the same wherever it starts."""
        samples = ("x", "The", "1", ".")
        alone = self._ids(list(samples))
        usable = []
        for anchor in _ANCHORS:
            own, *after = self._ids([anchor, *(anchor + s for s in samples)])
            if all(ids[: len(own)] == own for ids in after):
                if [ids[len(own) :] for ids in after] == alone:
                    return []
                usable.append(anchor)
        if not usable:
            self.notes.append("this tokenizer's tokens depend on the left context; the first token of an answer may be an unusual one")
        return usable

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.truncation is None and backend.padding is None:
            # The same tokens as the call below, without the offsets and masks that nobody needs here.
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)[
            "input_ids"
        ]

    def _remembered(self, texts: list[str]) -> list[list[int]]:
        """`_ids`, with the tokens of short texts (a template's own, mostly) remembered."""
        known = self._short
        if len(known) > _REMEMBERED:
            known.clear()
        new = list(dict.fromkeys(text for text in texts if len(text) <= _SHORT and text not in known))
        long = [text for text in texts if len(text) > _SHORT]
        ids = self._ids(new + long)
        known.update(zip(new, ids, strict=False))
        rest = iter(ids[len(new) :])
        return [known[text] if len(text) <= _SHORT else next(rest) for text in texts]

    def _tokenise(self, rows: list[list[str]]) -> list[list[list[int]]]:
        """Token ids of each piece of each row; one call for all."""
        texts, drops = [], []
        for pieces in rows:
            left = ""
            for piece in pieces:
                anchor = self._left_context(left, piece) if self._anchors and left else ""
                texts.append(anchor + piece)
                drops.append(anchor)
                left = piece
        ids = self._remembered(texts)
        anchors = list(dict.fromkeys(d for d in drops if d))
        known = dict(zip(anchors, self._ids(anchors), strict=True))
        out, at = [], 0
        for pieces in rows:
            row = []
            for piece in pieces:
                row.append(self._drop_anchor(ids[at], drops[at], piece, known) if drops[at] else ids[at])
                at += 1
            out.append(row)
        return out

    def _left_context(self, left: str, piece: str) -> str:
        # After a control token the natural tokens are those that the tokenizer gives after that token (some put a space there).
        tail = self._added_tail.search(left[-64:])
        if tail and (not tail.group(2) or self._swallows(tail.group(1))):
            return tail.group(0)
        return next((a for a in self._anchors if not piece.startswith(a)), self._anchors[0])

    def _swallows(self, token: str) -> bool:
        """The tokenizer eats the white space after this control token."""
        return bool(getattr(self._added.get(token), "rstrip", False))

    def _drop_anchor(self, ids: list[int], anchor: str, piece: str, known: dict[str, list[int]]) -> list[int]:
        own = known[anchor]
        if ids[: len(own)] == own:
            return ids[len(own) :]
        for other in self._anchors:
            first, both = self._ids([other, other + piece])
            if both[: len(first)] == first:
                return both[len(first) :]
        return self._ids([piece])[0]

    def control_text(self, messages: Sequence[Message]) -> str | None:
        """The first control token that a message's own text holds: it is read as that token, not as text. None: there is none."""
        for message in messages:
            found = self._added_anywhere.search(message["content"])
            if found:
                return found.group(0)
        return None

    # Rows that are too long

    def cut(
        self, messages: Sequence[Message], encoded: Encoded, max_length: int, cut_answer: bool = False
    ) -> tuple[Encoded, int] | Refused:
        """Shorten a row to `max_length` tokens: whole answers, template text and both ends of each message stay.

        Tokens are taken from the middle of the longest messages that are not learnt. With `cut_answer` the tail of the last
        answer goes when that is not enough.

        Returns:
            The shorter row and the number of tokens taken out, or `Refused` when the answers alone are too long.
        """
        excess = len(encoded.input_ids) - max_length
        if excess <= 0:
            return encoded, 0
        keep = [True] * len(encoded.input_ids)
        # What follows the last target teaches nothing.
        last_target = len(encoded.target) - 1 - encoded.target[::-1].index(True)
        for t in range(len(keep) - 1, last_target, -1):
            if excess:
                keep[t], excess = False, excess - 1
        ranges = self._message_ranges(messages, encoded)
        for floor in (2 * _MIN_KEPT, 2):
            excess = _take_from_middles(ranges, keep, excess, floor)
        if excess and cut_answer:
            ended = encoded.ends_with_stop
            for t in range(last_target - (1 if ended else 0), encoded.prompt_length, -1):
                if excess and keep[t] and encoded.target[t]:
                    keep[t], excess = False, excess - 1
        if excess:
            return Refused(
                TOO_LONG_ANSWER, f"{encoded.supervised} answer tokens and the template's own need more than max_length {max_length}"
            )
        return _without(encoded, keep), keep.count(False)

    def _message_ranges(self, messages: Sequence[Message], encoded: Encoded) -> list[list[tuple[int, int, int]]]:
        """Per message that is not learnt, its tokens as (position, first character, end character)."""
        offsets: list[tuple[int, int, int]] = []
        start = 0
        left = ""
        for piece in encoded.pieces:
            if not piece.target:
                anchor = self._left_context(left, piece.text) if self._anchors and left else ""
                batch = self.tokenizer(anchor + piece.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                mapping = batch["offset_mapping"][len(batch["input_ids"]) - (piece.end - piece.start) :]
                first = piece.end - len(mapping)  # a BOS that was put first has no characters
                shift = start - len(anchor)
                offsets += [(first + k, a + shift, b + shift) for k, (a, b) in enumerate(mapping)]
            start += len(piece.text)
            left = piece.text
        text = "".join(piece.text for piece in encoded.pieces)
        ranges, cursor = [], 0
        for message in messages:
            written = next((c for c in (message["content"], message["content"].strip()) if c and text.find(c, cursor) >= 0), None)
            if written is None:
                continue
            begin = text.find(written, cursor)
            cursor = begin + len(written)
            inside = [o for o in offsets if begin <= o[1] and o[2] <= cursor and not encoded.target[o[0]]]
            # A few words are not worth cutting, and may have been found in the template's own text instead.
            if len(inside) >= _MIN_KEPT and len(written) >= 2 * _MIN_KEPT:
                ranges.append(inside)
        if not ranges:
            # The template rewrites its messages: cut from the middle of what is not learnt, far from the template's own text.
            ranges = [[o for o in offsets if p.start + 64 <= o[0] < p.end - 64] for p in encoded.pieces if not p.target]
            ranges = [r for r in ranges if r]
        return ranges


def _take_from_middles(ranges: list[list[tuple[int, int, int]]], keep: list[bool], excess: int, floor: int) -> int:
    """Drop tokens from the middle of the longest ranges, each down to `floor` tokens; what is still too much is returned."""
    for tokens in sorted(ranges, key=len, reverse=True):
        left = [t for t in tokens if keep[t[0]]]
        count = min(excess, len(left) - floor)
        if count <= 0:
            continue
        first = (len(left) - count + 1) // 2
        last = first + count
        # Tokens that share a character (bytes of one letter) go together.
        while 0 < first and left[first][1] < left[first - 1][2]:
            first -= 1
        while last < len(left) and left[last][1] < left[last - 1][2]:
            last += 1
        for position, _, _ in left[first:last]:
            keep[position] = False
        excess = max(0, excess - (last - first))
    return excess


def _without(encoded: Encoded, keep: list[bool]) -> Encoded:
    """The row without the tokens that are not kept; pieces keep their text and get their new positions."""
    before = [0]
    for kept in keep:
        before.append(before[-1] + kept)
    pick = [t for t, kept in enumerate(keep) if kept]
    return replace(
        encoded,
        input_ids=[encoded.input_ids[t] for t in pick],
        target=[encoded.target[t] for t in pick],
        pieces=[p._replace(start=before[p.start], end=before[p.end]) for p in encoded.pieces],
        prompt_length=before[encoded.prompt_length],
    )


def _split_answers(text: str, count: int) -> list[str] | None:
    """The text between sentinel answers 0 .. count-1; None unless each stands there once and in order."""
    parts = _ANSWER_PATTERN.split(text)
    return parts[::2] if parts[1::2] == [str(k) for k in range(count)] else None


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several named templates
        template = template.get("default") or next(iter(template.values()), None)
    return template


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Tokens that are matched in the text before anything else, by their text."""
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {token.content: token for token in decoder.values()}
    for text in tokenizer.all_special_tokens:
        tokens.setdefault(text, None)
    return {text: token for text, token in tokens.items() if text and not text.isspace()}

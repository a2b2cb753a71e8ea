"""One vocabulary for models whose tokenizers differ: rows of embeddings and head are found by their token, never by their place.

`base`: the anchor's tokenizer; tokens that only a source has are dropped. `union`: the anchor's ids stay, tokens that it lacks follow.
Which row a model has for a token that is not its own: the anchor's, so that its update there is zero; where the anchor lacks the token
too, the mean of the rows of those that have it (of one: that row).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from guidetune import artefacts
from guidetune.errors import BadInput, RunFailed
from guidetune.models.checkpoint import COPY_BYTES, Checkpoint, TensorInfo
from guidetune.models.fingerprints import tokenizer_digest
from guidetune.models.loading import TOKENIZER_FILES, load_tokenizer
from guidetune.models.names import empty_model
from guidetune.models.sources import ModelSource

TOKENIZER = "tokenizer.json"


class _Tokenized:
    """A model with its tokenizer: which row stands for which token."""

    def __init__(self, source: ModelSource) -> None:
        if not (source.path / TOKENIZER).is_file():
            raise BadInput(f"{source.spec} has no {TOKENIZER}, so its tokens cannot be matched with another model's")
        self.source = source
        self.checkpoint = Checkpoint(source.path)
        self.tokens: dict[str, int] = load_tokenizer(source).get_vocab()
        self.file: dict[str, Any] = json.loads((source.path / TOKENIZER).read_text(encoding="utf-8"))
        self.added: dict[str, dict[str, Any]] = {entry["content"]: entry for entry in self.file.get("added_tokens", [])}

    def order(self, token_of: Sequence[str | None]) -> torch.Tensor:
        """The own row of every new row, −1 where there is none. A row without a token keeps its place."""
        used, rows = set(self.tokens.values()), self.rows
        own = [
            self.tokens.get(token, -1) if token is not None else row if row < rows and row not in used else -1
            for row, token in enumerate(token_of)
        ]
        return torch.tensor([row if row < rows else -1 for row in own])

    @property
    def rows(self) -> int:
        return min(self.checkpoint.parameter(name).rows for name in vocabulary_parameters(self.source.path))


class Vocabulary:
    """The vocabulary of a merge: that of the anchor, or the union with the sources'.

    Args:
        sources: the models minus the anchor that are merged, in order.

    Raises:
        BadInput: a tokenizer is missing or of a kind that cannot be extended.
    """

    def __init__(self, anchor: ModelSource, sources: Sequence[ModelSource], kind: Literal["base", "union"]) -> None:
        self.kind = kind
        self.anchor = _Tokenized(anchor)
        self.others = [_Tokenized(source) for source in {source.path: source for source in sources}.values() if source.path != anchor.path]
        self.parameters = vocabulary_parameters(anchor.path)
        self.new: dict[str, int] = {}
        first = max(self.anchor.tokens.values()) + 1
        for other in self.others if kind == "union" else ():
            for token in sorted(set(other.tokens) - set(self.anchor.tokens) - set(self.new), key=lambda token: other.tokens[token]):
                self.new[token] = first + len(self.new)
        if self.new and not isinstance(self.anchor.file.get("model", {}).get("vocab"), (dict, list)):
            raise BadInput(f"{anchor.spec}: its tokenizer has no list of tokens that others could be added to")
        self.size = max(self.anchor.rows, first + len(self.new))
        token_of: list[str | None] = [None] * self.size
        for token, row in (*self.anchor.tokens.items(), *self.new.items()):
            if row < self.size:
                token_of[row] = token
        self._order = {one.source.path: one.order(token_of) for one in (self.anchor, *self.others)}

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a parameter in the result."""
        return (self.size, *shape[1:]) if name in self.parameters else shape

    def rows(self, source: ModelSource, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a vocabulary parameter of one model, float32: its own, else the anchor's, else the mean of the others'."""
        found = self._gather(source.path, name, start, stop)
        if source.path != self.anchor.source.path:
            lacking = self._order[source.path][start:stop] < 0
            if bool(lacking.any()):
                found[lacking] = self._gather(self.anchor.source.path, name, start, stop)[lacking]
        lacking = (self._order[source.path][start:stop] < 0) & (self._order[self.anchor.source.path][start:stop] < 0)
        if bool(lacking.any()):
            total, count = torch.zeros_like(found), torch.zeros(stop - start)
            for other in self.others:
                has = self._order[other.source.path][start:stop] >= 0
                total[has] += self._gather(other.source.path, name, start, stop)[has]
                count += has
            mean = total / count.clamp_min(1).view(-1, *[1] * (total.dim() - 1))
            found[lacking] = mean[lacking]
        return found

    def _gather(self, path: Path, name: str, start: int, stop: int) -> torch.Tensor:
        model = next(one for one in (self.anchor, *self.others) if one.source.path == path)
        info = model.checkpoint.parameter(name)
        return gather(lambda a, b: model.checkpoint.parameter_rows(name, a, b).float(), self._order[path][start:stop], info.shape[1:])

    def write(self, work: Path) -> None:
        """Add the new tokens to the anchor's tokenizer files in `work`, and set the size in its config.

        A token that its own tokenizer adds to the text's pieces whole stays such a token; an ordinary one joins the vocabulary, with the
        merges that make it after all of the anchor's. The chat template and the roles of special tokens are the anchor's.

        Raises:
            RunFailed: the tokenizer does not have the tokens at their ids afterwards.
        """
        config = json.loads((work / "config.json").read_text(encoding="utf-8"))
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "vocab_size" in part:
                part["vocab_size"] = self.size
        artefacts.write_json(work / "config.json", config)
        if not self.new:
            return
        tree = json.loads((work / TOKENIZER).read_text(encoding="utf-8"))
        model, known = tree["model"], {self._key(merge) for merge in tree["model"].get("merges") or ()}
        decoder: dict[str, Any] = {}
        for token, row in self.new.items():
            home = next(other for other in self.others if token in other.tokens)
            if token in home.added:
                entry = {**home.added[token], "id": row}
                tree.setdefault("added_tokens", []).append(entry)
                decoder[str(row)] = {key: value for key, value in entry.items() if key != "id"}
            elif isinstance(model["vocab"], dict):
                model["vocab"][token] = row
            else:
                model["vocab"].append([token, dict(home.file["model"]["vocab"]).get(token, 0.0)])
        for other in self.others:
            for merge in other.file["model"].get("merges") or ():
                if self._key(merge) not in known and "".join(self._key(merge)) in self.new and "merges" in model:
                    known.add(self._key(merge))
                    model["merges"].append(merge if isinstance(merge, type((model["merges"] or [merge])[0])) else list(self._key(merge)))
        text = json.dumps(tree, ensure_ascii=False)
        artefacts.write_text_atomic(work / TOKENIZER, text)
        settings = work / "tokenizer_config.json"
        if settings.is_file() and "added_tokens_decoder" in (options := json.loads(settings.read_text(encoding="utf-8"))):
            options["added_tokens_decoder"] |= decoder
            artefacts.write_json(settings, options)
        written = load_tokenizer(str(work)).get_vocab()
        if wrong := [token for token, row in {**self.anchor.tokens, **self.new}.items() if written.get(token) != row]:
            raise RunFailed(f"the union of the tokenizers cannot be written: {wrong[0]!r} would have another id; use tokenizer: base")

    @staticmethod
    def _key(merge: str | Sequence[str]) -> tuple[str, ...]:
        return tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": self.kind, "of": [tokenizer_digest(load_tokenizer(one.source)) for one in (self.anchor, *self.others)]}

    def close(self) -> None:
        for one in (self.anchor, *self.others):
            one.checkpoint.close()


class Extended(Checkpoint):
    """The anchor as it would be with the vocabulary of the merge: other rows in its embeddings and head, everything else as stored."""

    def __init__(self, source: ModelSource, vocabulary: Vocabulary) -> None:
        super().__init__(source.path)
        self.source, self.vocabulary = source, vocabulary
        names, self._named = self.names, {}
        for name in vocabulary.parameters:
            info = self.tensors[names.file_of[name]]
            shape = vocabulary.shape(name, info.shape)
            self._named[info.name] = name
            self.tensors[info.name] = TensorInfo(info.name, info.dtype, shape, info.file, info.start, info.row_bytes * shape[0])
        shapes = {name: vocabulary.shape(name, shape) for name, shape in names.shapes.items()}
        self.__dict__["names"] = replace(names, shapes=shapes)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name not in self._named:
            return super().rows(name, start, stop)
        stored = self._stored
        found = self.vocabulary.rows(self.source, self._named[name], start, self.tensors[name].rows if stop is None else stop)
        return found.to(stored.rows(name, 0, 0).dtype)

    def float_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        values = self.rows(name, start, stop)  # not those of the file, which may be kept
        return values if values.dtype == torch.float64 else values.float()

    @cached_property
    def _stored(self) -> Checkpoint:
        return Checkpoint(self.folder)

    def raw(self, name: str, piece: int = COPY_BYTES) -> Iterator[bytearray]:
        if name not in self._named:
            yield from super().raw(name, piece)
            return
        info = self.tensors[name]
        step = max(1, piece // max(1, info.row_bytes))
        for start in range(0, info.rows, step):
            yield bytearray(self.rows(name, start, min(start + step, info.rows)).contiguous().flatten().view(torch.uint8).numpy())

    def fitted(self, model: Any) -> Any:
        """A model of the anchor's weights, brought to the new vocabulary."""
        model.resize_token_embeddings(self.vocabulary.size, mean_resizing=False)
        with torch.no_grad():
            for name in self.vocabulary.parameters:
                model.get_parameter(name).copy_(self.parameter_rows(name).to(model.get_parameter(name).dtype))
        return model


def vocabulary_parameters(folder: Path) -> list[str]:
    """The parameters of a model whose rows stand for tokens: input embedding, output head and its bias."""
    model = empty_model(folder)
    head = model.get_output_embeddings()
    wanted = [
        model.get_input_embeddings().weight,
        *(p for p in (getattr(head, "weight", None), getattr(head, "bias", None)) if p is not None),
    ]
    return [name for name, p in model.named_parameters(remove_duplicate=False) if any(p is one for one in wanted)]


def gather(rows: Callable[[int, int], torch.Tensor], order: torch.Tensor, row_shape: tuple[int, ...]) -> torch.Tensor:
    """Rows in another order, read in runs of neighbours; rows of number −1 are 0. rows(a, b) gives [b − a, *row_shape], float32."""
    found = torch.zeros(len(order), *row_shape)
    if not len(order) or prod(found.shape) == 0:
        return found
    starts = [0, *(torch.nonzero(order[1:] != order[:-1] + 1).flatten() + 1).tolist(), len(order)]
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        first = int(order[a])
        if first == -1:  # a run of missing rows is one row long, or goes on with row 0
            if b > a + 1:
                found[a + 1 : b] = rows(0, b - a - 1)
        else:
            found[a:b] = rows(first, first + b - a)
    return found


def differing(a: ModelSource, b: ModelSource) -> str | None:
    """How the token ids of two models contradict each other; None where they do not, or a tokenizer is missing."""
    if not all(any((source.path / name).is_file() for name in TOKENIZER_FILES) for source in (a, b)):
        return None
    files = [source.path / TOKENIZER for source in (a, b)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    one, two = (load_tokenizer(source).get_vocab() for source in (a, b))
    moved = sorted(token for token, row in one.items() if two.get(token, row) != row)
    if moved:
        return f"{len(moved)} tokens have different ids, such as {moved[0]!r} {one[moved[0]]} and {two[moved[0]]}"
    token_of = {row: token for token, row in two.items()}
    other = sorted(row for token, row in one.items() if token_of.get(row, token) != token)
    if other:
        mine = {row: token for token, row in one.items()}
        return f"{len(other)} ids stand for different tokens, such as {other[0]}: {mine[other[0]]!r} and {token_of[other[0]]!r}"
    return None

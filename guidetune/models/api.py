"""Models behind an OpenAI-compatible server: one client with a cache on disk, retries, a limit on cost and on parallel requests.

    client = Client(ApiSettings(model="judge-model", base_url="http://127.0.0.1:8000/v1"))
    client.ask([{"role": "user", "content": "2 + 2?"}]).text

The key is read from the environment (`key_env`) when a request is made. It is never written: neither to the cache, nor to logs, results or
error messages. Needs the openai package (extra `api`).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from guidetune.artefacts import canonical, write_json
from guidetune.errors import BadInput, RunFailed
from guidetune.models.fingerprints import cache_folder

Message = Mapping[str, str]
CACHE_VERSION = 1


class ApiSettings(BaseModel):
    """Which model answers, and within which limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Name of the model at the server.")
    base_url: str | None = Field(None, description="Address of the server, ending in /v1; default: $OPENAI_BASE_URL.")
    key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key; a server on this machine may need none.")
    max_tokens: PositiveInt = Field(512, description="Longest answer.")
    limit_as: Literal["max_tokens", "max_completion_tokens"] = Field("max_tokens", description="What the server calls that limit.")
    send_temperature: bool = Field(True, description="false for models that refuse a temperature.")
    concurrency: PositiveInt = Field(8, description="Requests at the same time.")
    timeout: PositiveFloat = Field(120.0, description="Seconds to wait for one answer.")
    retries: NonNegativeInt = Field(5, description="Further attempts after 408, 409, 429, 5xx, time-outs and lost connections.")
    price_in: NonNegativeFloat | None = Field(None, description="Price of a million prompt tokens; needed for a budget.")
    price_out: NonNegativeFloat | None = Field(None, description="Price of a million answer tokens; needed for a budget.")
    budget: NonNegativeFloat | None = Field(None, description="Stop before a request that could bring the cost of this command above this.")
    cache: str | None = Field(None, description="Folder of remembered answers; default: api in guidetune's cache folder.")

    replay: bool = Field(False, description="Answer from the cache only; what is not in it is an error, and no request is made.")

    @model_validator(mode="after")
    def _sound(self) -> ApiSettings:
        if self.budget is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("a budget needs price_in and price_out, per million tokens")
        if self.base_url is not None:
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("base_url must begin with http:// or https://")
            if parts.username or parts.password or parts.query:
                raise ValueError("base_url must hold no key or password; put the key into the environment variable that key_env names")
        return self

    def deciding(self) -> dict[str, Any]:
        """What an answer depends on: not where the server is, nor limits of time and cost."""
        return {"model": self.model, "max_tokens": self.max_tokens, "send_temperature": self.send_temperature}


@dataclass(frozen=True)
class Reply:
    """One answer. `text` is None when there is none, and `error` says why; `cost` is 0 for an answer from the cache."""

    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str | None = None
    cached: bool = False
    cost: float = 0.0
    error: str | None = None


class BudgetReached(RunFailed):
    """The next request could cost more than the budget allows."""


class _Account:
    """What has been spent and set aside by all clients of this process with the same settings: one budget for one command."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.spent = 0.0
        self.reserved = 0.0


_accounts: dict[ApiSettings, _Account] = {}


class Client:
    """Answers of one model. Thread-safe; several processes may share a cache folder.

    Equal requests (model, messages, sampling options, sample number) are asked once, wherever the server is: the answer is one file in
    the cache, named by the request's hash and put there whole.
    """

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self.base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self.cache = Path(settings.cache or cache_folder() / "api").expanduser()
        self.spent = 0.0
        self.requests = 0
        self.hits = 0
        self._account = _accounts.setdefault(settings, _Account())
        self._turn = self._account.turn
        self._sdk: Any = None

    # -- asking -------------------------------------------------------------------------------------------------------

    def ask(self, messages: Sequence[Message], *, temperature: float = 0.0, sample: int = 0, max_tokens: int | None = None) -> Reply:
        """The answer to a conversation. `sample` numbers the draws of one request at a temperature above 0.

        A request that the server refuses (400, 404, 413, 422) or that fails in every attempt is a Reply with `error`; the run goes on.

        Raises:
            BadInput: no key, a key that is refused, no openai package.
            BudgetReached: before a request that could exceed the budget; everything answered so far is in the cache.
        """
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": [{"role": str(m["role"]), "content": str(m["content"])} for m in messages],
            self.settings.limit_as: max_tokens or self.settings.max_tokens,
        }
        if self.settings.send_temperature:
            request["temperature"] = float(temperature)
        if temperature > 0:
            request["seed"] = sample
        place = self._place(request, sample)
        if (known := self._known(place)) is not None:
            with self._turn:
                self.hits += 1
            return known
        if self.settings.replay:
            return Reply(None, error="not in the cache, and replay makes no requests")
        reserved = self._reserve(request)
        charged = reserved  # what is not known to have cost less counts in full
        try:
            reply, charged = self._request(request, reserved)
        finally:
            with self._turn:
                self._account.reserved -= reserved
                self._account.spent += charged
                self.spent += charged
                self._turn.notify_all()
        if reply.error is None:
            self._remember(place, request, sample, reply)
        return reply

    def ask_all(self, conversations: Sequence[Sequence[Message]], *, temperature: float = 0.0, sample: int = 0) -> list[Reply]:
        """`ask` of each, several at a time; answers in order, equal conversations asked once.

        Raises:
            BudgetReached, BadInput: as `ask`, after the requests under way have been answered and kept.
        """
        keys = [canonical([dict(message) for message in messages]) for messages in conversations]
        first = {key: messages for key, messages in zip(keys, conversations, strict=True)}
        stop = threading.Event()

        def one(messages: Sequence[Message]) -> Reply | None:
            if stop.is_set():
                return None
            try:
                return self.ask(messages, temperature=temperature, sample=sample)
            except BaseException:
                stop.set()
                raise

        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            waiting = {key: pool.submit(one, messages) for key, messages in first.items()}
            wait(waiting.values())
        finally:  # also after Ctrl-C: nothing new is begun, and what is under way is kept
            stop.set()
            pool.shutdown()
        failed = next((future.exception() for future in waiting.values() if future.exception() is not None), None)
        if failed is not None:
            raise failed
        return [waiting[key].result() for key in keys]  # type: ignore[misc]

    def cost_text(self) -> str:
        """What the answers cost, in words."""
        priced = self.settings.price_in is not None or self.settings.price_out is not None
        return f"{self.requests} requests, {self.hits} answers from the cache" + (f", cost {self.spent:.4g}" if priced else "")

    # -- cost ---------------------------------------------------------------------------------------------------------

    def _price(self, prompt: int, completion: int) -> float:
        return ((self.settings.price_in or 0.0) * prompt + (self.settings.price_out or 0.0) * completion) / 1e6

    def _reserve(self, request: Mapping[str, Any]) -> float:
        """Set aside the most that a request can cost: a token is at least a byte, and no answer is longer than max_tokens."""
        size = sum(len(m["content"].encode("utf-8", "surrogatepass")) + 16 for m in request["messages"])
        most = self._price(size, request[self.settings.limit_as])
        budget, account = self.settings.budget, self._account
        with self._turn:
            # While others are under way, what they have set aside and will not spend may yet be enough.
            while budget is not None and account.spent + account.reserved + most > budget and account.reserved > 0:
                self._turn.wait()
            if budget is not None and account.spent + most > budget:
                raise BudgetReached(
                    f"the budget of {budget:g} is spent: {account.spent:.4g} so far, and the next request to {self.settings.model} may "
                    f"cost {most:.4g}. Answers so far are kept; raise budget and run again to go on"
                )
            account.reserved += most
        return most

    # -- the server ---------------------------------------------------------------------------------------------------

    def _request(self, request: Mapping[str, Any], reserved: float) -> tuple[Reply, float]:
        """(reply, what it costs): a request of unknown outcome is counted in full."""
        import openai

        with self._turn:
            self.requests += 1
            sdk = self._connect()
        try:
            done = sdk.chat.completions.create(**request)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise BadInput(f"{self.base_url} refuses the key in ${self.settings.key_env} (status {error.status_code})") from None
        except openai.APIStatusError as error:
            text = self._without_key(str(error))[:300]
            return Reply(None, error=f"status {error.status_code}: {text}"), 0.0
        except openai.APITimeoutError:
            tries = self.settings.retries + 1
            return Reply(None, error=f"no answer within {self.settings.timeout:g} s, {tries} times"), tries * reserved
        except openai.APIConnectionError as error:
            cause = self._without_key(str(error.__cause__ or error))[:200]
            return Reply(None, error=f"no connection to {self.base_url}: {cause}"), 0.0
        except openai.OpenAIError as error:
            return Reply(None, error=self._without_key(str(error))[:300]), reserved
        choice = done.choices[0] if done.choices else None
        text = choice.message.content if choice is not None else None
        if done.usage is not None:
            prompt, completion = done.usage.prompt_tokens, done.usage.completion_tokens
        else:  # some servers leave it out: the most it can have been
            prompt = sum(len(m["content"].encode("utf-8", "surrogatepass")) for m in request["messages"])
            completion = request[self.settings.limit_as]
        cost = self._price(prompt, completion)
        reason = choice.finish_reason if choice is not None else None
        error = None if text is not None else f"an answer without text (finish_reason {reason})"
        return Reply(text, reason, prompt, completion, done.model, False, cost, error), cost

    def _connect(self) -> Any:
        if self._sdk is None:
            try:
                import openai
            except ImportError:
                raise BadInput("models behind an API need the openai package: pip install 'guidetune[api]'") from None
            local = urlsplit(self.base_url).hostname in ("127.0.0.1", "localhost", "::1")
            key = os.environ.get(self.settings.key_env)
            if not key and not local:
                raise BadInput(f"set the environment variable {self.settings.key_env} to the key for {self.base_url}")
            # A proxy of the environment must not get between us and this machine.
            transport = {"http_client": openai.DefaultHttpxClient(trust_env=False)} if local else {}
            self._sdk = openai.OpenAI(
                api_key=key or "none",
                base_url=self.base_url,
                timeout=self.settings.timeout,
                max_retries=self.settings.retries,
                **transport,
            )
        return self._sdk

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.settings.key_env)
        return text.replace(key, "***") if key else text

    # -- the cache ----------------------------------------------------------------------------------------------------

    def _place(self, request: Mapping[str, Any], sample: int) -> Path:
        text = canonical({"version": CACHE_VERSION, "sample": sample, **request})
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.cache / key[:2] / f"{key}.json"

    def _known(self, place: Path) -> Reply | None:
        try:
            row = json.loads(place.read_text(encoding="utf-8"))["reply"]
            return Reply(row["text"], row["finish_reason"], row["prompt_tokens"], row["completion_tokens"], row["model"], cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or torn: ask again

    def _remember(self, place: Path, request: Mapping[str, Any], sample: int, reply: Reply) -> None:
        kept = {name: getattr(reply, name) for name in ("text", "finish_reason", "prompt_tokens", "completion_tokens", "model")}
        write_json(place, {"request": dict(request), "sample": sample, "reply": kept})

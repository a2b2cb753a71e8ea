"""`guidetune serve`: a model behind an OpenAI-compatible address, with the engine, templates and adapters of the rest of guidetune.

    GET /v1/models    POST /v1/chat/completions    POST /v1/completions    GET /health

Requests that wait together are generated together. Meant for one machine: a local judge, a chat page, a test. For load use vLLM.
"""

from __future__ import annotations

import hmac
import json
import math
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from guidetune.artefacts import derive_seed
from guidetune.errors import BadInput, RunFailed
from guidetune.progress import say

if TYPE_CHECKING:
    from guidetune.models.handle import ModelHandle

LARGEST_BODY = 16 * 1024 * 1024
GATHER = 0.005  # seconds in which further requests join a batch
# Options of the interface that change the text and are not served: refused, because ignoring them would change the answer silently.
NOT_SERVED = ("tools", "functions", "logprobs", "response_format", "presence_penalty", "frequency_penalty", "logit_bias", "echo", "suffix")


class Refused(Exception):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class _Job:
    """One answer to make; `done` is set when `tokens` or `error` is there."""

    prompt: list[int]
    room: int
    temperature: float
    top_p: float
    seed: int
    done: threading.Event = field(default_factory=threading.Event)
    tokens: tuple[int, ...] = ()
    finished: bool = False
    error: str | None = None


class Engine:
    """Generates for many callers: one thread works on the model, on all the jobs that wait with the same options."""

    def __init__(self, handle: ModelHandle) -> None:
        from guidetune.evaluation.generation import context_length

        self.handle = handle
        self.context = context_length(handle.model)
        eos = handle.tokenizer.eos_token_id
        self.stop = handle.chat.stop_token_ids if handle.chat is not None else [eos] if eos is not None else []
        self._waiting: queue.Queue[_Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="guidetune-serve")
        self._thread.start()

    def answer(self, jobs: Sequence[_Job]) -> None:
        """Do the jobs and wait for them."""
        for job in jobs:
            self._waiting.put(job)
        for job in jobs:
            job.done.wait()

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            time.sleep(GATHER)
            jobs = [job]
            while not self._waiting.empty():
                if (more := self._waiting.get()) is None:
                    self._waiting.put(None)
                    break
                jobs.append(more)
            groups: dict[tuple[int, float, float], list[_Job]] = {}
            for one in jobs:
                groups.setdefault((one.room, one.temperature, one.top_p), []).append(one)
            for (room, temperature, top_p), group in groups.items():
                self._generate(group, room, temperature, top_p)

    def _generate(self, jobs: list[_Job], room: int, temperature: float, top_p: float) -> None:
        from guidetune.evaluation.generation import Sampling, generate

        try:
            sampling = Sampling(temperature, top_p) if temperature > 0 else None
            found = generate(
                self.handle.model,
                [job.prompt for job in jobs],
                max_new_tokens=room,
                stop=self.stop,
                sampling=sampling,
                seeds=[job.seed for job in jobs] if sampling else None,
            )
            for place, completion in found:
                jobs[place].tokens, jobs[place].finished = completion.tokens, completion.finished
                jobs[place].done.set()
        except Exception as error:  # the callers must hear of it, and the thread must live on
            for job in jobs:
                if not job.done.is_set():
                    job.error = str(error) or type(error).__name__
        for job in jobs:
            job.done.set()


class Server(ThreadingHTTPServer):
    """The HTTP server of one model; `url` is what a client needs. `close()` ends it."""

    daemon_threads = True

    def __init__(self, handle: ModelHandle, name: str, host: str = "127.0.0.1", port: int = 0, key: str | None = None) -> None:
        self.handle, self.name, self.key = handle, name, key
        self.engine = Engine(handle)
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/v1"

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.engine.close()

    def complete(self, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        """The response to one request.

        Raises:
            Refused: options that are wrong or not served.
        """
        wanted = _read_options(body)
        if body.get("model") not in (None, "", self.name):
            raise Refused(404, f"the model {body['model']!r} is not served here; there is {self.name!r}")
        prompts = [self._chat_prompt(body)] if chat else self._plain_prompts(body)
        jobs = []
        for number, prompt in enumerate(prompts):
            room = wanted["max_tokens"] or (128 if not chat else 1024)
            if self.engine.context is not None:
                if len(prompt) >= self.engine.context:
                    raise Refused(400, f"the prompt has {len(prompt)} tokens, the model reads {self.engine.context}")
                room = min(room, self.engine.context - len(prompt))
            for sample in range(wanted["n"]):
                seed = derive_seed(wanted["seed"], "serve", number, sample)
                jobs.append(_Job(prompt, room, wanted["temperature"], wanted["top_p"], seed))
        self.engine.answer(jobs)
        if broken := next((job for job in jobs if job.error), None):
            raise Refused(500, str(broken.error))
        choices = []
        for index, job in enumerate(jobs):
            text = self.handle.tokenizer.decode(list(job.tokens), skip_special_tokens=True)
            ends = [place for stop in wanted["stop"] if stop and (place := text.find(stop)) >= 0]
            text = text[: min(ends)] if ends else text
            reason = "stop" if job.finished or ends else "length"
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        prompt_tokens, answer_tokens = sum(map(len, prompts)), sum(len(job.tokens) + job.finished for job in jobs)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens, "total_tokens": prompt_tokens + answer_tokens}
        kind = "chat.completion" if chat else "text_completion"
        identity = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        return {"id": identity, "object": kind, "created": int(time.time()), "model": self.name, "choices": choices, "usage": usage}

    def _chat_prompt(self, body: Mapping[str, Any]) -> list[int]:
        messages = body.get("messages")
        if self.handle.chat is None:
            raise Refused(400, f"{self.name} has no chat template; use /v1/completions")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise Refused(400, "messages must be a list of {role, content}")
        try:
            return self.handle.chat.prompt([{**m, "content": _text(m.get("content"))} for m in messages])
        except BadInput as error:
            raise Refused(400, str(error)) from None
        except Exception as error:  # a template raises what it likes, on roles that it does not know for instance
            raise Refused(400, f"the chat template refuses these messages: {error}") from None

    def _plain_prompts(self, body: Mapping[str, Any]) -> list[list[int]]:
        given = body.get("prompt")
        texts = given if isinstance(given, list) else [given]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise Refused(400, "prompt must be a text or a list of texts")
        return [list(ids) for ids in self.handle.tokenizer(texts)["input_ids"]]


def _text(content: Any) -> str:
    """A message's content: text, or a list of text parts."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Refused(400, "only text can be read")
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else str(content)


def _read_options(body: Mapping[str, Any]) -> dict[str, Any]:
    for name in NOT_SERVED:
        if body.get(name):
            raise Refused(400, f"{name} is not served here")

    def number(name: str, default: float, low: float, high: float) -> float:
        value = body.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not low <= value <= high:
            raise Refused(400, f"{name} = {value!r} must be a number from {low:g} to {high:g}")
        return value

    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) for one in stop):
        raise Refused(400, "stop must be a text or a list of texts")
    limit = next((name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), None)
    temperature = number("temperature", 1.0, 0, 10)
    top_p = number("top_p", 1.0, 0, 1)
    return {
        "max_tokens": int(number(limit, 1, 1, 1e6)) if limit else None,
        "temperature": float(temperature) if top_p > 0 else 0.0,  # top_p = 0 is the likeliest token
        "top_p": float(top_p) or 1.0,
        "n": int(number("n", 1, 1, 128)),
        "seed": int(number("seed", secrets.randbits(40), -(2**63), 2**64)),
        "stop": stop,
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 600
    server: Server

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        self._answer(self._get)

    def do_POST(self) -> None:  # noqa: N802
        self._answer(self._post)

    def _get(self) -> dict[str, Any]:
        path = self.path.partition("?")[0].rstrip("/")
        if path == "/health":
            return {"status": "ok"}
        self._check_key()
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "guidetune"}
        if path == "/v1/models":
            return {"object": "list", "data": [model]}
        raise Refused(404, f"there is no {path}")

    def _post(self) -> dict[str, Any]:
        # Read before anything is refused: the connection stays usable.
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > LARGEST_BODY:
            self.close_connection = True
            raise Refused(413 if size.isdecimal() else 411, f"the request must say its length, of at most {LARGEST_BODY} bytes")
        raw = self.rfile.read(int(size))
        self._check_key()
        path = self.path.partition("?")[0].rstrip("/")
        if path not in ("/v1/chat/completions", "/v1/completions"):
            raise Refused(404, f"there is no {path}")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused(400, "the request is not JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "the request must be a JSON object")
        done = self.server.complete(body, chat=path.endswith("/chat/completions"))
        return {"stream": done} if body.get("stream") else done

    def _check_key(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if self.server.key is not None and not hmac.compare_digest(given.encode(), self.server.key.encode()):
            raise Refused(401, "the key is missing or wrong")

    def _answer(self, work: Any) -> None:
        try:
            try:
                found = work()
                if "stream" in found:
                    self._stream(found["stream"])
                else:
                    self._send(200, found)
            except Refused as error:
                kind = "server_error" if error.status >= 500 else "invalid_request_error"
                self._send(error.status, {"error": {"message": str(error), "type": kind, "code": error.status}})
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the caller has gone

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, done: dict[str, Any]) -> None:
        """The finished answer as events: valid for clients that stream, though it comes at once."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        head = {key: done[key] for key in ("id", "created", "model")}
        kind = "chat.completion.chunk" if done["object"] == "chat.completion" else done["object"]
        for choice in done["choices"]:
            said = {"delta": choice["message"]} if "message" in choice else {"text": choice["text"]}
            chunk = {**head, "object": kind, "choices": [{"index": choice["index"], **said, "finish_reason": choice["finish_reason"]}]}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        say(f"{self.address_string()} {format % args}", level=1)


def serve(model: str, host: str = "127.0.0.1", port: int = 8000, key: str | None = None, dtype: str = "auto", device: str = "auto") -> None:
    """Serve a model until it is interrupted.

    Raises:
        BadInput: no such model, or the address cannot be had.
    """
    from guidetune.models.handle import open_handle

    handle = open_handle(model, dtype=dtype, device=device)
    try:
        server = Server(handle, model, host, port, key)
    except (OSError, OverflowError) as error:
        raise BadInput(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}; choose another --port") from None
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        say("warning: anybody who can reach this address may use the model; ask for a key with --key-env NAME")
    print(f"serving {model} at {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise RunFailed(f"the server ended: {error}") from None
    finally:
        server.server_close()

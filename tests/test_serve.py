"""`guidetune serve`: what the interface promises, over real sockets."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from guidetune.models.handle import ModelHandle, open_handle
from guidetune.serve import Server
from tests.servers import MODEL, serving


@pytest.fixture(scope="module")
def handle() -> ModelHandle:
    return open_handle(MODEL, device="cpu")


@pytest.fixture(scope="module")
def server(handle: ModelHandle) -> Iterator[Server]:
    with serving(handle) as one:
        yield one


def call(server: Server | str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """(status, JSON, or text when it is none) of a request."""
    url = server if isinstance(server, str) else server.url
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text


def chat(server: Server | str, text: str, **options: Any) -> tuple[int, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12, **options}
    return call(server, "/v1/chat/completions", body)


def test_models_and_health(server: Server) -> None:
    assert call(server, "/health") == (200, {"status": "ok"})
    status, found = call(server, "/v1/models")
    assert status == 200 and [model["id"] for model in found["data"]] == [MODEL]
    assert call(server, "/v2")[0] == 404


def test_answers_do_not_depend_on_who_else_asks(server: Server) -> None:
    questions = [f"What is {i} + 30?" for i in range(8)]
    alone = [chat(server, question)[1]["choices"][0]["message"]["content"] for question in questions]
    together: list[Any] = [None] * len(questions)

    def ask(i: int) -> None:
        together[i] = chat(server, questions[i])[1]["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert together == alone


def test_samples_come_from_the_seed(server: Server) -> None:
    def sample(seed: int) -> list[str]:
        status, found = chat(server, "Say something.", temperature=2.0, seed=seed, n=3)
        assert status == 200 and [choice["index"] for choice in found["choices"]] == [0, 1, 2]
        return [choice["message"]["content"] for choice in found["choices"]]

    assert sample(1) == sample(1) != sample(2) and len(set(sample(1))) > 1


def test_limits_and_stops(server: Server) -> None:
    _, found = chat(server, "What is 12 + 30?", max_tokens=1)
    assert found["choices"][0]["finish_reason"] == "length" and found["usage"]["completion_tokens"] == 1
    _, whole = chat(server, "What is 12 + 30?")
    text = whole["choices"][0]["message"]["content"]
    assert whole["choices"][0]["finish_reason"] == "stop" and text
    _, cut = chat(server, "What is 12 + 30?", stop=[text[-1]])
    assert cut["choices"][0]["message"]["content"] == text[: text.index(text[-1])]


def test_plain_completions(server: Server, handle: ModelHandle) -> None:
    status, found = call(server, "/v1/completions", {"model": MODEL, "prompt": ["one two", "three"], "max_tokens": 4, "temperature": 0})
    assert status == 200 and len(found["choices"]) == 2 and found["object"] == "text_completion"
    assert found["usage"]["prompt_tokens"] == sum(len(ids) for ids in handle.tokenizer(["one two", "three"])["input_ids"])


def test_streams_are_events(server: Server) -> None:
    status, text = chat(server, "What is 12 + 30?", stream=True)
    events = re.findall(r"data: (.*)\n\n", text)
    assert status == 200 and events[-1] == "[DONE]"
    assert (
        json.loads(events[0])["choices"][0]["delta"]["content"] == chat(server, "What is 12 + 30?")[1]["choices"][0]["message"]["content"]
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        ([], 400, "JSON object"),
        ({"messages": []}, 400, "messages must be"),
        ({"messages": [{"role": "user", "content": "x"}], "model": "other"}, 404, "'other' is not served"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, 400, "temperature = -1"),
        ({"messages": [{"role": "user", "content": "x"}], "n": "many"}, 400, "n = 'many'"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools is not served"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, 400, "the model reads"),
    ],
)
def test_what_cannot_be_served_is_refused(server: Server, body: Any, status: int, message: str) -> None:
    found = call(server, "/v1/chat/completions", body)
    assert found[0] == status and message in found[1]["error"]["message"]
    assert chat(server, "What is 1 + 1?")[0] == 200  # and the server lives on


@pytest.mark.slow
def test_the_verb_asks_for_the_key() -> None:
    environment = {**os.environ, "THE_KEY": "s3cret-key", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "guidetune", "serve", MODEL, "--port", "0", "--key-env", "THE_KEY", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            ready = process.stdout.readline()
            url = ready.split(" at ")[-1].strip()
            assert url.startswith("http://127.0.0.1:"), ready + process.stderr.read()
            assert call(url, "/v1/models")[0] == 401 and chat(url, "x")[0] == 401
            assert call(url, "/v1/models", None, {"Authorization": "Bearer s3cret-key"})[0] == 200
        finally:
            process.kill()
        assert "s3cret" not in ready + process.stderr.read()

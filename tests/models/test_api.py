"""The API client against a real server on the embedded model; a proxy between them makes requests fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from guidetune.errors import BadInput
from guidetune.evaluation.generation import generate
from guidetune.models.api import ApiSettings, BudgetReached, Client, Reply
from guidetune.models.handle import ModelHandle, open_handle
from tests.servers import MODEL, Proxy, serving

pytest.importorskip("openai", reason="the openai package (extra api) is not installed")
KEY = "sk-test-9f8e7d6c5b4a"


@pytest.fixture(scope="module")
def handle() -> ModelHandle:
    return open_handle(MODEL, device="cpu")


@pytest.fixture(scope="module")
def upstream(handle: ModelHandle) -> Iterator[str]:
    with serving(handle, key=KEY) as server:
        yield server.url


@pytest.fixture
def proxy(upstream: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Proxy(upstream) as between:
        yield between


def client(proxy: Proxy, cache: Path, **options: Any) -> Client:
    return Client(ApiSettings(**{"model": MODEL, "base_url": proxy.url, "cache": str(cache), "max_tokens": 12, "timeout": 60, **options}))


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def questions(n: int) -> list[list[dict[str, str]]]:
    return [ask(f"What is {i} + 30?") for i in range(n)]


def everything_in(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file())


def test_the_reply_is_what_the_model_generates(proxy: Proxy, handle: ModelHandle, tmp_path: Path) -> None:
    assert handle.chat is not None
    reply = client(proxy, tmp_path).ask(ask("What is 12 + 30?"))
    prompt = handle.chat.prompt(ask("What is 12 + 30?"))
    ((_, completion),) = generate(handle.model, [prompt], max_new_tokens=12, stop=handle.chat.stop_token_ids)
    assert reply.text == handle.tokenizer.decode(list(completion.tokens), skip_special_tokens=True)
    assert (reply.prompt_tokens, reply.model, reply.cached) == (len(prompt), MODEL, False)
    assert reply.completion_tokens == len(completion.tokens) + completion.finished


def test_equal_requests_are_asked_once_wherever_the_server_is(proxy: Proxy, upstream: str, tmp_path: Path) -> None:
    first = client(proxy, tmp_path)
    reply = first.ask(ask("What is 1 + 1?"))
    again = first.ask(ask("What is 1 + 1?"))
    assert (again.text, again.cached, again.cost, len(proxy.bodies)) == (reply.text, True, 0.0, 1)
    other = Client(ApiSettings(model=MODEL, base_url="http://127.0.0.1:9/v1", key_env="ANOTHER", cache=str(tmp_path), max_tokens=12))
    assert other.ask(ask("What is 1 + 1?")).cached  # another address and key: the same answer
    replayed = client(proxy, tmp_path, replay=True)
    assert replayed.ask(ask("What is 1 + 1?")).cached and "not in the cache" in str(replayed.ask(ask("What is 7 + 7?")).error)
    for different in (
        lambda: first.ask(ask("What is 1 + 2?")),
        lambda: first.ask(ask("What is 1 + 1?"), temperature=0.7),
        lambda: first.ask(ask("What is 1 + 1?"), temperature=0.7, sample=1),
        lambda: client(proxy, tmp_path, max_tokens=11).ask(ask("What is 1 + 1?")),
    ):
        before = len(proxy.bodies)
        assert not different().cached and len(proxy.bodies) == before + 1
    assert [reply.text for reply in first.ask_all([ask("What is 1 + 1?")] * 3)] == [reply.text] * 3 and len(proxy.bodies) == 5
    for torn in tmp_path.rglob("*.json"):
        torn.write_text(torn.read_text(encoding="utf-8")[:40], encoding="utf-8")
    assert not first.ask(ask("What is 1 + 1?")).cached  # asked again, and mended
    assert first.ask(ask("What is 1 + 1?")).cached


def test_failures_that_pass_are_waited_out(proxy: Proxy, tmp_path: Path) -> None:
    proxy.faults = [(429, {"Retry-After": "1"}), 500]
    reply = client(proxy, tmp_path).ask(ask("What is 2 + 2?"))
    assert reply.error is None and len(proxy.bodies) == 3
    assert proxy.times[1] - proxy.times[0] >= 1.0


def test_an_item_that_cannot_be_answered_leaves_the_others(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fails = lambda body: 503 if "2 + 30" in body["messages"][0]["content"] else None
    found = client(proxy, tmp_path, retries=1).ask_all(questions(4))
    assert [reply.error is None for reply in found] == [True, True, False, True]
    assert "503" in str(found[2].error) and found[2].text is None
    assert sum("2 + 30" in body["messages"][0]["content"] for body in proxy.bodies) == 2
    proxy.fails = lambda body: None
    before = len(proxy.bodies)
    again = client(proxy, tmp_path).ask_all(questions(4))
    assert all(reply.error is None for reply in again) and len(proxy.bodies) == before + 1  # failures are not remembered


def test_slow_and_broken_servers(proxy: Proxy, tmp_path: Path) -> None:
    proxy.faults = [3.0, 3.0]
    began = time.monotonic()
    reply = client(proxy, tmp_path, timeout=0.3, retries=1, price_in=0, price_out=1).ask(ask("What is 3 + 3?"))
    assert "no answer within 0.3 s, 2 times" in str(reply.error) and time.monotonic() - began < 6
    gone = Client(ApiSettings(model=MODEL, base_url="http://127.0.0.1:9/v1", cache=str(tmp_path), retries=0))
    assert "no connection to http://127.0.0.1:9/v1" in str(gone.ask(ask("?")).error)
    unknown = Client(ApiSettings(model="nobody", base_url=proxy.url, cache=str(tmp_path)))
    assert "404" in str(unknown.ask(ask("?")).error)


def test_as_many_at_a_time_as_allowed(proxy: Proxy, tmp_path: Path) -> None:
    proxy.delay = 0.1
    client(proxy, tmp_path, concurrency=3).ask_all(questions(9))
    assert proxy.most == 3


def test_the_key_is_written_nowhere(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    user = client(proxy, tmp_path, retries=0)
    good = user.ask(ask("What is 4 + 4?"))
    proxy.faults = [400]
    bad = user.ask(ask("What is 5 + 5?"))
    assert proxy.authorization == {f"Bearer {KEY}"}
    assert "***" in str(bad.error) and "400" in str(bad.error)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0000")
    with pytest.raises(BadInput) as caught:
        client(proxy, tmp_path).ask(ask("What is 6 + 6?"))
    assert "OPENAI_API_KEY" in str(caught.value)
    out, err = capfd.readouterr()
    texts = [everything_in(tmp_path), repr(good), repr(bad), str(caught.value), repr(user.settings), repr(vars(user)), out, err]
    assert good.text in texts[0]
    assert not any(KEY in text or "sk-wrong" in text for text in texts)


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for options, message in [
        ({"budget": 1}, "price_in"),
        ({"base_url": "https://user:pass@host/v1"}, "no key or password"),
        ({"base_url": "https://host/v1?key=abc"}, "no key or password"),
        ({"base_url": "host"}, "http"),
        ({"api_key": "sk"}, "Extra inputs"),
    ]:
        with pytest.raises(ValidationError, match=message):
            ApiSettings(model="m", **options)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(BadInput, match="set the environment variable OPENAI_API_KEY"):
        Client(ApiSettings(model="m", base_url="https://example.invalid/v1", cache=str(tmp_path))).ask(ask("?"))


def test_the_budget_is_never_exceeded(proxy: Proxy, tmp_path: Path) -> None:
    """An answer of at most 1 token at 1 each; a budget of 2.5 buys two, also when all are asked at once."""
    prices = {"price_in": 0, "price_out": 1e6, "max_tokens": 1}
    user = client(proxy, tmp_path, budget=2.5, **prices)
    with pytest.raises(BudgetReached, match="budget of 2.5 is spent"):
        user.ask_all(questions(6))
    assert len(proxy.bodies) == 2 and user.spent == 2.0
    assert BudgetReached.exit_code == 1
    with pytest.raises(BudgetReached):  # the next arm of the same command has the same purse
        client(proxy, tmp_path, budget=2.5, **prices).ask(ask("What is 9 + 9?"))
    more = client(proxy, tmp_path, budget=10, **prices)
    found = more.ask_all(questions(6))  # what was answered is not paid for again
    assert len(proxy.bodies) == 6 and more.spent == 4.0 and sum(reply.cached for reply in found) == 2
    assert "4 requests, 2 answers from the cache, cost 4" in more.cost_text()
    with pytest.raises(BudgetReached):  # prompts count too, at a token for a byte before they are known
        client(proxy, tmp_path, budget=0.001, price_in=1, price_out=1).ask(ask("long " * 1000))
    assert len(proxy.bodies) == 6


SCRIPT = """
import sys
from guidetune.models.api import ApiSettings, Client
url, cache, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = Client(ApiSettings(model="world:instruct", base_url=url, cache=cache, max_tokens=12, concurrency=1))
print("ready", flush=True)
found = client.ask_all([[{"role": "user", "content": f"What is {i} + 30?"}] for i in range(n)])
print(all(reply.error is None for reply in found), flush=True)
"""


def start(proxy: Proxy, cache: Path, n: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, proxy.url, str(cache), str(n)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OPENAI_API_KEY": KEY})


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process")
def test_a_killed_run_goes_on_and_two_processes_share_a_cache(proxy: Proxy, tmp_path: Path) -> None:
    proxy.delay = 0.05
    killed = start(proxy, tmp_path, 20)
    while len(list(tmp_path.rglob("*.json"))) < 8:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    kept = len(list(tmp_path.rglob("[0-9a-f]*.json")))
    time.sleep(0.3)  # a request that was under way
    before = len(proxy.bodies)
    assert all(isinstance(reply, Reply) and reply.text for reply in client(proxy, tmp_path, concurrency=1).ask_all(questions(20)))
    assert len(proxy.bodies) - before == 20 - kept and 8 <= kept < 20

    shared = tmp_path / "shared"
    both = [start(proxy, shared, 10) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].splitlines()[-1] for process in both] == ["True", "True"]
    before = len(proxy.bodies)
    assert all(reply.cached for reply in client(proxy, shared).ask_all(questions(10))) and len(proxy.bodies) == before
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in shared.rglob("*.json")]
    assert len(rows) == 10 and all(row["reply"]["text"] for row in rows)


@pytest.mark.slow
def test_transformers_serve(tmp_path: Path) -> None:
    """An independent server: the answers are those of our own."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="transformers serve needs the packages of transformers[serving]")
    import socket

    from guidetune import world

    folder = world.export(tmp_path / "world")["instruct"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [sys.executable, "-c", code, "serve", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        settings = ApiSettings(model=str(folder), base_url=f"http://127.0.0.1:{port}/v1", cache=str(tmp_path / "cache"), max_tokens=12)
        user = Client(settings)
        deadline = time.monotonic() + 120
        while (reply := user.ask(ask("What is 12 + 30?"))).error is not None:
            assert server.poll() is None and time.monotonic() < deadline, reply.error
            time.sleep(1)
        handle = open_handle(str(folder), device="cpu")
        assert handle.chat is not None
        for question in questions(4):
            ((_, done),) = generate(handle.model, [handle.chat.prompt(question)], max_new_tokens=12, stop=handle.chat.stop_token_ids)
            assert user.ask(question).text == handle.tokenizer.decode(list(done.tokens), skip_special_tokens=True)
    finally:
        server.kill()
        server.wait()

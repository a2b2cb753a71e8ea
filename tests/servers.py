"""Servers that tests talk to over real sockets: the world's instruct model, and a proxy that makes requests fail."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from guidetune.models.handle import ModelHandle
from guidetune.serve import Server

MODEL = "world:instruct"


@contextmanager
def serving(handle: ModelHandle, key: str | None = None) -> Iterator[Server]:
    server = Server(handle, MODEL, key=key)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `target`; those for which `faults` still holds an entry fail as it says.

    A fault is a status, (status, headers), or a number of seconds to wait before the connection is dropped. `reply` answers in
    place of the target.
    """

    daemon_threads = True

    def __init__(self, target: str | None = None, reply: Callable[[list[dict[str, str]]], str] | None = None) -> None:
        self.target, self.reply = target, reply
        self.faults: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.authorization: set[str | None] = set()
        self.lock = threading.Lock()
        self.most = self.now = 0  # requests at the same time
        self.fails: Callable[[dict[str, Any]], Any] = lambda body: None
        self.delay = 0.0
        super().__init__(("127.0.0.1", 0), _ProxyHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> Proxy:
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_POST(self) -> None:  # noqa: N802
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        with server.lock:
            body = json.loads(raw)
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.authorization.add(self.headers.get("Authorization"))
            server.now += 1
            server.most = max(server.most, server.now)
            fault = server.faults.pop(0) if server.faults else server.fails(body)
        try:
            time.sleep(server.delay)
            self._respond(body, raw, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.now -= 1

    def _respond(self, body: dict[str, Any], raw: bytes, fault: Any) -> None:
        server = self.server
        if isinstance(fault, float):
            time.sleep(fault)
            self.close_connection = True
            return
        if fault is not None:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            # a careless server, which shows the key that it was given
            text = f"failed for {self.headers.get('Authorization')}"
            return self._send(status, json.dumps({"error": {"message": text}}).encode(), headers)
        if server.reply is not None:
            message = {"role": "assistant", "content": server.reply(body["messages"])}
            usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            done = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted", "choices": [choice], "usage": usage}
            return self._send(200, json.dumps(done).encode(), {})
        headers = {name: value for name, value in self.headers.items() if name.lower() in ("content-type", "authorization")}
        request = urllib.request.Request(str(server.target).removesuffix("/v1") + self.path, raw, headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
                self._send(answer.status, answer.read(), {})
        except urllib.error.HTTPError as error:
            self._send(error.code, error.read(), {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

"""Finding models: folders, adapters, the hub; and what is refused, with the way out."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from guidetune.errors import BadInput
from guidetune.models import resolve
from tests.models.pairs import make_adapter, make_pair

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    base, instruct = make_pair(root)
    return base, instruct, make_adapter(base, root / "adapter")


def test_folder_and_adapter(llama: tuple[Path, Path, Path]) -> None:
    base, instruct, adapter = llama
    assert resolve(str(instruct)).path == instruct.resolve() and resolve(instruct).adapter is None
    source = resolve(adapter)
    assert (source.path, source.adapter, source.base_spec) == (base.resolve(), adapter.resolve(), str(base))
    assert resolve(source) is source
    assert resolve(adapter, base=instruct).path == instruct.resolve()


def test_the_base_in_guidetune_json_goes_first_and_may_be_relative(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, adapter = llama
    shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copytree(instruct, tmp_path / "model")
    (tmp_path / "adapter" / "guidetune.json").write_text(json.dumps({"base": "../model", "base_fingerprint": "abc"}))
    source = resolve(tmp_path / "adapter")
    assert source.path == (tmp_path / "model").resolve() and source.base_fingerprint == "abc"


def test_did_you_mean(llama: tuple[Path, Path, Path]) -> None:
    _, instruct, _ = llama
    with pytest.raises(BadInput, match=f"did you mean {instruct}"):
        resolve(str(instruct) + "s")
    with pytest.raises(BadInput, match="did you mean world:instruct"):
        resolve("world:instuct")
    with pytest.raises(BadInput, match="has no 'nowhere'"):
        resolve(str(instruct.parent / "nowhere" / "deep"))
    with pytest.raises(BadInput, match="give the folder"):
        resolve(instruct / "config.json")
    with pytest.raises(BadInput, match="a model is missing"):
        resolve("  ")


def test_run_folder_names_its_parts(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[1], tmp_path / "run" / "model")
    with pytest.raises(BadInput, match=r"did you mean .*run/model\?"):
        resolve(tmp_path / "run")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(llama: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(llama[1], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, tmp_path / "m" / name)
    with pytest.raises(BadInput, match="only pickled weights.*save_pretrained"):
        resolve(tmp_path / "m")


def test_incomplete_folders(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[1], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="has no weights"):
        resolve(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(BadInput, match="incomplete: model-1.safetensors"):
        resolve(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        resolve(tmp_path / "m")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "model-q4.gguf").touch()
    with pytest.raises(BadInput, match="GGUF"):
        resolve(tmp_path / "g")


def test_adapter_without_or_with_a_lost_base(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = llama
    for value, match in [
        (None, "does not say which base"),
        (str(tmp_path / "gone"), "its base model cannot be used"),
        (str(adapter), "another adapter"),
    ]:
        folder = tmp_path / f"a{len(match)}"
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": value}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(BadInput, match=match):
            resolve(folder)
        assert resolve(folder, base=base).path == base.resolve()


def test_offline_hub_id(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no folder 'someone/some-model'.*hub cache"):
        resolve("someone/some-model")


class Hub(http.server.BaseHTTPRequestHandler):
    """The few end points of a model hub that a snapshot needs."""

    repos: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []
    commit = "0123456789012345678901234567890123456789"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        self.asked.append(path)
        for repo, files in self.repos.items():
            if path.startswith(f"api/models/{repo}"):
                rest = path.removeprefix(f"api/models/{repo}").strip("/")
                if rest.startswith("tree"):
                    entries = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files.items()]
                    return self.send(200, json.dumps(entries).encode(), body)
                info = {
                    "_id": "1",
                    "id": repo,
                    "sha": self.commit,
                    "private": False,
                    "siblings": [{"rfilename": n} for n in files],
                    "tags": [],
                }
                return self.send(200, json.dumps(info).encode(), body)
            for name, data in files.items():
                if path == f"{repo}/resolve/{self.commit}/{name}":
                    return self.send(200, data, body, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.commit})
        return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(llama: tuple[Path, Path, Path]) -> Iterator[str]:
    instruct = llama[1]
    files = {path.name: path.read_bytes() for path in instruct.iterdir()}
    Hub.asked = []
    Hub.repos = {
        "org/good": {**files, "pytorch_model.bin": b"x", "evil.py": b"x", "original/consolidated.safetensors": b"x", "README.md": b"x"},
        "org/pickled": {"config.json": files["config.json"], "pytorch_model.bin": b"x"},
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import sys
from guidetune.errors import BadInput
from guidetune.models import fingerprint, resolve
for spec in sys.argv[1:]:
    try:
        print("FOUND", resolve(spec).path, fingerprint(spec))
    except BadInput as error:
        print("REFUSED", error)
"""


def from_hub(endpoint: str, home: Path, *specs: str, offline: bool = False) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *specs], env=environment, capture_output=True, text=True, timeout=120, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


def test_hub_snapshot(hub: str, llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from guidetune.models import fingerprint

    good, pickled, missing = from_hub(hub, tmp_path, "org/good", "org/pickled", "org/none")
    word, path, found = good.split()
    assert word == "FOUND" and found == fingerprint(llama[1])
    names = {p.name for p in Path(path).iterdir()}
    assert "model.safetensors" in names and not names & {"pytorch_model.bin", "evil.py", "README.md", "original"}
    assert not any(name in asked for asked in Hub.asked for name in ("pytorch_model.bin", "evil.py", "consolidated"))
    assert pickled.startswith("REFUSED") and "model.safetensors is missing" in pickled
    assert missing.startswith("REFUSED") and "no hub model 'org/none'" in missing
    count = len(Hub.asked)
    assert from_hub(hub, tmp_path, "org/good", offline=True) == [good]
    assert len(Hub.asked) == count

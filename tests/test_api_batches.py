"""/v1/batches through the openai client and a real HTTP server, with a scripted engine."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from jaxserve.store.sqlite import SQLiteStore
from tests.api_server import MODEL, ApiServer, error_of
from tests.batch_inputs import chat_line, finish, jsonl, lines_of, start, upload


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(tmp_path / "store")
    store.recover()
    yield store
    store.close()


@pytest.fixture
def server(store: SQLiteStore) -> Iterator[ApiServer]:
    with ApiServer("hello world", store=store) as server:
        yield server


def test_a_batch_is_answered_line_by_line_as_online_requests_are(server: ApiServer):
    batch = start(server.openai, jsonl([chat_line("a"), chat_line("b", n=2)]), metadata={"for": "test"})
    assert batch.status == "validating" and batch.request_counts.total == 0
    assert batch.expires_at == batch.created_at + 86_400
    batch = finish(server.openai, batch)
    assert batch.status == "completed" and batch.error_file_id is None and batch.errors is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (2, 2, 0)
    assert batch.metadata == {"for": "test"} and batch.model == MODEL
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    lines = {line["custom_id"]: line for line in lines_of(server.openai, batch.output_file_id)}
    assert set(lines) == {"a", "b"}
    for custom_id, body in (("a", {}), ("b", {"n": 2})):
        line, online = lines[custom_id], server.chat(**body).json()
        assert set(line) == {"id", "custom_id", "response", "error"} and line["error"] is None
        assert line["id"].startswith("batch_req_") and line["response"]["status_code"] == 200
        assert line["response"]["request_id"]
        answer = line["response"]["body"]
        for reply in (answer, online):
            reply.pop("id"), reply.pop("created")
        assert json.dumps(answer) == json.dumps(online)
    assert batch.usage.output_tokens == sum(
        line["response"]["body"]["usage"]["completion_tokens"] for line in lines.values()
    )
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens


def test_batch_requests_run_below_interactive_ones(server: ApiServer):
    finish(server.openai, start(server.openai, jsonl([chat_line("a")])))
    server.chat()
    assert [request.priority for request in server.engine.requests] == [1, 0]
    text = server.http.get("/metrics").text
    assert 'jaxserve:batch_requests_total{model_name="test-model",state="completed"} 1.0' in text
    assert 'jaxserve:num_requests_total{model_name="test-model"} 1.0' in text


def test_requests_that_fail_have_the_online_error_in_the_error_file(server: ApiServer):
    lines = [chat_line("good"), chat_line("bad", temperature=-1), chat_line("long", content="x " * 9000)]
    batch = finish(server.openai, start(server.openai, jsonl(lines)))
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 2)
    errors = {line["custom_id"]: line for line in lines_of(server.openai, batch.error_file_id)}
    assert set(errors) == {"bad", "long"}
    online = server.chat(temperature=-1).json()
    assert errors["bad"]["response"]["body"] == online and errors["bad"]["error"] is None
    assert errors["bad"]["response"]["status_code"] == 400


def test_a_batch_whose_requests_all_fail_is_completed_without_output(server: ApiServer):
    batch = finish(server.openai, start(server.openai, jsonl([chat_line("bad", top_p=7)])))
    assert batch.status == "completed" and batch.output_file_id is None and batch.error_file_id


def test_completions_with_prompts_of_all_kinds(server: ApiServer):
    prompts = ["a", ["a", "b"], [1, 2], [[1], [2, 3]]]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"model": MODEL, "prompt": prompt}}
        for i, prompt in enumerate(prompts)
    ]
    batch = finish(server.openai, start(server.openai, jsonl(lines), "/v1/completions"))
    choices = {
        line["custom_id"]: len(line["response"]["body"]["choices"])
        for line in lines_of(server.openai, batch.output_file_id)
    }
    assert choices == {"0": 1, "1": 2, "2": 1, "3": 2}


def test_a_url_without_v1_is_the_same_endpoint(server: ApiServer):
    batch = finish(server.openai, start(server.openai, jsonl([chat_line("a", url="/chat/completions")])))
    assert batch.status == "completed" and batch.request_counts.completed == 1


def test_an_input_with_bad_lines_fails_as_a_whole_and_names_them(server: ApiServer):
    content = jsonl([chat_line("a"), chat_line("a")]) + b"{broken\n" + jsonl([chat_line("c", stream=True)])
    batch = finish(server.openai, start(server.openai, content))
    assert batch.status == "failed" and batch.failed_at and batch.in_progress_at is None
    assert batch.output_file_id is None and batch.error_file_id is None
    found = [(error.code, error.line, error.param) for error in batch.errors.data]
    assert found == [
        ("duplicate_custom_id", 2, "custom_id"),
        ("invalid_json_line", 3, None),
        ("streaming_unsupported", 4, "body.stream"),
    ]
    assert not server.engine.requests


def test_an_empty_file_fails_the_batch(server: ApiServer):
    batch = finish(server.openai, start(server.openai, b"\n\n"))
    assert batch.status == "failed" and batch.errors.data[0].code == "empty_file"


def test_an_unknown_file_makes_a_failed_batch(server: ApiServer):
    batch = server.openai.batches.create(
        input_file_id="file-0", endpoint="/v1/chat/completions", completion_window="24h"
    )
    assert batch.status == "failed" and batch.failed_at
    (error,) = batch.errors.data
    assert (error.code, error.param) == ("invalid_request", "file_id") and "file-0" in error.message


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"endpoint": None}, "endpoint", "missing_required_parameter"),
        ({"endpoint": "/v1/moderations"}, "endpoint", "invalid_value"),
        ({"endpoint": 1}, "endpoint", "invalid_type"),
        ({"completion_window": "1h"}, "completion_window", "invalid_value"),
        ({"input_file_id": None}, "input_file_id", "missing_required_parameter"),
        ({"metadata": {"tags": ["a"]}}, "metadata.tags", "invalid_type"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "string_above_max_length"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "invalid_value"),
        ({"metadata": []}, "metadata", "invalid_type"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor", "invalid_value"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds",
         "invalid_value"),
    ],
)  # fmt: skip
def test_a_wrong_create_is_refused_by_name(server: ApiServer, change: dict, param: str, code: str):
    file = upload(server.openai, b"{}\n")
    body = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"} | change
    error = error_of(server.post("/v1/batches", body), 400)
    assert (error["param"], error["code"]) == (param, code), error
    if param == "endpoint" and code == "invalid_value":
        assert "'/v1/chat/completions' and '/v1/completions'" in error["message"]


def test_a_file_for_another_purpose_is_no_input(server: ApiServer):
    file = server.openai.files.create(file=("a.jsonl", b"{}\n"), purpose="user_data")
    body = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert error_of(server.post("/v1/batches", body), 400)["param"] == "input_file_id"


def test_batches_are_listed_newest_first_in_pages(server: ApiServer):
    ids = [start(server.openai, b"\n").id for _ in range(5)]
    page = server.openai.batches.list(limit=2)
    assert [batch.id for batch in page.data] == ids[:2:-1] and page.has_more
    assert [batch.id for batch in server.openai.batches.list(limit=2)] == ids[::-1]
    reply = server.http.get("/v1/batches?limit=1").json()
    assert reply["object"] == "list" and reply["first_id"] == reply["last_id"] == ids[-1] and reply["has_more"] is True
    error_of(server.http.get("/v1/batches?limit=0"), 400)
    error_of(server.http.get("/v1/batches?limit=101"), 400)
    error_of(server.http.get("/v1/batches?after=batch_x"), 404)


def test_an_unknown_batch_is_404(server: ApiServer):
    for reply in (server.http.get("/v1/batches/batch_0"), server.post("/v1/batches/batch_0/cancel")):
        error = error_of(reply, 404)
        assert error["message"] == "No batch found with id 'batch_0'." and error["code"] is None


def test_cancel_keeps_what_was_answered_and_accounts_for_the_rest(store: SQLiteStore):
    with ApiServer("hello", store=store, worker={"concurrency": 4}) as server:
        server.engine.hold()
        batch = start(server.openai, jsonl(chat_line(str(i), max_tokens=i + 1) for i in range(40)))
        server.engine.wait_until(lambda: server.engine.num_running == 4)
        server.engine.step()  # "0" ends with its first token
        server.engine.wait_until(lambda: server.openai.batches.retrieve(batch.id).request_counts.completed == 1)
        cancelled = server.openai.batches.cancel(batch.id)
        assert cancelled.status == "cancelling" and cancelled.cancelling_at
        batch = finish(server.openai, cancelled)
        assert batch.status == "cancelled" and batch.cancelled_at and batch.completed_at is None
        server.engine.wait_until(lambda: server.engine.num_running == 0)
        output, errors = (lines_of(server.openai, each) for each in (batch.output_file_id, batch.error_file_id))
        assert [line["custom_id"] for line in output] == ["0"]
        assert {line["custom_id"] for line in errors} == {str(i) for i in range(1, 40)}
        assert all(line["response"] is None and line["error"]["code"] == "batch_cancelled" for line in errors)
        assert server.openai.batches.cancel(batch.id).status == "cancelled"


def test_cancel_of_a_batch_that_has_ended_is_409(server: ApiServer):
    batch = finish(server.openai, start(server.openai, jsonl([chat_line("a")])))
    with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"):
        server.openai.batches.cancel(batch.id)


def test_a_batch_expires_with_its_partial_results(tmp_path: Path):
    now = [1_000_000.0]
    store = SQLiteStore(tmp_path / "store", clock=lambda: now[0])
    store.recover()
    options = {"clock": lambda: now[0], "tick": 0.01, "concurrency": 2}
    with ApiServer("hello", store=store, worker=options) as server:
        server.engine.hold()
        batch = start(server.openai, jsonl(chat_line(str(i), max_tokens=i + 1) for i in range(4)))
        server.engine.wait_until(lambda: server.engine.num_running == 2)
        server.engine.step()
        server.engine.wait_until(lambda: server.openai.batches.retrieve(batch.id).request_counts.completed == 1)
        now[0] += 86_401
        batch = finish(server.openai, batch)
        assert batch.status == "expired" and batch.expired_at
        output, errors = (lines_of(server.openai, each) for each in (batch.output_file_id, batch.error_file_id))
        assert len(output) + len(errors) == batch.request_counts.total == 4 and len(output) == 1
        assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    store.close()


def test_deleting_the_input_does_not_harm_a_running_batch(server: ApiServer):
    server.engine.hold()
    batch = start(server.openai, jsonl(chat_line(str(i)) for i in range(50)))
    assert server.openai.files.delete(batch.input_file_id).deleted is True
    server.engine.release()
    batch = finish(server.openai, batch)
    assert batch.request_counts.completed == 50


def test_a_restart_goes_on_where_it_stopped(tmp_path: Path):
    content = jsonl(chat_line(str(i), max_tokens=1 + i % 5) for i in range(60))
    store = SQLiteStore(tmp_path / "store")
    store.recover()
    with ApiServer("hello", store=store, worker={"concurrency": 4}) as server:
        server.engine.hold()
        batch = start(server.openai, content)
        server.engine.wait_until(lambda: server.engine.num_running == 4)
        server.engine.step(3)
        server.engine.wait_until(lambda: server.openai.batches.retrieve(batch.id).request_counts.completed >= 3)
    store.close()
    store = SQLiteStore(tmp_path / "store")
    (again,) = store.recover()
    assert again.status == "in_progress" and 3 <= again.num_completed < 60
    with ApiServer("hello", store=store) as server:
        batch = finish(server.openai, batch)
        assert batch.status == "completed" and batch.request_counts.completed == 60
        ids = [line["custom_id"] for line in lines_of(server.openai, batch.output_file_id)]
        assert sorted(ids, key=int) == [str(i) for i in range(60)]
        assert len(server.engine.requests) == 60 - again.num_completed
    store.close()


def test_batches_take_turns(store: SQLiteStore):
    with ApiServer("hello", store=store, worker={"concurrency": 2}) as server:
        long = start(server.openai, jsonl(chat_line(str(i)) for i in range(400)))
        server.engine.wait_until(lambda: len(server.engine.requests) > 4)
        short = finish(server.openai, start(server.openai, jsonl([chat_line("a"), chat_line("b")])))
        assert short.status == "completed"
        assert server.openai.batches.retrieve(long.id).status == "in_progress"
        server.openai.batches.cancel(long.id)
        assert finish(server.openai, long).status == "cancelled"


def test_requests_of_batches_do_not_count_against_the_queue_of_interactive_ones(store: SQLiteStore):
    with ApiServer("hello", store=store, worker={"concurrency": 8}) as server:
        server.client.max_open_requests = 1
        server.engine.hold()
        batch = start(server.openai, jsonl(chat_line(str(i)) for i in range(8)))
        server.engine.wait_until(lambda: server.engine.num_running == 8)
        server.engine.release()
        assert server.chat().status_code == 200
        assert finish(server.openai, batch).request_counts.completed == 8


def test_the_engine_sees_no_more_than_the_concurrency(store: SQLiteStore):
    with ApiServer("hello", store=store, worker={"concurrency": 3}) as server:
        most, stop = [0], threading.Event()

        def watch() -> None:
            while not stop.is_set():
                most[0] = max(most[0], server.engine.num_running)
                time.sleep(0.0005)  # or it would hold the GIL against those it watches

        watcher = threading.Thread(target=watch)
        watcher.start()
        batch = finish(server.openai, start(server.openai, jsonl(chat_line(str(i)) for i in range(100))))
        stop.set()
        watcher.join()
        assert batch.request_counts.completed == 100 and 1 <= most[0] <= 3


def test_requests_that_the_engine_gives_up_are_tried_again(server: ApiServer):
    server.engine.hold()
    batch = start(server.openai, jsonl([chat_line("a")]))
    server.engine.wait_until(lambda: server.engine.num_running == 1)
    (request,) = server.engine.requests
    server.engine.send(server.engine._events([(request.id, None, "abort", 0, None)]))
    server.engine.release()
    batch = finish(server.openai, batch)
    assert batch.request_counts.completed == 1 and len(server.engine.requests) == 2


def test_when_the_engine_dies_its_requests_stay_pending(store: SQLiteStore):
    with ApiServer("hello", store=store) as server:
        server.engine.hold()
        batch = start(server.openai, jsonl(chat_line(str(i)) for i in range(5)))
        server.engine.wait_until(lambda: server.engine.num_running == 5)
        server.engine.fail("out of memory")
        deadline = time.monotonic() + 5
        while server.serving.batch_worker.batches:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        batch = store.get_batch(batch.id)
        assert batch.status == "in_progress" and batch.num_pending == 5


def test_a_server_without_a_store_says_so():
    with ApiServer() as server:
        for reply in (server.http.get("/v1/files"), server.http.get("/v1/batches")):
            assert error_of(reply, 503)["code"] == "storage_unavailable"


@pytest.mark.parametrize(("num_failures", "status"), [(3, "completed"), (1000, "failed")])
def test_a_mistake_of_the_worker_costs_no_more_than_its_batch(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch, num_failures: int, status: str
):
    claim, failures = store.claim_rows, iter(range(num_failures))

    def claim_rows(batch_id: str, *, limit: int):
        if next(failures, None) is not None:
            raise RuntimeError("a mistake")
        return claim(batch_id, limit=limit)

    monkeypatch.setattr(store, "claim_rows", claim_rows)
    with ApiServer("hello", store=store, worker={"tick": 0.001}) as server:
        batch = finish(server.openai, start(server.openai, jsonl([chat_line("a", max_tokens=1)])))
        assert batch.status == status, batch
        if status == "failed":
            assert [error.code for error in batch.errors.data] == ["server_error"]
            assert batch.request_counts.total == 1

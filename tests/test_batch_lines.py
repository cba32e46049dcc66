"""The check of a batch's input: every code of the table, line numbers, order, limits and memory."""

import io
import json
import random
import tracemalloc
from typing import Any

import pytest

from jaxserve.api.batch_lines import (
    MAX_REPORTED_ERRORS,
    MAX_REQUESTS,
    Checked,
    Interrupted,
    answered,
    check_input,
    not_executed,
    same_url,
)
from tests.batch_inputs import chat_line, jsonl

CHAT = "/v1/chat/completions"


def check(content: bytes, endpoint: str = CHAT, max_line_bytes: int = 1 << 20, **options: Any) -> Checked:
    return check_input(
        io.BytesIO(content), endpoint, serves=lambda name: name in ("test-model", "alias"),
        max_line_bytes=max_line_bytes, **options,
    )  # fmt: skip


def problems(content: bytes, **options: Any) -> list[tuple[str, str | None, int | None]]:
    checked = check(content, **options)
    assert not checked.errors or not checked.rows, "where there are errors nothing runs"
    return [(error.code, error.param, error.line) for error in checked.errors]


def without(name: str) -> dict[str, Any]:
    line = chat_line("x")
    del line[name]
    return line


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{nope", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (without("custom_id"), "missing_required_parameter", "custom_id"),
        (without("method"), "missing_required_parameter", "method"),
        (without("url"), "missing_required_parameter", "url"),
        (without("body"), "missing_required_parameter", "body"),
        (chat_line("good"), "duplicate_custom_id", "custom_id"),
        (chat_line("x") | {"custom_id": 7}, "invalid_type", "custom_id"),
        (chat_line("x" * 513), "invalid_type", "custom_id"),
        (chat_line("x") | {"method": "GET"}, "invalid_method", "method"),
        (chat_line("x", url="/v1/completions"), "invalid_url", "url"),
        (chat_line("x") | {"url": 7}, "invalid_url", "url"),
        (chat_line("x") | {"body": []}, "invalid_type", "body"),
        (chat_line("x", stream=True), "streaming_unsupported", "body.stream"),
        (chat_line("x", model="gpt"), "model_not_found", "body.model"),
        (chat_line("x", model="alias"), "mismatched_model", "body.model"),
        (chat_line("x", model=None), "invalid_request", "body.model"),
        (chat_line("x", messages=None), "invalid_request", "body.messages"),
    ],
)
def test_every_wrong_line_has_its_code_and_number(line: Any, code: str, param: str | None):
    written = line if isinstance(line, bytes) else json.dumps(line).encode()
    content = jsonl([chat_line("good")]) + b"\n" + written + b"\n"
    assert problems(content) == [(code, param, 3)]


def test_what_only_the_model_can_judge_is_no_validation_error():
    assert not problems(jsonl([chat_line("a", temperature=-1, max_tokens="many", stream=False)]))


def test_all_bad_lines_are_reported_up_to_a_limit():
    content = jsonl(chat_line("same") for _ in range(5))
    assert [line for _, _, line in problems(content)] == [2, 3, 4, 5]
    assert len(problems(jsonl(chat_line("same") for _ in range(MAX_REPORTED_ERRORS + 50)))) == MAX_REPORTED_ERRORS


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_input_is_an_error(content: bytes):
    assert problems(content) == [("empty_file", None, None)]


def test_too_many_requests_are_refused():
    line = b'{"custom_id":"%d","method":"POST","url":"/v1/completions","body":{"model":"test-model","prompt":"a"}}\n'
    content = b"".join(line % i for i in range(MAX_REQUESTS + 1))
    assert problems(content, endpoint="/v1/completions") == [("too_many_tasks", None, None)]
    assert len(check(content[: content.rindex(b"\n", 0, -1) + 1], "/v1/completions").rows) == MAX_REQUESTS


def test_a_line_that_is_too_long_is_skipped_without_being_held():
    content = b"x" * 5000 + b"\n" + jsonl([chat_line("a")]) + b"y" * 3000
    assert problems(content, max_line_bytes=1000) == [("invalid_request", None, 1), ("invalid_request", None, 3)]


def test_rows_point_at_their_lines_whatever_ends_them():
    lines = [chat_line(str(i), content="é" * i) for i in range(4)]
    written = [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    content = b"\xef\xbb\xbf" + written[0] + b"\r\n\n" + written[1] + b"\n" + written[2] + b"\r\n" + written[3]
    rows = check(content).rows
    assert [json.loads(content[row.offset : row.offset + row.num_bytes]) for row in rows] == lines
    assert [row.line for row in rows] == [1, 3, 4, 5]
    assert check(content).model == "test-model"


def test_lines_that_begin_alike_run_together():
    systems = ["You are a pirate. " * 20, "You are a poet. " * 20, "You are a judge. " * 20]
    lines = [
        chat_line(str(i), messages=[{"role": "system", "content": systems[i % 3]}, {"role": "user", "content": str(i)}])
        for i in range(30)
    ]
    assert [row.line - 1 for row in check(jsonl(lines)).rows] == [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]


def test_lines_without_a_common_beginning_keep_their_order():
    seed = 7
    noise = random.Random(seed)
    lines = [chat_line(str(i), content=noise.randbytes(400).hex()) for i in range(50)]
    assert [row.line for row in check(jsonl(lines)).rows] == [*range(1, 51)], f"seed {seed}"


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/chat/completions", "/v1/chat/completions/"])
def test_urls_may_leave_v1_out(url: str):
    assert same_url(url, CHAT)
    assert not same_url("/v1" + "/v1/chat/completions", CHAT) and not same_url("/v1/completions", CHAT)


def test_a_check_can_be_interrupted():
    with pytest.raises(Interrupted):
        check(jsonl(chat_line(str(i)) for i in range(300)), interrupted=lambda: True)


def test_memory_does_not_grow_with_the_bytes_of_a_line(tmp_path):
    path = tmp_path / "in.jsonl"
    with open(path, "wb") as file:
        for i in range(5000):
            file.write(jsonl([chat_line(str(i), content=f"{i}:" + "x" * 4000)]))
    tracemalloc.start()
    with open(path, "rb") as file:
        checked = check_input(file, CHAT, serves=lambda name: True, max_line_bytes=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(checked.rows) == 5000 and peak < 10e6, f"{peak / 5000:.0f} bytes a line"


def test_the_lines_of_the_result_files_are_openais():
    line = json.loads(answered("a", 200, {"object": "chat.completion"}))
    assert set(line) == {"id", "custom_id", "response", "error"} and line["custom_id"] == "a"
    assert set(line["response"]) == {"status_code", "request_id", "body"} and line["error"] is None
    line = json.loads(not_executed("b", "batch_expired"))
    assert line["response"] is None and line["error"]["code"] == "batch_expired" and line["error"]["message"]

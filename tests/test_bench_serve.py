"""bench/serve.py as a person runs it, against a server whose timing is known."""

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

SERVE = Path(__file__).parents[1] / "bench" / "serve.py"
PREFILL, DECODE = 0.08, 0.01  # seconds to the first token, and to each later one


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Every event is split over two HTTP chunks; a prompt that holds "refuse" gets 400."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = re.search(rb"content-length: (\d+)", head)
    body = await reader.readexactly(int(length[1]) if length else 0)
    if head.startswith(b"get /v1/models "):
        reply = b'{"data": [{"id": "fake"}]}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(reply), reply))
    elif b"refuse" in body:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad")
    else:
        await stream(writer, json.loads(body))
    await writer.drain()
    writer.close()


async def stream(writer: asyncio.StreamWriter, asked: dict) -> None:
    def send(data: bytes) -> None:
        event = b"data: " + data + b"\n\n"
        for half in (event[: len(event) // 2], event[len(event) // 2 :]):
            writer.write(b"%x\r\n%s\r\n" % (len(half), half))

    assert asked["ignore_eos"] is True
    assert asked["stream_options"] == {"include_usage": True}
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    chat = "messages" in asked
    num = asked["max_completion_tokens" if chat else "max_tokens"]
    if chat:
        send(b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}')
    for i in range(num):
        await asyncio.sleep(DECODE if i else PREFILL)
        send(b'{"choices": [{"delta": {"content": "x"}}]}' if chat else b'{"choices": [{"text": "x"}]}')
    send(b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": %d}}' % num)
    send(b"[DONE]")
    writer.write(b"0\r\n\r\n")


def bench(tmp_path: Path, *flags: str) -> tuple[int, str, dict]:
    """-> exit code, what was printed, the JSON."""
    output = tmp_path / "result.json"

    async def run() -> tuple[int, str]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        command = [str(SERVE), "--base-url", url, "--output", str(output), "--warmup", "1", "--output-len", "5", *flags]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
        printed, _ = await process.communicate()
        server.close()
        return process.returncode or 0, printed.decode()

    code, printed = asyncio.run(run())
    return code, printed, json.loads(output.read_text())


@pytest.mark.parametrize("flags", [(), ("--chat",)])
def test_closed_loop_holds_its_concurrency_and_tells_first_from_later_tokens(tmp_path, flags):
    code, printed, result = bench(tmp_path, "--num-prompts", "6", "--max-concurrency", "2", *flags)
    assert code == 0
    assert (result["completed"], result["failed"], result["model_id"]) == (6, 0, "fake")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (54, 30)
    one = PREFILL + 4 * DECODE
    assert result["duration"] >= 3 * one
    assert result["median_ttft_ms"] >= 1000 * PREFILL
    assert 1000 * DECODE * 0.5 <= result["median_tpot_ms"] < 1000 * PREFILL
    assert result["mean_e2el_ms"] >= 1000 * one
    assert result["output_throughput"] == pytest.approx(30 / result["duration"])
    assert max(map(len, printed.splitlines())) <= 80


def test_open_loop_starts_requests_at_their_times_and_waits_for_none(tmp_path):
    code, _, result = bench(tmp_path, "--num-prompts", "12", "--request-rate", "40", "--seed", "3")
    assert code == 0
    assert result["request_rate"] == 40
    assert result["duration"] < 12 * (PREFILL + 4 * DECODE)


def test_a_refused_request_is_counted_shown_and_left_out_of_the_figures(tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["good", "please refuse"]))
    code, printed, result = bench(tmp_path, "--prompts", str(prompts))
    assert code == 1
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (1, 1, 5)
    assert "status 400: bad" in printed

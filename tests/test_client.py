"""EngineClient against a scripted engine at the other end of a pipe."""

import asyncio
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from jaxserve.client import EngineClient, EngineOverloaded, EngineUnavailable, merge
from jaxserve.types import EngineFailed, Request, SamplingParams
from tests.fakes import ScriptedEngine


def count_up(request: Request, index: int) -> int:
    return request.id * 1000 + index


def make(client: EngineClient, max_tokens: int, number: int = 1) -> list[Request]:
    return [Request(client.next_id(), (1, 2), SamplingParams(max_tokens=max_tokens, seed=0)) for _ in range(number)]


def run_client(engine: ScriptedEngine, body, **options) -> None:
    async def main() -> None:
        client = EngineClient(engine.client_end, **options)
        client.start()
        await client.wait_ready()
        try:
            await body(client)
        finally:
            await client.close()

    with engine:
        asyncio.run(asyncio.wait_for(main(), 20))


def test_what_a_prompt_tells_is_complete_before_its_first_token():
    async def body(client: EngineClient) -> None:
        params = SamplingParams(max_tokens=2, seed=0, num_prompt_logprobs=2)
        prompt = tuple(range(9))
        scored, ended = client.submit(
            [
                Request(client.next_id(), prompt, params),
                Request(client.next_id(), prompt, replace(params, max_tokens=0)),
            ]
        )
        await scored.wait()
        assert [item and item.logprob for item in scored.prompt_logprobs] == [None, *(-at / 4 for at in range(1, 9))]
        assert len(await read(scored)) == 2
        assert await read(ended) == [None] and ended.prompt_logprobs == scored.prompt_logprobs
        await ended.wait()  # returns at the end, too

    run_client(ScriptedEngine(count_up), body)


async def read(stream) -> list[int]:
    return [event.token_id async for events in stream for event in events]


def test_every_stream_gets_its_own_tokens_in_order():
    engine = ScriptedEngine(count_up)

    async def body(client: EngineClient) -> None:
        streams = client.submit(make(client, 50, 20))
        for stream, tokens in zip(streams, await asyncio.gather(*map(read, streams)), strict=True):
            assert tokens == [stream.id * 1000 + index for index in range(50)]
            assert stream.first_token_at is not None and stream.first_token_at >= stream.submitted_at
        assert client.num_open == 0
        assert engine.batches == [tuple(stream.id for stream in streams)]

    run_client(engine, body)


def test_merge_yields_everything_and_ends():
    async def body(client: EngineClient) -> None:
        streams = client.submit([request for count in (1, 7, 30) for request in make(client, count)])
        tokens: dict[int, list[int | None]] = {0: [], 1: [], 2: []}
        async for index, events in merge(streams):
            tokens[index].extend(event.token_id for event in events)
        assert [len(tokens[index]) for index in range(3)] == [1, 7, 30]

    run_client(ScriptedEngine(count_up), body)


def test_events_that_arrive_together_are_read_together():
    engine = ScriptedEngine(count_up)

    async def body(client: EngineClient) -> None:
        engine.hold()
        (stream,) = client.submit(make(client, 5))
        await asyncio.to_thread(engine.wait_until, lambda: bool(engine.requests))
        engine.step(5)
        await asyncio.to_thread(engine.wait_until, lambda: engine.num_running == 0)
        await asyncio.sleep(0.05)
        assert len(await anext(stream)) == 5
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run_client(engine, body)


def test_an_aborted_stream_ends_and_the_engine_is_told_once():
    engine = ScriptedEngine(count_up)

    async def body(client: EngineClient) -> None:
        stream, other = client.submit(make(client, 1_000_000)) + client.submit(make(client, 10))
        await anext(stream)
        stream.abort()
        stream.abort()
        assert [events async for events in stream] == []
        assert len(await read(other)) == 10
        await asyncio.to_thread(engine.wait_until, lambda: engine.num_running == 0)
        other.abort()
        await asyncio.sleep(0.02)
        assert engine.aborted == [stream.id]
        assert client.num_open == 0

    run_client(engine, body)


@pytest.mark.parametrize("message", [None, "out of memory"])
def test_a_dead_engine_ends_every_open_stream_with_an_error(message):
    engine = ScriptedEngine(count_up)

    async def body(client: EngineClient) -> None:
        streams = client.submit(make(client, 1_000_000, 3))
        await anext(streams[0])

        async def drain() -> None:
            async for _ in merge(streams[1:]):
                pass

        waiting = asyncio.create_task(drain())
        failed = asyncio.create_task(client.wait_failed())
        await asyncio.to_thread(engine.die if message is None else lambda: engine.fail(message, 2))
        with pytest.raises(EngineUnavailable, match=message or "ended without a message"):
            await waiting
        with pytest.raises(EngineUnavailable):
            async for _ in streams[0]:
                pass
        expected = EngineFailed("its process ended without a message") if message is None else EngineFailed(message, 2)
        assert await failed == expected == client.failure
        with pytest.raises(EngineUnavailable):
            client.submit(make(client, 1))

    run_client(engine, body)


def test_nothing_can_be_submitted_before_ready_and_a_failed_start_is_told():
    async def main() -> None:
        with ScriptedEngine(count_up, announce_ready=False) as engine:
            client = EngineClient(engine.client_end)
            client.start()
            with pytest.raises(EngineUnavailable, match="starting"):
                client.submit(make(client, 1))
            engine.fail("no such file", 2)
            with pytest.raises(EngineUnavailable, match="no such file"):
                await client.wait_ready()
            await client.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_above_the_limit_nothing_is_submitted():
    async def body(client: EngineClient) -> None:
        first = client.submit(make(client, 1_000_000, 2))
        with pytest.raises(EngineOverloaded, match="takes 3"):
            client.submit(make(client, 1, 2))
        assert client.num_open == 2
        first[0].abort()
        assert len(await read(client.submit(make(client, 4))[0])) == 4

    run_client(ScriptedEngine(count_up), body, max_open_requests=3)


def test_closing_tells_the_engine_to_stop_and_ends_the_threads():
    engine = ScriptedEngine(count_up)

    async def main() -> EngineClient:
        client = EngineClient(engine.client_end)
        client.start()
        await client.wait_ready()
        (stream,) = client.submit(make(client, 1_000_000))
        client.flush_cache()
        seen = []
        client.observers.append(seen.append)
        await anext(stream)
        await client.close()
        await client.close()
        with pytest.raises(EngineUnavailable, match="shutting down"):
            async for _ in stream:
                pass
        assert seen and client.stats is not None and client.failure is None
        return client

    with engine:
        client = asyncio.run(asyncio.wait_for(main(), 20))
        assert engine.stopped and engine.num_flushes == 1
        assert not client._reader.is_alive() and not client._writer.is_alive()


def test_a_step_of_256_tokens_costs_the_event_loop_little():
    async def body(client: EngineClient) -> None:
        streams = client.submit(make(client, 40, 256))
        busy = time.process_time()
        events = [event async for _, batch in merge(streams) for event in batch]
        busy = time.process_time() - busy
        assert len(events) == 256 * 40
        assert busy / len(events) < 100e-6  # both ends of the pipe; about 5 µs on an idle core

    run_client(ScriptedEngine(count_up), body)


def test_the_rooms_of_the_front_end_never_import_jax():
    modules = [
        "client",
        "text.tokenizer",
        "text.detokenizer",
        "text.stop",
        "text.chat_template",
        "text.params",
        "text.generate",
        "llm",
    ]
    code = "import sys\n" + "".join(f"import jaxserve.{module}\n" for module in modules)
    code += "from jaxserve.text.chat_template import ChatTemplate\nChatTemplate('x').render([])\n"
    code += "assert 'transformers' in sys.modules\nassert not {'jax', 'flax', 'torch'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

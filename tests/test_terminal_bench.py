"""`jaxserve bench` on a terminal and on pipes; its figures are those of test_bench_serve."""

import json
import time
from collections.abc import Iterator
from typing import Any

from tests.terminal import Terminal, chat_server, piped


def three_words(body: dict[str, Any]) -> Iterator[dict[str, Any] | str]:
    for word in ("one", "two", "three"):
        time.sleep(0.02)
        yield word
    yield {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


def test_several_concurrencies_are_compared_in_one_table(tmp_path):
    with chat_server(three_words) as (url, bodies):
        levels = ("--max-concurrency", "1", "4")
        flags = ("--chat", "--num-prompts", "8", "--warmup", "1", "--prefix-len", "3", "--output", "out/figures.json")
        code, out, err = piped("bench", "--url", url, *flags, *levels, cwd=tmp_path)
    assert (code, err) == (0, ""), err
    assert "\x1b" not in out and "\r" not in out and max(map(len, out.splitlines())) <= 80
    one, four = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert (one["max_concurrency"], four["max_concurrency"], four["completed"]) == (1, 4, 8)
    assert four["request_throughput"] > 2 * one["request_throughput"]
    prompts = [each["messages"][0]["content"] for each in bodies]
    assert len(prompts) == 18 == len(set(prompts)), "no prompt is sent twice: the prefix cache would answer it"
    assert len({tuple(prompt.split()[:3]) for prompt in prompts}) == 1, "but for the prefix that was asked for"


def test_json_goes_to_standard_output_alone():
    with chat_server(three_words) as (url, _):
        code, out, err = piped("bench", "--url", url, "--chat", "--num-prompts", "2", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["total_output_tokens"] == 6


def test_a_terminal_sees_a_bar_and_ctrl_c_reports_what_had_ended():
    flags = ("--chat", "--num-prompts", "2000", "--max-concurrency", "2", "--warmup", "0")
    with chat_server(three_words) as (url, _), Terminal("bench", "--url", url, *flags) as term:
        term.expect(r"2 at once: .* ([5-9]|\d\d)/2000 .*tokens/s")
        term.interrupt()
        term.expect("the figures are of the requests that had ended")
        assert int(term.expect(r"completed / failed +(\d+) / 0")[1]) >= 5
        assert term.wait() == 130


def test_what_cannot_be_measured_is_said():
    with chat_server(three_words) as (url, _):
        for argv, message in [
            (("--url", url, "--prompts", "/nowhere.json"), "/nowhere.json"),
            (("--url", url, "--page-size", "16"), "leave it or --url out"),
            (("--url", "http://127.0.0.1:9"), "does not answer"),
        ]:
            code, out, err = piped("bench", *argv)
            assert (code, out) == (2, "") and message in err, err

"""`jaxserve chat` as people use it: on a terminal, on pipes, and the conversation behind it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.terminal.conversation import COMMANDS, Ask, CommandRefused, Conversation, follow
from tests.terminal import Terminal, chat_server, piped
from tests.tiny_llama import write_tiny_llama


def parrot(body: dict[str, Any]) -> Iterator[dict[str, Any] | str]:
    """Says the last message again, word by word. "slowly": without end; "refuse": 400; "think": reasons first."""
    said = body["messages"][-1]["content"]
    if "refuse" in said:
        yield {"status": 400, "error": {"message": "the prompt is too long for this server"}}
        return
    if "break" in said:
        yield "half an"
        yield {"error": {"message": "the engine stopped"}}
        return
    if "think" in said:
        yield {"choices": [{"delta": {"reasoning_content": "let me see"}}]}
    for word in said.split():
        yield f"{word} "
    while "slowly" in said:
        time.sleep(0.02)
        yield "and on "
    num = len(said.split())
    yield {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    yield {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": num}}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def test_a_conversation_streams_remembers_and_stops(home, tmp_path):
    with chat_server(parrot) as (url, bodies), Terminal("chat", "--url", url, "--system", "Be kind.", env=home) as term:
        term.expect("fake at http.*Ctrl-D leaves")
        term.say("two words")
        term.expect(r"two words \r\n.*2 tokens, first after .*prompt 7")
        term.say("more slowly")
        term.expect("and on and on")
        term.interrupt()
        term.expect("stopped")
        term.expect(">>> ")
        time.sleep(0.2)  # as people do: in its first moments input() notices an interrupt at the next key only
        term.interrupt()  # at the prompt: the line is dropped, the program stays
        term.say("first \\\nsecond")
        term.expect(r"\.\.\. ")
        term.expect(r"first second \r\n")
        term.say('"""\none\n\ntwo"""')
        term.expect(r"one two \r\n")
        assert term.leave() == 0
    said = [each["content"] for each in bodies[-1]["messages"]]
    assert said[0] == "Be kind." and said[1:3] == ["two words", "two words "] and said[3] == "more slowly"
    assert said[4].startswith("more slowly and on and on")
    assert said[5] == "first \nsecond" and said[-1] == "one\n\ntwo"
    assert "left" in bodies[1], "the answer that was stopped is no longer made"
    kept = (tmp_path / "state" / "jaxserve" / "chat_history").read_text()
    assert "two words" in kept and (tmp_path / "state" / "jaxserve" / "chat_history").stat().st_mode & 0o77 == 0


def test_commands_change_what_is_asked(home, tmp_path):
    saved = tmp_path / "talk.json"
    with chat_server(parrot) as (url, bodies), Terminal("chat", "--url", url, "--no-history", env=home) as term:
        for typed, shown in [
            ("/system You are brief.", "system prompt: You are brief."),
            ('/params temperature=0.5 stop=["a", "b"]', "temperature=0.5 stop="),
            ("/params temprature=1", "did you mean temperature"),
            ("hello there", "hello there \r\n"),
            ("/retry", "hello there \r\n"),
            (f"/save {saved}", "saved to"),
            ("please refuse", "error: the prompt is too long"),
            ("/undo", "taken back: hello there"),
            ("/undo", "nothing was asked yet"),
            (f"/load {saved}", "2 messages"),
            ("/hlep", "did you mean /help"),
            ("/help", "Ctrl-D leaves"),
        ]:
            term.say(typed)
            term.expect(shown.replace("[", r"\["))
        term.say("/exit")
        assert term.wait() == 0
    assert [len(each["messages"]) for each in bodies] == [2, 2, 4]
    assert bodies[0]["temperature"] == 0.5 and bodies[0]["stop"] == ["a", "b"]
    assert json.loads(saved.read_text())["messages"][1] == {"role": "assistant", "content": "hello there "}
    assert not (tmp_path / "state").exists()


def test_thoughts_stand_back_on_a_terminal_and_stay_off_a_pipe(home):
    with chat_server(parrot) as (url, _), Terminal("chat", "--url", url, "--no-history", env=home) as term:
        term.say("think hard")
        term.expect("\x1b\\[2mlet me see\x1b\\[0m\r\n\r\nthink hard")
        assert term.leave() == 0
    with chat_server(parrot) as (url, _):
        assert piped("chat", "--url", url, given="think hard") == (0, "think hard \n", "")


def test_a_pipe_gets_the_plain_answer_and_exit_codes():
    with chat_server(parrot) as (url, bodies):
        assert piped("chat", "--url", f"{url}/v1", "-p", "Sum up:", "--max-tokens", "9", given="text") == (
            *(0, "Sum up: text \n", ""),
        )
        assert bodies[0]["messages"] == [{"role": "user", "content": "Sum up:\n\ntext"}]
        assert bodies[0]["max_tokens"] == 9 and bodies[0]["model"] == "fake"
        code, out, err = piped("chat", "--url", url, "-p", "refuse")
        assert (code, out) == (2, "") and "the prompt is too long" in err
        code, out, err = piped("chat", "--url", url, "-p", "break")
        assert (code, out) == (1, "half an\n") and "the engine stopped" in err
        for argv, message in [
            (("--url", url), "nothing was asked"),
            (("--url", url, "hello"), "--prompt"),
            (("--url", url, "-p", "x", "--model", "other"), "it serves fake"),
            (("--url", url, "-p", "x", "--param", "tempo=1"), "no parameter"),
            (("--url", url, "-p", "x", "--dtype", "float32"), "leave it or --url out"),
            (("--url", url, "-p", "x", "--max-token", "1"), "did you mean --max-tokens?"),
            (("-p", "x", "--page-size", "x"), "--page-size"),
            (("--url", "http://127.0.0.1:9", "-p", "x"), "does not answer"),
        ]:
            code, out, err = piped("chat", *argv)
            assert (code, out) == (2, "") and message in err, err


def test_the_environment_names_the_server():
    with chat_server(parrot) as (url, _):
        assert piped("chat", "-p", "hello", env={"JAXSERVE_URL": url}) == (0, "hello \n", "")
    code, _, err = piped("chat", "-p", "hello", env={"JAXSERVE_URL": "ftp://x"})
    assert code == 2 and "JAXSERVE_URL" in err


def test_a_conversation_that_was_saved_is_the_same_when_loaded(tmp_path):
    talk = Conversation("m", "Be brief.", {"seed": 1})
    talk.ask("Hello\nthere")
    talk.answer("Grüß dich")
    path = tmp_path / "talk.json"
    follow(talk, f"/save {path}")
    again = Conversation("m")
    follow(again, f"/load {path}")
    assert again == talk
    follow(talk, f"/save {path.with_suffix('.md')}")
    assert "## You\n\nHello\nthere" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "content", ["{", "[]]", '{"a": 1}', '[{"role": "tool", "content": "x"}]', '[{"role": "user"}]']
)
def test_what_is_no_conversation_leaves_the_present_one_alone(content, tmp_path):
    talk = Conversation("m", messages=[{"role": "user", "content": "x"}])
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CommandRefused, match="holds no conversation"):
        follow(talk, f"/load {tmp_path / 'x.json'}")
    assert talk.messages == [{"role": "user", "content": "x"}]


def test_a_question_without_an_answer_is_taken_back():
    talk = Conversation("m")
    talk.ask("a")
    talk.answer("")
    assert talk.messages == []
    talk.ask("a")
    talk.answer("b")
    with pytest.raises(Ask):
        follow(talk, "/retry")
    assert talk.messages == [{"role": "user", "content": "a"}]


def test_help_fits_80_columns_and_names_every_command():
    shown = follow(Conversation("m"), "/help")
    assert max(map(len, shown.splitlines())) <= 80
    assert all(f"/{name}" in shown for name in COMMANDS)


def test_the_real_server_answers_on_a_pipe(live):
    said = ("-p", "Say hello.", "--temperature", "0", "--max-tokens", "8")
    code, out, err = piped("chat", "--url", live.url, "--model", live.model, *said)
    assert (code, err) == (0, ""), err
    assert out.count("\n") == 1 + out.rstrip("\n").count("\n") and out.strip()
    assert piped("chat", "--url", live.url, *said)[1] == out


def test_without_a_server_the_chat_starts_one_that_ends_with_it(cache_dir, tmp_path):
    model = write_tiny_llama(tmp_path / "model")
    flags = ("--max-total-tokens", "1024", "--max-running-requests", "2", "--chunked-prefill-size", "16")
    asked = ("-p", "a", "--max-tokens", "3", "--param", "ignore_eos=true")
    code, out, err = piped("chat", "--model", model, "--cache-dir", cache_dir, *flags, *asked)
    assert code == 0 and out.strip(), err
    assert "warmed up" in err and "\x1b" not in err
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if model in _read(path)]
    assert not left, "the server is still there"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_a_server_that_cannot_start_says_why_and_so_does_the_exit_code(tmp_path):
    code, out, err = piped("chat", "--model", str(tmp_path / "nothing"), "-p", "x", "--cache-dir", str(tmp_path))
    assert (code, out) == (2, "") and "the server could not start" in err and "nothing" in err.splitlines()[0], err

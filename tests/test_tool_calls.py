"""Tool calls and thinking in text: what is found, and that it is the same however the text is cut."""

import json
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.text.generate import Delta
from jaxserve.text.message import Message
from jaxserve.text.message_parser import MessageParser, Reading
from jaxserve.text.python_literals import python_arguments
from jaxserve.text.reasoning import ThinkSplitter
from jaxserve.text.tool_formats import FORMATS

NAMES = ("f", "get_weather")


def read(pieces, form=None, think=None, **reading):
    """The pieces as one message -> (content, reasoning, [(name, arguments)], finish reason). Checks every delta."""
    calls = None if form is None else lambda: FORMATS[form].parser(NAMES, "")
    splitter = None if think is None else lambda: ThinkSplitter(**think)
    ids = iter(range(10**6))
    parser = MessageParser(Reading(splitter, calls, **reading), lambda: f"call_{next(ids)}")
    message, begun = Message(), 0
    for index, piece in enumerate(pieces):
        end = "stop" if index == len(pieces) - 1 else None
        delta = parser.advance(Delta(piece, (7,), None, index + 1, end))
        for call in delta.tool_calls:
            if call.id is None:
                assert call.name is None and call.index == begun - 1 and call.arguments
            else:
                assert call.index == begun and call.id == f"call_{begun}" and call.name in NAMES
                begun += 1
        message.add(delta)
    calls_made = [(call.name, call.arguments) for call in message.tool_calls]
    return message.content, message.reasoning, calls_made, message.finish_reason


HERMES = [
    ("hello <b>you</b>", "hello <b>you</b>", []),
    ('<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call>', "", [("f", '{"a": [1, "}"]}')]),
    ('Sure.\n<tool_call>{"arguments":{"x":1},"name":"f"}</tool_call>\n ', "Sure.", [("f", '{"x":1}')]),
    ('<tool_call>{"name":"f"}</tool_call>\n<tool_call>{"name":"f"}</tool_call>', "", [("f", "{}"), ("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":{}}</tool_call>\nDone', "\nDone", [("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (
        '<tool_call>{"name":"f","arguments":{"a":"\\"}</tool_call>"}}</tool_call>',
        "",
        [("f", '{"a":"\\"}</tool_call>"}')],
    ),
    ('<tool_call>{"name":"f","arguments":{"a":1}</tool_call>', "", [("f", '{"a":1}')]),  # a brace was forgotten
    ('<tool_call>{"name":"f","arguments":{"a": "tru', "", [("f", '{"a": "tru')]),  # cut off
    ('<tool_call>{"type":"function","id":"1","name":"f","arguments":null}', "", [("f", "{}")]),
    ('<tool_call>{"name":"rm","arguments":{}}</tool_call>', None, []),  # was not offered
    ('<tool_call>{"name":"f","arguments":[1]}</tool_call>', None, []),
    ('<tool_call>{"name":"\\ud800","arguments":{}}</tool_call>', None, []),
    ("<tool_call>", None, []),
    ("  <tool_call> {", None, []),
    ("a < b <tool <tool_cal", None, []),
    ('<tool_call>no <tool_call>{"name":"f"}</tool_call>', "<tool_call>no", [("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":{}, "x":1}', ', "x":1}', [("f", "{}")]),
]
LLAMA = [
    ('{"name": "f", "parameters": {"city": "Zürich"}}', "", [("f", '{"city": "Zürich"}')]),
    ('<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    ('{"name":"f","parameters":{}}; {"name":"f","arguments":{"a":1}}', "", [("f", "{}"), ("f", '{"a":1}')]),
    ('Here:\n\n  {"name":"f","parameters":{}}\nok', "Here:\nok", [("f", "{}")]),
    ('{"name":"f","parameters":{}};', "", [("f", "{}")]),
    ('{"result": {"name": "f"}}', None, []),
    ('say {"name":"f"}', None, []),
    ('{"name": "Bob", "parameters": {}}', None, []),
    ("{", None, []),
    ("x <|python_", None, []),
]
PYTHONIC = [
    ('[f(a=1, b="x,)]"), get_weather()]', "", [("f", '{"a": 1, "b": "x,)]"}'), ("get_weather", "{}")]),
    (
        "I will.\n[f(a=[True, (1, None)], b={'k': -1.5})]",
        "I will.",
        [("f", '{"a": [true, [1, null]], "b": {"k": -1.5}}')],
    ),
    ('[f(**{"a": true})]', "", [("f", '{"a": true}')]),
    ("[f(a=x)]", None, []),
    ("[f(1)]", None, []),
    ("[f(a=1e999)]", None, []),
    ("[1, 2]", None, []),
    ("[rm(a=1)]", None, []),
    ("[f(a='it", None, []),
    ("[", None, []),
    ("[f(a=1), f(b=x)] t", ", f(b=x)] t", [("f", '{"a": 1}')]),
]
CASES = [
    (form, *case) for form, cases in (("hermes", HERMES), ("llama3", LLAMA), ("pythonic", PYTHONIC)) for case in cases
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_found_and_the_rest_is_text_at_every_cut(form, text, content, calls):
    expected = (text if content is None else content, "", calls, "tool_calls" if calls else "stop")
    assert read([text], form) == expected
    assert read(list(text), form) == expected
    for cut in range(len(text) + 1):
        assert read([text[:cut], text[cut:]], form) == expected, cut


FRAGMENTS = {
    "hermes": [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": ',
        "{}",
        '{"a": "}"}',
        "}",
        '"',
        "\\",
        " ",
        "\n",
        "x",
    ],
    "llama3": [
        "<|python_tag|>",
        '{"name": "f", "parameters": ',
        '{"name":"f"}',
        "{}",
        "}",
        ";",
        '"',
        "\\",
        " ",
        "\n",
        "x",
    ],
    "pythonic": ["[f(", "f(", "a=1", ", ", ")", "]", "[", "'", "\\", "\n", " ", "x", "(", "\x00"],
}


@given(form=st.sampled_from(sorted(FRAGMENTS)), data=st.data())
@settings(max_examples=400, deadline=None)
def test_streamed_deltas_add_up_to_the_whole_message(form, data):
    words = data.draw(st.lists(st.sampled_from([*FRAGMENTS[form], "<think>", "</think>", "\n" * 70]), max_size=14))
    text = "".join(words)
    think = data.draw(st.sampled_from([None, {}, {"inside": True}, {"expected": True}, {"separate": False}]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], form, think)
    assert read(pieces, form, think) == whole
    assert read(list(text) or [""], form, think) == whole
    if think is None and not whole[2]:
        assert whole[0] == text, "without a call, the text is as the model wrote it"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.text(string.ascii_letters + "_", min_size=1, max_size=6)


@given(
    form=st.sampled_from(sorted(FORMATS)),
    calls=st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(KEYS, JSON, max_size=3)), min_size=1, max_size=3),
    step=st.integers(1, 9),
)
@example("pythonic", [("f", {"lambda": 1})], 1)
@settings(max_examples=200, deadline=None)
def test_what_a_format_writes_its_parser_reads_back(form, calls, step):
    text = FORMATS[form].write(calls)
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    content, _, found, finish = read(pieces, form)
    assert (content, finish) == ("", "tool_calls")
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_name_comes_first_and_arguments_as_they_are_written():
    parser = MessageParser(Reading(None, lambda: FORMATS["hermes"].parser(NAMES, "")))
    seen = []
    for index, piece in enumerate(['<tool_call>{"name": "f", "argu', 'ments": {"a', '": 1', "}}", "</tool_call>"]):
        delta = parser.advance(Delta(piece, (1,), None, index + 1))
        seen.append([(call.name, call.arguments) for call in delta.tool_calls])
    assert seen == [[], [("f", ""), (None, '{"a')], [(None, '": 1')], [(None, "}")], []]


@pytest.mark.parametrize(
    ("text", "options", "content", "reasoning"),
    [
        ("<think>\nhm\n</think>\n\nyes", {}, "yes", "hm"),
        ("hm\n</think>yes", {"inside": True}, "yes", "hm"),
        ("hm</think>yes", {"expected": True}, "yes", "hm"),
        ("<think>hm</think>yes", {"expected": True}, "yes", "hm"),
        ("only this", {"expected": True}, "", "only this"),
        ("yes <think>no</think>", {}, "yes <think>no</think>", ""),
        ("<think>cut o", {}, "", "cut o"),
        ("<think>a</thi", {}, "", "a</thi"),
        ("<think></think>yes", {}, "yes", ""),
        ("<thin", {}, "<thin", ""),
        ("\n<think>hm</think>\nyes", {"separate": False}, "\n<think>hm</think>\nyes", ""),
        ("hm\n</think>\n\nyes", {"inside": True, "separate": False}, "hm\n</think>\n\nyes", ""),
    ],
)
def test_thinking_is_told_from_the_answer_at_every_cut(text, options, content, reasoning):
    for cut in range(len(text) + 1):
        assert read([text[:cut], text[cut:]], None, options)[:2] == (content, reasoning), cut
    assert read(list(text), None, options)[:2] == (content, reasoning)


def test_a_call_in_the_thinking_is_a_thought():
    call = '<tool_call>{"name":"f"}</tool_call>'
    assert read([f"<think>{call}</think>{call}"], "hermes", {}) == ("", call, [("f", "{}")], "tool_calls")
    content, _, calls, _ = read([f"<think>{call}</think>{call}"], "hermes", {"separate": False})
    assert content == f"<think>{call}</think>" and calls == [("f", "{}")]


def test_thinking_can_be_left_out_or_come_in_one_piece():
    pieces = ["<think>one ", "two ", "three</think>", "yes"]
    assert read(pieces, None, {}, show_reasoning=False)[:2] == ("yes", "")
    parser = MessageParser(Reading(lambda: ThinkSplitter(), None, stream_reasoning=False, think_end=9))
    deltas = [parser.advance(Delta(piece, (1, 9) if "</" in piece else (1, 2), None, 1)) for piece in pieces]
    assert [delta.reasoning for delta in deltas] == ["", "", "one two three", ""]
    assert parser.reasoning_tokens == 6


def test_python_that_is_no_json_is_no_call():
    assert python_arguments("a={'x': 1}, **{'b c': 2}") == '{"a": {"x": 1}, "b c": 2}'
    assert python_arguments("a='\\ud800'") == '{"a": "\\ud800"}'
    for text in ("a=f()", "a=b'x'", "a=1j", "*[1]", "a={1: 2}", "a={**b}", "a=" + "[" * 5000 + "]" * 5000, "a=1\x00"):
        assert python_arguments(text) is None, text[:20]


def test_a_long_text_takes_linear_time():
    import time

    def seconds(count):
        begin = time.perf_counter()
        for form, word in (
            ("hermes", '<tool_call>{"arguments":{'),
            ("llama3", '{"parameters":{\n'),
            ("pythonic", "[f(\n"),
        ):
            read([word] * count, form)
        return time.perf_counter() - begin

    assert seconds(8000) < 12 * seconds(2000)

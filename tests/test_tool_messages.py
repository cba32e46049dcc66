"""Conversations with tools in the words of a template, whatever it knows of tools."""

import copy

import pytest

from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.dialect import dialect_of, thinking_after
from jaxserve.text.tool_messages import fit
from tests.api_server import TOKENIZER
from tests.fakes import CHATML

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [
    {"id": f"call{n}", "type": "function", "function": {"name": "f", "arguments": f'{{"a": {n}}}'}} for n in (1, 2)
]
RESULTS = [{"role": "tool", "tool_call_id": f"call{n}", "name": "f", "content": f"result {n}"} for n in (1, 2)]
USER = {"role": "user", "content": "hi"}
MESSAGES = [USER, {"role": "assistant", "content": "", "tool_calls": CALLS}, *RESULTS]

# What published templates do, each cut down to that.
QWEN = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% endfor %}"
)
LLAMA = (
    '{% if tools is not none %}ipython {"name": function name, "parameters": ...}{{ tools | tojson }}{% endif %}'
    "{% for m in messages %}[{{ m.role }}]{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('single tool-calls only') }}{% endif %}{% set c = m.tool_calls[0].function %}"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TEXT_ARGUMENTS = (
    "{{ tools | tojson }}<tool_call>{% for m in messages %}[{{ m.role }}]{% if m.content is none %}"
    "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
OWN_FORMAT = QWEN.replace("<tool_call>", "[TOOL_CALLS]")


def of(source, **flags):
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.chat_template = ChatTemplate(source)
    return tokenizer.chat_template, dialect_of(tokenizer, **flags)


def rendered(source, messages, tools, **flags):
    template, dialect = of(source, **flags)
    fitted, described = fit(dialect, messages, tools)
    return template.render(fitted, tools=described, prepared=True)


def test_a_template_that_knows_tools_gets_them_with_arguments_as_objects():
    text = rendered(QWEN, MESSAGES, TOOLS)
    assert text.startswith('<tools>{"type": "function"') and '"arguments": {"a": 1}}</tool_call><tool_call>' in text
    assert text.endswith("[tool]result 1[tool]result 2")
    assert of(QWEN)[1].format.name == "hermes" and not of(QWEN)[1].explained


def test_a_template_that_takes_one_call_a_message_gets_them_one_by_one():
    text = rendered(LLAMA, MESSAGES, TOOLS)
    first, second = (f'[assistant]{{"name": "f", "parameters": {{"a": {n}}}}}' for n in (1, 2))
    assert text.endswith(f"[user]hi{first}[tool]result 1{second}[tool]result 2")
    assert of(LLAMA)[1].format.name == "llama3"


def test_a_template_that_wants_text_and_no_content_gets_that():
    text = rendered(TEXT_ARGUMENTS, MESSAGES, TOOLS)
    assert text.endswith('[assistant]f{"a": 1}f{"a": 2}[tool]result 1[tool]result 2')


@pytest.mark.parametrize("tools", [TOOLS, []])
@pytest.mark.parametrize("source", [CHATML, OWN_FORMAT])
def test_what_a_template_does_not_know_is_written_out(source, tools):
    """Also in a later turn where no tools are given. A format that nobody could parse is not taught."""
    text = rendered(source, [{"role": "system", "content": "Be brief."}, *MESSAGES], tools)
    assert ("Be brief.\n\n# Tools" in text) == bool(tools) == ("<tools>" in text)
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in text and "[TOOL_CALLS]" not in text
    assert "<tool_response>\nresult 1\n</tool_response>\n<tool_response>\nresult 2\n</tool_response>" in text
    assert "tool\n" not in text.replace("assistant\n", "") and "[tool]" not in text


def test_flags_win_over_the_template():
    assert of(QWEN, tool_call_parser="pythonic")[1].format.name == "pythonic"
    assert of(QWEN, tool_call_parser="none")[1].format is None
    assert [of(QWEN + "</think>")[1].thinks, of(QWEN)[1].thinks] == [True, False]
    assert of(QWEN, reasoning_parser="deepseek-r1")[1].always_thinks
    assert not of(QWEN + "</think>", reasoning_parser="none")[1].thinks
    with pytest.raises(ValueError, match="hermes"):
        of(QWEN, tool_call_parser="x")


def test_whether_a_reply_begins_in_thought():
    assert thinking_after("<|assistant|><think>\n", None) == thinking_after("...", "<think>\nWell") == "inside"
    assert thinking_after("what is <think>?<|assistant|>", None) == "open"
    assert thinking_after("<think>\n\n</think>\n\n", None) == thinking_after("...", "<think>a</think>b") == "over"
    assert thinking_after("...<think>", "done") == "over"

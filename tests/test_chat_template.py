"""ChatTemplate: rendering, and errors that are the client's."""

import pytest

from jaxserve.text.chat_template import ChatTemplate, TemplateError
from tests.fakes import CHATML

HELLO = [{"role": "user", "content": "hello"}]


def test_messages_are_rendered_as_the_template_says():
    template = ChatTemplate(CHATML)
    assert template.render(HELLO) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nhello<|im_end|>\n"


def test_special_tokens_and_further_variables_reach_the_template():
    template = ChatTemplate(
        "{{ bos_token }}{{ mood }}{{ strftime_now('%Y') | length }}", special_tokens={"bos_token": "<s>"}
    )
    assert template.render(HELLO, kwargs={"mood": "gay"}) == "<s>gay4"


def test_the_final_message_is_continued_without_its_end():
    messages = [*HELLO, {"role": "assistant", "content": "Well,"}]
    rendered = ChatTemplate(CHATML).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered.endswith("<|im_start|>assistant\nWell,")


def test_text_parts_null_content_and_json_arguments_become_what_templates_expect():
    source = (
        "{% for m in messages %}{{ m.content }}|"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert ChatTemplate(source).render(messages) == "a\nb||3"
    assert call["function"]["arguments"] == '{"x": 3}'


def test_the_tool_template_is_taken_when_tools_are_given():
    template = ChatTemplate({"default": "plain", "tool_use": "tools {{ tools | length }}"})
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert (template.render(HELLO), template.render(HELLO, tools=[tool])) == ("plain", "tools 1")
    with pytest.raises(TemplateError, match="only: tool_use"):
        ChatTemplate({"tool_use": "x"}).render(HELLO)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 'a' + messages[0].nothing }}", "nothing"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_what_a_template_refuses_is_a_template_error_with_its_words(source, reason):
    with pytest.raises(TemplateError, match=reason):
        ChatTemplate(source).render(HELLO)


def test_requests_that_cannot_be_meant_are_refused():
    template = ChatTemplate(CHATML)
    with pytest.raises(TemplateError, match="both"):
        template.render(HELLO, continue_final_message=True)
    with pytest.raises(TemplateError, match="cannot set messages"):
        template.render(HELLO, kwargs={"messages": []})
    with pytest.raises(TemplateError, match="image_url"):
        template.render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    with pytest.raises(TemplateError, match="not JSON"):
        call = {"function": {"name": "f", "arguments": "{"}}
        template.render([{"role": "assistant", "content": None, "tool_calls": [call]}])

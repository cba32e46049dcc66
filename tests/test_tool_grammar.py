"""Grammars of calls: what they let a model write is what the parser of its format reads, and nothing else."""

import pytest

from jaxserve.text.grammar import GrammarChecker, json_object, regex
from jaxserve.text.params import ParameterError
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tool_formats import FORMATS
from jaxserve.text.tool_grammar import turn_grammar_of
from tests.api_server import TOKENIZER
from tests.fakes import write_byte_level
from tests.test_tool_calls import read

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "f"}},
]
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
    "llama3": '{"name": "%s", "parameters": %s}',
    "pythonic": "%s(**%s)",
}
JOINED = {"hermes": ("", "\n", ""), "llama3": ("", "; ", ""), "pythonic": ("[", ", ", "]")}


def accepts(grammar: str, text: str, tokenizer=TOKENIZER) -> bool:
    """text, its special tokens as tokens, is a sentence of the grammar."""
    from llguidance import LLMatcher

    checker = GrammarChecker(tokenizer)
    checker.check(grammar, "tools")
    matcher = LLMatcher(checker._tokenizer(), grammar, log_level=0)
    special = {tokenizer.token_text(id_): 257 + n for n, id_ in enumerate(sorted(tokenizer.special_ids))}
    while text:
        word = next((word for word in special if text.startswith(word)), None)
        ids = list(text[:1].encode()) if word is None else [special[word]]
        if not matcher.consume_tokens(ids):
            return False
        text = text[len(word or "x") :]
    return matcher.is_accepting()


def build(form, tools=TOOLS, tokenizer=TOKENIZER, **options):
    special = {tokenizer.token_text(id_) for id_ in tokenizer.special_ids}
    return turn_grammar_of(tools, form, is_special=special.__contains__, **({"parallel": True} | options))


@pytest.mark.parametrize("form", FORMATS)
def test_forced_calls_are_calls_with_arguments_as_their_schema_says(form):
    grammar, single = build(form), build(form, parallel=False)
    before, between, after = JOINED[form]
    weather, plain = WRITTEN[form] % ("get_weather", '{"city": "Zürich"}'), WRITTEN[form] % ("f", "{}")
    for calls in ([weather], [plain], [weather, plain], [plain, plain, weather]):
        text = before + between.join(calls) + after
        assert accepts(grammar, text) and accepts(single, text) == (len(calls) == 1)
        content, _, found, _ = read(list(text), form)
        assert content == "" and [name for name, _ in found] == [
            ("f", "get_weather")[call == weather] for call in calls
        ]
    wrong = [
        "hello",
        "",
        before + WRITTEN[form] % ("rm", "{}") + after,
        before + weather.replace("city", "town") + after,
    ]
    wrong += [before + WRITTEN[form] % ("get_weather", "{}") + after, before + weather + between + after]
    assert not [text for text in wrong if accepts(grammar, text)]


def test_markers_that_are_special_tokens_are_asked_for_as_tokens(tmp_path):
    special = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    tokenizer = Tokenizer.from_folder(write_byte_level(tmp_path, special=special))
    grammar = build("hermes", tokenizer=tokenizer, thinks="maybe")
    call = WRITTEN["hermes"] % ("f", "{}")
    assert accepts(grammar, call, tokenizer) and accepts(grammar, f"<think>a <b></think>\n\n{call}", tokenizer)
    assert not accepts(grammar, f"<think>a{call}", tokenizer)


def test_an_answer_or_calls_may_follow_thinking():
    call = WRITTEN["hermes"] % ("f", "{}")
    grammar = build("hermes", answer=json_object(), thinks="maybe")
    for text in (call, '{"a": 1}', f"<think>\nwell\n</think>\n\n{call}", '<think></think>{"a": 1}'):
        assert accepts(grammar, text)
    assert not accepts(grammar, '{"a": 1}' + call) and not accepts(grammar, "well</think>{}")
    inside = build("hermes", tools=[], answer=regex("a+"), thinks="inside")
    assert accepts(inside, "well, a\n</think>\naa") and not accepts(inside, "aa") and not accepts(inside, "</think>b")


def test_what_cannot_be_enforced_is_said():
    deep: dict = {}
    for _ in range(5000):
        deep = {"properties": {"a": deep}}
    for schema, problem in ((deep, "deeply"), ({"description": "x" * 300_000}, "characters")):
        with pytest.raises(ParameterError, match=problem):
            build("hermes", tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}])

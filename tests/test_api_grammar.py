"""The form of an answer as clients ask for it: what reaches the engine, and every 400."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from jaxserve.text.finite import has_finite_instance
from jaxserve.text.grammar import MAX_GRAMMAR_LENGTH, choice, ebnf, json_schema, lark, regex
from tests.api_server import TOKENIZER, ApiServer, error_of

VOCABULARY = LLTokenizer(TOKENIZER.backend.to_str())
SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"name": {"type": "string", "title": "Name"}, "age": {"type": "integer", "x-order": 2}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GBNF = 'root ::= "yes" | "no" [0-9]+'
LARK = 'start: "a"+ "b"'


@pytest.fixture(scope="module")
def server():
    with ApiServer("hello world") as server:
        yield server


def accepts(grammar: str | None, text: str) -> bool:
    """The whole text is a sentence."""
    assert grammar is not None
    matcher = LLMatcher(VOCABULARY, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def sent(server: ApiServer, route: str, **fields: Any) -> str | None:
    """The grammar that the engine was given."""
    server.engine.requests.clear()
    reply = getattr(server, route)(**fields)
    assert reply.status_code == 200, reply.text
    (request,) = server.engine.requests
    return request.grammar


FIELDS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1,{}]}'], ["[]", "1", "", '{ "a": 1}']),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": SCHEMA}}},
        ['{"name": "x", "age": 3}', '{"name":"","age":-1}'],
        ["{}", '{"age": 3, "name": "x"}', '{"name": "x", "age": 3, "b": 1}', '{"name": "x", "age": 1.5}'],
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": {"enum": ["é", 2, None]}}}},
        ['"é"', "2", "null"],
        ['"e"', "3"],
    ),
    ({"response_format": {"type": "json_object", "schema": {"type": "boolean"}}}, ["true", "false"], ["1"]),
    ({"response_format": {"type": "json_schema", "schema": {"const": 7}}}, ["7"], ["8"]),
    ({"json_schema": SCHEMA}, ['{"name": "x", "age": 3}'], ["{}"]),
    ({"json_schema": json.dumps(SCHEMA)}, ['{"name": "x", "age": 3}'], ["{}"]),
    ({"guided_json": json.dumps({"type": "array", "items": {"type": "integer"}})}, ["[1, 2]", "[]"], ["{}", "[a]"]),
    ({"regex": r"\d{3}-[a-c/]+\n?"}, ["123-a/b", "123-c\n"], ["12-a", "123-", "123-a "]),
    ({"regex": "^(cat|category)$"}, ["cat", "category"], ["cate", "dog"]),
    ({"guided_regex": "a|ab"}, ["a", "ab"], ["b", ""]),
    ({"guided_choice": ["red", "redder", 'a "b"\n\\']}, ["red", "redder", 'a "b"\n\\'], ["re", "redd"]),
    ({"ebnf": GBNF}, ["yes", "no17"], ["no", "maybe"]),
    ({"guided_grammar": GBNF}, ["yes", "no17"], ["no"]),
    ({"grammar": GBNF}, ["yes", "no17"], ["no"]),
    ({"grammar": LARK}, ["ab", "aab"], ["b", "aa"]),
    ({"guided_grammar": LARK}, ["ab"], ["b"]),
    ({"structured_outputs": {"json": SCHEMA}}, ['{"name": "x", "age": 3}'], ["{}"]),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        ['{"name":"x","age":3}'],
        ['{"name": "x","age":3}'],
    ),
    ({"structured_outputs": {"json_object": True, "regex": None}}, ["{}"], ["1"]),
    ({"structured_outputs": {"regex": "x+"}}, ["xx"], ["y"]),
    ({"structured_outputs": {"choice": ["on", "off"]}}, ["on", "off"], ["o"]),
    ({"structured_outputs": {"grammar": LARK}}, ["ab"], ["b"]),
]


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize(("fields", "good", "bad"), FIELDS, ids=lambda value: str(value)[:50])
def test_every_field_gives_the_grammar_that_it_says(server, route, fields, good, bad):
    grammar = sent(server, route, **fields)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


NOTHING: list[dict[str, Any]] = [
    {},
    {"response_format": None, "regex": None, "structured_outputs": None},
    {"response_format": {"type": "text"}},
    {"grammar": "", "regex": "", "ebnf": "", "guided_grammar": ""},
    {"structured_outputs": {}},
    {"structured_outputs": {"json": None, "json_object": False}},
]


@pytest.mark.parametrize("fields", NOTHING, ids=str)
def test_fields_that_ask_for_nothing_give_no_grammar(server, fields):
    assert sent(server, "chat", **fields) is None


def schema(**keywords: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": keywords}}}


DEEP = json.loads('{"items":' * 150 + "{}" + "}" * 150)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": 3}, "response_format", "object"),
    ({"response_format": {}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "text, json_object and json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema",
        "schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"strict": 1, "schema": {}}}},
        "response_format.json_schema.strict",
        "bool",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, None, "a JSON Schema is an object"),
    (schema(type="object", **{"not": {}}), None, '"not"'),
    (schema(properties={"a": {"uniqueItems": True}}), None, '"uniqueItems"'),
    (schema(**{"if": {}, "then": {}}), None, '"if"'),
    (schema(propertyNames={"pattern": "a"}), None, '"propertyNames"'),
    (schema(type="string", format="zzz"), None, "zzz"),
    (schema(type="string", pattern="(?=a)b"), None, "look-around"),
    (schema(type="strng"), None, "strng"),
    (schema(oneOf=[{"type": "string"}, {"type": "string", "maxLength": 3}]), None, "oneOf"),
    (schema(**{"$ref": "#/$defs/missing"}), None, "missing"),
    (schema(**{"$ref": "http://example.com/a"}), None, "example.com"),
    (schema(**{"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}), None, "endless"),
    (schema(type="object", properties={"a": {"$ref": "#"}}, required=["a"]), None, "endless"),
    (schema(enum=[]), None, "Unsatisfiable"),
    (schema(type="integer", minimum=3, maximum=2), None, "Unsatisfiable"),
    (schema(allOf=[{"type": "string"}, {"type": "integer"}]), None, "Unsatisfiable"),
    (schema(type="object", **{"not": {}, "x-guidance": {"lenient": True}}), None, '"not"'),
    (schema(**DEEP), None, "recursion"),
    ({"json_schema": "{"}, "json_schema", "no JSON"),
    ({"json_schema": [1]}, "json_schema", "an array"),
    ({"json_schema": True}, "json_schema", "True"),
    ({"json_schema": {"description": "x" * MAX_GRAMMAR_LENGTH}}, "json_schema", str(MAX_GRAMMAR_LENGTH)),
    (
        {"json_schema": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}},
        "json_schema",
        "too big",
    ),
    ({"guided_json": "3"}, "guided_json", "3"),
    ({"regex": "[ab"}, "regex", "unclosed"),
    ({"regex": r"(a)\1"}, "regex", "regex"),
    ({"regex": r"[^\s\S]"}, "regex", "no answer"),
    ({"regex": 7}, "regex", "7"),
    ({"regex": "x" * (MAX_GRAMMAR_LENGTH + 1)}, "regex", str(MAX_GRAMMAR_LENGTH)),
    ({"guided_regex": ["a"]}, "guided_regex", "array"),
    ({"guided_choice": []}, "guided_choice", "one at least"),
    ({"guided_choice": "ab"}, "guided_choice", "list"),
    ({"guided_choice": ["a", 1]}, "guided_choice", "1"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "not empty"),
    ({"guided_choice": ["a"] * 10_001}, "guided_choice", "10000"),
    ({"ebnf": 'root ::= "a" b'}, "ebnf", "'b'"),
    ({"ebnf": 'start ::= "a"'}, "ebnf", "root"),
    ({"ebnf": 'root ::= "a\n'}, "ebnf", "line 1, column 10"),
    ({"ebnf": 'root ::= root "a"'}, "ebnf", "no answer"),
    ({"ebnf": LARK}, "ebnf", "line 1"),
    ({"grammar": 'start: "a" b'}, "grammar", '"b"'),
    ({"grammar": "start: <|nobody|>"}, "grammar", "nobody"),
    ({"grammar": {}}, "grammar", "object"),
    ({"structured_outputs": "json"}, "structured_outputs", "object"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "json and regex"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "choice"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice", "1"),
    ({"structured_outputs": {"json": {}, "disable_any_whitespace": 1}}, None, "boolean"),
    ({"structural_tag": {}}, "structural_tag", "free and constrained"),
    ({"regex": "a", "ebnf": GBNF}, "ebnf", "regex and ebnf"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "one of them"),
]


@pytest.mark.parametrize(("fields", "param", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_enforced_is_a_400_that_names_it(server, fields, param, said):
    for route in (server.chat, server.complete):
        error = error_of(route(stream=route is server.complete, **fields), 400)
        assert said in error["message"] and len(error["message"]) < 600, error
        assert error["param"] == param if param else error["param"].split(".")[0] in fields
    assert server.chat().status_code == 200


def test_special_tokens_of_the_model_may_stand_in_a_grammar(server):
    assert accepts(sent(server, "complete", grammar='start: <|im_start|> "a"'), "<|im_start|>a")


def test_every_choice_and_every_prompt_gets_the_grammar(server):
    server.engine.requests.clear()
    assert server.complete(prompt=["a", "b"], n=2, regex="x").status_code == 200
    assert [request.grammar for request in server.engine.requests] == [regex("x")] * 4


def test_the_native_route_takes_grammars_in_its_sampling_params(server):
    server.engine.requests.clear()
    params: list[dict[str, Any]] = [{"regex": "a+"}, {"json_schema": json.dumps(SCHEMA)}, {"ebnf": GBNF}, {}]
    reply = server.post("/generate", {"text": ["a"] * 4, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    expected = [regex("a+"), json_schema(SCHEMA), ebnf(GBNF), None]
    assert [request.grammar for request in server.engine.requests] == expected
    error = error_of(server.post("/generate", {"text": "a", "sampling_params": {"regex": "["}}), 400)
    assert error["param"] == "sampling_params.regex" and "unclosed" in error["message"]
    error = error_of(server.post("/generate", {"text": "a", "sampling_params": {"regex": "a", "ebnf": GBNF}}), 400)
    assert "regex and ebnf" in error["message"]


def test_a_schema_that_is_known_is_not_compiled_again(server, monkeypatch):
    body = {"regex": "known(er|est)"}
    sent(server, "chat", **body)
    checker = server.serving.grammar_checker
    monkeypatch.setattr(checker, "_problem", lambda grammar: "compiled")
    assert sent(server, "chat", **body) == regex(body["regex"])
    assert "compiled" in error_of(server.chat(regex="unknown"), 400)["message"]


LLAMA_CPP_JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"""
EBNF: list[tuple[str, list[str], list[str]]] = [
    (LLAMA_CPP_JSON, ["{}", '{"a": [1,-2.5e+1,"\\u00e9é"], "b":{"c":null}}\n'], ['{"a":1,}', "[1]", "{"]),
    ('root ::= [a-z]* "ing"', ["going", "ing", "inging"], ["goin", "goingx"]),
    (r'root ::= [\]\-^] [^\x61-c\n] "%0%\u00e9\"" .', ['-d%0%é"\n', ']é%0%é"x', '^ %0%é"é'], ['ad%0%é"x', '-b%0%é"x']),
    (
        "root ::= 'it''s' ( a | b-c ){2,3} d?\na ::= \"x\"\nb-c\n  ::= \"y\"\n   | \"z\"\nd ::= [0-9]{2}",
        ["itsxy", "itszzz12"],
        ["itsx", "itsxxxx", "itsxy1"],
    ),
    ('root ::= "(" root ")" | "" # balanced', ["", "()", "(())"], ["(", "())"]),
    ('root::="a"{3}"b"{0}"c"{1,}', ["aaac", "aaacc"], ["aac", "aaabc", "aaa"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "good", "bad"), EBNF, ids=lambda value: str(value)[:30])
def test_ebnf_means_what_it_says(text, good, bad):
    grammar = ebnf(text)
    assert [each for each in good if not accepts(grammar, each)] == []
    assert [each for each in bad if accepts(grammar, each)] == []


BAD_EBNF = [
    ("", "not empty"),
    ("root", "::="),
    ('root ::= "a" ::= "b"', "column 14"),
    ('root ::= ("a"', "never closed"),
    ('root ::= "a")', "column 13"),
    ('root ::= * "a"', "nothing before it"),
    ('root ::= [z-a]', "backwards"),
    ("root ::= []", "no character"),
    ('root ::= "\\q"', "escape"),
    ('root ::= "\\ud800"', "no character"),
    ('root ::= "\\x4"', "no character"),
    ('root ::= "a"{3,2}', "at least 3"),
    ('root ::= "a" & "b"', "'&'"),
    ('root ::= "a"\nroot ::= "b"', "twice"),
    ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "deeper"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD_EBNF, ids=lambda value: str(value)[:30])
def test_an_error_in_ebnf_says_where_it_is(server, text, said):
    if text:
        assert said in error_of(server.chat(ebnf=text), 400)["message"]
    assert said in error_of(server.chat(structured_outputs={"grammar": text}), 400)["message"] or "::=" not in text


def test_builders_for_other_rooms_are_plain_functions():
    assert json.loads(lark(LARK)) == {"grammars": [{"lark_grammar": LARK}]}
    assert accepts(choice(["a", "b"]), "a") and not accepts(choice(["a", "b"]), "c")


LIST = {"type": "object", "properties": {"next": {"$ref": "#/$defs/l~1st"}, "v": {}}, "required": ["next"]}
FINITE: list[tuple[dict[str, Any], bool]] = [
    ({"$ref": "#/$defs/l~1st", "$defs": {"l/st": LIST}}, False),
    ({"$ref": "#/$defs/l~1st", "$defs": {"l/st": {"anyOf": [LIST, {"type": "null"}]}}}, True),
    ({"$ref": "#/$defs/l~1st", "$defs": {"l/st": LIST | {"required": ["v"]}}}, True),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}}, False),
    ({"type": "array", "items": {"$ref": "#"}}, True),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
    ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, True),  # it need not be an object
    ({"type": "object", "properties": {"a": {"$ref": "#/properties/b"}, "b": {}}, "required": ["a"]}, True),
    ({"anyOf": [{"$ref": "#"}, {"oneOf": [{"$ref": "#/anyOf/1"}]}]}, False),
    ({"$ref": "#elsewhere"}, True),
]


@pytest.mark.parametrize(("given", "finite"), FINITE, ids=lambda value: str(value)[:60])
def test_schemas_that_only_an_endless_value_satisfies_are_told_apart(given, finite):
    assert has_finite_instance(given) == finite

"""Which prompts a fleet on Ray sends together, and where to; without Ray, which tests/test_ray.py is about."""

import collections

import pytest
from pydantic import ValidationError

from deploy.ray.args import FleetArgs
from deploy.ray.calls import passed_on
from deploy.ray.prefix import HEAD_CHARS, order, prefix_of

LONG = "You answer in the manner of a sailor. " * 20
REPLICAS = [f"replica{number}" for number in range(5)]


def chat(*contents: str) -> dict:
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def test_all_turns_of_a_conversation_have_one_prefix():
    turns = [("Be brief.", "Hello"), ("Be brief.", "Hello", "Hi!", "And you?"), ("Be brief.", "Hello", "Hi!", "No")]
    assert len({prefix_of(chat(*turn)) for turn in turns}) == 1
    assert prefix_of(chat("Be brief.", "Hello")) != prefix_of(chat("Be brief.", "Goodbye"))


def test_those_who_share_a_long_system_prompt_have_one_prefix():
    assert len(LONG) > HEAD_CHARS
    assert prefix_of(chat(LONG, "Hello")) == prefix_of(chat(LONG, "Goodbye"))
    assert prefix_of({"system": LONG, "messages": [{"role": "user", "content": "a"}]}) == prefix_of(
        {"system": [{"type": "text", "text": LONG}], "messages": [{"role": "user", "content": "b"}]}
    )


def test_every_way_to_write_a_prompt_has_a_prefix():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert prefix_of({"messages": parts}) == prefix_of({"messages": [{"role": "user", "content": "Hello"}]})
    assert prefix_of({"input": parts}) == prefix_of({"messages": parts})
    ids = list(range(1000))
    assert prefix_of({"prompt": ids}) == prefix_of({"input_ids": [[*ids, 7]]})
    assert prefix_of({"prompt": ids}) != prefix_of({"prompt": ids[1:]})
    assert prefix_of({"prompt": "Once"}) == prefix_of({"text": "Once"}) == prefix_of({"input": "Once"}) == "Once"
    assert prefix_of({"prompt": LONG + "a"}) == prefix_of({"prompt": LONG + "b"})
    assert prefix_of({"prompt_cache_key": "7", "prompt": "a"}) == prefix_of({"prompt_cache_key": "7", "prompt": "b"})


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"prompt": None}, {"messages": 3}, {"prompt": [None, {}]}])
def test_a_body_that_is_no_prompt_has_no_prefix(body):
    assert prefix_of(body) is None


def test_prefixes_spread_over_all_replicas_and_stay_when_one_goes():
    first = {f"prefix {n}": order(f"prefix {n}", REPLICAS, {}, 4)[0] for n in range(2000)}
    counts = collections.Counter(first.values())
    assert min(counts.values()) > 300 and len(counts) == 5, counts
    fewer = REPLICAS[1:]
    for prefix, replica in first.items():
        again = order(prefix, fewer, {}, 4)[0]
        assert again == replica or replica == REPLICAS[0]


def test_a_prefix_leaves_a_loaded_replica_for_its_second_and_no_other():
    ranked = order("everybody's", REPLICAS, {}, 4)
    idle = dict.fromkeys(REPLICAS, 0)
    assert order("everybody's", REPLICAS, idle | {ranked[0]: 3}, 4) == ranked
    spilled = order("everybody's", REPLICAS, idle | {ranked[0]: 4}, 4)
    assert spilled == [*ranked[1:], ranked[0]]
    busy = dict.fromkeys(REPLICAS, 10)
    assert order("everybody's", REPLICAS, busy, 4) == ranked, "all are as loaded, so nothing is gained elsewhere"
    assert order("everybody's", REPLICAS, {ranked[0]: 40}, 4) == ranked, "nothing is known of the others"


def test_arguments_are_converted_or_refused():
    args = FleetArgs.model_validate({"min_replicas": "2", "max_replicas": "3", "flags": "--dtype bfloat16 --api_key=s"})
    assert (args.min_replicas, args.flag("--dtype"), args.flag("--api-key"), args.flag("--store")) == (
        *(2, "bfloat16", "s"),
        None,
    )
    for wrong in ({"replicas": 2}, {"min_replicas": 5}, {"flags": "--port 1"}, {"flags": "--model=x"}, {"spill": 0}):
        with pytest.raises(ValidationError):
            FleetArgs.model_validate(wrong)


def test_headers_of_one_connection_stay_behind():
    headers = [("Host", "a"), ("Authorization", "Bearer s"), ("Content-Length", "3"), ("Connection", "close")]
    assert passed_on(headers) == (("authorization", "Bearer s"),)
    assert passed_on(headers, {"content-length"}) == (("authorization", "Bearer s"), ("content-length", "3"))

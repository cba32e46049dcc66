"""resolve_sampling: defaults in their order, and every range."""

import math
from types import SimpleNamespace

import pytest

from jaxserve.text.params import ParameterError, SamplingRequest, resolve_sampling

VOCAB = 100
NOTHING = SamplingRequest()


def resolve(request: SamplingRequest = NOTHING, *, num_prompt=10, max_model_len=64, defaults=None, eos=(2,)):
    tokenizer = SimpleNamespace(vocab_size=VOCAB, eos_token_ids=eos, sampling_defaults=defaults or {})
    return resolve_sampling(
        request,
        tokenizer=tokenizer,  # ty: ignore[invalid-argument-type]
        num_prompt=num_prompt,
        max_model_len=max_model_len,
        draw_seed=lambda: 77,
    )


def test_nothing_said_means_openai_defaults_and_the_rest_of_the_context():
    params = resolve()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.seed, params.stop_token_ids, params.num_logprobs) == (54, 77, (2,), None)
    assert not params.needs_slot_state


def test_explicit_wins_over_the_model_and_the_model_over_openai():
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    params = resolve(SamplingRequest(temperature=1.0, top_k=-1), defaults=defaults)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (1.0, 0.9, 0, 1.1)


def test_top_k_of_one_and_a_vanishing_temperature_are_greedy():
    assert resolve(SamplingRequest(top_k=1)).temperature == 0
    assert resolve(SamplingRequest(temperature=1e-9)).temperature == 0
    assert resolve(SamplingRequest(top_k=VOCAB)).top_k == 0


def test_any_64_bit_seed_is_kept():
    for given, kept in [(0, 0), (-1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (-(2**63), 2**63)]:
        assert resolve(SamplingRequest(seed=given)).seed == kept


def test_stop_tokens_hold_the_end_of_sequence_unless_it_is_ignored():
    assert resolve(SamplingRequest(stop_token_ids=(5, 2)), eos=(2, 3)).stop_token_ids == (2, 3, 5)
    assert resolve(SamplingRequest(stop_token_ids=(5,), ignore_eos=True)).stop_token_ids == (5,)


def test_logit_bias_takes_ids_as_text_and_drops_zeros():
    assert resolve(SamplingRequest(logit_bias={"7": -100, "3": 1.5, "4": 0})).logit_bias == ((3, 1.5), (7, -100.0))


@pytest.mark.parametrize(
    ("given", "num_prompt"),
    [({}, 64), ({}, 90_000), ({"max_tokens": 55}, 10), ({"max_tokens": 10**30}, 10)],
)
def test_a_request_beyond_the_context_says_so(given, num_prompt):
    with pytest.raises(ParameterError, match="maximum context length is 64 tokens") as caught:
        resolve(SamplingRequest(**given), num_prompt=num_prompt)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param in ("prompt", "max_tokens")


def test_the_last_token_of_the_context_can_be_used():
    assert resolve(num_prompt=63).max_tokens == 1
    assert resolve(SamplingRequest(max_tokens=54)).max_tokens == 54


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 9),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.01),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -math.inf),
        ("repetition_penalty", 0),
        ("seed", 2**64),
        ("seed", "1"),
        ("min_tokens", 55),
        ("stop_token_ids", (VOCAB,)),
        ("stop_token_ids", tuple(range(40))),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {str(VOCAB): 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {str(index): 1 for index in range(1025)}),
        ("logit_bias", [1]),
    ],
)
def test_a_value_outside_its_range_names_its_parameter(param, value):
    with pytest.raises(ParameterError) as caught:
        resolve(SamplingRequest(**{param: value}))
    assert caught.value.param == param
    assert caught.value.message.startswith(param)
    assert "allowed" in caught.value.message or "expected" in caught.value.message or "ids are" in caught.value.message


def test_more_than_twenty_logprobs_are_refused():
    assert resolve(SamplingRequest(num_logprobs=20)).num_logprobs == 20
    with pytest.raises(ParameterError, match="20"):
        resolve(SamplingRequest(num_logprobs=21))

"""/metrics as a scraper reads it: every name that dashboards and autoscalers look for, with the model's label."""

import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.api_server import MODEL, TOKENIZER, ApiServer
from tests.fakes import say
from tests.test_api_admin import Asking
from tests.test_api_life import ENDLESS, slowly, wait_until

GAUGES = """
    num_running_reqs num_queue_reqs num_used_tokens token_usage cache_hit_rate gen_throughput max_total_num_tokens
    num_requests_running num_requests_waiting kv_cache_usage_perc padding_waste_ratio num_open_requests
    num_batch_requests
"""
COUNTERS = """
    prompt_tokens generation_tokens cached_tokens num_requests num_aborted_requests preemptions prefix_cache_queries
    prefix_cache_hits compilations request_success batch_requests engine_steps
"""
HISTOGRAMS = """
    time_to_first_token_seconds inter_token_latency_seconds time_per_output_token_seconds e2e_request_latency_seconds
"""
AUTOSCALED = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def scrape(server: ApiServer) -> dict[str, Any]:
    """Name without "jaxserve:" -> family."""
    reply = server.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(reply.text)}
    foreign = {name for name in families if not name.startswith("jaxserve:")}
    assert foreign == {f"vllm:{name}" for name in AUTOSCALED}, foreign
    return {name.removeprefix("jaxserve:"): family for name, family in families.items()}


def value(families: dict[str, Any], name: str, suffix: str = "", **labels: str) -> float:
    family = families[name]
    wanted = {"model_name": MODEL} | labels
    found = [each.value for each in family.samples if each.name == family.name + suffix and each.labels == wanted]
    assert len(found) == 1, (name, family.samples)
    return found[0]


def test_every_name_is_there_with_its_kind_and_the_models_label():
    words = say(TOKENIZER, "hello world")

    def script(request: Any, index: int) -> int:
        time.sleep(0.01)
        return words(request, index)

    with ApiServer(script=script) as server:
        server.chat(stream=True)
        families = scrape(server)
        for kind, names in (("gauge", GAUGES), ("counter", COUNTERS), ("histogram", HISTOGRAMS)):
            for name in names.split():
                assert families[name].type == kind, name
                assert all(each.labels["model_name"] == MODEL for each in families[name].samples), name
        sampled = len(TOKENIZER.encode("hello world", add_special_tokens=False)) + 1
        assert value(families, "time_to_first_token_seconds", "_count") == 1
        assert value(families, "inter_token_latency_seconds", "_count") == sampled - 1
        assert value(families, "time_per_output_token_seconds", "_count") == 1
        assert 0.005 < value(families, "time_per_output_token_seconds", "_sum") < 1
        assert value(families, "request_success", "_total", finished_reason="stop") == 1


def test_the_gauges_of_autoscalers_follow_what_runs():
    with ApiServer(script=slowly) as server:
        asking = Asking(server, "/v1/completions", {"model": MODEL, "prompt": "a", "n": 3, "rid": "x", **ENDLESS})
        wait_until(lambda: server.client.stats is not None and server.client.stats.num_running == 3)
        families = scrape(server)
        assert value(families, "num_requests_running") == value(families, "num_running_reqs") == 3
        assert value(families, "kv_cache_usage_perc") == value(families, "token_usage") == 0.03
        for name in AUTOSCALED:
            assert value(families, f"vllm:{name}") == value(families, name), name
        assert value(families, "num_used_tokens") == 48 and value(families, "num_open_requests") == 1
        server.post("/abort_request", {"rid": "x"})
        asking.result()
        families = scrape(server)
        assert value(families, "num_aborted_requests", "_total") == 1 and value(families, "num_open_requests") == 0

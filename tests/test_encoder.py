"""Encoders: which texts run together, the loop behind the pipe, and the numbers against an independent forward."""

import json
import queue
import random
import threading
from multiprocessing import Pipe

import numpy as np
import pytest
import tiny_bert
from engines import cache_folder, quiet

from checkpoints.convert import convert_path
from jaxserve.config import ConfigError, EngineConfig, pooling_of
from jaxserve.engine.encoder import EncoderLoop, build_encoder
from jaxserve.engine.main import run
from jaxserve.engine.weights import read_encoder_config
from jaxserve.model.llama import Layout
from jaxserve.scheduling.encoder import EncoderBatch, EncoderBucket, EncoderQueue, encoder_buckets
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import AbortRequests, AddRequests, Embedded, EngineFailed, Request, SamplingParams, StepEvents, Stop

PARAMS = SamplingParams(max_tokens=0, seed=0)


def request(id_: int, length: int, priority: int = 0) -> Request:
    return Request(id_, tuple(range(1, length + 1)), PARAMS, priority, task="embed")


def test_buckets_cover_every_length_with_few_programs():
    found = encoder_buckets(256, 512, 512)
    assert {bucket.num_tokens for bucket in found} == {16, 32, 64, 128, 256} and len(found) <= 11
    assert all(bucket.num_rows * bucket.num_tokens <= 512 for bucket in found)
    for length in {bucket.num_tokens for bucket in found}:
        assert EncoderBucket(1, length) in found
    assert encoder_buckets(300, 100, 4)[-1] == EncoderBucket(1, 300), "a text longer than the budget still runs"
    assert encoder_buckets(8, 512, 2) == (EncoderBucket(1, 8),)


def test_one_text_takes_the_smallest_bucket_there_is():
    line = EncoderQueue((EncoderBucket(8, 16), EncoderBucket(2, 16)))  # of two ranks
    line.add(request(0, 5))
    assert line.take() == EncoderBatch(EncoderBucket(2, 16), (request(0, 5),))


@pytest.mark.parametrize("seed", range(20))
def test_every_text_runs_once_and_the_urgent_first(seed):
    print("seed", seed)
    draw = random.Random(seed)
    buckets = encoder_buckets(200, 256, 64)
    waiting: dict[int, Request] = {}
    line, ran, next_id = EncoderQueue(buckets), set(), 0
    for _ in range(300):
        for _ in range(draw.randrange(6)):
            waiting[next_id] = request(next_id, draw.randint(1, 200 if draw.random() < 0.3 else 20), draw.randrange(2))
            line.add(waiting[next_id])
            next_id += 1
        if draw.random() < 0.2 and waiting:
            gone = draw.choice(list(waiting))
            assert line.remove([gone, next_id + 1]) == [gone] and line.remove([gone]) == []
            del waiting[gone]
        if draw.random() < 0.6:
            batch = line.take()
            if not waiting:
                assert batch is None
                continue
            assert batch is not None and batch.bucket in buckets
            assert 0 < len(batch.requests) <= batch.bucket.num_rows
            assert all(len(r.token_ids) <= batch.bucket.num_tokens for r in batch.requests)
            urgent = min(r.priority for r in waiting.values())
            oldest = next(r.id for r in waiting.values() if r.priority == urgent)
            assert oldest in {r.id for r in batch.requests}
            left = [r for r in waiting.values() if r not in batch.requests and r.priority == urgent]
            if any(r.priority != urgent for r in batch.requests):
                assert all(len(r.token_ids) > batch.bucket.num_tokens for r in left), "less urgent ones only fill up"
            for r in batch.requests:
                assert r.id not in ran
                ran.add(r.id)
                del waiting[r.id]
        assert len(line) == len(waiting)


def test_rows_fit_the_number_of_texts():
    line = EncoderQueue([EncoderBucket(n, 16) for n in (1, 4, 32)])
    sizes = []
    for count in (1, 2, 3, 4, 5, 16, 17, 32, 40):
        for id_ in range(count):
            line.add(request(id_, 5))
        rows = []
        while (batch := line.take()) is not None:
            rows.append(batch.bucket.num_rows)
        sizes.append(rows)
    assert sizes == [[1], [1, 1], [4], [4], [4, 1], [4] * 4, [32], [32], [32, 4, 4]]


class Slow:
    """A runner whose results are the first token of each row; hold() keeps them back."""

    def __init__(self) -> None:
        self.batches: list[EncoderBatch] = []
        self.may_finish = threading.Semaphore(0)

    def launch(self, batch: EncoderBatch) -> "Slow.Flight":
        self.batches.append(batch)
        return Slow.Flight(self, batch)

    class Flight:
        def __init__(self, runner: "Slow", batch: EncoderBatch) -> None:
            self.runner, self.batch = runner, batch

        def result(self) -> np.ndarray:
            assert self.runner.may_finish.acquire(timeout=10)
            rows = np.zeros((self.batch.bucket.num_rows, 2), np.float32)
            rows[: len(self.batch.requests), 0] = [len(r.token_ids) for r in self.batch.requests]
            return rows


@pytest.mark.parametrize("overlap", [True, False])
def test_the_loop_answers_aborts_and_counts(overlap):
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    sent: queue.SimpleQueue = queue.SimpleQueue()
    runner = Slow()
    loop = EncoderLoop(
        [EncoderBucket(1, 16), EncoderBucket(2, 16)], runner, inbox, sent.put, compilations=lambda: 0, overlap=overlap
    )
    thread = threading.Thread(target=loop.run, daemon=True)
    inbox.put(AddRequests(tuple(request(id_, 3 + id_) for id_ in range(6))))
    inbox.put(AbortRequests((5, 99)))  # one that waits, and one that nobody knows
    thread.start()
    answered: dict[int, float] = {}
    ends: dict[int, str | None] = {}

    def listen(until) -> StepEvents:
        while True:
            message = sent.get(timeout=10)
            if isinstance(message, Embedded):
                assert message.request_id not in ends
                answered[message.request_id] = float(np.frombuffer(message.vector, np.float32)[0])
                continue
            assert all(token is None for token in message.token_ids)
            ends.update(zip(message.request_ids, message.finish_reasons, strict=True))
            if until():
                return message

    listen(lambda: 5 in ends)
    assert ends == {5: "abort"}
    while not runner.batches:
        pass
    inbox.put(AbortRequests((0,)))  # it is in flight, or its turn is over: one end either way
    for _ in range(3):
        runner.may_finish.release()
    last = listen(lambda: len(ends) == 6)
    inbox.put(Stop())
    thread.join(10)
    assert not thread.is_alive() and sent.empty()
    assert {id_ for id_, reason in ends.items() if reason == "stop"} == set(answered) >= {1, 2, 3, 4}
    assert answered == {id_: 3 + id_ for id_ in answered}
    stats = last.stats
    assert stats.steps_total == 3 and (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.step_tokens_total == sum(3 + id_ for id_ in range(5))
    assert stats.padding_tokens_total == 5 * 16 - stats.step_tokens_total


RENAMED = {
    "as BertModel": lambda name: name,
    "below a head": lambda name: f"bert.{name}",
    "from TensorFlow": lambda name: (
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    ),
}


@pytest.mark.parametrize(
    ("rename", "pooling", "platform"),
    [
        ("as BertModel", "mean_tokens", "cpu"),
        ("below a head", "cls_token", "cpu"),
        ("from TensorFlow", "lasttoken", "tpu"),
    ],
)
def test_vectors_are_those_of_an_independent_forward(rename, pooling, platform, tmp_path, monkeypatch):
    """In the layout of each platform, alone and in company, whatever the length."""
    layout = Layout.of(platform)
    monkeypatch.setattr("jaxserve.engine.encoder.Layout.of", lambda platform: layout)
    weights = tiny_bert.write_tiny_bert(tmp_path, pooling=pooling, rename=RENAMED[rename], max_position=32)
    config = EngineConfig(str(tmp_path), cache_folder(), chunked_prefill_size=64)
    model = read_encoder_config(config)
    assert model is not None and model.max_seq_len == 32
    engine = build_encoder(config, model, quiet)
    assert engine.runner.num_programs == len(engine.buckets) and not engine.notes
    draw = np.random.default_rng(0)
    rows = [draw.integers(4, 20, length).tolist() for length in (1, 2, 5, 15, 16, 17, 32, 7)]
    kind = {"cls_token": "cls", "lasttoken": "last"}.get(pooling, "mean")
    expected = np.array([tiny_bert.forward(weights, ids, pooling=kind) for ids in rows])
    assert np.abs(expected @ expected.T - np.eye(len(rows))).max() < 0.995, "texts are told apart"
    engine.counter.start_counting_this_thread()
    found: dict[int, np.ndarray] = {}
    for group in ([*range(len(rows))], *([i] for i in range(len(rows)))):
        line = EncoderQueue(engine.buckets)
        for index in group:
            line.add(Request(index, tuple(rows[index]), PARAMS, task="embed"))
        while (batch := line.take()) is not None:
            vectors = engine.runner.launch(batch).result()
            assert np.isfinite(vectors).all()
            for vector, each in zip(vectors, batch.requests, strict=False):
                np.testing.assert_allclose(vector, expected[each.id], atol=2e-6)
                np.testing.assert_allclose(vector, found.setdefault(each.id, vector), atol=1e-6)
    assert len(found) == len(rows) and engine.counter.after_ready == 0


def test_weights_may_be_random_and_the_length_is_the_models_or_the_flags(tmp_path):
    tiny_bert.write_tiny_bert(tmp_path, pooling=None)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    config = EngineConfig(str(tmp_path), cache_folder(), load_format="dummy", page_size=8, max_running=1)
    model = read_encoder_config(config)
    assert model is not None and (model.max_seq_len, model.pooling) == (24, "mean")
    engine = build_encoder(config, model, quiet)
    assert engine.max_len == 24 and engine.buckets == (EncoderBucket(1, 16), EncoderBucket(1, 24))
    assert engine.notes == ("options without effect on an encoder: page_size",)
    vector = engine.runner.launch(EncoderBatch(engine.buckets[0], (request(0, 9),))).result()[0]
    assert abs(float(np.linalg.norm(vector)) - 1) < 1e-5
    with pytest.raises(ConfigError, match="--max-model-len 65"):
        build_encoder(EngineConfig(str(tmp_path), cache_folder(), max_model_len=65), model, quiet)


def test_a_converted_encoder_is_the_same(tmp_path):
    source, converted = tmp_path / "source", tmp_path / "converted"
    weights = tiny_bert.write_tiny_bert(source, pooling="cls_token", rename=RENAMED["below a head"])
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    (source / "modules.json").write_text("[]")
    convert_path(str(source), str(converted), progress=lambda *_: None)
    config = EngineConfig(str(converted), cache_folder(), max_running=1)
    model = read_encoder_config(config)
    assert model is not None and model == read_encoder_config(EngineConfig(str(source), ""))
    assert (model.pooling, model.max_seq_len) == ("cls", 16) and (converted / "modules.json").is_file()
    engine = build_encoder(config, model, quiet)
    vector = engine.runner.launch(EncoderBatch(EncoderBucket(1, 16), (request(0, 9),))).result()[0]
    expected = tiny_bert.forward(weights, list(request(0, 9).token_ids), pooling="cls")
    np.testing.assert_allclose(vector, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "silu"}, "'silu'"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_is_not_served_is_named(changed, words, tmp_path):
    tiny_bert.write_tiny_bert(tmp_path)
    path = tmp_path / "config.json"
    values = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(ConfigError, match=words):
        read_encoder_config(EngineConfig(str(tmp_path), ""))
    ours, theirs = Pipe()
    assert run(theirs, EngineConfig(str(tmp_path), str(tmp_path))) == 2
    message = ours.recv()
    assert isinstance(message, EngineFailed) and message.exit_code == 2


def test_a_dense_layer_behind_the_pooling_is_refused(tmp_path):
    tiny_bert.write_tiny_bert(tmp_path)
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"models\.Dense"):
        read_encoder_config(EngineConfig(str(tmp_path), ""))


def test_poolings():
    assert pooling_of({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}) == "cls"
    assert pooling_of({"pooling_mode": "lasttoken", "include_prompt": True}) == "last"
    assert pooling_of({"pooling_mode_mean_sqrt_len_tokens": True}) == "mean", "lengths are normalised away"
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    for wrong in ({"pooling_mode_max_tokens": True}, both, {}):
        with pytest.raises(ConfigError, match="is not served"):
            pooling_of(wrong)


def test_a_decoder_is_no_encoder(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert read_encoder_config(EngineConfig(str(tmp_path), "")) is None
    assert read_encoder_config(EngineConfig(str(tmp_path / "nowhere"), "")) is None


def test_berts_tokenizer_adds_its_marks_and_never_cuts(tmp_path):
    tiny_bert.write_tiny_bert(tmp_path)
    tokenizer = Tokenizer.from_folder(str(tmp_path))
    ids = tokenizer.encode("The seas", add_special_tokens=True)
    assert [tokenizer.token_text(i) for i in ids] == ["[CLS]", "the", "sea", "##s", "[SEP]"]
    assert tokenizer.encode("the", add_special_tokens=False) == ids[1:2]
    assert len(tokenizer.encode("sea " * 40, add_special_tokens=True)) == 42
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the seas"
    assert tokenizer.chat_template is None and tokenizer.eos_token_ids == ()

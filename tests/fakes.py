"""Stand-ins without jax: an engine that answers from a script, and tiny tokenizers of the two kinds that Llamas
have."""

import json
import math
import random
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Self

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.types import (
    AbortRequests,
    AddRequests,
    BucketView,
    Embedded,
    EngineFailed,
    EngineStats,
    FinishReason,
    FlushCache,
    Lifeline,
    ProfileReport,
    Progress,
    PromptLogprobs,
    Ready,
    Request,
    RequestView,
    Snapshot,
    StartProfile,
    StepEvents,
    StepView,
    Stop,
    StopProfile,
    TakeSnapshot,
    TokenLogprobs,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Script = Callable[[Request, int], int]


class ScriptedEngine:
    """An engine thread at the other end of a pipe: token i of a request is script(request, i).

    Ends at a stop token (after min_tokens) or at max_tokens, answers aborts, counts what it saw. client_end is for
    EngineClient. hold() freezes it between steps, so that a test decides what happens when; step() then makes one step.
    """

    def __init__(
        self,
        script: Script,
        *,
        max_model_len: int = 8192,
        vocab_size: int = 512,
        cached_tokens: Callable[[Request], int] = lambda request: 0,
        announce_ready: bool = True,
        logprob: Callable[[Request, int], float] = lambda request, index: -0.1,
        embedding_size: int = 8,
        generates: bool = True,
    ) -> None:
        self.client_end, self._end = Pipe()
        self.requests: list[Request] = []
        self.batches: list[tuple[int, ...]] = []  # ids of each AddRequests
        self.aborted: list[int] = []
        self.num_flushes = self.num_snapshots = 0
        self.profile: str | None = None  # folder of the one that is being taken
        self.stopped = False
        self._script = script
        sizes = (max_model_len, 16, 100, 8, vocab_size)
        self._ready = Ready(*sizes, "cpu", "scripted", 1, "float32", 0, 0, 0.0, embedding_size, generates)
        self._cached_tokens = cached_tokens
        self._announce_ready = announce_ready
        self._logprob = logprob
        self._running: dict[int, tuple[Request, int]] = {}
        self._steps = threading.Semaphore(0)
        self._held = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.die()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def hold(self) -> None:
        """No further step until step() or release()."""
        self._held.set()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._steps.release()

    def release(self) -> None:
        self._held.clear()

    def send(self, message: object) -> None:
        """Say anything to the client, as EngineFailed or Progress."""
        with self._lock:
            self._end.send(message)

    def become_ready(self) -> None:
        self.send(self._ready)

    def fail(self, message: str, exit_code: int = 1) -> None:
        self.send(EngineFailed(message, exit_code))
        self.die()

    def die(self) -> None:
        """As a killed process: the pipe just closes."""
        self.stopped = True
        self._thread.join(5)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the scripted engine did not get there in time"
            time.sleep(0.001)

    def _run(self) -> None:
        try:
            if self._announce_ready:
                self.send(Progress("compile", 1, 1))
                self.become_ready()
            while not self.stopped:
                self._listen(wait=not self._running or self._held.is_set())
                may_step = not self._held.is_set() or self._steps.acquire(blocking=False)
                if self._running and may_step and not self.stopped:
                    self.send(self._step())
        except (EOFError, OSError):
            self.stopped = True
        finally:
            self._end.close()

    def _listen(self, wait: bool) -> None:
        while self._end.poll(0.002 if wait else 0):
            wait = False
            match self._end.recv():
                case AddRequests(requests):
                    self.batches.append(tuple(request.id for request in requests))
                    self.requests.extend(requests)
                    self._running.update((request.id, (request, 0)) for request in requests)
                case AbortRequests(ids):
                    self.aborted.extend(ids)
                    known = [id_ for id_ in ids if self._running.pop(id_, None)]
                    if known:
                        self.send(self._events([(id_, None, "abort", 0, None) for id_ in known]))
                case FlushCache():
                    self.num_flushes += 1
                case StartProfile(folder):
                    self.send(ProfileReport(self.profile or folder, None, conflict=self.profile is not None))
                    self.profile = self.profile or folder
                case StopProfile():
                    self.send(ProfileReport(self.profile, None, conflict=self.profile is None))
                    self.profile = None
                case TakeSnapshot():
                    self.num_snapshots += 1
                    self.send(self._snapshot())
                case Stop():
                    self.stopped = True

    def _step(self) -> StepEvents:
        rows = []
        for request, index in list(self._running.values()):
            if request.task == "embed":
                del self._running[request.id]
                vector = array("f", vector_of(request.token_ids, self._ready.embedding_size))
                self.send(Embedded(request.id, vector.tobytes()))
                rows.append((request.id, None, "stop", 0, None))
                continue
            params = request.params
            if not index and params.num_prompt_logprobs is not None:
                self._tell_prompt(request, params.num_prompt_logprobs)
            if params.max_tokens == 0:
                del self._running[request.id]
                rows.append((request.id, None, "length", self._cached_tokens(request), None))
                continue
            token = self._script(request, index)
            reason: FinishReason | None = None
            if token in params.stop_token_ids and index >= params.min_tokens:
                reason = "stop"
            elif index + 1 >= params.max_tokens:
                reason = "length"
            told = self._logprobs_of(request, index, token)
            rows.append((request.id, token, reason, self._cached_tokens(request), told))
            if reason is None:
                self._running[request.id] = (request, index + 1)
            else:
                del self._running[request.id]
        return self._events(rows)

    def _tell_prompt(self, request: Request, num_top: int) -> None:
        """In two parts, as a prompt of two chunks would be."""
        scores = [None, *(prompt_score(request, at, num_top) for at in range(1, len(request.token_ids)))]
        half = len(scores) // 2
        for first, stop in ((0, half), (half, len(scores))):
            self.send(PromptLogprobs(request.id, first, tuple(scores[first:stop])))

    def _logprobs_of(self, request: Request, index: int, token: int) -> TokenLogprobs | None:
        told = logprobs_of(request, token)
        return None if told is None else replace(told, logprob=self._logprob(request, index))

    def _events(self, rows: list[tuple]) -> StepEvents:
        return StepEvents(*(tuple(column) for column in zip(*rows, strict=True)), stats=self._stats())

    def _stats(self) -> EngineStats:
        return EngineStats(len(self._running), 0, 100, len(self._running), 0, 0, 0, 0, 0, 0, 0, 0, 0)

    def _snapshot(self) -> Snapshot:
        """A page for each running request, which the slot of its number among them holds."""
        now, running = time.monotonic(), list(self._running.values())
        states = array("H", [3 + slot for slot in range(len(running))] + [0] * (100 - len(running)))
        views, lines = [], []
        for slot, (request, done) in enumerate(running):
            sizes = (len(request.token_ids), 0, len(request.token_ids) + done, done, request.params.max_tokens, 1)
            views.append(RequestView(request.id, "decode", request.priority, slot, *sizes))
            lines.append(Lifeline(request.id, request.priority, (("waiting", now - 1), ("decode", now)), None, None))
        steps = tuple(StepView(n, now - 1 + n / 10, now - 0.95 + n / 10, 2, 0, 0, 1, 0) for n in range(10))
        buckets = (BucketView(2, 0, 0, 10, 10),)
        return Snapshot(now, self._stats(), tuple(views), states.tobytes(), steps, buckets, tuple(lines))


def vector_of(token_ids: Sequence[int], size: int) -> list[float]:
    """What a ScriptedEngine says to these ids: numbers drawn from them, of length 1."""
    draw = random.Random(repr(tuple(token_ids)))
    values = [draw.gauss(0, 1) for _ in range(size)]
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def logprobs_of(request: Request, token: int) -> TokenLogprobs | None:
    """The sampled token, then its neighbours, a tenth of a nat apart; what request.params asks for."""
    wanted = request.params.num_logprobs
    if wanted is None:
        return None
    return TokenLogprobs(-0.1, tuple(token + n for n in range(wanted)), tuple(-0.1 * (n + 1) for n in range(wanted)))


def prompt_score(request: Request, at: int, num_top: int) -> TokenLogprobs:
    """Token number at of a prompt, a quarter of a nat less likely than the one before; num_top others are likelier."""
    token = request.token_ids[at]
    others = range(1, num_top + 1)
    return TokenLogprobs(-at / 4, tuple(token + n for n in others), tuple(-0.01 * n for n in others), rank=at + 20)


def say(tokenizer, *texts: str) -> Script:
    """A script that says texts[choice] and then the end-of-sequence token."""
    scripts = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_ids[0]] for text in texts]

    def script(request: Request, index: int) -> int:
        ids = scripts[request.params.choice % len(scripts)]
        return ids[min(index, len(ids) - 1)]

    return script


def write_byte_level(
    folder: Path, *, bos: bool = False, chat_template: str = CHATML, special: tuple[str, ...] = ()
) -> str:
    """A tokenizer of GPT-2's kind (as SmolLM2, Llama 3): 256 bytes, some merges, ChatML, further special tokens.

    -> the folder as str.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("r", "ld"), ("Ã", "©")]
    merges.insert(-2, ("l", "d"))
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    return _write(folder, backend, bos="<|endoftext|>", eos="<|im_end|>", chat_template=chat_template)


def write_sentencepiece(folder: Path) -> str:
    """A tokenizer of Llama 2's kind: visible spaces, bytes as fallback, a space before the first word.

    -> the folder as str.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorw.,", "é"]
    vocab = {token: index for index, token in enumerate(pieces)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "w"), ("▁", "▁"), ("▁w", "o")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return _write(folder, backend, bos="<s>", eos="</s>", chat_template=None)


def _write(folder: Path, backend: Tokenizer, *, bos: str, eos: str, chat_template: str | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": {"content": eos}, "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)

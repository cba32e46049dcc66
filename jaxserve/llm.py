"""LLM: the engine in this process, for notebooks and offline work. The same client, text and engine as the server's."""

import asyncio
import os
import queue
import random
import sys
import threading
import weakref
from array import array
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Self, TypeVar, cast, overload

from checkpoints.hub import resolve_model
from jaxserve.client import EngineClient, EngineUnavailable, shut_down
from jaxserve.config import DEFAULT_MODEL, ConfigError, EngineConfig, default_cache_dir
from jaxserve.progress import StageReporter
from jaxserve.text.chat_template import TemplateError
from jaxserve.text.embed import embed_all
from jaxserve.text.generate import Delta, GenerateOptions, PromptLogprobs, generate
from jaxserve.text.grammar import FIELDS, GrammarChecker, grammar_of
from jaxserve.text.params import SamplingRequest, resolve_sampling
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import EngineStats, FinishReason, Ready, SamplingParams, TokenLogprobs

T = TypeVar("T")
Message = Mapping[str, Any]  # {"role": ..., "content": ...}

_GIVEN_BY_MODEL = ("model_path", "tokenizer_path", "cache_dir", "gguf_path", "orbax_path")
_ONE_MACHINE = ("cluster",)  # a notebook has no followers
_ENGINE_OPTIONS = tuple(
    field.name for field in fields(EngineConfig) if field.name not in (*_GIVEN_BY_MODEL, *_ONE_MACHINE)
)
_SAMPLING = tuple(field.name for field in fields(SamplingRequest))
_SHUTDOWN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation of a prompt. token_ids hold what the text is made of: no stop token."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None  # of token_ids, when num_logprobs was given
    finish_reason: FinishReason
    matched_stop: int | str | None  # the stop token's id or the stop string that ended it
    num_tokens: int  # sampled, a stop token included


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt: n choices. str() and the properties are of the first."""

    prompt_token_ids: tuple[int, ...]
    cached_tokens: int  # of the prompt, found in the prefix cache
    choices: tuple[Choice, ...]
    prompt_logprobs: PromptLogprobs | None = None  # of each prompt token, when num_prompt_logprobs was given

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: tuple[int, ...]
    params: tuple[SamplingParams, ...]  # one for each choice
    options: GenerateOptions


class LLM:
    """`LLM().chat([{"role": "user", "content": "Hello"}]).text`; close() it, or use it in a with statement.

    Sampling keywords of generate, chat and stream: n, stop (a string or several), include_stop, skip_special_tokens,
    those of text.params.SamplingRequest (max_tokens, temperature, top_p, seed, num_logprobs ...), and those of
    text.grammar.FIELDS (response_format, json_schema, regex ...). Calls from several threads are batched together.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        cache_dir: str | None = None,
        chat_template: str | None = None,
        show_progress: bool = True,
        **engine: Any,
    ) -> None:
        """model: a folder, a hub name, a .gguf file or a converted checkpoint; engine: options by EngineConfig's names.

        Returns when everything is compiled. Raises HubError, ConfigError, TokenizerError, or EngineUnavailable for a
        bug.
        """
        _check_names("engine option", engine, _ENGINE_OPTIONS)
        cache_dir = cache_dir or default_cache_dir(os.environ, os.path.expanduser("~"))
        reporter = StageReporter(sys.stderr) if show_progress else None
        resolved = resolve_model(model, cache_dir=cache_dir, progress=_download_progress(reporter))
        # A hung step must not end the user's own process, so there is no watchdog unless it is asked for.
        options: dict[str, Any] = {"watchdog_timeout": 0.0, "log_level": "warning"} | engine
        config = EngineConfig(
            model_path=resolved.folder,
            cache_dir=cache_dir,
            gguf_path=resolved.gguf_path,
            orbax_path=resolved.orbax_path,
            **options,
        )
        self.model = resolved.name
        # Of prompts that bring no seed; the same calls in the same order say the same where random_seed is given.
        self._seeds = random.Random(engine["random_seed"]) if "random_seed" in engine else random.SystemRandom()
        self.tokenizer = Tokenizer.from_folder(resolved.folder, chat_template=chat_template)
        self._grammar_checker = GrammarChecker(self.tokenizer)
        self._background = _Background(config)
        self._finalizer = weakref.finalize(self, self._background.close)
        self._client = self._background.client
        try:
            self.ready: Ready = self._background.wait_ready(reporter)
        except BaseException:
            self.close()
            raise

    @property
    def stats(self) -> EngineStats | None:
        """The engine's counts after its latest step; None before the first."""
        return self._client.stats

    @overload
    def generate(self, prompts: str, **sampling: Any) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], **sampling: Any) -> list[Completion]: ...
    @overload
    def generate(self, prompts: Sequence[int], **sampling: Any) -> Completion: ...

    def generate(self, prompts: Any, **sampling: Any) -> Any:
        """Continue a prompt (text, or token ids), or several at once: a Completion for one, a list for several.

        Raises ParameterError (a ValueError) before anything is sampled when a value is out of range.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        done = self._run([self._job(self._encode(prompt), sampling) for prompt in ([prompts] if one else prompts)])
        return done[0] if one else done

    @overload
    def chat(self, messages: str | Sequence[Message], **options: Any) -> Completion: ...
    @overload
    def chat(self, messages: Sequence[Sequence[Message]], **options: Any) -> list[Completion]: ...

    def chat(
        self,
        messages: Any,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Any:
        """Answer a conversation, or several at once; a string is one message of the user.

        Raises TemplateError or ParameterError (ValueErrors). add_generation_prompt: by default, unless the final
        message is continued.
        """
        one = isinstance(messages, str) or (len(messages) > 0 and isinstance(messages[0], Mapping))
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        rendering = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "kwargs": chat_template_kwargs,
        }
        conversations = [messages] if one else messages
        done = self._run([self._job(self._render(each, **rendering), sampling) for each in conversations])
        return done[0] if one else done

    def stream(self, prompt: str | Sequence[int] | Sequence[Message], **sampling: Any) -> Iterator[str]:
        """Pieces of text as they come: of a prompt (text or ids), or of the answer to messages.

        Leaving early aborts it.
        """
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
            ids = self._render(cast(Sequence[Message], prompt))
        else:
            ids = self._encode(cast("str | Sequence[int]", prompt))
        job = self._job(ids, sampling)
        if len(job.params) != 1:
            raise ValueError(f"n is {len(job.params)}; a stream has one choice: leave n out, or use generate")
        return self._background.stream(self.tokenizer, job)

    @overload
    def embed(self, prompts: str) -> list[float]: ...
    @overload
    def embed(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[float]]: ...
    @overload
    def embed(self, prompts: Sequence[int]) -> list[float]: ...

    def embed(self, prompts: Any) -> Any:
        """The vector of a text (or of token ids), or of several at once: pooled as the model says, of length 1.

        Raises ValueError for a prompt without tokens or longer than the context.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        rows = [self._encode(prompt) for prompt in ([prompts] if one else prompts)]
        for row in rows:
            if not 1 <= len(row) <= self.ready.max_model_len:
                raise ValueError(f"prompt has {len(row)} tokens; 1 to {self.ready.max_model_len} are allowed")
        vectors = [array("f", each).tolist() for each in self._background.call(embed_all(self._client, rows))]
        return vectors[0] if one else vectors

    def flush_cache(self) -> None:
        """Forget every cached prefix that no running request holds."""
        self._client.flush_cache()

    def close(self) -> None:
        """End the engine and its threads; may be called more than once. The interpreter's exit does it too."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, jobs: list[_Job]) -> list[Completion]:
        return self._background.call(_complete_all(self._client, self.tokenizer, jobs))

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special_tokens=True))
        for token_id in prompt:
            if type(token_id) is not int or not 0 <= token_id < self.ready.vocab_size:
                raise ValueError(
                    f"prompt holds token {token_id!r}; ids are integers from 0 to {self.ready.vocab_size - 1}"
                )
        return tuple(prompt)

    def _render(self, messages: str | Sequence[Message], **rendering: Any) -> tuple[int, ...]:
        if self.tokenizer.chat_template is None:
            raise TemplateError(
                f"{self.model} has no chat template; give one with LLM(chat_template=...) or use generate"
            )
        said = (
            [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(each) for each in messages]
        )
        text = self.tokenizer.chat_template.render(said, **rendering)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _job(self, prompt: tuple[int, ...], sampling: dict[str, Any]) -> _Job:
        if not self.ready.generates:
            raise ValueError(f"{self.model} is an encoder and generates no text; use embed()")
        names = (*_SAMPLING, "n", "stop", "include_stop", "skip_special_tokens", *FIELDS)
        _check_names("sampling option", sampling, names)
        named = dict(sampling)
        n, stop = named.pop("n", 1), named.pop("stop", ()) or ()
        if type(n) is not int or n < 1:
            raise ValueError(f"n is {n!r}; an integer of at least 1 is allowed")
        fields = {name: value for name in FIELDS if (value := named.pop(name, None)) is not None}
        options = GenerateOptions(
            grammar=grammar_of(fields, self._grammar_checker) if fields else None,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            include_stop=named.pop("include_stop", False),
            skip_special_tokens=named.pop("skip_special_tokens", True),
        )
        params = resolve_sampling(
            SamplingRequest(**named),
            tokenizer=self.tokenizer,
            num_prompt=len(prompt),
            max_model_len=self.ready.max_model_len,
            draw_seed=lambda: self._seeds.getrandbits(64),
        )
        return _Job(prompt, tuple(replace(params, choice=choice) for choice in range(n)), options)


class _Background:
    """Two daemon threads: the engine, and an event loop for its client. Holds no reference to the LLM, so that dropping
    the LLM ends them.
    """

    def __init__(self, config: EngineConfig) -> None:
        if "jax" not in sys.modules:  # the engine's process is told the same by its launcher
            os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{config.allocator_fraction:.3f}")
        ours, theirs = Pipe()
        self.client = EngineClient(ours)
        self.loop = asyncio.new_event_loop()
        self._threads = (
            threading.Thread(target=_run_engine, args=(theirs, config), name="jaxserve-engine", daemon=True),
            threading.Thread(target=self.loop.run_forever, name="jaxserve-client", daemon=True),
        )
        self.loop.call_soon(self.client.start)
        for thread in self._threads:
            thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        if self.loop.is_closed():
            coroutine.close()
            raise EngineUnavailable("this LLM is closed; make a new one")
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run in the event loop; interrupting the wait (Ctrl-C, a notebook's stop button) aborts what it does there."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def wait_ready(self, reporter: StageReporter | None) -> Ready:
        waiting = self.submit(self.client.wait_ready())
        while True:
            try:
                ready = waiting.result(0.1)
                break
            except TimeoutError:
                if waiting.done():
                    raise
                if reporter is not None and (at := self.client.progress) is not None:
                    reporter.show(at.stage, at.done, at.total, at.message)
            except EngineUnavailable:
                failure = self.client.failure
                if failure is not None and failure.exit_code == 2:
                    raise ConfigError(failure.message) from None
                raise
        if reporter is not None:
            reporter.finish(self.client.progress, complete=True)
        return ready

    def stream(self, tokenizer: Tokenizer, job: _Job) -> Iterator[str]:
        texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for _, delta in generate(self.client, tokenizer, job.prompt, job.params, job.options):
                    if delta.text:
                        texts.put(delta.text)
            finally:
                texts.put(None)

        future = self.submit(pump())
        try:
            while (text := texts.get()) is not None:
                yield text
            future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        engine, loop = self._threads
        self.submit(self.client.close()).result(_SHUTDOWN_SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        loop.join(_SHUTDOWN_SECONDS)
        self.loop.close()
        engine.join(_SHUTDOWN_SECONDS)


def _run_engine(connection: Connection, config: EngineConfig) -> None:
    from jaxserve.engine.main import run

    try:
        run(connection, config)
    finally:
        shut_down(connection)


async def _complete_all(client: EngineClient, tokenizer: Tokenizer, jobs: list[_Job]) -> list[Completion]:
    """All at once; when one fails the others are aborted."""
    tasks = [asyncio.ensure_future(_complete(client, tokenizer, job)) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _complete(client: EngineClient, tokenizer: Tokenizer, job: _Job) -> Completion:
    deltas: list[list[Delta]] = [[] for _ in job.params]
    async for index, delta in generate(client, tokenizer, job.prompt, job.params, job.options):
        deltas[index].append(delta)
    first = deltas[0]
    return Completion(job.prompt, first[-1].cached_tokens, tuple(map(_join, deltas)), first[0].prompt_logprobs)


def _join(deltas: list[Delta]) -> Choice:
    last = deltas[-1]
    assert last.finish_reason is not None
    return Choice(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=None if last.logprobs is None else tuple(item for delta in deltas for item in delta.logprobs or ()),
        finish_reason=last.finish_reason,
        matched_stop=last.matched_stop,
        num_tokens=last.num_tokens,
    )


def _download_progress(reporter: StageReporter | None) -> Any:
    def report(done: int, total: int, message: str) -> None:
        if reporter is not None:
            reporter.show("download", done, total, message)

    return report


def _check_names(kind: str, given: dict[str, Any], allowed: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise TypeError(f"unknown {kind} {', '.join(unknown)}; known are: {', '.join(allowed)}")

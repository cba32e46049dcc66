"""Prompt ids -> deltas of text: submits the choices, detokenises, matches stop strings, and aborts what nobody
reads."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from jaxserve.client import EngineClient, RequestStream, TokenEvent, merge
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.stop import StopMatcher
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import FinishReason, Request, SamplingParams, TokenLogprobs

PromptLogprobs = tuple[TokenLogprobs | None, ...]  # one of each token; None for the first, which nothing precedes


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What the engine need not know about a request."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False  # the stop string or stop token that ended the text is part of it
    skip_special_tokens: bool = True
    kept_special_ids: frozenset[int] = frozenset()  # special tokens that are part of the text all the same
    priority: int = 0  # 0 interactive, 1 batch
    grammar: str | None = None  # of text.grammar
    after_text: bool = False  # the output continues the prompt's text: a leading space that SentencePiece adds is kept
    every_token: bool = False  # deltas hold the tokens without text too: a stop token, what a stop string cut off
    owner: object = None  # whom it is computed for: EngineClient.end_requests


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. token_ids and logprobs are those whose text is complete with this delta's text.

    Tokens without text in the output (a stop token, what a stop string cuts off) are in num_tokens only, unless
    every_token asks for them.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None  # None unless asked for; else one for each of token_ids
    num_tokens: int  # sampled so far, all of them
    finish_reason: FinishReason | None = None
    matched_stop: int | str | None = None  # the stop token's id or the stop string
    cached_tokens: int = 0  # of the prompt, from the prefix cache
    prompt_logprobs: PromptLogprobs | None = None  # with the first delta of a choice, when asked for
    mean_logprob: float | None = None  # of every token sampled so far, when log-probabilities are asked for


async def generate(
    client: EngineClient,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    params: Sequence[SamplingParams],
    options: GenerateOptions,
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yields (choice index, delta) in the order of arrival; params [N], one of each choice, params[i].choice == i.

    Exactly one delta of a choice has a finish_reason, its last. Everything that arrived since the last read is one
    delta. Log-probabilities of the prompt are computed once, for params[0], and told to every choice. Closing the
    generator aborts the choices that have not ended. Raises EngineUnavailable, EngineOverloaded.
    """
    tokens = tuple(prompt_ids)
    choices = [_Choice(tokenizer, each, options) for each in params]
    asked = [params[0], *(replace(each, num_prompt_logprobs=None) for each in params[1:])]
    requests = [Request(client.next_id(), tokens, each, options.priority, grammar=options.grammar) for each in asked]
    streams = client.submit(requests, options.owner)
    scored: PromptLogprobs | None = None
    told: set[int] = set()
    try:
        if params[0].num_prompt_logprobs is not None:
            await streams[0].wait()
            scored = tuple(streams[0].prompt_logprobs)
            scored += (None,) * (len(tokens) - len(scored))  # it ended first: a grammar may allow no token at all
        async for index, events in merge(streams):
            delta = choices[index].advance(events, streams[index])
            if delta is not None:
                if scored is not None and index not in told:
                    told.add(index)
                    delta = replace(delta, prompt_logprobs=scored)
                yield index, delta
    finally:
        for stream in streams:
            stream.abort()


class _Choice:
    """The way of one choice's tokens to text. Positions count characters of its text, stop strings included."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, options: GenerateOptions) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, options.skip_special_tokens, after_text=options.after_text, kept=options.kept_special_ids
        )
        self._matcher = StopMatcher(options.stop, options.include_stop)
        self._include_stop = options.include_stop
        self._every_token = options.every_token
        self._min_tokens = params.min_tokens
        self._wants_logprobs = params.num_logprobs is not None
        self._held: list[tuple[int, TokenLogprobs | None, int]] = []  # token, logprobs, where its text ends
        self._num_decoded = 0
        self._num_emitted = 0
        self._num_tokens = 0
        self._total_logprob = 0.0

    def advance(self, events: Sequence[TokenEvent], stream: RequestStream) -> Delta | None:
        """None when nothing is complete yet. A stop string aborts the stream."""
        texts: list[str] = []
        finish_reason: FinishReason | None = None
        matched_stop: int | str | None = None
        for event in events:
            emitted, matched = self._take(event)
            texts.append(emitted)
            finish_reason = event.finish_reason
            if matched is not None:
                finish_reason, matched_stop = "stop", matched
                stream.abort()
                break
            if finish_reason == "stop":
                matched_stop = event.token_id
        text = "".join(texts)
        released = self._release(everything=self._every_token and finish_reason is not None)
        if not text and not released and finish_reason is None:
            return None
        return Delta(
            text=text,
            token_ids=tuple(token_id for token_id, _ in released),
            logprobs=tuple(item for _, item in released if item is not None) if self._wants_logprobs else None,
            num_tokens=self._num_tokens,
            finish_reason=finish_reason,
            matched_stop=matched_stop,
            cached_tokens=events[0].cached_tokens,
            mean_logprob=self._total_logprob / self._num_tokens if self._wants_logprobs and self._num_tokens else None,
        )

    def _take(self, event: TokenEvent) -> tuple[str, str | None]:
        """-> (text that may be given out, the stop string it ran into or None)."""
        text = ""
        if event.token_id is not None:
            self._num_tokens += 1
            self._total_logprob += event.logprobs.logprob if event.logprobs is not None else 0.0
            if event.finish_reason != "stop" or self._include_stop:
                text = self._detokenizer.push((event.token_id,))
                # A token that ends inside a character is complete with the next character.
                end = self._num_decoded + len(text) + self._detokenizer.half
                self._held.append((event.token_id, event.logprobs, end))
            elif self._every_token:
                self._held.append((event.token_id, event.logprobs, self._num_decoded))
        final = event.finish_reason is not None
        if final:
            text += self._detokenizer.finish()
        self._num_decoded += len(text)
        if self._num_tokens <= self._min_tokens:
            emitted, matched = text, None  # no stop string may end the text yet, so none is looked for
        else:
            emitted, matched = self._matcher.push(text, final)
        self._num_emitted += len(emitted)
        return emitted, matched

    def _release(self, everything: bool) -> list[tuple[int, TokenLogprobs | None]]:
        count = len(self._held) if everything else 0
        while count < len(self._held) and self._held[count][2] <= self._num_emitted:
            count += 1
        released = [(token_id, logprobs) for token_id, logprobs, _ in self._held[:count]]
        del self._held[:count]
        return released

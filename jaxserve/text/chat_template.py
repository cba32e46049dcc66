"""Chat templates: messages -> the prompt that the model was trained on.

Rendered by transformers, in Jinja's sandbox.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any

_RESERVED = frozenset(
    (
        *("conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "return_assistant_tokens_mask"),
    )
)


class TemplateError(ValueError):
    """The template refuses these messages, or cannot be used; the message is the template's own where it has one."""


class ChatTemplate:
    """One model's template(s).

    sources: {name: Jinja text}; "tool_use", where there is one, is taken when tools are given.
    """

    def __init__(self, sources: Mapping[str, str] | str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self.special_tokens = dict(special_tokens or {})  # bos_token ... as the template sees them

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: dict[str, Any] | None = None,
        prepared: bool = False,
    ) -> str:
        """The prompt's text, special tokens written out (encode it with add_special_tokens=False).

        kwargs are further variables for the template (enable_thinking ...). Tool arguments given as JSON text are
        parsed, as templates want them; prepared messages reach the template as they are. The messages are not
        changed. Raises TemplateError.
        """
        if add_generation_prompt and continue_final_message:
            raise TemplateError(
                "add_generation_prompt and continue_final_message cannot both be true: the first begins a new message, "
                "the second goes on with the last one"
            )
        taken = sorted(_RESERVED & set(kwargs or {}))
        if taken:
            raise TemplateError(
                f"chat_template_kwargs cannot set {', '.join(taken)}; use the request's own fields for them"
            )
        source = self._choose(tools)
        render, failures = _renderer()
        try:
            rendered, _ = render(
                conversations=[copy.deepcopy(messages) if prepared else _plain(messages)],
                tools=tools,
                chat_template=source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.special_tokens, **(kwargs or {})},
            )
        except failures as error:
            raise TemplateError(f"the chat template refuses these messages: {error}") from None
        return rendered[0]

    def _choose(self, tools: list[dict[str, Any]] | None) -> str:
        if tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise TemplateError(
                f"this model has no default chat template, only: {names}; give one with --chat-template"
            )
        return self.sources["default"]


def _renderer() -> tuple[Any, tuple[type[Exception], ...]]:
    """transformers' renderer, and what a template may raise: its own words, or Python's for messages it cannot
    digest."""
    import jinja2

    from jaxserve.text.tokenizer import quiet_transformers

    with quiet_transformers():
        from transformers.utils.chat_template_utils import render_jinja_template

    python = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
    return render_jinja_template, (jinja2.TemplateError, *python)


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates are written for: a string as content, tool arguments as objects."""
    return [_plain_message(message) for message in messages]


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    message = copy.deepcopy(message)
    message["content"] = _plain_content(message.get("content"))
    for call in message.get("tool_calls") or []:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                name = function.get("name")
                raise TemplateError(
                    f"the arguments of tool call {name!r} are not JSON; send a JSON object as text"
                ) from None
    return message


def _plain_content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise TemplateError(f"a content part has type {kind!r}; this model takes text")
        texts.append(part["text"])
    return "\n".join(texts)

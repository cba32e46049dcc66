"""A scripted server for tests of the page: what it says depends on the last message, at a readable speed."""

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Request
from tests.api_server import ApiServer
from tests.fakes import write_byte_level

THINKS = (  # a template that knows <think>, as Qwen's: thinking is told from the answer
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SECONDS_A_TOKEN = 0.002


class PageServer(ApiServer):
    """texts: a word of the last user message -> what is said then; "" for everything else. Token by token, paced."""

    def __init__(self, texts: Mapping[str, str], pace: float = SECONDS_A_TOKEN, **options: Any) -> None:
        folder = Path(mkdtemp(prefix="page-"))
        tokenizer = Tokenizer.from_folder(write_byte_level(folder, chat_template=THINKS))

        @cache
        def said(prompt: tuple[int, ...]) -> list[int]:
            turns = tokenizer.decode(list(prompt), skip_special_tokens=False).split("<|im_start|>")
            last = next(turn for turn in reversed(turns) if turn.startswith(("user", "tool")))
            text = next(text for word, text in texts.items() if word in last)
            return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_ids[0]]

        def script(request: Request, index: int) -> int:
            time.sleep(pace)
            ids = said(request.token_ids)
            return ids[min(index, len(ids) - 1)]

        super().__init__(script=script, tokenizer=tokenizer, **options)

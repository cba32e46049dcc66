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
SLOW = "endless"  # a message with this word is answered slowly enough to be looked at
SECONDS_A_TOKEN = 0.002


class PageServer(ApiServer):
    """texts: a word of the last user message -> what is said then; "" for everything else. Token by token."""

    def __init__(self, texts: Mapping[str, str], **options: Any) -> None:
        folder = Path(mkdtemp(prefix="page-"))
        tokenizer = Tokenizer.from_folder(write_byte_level(folder, chat_template=THINKS))

        @cache
        def said(prompt: tuple[int, ...]) -> tuple[list[int], float]:
            turns = tokenizer.decode(list(prompt), skip_special_tokens=False).split("<|im_start|>")
            last = next(turn for turn in reversed(turns) if turn.startswith(("user", "tool")))
            text = next(text for word, text in texts.items() if word in last)
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_ids[0]]
            return ids, SECONDS_A_TOKEN if SLOW in last else 0.0

        def script(request: Request, index: int) -> int:
            ids, pace = said(request.token_ids)
            time.sleep(pace)
            return ids[min(index, len(ids) - 1)]

        super().__init__(script=script, tokenizer=tokenizer, **options)

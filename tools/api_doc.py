"""The tables of docs/api.md that say what is refused and what is without effect, written from the tables that the
server reads: python -m tools.api_doc"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from jaxserve.api.anthropic_request import REFUSED_IN_MESSAGES
from jaxserve.api.embeddings import REFUSED_IN_EMBEDDINGS, REFUSED_IN_ENCODE
from jaxserve.api.generate_schema import REFUSED_IN_GENERATE, REFUSED_IN_SAMPLING
from jaxserve.api.response_request import REFUSED_IN_RESPONSES
from jaxserve.api.schema import REFUSED, REFUSED_IN_CHAT, REFUSED_IN_COMPLETIONS, WITHOUT_EFFECT, Refused

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
BEGIN, END = "<!-- written by make docs from jaxserve/api/schema.py -->\n", "<!-- end -->"
BOTH = "`/v1/chat/completions`, `/v1/completions`"
RESPONSES = "`/v1/responses`, `/v1/responses/input_tokens`"
MESSAGES = "`/v1/messages`"
MESSAGES_TEST = "test_what_anthropic_has_beyond_this_server_is_refused_and_says_why"
REFUSAL_TEST = "test_every_refused_field_is_a_400_that_says_why"


def _refused(routes: str, table: Mapping[str, Refused], test: str = REFUSAL_TEST) -> str:
    text = f"\n### Refused on {routes}\n\n| field | accepted values | why | test |\n|---|---|---|---|\n"
    for name, rule in table.items():
        neutral = ", ".join(f"`{json.dumps(value)}`" for value in rule.neutral)
        text += f"| `{name}` | {neutral} | {rule.why} | `{test}` |\n"
    return text


def tables() -> str:
    text = _refused(BOTH, REFUSED)
    text += _refused("`/v1/chat/completions`", REFUSED_IN_CHAT)
    text += _refused("`/v1/completions`", REFUSED_IN_COMPLETIONS)
    text += _refused(RESPONSES, REFUSED_IN_RESPONSES, "test_what_chat_calls_otherwise_is_refused_and_says_why")
    text += _refused("`/v1/embeddings`", REFUSED_IN_EMBEDDINGS, "test_refused_fields_of_embeddings_say_why")
    text += _refused("`/encode`", REFUSED_IN_ENCODE, "test_refused_fields_of_embeddings_say_why")
    native = "test_every_refused_native_field_is_a_400_that_says_why"
    text += _refused("`/generate`", REFUSED_IN_GENERATE, native)
    text += _refused("`/generate`, in `sampling_params`", REFUSED_IN_SAMPLING, native)
    text += _refused(MESSAGES, REFUSED_IN_MESSAGES, MESSAGES_TEST)
    text += f"\n### Without effect on {BOTH}\n\n| field | why | test |\n|---|---|---|\n"
    for name, why in WITHOUT_EFFECT.items():
        text += f"| `{name}` | {why} | `test_fields_without_effect_change_nothing_and_are_logged_once` |\n"
    return text + "\n"


def updated(page: str) -> str:
    """The page with its tables as they should be. Raises ValueError where it has no place for them."""
    if page.count(BEGIN) != 1 or END not in page:
        raise ValueError(f"docs/api.md must hold {BEGIN.strip()} and {END} once")
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: BEGIN + tables() + END, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""Which requests belong together: what their prompts begin with, and which replicas that beginning goes to."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

HEAD_CHARS = 256  # of the text that prompts must share to count as one prefix
HEAD_TOKENS = 64


def prefix_of(request: Mapping[str, Any]) -> str | None:
    """The beginning of the prompt in the JSON body of any generating route; None where there is none.

    Of a conversation: everything up to its first user message, so that all its turns agree, and nothing after
    HEAD_CHARS, so that those who share a long system prompt do. OpenAI's prompt_cache_key stands for all of it.
    """
    key = request.get("prompt_cache_key")
    if isinstance(key, str) and key:
        return f"key:{key}"
    head = "".join(_text(request.get(name)) for name in ("system", "instructions"))
    for name in ("messages", "prompt", "input", "text", "input_ids"):
        if request.get(name) is not None:
            head += _head(request[name])
            break
    return head[:HEAD_CHARS] or None


def _head(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return _text(prompt)
    if prompt and isinstance(prompt[0], int):
        return " ".join(map(str, prompt[:HEAD_TOKENS]))
    if prompt and isinstance(prompt[0], list):
        return _head(prompt[0])
    head = ""
    for item in prompt:
        head += _text(item)
        if not isinstance(item, dict) or item.get("role") == "user":
            break
    return head


def _text(value: Any) -> str:
    """Of a string, a message, or a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        text = _text(value.get("content", value.get("text")))
        return f"{value['role']}\0{text}\0" if "role" in value else text
    if isinstance(value, list):
        return "".join(map(_text, value))
    return ""


def order(prefix: str, replicas: Sequence[str], loads: Mapping[str, int], spill: int) -> list[str]:
    """The replicas, best first. loads: requests in each, where known.

    Rendezvous hashing (Thaler and Ravishankar, 1998): each prefix has an order of its own over all replicas, which
    every router finds without talking to another, and a replica that comes or goes moves only its own prefixes. One
    that holds `spill` requests more than the idlest comes last, so a prefix that everybody uses spreads over its
    first, its second, its third replica, and no further than it needs.
    """

    def weight(replica: str) -> bytes:
        return hashlib.blake2b(f"{replica}\0{prefix}".encode("utf-8", "surrogatepass"), digest_size=8).digest()

    ranked = sorted(replicas, key=weight, reverse=True)
    least = min((loads[replica] for replica in replicas if replica in loads), default=0)
    return sorted(ranked, key=lambda replica: loads.get(replica, least) - least >= spill)

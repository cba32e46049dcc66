"""What a flag is, and what its text may be: text -> value, or an error that says what is allowed."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Flag:
    """names: the first is the one that --help leads with. target: "launch", "engine" or "server", a dot, a field."""

    names: tuple[str, ...]
    target: str
    help: str
    parse: Callable[[str], Any] = str  # bool: a switch
    choices: tuple[Any, ...] | None = None
    several: bool = False
    inverted: bool = False  # a switch that sets its target to False


def at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is too small; at least {low} is needed")
        return value

    number.__name__ = "integer"
    return number


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not a port; ports are 0 (any free one) to 65535")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of memory; it must be above 0 and at most 1")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds; 0 or more is needed")
    return value


positive = at_least(1)
port.__name__, share.__name__, seconds.__name__ = "port number", "number", "number"  # argparse prints these names

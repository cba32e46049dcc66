"""The file of --config: flags as the keys of a YAML mapping; and argparse, made to speak as it does."""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn


class FlagError(ValueError):
    """A command line or config file that cannot be served; the message says what to change."""


def file_arguments(path: str, names: set[str], unknown: Callable[[str], str]) -> list[str]:
    """A YAML mapping -> the command line it stands for. Raises FlagError naming the file.

    names: all flags; unknown(flag) is what is said of one that is none of them.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise FlagError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FlagError(f"--config {path} is not valid YAML: {error}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise FlagError(f"--config {path} must be a mapping of flags to values, as in 'port: 30000'")
    arguments: list[str] = []
    for key, value in content.items():
        name = "--" + str(key).lstrip("-").replace("_", "-")
        if name == "--config" or name not in names:
            raise FlagError(f"--config {path}: {unknown(name)}")
        arguments += _file_argument(name, value, names)
    return arguments


def _file_argument(name: str, value: Any, names: set[str]) -> list[str]:
    if value is None:
        return []
    if value is True:
        return [name]
    if value is False:
        opposite = "--no" + name[1:]
        return [opposite] if opposite in names else []  # a --disable-… switch that is off
    if isinstance(value, list):
        return [name, *map(str, value)]
    return [f"{name}={value}"]


class Parser(argparse.ArgumentParser):
    """Raises FlagError instead of printing the whole usage before every error."""

    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Several names of one flag are shown over several lines where they need them."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = super()._format_action_invocation(action)
        indent = " " * (self._current_indent + 2)
        return ("\n" + indent).join(textwrap.wrap(shown, self._width - len(indent), break_on_hyphens=False))

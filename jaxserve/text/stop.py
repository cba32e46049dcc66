"""Stop strings over token borders: nothing of a stop string is ever given out, and nothing is held back longer than
needed."""

from collections.abc import Sequence


class StopMatcher:
    """Finds the stop string that is completed first (of those completed by the same character: the longest).

    After every push, exactly the longest suffix that could still become a stop string is held back. Linear in the text
    whatever the strings (Knuth, Morris, Pratt 1977). Example with stop "</a>": push("x</", False) -> ("x", None),
    push("b", False) -> ("</b", None). Raises ValueError for an empty stop string, which would match everywhere.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty; give at least one character or leave it out")
        self._stops = tuple(dict.fromkeys(stops))
        self._failures = tuple(_failure_table(stop) for stop in self._stops)
        self._states = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str, final: bool) -> tuple[str, str | None]:
        """text: what follows; final: nothing will follow. -> (text that may be given out, the stop string that ended it
        or None).

        After a match everything pushed is dropped.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        held = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            if (stop := self._advance(character)) is not None:
                self._matched, self._held = stop, ""
                return held[: end if self._include_stop else end - len(stop)], stop
        keep = 0 if final else max(self._states)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def _advance(self, character: str) -> str | None:
        matched: str | None = None
        for index, stop in enumerate(self._stops):
            state, failures = self._states[index], self._failures[index]
            while state and stop[state] != character:
                state = failures[state - 1]
            if stop[state] == character:
                state += 1
            self._states[index] = state
            if state == len(stop) and (matched is None or len(stop) > len(matched)):
                matched = stop
        return matched


def _failure_table(stop: str) -> list[int]:
    """[i] = length of the longest proper prefix of stop[: i + 1] that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[length] != stop[index]:
            length = table[length - 1]
        if stop[length] == stop[index]:
            length += 1
        table[index] = length
    return table

"""Stop strings: where a text ends, known in advance or found while it streams."""

from __future__ import annotations

from collections.abc import Sequence


def as_stop_strings(stops: str | Sequence[str] | None) -> tuple[str, ...]:
    """One stop string, several, or none, as a tuple.

    Raises:
      ValueError: if one is empty; it would stop every text at once.
    """
    strings = (stops,) if isinstance(stops, str) else tuple(stops or ())
    if "" in strings:
        raise ValueError("a stop string must not be empty; leave it out")
    return strings


def find_stop(text: str, stops: str | Sequence[str]) -> int | None:
    """Where the earliest stop string begins.

    Returns:
      The index of its first character, ``None`` if no stop string occurs.

    Raises:
      ValueError: if a stop string is empty.
    """
    found = [text.find(stop) for stop in as_stop_strings(stops)]
    return min((index for index in found if index >= 0), default=None)


class StopStringMatcher:
    """Cuts a streamed text before its first stop string.

    Joined, the pieces that ``push`` and ``flush`` return are the text before ``find_stop`` of the
    whole. Characters that may begin a stop string are held back until this is decided:

        stops "###"   push "a#" → "a"   push "b##" → "#b"   push "#c" → "", stopped

    Attributes:
      stopped: a stop string has been found; later text is ignored.
      matched: the stop string that was found; of several at one place, the first listed.
    """

    def __init__(self, stops: str | Sequence[str] | None):
        self._stops = as_stop_strings(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""  # not returned yet; only its beginning can begin a stop string
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Takes further text and returns what is now known to stand before any stop string."""
        if self.stopped:
            return ""
        self._held += text
        pending = self._first_pending()
        stop = find_stop(self._held, self._stops)
        # A stop string found behind the beginning of an undecided one is not the earliest yet.
        if stop is not None and stop <= pending:
            return self._stop_at(stop)
        piece, self._held = self._held[:pending], self._held[pending:]
        return piece

    def flush(self) -> str:
        """Ends the stream and returns what was held back, up to a stop string."""
        if self.stopped:
            return ""
        stop = find_stop(self._held, self._stops)
        if stop is not None:
            return self._stop_at(stop)
        piece, self._held = self._held, ""
        return piece

    def _stop_at(self, index: int) -> str:
        self.matched = next(s for s in self._stops if self._held.startswith(s, index))
        piece, self._held = self._held[:index], ""
        return piece

    def _first_pending(self) -> int:
        """Where the earliest unfinished stop string begins; the end if there is none."""
        end = len(self._held)
        for start in range(max(0, end - self._longest + 1), end):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return end

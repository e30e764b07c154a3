"""What a cell prints: kept in a file of its folder, the middle cut out if it is too much."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TextIO

#: Bytes kept of the beginning and of the end each.
KEPT_BYTES = 64 * 1024
_CHUNK = 64 * 1024


class Kept:
    """The first and the last bytes of a stream of any length."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit = limit
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._dropped = 0

    def add(self, data: bytes) -> None:
        """Take in the next bytes."""
        room = self.limit - len(self._head)
        self._head += data[:room]
        rest = data[room:]
        if rest:
            self._tail.append(rest)
            self._tail_size += len(rest)
        while self._tail_size > self.limit:
            first = self._tail.popleft()
            cut = min(len(first), self._tail_size - self.limit)
            self._tail_size -= cut
            self._dropped += cut
            if cut < len(first):
                self._tail.appendleft(first[cut:])

    def bytes(self) -> bytes:
        """Return what was kept, with a line that says how much was left out."""
        gap = f"\n... {self._dropped:,} bytes left out ...\n".encode() if self._dropped else b""
        return bytes(self._head) + gap + b"".join(self._tail)


@contextlib.contextmanager
def captured(keep: Callable[[bytes], None]) -> Iterator[None]:
    """Take what this process and its children print, C code included, until the block ends.

    Args:
        keep: Called at the end with what was kept, if anything was printed.
    """
    _flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    reading, writing = os.pipe()
    kept = Kept()
    reader = threading.Thread(target=_read, args=(reading, kept), name="output", daemon=True)
    reader.start()
    for number, _ in saved:
        os.dup2(writing, number)
    os.close(writing)
    try:
        yield
    finally:
        _flush()
        for number, copy in saved:
            os.dup2(copy, number)  # closes the last end that writes, but for children still alive
            os.close(copy)
        reader.join(timeout=1.0)
        text = kept.bytes()
        if text:
            keep(text)


def _read(descriptor: int, kept: Kept) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(descriptor, _CHUNK):
            kept.add(data)
    os.close(descriptor)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def own_stderr() -> TextIO:
    """Return a stream to where standard error goes now, also while ``captured`` takes it."""
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError, io.UnsupportedOperation):
        return sys.stderr
    return os.fdopen(descriptor, "w", encoding=sys.stderr.encoding or "utf-8", errors="replace")

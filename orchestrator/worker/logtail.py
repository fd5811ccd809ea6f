"""What a trial said last: standard output and error, warnings and log messages, kept with its row.

A trial that ends alive is listened to in its process. Of one that took its process along, what is left is in the files
to which Ray sends the streams of a worker.
"""

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, TextIO

LINES: Final = 200
CHARACTERS: Final = 64_000
CHARACTERS_WHEN_OK: Final = 4_000
"""Of a trial that nobody has to look into; a study may have ten thousand of them."""


class LogTail:
    """The last lines that were written while it listened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text = ""

    def write(self, text: str) -> None:
        """Add to the end; what is too far from the end is forgotten."""
        with self._lock:
            self._text += text
            # Forgetting costs a copy, so it waits until it is worth one.
            if len(self._text) > 4 * CHARACTERS:
                self._text = self._text[-2 * CHARACTERS :]

    def text(self, characters: int = CHARACTERS) -> str | None:
        """The last lines, at most 200 and of that length in total; None when there are none."""
        with self._lock:
            return last_lines(self._text, characters)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to this process until the block ends. Everything still goes where it went before."""
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Tee(self, before[0]), _Tee(self, before[1])
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            # Python shows a warning once per process and place, but each trial wants its own.
            with warnings.catch_warnings():
                yield
        finally:
            root.removeHandler(handler)
            sys.stdout, sys.stderr = before


class _Tee(io.TextIOBase):
    """A text stream that is also written to a tail."""

    def __init__(self, tail: LogTail, stream: TextIO) -> None:
        self._tail = tail
        self._stream = stream

    def write(self, text: str) -> int:
        self._tail.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream behind."""
        return self._stream.encoding


def last_lines(text: str, characters: int = CHARACTERS) -> str | None:
    """The last 200 lines of a text, cut at the front to a length; None when there is nothing to read.

    Of a line that was written over, as progress bars do, the last state counts.
    """
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    kept = "\n".join(lines[-LINES - 1 :]).strip("\n")[-characters:]
    return kept or None


class StreamFile(NamedTuple):
    """A file behind a stream of a worker."""

    path: str
    begin: int
    """Its size in bytes when the trial began."""


def stream_files() -> tuple[StreamFile, ...]:
    """The files to which standard output and error of this process go; none where they go elsewhere."""
    found = []
    for descriptor in (1, 2):
        with suppress(OSError):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.is_file():
                found.append(StreamFile(str(path), path.stat().st_size))
    return tuple(dict.fromkeys(found))


def read_streams(files: tuple[StreamFile, ...]) -> str | None:
    """What came into the files since their trial began. Runs on the node of the trial."""
    parts = []
    for file in files:
        with suppress(OSError), Path(file.path).open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(file.begin, end - CHARACTERS))
            text = stream.read(CHARACTERS).decode(errors="replace")
            # Ray marks in these files which actor speaks.
            said = [line for line in text.splitlines() if not line.startswith((":actor_name:", ":job_id:"))]
            parts.append("\n".join(said))
    return last_lines("\n".join(part for part in parts if part))

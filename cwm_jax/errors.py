"""The one exception for what a user can mend, and how programs speak to people."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class UserError(Exception):
    """A mistake of the person at the keyboard, or a fault in their files.

    The message is all they will see: it names the file, field and value at fault and says what
    would be right.
    """


def tell(text: str, *, file: TextIO | None = None) -> None:
    """Prints to stderr, or to `file`. What cannot be written is dropped, and nothing stops."""
    stream = _BestEffort(file or sys.stderr)
    stream.write(f"{text}\n")
    stream.flush()


class _BestEffort:
    """A text stream that never fails; it takes the place of stdout and stderr in programs.

    Letters that the stream's encoding lacks are escaped. What cannot be written (a closed pipe,
    a full disk, a terminal that has gone, no stream at all) is dropped.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                self._stream.write(escaped)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def shown_to_user() -> Iterator[None]:
    """What a program runs in, from its flags on.

    A `UserError` becomes one clear message on stderr and exit code 2, without a traceback; Ctrl-C
    ends the program as quietly, with exit code 130. Whatever is printed inside is printed as far
    as it can be, and never ends the work. The exit code stands also where the last words cannot
    be written.
    """
    try:
        with _best_effort_streams():
            try:
                yield
            except UserError as error:
                tell(f"error: {error}")
                raise SystemExit(2) from None
            except KeyboardInterrupt:
                tell("\nbroken off")
                raise SystemExit(130) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            _drop_unwritable(stream)


@contextlib.contextmanager
def _best_effort_streams() -> Iterator[None]:
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (_BestEffort(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _occupy_standard_descriptors() -> None:
    """Opens those of 0, 1 and 2 that are closed.

    Otherwise the next file that is opened gets that number, and what a library prints lands in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one


def _drop_unwritable(stream: TextIO | None) -> None:
    """Gives up what cannot be written: Python would try again at its end, and exit with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())

"""The exception for mistakes that a user can correct, and output that never fails."""

import atexit
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_INTERRUPTED = 130  # exit code after Ctrl-C, as of shells


class UserError(Exception):
    """A mistake of the user, or a fault in their files.

    Only the message is shown: it names the file, field and wrong value, and what would be right.
    """


def echo(text: str, *, file: TextIO | None = None) -> None:
    """Prints to stderr, or to `file`. Text that cannot be written is dropped without an error."""
    stream = _BestEffort(file or sys.stderr)
    stream.write(f"{text}\n")
    stream.flush()


class _BestEffort:
    """A text stream that never fails; programs use it as stdout and stderr.

    Characters that the stream's encoding lacks are escaped. Text that cannot be written (closed
    pipe, full disk, closed terminal, no stream) is dropped.
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
    """The context of a whole program, flags included.

    A `UserError` becomes one message on stderr and exit code 2, Ctrl-C exit code 130, both without
    a traceback. Output that cannot be written is dropped; it neither ends the program nor changes
    its exit code.
    """
    try:
        with _best_effort_streams():
            try:
                yield
            except UserError as error:
                echo(f"error: {error}")
                raise SystemExit(2) from None
            except KeyboardInterrupt:
                echo("\ninterrupted")
                atexit.register(_end_at_once, _INTERRUPTED)
                raise SystemExit(_INTERRUPTED) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            _drop_unwritable(stream)


def _end_at_once(code: int) -> None:
    """Ends the process at exit, before libraries clean up.

    A compilation that Ctrl-C interrupted goes on in a thread of JAX's, and cleaning up would end in
    a segmentation fault.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        _drop_unwritable(stream)
    os._exit(code)


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

    Otherwise the next opened file gets that number, and the output of libraries is written to it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one


def _drop_unwritable(stream: TextIO | None) -> None:
    """Drops unwritten output: Python would try again at exit, and exit with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())

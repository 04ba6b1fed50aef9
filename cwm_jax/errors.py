"""The one exception for what a user can mend, and how programs speak to people."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class UserError(Exception):
    """A mistake of the person at the keyboard, or a fault in their files.

    The message is all they will see: it names the file, field and value at fault and says what
    would be right.
    """


def tell(text: str, *, file: TextIO | None = None) -> None:
    """Prints to stderr. Where that is a file on a full disk, nothing is said and nothing stops."""
    with contextlib.suppress(OSError):
        print(text, file=file or sys.stderr, flush=True)


@contextlib.contextmanager
def shown_to_user() -> Iterator[None]:
    """Turns a `UserError` into one clear message on stderr and exit code 2, without a traceback.

    Ctrl-C ends the program as quietly, with exit code 130.
    The exit code stands also where the last words cannot be written, as on a full disk.
    """
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


def _drop_unwritable(stream: TextIO) -> None:
    """Gives up what cannot be written: Python would try again at its end, and exit with 120."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())

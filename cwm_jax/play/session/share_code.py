"""Share codes: everything needed to replay a session, as one line of text.

    CWM2-<base64url of: 4 bytes of checksum, then zlib of the body>

    body     fingerprint of the checkpoint (8 bytes), seed, prompt, checksum of its frames,
             programs, runs, checksum of the last frame
    programs the different (DDIM steps, lanes) of the frames, at most 16
    runs     (action + 1) · 16 + program, then for how many frames; numbers are LEB128 varints

The checksum detects damaged codes; it is not a signature, and no part of a code is trusted.
"""

import base64
import binascii
import hashlib
import itertools
import struct
import zlib
from typing import NamedTuple

from cwm_jax.errors import UserError
from cwm_jax.play.inference.engine import Program
from cwm_jax.play.session.prompt_sources import ClipSource, PictureSource

MAX_FRAMES = 18_000  # generated frames of a session: 20 minutes at 15 a second
MAX_ACTIONS = 256  # values of an action, besides `NO_ACTION`
_PREFIX = "CWM2-"
_OLD_PREFIX = "CWM1-"  # had room for 16 actions
_MAX_BODY = 256 << 10
_HEAD = struct.Struct("<8sIB")  # fingerprint, seed, kind of prompt
_CLIP, _PICTURE = 0, 1
_MAX_PROGRAMS = 16


class Recipe(NamedTuple):
    """A session to replay."""

    fingerprint: bytes
    seed: int
    source: ClipSource | PictureSource
    prompt_checksum: int
    actions: list[int]  # one for each generated frame
    programs: list[Program]  # likewise
    last_frame: int  # CRC-32 of its bytes

    @property
    def encoded(self) -> str:
        """The share code."""
        body = zlib.compress(_body(self), 9)
        return _PREFIX + base64.urlsafe_b64encode(_checksum(body) + body).decode().rstrip("=")


def decode(code: str) -> Recipe:
    """The session that a share code describes.

    Raises:
        UserError: it is not a share code, or damaged.
    """
    code = "".join(code.split())
    if code.startswith(_OLD_PREFIX):
        raise UserError(
            f"this share code ({_OLD_PREFIX}…) is from an earlier version of play, whose codes "
            f"are no longer supported; current ones begin with {_PREFIX}"
        )
    if not code.startswith(_PREFIX):
        raise UserError(f"this is not a share code: they begin with {_PREFIX}")
    text = code[len(_PREFIX) :]
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        if _checksum(raw[4:]) != raw[:4]:
            raise ValueError("checksum")
        unpacker = zlib.decompressobj()
        body = unpacker.decompress(raw[4:], _MAX_BODY)
        if unpacker.unconsumed_tail:
            raise ValueError("too long")
        return _Reader(body).recipe()
    except (binascii.Error, ValueError, zlib.error, IndexError, struct.error):
        raise UserError(
            "this share code is damaged: a character is missing or was changed. "
            "Copy the whole code again"
        ) from None


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=4).digest()


def _body(recipe: Recipe) -> bytes:
    kind = _CLIP if isinstance(recipe.source, ClipSource) else _PICTURE
    parts = [_HEAD.pack(recipe.fingerprint, recipe.seed, kind)]
    if kind == _CLIP:
        parts += map(_varint, recipe.source)
    else:
        parts += [_varint(len(recipe.source.png)), recipe.source.png]
    programs = list(dict.fromkeys(recipe.programs))
    if len(programs) > _MAX_PROGRAMS:
        raise UserError(
            f"this session used {len(programs)} combinations of steps and players; "
            f"a share code holds at most {_MAX_PROGRAMS}. Fix the DDIM steps for the next session"
        )
    parts += [_varint(recipe.prompt_checksum), _varint(len(programs))]
    parts += [_varint(number) for program in programs for number in program]
    pairs = zip(recipe.actions, map(programs.index, recipe.programs), strict=True)
    runs = [(pair, len(list(group))) for pair, group in itertools.groupby(pairs)]
    parts.append(_varint(len(runs)))
    for (action, program), length in runs:
        parts += [_varint(action + 1 << 4 | program), _varint(length)]
    parts.append(_varint(recipe.last_frame))
    return b"".join(parts)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


class _Reader:
    """Reads a body; raises ValueError, IndexError or struct.error for an invalid one."""

    def __init__(self, body: bytes):
        self._body, self._at = body, 0

    def recipe(self) -> Recipe:
        fingerprint, seed, kind = _HEAD.unpack(self._take(_HEAD.size))
        source = (
            ClipSource(self._number(), self._number())
            if kind == _CLIP
            else PictureSource(self._take(self._number()))
        )
        prompt_checksum = self._number()
        programs = [Program(self._number(), self._number()) for _ in range(self._number())]
        actions, used = [], []
        for _ in range(self._number()):
            packed, length = self._number(), self._number()
            action, program = (packed >> 4) - 1, packed & 15
            if action >= MAX_ACTIONS or len(actions) + length > MAX_FRAMES:
                raise ValueError("run")
            actions += [action] * length
            used += [programs[program]] * length
        last_frame = self._number()
        if self._at != len(self._body):
            raise ValueError("length")
        return Recipe(fingerprint, seed, source, prompt_checksum, actions, used, last_frame)

    def _take(self, count: int) -> bytes:
        taken = self._body[self._at : self._at + count]
        if len(taken) != count:
            raise ValueError("end")
        self._at += count
        return taken

    def _number(self) -> int:
        number = shift = 0
        while shift < 35:
            byte = self._take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7
        raise ValueError("number")

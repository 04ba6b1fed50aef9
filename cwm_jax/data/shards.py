"""ArrayRecord files: finding, reading and writing them, and how long each record is.

An ArrayRecord file is a Riegeli file of chunks, one record to a chunk when it is written with
`group_size:1`, and a footer that lists the chunks
(https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md).
"""

import collections
import os
import resource
import struct
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cwm_jax import shipped
from cwm_jax.data.records import BadRecord
from cwm_jax.errors import UserError

SPLITS = ("train", "val", "test")
PATTERN = "[!.]*.array_record"  # hidden ones are being written, or left behind by a kill
MAX_RECORD_BYTES = 1 << 30  # 87,000 frames; a longer claim is a fault, or an attack on memory

_HOW_TO_GET_DATA = """\
Name the small dataset that comes with the project, assets/coinrun, or download the public one
(60 GB; with --shards 1 only the first file of each split):
    python -m cwm_jax.tools.hub download --to data/coinrun"""


def find_shards(dir: str | os.PathLike, split: str) -> list[Path]:
    """The `*.array_record` files of `dir/split` in order of name; `split` is one of `SPLITS`.

    Hidden files are skipped: they are incomplete.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    root = shipped.found(dir)
    if not root.is_dir() and Path(dir) in (shipped.data(), Path(shipped.DATA)):
        raise UserError(shipped.missing(shipped.DATA))
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist.\n{_HOW_TO_GET_DATA}")
    if shards := sorted(root.joinpath(split).glob(PATTERN)):
        return shards
    present = [name for name in SPLITS if any(root.joinpath(name).glob(PATTERN))]
    if not present:
        raise UserError(
            f"The data folder {root} has no *.array_record files in {', '.join(SPLITS)}.\n"
            f"{_HOW_TO_GET_DATA}"
        )
    raise UserError(
        f"The data folder {root} has no *.array_record files for the split {split!r}: "
        f"{root / split} is missing or empty (there is {' and '.join(present)})."
    )


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Writes `records` to a new ArrayRecord file whose records can be read one by one.

    Raises:
        UserError: it cannot be written, such as on a full disk.
    """
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for record in records:
            writer.write(record)
        writer.close()  # errors of earlier calls are raised here
    except RuntimeError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def open_shard(shard: Path) -> ArrayRecordReader:
    """A reader for single records. Raises `UserError` if the file is truncated or no shard."""
    options = "readahead_buffer_size:0,max_parallelism:0"  # as array_record recommends for this
    reader = ArrayRecordReader(str(shard), options=options, file_reader_buffer_size=1 << 15)
    if reader.ok():
        return reader
    try:
        reader.close()  # only this call raises the error's cause
        cause = "unknown cause"
    except RuntimeError as error:
        cause = str(error) or "its end is missing"
    raise UserError(
        f"{shard} ({_size(shard)}) is not a complete ArrayRecord file: {cause}. "
        "Download or write it again, or remove it."
    )


def read_record(reader: ArrayRecordReader, shard: Path, index: int) -> bytes:
    """Record `index` of an open shard. Raises `BadRecord` if its bytes are damaged."""
    try:
        return reader.read([index])[0]
    except RuntimeError as error:
        raise BadRecord(f"its bytes in the file are damaged: {error}", shard, index) from None


class Readers:
    """Open readers of many shards, as many at a time as the limit of file descriptors allows.

    Safe to use from several threads. A copy sent to another process opens its own.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = tuple(shards)
        self._start()

    def _start(self) -> None:
        self._open: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._capacity = _allow_open_files(len(self.shards))

    def __getstate__(self) -> dict:
        return {"shards": self.shards}

    def __setstate__(self, state: dict) -> None:
        self.shards = state["shards"]
        self._start()

    def read(self, shard: int, index: int) -> bytes:
        """Record `index` of shard number `shard`; errors as in `read_record`."""
        return read_record(self._reader(shard), self.shards[shard], index)

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            reader = self._open.pop(shard, None)
        if reader is None:
            reader = open_shard(self.shards[shard])
        with self._lock:
            self._open[shard] = reader  # the last to be dropped
            # A dropped reader closes its file when the last thread is done with it.
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)
        return reader


def _allow_open_files(wanted: int) -> int:
    """How many of `wanted` files to keep open: at most half of what the system allows.

    Raises this process's soft limit first, if the hard limit allows it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + 64
    if soft != resource.RLIM_INFINITY and soft < needed:
        target = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            soft = target
        except (ValueError, OSError):
            pass  # some systems allow less than they report; the old limit works, more slowly
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft // 2))


_BLOCK, _BLOCK_HEADER = 1 << 16, 24  # every 64 KiB a block header is between the data of chunks
_USABLE = _BLOCK - _BLOCK_HEADER
_CHUNK_HEADER = struct.Struct("<8xQ8xQQ")  # sizes: data; type (1 byte), records (7); unpacked
_SIGNATURE_END = 64  # a file starts with one block header and one empty chunk
_HOLDING_RECORDS = b"rt"  # chunk types: records in sequence, or transposed
_PLAIN = b"rp"  # or padding


def record_sizes(shard: Path) -> list[int] | None:
    """The length in bytes of each record, unpacked, without reading the records.

    Steps from chunk header to chunk header: some 40 bytes of each 100 KB. None if the layout
    is not one plain record per chunk; then lengths must be found by reading. Call it before
    `open_shard`, which unpacks the footer.

    Raises:
        BadRecord: the layout differs, and a chunk declares more bytes than a record may have.
        UserError: the footer does, or there is no readable file.
    """
    chunks, plain = [], True
    with _opened(shard) as file:
        size = os.fstat(file.fileno()).st_size
        at, end = _SIGNATURE_END, size - _BLOCK  # the last block only points to the footer
        while at < end:
            data_size, kind_and_count, unpacked = _chunk_header(file.fileno(), at)
            at = _chunk_end(at, data_size)
            kind, count = kind_and_count & 0xFF, kind_and_count >> 8
            if at > size:  # no chunk
                break
            if kind in _HOLDING_RECORDS:
                chunks.append((count, unpacked))
            plain &= kind in _PLAIN
    records = chunks[:-1]  # the last chunk is the footer
    if chunks and chunks[-1][1] > MAX_RECORD_BYTES:
        raise UserError(
            f"{shard}: its footer unpacks to {chunks[-1][1]} bytes; at most {MAX_RECORD_BYTES} "
            f"are read"
        )
    if plain and at == end and chunks and all(count == 1 for count, _ in records):
        return [unpacked for _, unpacked in records]
    _check_chunks(shard, records)
    return None


def _opened(shard: Path) -> BinaryIO:
    try:
        return shard.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror}") from None


def _check_chunks(shard: Path, chunks: Sequence[tuple[int, int]]) -> None:
    """As `check_sizes`: reading one record unpacks its whole chunk."""
    first = 0
    for count, unpacked in chunks:
        what = "it" if count == 1 else f"its chunk of {count} records"
        check_size(shard, first, unpacked, what)
        first += count


def check_sizes(shard: Path, sizes: Sequence[int]) -> None:
    """Raises `BadRecord` for a record that declares more bytes than one may have."""
    for index, size in enumerate(sizes):
        check_size(shard, index, size)


def check_size(shard: Path, index: int, size: int, what: str = "it") -> None:
    """As `check_sizes`, for the record with this index."""
    if size > MAX_RECORD_BYTES:
        raise BadRecord(
            f"{what} unpacks to {size} bytes; at most {MAX_RECORD_BYTES} are read", shard, index
        )


def _chunk_header(file: int, at: int) -> tuple[int, int, int]:
    raw = os.pread(file, _CHUNK_HEADER.size + 2 * _BLOCK_HEADER, at)
    into_block = at % _BLOCK
    if into_block == 0:  # the block header is first
        raw = raw[_BLOCK_HEADER:]
    elif into_block + _CHUNK_HEADER.size > _BLOCK:  # the block header is in the middle
        before = _BLOCK - into_block
        raw = raw[:before] + raw[before + _BLOCK_HEADER :]
    return _CHUNK_HEADER.unpack(raw[: _CHUNK_HEADER.size].ljust(_CHUNK_HEADER.size, b"\0"))


def _chunk_end(begin: int, data_size: int) -> int:
    size = _CHUNK_HEADER.size + data_size
    block_headers = (size + (begin + _USABLE - 1) % _BLOCK) // _USABLE
    return begin + size + block_headers * _BLOCK_HEADER


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"

"""Shard files: found, measured without being read, and refused when they are no whole files."""

import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cwm_jax.data import shards
from cwm_jax.data.records import BadRecord
from cwm_jax.data.shards import (
    Readers,
    find_shards,
    open_shard,
    read_record,
    record_sizes,
    write_shard,
)
from cwm_jax.errors import UserError


def write(path, records, options):
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def shard(tmp_path):
    """A shard of 7 incompressible records of 50 KB, and the records."""
    records = [random.Random(i).randbytes(50_000) for i in range(7)]
    path = tmp_path / "data_0000.array_record"
    write_shard(path, records)
    return path, records


def test_written_records_are_read_one_by_one(shard):
    path, records = shard
    reader = open_shard(path)
    assert reader.num_records() == 7
    assert "group_size:1," in reader.writer_options_string()
    for index in (3, 0, 6):
        assert read_record(reader, path, index) == records[index]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("options", ["group_size:1", "group_size:1,uncompressed"])
def test_sizes_are_those_of_the_records(tmp_path, seed, options):
    """Around the ends of 64 KiB blocks, where block headers cut into chunks and their headers."""
    rng = random.Random(seed)
    around_block = [65_536 - rng.randrange(130) for _ in range(6)]
    sizes = [0, 1, 5, 100, *around_block, rng.randrange(200_000), rng.randrange(70_000)]
    rng.shuffle(sizes)
    write(tmp_path / "x", map(rng.randbytes, sizes), options)
    assert record_sizes(tmp_path / "x") == sizes


def test_sizes_where_a_block_ends_anywhere_in_a_chunk_header(tmp_path):
    """The second chunk starts at each of the last places in the first block, or at its end."""
    starts = set()
    for size in range(65_370, 65_440):
        records = [random.Random(size).randbytes(size), b"abc", b"defgh"]
        write(tmp_path / "x", records, "group_size:1,uncompressed")
        assert record_sizes(tmp_path / "x") == [size, 3, 5]
        data_size, _, _ = shards._CHUNK_HEADER.unpack((tmp_path / "x").read_bytes()[64:104])
        starts.add(shards._chunk_end(64, data_size) - shards._BLOCK)
    assert set(range(-40, 1)) <= starts


def test_an_empty_shard_has_no_sizes(tmp_path):
    write_shard(tmp_path / "x", [])
    assert record_sizes(tmp_path / "x") == []


@pytest.mark.parametrize("options", ["group_size:2", "group_size:1,transpose:true"])
def test_other_layouts_are_left_to_reading(tmp_path, options):
    write(tmp_path / "x", [bytes(100)] * 7, options)
    assert record_sizes(tmp_path / "x") is None


@pytest.mark.parametrize("options", ["group_size:2", "group_size:1,transpose:true"])
def test_an_enormous_chunk_of_another_layout_is_refused(tmp_path, monkeypatch, options):
    """Only its last chunk of records is too large, and only unpacked."""
    write(tmp_path / "x", [bytes(100)] * 6 + [bytes(1_000_000)], options)
    monkeypatch.setattr(shards, "MAX_RECORD_BYTES", 1_000_000 - 1)
    with pytest.raises(
        BadRecord, match=r"x, record 6: it unpacks to 100\d{4} bytes; at most 999999"
    ):
        record_sizes(tmp_path / "x")
    write(tmp_path / "x", [bytes(600_000)] * 2, "group_size:2")
    with pytest.raises(BadRecord, match=r"record 0: its chunk of 2 records unpacks to 1200000 "):
        record_sizes(tmp_path / "x")


def test_an_enormous_footer_is_refused(tmp_path, monkeypatch):
    """It lists the chunks, and is unpacked to open the file at all."""
    write_shard(tmp_path / "x", [b"a"] * 50)
    monkeypatch.setattr(shards, "MAX_RECORD_BYTES", 20)
    with pytest.raises(UserError, match=r"x: its footer unpacks to \d+ bytes; at most 20"):
        record_sizes(tmp_path / "x")


def test_sizes_of_no_shard_end(tmp_path):
    for content in (b"", b"text " * 40_000, bytes(300_000), random.Random(0).randbytes(300_000)):
        (tmp_path / "x").write_bytes(content)
        assert record_sizes(tmp_path / "x") is None


def test_an_enormous_record_is_refused(shard):
    path, _ = shard
    shards.check_sizes(path, [shards.MAX_RECORD_BYTES])
    with pytest.raises(BadRecord, match=r"data_0000.*record 1: it unpacks to 1073741825 bytes"):
        shards.check_sizes(path, [5, shards.MAX_RECORD_BYTES + 1])


@pytest.mark.parametrize(
    "keep", [0, 10, 63, 64, 100, 65_536, 100_000, 262_144, -131_072, -65_536, -32_768, -1]
)
def test_a_shard_cut_short_is_named(shard, keep):
    path, _ = shard
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(UserError, match=r"data_0000\.array_record \([\d,]+ bytes\) is not a comp"):
        open_shard(path)


def test_text_under_the_name_of_a_shard_is_named(tmp_path):
    path = tmp_path / "notes.array_record"
    for text in ("not data\n", "not data\n" * 20_000):
        path.write_text(text)
        with pytest.raises(
            UserError, match=r"notes\.array_record .* is not a complete ArrayRecord"
        ):
            open_shard(path)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.array_record \(no file\).*No such file"):
        open_shard(tmp_path / "gone.array_record")


def test_damage_inside_is_reported_by_record(shard):
    path, records = shard
    content = bytearray(path.read_bytes())
    content[120_000] ^= 1  # in record 2
    path.write_bytes(content)
    readers = Readers([path])
    assert readers.read(0, 1) == records[1]
    with pytest.raises(BadRecord, match=r"data_0000\.array_record, record 2: its bytes .* damaged"):
        readers.read(0, 2)
    assert readers.read(0, 3) == records[3]


def test_shards_are_found_in_order(tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("b.array_record", "a.array_record", ".c.7.array_record", "notes.txt"):
        (tmp_path / "val" / name).touch()
    assert [path.name for path in find_shards(tmp_path, "val")] == [
        "a.array_record",
        "b.array_record",
    ]


def test_missing_data_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"(?s)nowhere does not exist.*assets/coinrun.*hub down"):
        find_shards(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"(?s)no \*\.array_record files in train, val, test.*hub "):
        find_shards(tmp_path, "train")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / ".a.array_record").touch()  # hidden: not whole
    (tmp_path / "train" / "a.array_record").touch()
    with pytest.raises(UserError, match=r"split 'test': .*test is missing or empty \(there is tra"):
        find_shards(tmp_path, "test")
    with pytest.raises(UserError, match=r"split is 'valid'; it must be one of train, val, test"):
        find_shards(tmp_path, "valid")


@pytest.fixture
def many(tmp_path):
    paths = [tmp_path / f"{i:02d}" for i in range(23)]
    for i, path in enumerate(paths):
        write_shard(path, [bytes([i, k]) for k in range(3)])
    return paths


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files as Linux lists them")
def test_few_files_stay_open_and_all_can_be_read(many, monkeypatch):
    monkeypatch.setattr(shards, "_allow_open_files", lambda wanted: 5)
    before = open_files()
    readers = Readers(many)
    order = [(i, k) for k in range(3) for i in range(len(many))] * 3
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda place: readers.read(*place), order))
    assert read == [bytes(place) for place in order]
    assert 1 <= open_files() - before <= 5


def test_the_soft_limit_of_open_files_is_raised_as_far_as_needed():
    program = """
import resource
from cwm_jax.data.shards import _allow_open_files
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
hard = 400 if hard == resource.RLIM_INFINITY else min(hard, 400)
resource.setrlimit(resource.RLIMIT_NOFILE, (90, hard))
print(_allow_open_files(10), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
print(_allow_open_files(100), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
print(_allow_open_files(6129), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["10", "90", "100", "264", "200", "400"], done.stderr


def test_readers_travel_to_another_process(many):
    readers = Readers(many)
    readers.read(4, 1)
    assert pickle.loads(pickle.dumps(readers)).read(22, 2) == bytes([22, 2])


def test_the_reader_reports_faults_as_assumed_here(tmp_path):
    """`open_shard` relies on it: opening never raises, and `close` raises the error."""
    (tmp_path / "x").write_bytes(b"")
    reader = ArrayRecordReader(str(tmp_path / "x"))
    assert not reader.ok()
    with pytest.raises(RuntimeError, match="at least 64KB"):
        reader.close()


def test_a_shard_that_cannot_be_written_is_named(tmp_path):
    for path in (Path("/dev/full"), tmp_path / "none" / "data.array_record"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            shards.write_shard(path, [b"record" * 9])

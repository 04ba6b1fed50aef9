"""Records are read safely: good ones, bad ones, and no code in them runs."""

import contextlib
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwm_jax.data import safe_pickle
from cwm_jax.data.records import FRAME_BYTES, BadRecord, Episode, decode, encode
from cwm_jax.data.shards import open_shard, read_record
from cwm_jax.errors import UserError

SHARD = Path(__file__).parents[2] / "assets/coinrun/val/data_0000.array_record"


def fields(length: int = 3, **changes) -> dict:
    rng = np.random.default_rng(length)
    good = {
        "raw_video": rng.bytes(length * FRAME_BYTES),
        "sequence_length": length,
        "actions": rng.integers(0, 15, length, dtype=np.int32),
    }
    return {key: value for key, value in (good | changes).items() if value is not Ellipsis}


def record(length: int = 3, protocol: int = 4, **changes) -> bytes:
    return pickle.dumps(fields(length, **changes), protocol=protocol)


@pytest.fixture(scope="module")
def real_records() -> list[bytes]:
    """One record of each length in the embedded data."""
    reader = open_shard(SHARD)
    records = [read_record(reader, SHARD, i) for i in range(reader.num_records())]
    return list({len(record): record for record in records}.values())


def test_real_records_decode_as_pickle_does(real_records):
    lengths = set()
    for raw in real_records:
        episode, plain = decode(raw), pickle.loads(raw)
        assert episode.frames.tobytes() == plain["raw_video"]
        np.testing.assert_array_equal(episode.actions, plain["actions"])
        lengths.add(len(episode))
    assert lengths == {40, 160}


def test_encode_and_decode_are_inverse(real_records):
    for raw in real_records:
        episode = decode(raw)
        again = decode(encode(episode))
        np.testing.assert_array_equal(again.frames, episode.frames)
        np.testing.assert_array_equal(again.actions, episode.actions)
        assert again.actions.dtype == np.int32


def test_encoded_records_are_plain_pickles_for_both_numpys():
    source = fields(5)
    episode = decode(pickle.dumps(source))
    raw = encode(episode)
    plain = pickle.loads(raw)
    assert list(plain) == ["raw_video", "sequence_length", "actions"]
    assert plain["raw_video"] == source["raw_video"]
    assert type(plain["sequence_length"]) is int
    np.testing.assert_array_equal(plain["actions"], source["actions"])
    # NumPy 1 has no numpy._core that a pickle could rely on; NumPy 2 keeps the old name.
    assert b"numpy._core" not in raw
    assert raw.count(b"numpy.core.multiarray\n_reconstruct") == 1


def test_encode_leaves_a_video_alone_that_spells_the_module_name():
    spelled = b"cnumpy._core.multiarray\n"
    video = spelled + bytes(FRAME_BYTES - len(spelled))
    frames = np.frombuffer(video, np.uint8).reshape(1, 64, 64, 3)
    assert decode(encode(Episode(frames, np.zeros(1, np.int32)))).frames.tobytes() == video


def test_frames_are_a_view_onto_the_record():
    raw = record(50)
    decode(raw)  # warm
    tracemalloc.start()
    episode = decode(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000 < episode.frames.nbytes
    assert not episode.frames.flags.writeable


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["i1", "<i4", ">i4", "<i8", "u1", "u8"])
def test_every_integer_dtype_and_protocol(protocol, dtype):
    actions = np.array([0, 14, 7], dtype)
    episode = decode(record(3, protocol, actions=actions))
    np.testing.assert_array_equal(episode.actions, [0, 14, 7])
    assert episode.actions.dtype == np.int32


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_module_names_of_both_numpys(protocol):
    raw = record(3, protocol)
    new, old = b"numpy._core.", b"numpy.core."
    if protocol == 3:
        assert new in raw
        other = raw.replace(new, old)
    else:  # the length of the name stands before it, and the frame's length is ignored
        at = raw.index(new)
        other = raw[: at - 1] + bytes([raw[at - 1] - 1]) + raw[at:].replace(new, old)
    np.testing.assert_array_equal(decode(other).actions, decode(raw).actions)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_keys_are_ignored(protocol):
    extras = {
        "reward": np.ones((3, 2), np.float32, order="F"),
        "done": np.array([False, False, True]),
        "level_seed": 2**40,
        "score": np.float64(2.5),
        "info": {"name": "x", 3: [1, -2.5, None, True, (), (1, (2, b"b"))]},
    }
    assert len(decode(record(3, protocol, sequence_length=np.int64(3), **extras))) == 3


def test_arrays_arrive_as_they_were():
    arrays = [
        np.arange(24, dtype="<f4").reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
        np.zeros((0, 5), np.uint8),
        np.array(3.5),
    ]
    for protocol in (3, 4, 5):
        for array, got in zip(
            arrays, safe_pickle.loads(pickle.dumps(arrays, protocol)), strict=True
        ):
            np.testing.assert_array_equal(got, array)
            assert got.dtype == array.dtype


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"raw_video": ...}, r"lacks raw_video; a record has raw_video, sequence_length, act"),
        ({"sequence_length": ..., "actions": ...}, "lacks sequence_length, actions"),
        ({"sequence_length": "3"}, "sequence_length is a str, not an integer"),
        ({"sequence_length": True}, "sequence_length is a bool"),
        ({"sequence_length": 0}, "sequence_length is 0; an episode has at least 1 frame"),
        ({"sequence_length": -3}, "sequence_length is -3"),
        ({"sequence_length": 10**30}, "raw_video has 36864 bytes"),
        ({"raw_video": "text"}, "raw_video is a str, not bytes"),
        ({"raw_video": np.zeros((3, 64, 64, 3), np.uint8)}, "raw_video is a ndarray, not bytes"),
        (
            {"raw_video": bytes(3 * 32 * 32 * 3)},
            r"raw_video has 9216 bytes; 3 frames of 64×64×3 have 36864",
        ),
        ({"raw_video": bytes(3 * FRAME_BYTES + 1)}, "has 36865 bytes; 3 frames .* have 36864"),
        ({"actions": [1, 2, 3]}, "actions are list, not an array of integers"),
        ({"actions": np.ones(3, np.float32)}, "actions are float32, not"),
        ({"actions": np.ones(3, bool)}, "actions are bool, not"),
        ({"actions": np.zeros(4, np.int32)}, r"actions have shape \(4,\); 3 frames need \(3,\)"),
        ({"actions": np.zeros((3, 1), np.int32)}, r"actions have shape \(3, 1\)"),
        ({"actions": np.int64(3)}, "actions are int64, not an array"),
        ({"actions": np.array([0, 15, 1])}, "action at frame 1 is 15; actions are 0…14"),
        ({"actions": np.array([0, 1, -1])}, "action at frame 2 is -1; actions are 0…14"),
        ({"actions": np.array([2**63, 0, 0], np.uint64)}, "at frame 0 is 9223372036854775808"),
        ({"actions": np.array([0, 1, None])}, "array of dtype 'O8', not of plain numbers"),
        ({"actions": np.array(["a", "b", "c"])}, "array of dtype 'U1'"),
        ({"actions": np.zeros(3, [("a", "i4")])}, "array of dtype 'V4'"),
    ],
)
def test_faults_are_named(changes, reason):
    with pytest.raises(BadRecord, match=reason):
        decode(record(**changes))


def test_number_of_actions_is_a_parameter():
    raw = record(actions=np.array([0, 6, 1]))
    assert len(decode(raw, num_actions=7)) == 3
    with pytest.raises(BadRecord, match="action at frame 1 is 6; actions are 0…5"):
        decode(raw, num_actions=6)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "no pickle, or one cut short"),
        (b"hello", "recalls a value it never stored"),
        (b"\x7fELF", "uses the instruction 0x7f, which no record needs"),
        (pickle.dumps([1, 2]), "it is a list, not a dict with raw_video"),
        (pickle.dumps(fields()) + b"\0" * 7, "7 bytes follow the end of its pickle"),
        (pickle.dumps(fields())[:-1], "cut short"),
        (pickle.dumps(fields(), protocol=0), "uses the instruction"),
        (b"\x80\x04K\x01K\x02.", "values are left over"),
        (b"\x80\x04.", "uses a value it never made"),
        (b"\x80\x04h\x07.", "recalls a value it never stored"),
        (b"\x80\x04u.", "returns to a mark it never set"),
        (b"\x80\x04}(K\x01u.", "a key without a value"),
        (b"\x80\x04]K\x01K\x02s.", "fills a list like a dict"),
        (b"\x80\x04}}K\x02s.", "keys are not names"),
        (b"\x80\x04\x8c\x01\xff.", "not UTF-8"),
        (b"\x80\x04K\x01\x93.", "a value it never made"),
        (b"\x80\x04K\x01K\x02\x93.", "names a global by something that is no text"),
        (b"\x80\x04cnumpy\nndarray\n.", "something that is no value"),
        (b"\x80\x04cnumpy\nndarray\n)R.", "calls NDARRAY in a way no array needs"),
        (b"\x80\x04}K\x01b.", "sets the state of something that is no array"),
        (b"c" + b"x" * 1000, "cut short"),
    ],
)
def test_malformed_pickles(raw, reason):
    with pytest.raises(BadRecord, match=reason):
        decode(raw)


def short_text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


class Runs:
    """Pickles to a call of `os.system`."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def hostile(path: Path) -> dict[str, bytes]:
    """Pickles that would create `path` under `pickle.loads`, each in its own way."""
    command = f"touch {path}"
    open_args = b"(" + short_text(str(path)) + short_text("w") + b"tR."
    numpy_globals = (
        b"\x80\x04" + short_text("numpy.testing") + short_text("_private.utils.os.system")
    )
    return {
        "GLOBAL": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "protocol 2": pickle.dumps(Runs(command), protocol=2),
        "STACK_GLOBAL": pickle.dumps(Runs(command), protocol=4),
        "in a field": record(reward=Runs(command)),
        "nested": record(info={"a": [1, (2, [Runs(command)])]}),
        "in an object array": record(actions=np.array([1, 2, Runs(command)], dtype=object)),
        "open": b"\x80\x04" + short_text("io") + short_text("open") + b"\x93" + open_args,
        "eval": f"c__builtin__\neval\n(S'open({str(path)!r}, \"w\")'\ntR.".encode(),
        "dotted name": numpy_globals + b"\x93" + b"(" + short_text(command) + b"tR.",
        "INST": f"(S'{command}'\nios\nsystem\n.".encode(),
        "dotted in a known module": b"\x80\x04"
        + short_text("numpy")
        + short_text("ndarray.__class__.__base__.__subclasses__")
        + b"\x93)R.",
        "known call, other arguments": b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n("
        + pickle.dumps(Runs(command), protocol=2)[2:-1]
        + b"tR.",
    }


@pytest.mark.parametrize("name", list(hostile(Path("x"))))
def test_hostile_pickles_are_refused_before_they_run(name, tmp_path):
    path = tmp_path / "ran"
    with pytest.raises(BadRecord):
        decode(hostile(path)[name])
    assert not path.exists()


@pytest.mark.parametrize(
    "name", ["GLOBAL", "protocol 2", "STACK_GLOBAL", "in a field", "nested", "in an object array"]
)
def test_the_hostile_pickles_would_have_run(name, tmp_path):
    path = tmp_path / "ran"
    pickle.loads(hostile(path)[name])
    assert path.exists()


def test_a_refused_global_is_named():
    with pytest.raises(BadRecord, match=r"refers to '(posix|nt)\.system', which no record needs"):
        decode(record(reward=Runs("true")))
    with pytest.raises(BadRecord, match=r"refers to 'numpy\.testing\._private\.utils\.os\.system'"):
        decode(hostile(Path("x"))["dotted name"])


def bombs() -> dict[str, bytes]:
    """Small pickles that ask for gigabytes."""
    huge = struct.pack("<Q", 1 << 40)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\x01btR(K\x01("
    dtype = b"cnumpy\ndtype\n(" + short_text("u1") + b"\x89\x88tR"
    terabyte = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    return {
        "BINBYTES8": b"\x80\x04\x8e" + huge + b"x.",
        "BYTEARRAY8": b"\x80\x05\x96" + huge + b"x.",
        "BINUNICODE": b"\x80\x04X\xff\xff\xff\xffx.",
        "memo index": b"\x80\x04Nr\xff\xff\xff\xff.",
        "FRAME": b"\x80\x04\x95" + huge + b".",
        "array shape": b"\x80\x03" + array + terabyte + b"t" + dtype + b"\x89C\x01xtb.",
        "array shape overflow": b"\x80\x03" + array + terabyte * 9 + b"t" + dtype + b"\x89C\0tb.",
        "reconstructed shape": (
            b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n("
            + terabyte
            + b"tC\x01btR."
        ),
        "bytearray call": b"\x80\x03cbuiltins\nbytearray\n(" + terabyte + b"tR.",
        "many dicts": b"\x80\x04(" + b"}" * 3_000_000 + b"t.",
        "nested tuples": b"\x80\x04)" + b"\x85" * 3_000_000 + b".",
        "doubling lists": b"\x80\x04](K\0e" + b"\x94](h\0h\0e" * 3_000 + b".",
    }


@pytest.mark.parametrize("name", list(bombs()))
def test_memory_bombs_stay_small(name):
    raw = bombs()[name]
    tracemalloc.start()
    with pytest.raises(BadRecord):
        decode(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20


@pytest.mark.parametrize("shape", [(0, 2**70), (0, 2**62, 2**62), (2**63, 0)])
def test_an_array_of_no_bytes_and_impossible_shape_is_refused(shape):
    raw = pickle.dumps(np.zeros((0, 5), np.uint8), protocol=3)
    size = lambda n: b"\x8a\x0a" + n.to_bytes(10, "little")
    spelled = b"(" + b"".join(map(size, shape)) + b"t"
    assert raw.count(b"K\0K\5\x86") == 1
    with pytest.raises(safe_pickle.RefusedError, match="impossible shape"):
        safe_pickle.loads(raw.replace(b"K\0K\5\x86", spelled))


def test_deep_nesting_does_not_break_the_message():
    nested = b"\x80\x04)" + b"\x85" * 9_000
    dtype = b"cnumpy\ndtype\n(" + nested[2:] + b"\x89\x88tR."
    for raw in (nested + b".", b"\x80\x04" + dtype):
        with pytest.raises(BadRecord):
            decode(raw)


def test_bad_record_carries_its_place_through_pickling():
    bad = BadRecord("it is odd").at(Path("train/data_0007.array_record"), 3)
    assert isinstance(bad, UserError)
    again = pickle.loads(pickle.dumps(bad))
    assert str(again) == "train/data_0007.array_record, record 3: it is odd"
    assert (again.reason, again.shard, again.index) == ("it is odd", bad.shard, 3)


@pytest.mark.parametrize(
    ("frames", "actions"),
    [
        (np.zeros((3, 64, 64, 3), np.float32), np.zeros(3, np.int32)),
        (np.zeros((3, 32, 64, 3), np.uint8), np.zeros(3, np.int32)),
        (np.zeros((0, 64, 64, 3), np.uint8), np.zeros(0, np.int32)),
        (np.zeros((3, 64, 64, 3), np.uint8), np.zeros(2, np.int32)),
        (np.zeros((3, 64, 64, 3), np.uint8), np.zeros(3, np.int64)),
    ],
)
def test_an_episode_has_one_shape(frames, actions):
    with pytest.raises(ValueError, match=r"frames are|actions are"):
        Episode(frames, actions)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_records_decode_or_are_refused(real_records, data):
    raw = bytearray(min(real_records, key=len))
    for _ in range(data.draw(st.integers(1, 4))):
        # The pickle's instructions stand around the video: 30 bytes before, some 500 after it.
        at = data.draw(st.integers(0, 30) | st.integers(-500, -1))
        end = at + data.draw(st.integers(0, 3)) if at >= 0 else min(at + 3, -1)
        raw[at:end] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(BadRecord):  # the only error there may be
        episode = decode(bytes(raw))
        assert episode.frames.shape == (len(episode), 64, 64, 3)
        assert ((episode.actions >= 0) & (episode.actions < 15)).all()

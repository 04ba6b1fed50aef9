"""The checker finds every kind of bad record, and mends a folder by leaving them out."""

import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from cwm_jax.data import shards
from cwm_jax.data.config import DataConfig
from cwm_jax.data.records import encode
from cwm_jax.data.splits import open_episodes
from cwm_jax.tools import check


@pytest.fixture
def spoiled(make_data, marked_episode):
    """Good records, and one of each fault."""
    folder = make_data(train=[[40, 33], [37]], val=[[41]], test=[[43]])
    good = encode(marked_episode(7, 35))
    extra = encode(marked_episode(8, 34), {"padding": np.zeros(12288 + 4 - 30, np.uint8)})
    extra = encode(  # as long in bytes as an episode of 35 frames
        marked_episode(8, 34),
        {"padding": np.zeros(12288 + 4 - 30 + len(good) - len(extra), np.uint8)},
    )
    assert len(extra) == len(good)
    wrong_action = marked_episode(9, 36)
    wrong_action.actions[5] = 15
    records = [good, b"no pickle", encode(marked_episode(0, 40)), encode(wrong_action), extra]
    shards.write_shard(folder / "train" / "data_0002.array_record", records)
    shards.write_shard(folder / "val" / "data_0001.array_record", [encode(marked_episode(1, 33))])
    whole = (folder / "test" / "data_0000.array_record").read_bytes()
    (folder / "test" / "data_0001.array_record").write_bytes(whole[: len(whole) // 2])
    return folder


def test_every_fault_is_named_by_its_place(spoiled, capsys):
    with pytest.raises(SystemExit) as ended:
        check.main([str(spoiled), "--jobs", "2"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    bad = [line for line in printed.splitlines() if line.startswith("BAD")]
    place = lambda split, shard: f"{spoiled}/{split}/data_{shard:04d}.array_record"
    wanted = [
        f"{place('train', 2)}, record 1: it uses the instruction",
        f"{place('train', 2)}, record 3: its action at frame 5 is 15",
        f"{place('train', 2)}, record 2: the same episode as {place('train', 0)}, record 0",
        f"{place('train', 2)}, record 4: ",
        f"{place('val', 1)}, record 0: the same episode as {place('train', 0)}, record 1",
        f"{place('test', 1)}: unreadable",
    ]
    assert len(bad) == len(wanted)
    for line, start in zip(bad, wanted, strict=True):
        assert line.startswith(f"BAD {start}"), line
    assert "train: 3 shards, 6 readable records, 219 frames, 8 clips of 32 frames" in printed
    assert "6 faults" in printed


def test_a_repaired_folder_has_the_good_records(spoiled, tmp_path, capsys):
    out = tmp_path / "mended"
    check.main([str(spoiled), "--repair", str(out)])
    check.main([str(out)])
    assert capsys.readouterr().out.endswith("no faults\n")
    assert open_episodes(DataConfig(num_workers=0, dir=str(out)), "train").lengths.tolist() == [
        40,
        33,
        37,
        35,
    ]
    shutil.rmtree(out / "val")
    check.main([str(spoiled), "--repair", str(out)])  # broken off and done again
    assert open_episodes(DataConfig(num_workers=0, dir=str(out)), "val").lengths.tolist() == [41]


def test_a_shard_that_was_never_finished_is_none(make_data, capsys):
    folder = make_data(train=[[40]])
    (folder / "train" / ".data_0000.7.array_record").write_bytes(b"broken off")
    check.main([str(folder)])
    assert "train: 1 shards, 1 readable records" in capsys.readouterr().out


def test_a_chunk_that_is_too_large_makes_a_shard_unreadable(make_data, monkeypatch, capsys):
    folder = make_data(train=[[40]])
    writer = ArrayRecordWriter(str(folder / "train/data_0001.array_record"), "group_size:2")
    for _ in range(2):
        writer.write(bytes(700_000))
    writer.close()
    monkeypatch.setattr(shards, "MAX_RECORD_BYTES", 1_000_000)
    with pytest.raises(SystemExit):
        check.main([str(folder)])
    assert "data_0001.array_record: unreadable, record 0: its chunk" in capsys.readouterr().out


def test_faults_of_the_call_are_reported(make_data, tmp_path, capsys):
    folder = make_data(train=[[40]])
    for argv, fault in (
        ([str(tmp_path / "none")], "does not exist"),
        ([str(folder), "--repair", str(folder / "train")], "choose another folder"),
        ([str(folder), "--jobs", "0"], "--jobs"),
    ):
        with pytest.raises(SystemExit) as ended:
            check.main(argv)
        assert ended.value.code == 2
        assert fault in capsys.readouterr().err


def test_a_repaired_folder_is_not_replaced_by_that_of_another(spoiled, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(spoiled, other, ignore=shutil.ignore_patterns("mended", "other"))
    out = tmp_path / "mended"
    check.main([str(spoiled), "--repair", str(out)])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit):
        check.main([str(other), "--repair", str(out)])
    assert "it contains something else" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_records_of_a_game_whose_actions_are_only_counted_are_good(make_data, marked_episode):
    folder = make_data(train=[[40]], val=[[41]], test=[[43]])
    episode = marked_episode(5, 35)
    episode.actions[:] = 17
    shards.write_shard(folder / "train" / "data_0001.array_record", [encode(episode)])
    (folder / "metadata.json").write_text('{"env": "ALE/Pong-v5", "num_actions": 18}')
    check.main([str(folder)])

"""Users' games: videos and pictures with actions become records that the model trains on."""

import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cwm_jax import controls
from cwm_jax.controls import Control, Controls
from cwm_jax.data import clips, loader, shards, user_recordings
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.rendering import contact_sheet, key_panel, video
from cwm_jax.sampling import rollouts
from cwm_jax.simulator import game, venv
from cwm_jax.tools import check, collect, pack
from cwm_jax.training import objective
from cwm_jax.training.examples import Example

SIMULATOR = Path(__file__).parents[2] / ".venv-procgen"
PAD_KEYS = """
game = "pad game"
action_encoding = "buttons"
actions = [{name = "A", keys = ["KeyX"]}, {name = "LEFT", keys = ["ArrowLeft"]}, {name = "RIGHT"}]
"""
PAD = Controls("pad game", "buttons", tuple(map(Control, ("A", "LEFT", "RIGHT"))))
DICE = Controls("dice", "one_hot", tuple(map(Control, ("STAY", "ROLL"))))


def shade(t):
    """Brightness of frame t; steps of 3 survive a video's compression."""
    return 3 * (t % 80)


@pytest.fixture
def videos(tmp_path):
    """Three videos of 160×96 with a csv each, and their key map."""
    folder = tmp_path / "videos"
    folder.mkdir()
    (tmp_path / "keys.toml").write_text(PAD_KEYS)
    for number, length in enumerate((79, 47, 53)):
        times = range(27 * number, 27 * number + length)
        frames = (np.full((96, 160, 3), shade(t), np.uint8) for t in times)
        video.write_mp4(folder / f"run{number}.mp4", frames, fps=15)
        rows = [f"{t & 1},{t >> 1 & 1},{t >> 2 & 1}" for t in times]
        (folder / f"run{number}.csv").write_text("\n".join(["A,LEFT,RIGHT", *rows, ""]))
    return folder


def run(folder, *more):
    keys, out = folder.parent / "keys.toml", folder.parent / "packed"
    pack.main([str(folder), "--keys", str(keys), "--output", str(out), "--jobs", "2", *more])
    return out


def every_episode(folder, known):
    for split in shards.SPLITS:
        found = clips.Episodes(shards.find_shards(folder, split), num_actions=known.num_values)
        yield from ((split, found[i]) for i in range(len(found)))


def test_videos_of_a_pad_game_are_packed_and_trained_on(videos, capsys):
    out = run(videos, "--chunk", "40", "--min-chunk", "7")
    printed = capsys.readouterr().out
    assert "--config.model.num_actions=3 --config.model.action_encoding=buttons" in printed
    assert controls.read(out).controls[0] == Control("A", ("KeyX",))
    check.main([str(out), "--clip-len", "5"])
    lengths = sorted(len(e) for _, e in every_episode(out, PAD))
    assert lengths == [7, 13, 39, 40, 40, 40]  # 79 = 40 + 39, 47 = 40 + 7, 53 = 40 + 13
    for _, episode in every_episode(out, PAD):
        times = round(episode.frames[0].mean() / 3) + np.arange(len(episode))
        np.testing.assert_array_equal(episode.actions, times % 8)
        assert np.abs(episode.frames.mean((1, 2, 3)) - shade(times)).max() < 1.5

    network = DiTConfig(
        **dict(hidden_size=8, depth=1, num_heads=1, patch_size=32, image_size=64, max_frames=5),
        **dict(num_actions=3, action_encoding="buttons", dtype="float32"),
    )
    config = DataConfig(num_workers=0, dir=str(out), clip_len=5, num_threads=1)
    batches = loader.train_batches(config, batch_size=2, seed=0, num_actions=network.action_values)
    batch, t = next(batches), np.full((2, 5), 500)
    params = {name: np.full(x.shape, 0.1, x.dtype) for name, x in dit.shapes(network).items()}
    noise = np.zeros(batch["frames"].shape, np.float32)
    loss = jax.jit(objective.clip_loss, static_argnames="network")
    assert batch["actions"].max() > 3  # more than there are buttons: combinations
    assert np.isfinite(loss(params, Example(*batch.values(), t, noise), network=network))
    batches.close()

    script = rollouts.write_script(
        config, "val", count=1, frames=7, n_prompt=1, num_actions=network.action_values
    )
    for t, picture in enumerate(rollouts.video_images(script, np.moveaxis(script.real, 1, 0))):
        panel = key_panel.render(controls.read(out), int(script.actions[0, t]), width=192)
        below, right = contact_sheet.GAP + 2 * (192 + contact_sheet.GAP), contact_sheet.GUTTER
        shown = picture[below:, right:][: len(panel), :192]
        np.testing.assert_array_equal(shown, panel)


@pytest.mark.skipif(not venv.is_ready(SIMULATOR), reason="no simulator here: make install-procgen")
def test_a_second_procgen_game_is_packed_from_videos_into_batches(tmp_path):
    """Maze, recorded as videos, gives the same game with the same actions."""
    (tmp_path / "videos").mkdir()
    keys = controls.procgen("maze").to_json()
    rows = [f"{{name = {a['name']!r}, keys = {a['keys']!r}}}" for a in keys["actions"]]
    (tmp_path / "keys.toml").write_text(f'game = "maze"\nactions = [{", ".join(rows)}]')
    with game.Simulator(venv.ensure(SIMULATOR)) as simulator:
        actions = np.random.default_rng(0).integers(15, size=(5, 41))
        runs = [(seed, row.tolist()) for seed, row in zip((3, 5, 7, 9, 11), actions, strict=True)]
        played = simulator.replay("maze", runs)
    for (seed, pressed), run_ in zip(runs, played, strict=True):
        name = tmp_path / "videos" / f"level{seed}"
        video.write_mp4(name.with_suffix(".mp4"), run_.frames, fps=15)
        names = [keys["actions"][a]["name"] for a in pressed[: len(run_.frames) - 1]]
        name.with_suffix(".csv").write_text("\n".join(["action", *names, ""]))
    out = run(tmp_path / "videos")
    known = controls.read(out)
    assert known == controls.procgen("maze")
    config = DataConfig(num_workers=0, dir=str(out), num_threads=1)
    batch = loader.eval_batches(config, "train", batch_size=1)[0]
    (one,) = (
        r
        for (_, pressed), r in zip(runs, played, strict=True)
        if np.array_equal(pressed[:31], batch["actions"][0, 1:])
    )
    assert np.abs(batch["frames"][0].astype(int) - one.frames[:32]).mean() < 8  # H.264 blurs


def test_packing_again_gives_the_same_and_strange_folders_are_left_alone(videos, tmp_path):
    out = run(videos)
    before = {p: p.read_bytes() for p in sorted(out.rglob("*.array_record"))}
    assert len(before) == 3
    before_one = next(iter(before))
    before_one.unlink()
    run(videos)
    assert {p: p.read_bytes() for p in sorted(out.rglob("*.array_record"))} == before
    (out / "metadata.json").write_text(json.dumps(DICE.to_json()))
    with pytest.raises(SystemExit):
        run(videos)


def test_packing_again_replaces_the_shards_once_all_is_read(videos, capsys):
    """Two recordings are split in time, four by recording: left side by side, splits would mix."""
    for number in (1, 2):
        for path in videos.glob(f"run{number}.*"):
            path.rename(videos.parent / path.name)
    shutil.copy(videos / "run0.mp4", videos / "run3.mp4")
    shutil.copy(videos / "run0.csv", videos / "run3.csv")
    out = run(videos, "--chunk", "20", "--min-chunk", "10")
    mine = out / "train" / "mine.array_record"
    shards.write_shard(mine, [b"not packed"])
    (out / "val" / ".data_0000.7.array_record").write_bytes(b"left by a call that was killed")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name[0] != "."}

    csv = videos / "run3.csv"
    whole = csv.read_text()
    for number in (1, 2):
        for path in videos.parent.glob(f"run{number}.*"):
            path.rename(videos / path.name)
    csv.write_text(whole.rsplit("\n", 4)[0])
    with pytest.raises(SystemExit):
        run(videos, "--chunk", "13", "--min-chunk", "7")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

    csv.write_text(whole)
    shutil.copy(videos / "run1.mp4", videos / "run3.mp4")
    shutil.copy(videos / "run1.csv", videos / "run3.csv")
    capsys.readouterr()
    run(videos, "--chunk", "20", "--min-chunk", "10")
    assert mine.read_bytes() == before[mine]
    mine.unlink()
    counts = re.findall(r"(\d+) records of (\w+)", capsys.readouterr().out)
    split_of = [split for split, _ in every_episode(out, PAD)]
    assert [(str(split_of.count(s)), s) for s in shards.SPLITS] == counts
    assert len(list(out.rglob("*.array_record"))) == 4


def test_pictures_with_named_actions(tmp_path):
    for name, length in (("a", 19), ("b", 17), ("c", 23)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for t in range(length):
            picture = Image.new("RGB", (32, 64), (10 * t, 0, 0))
            picture.save(tmp_path / "in" / name / f"{t:03d}.png")
        rows = [json.dumps({"action": ["STAY", 1][t % 2]}) for t in range(length)]
        (tmp_path / "in" / f"{name}.jsonl").write_text("\n".join(rows))
    cut = pack.Cut(chunk=7, min_chunk=2, every=2, fit="pad", val=0.1, test=0.1, seed=3)
    counts = pack.pack(tmp_path / "in", tmp_path / "out", DICE, cut, jobs=1)
    assert sum(counts.values()) == 2 + 2 + 2  # 10 = 7 + 3, 9 = 7 + 2, 12 = 7 + 5
    for _, episode in every_episode(tmp_path / "out", DICE):
        assert (episode.actions == 0).all()  # every second frame is one where it stays
        red = episode.frames[:, :, 32, 0].astype(int)
        assert (np.diff(red, axis=0) == 20).all()
        assert (episode.frames[:, :, :16] == 0).all()  # the black bars
        assert (episode.frames[:, :, 48:] == 0).all()


@pytest.mark.parametrize(("actions", "fault"), [(36, "more"), (42, "fewer")])
def test_skipped_frames_count_too(tmp_path, actions, fault):
    pictures(tmp_path / "in", 9)
    (tmp_path / "in" / "b.csv").write_text("A,LEFT,RIGHT\n" + "0,0,1\n" * actions)
    cut = pack.Cut(chunk=4, min_chunk=2, every=4, fit="pad", val=0.1, test=0.1, seed=3)
    with pytest.raises(UserError, match=rf"b has {fault} frames than .*b\.csv has actions"):
        pack.pack(tmp_path / "in", tmp_path / "out", PAD, cut, jobs=1)


def test_a_list_without_frames_is_reported(tmp_path, capsys):
    pictures(tmp_path / "in", 9)
    (tmp_path / "in" / "e.m4v").write_bytes(b"no known video")
    (tmp_path / "in" / "e.csv").write_text("A\n0\n")
    assert [one.name for one in user_recordings.find(tmp_path / "in")] == ["a", "b", "c"]
    assert "e.csv belongs to no frames" in capsys.readouterr().err


def test_printed_flags_can_be_pasted():
    printed = pack.config_lines(PAD, Path("out ü/my game"))
    assert shlex.split(printed) == [
        "--config.data.dir=out ü/my game",
        "--config.model.num_actions=3",
        "--config.model.action_encoding=buttons",
        "--config.augment.mirror_share=0",
    ]


def test_few_recordings_are_split_in_time():
    cut = pack.Cut(chunk=10, min_chunk=5, every=1, fit="crop", val=0.2, test=0.1, seed=0)
    (pieces,) = pack.plan([104], cut)
    assert [p.split for p in pieces] == ["train"] * 7 + ["val"] * 2 + ["test"]
    assert [p.start for p in pieces] == list(range(0, 100, 10))
    with pytest.raises(UserError, match="--chunk and --min-chunk to 6 or less"):
        pack.plan([20], cut)


def test_recordings_too_short_for_a_record_take_no_split():
    cut = pack.Cut(chunk=10, min_chunk=5, every=1, fit="crop", val=0.1, test=0.1, seed=0)
    for seed in range(4):
        pieces = pack.plan([4, 20, 20, 3, 20], cut._replace(seed=seed))
        assert not pieces[0]
        assert {p.split for mine in pieces for p in mine} == set(shards.SPLITS)
    short, long = pack.plan([10, 50], cut)
    assert [p.split for p in short] == ["train"]
    assert [p.split for p in long] == ["train"] * 3 + ["val", "test"]


def pictures(folder, shade):
    """Three recordings of 40 pictures in `folder`, and a key map beside it."""
    for name in "abc":
        (folder / name).mkdir(parents=True)
        for t in range(40):
            Image.new("RGB", (64, 64), (shade, t, 0)).save(folder / name / f"{t:03d}.png")
        (folder / f"{name}.csv").write_text("A,LEFT,RIGHT\n" + "0,0,1\n" * 40)
    (folder.parent / "keys.toml").write_text(PAD_KEYS)


def packed_into(out, folder):
    keys = str(folder.parent / "keys.toml")
    pack.main([str(folder), "--keys", keys, "--output", str(out), "--jobs", "1"])


def test_another_folder_of_the_same_name_does_not_replace_what_was_packed(tmp_path, capsys):
    for who, shade_ in (("ann", 40), ("bob", 200)):
        pictures(tmp_path / who / "recordings", shade_)
    packed_into(tmp_path / "out", tmp_path / "ann" / "recordings")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.array_record")}
    with pytest.raises(SystemExit):
        packed_into(tmp_path / "out", tmp_path / "bob" / "recordings")
    assert "packed from another folder 'recordings'" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.array_record")} == before
    assert str(tmp_path) not in (tmp_path / "out" / "metadata.json").read_text()


@pytest.mark.parametrize("text", ["", "[1]", '"x"', "{", "\udcff"])
def test_damaged_metadata_is_named_where_data_is_added(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr(collect.venv, "ensure", lambda folder: folder)  # else pip would make it
    pictures(tmp_path / "recordings", 40)
    (tmp_path / "out").mkdir()
    raw = text.encode(errors="surrogateescape")
    (tmp_path / "out" / "metadata.json").write_bytes(raw)
    with pytest.raises(SystemExit):
        packed_into(tmp_path / "out", tmp_path / "recordings")
    with pytest.raises(SystemExit):
        collect.main(["--output", str(tmp_path / "out"), "--environment", str(tmp_path / "none")])
    assert capsys.readouterr().err.count(f"{tmp_path / 'out' / 'metadata.json'} ") == 2
    assert (tmp_path / "out" / "metadata.json").read_bytes() == raw


def test_metadata_with_a_byte_order_mark_is_read(tmp_path):
    pictures(tmp_path / "recordings", 40)
    for _ in range(2):
        packed_into(tmp_path / "out", tmp_path / "recordings")
        path = tmp_path / "out" / "metadata.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    assert controls.read(tmp_path / "out").game == "pad game"


def test_hidden_files_and_those_of_desktops_are_no_recordings(tmp_path):
    folder, out = tmp_path / "recordings", tmp_path / "out"
    pictures(folder, 40)
    twin = b"\x00\x05\x16\x07" + bytes(4092)
    for name in ("._a.csv", "._a.mp4", ".DS_Store", "a/._000.png", "a/Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(twin)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (folder / name).mkdir()
        (folder / name / "x.png").write_bytes(twin)
    (folder / "a" / "@eaDir").mkdir()
    (folder / "sheets").mkdir()
    (folder / "sheets" / "000.png").mkdir()
    out.mkdir()
    (out / ".DS_Store").write_bytes(twin)
    (out / "lost+found").mkdir()
    packed_into(out, folder)
    assert len(list(every_episode(out, PAD))) == 3


def test_names_are_matched_as_other_systems_write_them(tmp_path):
    pictures(tmp_path / "recordings", 40)
    folder = tmp_path / "recordings"
    (folder / "a").rename(folder / "caf\u00e9")
    (folder / "a.csv").rename(folder / "cafe\u0301.CSV")
    found = {r.name: r.actions.name for r in user_recordings.find(folder)}
    assert found == {"b": "b.csv", "c": "c.csv", "caf\u00e9": "cafe\u0301.CSV"}


@pytest.mark.parametrize("share", [(0.1, 0.1), (0.3, 0.2)])
def test_every_split_gets_its_share(share):
    splits = user_recordings.split_of(17, val=share[0], test=share[1], seed=1)
    assert splits.count("val") == max(1, round(17 * share[0]))
    assert splits.count("test") == max(1, round(17 * share[1]))
    assert len(splits) == 17


def write_npz(path, actions):
    np.savez(path, actions=actions)


@pytest.mark.parametrize(
    ("name", "content", "known", "fault"),
    [
        ("x.csv", "action\n1\n2\n", DICE, "line 3: the action is '2'; it must be 0…1"),
        ("x.csv", "actions\n1\n", DICE, "line 2: expected `action`, found 'actions'"),
        ("x.csv", "A,LEFT\n1,0\n", PAD, "'A', 'LEFT', and 'RIGHT' is missing"),
        ("x.csv", "A,LEFT,RIGHT\n1,0,2\n", PAD, "'RIGHT' is '2'; it must be 0 or 1"),
        ("x.csv", "action\n", DICE, "no actions"),
        ("x.jsonl", '{"action": "HOP"}', DICE, "line 1: the action is 'HOP'"),
        ("x.jsonl", "[3]", DICE, "line 1 is no JSON object"),
        ("x.jsonl", '{"buttons": ["A", "B"]}', PAD, "there are A, LEFT, RIGHT"),
        ("x.npz", np.array([0, 1, 8]), PAD, "action 8; they must be 0…7"),
        ("x.npz", np.array([[0, 1]]), PAD, "3 buttons need"),
        ("x.npz", np.array([0.5]), DICE, "float64"),
    ],
)
def test_wrong_actions_are_named(tmp_path, name, content, known, fault):
    path = tmp_path / name
    write_npz(path, content) if name.endswith("npz") else path.write_text(content)
    with pytest.raises(UserError) as error:
        user_recordings.read_actions(path, known)
    assert fault in str(error.value)
    assert str(path) in str(error.value)


def damaged(archive):
    """The archive with its array's packed bytes overwritten."""
    begin = archive.index(b"actions.npy") + 60
    return archive[:begin] + bytes(20) + archive[begin + 20 :]


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda whole: whole[: len(whole) // 2], "it is no complete .npz archive"),
        (damaged, "x.npz: Error -3 while decompressing"),
        (lambda whole: whole.replace(b"actions", b"ACTIONS"), "'actions is not a file"),
    ],
)
def test_archives_that_cannot_be_read_are_named(tmp_path, make, fault):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, actions=np.random.default_rng(0).integers(0, 2, 500))
    path.write_bytes(make(path.read_bytes()))
    with pytest.raises(UserError, match=f"cannot read {path}: ") as error:
        user_recordings.read_actions(path, DICE)
    assert fault in str(error.value)


def test_other_archives_than_of_actions_are_reported(tmp_path):
    path = tmp_path / "x.npz"
    with path.open("wb") as file:
        np.save(file, np.array([0, 1]))
    with pytest.raises(UserError, match=r"x\.npz: it is no complete \.npz archive"):
        user_recordings.read_actions(path, DICE)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("actions", "0 1")
    with pytest.raises(UserError, match=r"x\.npz: its actions is no array"):
        user_recordings.read_actions(path, DICE)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("x.csv", 'action\n1\n"' + "0\n" * 100_000, "field larger than field limit"),
        ("x.jsonl", '{"action": ' + "[" * 100_000, "recursion"),
    ],
)
def test_texts_without_an_end_are_named(tmp_path, name, content, fault):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"cannot read actions from .*{name}: .*{fault}"):
        user_recordings.read_actions(tmp_path / name, DICE)


def test_a_picture_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
    read = lambda: list(user_recordings.read_frames(tmp_path, fit="crop", every=1))
    assert len(read()) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
        with pytest.raises(UserError, match=r"0\.png: Image size"):
            read()
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:40] + whole[-12:])
    with pytest.raises(UserError, match=r"1\.png: "):
        read()


def test_all_forms_of_button_actions_agree(tmp_path):
    (tmp_path / "a.csv").write_text("RIGHT,A,LEFT\n0,0,0\n1,1,0\n0,0,1\n")
    (tmp_path / "b.jsonl").write_text('{"buttons": []}\n{"buttons": ["A", "RIGHT"]}\n{"action": 2}')
    write_npz(tmp_path / "c.npz", np.array([[0, 0, 0], [1, 0, 1], [0, 1, 0]], bool))
    write_npz(tmp_path / "d.npz", np.array([0, 5, 2], np.uint8))
    for name in ("a.csv", "b.jsonl", "c.npz", "d.npz"):
        assert user_recordings.read_actions(tmp_path / name, PAD).tolist() == [0, 5, 2], name


def test_recordings_that_do_not_fit_together_are_named(videos, capsys):
    csv = videos / "run1.csv"
    whole = csv.read_text()
    for text, fault in (
        (whole.rsplit("\n", 4)[0], "run1.mp4 has more frames"),
        (whole + whole.split("\n", 1)[1], "run1.mp4 has fewer frames"),
        (None, "'run1' needs its actions"),
    ):
        csv.unlink() if text is None else csv.write_text(text)
        with pytest.raises(SystemExit):
            run(videos)
        assert fault in capsys.readouterr().err
    csv.write_text(whole.strip().rsplit("\n", 1)[0])  # no action for the last frame
    run(videos)

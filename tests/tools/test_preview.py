"""The preview shows the right frames with the right keys, and counts what is there."""

import json

import numpy as np
import pytest
from PIL import Image

from cwm_jax.controls import Control, Controls
from cwm_jax.data import shards
from cwm_jax.data.records import encode
from cwm_jax.rendering import arrow_keys, key_panel, video
from cwm_jax.tools import preview


@pytest.fixture
def bright(tmp_path, marked_episode):
    """Two episodes whose frames t are all of brightness 10·t, in a folder."""
    (tmp_path / "train").mkdir()
    records = []
    for number, length in enumerate((5, 7)):
        episode = marked_episode(number, length)
        episode.frames[:] = 10 * np.arange(length, dtype=np.uint8)[:, None, None, None]
        records.append(encode(episode))
    shards.write_shard(tmp_path / "train" / "data_0000.array_record", records)
    return tmp_path


def test_video_sheet_and_page_are_written(bright, tmp_path):
    out = tmp_path / "out" / "look.mp4"
    shard = bright / "train" / "data_0000.array_record"
    preview.main(f"--shard {shard} --n-episodes 2 --scale 2 --output {out}".split())
    frames = video.read_mp4(out)
    assert len(frames) == 12
    for t, frame in zip([*range(5), *range(7)], frames, strict=True):
        assert abs(int(frame[94, 64, 0]) - 10 * t) <= 2
    sheet = np.array(Image.open(out.with_suffix(".png")))
    assert sheet.shape == (2 * (22 + 148), 10 * 134, 3)
    assert sheet[22 + 64, 3 * 134 + 67, 0] == 30
    assert sheet[22 + 148 + 22 + 64, 6 * 134 + 67, 0] == 60
    page = out.with_suffix(".html").read_text()
    assert "2 of 2 episodes, 12 frames" in page
    assert "<td>5 frames</td><td>1</td>" in page


def test_a_gif_is_one_and_other_videos_are_refused_before_rendering(bright, capsys):
    one = f"--shard {bright}/train/data_0000.array_record --n-episodes 1 --scale 1 --output"
    preview.main([*one.split(), str(bright / "look.gif")])
    with Image.open(bright / "look.gif") as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 5)
    (bright / "taken.png").mkdir()
    for name, message in (
        ("q.png", "q.png: its name must end in .mp4 or .gif"),
        ("q.html", "q.html: its name must end in .mp4 or .gif"),
        ("taken.mp4", "taken.png: it is a folder"),
    ):
        with pytest.raises(SystemExit):
            preview.main([*one.split(), str(bright / name)])
        assert message in capsys.readouterr().err
        assert not (bright / name).exists()


def test_facts_are_counted(bright):
    found = preview.Episodes([bright / "train" / "data_0000.array_record"])
    facts = preview.facts(found, [0, 1], preview.controls.read(bright))
    assert facts.lengths == {5: 1, 7: 1}
    assert facts.actions.sum() == 12
    pressed = [*range(5), *range(7, 14)]  # episode 0 presses 0…4, episode 1 presses 7…13
    assert (facts.actions[pressed] == 1).all()
    assert facts.actions[6] == 0
    assert (facts.mean_frame == round((100 + 210) / 12)).all()


def test_another_game_is_shown_with_its_own_keys(bright):
    pad = Controls("nes", "buttons", tuple(map(Control, ("SELECT", "START", "LEFT", "RIGHT"))))
    (bright / "metadata.json").write_text(json.dumps(pad.to_json()))
    panel = lambda action: key_panel.render(pad, action, width=128)
    gold = lambda image: (image == arrow_keys.ACCENT).all(-1).sum()
    none, one, two = (gold(panel(action)) for action in (0, 0b0001, 0b1001))
    assert none == 0 < one < two


def test_coinrun_keeps_its_arrow_keys(bright, capsys):
    coinrun = preview.controls.read(bright)
    np.testing.assert_array_equal(
        key_panel.render(coinrun, 8, width=128), arrow_keys.keyboard_panel(8, width=128)
    )
    with pytest.raises(SystemExit):
        preview.main(["--data", str(bright), "--first", "2"])
    assert "episodes 0…1" in capsys.readouterr().err

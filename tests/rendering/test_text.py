"""Names in any script look different, even where no font has their letters."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cwm_jax.controls import Control, Controls
from cwm_jax.rendering import key_panel, text

PAIRS = [
    *(("跳跃", "不动"), ("ジャンプ", "ストップ"), ("ВЛЕВО", "ВПРАВ"), ("ΑΝΩ", "ΚΑΤ")),
    *(("⬆", "⬇"), ("🦘", "🛑"), ("SAUTÉ", "ÉTUAS"), ("점프", "정지"), ("قفز", "قفر")),
    ("跳" * 9, "跳" * 8 + "动"),
    ("\x01", "\x02"),
]


def panel(name, action=0):
    return key_panel.render(Controls("g", "one_hot", (Control(name),)), action, width=128)


@pytest.mark.parametrize("fonts", ["of the system", "none"])
@pytest.mark.parametrize("names", PAIRS)
def test_two_names_look_different(names, fonts, monkeypatch):
    if fonts == "none":
        monkeypatch.setattr(text, "_of_system", lambda letter: ())
    for cache in (key_panel.render, text._written):
        cache.cache_clear()
    for action in (0, -1):  # also the name on the key alone
        assert not np.array_equal(*(panel(name, action) for name in names))


def test_a_letter_that_no_font_has_is_rendered_as_its_number(monkeypatch):
    monkeypatch.setattr(text, "_of_system", lambda letter: ())
    text._written.cache_clear()
    assert text.width("跳", 11) == text.width(" 8DF3 ", 11)
    text._written.cache_clear()


def test_long_names_stay_inside_their_box():
    picture = Image.new("L", (100, 20))
    text.render(ImageDraw.Draw(picture), (50, 10), "LEFT+RIGHT+JUMP+FIRE", 255, 13, most=80)
    inside = np.array(picture)
    assert inside[:, 10:90].any()
    assert not inside[:, :9].any()
    assert not inside[:, 91:].any()


def test_a_failing_list_of_fonts_counts_as_empty(monkeypatch, tmp_path):
    broken = tmp_path / "fc-list"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    text._of_system.cache_clear()
    assert text._of_system("跳") == ()
    text._of_system.cache_clear()

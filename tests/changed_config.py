"""Configs with other settings, for tests."""

import copy
from collections.abc import Mapping
from typing import Any


def changed(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested config with settings named as on the command line: `data.clip_len`."""
    config = copy.deepcopy(dict(config))
    for name, value in settings.items():
        *groups, key = name.split(".")
        place = config
        for group in groups:
            place = place[group]
        place[key] = value
    return config

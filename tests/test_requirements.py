"""The pinned versions satisfy `pyproject.toml`, on every supported Python."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
WANTED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_requirement_is_pinned_once_within_its_bounds(python):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    valid = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(here)]
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in valid}
    assert len(pinned) == len(valid)
    extras = WANTED["optional-dependencies"].values()
    for line in [*WANTED["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        (pin,) = pinned[canonicalize_name(requirement.name)]
        assert pin.operator == "==", pin
        assert requirement.specifier.contains(pin.version), (line, pin)

"""Puts the model, the embedded data and the configs into a wheel, under the names they have here.

`cwm_jax/shipped.py` looks for them there. An editable install leaves them where they are.
"""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("assets/coinrun", "checkpoints/pocket", "configs", "web")


class ShippedFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        """Raises FileNotFoundError where one of them is missing: no wheel is made without."""
        if version == "editable":
            return
        for name in SHIPPED:
            for path in sorted((Path(self.root) / name).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    place = path.relative_to(self.root).as_posix()
                    build_data["force_include"][str(path)] = f"cwm_jax/_shipped/{place}"
            if not any(
                to.startswith(f"cwm_jax/_shipped/{name}/")
                for to in build_data["force_include"].values()
            ):
                raise FileNotFoundError(f"{name} is missing here: a wheel needs its files")

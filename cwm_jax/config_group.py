"""Settings as dataclass fields, each with its default, meaning and range.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SamplerConfig(ConfigGroup):
        PATH = "config.sampler"
        ddim_steps: int = setting(10, "denoising steps for each frame", least=1, most=1000)

`SamplerConfig(ddim_steps=0)` raises `UserError` with the setting's full name and its range. Modules
declare the groups that they read; `experiment/settings.py` combines them.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from cwm_jax.errors import UserError

_PLAIN = (int, float, str, bool)


def setting(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    repr: bool = True,
) -> Any:
    """A field of a `ConfigGroup`.

    Args:
        meaning: one line for the list of all settings, with the unit.
        least: smallest value that is allowed, of a number.
        most: largest value that is allowed, of a number.
        choices: the values that are allowed, of a string; none: any.
    """
    metadata = dict(meaning=meaning, least=least, most=most, choices=choices)
    return dataclasses.field(default=default, metadata=metadata, repr=repr)


def group(kind: type) -> Any:
    """A field that holds another group, with its defaults."""
    return dataclasses.field(default_factory=kind)


class ConfigGroup:
    """Base of a frozen dataclass whose fields are settings; checks the type and range of each."""

    PATH: ClassVar[str] = "config"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _checked(f"{self.PATH}.{field.name}", getattr(self, field.name), field)
            object.__setattr__(self, field.name, value)


def build(group: type, values: Mapping[str, Any]) -> Any:
    """A group from a mapping that has every field of it, nested groups included.

    Raises:
        UserError: for a key that is missing or does not exist, or a value that is not allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(group)}
    if not isinstance(values, Mapping):
        raise UserError(f"{group.PATH} must hold settings, not {values!r}")
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"there is no setting {group.PATH}.{unknown[0]}; see docs/settings.md")
    if missing := sorted(set(fields) - set(values)):
        raise UserError(f"the config lacks {group.PATH}.{missing[0]}; see docs/settings.md")
    return group(
        **{
            name: build(field.type, values[name]) if is_group(field.type) else values[name]
            for name, field in fields.items()
        }
    )


def is_group(kind: Any) -> bool:
    """Whether a field's type is itself a group of settings."""
    return isinstance(kind, type) and issubclass(kind, ConfigGroup)


def listed(group: type) -> Iterator[tuple[str, dataclasses.Field]]:
    """(full name, field) of every setting of a group and of the groups in it, in order."""
    for field in dataclasses.fields(group):
        if is_group(field.type):
            yield from listed(field.type)
        else:
            yield f"{group.PATH}.{field.name}", field


def _checked(name: str, value: Any, field: dataclasses.Field) -> Any:
    """The value, converted to a float where the field is a float."""
    kind, rule = field.type, field.metadata
    if kind not in _PLAIN:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} must be {kind.__name__}, not {value!r}")
    if kind in (int, float) and not _is_within(value, rule):
        raise UserError(f"{name}={value}: must be {_range(rule)}")
    if rule.get("choices") and value not in rule["choices"]:
        raise UserError(f"{name} must be one of {', '.join(rule['choices'])}, not {value!r}")
    return value


def _is_within(value: float, rule: Mapping[str, Any]) -> bool:
    least, most = rule.get("least"), rule.get("most")
    return (least is None or value >= least) and (most is None or value <= most) and value == value


def _range(rule: Mapping[str, Any]) -> str:
    least, most = rule.get("least"), rule.get("most")
    if least is None and most is None:
        return "a number"
    if most is None:
        return f"{least} or more"
    return f"at most {most}" if least is None else f"{least}…{most}"

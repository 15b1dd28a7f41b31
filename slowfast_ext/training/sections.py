"""Reading a configuration key by key, so that every key is either used or an error."""

from __future__ import annotations

from typing import Any

from .config_file import nearest

_MISSING = object()


class Section:
    """One dictionary of a configuration. What nobody has taken from it when :meth:`close` is called is an error.

    Args:
        values: the dictionary.
        where: its path from the root of the configuration, "" for the root.
    """

    def __init__(self, values: Any, where: str = ""):
        if not isinstance(values, dict):
            raise ValueError(f"config: {where} must be a dictionary, got {values!r}")
        self.where = where
        self._values = dict(values)
        self._known: set[str] = set()

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def take(self, name: str, default: Any = _MISSING, kind: type | tuple[type, ...] = object) -> Any:
        """The value of a key.

        Args:
            default: for a missing key; without it the key is required. ``None`` as default allows ``None`` as value.
            kind: types that the value may have; a bool is no number, a whole number is a float.

        Raises:
            ValueError: missing, or of another type.
        """
        self._known.add(name)
        value = self._values.pop(name, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                raise ValueError(f"config: {self.path(name)} must be given, got nothing")
            return default
        if value is None and default is None:
            return None
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds:
            kinds = (*kinds, int)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
            expected = " or ".join(_NAMES.get(kind, kind.__name__) for kind in kinds)
            raise ValueError(f"config: {self.path(name)} must be {expected}, got {value!r}")
        return value

    def number(self, name: str, default: Any = _MISSING, *, minimum: float = 0, exclusive: bool = False) -> float:
        """A finite number, at least (or, with ``exclusive``, above) ``minimum``."""
        value = self.take(name, default, float)
        if value is not None and not (minimum < value < float("inf") or (value == minimum and not exclusive)):
            bound = "above" if exclusive else "at least"
            raise ValueError(f"config: {self.path(name)} must be {bound} {minimum}, got {value}")
        return value

    def count(self, name: str, default: Any = _MISSING, *, minimum: int = 1) -> int:
        """A whole number, at least ``minimum``."""
        value = self.take(name, default, int)
        if value is not None and value < minimum:
            raise ValueError(f"config: {self.path(name)} must be at least {minimum}, got {value}")
        return value

    def choice(self, name: str, choices: tuple, default: Any = _MISSING) -> Any:
        """A value out of ``choices``."""
        value = self.take(name, default)
        if value not in choices:
            hint = nearest(value, filter(_is_text, choices)) if _is_text(value) else ""
            expected = f"one of {choices}" if len(choices) > 1 else repr(choices[0])
            raise ValueError(f"config: {self.path(name)} must be {expected}, got {value!r}{hint}")
        return value

    def fixed(self, name: str, *values: Any) -> None:
        """A key that may be there but only with what this library does anyway."""
        self.choice(name, values, values[0])

    def numbers(self, name: str, default: Any = _MISSING, *, length: int | None = None) -> tuple[float, ...]:
        """A list or tuple of numbers, of ``length`` entries if given."""
        value = self.take(name, default, (list, tuple))
        if value is None:
            return None
        number = all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
        if not number or length not in (None, len(value)):
            raise ValueError(f"config: {self.path(name)} must be {length or 'a list of'} numbers, got {value!r}")
        return tuple(value)

    def section(self, name: str, default: Any = _MISSING) -> Section | None:
        """A dictionary under a key."""
        value = self.take(name, default)
        return None if value is None else Section(value, self.path(name))

    def sections(self, name: str, default: Any = _MISSING) -> list[Section]:
        """A list of dictionaries under a key."""
        value = self.take(name, default, (list, tuple))
        return [Section(item, self.path(f"{name}.{position}")) for position, item in enumerate(value)]

    def close(self) -> None:
        """Raise ValueError if a key is left, with the nearest of those that were asked for."""
        if self._values:
            name = next(iter(self._values))
            hint = nearest(str(name), self._known) or f"; known here: {', '.join(sorted(self._known))}"
            place = f"in {self.where}" if self.where else "at the top"
            raise ValueError(f"config: keys {place} must be known ones, got {name!r}{hint}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    list: "a list",
    tuple: "a tuple",
    dict: "a dictionary",
}

"""Sources and sinks named by a URI, `scheme:place?name=value&name=value`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

# Only a name and "=" begin parameters: a "?" elsewhere belongs to the place, where it may be part of a glob.
_PARAMETERS = re.compile(r"\?([\w.]+=.*)$")


def parse_uri(
    uri: str, scheme: str, parameters: Mapping[str, Callable[[str], Any]]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The place, the parameters, and the settings, which are the parameters with a dot in their names.

    Args:
        uri: To read; `%xx` stands for a character, also in parameters.
        scheme: That it has to have.
        parameters: Of each known one, what turns its text into a value, or raises `ValueError` to say what it expected.

    Raises:
        ValueError: Another scheme, no place, or a parameter that is unknown, repeated or has no such value.
    """
    if not uri.startswith(f"{scheme}:"):
        raise ValueError(f"expected a URI that begins with {scheme}:, got {uri}")
    place = uri.removeprefix(f"{scheme}:")
    found = _PARAMETERS.search(place)
    if found:
        place = place[: found.start()]
    if not place:
        raise ValueError(f"{scheme}:: expected a place after the colon, got none")
    values: dict[str, Any] = {}
    settings: dict[str, str] = {}
    for item in found.group(1).split("&") if found else []:
        name, equals, text = item.partition("=")
        where = f"{scheme}:{place}: {name}"
        if not equals:
            raise ValueError(f"{where}: expected name=value, got no value")
        if name in values or name in settings:
            raise ValueError(f"{where}: expected once, got it twice")
        text = unquote(text)
        if "." in name:
            settings[name] = text
        elif name in parameters:
            try:
                values[name] = parameters[name](text)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        else:
            raise ValueError(f"{where}: expected one of {', '.join(sorted(parameters))}")
    return unquote(place), values, settings


def seconds(text: str) -> float:
    """A number of seconds, not negative."""
    return _number(text, "seconds", lambda number: number >= 0)


def positive(text: str) -> float:
    """A number above zero."""
    return _number(text, "a number above 0", lambda number: number > 0)


def _number(text: str, wanted: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not (fits(number) and number < float("inf")):
        raise ValueError(f"expected {wanted}, got {text!r}")
    return number


def truth(text: str) -> bool:
    """`true` or `false`."""
    if text not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text == "true"

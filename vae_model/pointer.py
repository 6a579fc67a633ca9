"""Pointers: a small JSON file that names the bundle in use, so that it can be changed and changed back.

A URI that ends in `.json` is a pointer's, any other one a bundle's.
"""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass
from typing import Any

from vae_model import files

FORMAT = 1
MAX_HISTORY = 10


class PointerError(ValueError):
    """A file is not a pointer that this version can use."""


@dataclass(frozen=True)
class Entry:
    """A bundle that is, or was, pointed to.

    Args:
        bundle: Its URI as written: absolute, or relative to the pointer's folder.
        model_version: The version that was promoted.
        promoted_at: When, ISO 8601.
    """

    bundle: str
    model_version: str
    promoted_at: str


@dataclass(frozen=True)
class Pointer:
    """A pointer's content.

    Args:
        uri: Where it is.
        current: The bundle in use.
        history: Those before it, the last one first.
    """

    uri: str
    current: Entry
    history: tuple[Entry, ...] = ()

    def locate(self, entry: Entry) -> str:
        """The URI of an entry's bundle."""
        if "://" in entry.bundle or entry.bundle.startswith("/"):
            return entry.bundle
        scheme, separator, path = self.uri.rpartition("://")
        return scheme + separator + posixpath.normpath(posixpath.join(posixpath.dirname(path), entry.bundle))

    def write(self) -> None:
        """Writes the file; a reader sees the old one or the new one, whole."""
        content = {
            "format": FORMAT,
            "current": vars(self.current),
            "history": [vars(entry) for entry in self.history[:MAX_HISTORY]],
        }
        files.write_file(self.uri, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def is_pointer(uri: str) -> bool:
    """Whether a URI names a pointer rather than a bundle."""
    return str(uri).endswith(".json")


def read_pointer(uri: str) -> Pointer:
    """Reads a pointer.

    Raises:
        PointerError: None is there, or it is not one that this version reads.
    """
    try:
        content = json.loads(files.read_file(uri))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise PointerError(f"{uri}: no pointer there; beam-vae promote writes one") from None
    except ValueError as error:
        raise PointerError(f"{uri}: is no pointer, for it is not JSON: {error}") from None
    if not isinstance(content, dict) or "current" not in content:
        raise PointerError(f"{uri}: is no pointer: it has no entry named current")
    if (found := content.get("format")) != FORMAT:
        raise PointerError(f"{uri}: of another version of beam-vae: expected pointer format {FORMAT}, got {found!r}")
    history = content.get("history", [])
    if not isinstance(history, list):
        raise PointerError(f"{uri}: history: expected a list, got {history!r}")
    return Pointer(uri, _entry(uri, content["current"]), tuple(_entry(uri, values) for values in history))


def _entry(uri: str, values: Any) -> Entry:
    entry = values if isinstance(values, dict) else {}
    texts = [text for name in ("bundle", "model_version", "promoted_at") if (text := entry.get(name))]
    if len(texts) != 3 or not all(isinstance(text, str) for text in texts):
        raise PointerError(f"{uri}: expected bundle, model_version and promoted_at in each entry, got {values!r}")
    return Entry(*texts)


def describe(uri: str) -> str:
    """A bundle's URI, or a pointer's with that of the bundle it names."""
    if not is_pointer(uri):
        return uri
    pointer = read_pointer(uri)
    return f"{uri} -> {pointer.locate(pointer.current)}"


def name_for(bundle: str, pointer: str) -> str:
    """A bundle's URI as a pointer writes it: relative where it lies below the pointer's folder.

    Raises:
        ValueError: The pointer is in a store and the bundle on this machine.
    """
    bundle, folder = files.absolute(bundle).rstrip("/"), posixpath.dirname(files.absolute(pointer))
    if bundle.startswith(f"{folder}/"):
        return posixpath.relpath(bundle, folder)
    if "://" in pointer and "://" not in bundle:
        raise ValueError(f"{bundle}: is on this machine only, where not every reader of {pointer} can read it")
    return bundle

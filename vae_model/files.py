"""Files by URI: local paths, `gs://` and `s3://`, through `pyarrow.fs`."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import fs

_MAX_COPY_BYTES = 5 << 30  # of S3's CopyObject, with which a file there gets another name
_CHUNK_BYTES = 16 << 20


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path on it."""
    uri = str(uri)
    if uri.startswith(("gs://", "gcs://")) and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        # Google's own libraries, and so Beam, heed it; Arrow does not.
        scheme, _, host = emulator.rpartition("://")
        system = fs.GcsFileSystem(anonymous=True, scheme=scheme or "http", endpoint_override=host.rstrip("/"))
        return system, uri.partition("://")[2].rstrip("/")
    if "://" in uri:
        return fs.FileSystem.from_uri(uri)
    return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


def absolute(uri: str) -> str:
    """A local path as an absolute one; a URI as it is."""
    return uri if "://" in uri else filesystem(uri)[1]


def exists(uri: str) -> bool:
    """Whether a file or directory is at a URI."""
    system, path = filesystem(uri)
    return bool(system.get_file_info(path).type != fs.FileType.NotFound)


def match(patterns: str | list[str], suffix: str = "") -> list[tuple[fs.FileSystem, str]]:
    """Files of local paths, directories (walked, for names ending in `suffix`) or glob patterns, sorted by path.

    As in Spark and pyarrow, names that begin with `_` or `.` inside a directory are not data.

    Raises:
        FileNotFoundError: Nothing matches one of the patterns.
    """
    found: list[tuple[fs.FileSystem, str]] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        paths = _match_one(pattern, suffix)
        if not paths:
            raise FileNotFoundError(f"{pattern}: no{' ' + suffix if suffix else ''} file matches")
        found += paths
    return found


def _match_one(pattern: str, suffix: str) -> list[tuple[fs.FileSystem, str]]:
    wild = re.search(r"[*?\[]", pattern)
    if wild is None:
        system, path = filesystem(pattern)
        info = system.get_file_info(path)
        if info.type == fs.FileType.File:
            return [(system, path)]
        if info.type != fs.FileType.Directory:
            return []
        return [(system, p) for p in _walk(system, path) if p.endswith(suffix)]
    base = pattern[: pattern.rfind("/", 0, wild.start()) + 1]
    system, root = filesystem(base or ".")
    regex = re.compile(_glob_regex(pattern[len(base) :]))
    deep = "/" in pattern[len(base) :] or "**" in pattern
    return [(system, p) for p in _walk(system, root, deep) if regex.fullmatch(posixpath.relpath(p, root))]


def _glob_regex(pattern: str) -> str:
    """As in a shell: `*` and `?` stay within one folder, `**` does not."""
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    return "".join(
        known.get(part) or (part.replace("[!", "[^") if i % 2 else re.escape(part)) for i, part in enumerate(parts)
    )


def _walk(system: fs.FileSystem, root: str, deep: bool = True) -> list[str]:
    infos = system.get_file_info(fs.FileSelector(root, recursive=deep, allow_not_found=True))
    paths = sorted(info.path for info in infos if info.type == fs.FileType.File)
    return [p for p in paths if not re.search(r"(^|/)[._]", posixpath.relpath(p, root))]


def read_bytes(uri: str, name: str, max_bytes: int) -> bytes:
    """One file of the directory at `uri`.

    Raises:
        ValueError: It is larger than `max_bytes`; nothing of it is read then.
    """
    system, root = filesystem(uri)
    with system.open_input_file(posixpath.join(root, name)) as stream:
        if stream.size() > max_bytes:
            raise ValueError(f"expected at most {max_bytes:,} bytes, got {stream.size():,}")
        return bytes(stream.read())


def read_file(uri: str) -> bytes:
    """A whole file."""
    system, path = filesystem(uri)
    with system.open_input_stream(path) as stream:
        return bytes(stream.read())


def remove(uri: str) -> None:
    """Deletes a file, if it is there."""
    system, path = filesystem(uri)
    if system.get_file_info(path).type == fs.FileType.File:
        system.delete_file(path)


def refuse_unwritable(uri: str) -> None:
    """Raises `OSError` where a local file or directory could not be made; object stores tell when written to."""
    system, path = filesystem(uri)
    if isinstance(system, fs.LocalFileSystem):
        there = next(parent for parent in Path(path).parents if parent.exists())
        with _named(uri), tempfile.TemporaryFile(dir=there):
            pass


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """Says which place cannot be written: a full disk, for one, does not."""
    try:
        yield
    except OSError as error:
        if str(error).startswith(f"{uri}: "):
            raise
        raise type(error)(f"{uri}: cannot be written: {error}") from error


def write_file(uri: str, content: bytes) -> None:
    """Writes a small file; a reader sees the old one or the new one, whole."""
    system, path = filesystem(uri)
    if isinstance(system, fs.LocalFileSystem):
        with new_file(uri) as stream:
            stream.write(content)
        return
    with _named(uri), system.open_output_stream(path) as stream:  # an object appears when it is closed
        stream.write(content)


@contextmanager
def new_file(uri: str) -> Iterator[Any]:
    """A stream whose file appears under its name once all is written, and replaces one that is there.

    A failure leaves nothing: object stores keep what was written when a stream is closed, for whatever reason, so
    there too it is written under another name first.
    """
    system, path = filesystem(uri)
    partial = f"{path}.partial"
    with _named(uri):
        if isinstance(system, fs.LocalFileSystem):
            system.create_dir(path.rpartition("/")[0], recursive=True)
        try:
            with system.open_output_stream(partial) as stream:
                yield stream
            _rename(system, partial, path)
        except BaseException:
            if system.get_file_info(partial).type == fs.FileType.File:
                system.delete_file(partial)
            raise


def _rename(system: fs.FileSystem, source: str, target: str) -> None:
    size = system.get_file_info(source).size
    if not isinstance(system, fs.S3FileSystem) or size is None or size <= _MAX_COPY_BYTES:
        system.move(source, target)
        return
    with system.open_input_stream(source) as old, system.open_output_stream(target) as new:
        while chunk := old.read(_CHUNK_BYTES):
            new.write(chunk)
    system.delete_file(source)


def write_directory(uri: str, files: dict[str, bytes], *, last: str, overwrite: bool = False) -> None:
    """Writes a directory of files, whole or not at all.

    Locally it is written beside its place and moved there. Object stores have no such move, so
    the file named `last` is written last there: without it the directory does not count.

    Raises:
        FileExistsError: Something is there already, and either `overwrite` is false or it is not
            such a directory.
    """
    system, root = filesystem(uri)
    exists = system.get_file_info(root).type != fs.FileType.NotFound
    if exists and not overwrite:
        raise FileExistsError(f"{uri}: already exists; choose another place or overwrite it on purpose")
    if exists and system.get_file_info(posixpath.join(root, last)).type != fs.FileType.File:
        raise FileExistsError(f"{uri}: already exists and holds no {last}, so it will not be overwritten")
    names = [name for name in files if name != last] + [last]
    with _named(uri):
        if isinstance(system, fs.LocalFileSystem):
            _write_local(Path(root), {name: files[name] for name in names}, exists)
            return
        if exists:
            system.delete_file(posixpath.join(root, last))
        for name in names:
            with system.open_output_stream(posixpath.join(root, name)) as stream:
                stream.write(files[name])


def _write_local(root: Path, files: dict[str, bytes], exists: bool) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{root.name[:100]}-", dir=root.parent))
    try:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        staging.chmod(0o755)
        if exists:
            retired = staging.with_name(staging.name + "-old")
            root.rename(retired)
            staging.rename(root)
            shutil.rmtree(retired)
        else:
            staging.rename(root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

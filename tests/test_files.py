import os
from pathlib import Path

import pytest
from pyarrow import fs

from vae_model import files

TREE = [
    "a.parquet",
    "b.parquet",
    "notes.txt",
    "_metadata.parquet",
    ".hidden.parquet",
    "year=2013/c1.parquet",
    "year=2013/deep/d.parquet",
    "year=2014/c2.parquet",
    "_temporary/e.parquet",
    ".cache/f.parquet",
]


@pytest.fixture
def tree(tmp_path):
    for name in TREE:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "data"


def matched(tree, patterns, suffix=".parquet"):
    return [os.path.relpath(path, tree) for _, path in files.match(patterns, suffix)]


# ---- matching ----------------------------------------------------------------------------------


def test_a_directory_is_walked_for_data_without_hidden_names(tree):
    expected = ["a.parquet", "b.parquet", "year=2013/c1.parquet", "year=2013/deep/d.parquet", "year=2014/c2.parquet"]
    assert matched(tree, str(tree)) == expected
    assert matched(tree, f"{tree}/") == expected


def test_a_directory_named_with_an_underscore_is_walked_when_asked_for(tree):
    assert matched(tree, f"{tree}/_temporary") == ["_temporary/e.parquet"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["a.parquet", "b.parquet"]),
        ("?.parquet", ["a.parquet", "b.parquet"]),
        ("[ab].parquet", ["a.parquet", "b.parquet"]),
        ("[!a].parquet", ["b.parquet"]),
        ("*/*.parquet", ["year=2013/c1.parquet", "year=2014/c2.parquet"]),
        ("year=2013/**/*.parquet", ["year=2013/c1.parquet", "year=2013/deep/d.parquet"]),
        ("year=2013/**", ["year=2013/c1.parquet", "year=2013/deep/d.parquet"]),
        ("**/c?.parquet", ["year=2013/c1.parquet", "year=2014/c2.parquet"]),
        ("year=201[3-4]/c*", ["year=2013/c1.parquet", "year=2014/c2.parquet"]),
        ("notes.*", ["notes.txt"]),
    ],
)
def test_globs_match_as_in_a_shell(tree, pattern, expected):
    assert matched(tree, f"{tree}/{pattern}") == expected


@pytest.mark.parametrize("pattern", ["*.parquet", "?.parquet", "[ab].parquet", "[!a].parquet", "*/*.parquet", "*"])
def test_globs_match_what_pathlib_matches(tree, pattern):
    hidden = (".", "_")
    found = (path.relative_to(tree) for path in tree.glob(pattern) if path.is_file())
    expected = sorted(str(path) for path in found if not any(part.startswith(hidden) for part in path.parts))
    assert matched(tree, f"{tree}/{pattern}") == expected


def test_a_star_does_not_match_the_folder_separator(tree):
    with pytest.raises(FileNotFoundError):
        files.match(f"{tree}/year*.parquet")


def test_a_file_is_taken_whatever_its_name(tree):
    assert matched(tree, f"{tree}/notes.txt") == ["notes.txt"]
    assert matched(tree, f"{tree}/_metadata.parquet") == ["_metadata.parquet"]


def test_patterns_keep_their_order(tree):
    patterns = [f"{tree}/year=2014", f"{tree}/a.parquet"]
    assert matched(tree, patterns) == ["year=2014/c2.parquet", "a.parquet"]


def test_a_pattern_relative_to_the_working_directory_is_found(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert matched(tree, "*.parquet") == ["a.parquet", "b.parquet"]
    assert matched(tree, "year=2013/../a.parquet") == ["a.parquet"]


def test_a_uri_is_a_path(tree):
    assert matched(tree, f"file://{tree}/*.parquet") == ["a.parquet", "b.parquet"]


def test_home_is_expanded(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert matched(tree, "~/a.parquet") == ["a.parquet"]


@pytest.mark.parametrize("name", ["*.csv", "absent.parquet", "absent/*.parquet"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(tree, name):
    with pytest.raises(FileNotFoundError, match=r"no \.parquet file matches") as error:
        files.match([str(tree), f"{tree}/{name}"], suffix=".parquet")
    assert str(error.value).startswith(f"{tree}/{name}: ")


def test_dots_and_pluses_in_a_pattern_are_themselves(tree):
    (tree / "a+b.parquet").write_bytes(b"x")
    assert matched(tree, f"{tree}/a+*.parquet") == ["a+b.parquet"]
    with pytest.raises(FileNotFoundError):
        files.match(f"{tree}/*xparquet")


# ---- directories -------------------------------------------------------------------------------


def content(path):
    return {item.name: item.read_bytes() for item in Path(path).iterdir()}


def test_a_directory_is_written_whole(tmp_path):
    target = tmp_path / "new" / "bundle"
    files.write_directory(f"{target}/", {"last.json": b"{}", "data": b"123"}, last="last.json")
    assert content(target) == {"last.json": b"{}", "data": b"123"}
    assert files.read_bytes(str(target), "data", 100) == b"123"
    assert files.exists(str(target))
    assert os.listdir(target.parent) == ["bundle"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_directory_that_is_there_is_not_overwritten_unasked(tmp_path):
    files.write_directory(str(tmp_path / "b"), {"last": b"old"}, last="last")
    with pytest.raises(FileExistsError, match=r"b: already exists; choose another place or overwrite it on purpose"):
        files.write_directory(str(tmp_path / "b"), {"last": b"new"}, last="last")
    assert content(tmp_path / "b") == {"last": b"old"}


def test_overwriting_leaves_nothing_of_the_old_directory(tmp_path):
    files.write_directory(str(tmp_path / "b"), {"last": b"old", "extra": b""}, last="last")
    files.write_directory(str(tmp_path / "b"), {"last": b"new"}, last="last", overwrite=True)
    assert content(tmp_path / "b") == {"last": b"new"}
    assert os.listdir(tmp_path) == ["b"]


def test_a_directory_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(FileExistsError, match=r"photos: already exists and holds no last, so it will not be"):
        files.write_directory(str(tmp_path / "photos"), {"last": b""}, last="last", overwrite=True)
    assert content(tmp_path / "photos") == {"cat.jpg": b"meow"}


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    files.write_directory(str(tmp_path / "b"), {"last": b"old"}, last="last")
    broken = {"data": b"", "bad/name": b"", "last": b"new"}
    with pytest.raises(FileNotFoundError):
        files.write_directory(str(tmp_path / "b"), broken, last="last", overwrite=True)
    assert content(tmp_path / "b") == {"last": b"old"}
    assert os.listdir(tmp_path) == ["b"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A filesystem that cannot move directories, as object stores; its root is `tmp_path`."""
    system = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(files, "filesystem", lambda uri: (system, uri.removeprefix("mem://")))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "last").write_bytes(b"old")
    return tmp_path


def test_an_object_stores_directory_is_overwritten_in_place(store):
    files.write_directory("mem://b", {"last": b"new", "data": b"1"}, last="last", overwrite=True)
    assert content(store / "b") == {"last": b"new", "data": b"1"}


def test_a_write_to_an_object_store_that_fails_leaves_no_last_file(store):
    with pytest.raises(FileNotFoundError):
        files.write_directory("mem://b", {"last": b"new", "bad/name": b""}, last="last", overwrite=True)
    assert content(store / "b") == {}

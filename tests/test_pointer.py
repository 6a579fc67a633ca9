import json
import shutil
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import beam_vae
from vae_model import load_bundle
from vae_model.bundle import BundleError
from vae_model.pointer import MAX_HISTORY, Entry, Pointer, PointerError, is_pointer, read_pointer
from vae_model.promotion import PromotionError, promote, readings, refuse_successor, rollback


@pytest.fixture
def models(first_uri, second_uri, tmp_path, monkeypatch) -> Path:
    """A folder `models` with two versions; it is in the working directory."""
    folder = tmp_path / "models"
    shutil.copytree(first_uri, folder / "v1")
    shutil.copytree(second_uri, folder / "v2")
    monkeypatch.chdir(tmp_path)
    return folder


def corrupt(directory: Path) -> None:
    """Flips one byte of the weights."""
    content = bytearray((directory / "weights.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "weights.npz").write_bytes(content)


# ---- the file ----------------------------------------------------------------------------------------


def test_a_written_pointer_is_read_back(tmp_path):
    entries = [Entry(f"v{i}", f"version-{i}", "2026-11-22T12:00:00Z") for i in range(3)]
    pointer = Pointer(str(tmp_path / "new/current.json"), entries[2], (entries[1], entries[0]))
    pointer.write()
    assert read_pointer(pointer.uri) == pointer
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["current.json"]


@pytest.mark.parametrize(
    ("pointer", "bundle", "place"),
    [
        ("models/current.json", "v2", "models/v2"),
        ("models/current.json", "../others/v2", "others/v2"),
        ("current.json", "v2", "v2"),
        ("models/current.json", "/data/v2", "/data/v2"),
        ("/models/current.json", "a/v2", "/models/a/v2"),
        ("gs://bucket/models/current.json", "v2", "gs://bucket/models/v2"),
        ("gs://bucket/models/current.json", "s3://other/v2", "s3://other/v2"),
    ],
)
def test_a_relative_bundle_is_sought_beside_its_pointer(pointer, bundle, place):
    entry = Entry(bundle, "v", "2026-11-22T12:00:00Z")
    assert Pointer(pointer, entry).locate(entry) == place


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is no pointer, for it is not JSON"),
        ('{"format": 1, "curr', "is no pointer, for it is not JSON"),
        ("\udcff", "is no pointer, for it is not JSON"),
        ("[]", "it has no entry named current"),
        ("{}", "it has no entry named current"),
        ('{"format": 2, "current": {}}', "of another version of beam-vae: expected pointer format 1, got 2"),
        ('{"format": 1, "current": {"bundle": "v1"}}', "expected bundle, model_version and promoted_at"),
        ('{"format": 1, "current": "v1"}', "expected bundle, model_version and promoted_at in each entry, got 'v1'"),
        (
            '{"format": 1, "current": {"bundle": "a", "model_version": "b", "promoted_at": "c"}, "history": 1}',
            "history: expected a list",
        ),
    ],
)
def test_what_is_no_pointer_is_refused_in_words(content, problem, tmp_path):
    path = tmp_path / "current.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(PointerError, match=problem):
        read_pointer(str(path))
    with pytest.raises(BundleError, match=problem):
        load_bundle(str(path))


def test_a_missing_pointer_is_refused_in_words(tmp_path):
    with pytest.raises(BundleError, match=r"current.json: no pointer there; beam-vae promote writes one"):
        load_bundle(str(tmp_path / "current.json"))


def test_pointers_are_known_by_their_ending():
    assert is_pointer("gs://b/current.json")
    assert not is_pointer("gs://b/current.json/")
    assert not is_pointer("gs://b/v1")


def test_no_bundle_is_written_under_a_pointers_name(bundle, tmp_path):
    with pytest.raises(ValueError, match="expected a directory for a bundle, got the name of a pointer"):
        bundle.save(str(tmp_path / "current.json"))


def test_readers_never_see_half_a_pointer(tmp_path):
    uri = str(tmp_path / "current.json")
    pointers = [Pointer(uri, Entry("v" * n, "version", "2026-11-22T12:00:00Z")) for n in (1, 50_000)]
    pointers[0].write()
    done = threading.Event()

    def write():
        for i in range(300):
            pointers[i % 2].write()
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not done.is_set():
        seen.add(len(read_pointer(uri).current.bundle))
    thread.join()
    assert seen <= {1, 50_000}


# ---- promote and rollback ----------------------------------------------------------------------------


def test_promote_and_rollback_on_the_command_line(models, first, second, mixed_table, capsys):
    first, second = first.model_version, second.model_version
    pointer = "models/current.json"
    assert beam_vae.main(["promote", "models/v1", pointer]) == 0
    assert capsys.readouterr().out == f"{pointer} points to models/v1, version {first}\n"
    assert beam_vae.main(["promote", "models/v2", pointer]) == 0
    out = capsys.readouterr().out
    assert out == f"{pointer} points to models/v2, version {second}\nbefore: models/v1, version {first}\n"
    assert load_bundle(pointer).model_version == second

    content = json.loads((models / "current.json").read_text())
    assert (content["current"]["bundle"], content["current"]["model_version"]) == ("v2", second)
    assert [entry["bundle"] for entry in content["history"]] == ["v1"]

    pq.write_table(mixed_table.slice(0, 50), "in.parquet")
    score = ["score", "--input", "in.parquet", "--output", "out.parquet", "--bundle", pointer]
    assert beam_vae.main(score) == 0
    assert set(pq.read_table("out.parquet")["model_version"].to_pylist()) == {second}
    capsys.readouterr()
    assert beam_vae.main(["inspect", pointer]) == 0
    assert f"{pointer} -> models/v2" in capsys.readouterr().out

    assert beam_vae.main(["rollback", pointer]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [
        f"{pointer} points to models/v1, version {first}, again",
        f"no longer: models/v2, version {second}",
    ]
    assert load_bundle(pointer).model_version == first
    assert beam_vae.main(["rollback", pointer]) == 1
    assert "has no earlier bundle to go back to" in capsys.readouterr().err


def test_promoting_what_is_current_changes_nothing(models, capsys):
    promote("models/v1", "models/current.json")
    before = (models / "current.json").read_bytes()
    assert beam_vae.main(["promote", "models/v1", "models/current.json"]) == 0
    assert "already; nothing was changed" in capsys.readouterr().out
    assert (models / "current.json").read_bytes() == before


def test_a_pointer_can_be_promoted_to_another_one(models, second):
    promote("models/v2", "models/staging.json")
    promote("models/staging.json", "models/production/current.json")
    entry = read_pointer("models/production/current.json").current
    assert entry.model_version == second.model_version
    assert entry.bundle == str(models / "v2")  # not below the pointer's folder


def test_a_folder_of_models_can_be_moved(models, first, tmp_path):
    promote("models/v1", "models/current.json")
    models.rename(tmp_path / "elsewhere")
    assert load_bundle(str(tmp_path / "elsewhere/current.json")).model_version == first.model_version


def test_history_is_short(models):
    pointer = Pointer(
        "models/current.json",
        Entry("v1", load_bundle("models/v1").model_version, "2026-11-22T12:00:00Z"),
        tuple(Entry(f"old-{i}", str(i), "2026-11-22T12:00:00Z") for i in range(MAX_HISTORY)),
    )
    pointer.write()
    promote("models/v2", "models/current.json")
    history = read_pointer("models/current.json").history
    assert [entry.bundle for entry in history] == ["v1", *(f"old-{i}" for i in range(MAX_HISTORY - 1))]


def test_a_bundle_that_does_not_hold_is_not_promoted(models, first, capsys):
    promote("models/v1", "models/current.json")
    corrupt(models / "v2")
    assert beam_vae.main(["promote", "models/v2", "models/current.json", "--force"]) == 1
    assert "models/v2: weights.npz was changed after it was written" in capsys.readouterr().err
    assert read_pointer("models/current.json").current.model_version == first.model_version


def test_a_bundle_that_scores_otherwise_is_not_promoted(models, first):
    wrong = first.golden.column("anomaly_score").to_numpy() + 1
    index = first.golden.schema.get_field_index("anomaly_score")
    changed = load_bundle("models/v1")
    changed.golden = first.golden.set_column(index, "anomaly_score", [wrong])
    changed.save("models/wrong")
    with pytest.raises(BundleError, match=r"golden row .* expected .* as at training time"):
        promote("models/wrong", "models/current.json")
    assert not (models / "current.json").exists()


def test_a_model_of_other_columns_is_promoted_by_force_only(models, renamed, first):
    renamed.save("models/v3")
    promote("models/v1", "models/current.json")
    with pytest.raises(PromotionError, match=r"models/v3: running pipelines .*stretch: is read by it, .*--force"):
        promote("models/v3", "models/current.json")
    assert read_pointer("models/current.json").current.model_version == first.model_version
    promote("models/v3", "models/current.json", force=True)
    assert read_pointer("models/current.json").current.bundle == "v3"


def test_a_current_bundle_that_is_gone_cannot_be_compared(models):
    promote("models/v1", "models/current.json")
    shutil.rmtree(models / "v1")
    with pytest.raises(PromotionError, match=r"points to models/v1: no bundle there .*; so models/v2 cannot be"):
        promote("models/v2", "models/current.json")
    promote("models/v2", "models/current.json", force=True)
    with pytest.raises(BundleError, match=r"models/current.json points to models/v1: no bundle there"):
        rollback("models/current.json")
    assert read_pointer("models/current.json").current.bundle == "v2"


def test_a_broken_pointer_is_replaced_by_force_only(models):
    (models / "current.json").write_text("{")
    with pytest.raises(PromotionError, match=r"is not JSON.*--force replaces it"):
        promote("models/v1", "models/current.json")
    promote("models/v1", "models/current.json", force=True)
    assert read_pointer("models/current.json").current.bundle == "v1"


def test_a_bundle_replaced_in_place_is_refused(models, first, second):
    promote("models/v1", "models/current.json")
    shutil.rmtree(models / "v1")
    shutil.copytree(models / "v2", models / "v1")
    expected = f"points to models/v1: expected version {first.model_version}, as when it was promoted, got"
    with pytest.raises(BundleError, match=f"{expected} {second.model_version}"):
        load_bundle("models/current.json")


def test_a_pointer_to_a_pointer_is_refused(models):
    promote("models/v1", "models/current.json")
    entry = Entry("current.json", "x", "2026-11-22T12:00:00Z")
    Pointer("models/other.json", entry).write()
    with pytest.raises(BundleError, match=r"models/other.json points to models/current.json: expected a bundle"):
        load_bundle("models/other.json")


def test_names_are_checked(models):
    with pytest.raises(PromotionError, match=r"models/v2: expected the name of a pointer, which ends in .json"):
        promote("models/v1", "models/v2")
    with pytest.raises(ValueError, match="is on this machine only"):
        promote("models/v1", "gs://bucket/current.json")


# ---- which model may follow which ----------------------------------------------------------------------


def test_a_model_may_follow_one_that_reads_the_same_columns(bundle, second):
    assert refuse_successor(second.schema, readings(bundle.schema)) is None


def test_a_column_read_otherwise_is_refused(bundle):
    old = readings(bundle.schema) | {"count": "categorical"}
    assert refuse_successor(bundle.schema, old) == (
        "count: is read as numeric, expected categorical as by the model before"
    )


def test_a_number_that_stops_varying_is_still_a_number(bundle):
    assert readings(bundle.schema)["unit"] == "numeric"
    assert readings(bundle.schema)["site"] == "categorical"
    assert refuse_successor(bundle.schema, readings(bundle.schema) | {"unit": "any"}) is None


def test_a_new_column_is_welcome_where_the_input_has_it(bundle, mixed_table):
    old = readings(bundle.schema)
    del old["weight"]
    assert refuse_successor(bundle.schema, old, mixed_table.schema) is None
    assert "weight: expected one such column, got none" in str(
        refuse_successor(bundle.schema, old, mixed_table.drop_columns(["weight"]).schema)
    )
    assert str(refuse_successor(bundle.schema, old)).startswith("weight: is read by it, but not by the model before")

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_model import Bundle, load_bundle
from vae_model import bundle as bundle_module
from vae_model.bundle import BundleError, read_manifest, score_fields
from vae_model.calibration import Threshold
from vae_model.tables import RecordError

FILES = [
    "schema.json",
    "model.json",
    "weights.npz",
    "noise.npy",
    "calibration.json",
    "calibration.npz",
    "statistics.json",
    "golden.parquet",
    "card.json",
    "history.csv",
    "report.html",
]
ADDED = ["anomaly_score", "anomaly_p_value", "is_anomaly", "model_version"]


@pytest.fixture
def copy(bundle_uri, tmp_path) -> Path:
    """A bundle to break."""
    return Path(shutil.copytree(bundle_uri, tmp_path / "copy"))


def forge(directory: Path, name: str, content: bytes) -> None:
    """Replaces a file and its hash, as somebody who knows the format would."""
    (directory / name).write_bytes(content)
    manifest = json.loads((directory / "manifest.json").read_bytes())
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    scoring = [manifest["sha256"][name] for name in FILES[:6]]
    manifest["model_version"] = hashlib.sha256(b"".join(map(bytes.fromhex, scoring))).hexdigest()[:12]
    (directory / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(directory: Path, **entries: object) -> None:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_text(json.dumps(manifest | entries))


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


# ---- round trip ----------------------------------------------------------------------------------


def test_a_bundle_holds_its_files_and_no_others(bundle_uri):
    assert sorted(path.name for path in Path(bundle_uri).iterdir()) == sorted([*FILES, "manifest.json"])


def test_a_loaded_bundle_is_the_saved_one(bundle, bundle_uri):
    loaded = load_bundle(bundle_uri)
    assert loaded.schema == bundle.schema
    assert loaded.config == bundle.config
    assert loaded.threshold == bundle.threshold
    assert loaded.card == bundle.card
    assert loaded.history == bundle.history
    assert loaded.golden.equals(bundle.golden)
    for name, column in bundle.statistics.columns.items():
        theirs = loaded.statistics.columns[name]
        assert (theirs.num_rows, theirs.num_missing) == (column.num_rows, column.num_missing)
    levels = loaded.statistics.columns["color"].most_frequent()
    assert levels == bundle.statistics.columns["color"].most_frequent()
    assert loaded.calibration.settings() == bundle.calibration.settings()
    np.testing.assert_array_equal(loaded.noise, bundle.noise)
    for mine, theirs in [(loaded.weights, bundle.weights), (loaded.calibration.arrays(), bundle.calibration.arrays())]:
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], strict=True)


def test_the_manifest_says_format_version_and_hashes(bundle, bundle_uri):
    manifest = read_manifest(bundle_uri)
    assert manifest["format"] == 1
    assert manifest["model_version"] == bundle.model_version
    assert manifest["sha256"] == {
        name: hashlib.sha256((Path(bundle_uri) / name).read_bytes()).hexdigest() for name in FILES
    }


def test_a_loaded_bundle_saves_the_same_bytes(bundle_uri, tmp_path):
    load_bundle(bundle_uri).save(str(tmp_path / "again"))
    for name in set(FILES) - {"statistics.json"}:  # a sketch of levels writes them in any order
        assert (tmp_path / "again" / name).read_bytes() == (Path(bundle_uri) / name).read_bytes(), name


def test_every_json_file_is_strict_json(bundle_uri):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for path in Path(bundle_uri).glob("*.json"):
        json.loads(path.read_bytes(), parse_constant=refuse)


def test_loading_and_inspecting_need_no_tensorflow(bundle_uri):
    program = (
        "import sys, vae_model\n"
        "bundle = vae_model.load_bundle(sys.argv[1])\n"
        "bundle.model_version, bundle.calibration.p_values([1.0])\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules), 'loaded'\n"
    )
    subprocess.run([sys.executable, "-c", program, bundle_uri], check=True, timeout=60)


def test_golden_rows_verify(bundle_uri):
    load_bundle(bundle_uri).verify()


# ---- the version ---------------------------------------------------------------------------------


def variants(bundle: Bundle) -> dict[str, Bundle]:
    weights = dict(bundle.weights)
    weights["z_mean/bias"] = weights["z_mean/bias"] + np.float32(1e-3)
    feature = dataclasses.replace(bundle.schema.features[0], mean=0.5)
    schema = dataclasses.replace(bundle.schema, features=(feature, *bundle.schema.features[1:]))
    calibration = dataclasses.replace(bundle.calibration, scores=bundle.calibration.scores + np.float32(1))
    return {
        "weights": dataclasses.replace(bundle, weights=weights),
        "noise": dataclasses.replace(bundle, noise=-bundle.noise),
        "threshold": dataclasses.replace(bundle, threshold=Threshold(1.0, "fixed")),
        "schema": dataclasses.replace(bundle, schema=schema),
        "calibration": dataclasses.replace(bundle, calibration=calibration),
        "config": dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, background=1e-3)),
        "card": dataclasses.replace(bundle, card={"created": "later"}),
        "history": dataclasses.replace(bundle, history=[]),
        "golden": dataclasses.replace(bundle, golden=bundle.golden.slice(0, 2)),
    }


@pytest.mark.parametrize("part", ["weights", "noise", "threshold", "schema", "calibration", "config"])
def test_the_version_changes_with_what_scoring_uses(bundle, part):
    assert variants(bundle)[part].model_version != bundle.model_version


@pytest.mark.parametrize("part", ["card", "history", "golden"])
def test_the_version_does_not_change_with_the_rest(bundle, part):
    assert variants(bundle)[part].model_version == bundle.model_version


def test_rows_carry_the_version(bundle, mixed_table):
    assert bundle.score(mixed_table.slice(0, 3)).column("model_version").to_pylist() == [bundle.model_version] * 3


# ---- writing over ----------------------------------------------------------------------------------


def test_a_bundle_is_not_overwritten_by_accident(bundle, copy):
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(FileExistsError, match="copy: already exists"):
        variants(bundle)["threshold"].save(str(copy))
    assert (copy / "manifest.json").read_bytes() == before


def test_a_bundle_is_overwritten_on_purpose(bundle, copy):
    variant = variants(bundle)["threshold"]
    variant.save(str(copy), overwrite=True)
    assert load_bundle(str(copy)).model_version == variant.model_version
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("content", [{}, {"notes.txt": "mine"}, {"manifest.json": '{"name": "a web page"}'}])
def test_a_directory_that_is_no_bundle_is_never_overwritten(bundle, tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match="is not a bundle, so it will not be overwritten"):
        bundle.save(str(tmp_path), overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


def test_a_file_is_never_overwritten(bundle, tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(FileExistsError, match="mine: is not a bundle"):
        bundle.save(str(tmp_path / "mine"), overwrite=True)
    assert (tmp_path / "mine").read_text() == "text"


def test_a_save_that_fails_leaves_nothing(bundle, tmp_path, monkeypatch):
    def no_space(path: Path, data: bytes) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        bundle.save(str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_keeps_the_bundle_that_was_there(bundle, copy, monkeypatch):
    def no_space(path: Path, data: bytes) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", no_space)
        with pytest.raises(OSError, match="No space left"):
            variants(bundle)["weights"].save(str(copy), overwrite=True)
    assert load_bundle(str(copy)).model_version == bundle.model_version


def test_parent_directories_are_made(bundle, tmp_path):
    bundle.save(str(tmp_path / "a" / "b"))
    assert load_bundle(str(tmp_path / "a" / "b")).model_version == bundle.model_version


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"copy: {name} was changed after it was written"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"{name} was changed"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"copy: {name} is missing"):
        load_bundle(str(copy))


def test_a_flipped_bit_anywhere_in_the_manifest_is_found_or_harmless(bundle, copy):
    content = (copy / "manifest.json").read_bytes()
    refused = []
    for i in range(0, len(content), 7):
        (copy / "manifest.json").write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            assert load_bundle(str(copy)).model_version == bundle.model_version
        except BundleError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(any(name in text for name in [*FILES, "manifest.json", "bundle format"]) for text in refused)


def test_no_manifest_is_no_bundle(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"copy: no bundle there \(manifest.json is missing\)"):
        load_bundle(str(copy))


def test_a_half_written_directory_is_no_bundle(copy):
    for name in ["manifest.json", *FILES[4:]]:
        (copy / name).unlink()
    with pytest.raises(BundleError, match="no bundle there"):
        load_bundle(str(copy))


def test_no_directory_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="nowhere: no bundle there"):
        load_bundle(str(tmp_path / "nowhere"))


def test_a_file_is_no_bundle(tmp_path):
    (tmp_path / "model.keras").write_text("")
    with pytest.raises(BundleError, match=r"model\.keras: no bundle there"):
        load_bundle(str(tmp_path / "model.keras"))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_manifest_that_is_not_json_is_refused(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not JSON"):
        load_bundle(str(copy))


@pytest.mark.parametrize("content", [b"[]", b"3", b"{}", b'{"format": 1, "sha256": ["schema.json"]}'])
def test_a_manifest_that_lists_no_files_is_refused(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json lists no files"):
        load_bundle(str(copy))


@pytest.mark.parametrize("number", [2, 0, None, "1"])
def test_another_format_is_refused(copy, number):
    edit_manifest(copy, format=number)
    with pytest.raises(BundleError, match=f"expected bundle format 1, got {number!r}"):
        load_bundle(str(copy))


@pytest.mark.parametrize("version", [None, "000000000000"])
def test_a_version_that_is_not_that_of_the_files_is_refused(copy, version):
    edit_manifest(copy, model_version=version)
    with pytest.raises(BundleError, match=rf"manifest\.json names version {version}, the files are"):
        load_bundle(str(copy))


def test_a_file_that_the_manifest_does_not_list_is_refused(copy):
    hashes = read_manifest(str(copy))["sha256"]
    del hashes["noise.npy"]
    edit_manifest(copy, sha256=hashes)
    with pytest.raises(BundleError, match=r"manifest\.json does not list noise\.npy"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", ["../secret", "a/../../b", "/etc/passwd", "..", "a\\b", ""])
def test_names_that_lead_elsewhere_are_refused(copy, name):
    hashes = read_manifest(str(copy))["sha256"]
    edit_manifest(copy, sha256=hashes | {name: "0" * 64})
    with pytest.raises(BundleError, match="which is no plain file name"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", ["weights.npz", "calibration.npz"])
def test_pickled_arrays_are_refused(copy, name):
    forge(copy, name, npz(weights=np.array([print, {}], object)))
    with pytest.raises(BundleError, match=rf"copy: {name} cannot be read: .*pickle"):
        load_bundle(str(copy))


def test_pickled_noise_is_refused(copy):
    stream = io.BytesIO()
    np.save(stream, np.array([print], object))
    forge(copy, "noise.npy", stream.getvalue())
    with pytest.raises(BundleError, match=r"noise\.npy cannot be read: .*pickle"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("history.csv", "report.html")])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"[1]"])
def test_a_file_of_something_else_is_refused_by_name(copy, name, content):
    forge(copy, name, content)
    with pytest.raises(BundleError, match=f"copy: {name} cannot be read"):
        load_bundle(str(copy))


def test_an_unknown_setting_of_the_network_is_refused(bundle, copy):
    forge(copy, "model.json", json.dumps(bundle.config.to_json() | {"run": "rm"}).encode())
    with pytest.raises(BundleError, match=r"model\.json cannot be read: .*run"):
        load_bundle(str(copy))


def test_a_kind_of_feature_that_does_not_exist_is_refused(bundle, copy):
    values = bundle.schema.to_json()
    values["features"][0]["kind"] = "os.system"
    forge(copy, "schema.json", json.dumps(values).encode())
    with pytest.raises(BundleError, match=r"schema\.json cannot be read: .*os\.system"):
        load_bundle(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"extra": np.zeros(3)}, "extra are in one only"),
        (lambda w: {k: v for k, v in w.items() if k != "z_mean/bias"}, "z_mean/bias are in one only"),
        (lambda w: w | {"z_mean/bias": np.zeros(7, np.float32)}, r"z_mean/bias: expected shape \(4,\), got \(7,\)"),
        (lambda w: w | {"z_mean/bias": np.zeros(1, np.float32)}, r"z_mean/bias: expected shape \(4,\), got \(1,\)"),
    ],
)
def test_weights_of_another_network_are_refused(bundle, copy, mixed_table, change, message):
    forge(copy, "weights.npz", npz(**change(bundle.weights)))
    with pytest.raises(BundleError, match=rf"weights\.npz: .*{message}"):
        load_bundle(str(copy)).score(mixed_table.slice(0, 1))


@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 1)])
def test_noise_of_another_width_is_refused(bundle, mixed_table, shape):
    with pytest.raises(BundleError, match=r"noise\.npy: expected shape \(samples, 4\), got"):
        dataclasses.replace(bundle, noise=np.zeros(shape, np.float32)).score(mixed_table.slice(0, 1))


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_golden_rows_that_score_otherwise_are_found(bundle, value):
    weights = dict(bundle.weights)
    weights["z_mean/bias"] = weights["z_mean/bias"] + np.float32(value)
    with pytest.raises(BundleError, match=r"golden row \d+ scores .* here, expected .* as at training time"):
        dataclasses.replace(bundle, weights=weights).verify()


# ---- score -----------------------------------------------------------------------------------------


def test_score_columns_follow_the_input_columns(bundle, mixed_table):
    scored = bundle.score(mixed_table.slice(10, 50))
    assert scored.column_names == mixed_table.column_names + ADDED
    assert scored.select(mixed_table.column_names).equals(mixed_table.slice(10, 50))
    assert [scored.schema.field(name).type for name in ADDED] == [pa.float32(), pa.float32(), pa.bool_(), pa.string()]


def test_reasons_stand_before_the_version(bundle, mixed_table):
    names = bundle.score(mixed_table.slice(0, 2), reasons=1).column_names
    assert names[-5:] == [*ADDED[:3], "anomaly_reasons", "model_version"]
    assert names[-5:] == [item.name for item in score_fields(reasons=1)]


def test_rows_are_anomalies_exactly_where_p_is_at_most_the_rate(bundle, make_table):
    table = make_table(3000, seed=4)
    scored = bundle.score(table.set_column(0, "length", pa.array(np.linspace(5, 20, 3000))))
    p = scored.column("anomaly_p_value").to_numpy()
    label = scored.column("is_anomaly").to_numpy()
    np.testing.assert_array_equal(label, p <= 0.01)
    assert 0 < label.sum() < 3000


def test_a_threshold_by_hand_replaces_the_bundles(bundle, mixed_table):
    scored = bundle.score(mixed_table, threshold=15.0)
    score, label = scored.column("anomaly_score").to_numpy(), scored.column("is_anomaly").to_numpy()
    np.testing.assert_array_equal(label, score >= 15)
    assert label.sum() != bundle.score(mixed_table).column("is_anomaly").to_numpy().sum()


def test_a_data_frame_comes_back_with_its_index_and_types(bundle, mixed_table):
    frame = mixed_table.slice(0, 30).to_pandas().assign(note=range(30)).set_index("id")
    frame["count"] = frame["count"].astype("Int16")
    scored = bundle.score(frame)
    assert isinstance(scored, pd.DataFrame)
    pd.testing.assert_frame_equal(scored[frame.columns], frame)
    assert list(scored.columns) == [*frame.columns, *ADDED]
    assert list(scored.dtypes[ADDED[:3]]) == [np.float32, np.float32, bool]


@pytest.mark.parametrize(
    "index",
    [
        pd.Index([5] * 6, name="again"),
        pd.MultiIndex.from_product([["a", "b"], [1, 2, 3]]),
        pd.date_range("2025", periods=6),
        pd.Index([None, "x", None, "y", "z", "z"]),
    ],
    ids=["repeated", "multi", "dates", "with nulls"],
)
def test_any_index_is_kept(bundle, mixed_table, index):
    frame = mixed_table.slice(0, 6).to_pandas().set_index(index)
    scored = bundle.score(frame)
    pd.testing.assert_index_equal(scored.index, index)
    np.testing.assert_array_equal(
        scored["anomaly_score"], bundle.score(mixed_table.slice(0, 6)).column("anomaly_score").to_numpy()
    )


def test_a_record_batch_is_a_table(bundle, mixed_table):
    batch = mixed_table.slice(0, 9).combine_chunks().to_batches()[0]
    assert bundle.score(batch).equals(bundle.score(mixed_table.slice(0, 9)))


def test_other_things_are_refused(bundle):
    with pytest.raises(ValueError, match="data: expected an Arrow table or a DataFrame, got list"):
        bundle.score([{"length": 1.0}])


@pytest.mark.parametrize("as_frame", [False, True])
def test_no_rows_are_no_rows(bundle, mixed_table, as_frame):
    empty = mixed_table.slice(0, 0)
    scored = bundle.score(empty.to_pandas() if as_frame else empty)
    assert len(scored) == 0
    if not as_frame:
        assert scored.schema == pa.schema([*mixed_table.schema, *score_fields()])


def test_columns_that_clash_are_refused(bundle, mixed_table):
    table = mixed_table.slice(0, 2).append_column("is_anomaly", pa.array([True, False]))
    with pytest.raises(ValueError, match="is_anomaly: the input has such a column already; choose a prefix"):
        bundle.score(table)


def test_a_prefix_resolves_a_clash(bundle, mixed_table):
    once = bundle.score(mixed_table.slice(0, 4))
    twice = bundle.score(once, prefix="second_")
    assert twice.column_names[-4:] == [f"second_{name}" for name in ADDED]
    assert twice.column("second_anomaly_score").equals(once.column("anomaly_score"))


def test_a_column_that_clashes_only_with_reasons_is_fine_without_them(bundle, mixed_table):
    table = mixed_table.slice(0, 2).append_column("anomaly_reasons", pa.array(["a", "b"]))
    assert bundle.score(table).num_rows == 2
    with pytest.raises(ValueError, match="anomaly_reasons: the input has such a column"):
        bundle.score(table, reasons=1)


# ---- rows that do not fit ----------------------------------------------------------------------------


def with_bad_cells(table: pa.Table) -> pa.Table:
    """Rows 1 and 3 with an infinite length, row 4 with a word for a count, row 5 with one for a time."""
    length = table.column("length").to_numpy().copy()
    length[[1, 3]] = np.inf
    count = [str(v) for v in table.column("count").to_pylist()]
    count[4] = "many"
    seen_at = [str(v) for v in table.column("seen_at").to_pylist()]
    seen_at[5] = "yesterday"
    for name, cells in {"length": length, "count": count, "seen_at": seen_at}.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(cells))
    return table


def test_every_offending_column_is_named_with_its_count(bundle, mixed_table):
    with pytest.raises(RecordError) as caught:
        bundle.score(with_bad_cells(mixed_table.slice(0, 10)))
    assert str(caught.value) == (
        "4 of 10 rows do not fit: length: expected a finite number, got an infinite one (2 rows); "
        "count: expected a number, got 'many' (1 rows); seen_at: expected a time, got 'yesterday' (1 rows). "
        "First rows: 1, 3, 4"
    )


def test_a_reason_is_counted_over_all_chunks(bundle, mixed_table, monkeypatch):
    monkeypatch.setattr(bundle_module, "CHUNK_ROWS", 8)
    bad = with_bad_cells(mixed_table.slice(0, 10))
    scored, rejects = bundle.split(pa.concat_tables([bad, bad, bad]))
    assert [tuple(reason)[:2] for reason in rejects.reasons] == [
        ("length", "not_finite"),
        ("count", "wrong_type"),
        ("seen_at", "wrong_type"),
    ]
    assert np.flatnonzero(rejects.codes).tolist() == [1, 3, 4, 5, 11, 13, 14, 15, 21, 23, 24, 25]
    assert rejects.table().column("column").to_pylist() == ["length", "length", "count", "seen_at"] * 3
    assert "length: expected a finite number, got an infinite one (6 rows)" in rejects.summary()
    assert scored.num_rows == 18


def test_split_scores_the_rows_that_fit(bundle, mixed_table):
    table = mixed_table.slice(0, 10)
    scored, rejects = bundle.score(with_bad_cells(table), errors="split")
    expected = bundle.score(table.take(pa.array([0, 2, 6, 7, 8, 9])))
    assert scored.column("id").equals(expected.column("id"))
    np.testing.assert_allclose(scored.column("anomaly_score"), expected.column("anomaly_score"), rtol=1e-5)
    assert np.flatnonzero(rejects.codes).tolist() == [1, 3, 4, 5]


def test_split_keeps_the_index_of_a_data_frame(bundle, mixed_table):
    frame = with_bad_cells(mixed_table.slice(0, 10)).to_pandas()
    frame.index = [f"row {i}" for i in range(10)]
    scored, rejects = bundle.score(frame, errors="split")
    assert list(scored.index) == [f"row {i}" for i in (0, 2, 6, 7, 8, 9)]
    assert scored["anomaly_score"].notna().all()
    assert len(rejects) == 4


def test_split_explains_the_rows_that_fit(bundle, mixed_table):
    scored, _ = bundle.split(with_bad_cells(mixed_table.slice(0, 10)), reasons=1)
    whole = bundle.score(mixed_table.slice(0, 10).take(pa.array([0, 2, 6, 7, 8, 9])), reasons=1)
    features = [row[0]["feature"] for row in scored.column("anomaly_reasons").to_pylist()]
    assert features == [row[0]["feature"] for row in whole.column("anomaly_reasons").to_pylist()]


def test_rows_that_all_fail_leave_an_empty_table(bundle, mixed_table):
    table = mixed_table.slice(0, 3).set_column(0, "length", pa.array([np.inf] * 3))
    scored, rejects = bundle.split(table, reasons=2)
    assert (scored.num_rows, len(rejects)) == (0, 3)
    assert scored.schema.names[-5:] == [item.name for item in score_fields(reasons=2)]


def test_all_missing_columns_are_named(bundle, mixed_table):
    with pytest.raises(RecordError, match="price: expected one such column, got none; size: expected one such column"):
        bundle.score(mixed_table.slice(0, 5).drop_columns(["size", "price"]))


def test_columns_that_the_model_does_not_read_may_be_absent(bundle, mixed_table):
    bundle.score(mixed_table.slice(0, 5).drop_columns(["id"]))


def test_a_repeated_column_is_refused(bundle, mixed_table):
    table = mixed_table.slice(0, 5).append_column("price", pa.array(np.ones(5)))
    with pytest.raises(RecordError, match="price: expected one such column, got 2"):
        bundle.score(table)


def test_an_unknown_way_with_errors_is_refused(bundle, mixed_table):
    with pytest.raises(ValueError, match="errors: expected 'raise' or 'split', got 'ignore'"):
        bundle.score(mixed_table, errors="ignore")


def test_terms_of_rows_that_do_not_fit_are_refused(bundle, mixed_table):
    with pytest.raises(RecordError, match="length: expected a finite number"):
        bundle.terms(with_bad_cells(mixed_table.slice(0, 10)))


CELL = st.one_of(
    st.none(), st.sampled_from(["1.5", "-3", "inf", "nan", "x", "", "2025-01-01", "1e999", "true"]), st.text(max_size=3)
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.fixed_dictionaries({"length": CELL, "count": CELL, "seen_at": CELL, "color": CELL, "unit": CELL}),
        max_size=12,
    ),
    st.sets(st.sampled_from(["weight", "size", "site"]), max_size=1),
)
def test_every_row_is_scored_or_rejected(bundle, mixed_table, rows, dropped):
    table = mixed_table.slice(0, len(rows)).drop_columns(list(dropped))
    for name in ("length", "count", "seen_at", "color", "unit"):
        cells = pa.array([row[name] for row in rows], pa.string())
        table = table.set_column(table.column_names.index(name), name, cells)
    scored, rejects = bundle.split(table)
    assert scored.num_rows + len(rejects) == len(rows)
    assert scored.column("id").to_pylist() == table.filter(pa.array(rejects.keep)).column("id").to_pylist()
    assert np.isfinite(scored.column("anomaly_score").to_numpy()).all()
    letters = rejects.table()
    assert letters.column("row").to_pylist() == np.flatnonzero(~rejects.keep).tolist()
    for i, column in zip(letters.column("row").to_pylist(), letters.column("column").to_pylist(), strict=True):
        assert column in dropped or rows[i][column] is not None


# ---- tables larger than memory ---------------------------------------------------------------------


def test_tables_of_any_size_are_scored_in_steady_chunks(bundle, mixed_table, monkeypatch):
    monkeypatch.setattr(bundle_module, "CHUNK_ROWS", 300)
    tables = (mixed_table.slice(start, size) for start, size in [(0, 1000), (1000, 0), (1000, 10), (1010, 290)])
    parts = [scored for scored, _ in bundle.score_tables(tables)]
    assert [part.num_rows for part in parts] == [300, 300, 300, 100, 10, 290]
    whole = bundle.score(mixed_table.slice(0, 1300))
    joined = pa.concat_tables(parts)
    assert joined.column("id").equals(whole.column("id"))
    np.testing.assert_allclose(joined.column("anomaly_score"), whole.column("anomaly_score"), rtol=1e-4)

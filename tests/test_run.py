import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline import run as job
from pipeline.run import DeadLetterLimitError, refuse_unknown_flags, run, runner_of


@pytest.fixture
def source(mixed_table, tmp_path):
    """A folder with the first 600 rows in two Parquet files."""
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(mixed_table.slice(0, 400), folder / "a.parquet", row_group_size=150)
    pq.write_table(mixed_table.slice(400, 200), folder / "b.parquet")
    return folder


def flags(source, bundle_uri, tmp_path, *more, **others) -> list[str]:
    options = {"input": f"{source}/*.parquet", "output": tmp_path / "out", "bundle": bundle_uri} | others
    return [f"--{name}={value}" for name, value in options.items()] + ["--runner=FnApiRunner", *more]


def test_a_parquet_job_scores_every_row_as_python_does(source, bundle, bundle_uri, mixed_table, tmp_path):
    summary = run(flags(source, bundle_uri, tmp_path))
    scored = pq.read_table(tmp_path / "out").sort_by("id")
    alone = bundle.score(mixed_table.slice(0, 600)).sort_by("id")
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (600, 600, 0)
    assert scored.column_names == alone.column_names
    terms = bundle.terms(mixed_table.slice(0, 600).sort_by("id"))
    tolerance = 1e-4 * (1 + terms.abs().to_numpy().sum(axis=1))
    difference = scored["anomaly_score"].to_numpy() - alone["anomaly_score"].to_numpy()
    assert (np.abs(difference) <= tolerance).all()
    assert summary.num_anomalies == sum(scored["is_anomaly"].to_pylist())


@pytest.mark.parametrize("output_format", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("input_format", ["csv", "jsonl"])
def test_text_in_scores_as_parquet_does(input_format, output_format, mixed_table, bundle, bundle_uri, tmp_path):
    table = mixed_table.slice(0, 200)
    frame = table.to_pandas()
    path = tmp_path / f"in.{input_format}"
    if input_format == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True, date_format="iso", date_unit="us", double_precision=15)
    summary = run(flags(None, bundle_uri, tmp_path, input=path, output_format=output_format, id_columns="id"))
    (written,) = (tmp_path / "out").glob(f"scored-*.{output_format}")
    if output_format == "parquet":
        found = pq.read_table(written).to_pandas()
    elif output_format == "csv":
        found = pd.read_csv(written)
    else:
        found = pd.read_json(written, lines=True, dtype=False)
    expected = bundle.score(table).to_pandas().set_index("id")["anomaly_score"]
    assert summary.num_scored == 200
    assert list(found.columns) == ["id", "anomaly_score", "anomaly_p_value", "is_anomaly", "model_version"]
    np.testing.assert_allclose(found.set_index("id")["anomaly_score"][expected.index], expected, rtol=1e-3, atol=1e-2)


def test_bad_cells_and_lines_of_a_csv_file_become_dead_letters(mixed_table, bundle_uri, tmp_path):
    path = tmp_path / "in.csv"
    frame = mixed_table.slice(0, 100).to_pandas().astype({"length": object})
    frame.loc[3, "length"] = "tall"
    frame.loc[4, "length"] = "inf"
    frame.to_csv(path, index=False)
    with path.open("a") as file:
        file.write("only,three,fields\n")
    summary = run(flags(None, bundle_uri, tmp_path, input=path))
    letters = {item["error_type"]: item for item in pq.read_table(tmp_path / "out/_dead_letters").to_pylist()}
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (101, 98, 3)
    assert set(letters) == {"wrong_type", "not_finite", "malformed_line"}
    assert letters["wrong_type"]["error"] == "length: expected double, got 'tall'"
    assert json.loads(letters["wrong_type"]["payload"])["length"] == "tall"
    assert letters["not_finite"]["source"] == str(path)
    assert letters["malformed_line"]["payload"] == "only,three,fields"


def test_a_truncated_parquet_file_is_one_letter_and_the_others_are_scored(source, bundle_uri, tmp_path):
    (source / "c.parquet").write_bytes((source / "b.parquet").read_bytes()[:500])
    summary = run(flags(source, bundle_uri, tmp_path, max_dead_letter_fraction=0.5))
    (letter,) = pq.read_table(tmp_path / "out/_dead_letters").to_pylist()
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (601, 600, 1)
    assert letter["num_records"] is None
    assert letter["source"].endswith("c.parquet")


def test_a_later_file_without_a_feature_goes_to_the_dead_letters(source, bundle_uri, mixed_table, tmp_path):
    pq.write_table(mixed_table.slice(600, 50).drop_columns(["weight"]), source / "c.parquet")
    summary = run(flags(source, bundle_uri, tmp_path))
    letters = pq.read_table(tmp_path / "out/_dead_letters")
    assert (summary.num_scored, summary.num_dead_letters) == (600, 50)
    assert set(letters["error"].to_pylist()) == {"weight: the table has no such column"}


def test_too_many_dead_letters_fail_the_job_in_words(source, bundle_uri, mixed_table, tmp_path):
    pq.write_table(mixed_table.slice(600, 300).drop_columns(["weight"]), source / "c.parquet")
    with pytest.raises(
        DeadLetterLimitError, match=r"300 of 900 records could not be scored, more than .* = 0\.1 allows"
    ):
        run(flags(source, bundle_uri, tmp_path))
    assert pq.read_table(tmp_path / "out/_dead_letters").num_rows == 300
    assert run(flags(source, bundle_uri, tmp_path, "--overwrite", max_dead_letter_fraction=0.5)).num_dead_letters == 300


def test_an_input_that_does_not_fit_is_refused_before_anything_runs(source, bundle_uri, mixed_table, tmp_path):
    for name in ("a", "b"):
        pq.write_table(mixed_table.drop_columns(["weight"]), source / f"{name}.parquet")
    with pytest.raises(ValueError, match="weight: expected one such column, got none"):
        run(flags(source, bundle_uri, tmp_path))
    assert not (tmp_path / "out").exists()


def test_output_that_is_there_is_refused_and_replaced_on_purpose(source, bundle_uri, tmp_path):
    run(flags(source, bundle_uri, tmp_path))
    with pytest.raises(FileExistsError, match=r"is there already \(2 files in all\); choose"):
        run(flags(source, bundle_uri, tmp_path))
    stale = tmp_path / "out/scored-00005-of-00009.parquet"
    stale.write_bytes(b"of an earlier run with more shards")
    run(flags(source, bundle_uri, tmp_path, "--overwrite"))
    assert not stale.exists()
    assert pq.read_table(tmp_path / "out").num_rows == 600


def test_a_rerun_writes_the_same_bytes(source, bundle_uri, tmp_path):
    run(flags(source, bundle_uri, tmp_path, output=tmp_path / "first"))
    run(flags(source, bundle_uri, tmp_path, output=tmp_path / "second"))
    first, second = (sorted((tmp_path / name).glob("*.parquet")) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_reasons_threshold_and_prefix_reach_the_output(source, bundle_uri, tmp_path):
    run(flags(source, bundle_uri, tmp_path, reasons=2, threshold=-1e9, score_prefix="x_", columns="id,length"))
    scored = pq.read_table(tmp_path / "out")
    assert scored.column_names[:3] == ["id", "length", "x_anomaly_score"]
    assert all(scored["x_is_anomaly"].to_pylist())
    assert {len(reasons) for reasons in scored["x_anomaly_reasons"].to_pylist()} == {2}


def test_dead_letters_go_where_they_are_told(source, bundle_uri, tmp_path):
    place = tmp_path / "letters.jsonl"
    run(flags(source, bundle_uri, tmp_path, dead_letters=place))
    assert list(tmp_path.glob("letters-*.jsonl"))


@pytest.mark.parametrize("missing", ["input", "output", "bundle"])
def test_missing_flags_are_named(missing, source, bundle_uri, tmp_path):
    given = [flag for flag in flags(source, bundle_uri, tmp_path) if not flag.startswith(f"--{missing}=")]
    with pytest.raises(ValueError, match=f"missing --{missing}; see --help"):
        run(given)


def test_no_matching_file_is_refused_at_launch(bundle_uri, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no parquet file matches"):
        run(flags(tmp_path, bundle_uri, tmp_path))


def test_a_misspelt_flag_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"--reason: neither .* did you mean --reasons"):
        refuse_unknown_flags(["--reason=3"])


def test_beam_flags_pass():
    refuse_unknown_flags(["--runner=DataflowRunner", "--project=p", "--temp_location", "gs://b/t", "--streaming"])


def test_the_runner_is_known_before_beam_starts():
    assert runner_of(["--runner=DataflowRunner"]) == "DataflowRunner"
    assert runner_of([]) == "DirectRunner"


def test_no_flag_of_ours_is_one_of_beams():
    from apache_beam.options.pipeline_options import PipelineOptions

    PipelineOptions([]).get_all_options()  # raises when two classes declare one flag
    assert job.ScoringOptions in PipelineOptions.__subclasses__()


def test_an_empty_input_gives_an_empty_output_with_its_schema(mixed_table, bundle_uri, tmp_path):
    pq.write_table(mixed_table.slice(0, 0), tmp_path / "none.parquet")
    summary = run(flags(None, bundle_uri, tmp_path, input=tmp_path / "none.parquet"))
    assert summary.num_records == 0
    scored = pq.read_table(tmp_path / "out")
    assert scored.num_rows == 0
    assert scored.schema.field("anomaly_score").type == pa.float32()


def test_a_job_never_deletes_its_own_input(source, bundle_uri, tmp_path):
    run(flags(source, bundle_uri, tmp_path, output=source))
    before = sorted(source.iterdir())
    with pytest.raises(ValueError, match="is both input and output"):
        run(flags(source, bundle_uri, tmp_path, "--overwrite", output=source, score_prefix="x_"))
    assert sorted(source.iterdir()) == before


def test_dead_letters_of_an_earlier_job_are_not_replaced_unasked(source, bundle_uri, tmp_path):
    place = tmp_path / "letters"
    run(flags(source, bundle_uri, tmp_path, output=tmp_path / "first", dead_letters=place))
    with pytest.raises(FileExistsError, match=f"{place}/dead_letters-00000-of-00001.parquet: is there already"):
        run(flags(source, bundle_uri, tmp_path, output=tmp_path / "second", dead_letters=place))


def test_output_of_another_format_is_not_left_beside(source, bundle_uri, tmp_path):
    run(flags(source, bundle_uri, tmp_path))
    with pytest.raises(FileExistsError):
        run(flags(source, bundle_uri, tmp_path, output_format="csv"))
    run(flags(source, bundle_uri, tmp_path, "--overwrite", output_format="csv"))
    assert {path.suffix for path in (tmp_path / "out").iterdir() if path.is_file()} == {".csv"}


def test_a_failed_rerun_leaves_the_earlier_output(source, bundle_uri, mixed_table, tmp_path):
    other = tmp_path / "other.parquet"
    pq.write_table(mixed_table.drop_columns(["weight"]), other)
    run(flags(source, bundle_uri, tmp_path))
    with pytest.raises(ValueError, match="expected one such column"):
        run(flags(None, bundle_uri, tmp_path, "--overwrite", input=other))
    assert pq.read_table(tmp_path / "out").num_rows == 600


def test_many_unreadable_files_fail_the_job(source, bundle_uri, tmp_path):
    for i in range(3):
        (source / f"c{i}.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DeadLetterLimitError, match="3 of 5 files could not be read"):
        run(flags(source, bundle_uri, tmp_path))


def test_files_of_wider_types_are_scored(source, bundle_uri, mixed_table, tmp_path):
    later = mixed_table.slice(600, 100)
    place = later.schema.get_field_index("count")
    later = later.set_column(place, "count", later["count"].cast(pa.float64()))
    pq.write_table(later, source / "c.parquet")
    summary = run(flags(source, bundle_uri, tmp_path))
    assert (summary.num_scored, summary.num_dead_letters) == (700, 0)


def test_strange_numbers_in_text_are_anomalies_and_not_dead_letters(make_table, tmp_path):
    from vae_model import TrainingConfig, VAEConfig, fit

    table = make_table(1200, 5).select(["length", "weight", "count"])
    table = table.set_column(2, "count", table["count"].cast(pa.int8()))
    fit(table, VAEConfig(hidden_dims=(16,), latent_dim=2), TrainingConfig(max_steps=200), output=str(tmp_path / "b"))
    (tmp_path / "in.csv").write_text("zip,length,weight,count\n00123,10,30,450\n00007,10,30,1\n")
    summary = run(flags(None, str(tmp_path / "b"), tmp_path, input=tmp_path / "in.csv"))
    assert (summary.num_scored, summary.num_dead_letters) == (2, 0)
    (written,) = (tmp_path / "out").glob("scored*")
    found = pd.read_csv(written, dtype={"zip": str})
    assert found["zip"].tolist() == ["00123", "00007"]
    assert found["is_anomaly"].tolist() == [True, False]


def test_the_account_says_why_records_were_set_aside(mixed_table, bundle_uri, tmp_path):
    values = mixed_table["length"].slice(0, 50).to_numpy().copy()
    values[:2] = np.inf
    pq.write_table(mixed_table.slice(0, 50).set_column(0, "length", pa.array(values)), tmp_path / "in.parquet")
    summary = run(flags(None, bundle_uri, tmp_path, input=tmp_path / "in.parquet"))
    assert summary.reasons == {"not_finite": 2}
    assert summary.num_unaccounted == 0


def test_dataflow_needs_a_bundle_that_its_workers_can_read(source, bundle_uri, tmp_path):
    given = [flag for flag in flags(source, bundle_uri, tmp_path) if not flag.startswith("--runner")]
    with pytest.raises(ValueError, match="--bundle: expected a URI that Dataflow's workers can read"):
        run([*given, "--runner=DataflowRunner"])


def test_views_of_text_are_scored(mixed_table, bundle_uri, bundle):
    place = mixed_table.schema.get_field_index("color")
    table = mixed_table.slice(0, 20)
    views = table.set_column(place, "color", table["color"].cast(pa.string_view()))
    assert bundle.score(views, reasons=2)["anomaly_score"].equals(bundle.score(table, reasons=2)["anomaly_score"])

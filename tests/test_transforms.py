import json
import pickle
import tempfile
import uuid
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather

from pipeline.letters import NAMESPACE
from pipeline.models import launch, shared_bundle
from pipeline.transforms import ScoreTables, VAEScoreDoFn
from vae_model.bundle import BundleError


def run(tables, transform):
    """Scored tables and letters of a pipeline over tables, and its counters."""
    scored, letters = [], []
    pipeline = beam.Pipeline(runner="FnApiRunner")
    results = pipeline | beam.Create(tables, reshuffle=False) | transform
    folder = tempfile.mkdtemp()
    for name, output in {"scored": results.scored, "letters": results.dead_letters}.items():
        output | name >> beam.Map(keep, folder, name)
    result = pipeline.run()
    result.wait_until_finish()
    for path in sorted(Path(folder).iterdir()):
        (scored if path.name.startswith("scored") else letters).append(feather.read_table(path))
    counters = {}
    for counter in result.metrics().query()["counters"]:
        if counter.key.metric.namespace == NAMESPACE:
            counters[counter.key.metric.name] = counters.get(counter.key.metric.name, 0) + counter.committed
    return scored, letters, counters


def keep(table: pa.Table, folder: str, name: str) -> None:
    """Writes a table under a name of its own."""
    feather.write_feather(table, f"{folder}/{name}-{uuid.uuid4()}")


def broken(table: pa.Table, bundle, rows: list[int]) -> pa.Table:
    """The table with an infinite number in some rows."""
    name = bundle.schema.numeric[0].name
    values = table.column(name).cast(pa.float64()).to_numpy().copy()
    values[rows] = np.inf
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, from_pandas=True))


def test_a_pipeline_scores_as_python_does(mixed_table, bundle, bundle_uri):
    table = mixed_table.slice(0, 1000)
    scored, letters, _ = run([table.slice(i, 300) for i in range(0, 1000, 300)], ScoreTables(bundle_uri, reasons=2))
    together = pa.concat_tables(scored)
    alone = bundle.score(table, reasons=2)
    assert not letters
    assert together.schema.equals(alone.schema)
    np.testing.assert_allclose(
        np.sort(together["anomaly_score"].to_numpy()), np.sort(alone["anomaly_score"].to_numpy()), rtol=1e-4, atol=1e-3
    )


def test_bad_rows_leave_a_good_table_with_their_payload_and_reason(mixed_table, bundle, bundle_uri):
    table = broken(mixed_table.slice(0, 50), bundle, [7, 20])
    scored, letters, counters = run([table], ScoreTables(bundle_uri))
    assert sum(part.num_rows for part in scored) == 48
    (letter_table,) = letters
    column = bundle.schema.numeric[0].name
    for letter, row in zip(letter_table.to_pylist(), (7, 20), strict=True):
        assert letter["stage"] == "score"
        assert letter["column"] == column
        assert letter["error_type"] == "not_finite"
        assert letter["error"].startswith(f"{column}: expected a finite number")
        assert letter["model_version"] == bundle.model_version
        payload = json.loads(letter["payload"])
        other = bundle.schema.numeric[1].name
        assert payload[other] == pytest.approx(table[other][row].as_py())
    assert counters["num_inferences"] == 48
    assert counters["num_dead_letters"] == 2


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_records_in_are_scored_or_dead_letters(data, mixed_table, bundle, bundle_uri):
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    tables, num_bad = [], 0
    for i, size in enumerate(sizes):
        bad = sorted(data.draw(st.sets(st.integers(0, size - 1)))) if size else []
        table = broken(mixed_table.slice(40 * i, size), bundle, bad)
        drop = data.draw(st.booleans())
        if drop:  # a whole table without a feature
            table = table.drop_columns([bundle.schema.names[-1]])
        num_bad += size if drop else len(bad)
        tables.append(table)
    scored, letters, counters = run(tables, ScoreTables(bundle_uri))
    assert sum(part.num_rows for part in letters) == num_bad == counters.get("num_dead_letters", 0)
    assert sum(part.num_rows for part in scored) == sum(sizes) - num_bad == counters.get("num_inferences", 0)


def test_columns_choose_what_is_carried(mixed_table, bundle_uri):
    score = ScoreTables(bundle_uri, columns=[mixed_table.column_names[0]])
    scored, _, _ = run([mixed_table.slice(0, 10)], score)
    expected = [mixed_table.column_names[0], "anomaly_score", "anomaly_p_value", "is_anomaly", "model_version"]
    assert scored[0].column_names == expected
    assert score.output_schema(mixed_table.schema).equals(scored[0].schema)


def test_an_input_that_does_not_fit_is_refused_at_launch(mixed_table, bundle, bundle_uri):
    name = bundle.schema.numeric[0].name
    with pytest.raises(ValueError, match=f"{name}: expected one such column, got none"):
        ScoreTables(bundle_uri).output_schema(mixed_table.drop_columns([name]).schema)


def test_an_unknown_column_to_carry_is_refused_at_launch(mixed_table, bundle_uri):
    with pytest.raises(ValueError, match="nonsense: named in columns, but the input has only"):
        ScoreTables(bundle_uri, columns=["nonsense"]).output_schema(mixed_table.schema)


def test_a_clash_of_names_is_refused_unless_prefixed(mixed_table, bundle_uri):
    schema = mixed_table.schema.append(pa.field("anomaly_score", pa.float64()))
    with pytest.raises(ValueError, match="anomaly_score: the input has such a column already"):
        ScoreTables(bundle_uri).output_schema(schema)
    assert "x_anomaly_score" in ScoreTables(bundle_uri, prefix="x_").output_schema(schema).names


def test_a_bundle_that_changed_after_launch_is_refused(bundle_uri):
    with pytest.raises(BundleError, match="expected version 000000000000, as at launch"):
        shared_bundle(bundle_uri, "000000000000")


def test_a_process_loads_a_bundle_once(bundle, bundle_uri):
    first = shared_bundle(bundle_uri, bundle.model_version)
    assert shared_bundle(bundle_uri, bundle.model_version) is first


def test_a_pickled_do_fn_scores(mixed_table, bundle, bundle_uri):
    do_fn = pickle.loads(pickle.dumps(VAEScoreDoFn(launch(bundle_uri).source())))
    do_fn.setup()
    (scored,) = list(do_fn.process(mixed_table.slice(0, 5)))
    np.testing.assert_allclose(
        scored["anomaly_score"].to_numpy(), bundle.score(mixed_table.slice(0, 5))["anomaly_score"].to_numpy(), rtol=1e-5
    )


def test_metrics_have_the_names_of_run_inference(mixed_table, bundle_uri):
    pipeline = beam.Pipeline(runner="FnApiRunner")
    scored = pipeline | beam.Create([mixed_table.slice(0, 100)]) | ScoreTables(bundle_uri)
    assert_that(scored.scored | beam.Map(lambda table: table.num_rows), equal_to([100]))
    result = pipeline.run()
    result.wait_until_finish()
    distributions = {
        item.key.metric.name: item.committed
        for item in result.metrics().query()["distributions"]
        if item.key.metric.namespace == NAMESPACE
    }
    assert distributions["inference_request_batch_size"].sum == 100
    assert {"inference_batch_latency_micro_secs", "load_model_latency_milli_secs", "model_byte_size"} <= set(
        distributions
    )

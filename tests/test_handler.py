"""Beam's own tests of a model handler (apache_beam/ml/inference/base_test.py), on ours with a trained bundle.

Those that apply to any handler are here, batched into few pipelines; those of Beam's own parts (the routing of model
copies, garbage collection after timeouts, remote handlers) are not.
"""

import collections
import dataclasses
import json
import logging
import os
import pickle
import typing
import uuid

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.ml.inference.base import (
    KeyedModelHandler,
    KeyModelMapping,
    KeyModelPathMapping,
    MaybeKeyedModelHandler,
    ModelMetadata,
    PredictionResult,
    RunInference,
)
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.utils import multi_process_shared

import pipeline.handler
from pipeline.detector import VAEDetector
from pipeline.handler import VAEModelHandler
from pipeline.letters import NAMESPACE
from vae_model.bundle import BundleError, load_bundle
from vae_model.promotion import promote
from vae_model.tables import RecordError

SCORES = ["anomaly_score", "anomaly_p_value", "is_anomaly", "model_version"]


class Item(typing.NamedTuple):
    length: float
    count: int
    color: str | None


KEPT: dict[str, list] = {}


def keep(element, key):
    KEPT[key].append(element)


class Outcome(typing.NamedTuple):
    """What branches of one pipeline gave, and its counters and distributions by namespace and name."""

    outputs: dict[str, list]
    counters: dict
    distributions: dict


def run(branches) -> Outcome:
    """Runs `branches(p)`, which names PCollections, in one pipeline."""
    p = beam.Pipeline(runner="FnApiRunner")
    keys = {}
    for name, output in branches(p).items():
        keys[name] = uuid.uuid4().hex
        KEPT[keys[name]] = []
        output | f"keep {name}" >> beam.Map(keep, keys[name])
    result = p.run()
    result.wait_until_finish()
    metrics = result.metrics().query()
    found = []
    for kind in ("counters", "distributions"):
        by_name = collections.defaultdict(list)
        for item in metrics[kind]:
            by_name[item.key.metric.namespace, item.key.metric.name].append(item.committed)
        found.append(by_name)
    counters = {key: sum(values) for key, values in found[0].items()}
    return Outcome({name: KEPT.pop(key) for name, key in keys.items()}, counters, found[1])


@pytest.fixture(scope="module", autouse=True)
def _release():
    """Models that Beam shares among processes stay until this one ends, and then the sketches' library complains."""
    yield
    multi_process_shared._process_level_singleton_manager.entries.clear()


@pytest.fixture(scope="module")
def table(make_table) -> pa.Table:
    return make_table(40, seed=3).select(["length", "count", "color"])


@pytest.fixture(scope="module")
def records(table) -> list[dict]:
    return table.to_pylist()


def expected(bundle, table: pa.Table) -> np.ndarray:
    """Scores as Python gives them for these rows."""
    return bundle.score(table)["anomaly_score"].to_numpy()


def scores(results) -> np.ndarray:
    return np.array([result.inference["anomaly_score"] for result in results])


def close(found, wanted) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def versions(results) -> list[str]:
    return [result.model_id for result in results]


# ---- elements ------------------------------------------------------------------------------------


def test_records_of_every_kind_score_as_in_python(first, first_uri, table, records):
    texts = [json.dumps(record).encode() for record in records]
    kinds = {
        "dict": records,
        "row": [beam.Row(**record) for record in records],
        "named tuple": [Item(**record) for record in records],
        "json": texts,
        "text": [text.decode() for text in texts],
        "message": [PubsubMessage(text, {"id": str(i)}) for i, text in enumerate(texts)],
    }

    def branches(p):
        return {
            name: p | name >> beam.Create(elements, reshuffle=False) | f"score {name}" >> RunInference(handler)
            for name, elements in kinds.items()
        }

    handler = VAEModelHandler(first_uri, min_batch_size=100)
    for name, results in run(branches).outputs.items():
        if name != "row":  # which Beam's coder makes a type of its own
            assert [result.example for result in results] == kinds[name]
        close(scores(results), expected(first, table))
        assert all(list(result.inference) == SCORES for result in results)
        assert set(versions(results)) == {first.model_version}


def test_elements_of_many_kinds_may_be_mixed_in_a_batch(first, first_uri, table, records):
    handler = VAEModelHandler(first_uri)
    batch = [table, records[0], json.dumps(records[1]), Item(**records[2]), table.to_batches()[0]]
    results = handler.run_inference(batch, handler.load_model())
    wanted = expected(first, table)
    close(scores(results[1:4]), wanted[:3])
    for result in (results[0], results[4]):
        close(result.inference["anomaly_score"].to_numpy(), wanted)


def test_a_table_has_a_table_of_scores_line_by_line(first, first_uri, table):
    numbers = table["length"].to_numpy().copy()
    numbers[[3, 7]] = np.inf
    broken = table.set_column(0, "length", pa.array(numbers)).append_column("anomaly_score", table["length"])
    handler = VAEModelHandler(first_uri, reasons=1)
    (result,) = handler.run_inference(broken, handler.load_model())
    inference = result.inference
    assert inference.schema.equals(handler.table_schema(reasons=1))
    assert inference.num_rows == table.num_rows
    good = np.delete(np.arange(table.num_rows), [3, 7])
    close(inference["anomaly_score"].to_numpy()[good], expected(first, table)[good])
    for row, line in enumerate(inference.to_pylist()):
        if row in (3, 7):
            assert line["anomaly_score"] is line["is_anomaly"] is line["anomaly_reasons"] is None
            assert (line["column"], line["error_type"]) == ("length", "not_finite")
        else:
            assert line["column"] is line["error_type"] is line["error"] is None
            assert len(line["anomaly_reasons"]) == 1


@pytest.mark.parametrize("names", [[], ["other"], ["length", "count"]])
def test_a_table_without_what_the_model_reads_has_errors_for_every_row(first_uri, table, names):
    handler = VAEModelHandler(first_uri)
    strange = table.append_column("other", table["length"]).select(names)
    (result,) = handler.run_inference([strange], handler.load_model())
    assert result.inference["error_type"].to_pylist() == ["missing_column"] * strange.num_rows


def test_avro_is_read_with_its_schema(first, first_uri, table, records):
    import io

    import fastavro

    fields = [{"name": "length", "type": "double"}, {"name": "count", "type": "long"}]
    schema = {"type": "record", "name": "Item", "fields": [*fields, {"name": "color", "type": ["null", "string"]}]}
    messages = []
    for record in records[:3]:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, schema, record)
        messages.append(stream.getvalue())
    handler = pickle.loads(pickle.dumps(VAEModelHandler(first_uri, avro_schema=json.dumps(schema))))
    results = handler.run_inference([*messages, b"\xff"], handler.load_model())
    close(scores(results[:3]), expected(first, table)[:3])
    assert results[3].inference["error_type"] == "malformed_record"
    (alone,) = handler.run_inference([b"\xff"], handler.load_model())
    assert alone.inference == results[3].inference


# ---- records that cannot be scored -----------------------------------------------------------------


BAD = [
    ({"length": "long", "count": 1, "color": "red"}, ("length", "wrong_type")),
    ({"length": float("inf"), "count": 1, "color": "red"}, ("length", "not_finite")),
    ({"height": 2.0}, ("length", "missing_column")),
    (b'{"length": 1', (None, "malformed_record")),
    (42, (None, "not_a_record")),
]


@pytest.mark.parametrize("large_model", [False, True])  # True: what goes to the model and back is pickled
def test_a_record_that_cannot_be_scored_costs_only_itself(first, first_uri, table, records, caplog, large_model):
    elements = [*records[:5], *(element for element, _ in BAD), *records[5:]]

    def branches(p):
        return {"all": p | beam.Create(elements, reshuffle=False) | RunInference(handler)}

    handler = VAEModelHandler(first_uri, min_batch_size=100, large_model=large_model)
    outcome = run(branches)
    results = outcome.outputs["all"]
    failed = [result for result in results if "error" in result.inference]
    close(scores([result for result in results if result not in failed]), expected(first, table))
    assert [result.example for result in failed] == [element for element, _ in BAD]
    for result, (_, why) in zip(failed, BAD, strict=True):
        assert (result.inference["column"], result.inference["error_type"]) == why
        assert result.inference["error"]
        assert result.model_id == first.model_version
    assert outcome.counters[NAMESPACE, "num_dead_letters"] == len(BAD)
    assert outcome.counters[NAMESPACE, "num_inferences"] == len(elements)
    assert "long" not in caplog.text


def fail(value):
    raise ValueError(f"of mine: {type(value).__name__}")


def test_raised_errors_and_those_of_pre_and_postprocessing_are_set_aside_by_run_inference(first_uri, records):
    elements = [*records[:6], BAD[0][0]]

    def branches(p):
        source = p | beam.Create(elements, reshuffle=False)
        raising = VAEModelHandler(first_uri, errors="raise", min_batch_size=3, max_batch_size=3)
        main, failed = source | "raise" >> RunInference(raising).with_exception_handling()
        plain = VAEModelHandler(first_uri)
        before = plain.with_preprocess_fn(lambda record: record if record["count"] != records[0]["count"] else fail(1))
        before_main, before_failed = source | "before" >> RunInference(before).with_exception_handling()
        after = plain.with_postprocess_fn(lambda result: fail(result) if "error" in result.inference else "scored")
        # With a timeout, Beam loads the model in `process` rather than in `setup`.
        after_main, after_failed = source | "after" >> RunInference(after).with_exception_handling(timeout=300)
        return {
            "scored": main,
            "failed": failed.failed_inferences,
            "before": before_main,
            "before failed": before_failed.failed_preprocessing[0],
            "after": after_main,
            "after failed": after_failed.failed_postprocessing[0],
        }

    outcome = run(branches)
    outputs = outcome.outputs
    assert len(outputs["scored"]) == 6
    ((batch, (kind, message, _)),) = outputs["failed"]
    assert (batch, kind) == ([BAD[0][0]], RecordError)
    assert "1 records of a batch cannot be scored; the first: length: expected a number, got 'long'" in message
    assert outcome.counters[NAMESPACE, "failed_batches_counter"] == 1
    same = [record for record in elements if record["count"] == records[0]["count"]]
    assert [record for record, _ in outputs["before failed"]] == same
    assert len(outputs["before"]) == len(elements) - len(same)
    assert outputs["after"] == ["scored"] * 6
    ((result, (kind, _, _)),) = outputs["after failed"]
    assert (result.example, kind) == (BAD[0][0], ValueError)


# ---- keys, batches, functions around the model -----------------------------------------------------


def test_keys_functions_batches_and_shared_models_work_as_with_any_handler(first, first_uri, table, records):
    size = 12
    handler = VAEModelHandler(first_uri)
    pairs = [(f"key-{i % 3}", record) for i, record in enumerate(records[:size])]
    around = (
        KeyedModelHandler(handler)
        .with_preprocess_fn(lambda pair: (pair[0], json.loads(pair[1])))
        .with_preprocess_fn(lambda pair: (pair[0].upper(), pair[1]))
        .with_postprocess_fn(lambda pair: (*pair, "first"))
        .with_postprocess_fn(lambda triple: (*triple[:2], triple[2] + " then second"))
    )
    shared = VAEModelHandler(first_uri, large_model=True)
    copies = VAEModelHandler(first_uri, model_copies=2, max_batch_size=4)
    KEPT["monitored"] = []

    def branches(p):
        plain = p | "plain" >> beam.Create(records[:size], reshuffle=False)
        keyed = p | "keyed" >> beam.Create(pairs, reshuffle=False)
        texts = keyed | beam.MapTuple(lambda key, record: (key, json.dumps(record)))
        lists = p | "lists" >> beam.Create([records[:5], records[5:size]], reshuffle=False)
        tables = p | "tables" >> beam.Create([table.slice(0, 5), table.slice(5, size - 5)], reshuffle=False)
        watched = RunInference(handler).with_monitoring_transform(beam.Map(keep, "monitored"))
        return {
            "plain": plain | "monitored" >> watched,
            "from callable": plain | "callable" >> RunInference.from_callable(VAEModelHandler, bundle=first_uri),
            "keyed": keyed | "by key" >> RunInference(KeyedModelHandler(handler)),
            "maybe keyed": keyed | "maybe" >> RunInference(MaybeKeyedModelHandler(handler)),
            "maybe unkeyed": plain | "maybe not" >> RunInference(MaybeKeyedModelHandler(handler)),
            "around": texts | "around" >> RunInference(around),
            "lists": lists | "of lists" >> RunInference(handler.with_no_batching()),
            "tables": tables | "of tables" >> RunInference(handler.with_no_batching()),
            "shared": plain | "large" >> RunInference(shared),
            "shared keyed": keyed | "large keyed" >> RunInference(KeyedModelHandler(shared)),
            "copies": plain | "copies" >> RunInference(copies),
            "waiting": plain | "waiting" >> RunInference(VAEModelHandler(first_uri, max_batch_duration_secs=1)),
        }

    outputs = run(branches).outputs
    assert [result.example for result in KEPT.pop("monitored")] == records[:size]
    wanted = expected(first, table.slice(0, size))
    by_color = {json.dumps(record): score for record, score in zip(records, wanted, strict=False)}
    for name in ("plain", "from callable", "maybe unkeyed", "lists", "shared", "copies", "waiting"):
        results = outputs[name]
        assert len(results) == size, name
        close(scores(results), [by_color[json.dumps(result.example)] for result in results])
    for name in ("keyed", "maybe keyed", "shared keyed", "around"):
        results = outputs[name]
        assert [pair[0].lower() for pair in results] == [key for key, _ in pairs], name
        close(scores([pair[1] for pair in results]), wanted)
    assert {triple[2] for triple in outputs["around"]} == {"first then second"}
    assert {triple[0] for triple in outputs["around"]} == {"KEY-0", "KEY-1", "KEY-2"}
    together = pa.concat_tables([result.inference for result in outputs["tables"]])
    close(together["anomaly_score"].to_numpy(), wanted)


def test_each_key_can_have_a_model_of_its_own(first, second, first_uri, second_uri, table, records):
    def handlers():
        mine, theirs = VAEModelHandler(first_uri), VAEModelHandler(second_uri)
        return [KeyModelMapping(["a", "b"], mine), KeyModelMapping(["c"], theirs)]

    pairs = [("abc"[i % 3], record) for i, record in enumerate(records)]

    def branches(p):
        keyed = p | beam.Create(pairs, reshuffle=False)
        one_at_a_time = KeyedModelHandler(handlers(), max_models_per_worker_hint=1)
        return {
            "all": keyed | "all" >> RunInference(KeyedModelHandler(handlers())),
            "one": keyed | "one" >> RunInference(one_at_a_time, metrics_namespace="one"),
        }

    outcome = run(branches)
    wanted = {"a": first, "b": first, "c": second}
    for results in outcome.outputs.values():
        assert sorted(key for key, _ in results) == sorted(key for key, _ in pairs)
        for key, bundle in wanted.items():
            own = [result for name, result in results if name == key]
            rows = pa.Table.from_pylist([result.example for result in own], schema=table.schema)
            close(scores(own), expected(bundle, rows))
            assert set(versions(own)) == {bundle.model_version}
    for name, count in {"num_inferences": 40, "a-_num_inferences": 27, "c-_num_inferences": 13}.items():
        assert outcome.counters["one", name] == count
    assert outcome.counters["BeamML_KeyedModels", "num_inferences"] == 40


def test_a_keyed_handler_refuses_what_beam_refuses(first_uri):
    handler = VAEModelHandler(first_uri)
    with pytest.raises(ValueError, match="key a maps to multiple model handlers"):
        KeyedModelHandler([KeyModelMapping(["a"], handler), KeyModelMapping(["a"], handler)])
    with pytest.raises(ValueError, match="pre or postprocessing functions defined"):
        KeyedModelHandler([KeyModelMapping(["a"], handler.with_preprocess_fn(str))])


# ---- arguments and metrics -------------------------------------------------------------------------


def test_inference_args_say_otherwise_for_one_run(first, first_uri, table, records):
    lowest = float(expected(first, table).min())

    def branches(p):
        source = p | beam.Create(records, reshuffle=False)
        args = {"reasons": 2, "threshold": lowest}
        return {
            "otherwise": source | "otherwise" >> RunInference(handler, inference_args=args),
            "as built": source | "as built" >> RunInference(handler),
        }

    handler = VAEModelHandler(first_uri, reasons=1)
    outputs = run(branches).outputs
    assert {len(result.inference["anomaly_reasons"]) for result in outputs["otherwise"]} == {2}
    assert {len(result.inference["anomaly_reasons"]) for result in outputs["as built"]} == {1}
    assert all(result.inference["is_anomaly"] for result in outputs["otherwise"])
    labels = first.score(table)["is_anomaly"].to_pylist()
    assert [result.inference["is_anomaly"] for result in outputs["as built"]] == labels


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_reasons": 2}, "inference_args: expected any of reasons, threshold, got num_reasons"),
        ({"reasons": -1}, "reasons: expected a number >= 0, got -1"),
    ],
)
def test_other_inference_args_are_refused_when_the_pipeline_is_built(first_uri, records, args, message):
    keyed = KeyedModelHandler(VAEModelHandler(first_uri))
    with pytest.raises(ValueError, match=message):
        beam.Pipeline() | beam.Create([("a", records[0])]) | RunInference(keyed, inference_args=args)


def test_arguments_are_checked_at_construction(first_uri, tmp_path):
    with pytest.raises(TypeError, match="reason: no such argument of VAEModelHandler, nor of Beam's ModelHandler"):
        VAEModelHandler(first_uri, reason=1)
    with pytest.raises(ValueError, match='errors: expected "return" or "raise", got \'split\''):
        VAEModelHandler(first_uri, errors="split")
    with pytest.raises(ValueError, match="reasons: expected a number >= 0, got -2"):
        VAEModelHandler(first_uri, reasons=-2)
    with pytest.raises(BundleError, match="no bundle there"):
        VAEModelHandler(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="model_version: expected with a bundle's URI, not with a pointer's"):
        VAEModelHandler(str(tmp_path / "current.json"), model_version="0")


def test_arguments_of_beams_handler_reach_it(first_uri):
    assert VAEModelHandler(first_uri).batch_elements_kwargs() == {}
    handler = VAEModelHandler(first_uri, min_batch_size=2, max_batch_size=8, max_batch_duration_secs=1)
    assert handler.batch_elements_kwargs() == {"min_batch_size": 2, "max_batch_size": 8, "max_batch_duration_secs": 1}
    assert not handler.share_model_across_processes()
    assert handler.model_copies() == 1
    copies = VAEModelHandler(first_uri, model_copies=3)
    assert copies.share_model_across_processes()
    assert copies.model_copies() == 3


def test_metrics_are_those_of_run_inference_and_environment_variables_are_set(first, first_uri, table, records):
    name = "BEAM_VAE_TEST"
    assert name not in os.environ

    def branches(p):
        source = p | beam.Create(records, reshuffle=False)
        return {
            "own": source | "own" >> RunInference(handler),
            "custom": source | "custom" >> RunInference(handler, metrics_namespace="custom"),
        }

    handler = VAEModelHandler(first_uri, min_batch_size=20, max_batch_size=20, env_vars={name: "set"})
    try:
        outcome = run(branches)
        assert os.environ[name] == "set"
    finally:
        os.environ.pop(name, None)
    for namespace in (NAMESPACE, "custom"):
        assert outcome.counters[namespace, "num_inferences"] == 40
        assert outcome.counters.get((namespace, "failed_batches_counter"), 0) == 0
        (sizes,) = outcome.distributions[namespace, "inference_request_batch_size"]
        assert (sizes.count, sizes.min, sizes.max) == (2, 20, 20)
        (num_bytes,) = outcome.distributions[namespace, "inference_request_batch_byte_size"]
        assert num_bytes.sum == sum(record.__sizeof__() for record in records)
        for timing in ("inference_batch_latency_micro_secs", "load_model_latency_milli_secs", "model_byte_size"):
            assert outcome.distributions[namespace, timing]
    anomalies = 2 * sum(first.score(table)["is_anomaly"].to_pylist())
    assert outcome.counters.get((NAMESPACE, "num_anomalies"), 0) == anomalies


def test_bytes_are_counted_without_pickling(first_uri, table):
    handler = VAEModelHandler(first_uri)
    assert handler.get_num_bytes(table) == table.nbytes
    assert handler.get_num_bytes([lambda: None]) > 0  # Beam's default would pickle it
    assert handler.get_num_bytes([b"x" * 1000]) - handler.get_num_bytes([b""]) == 1000


# ---- the model ---------------------------------------------------------------------------------------


def test_a_handler_pickles_small_and_says_the_same_everywhere(first, first_uri, table, records):
    handler = VAEModelHandler(first_uri)
    model = handler.load_model()
    handler.run_inference(records, model)
    text = pickle.dumps(handler)
    assert len(text) < 5000
    other = pickle.loads(text)
    close(scores(other.run_inference(records, other.load_model())), expected(first, table))
    assert repr(other) == repr(handler)
    assert " at 0x" not in repr(handler)


def test_a_version_that_is_given_spares_reading_and_is_held_to(first, first_uri, tmp_path):
    absent = VAEModelHandler(str(tmp_path / "later"), model_version=first.model_version)
    with pytest.raises(BundleError, match="no bundle there"):
        absent.load_model()
    first.save(str(tmp_path / "later"))
    assert absent.load_model().bundle.model_version == first.model_version
    with pytest.raises(BundleError, match="expected version 0123, as at launch"):
        VAEModelHandler(first_uri, model_version="0123").load_model()


def test_a_pointer_is_read_once_unless_it_is_to_be_followed(first, second, first_uri, second_uri, tmp_path, records):
    pointer = str(tmp_path / "current.json")
    promote(first_uri, pointer)
    fixed, following = VAEModelHandler(pointer), VAEModelHandler(pointer, model_refresh_secs=3600)
    promote(second_uri, pointer)
    assert versions(fixed.run_inference(records, fixed.load_model())) == [first.model_version] * 40
    # As a worker that starts now: it takes what the pointer names now.
    model = following.load_model()
    assert versions(following.run_inference(records, model)) == [second.model_version] * 40
    promote(first_uri, pointer)
    model._model.poll()
    assert versions(following.run_inference(records, model)) == [first.model_version] * 40


@pytest.mark.parametrize("kind", [VAEModelHandler, VAEDetector])
def test_a_threshold_in_nats_is_refused_where_a_pointer_is_followed(kind, first_uri, records, tmp_path):
    pointer = str(tmp_path / "current.json")
    promote(first_uri, pointer)
    message = "threshold: expected None with a pointer that is followed"
    with pytest.raises(ValueError, match=message):
        kind(pointer, threshold=1.0, model_refresh_secs=60)
    kind(pointer, threshold=1.0)  # its bundle is fixed
    kind(first_uri, threshold=1.0, model_refresh_secs=60)
    following = VAEModelHandler(pointer, model_refresh_secs=60)
    with pytest.raises(ValueError, match=message):
        _ = beam.Pipeline() | beam.Create(records[:1]) | RunInference(following, inference_args={"threshold": 1.0})


# ---- updates -----------------------------------------------------------------------------------------


def updated(handler, path, records):
    """Versions after an update, as RunInference makes it."""
    handler.update_model_path(path)
    return set(versions(handler.run_inference(records, handler.load_model())))


def test_an_update_is_taken_when_it_is_sound_and_refused_when_not(
    first, second, renamed, first_uri, second_uri, tmp_path, records, caplog
):
    corrupt, other, empty, strange = (str(tmp_path / name) for name in ("corrupt", "other", "empty", "strange"))
    second.save(corrupt)
    with open(f"{corrupt}/weights.npz", "ab") as stream:
        stream.write(b"x")
    renamed.save(other)
    place = second.golden.column_names.index("anomaly_score")
    moved = pc.add(second.golden["anomaly_score"], pa.scalar(1, pa.float32()))
    dataclasses.replace(second, golden=second.golden.set_column(place, "anomaly_score", moved)).save(strange)
    handler = VAEModelHandler(first_uri)
    one, two = {first.model_version}, {second.model_version}
    with caplog.at_level(logging.WARNING):
        assert updated(handler, corrupt, records) == one
        assert updated(handler, strange, records) == one
        assert updated(handler, f"{second_uri}/manifest.json", records) == two  # as a watched pattern names it
        assert updated(handler, "", records) == two
        assert updated(handler, other, records) == two
        assert updated(handler, empty, records) == two
        assert updated(handler, first_uri, records) == one
    told = [line for line in caplog.messages if "refused" in line]
    assert len(told) == 4
    assert "weights.npz was changed after it was written" in told[0]
    assert "as at training time" in told[1]
    assert "stretch: is read by it, but not by the model before" in told[2]
    assert "no bundle there" in told[3]


def test_a_refused_update_is_tried_again(first, second, first_uri, tmp_path, records, monkeypatch, caplog):
    monkeypatch.setattr(pipeline.handler, "REFRESH_SECS", 0.0)
    late = str(tmp_path / "late")
    handler = VAEModelHandler(first_uri)
    handler.run_inference(records, handler.load_model())
    with caplog.at_level(logging.WARNING):
        handler.update_model_path(late)
        model = handler.load_model()
        for _ in range(3):
            assert set(versions(handler.run_inference(records, model))) == {first.model_version}
    assert caplog.text.count("no bundle there") == 1
    second.save(late)
    assert set(versions(handler.run_inference(records, model))) == {second.model_version}


def test_another_do_fn_of_the_process_falls_back_on_the_model_it_was_handed(
    first, second, first_uri, second_uri, records
):
    loader, other = VAEModelHandler(first_uri), VAEModelHandler(first_uri)
    loader.update_model_path(second_uri)
    other.update_model_path(second_uri)
    other.run_inference(records, loader.load_model())  # Beam shares it
    assert updated(other, "/nowhere", records) == {second.model_version}


def timed(elements, windows=10):
    """`(seconds, element)` in windows of event time."""
    return (
        beam.Create(elements, reshuffle=False)
        | beam.MapTuple(lambda secs, element: TimestampedValue(element, secs))
        | beam.WindowInto(FixedWindows(windows))
    )


def test_models_are_swapped_by_beams_side_input(first, second, first_uri, second_uri, records, caplog):
    updates = [(5, ""), (15, second_uri), (25, "/nowhere"), (35, second_uri), (45, first_uri)]
    seconds = (1, 12, 28, 31, 49)

    def branches(p):
        side = p | "updates" >> timed([(at, ModelMetadata(path, f"v{at}")) for at, path in updates])
        source = p | "records" >> timed(list(zip(seconds, records, strict=False)))
        shared = VAEModelHandler(first_uri, large_model=True)
        nothing = p | "nothing" >> beam.Create([])
        return {
            "plain": source | "plain" >> RunInference(VAEModelHandler(first_uri), model_metadata_pcoll=side),
            "shared": source | "shared" >> RunInference(shared, model_metadata_pcoll=side),
            "none": source | "none" >> RunInference(VAEModelHandler(second_uri), model_metadata_pcoll=nothing),
        }

    with caplog.at_level(logging.WARNING):
        outcome = run(branches)
    one, two = first.model_version, second.model_version
    at = {json.dumps(record): secs for secs, record in zip(seconds, records, strict=False)}
    for name, wanted in {
        "plain": [one, two, two, two, one],
        "shared": [one, two, two, two, one],
        "none": [two] * 5,
    }.items():
        found = {at[json.dumps(result.example)]: result.model_id for result in outcome.outputs[name]}
        assert [found[secs] for secs in seconds] == wanted, name
    assert outcome.counters[NAMESPACE, "model_swap_failures"] >= 1
    assert outcome.counters[NAMESPACE, "model_swaps"] >= 1
    assert outcome.counters[NAMESPACE, "v15_num_inferences"] == 2  # Beam's name for a version's metrics


def test_models_by_key_are_swapped_by_beams_side_input(first, second, first_uri, second_uri, records):
    def together(path):
        return [KeyModelPathMapping(["a", "b"], path, "v")]

    apart = [KeyModelPathMapping(["a"], first_uri, "v"), KeyModelPathMapping(["b"], "/nowhere", "v")]
    pairs = [(1, ("a", records[0])), (2, ("b", records[0])), (11, ("a", records[1])), (12, ("b", records[1]))]
    pairs += [(21, ("a", records[2])), (22, ("b", records[2]))]

    def branches(p):
        handler = KeyedModelHandler([KeyModelMapping(["a", "b"], VAEModelHandler(first_uri))])
        side = p | "updates" >> timed([(5, together(first_uri)), (15, together(second_uri)), (25, apart)])
        return {"all": p | "pairs" >> timed(pairs) | RunInference(handler, model_metadata_pcoll=side)}

    results = run(branches).outputs["all"]
    one, two = first.model_version, second.model_version
    found = {(key, records.index(result.example)): result.model_id for key, result in results}
    wanted = {"a": [one, two, one], "b": [one, two, two]}
    assert found == {(key, i): version for key, own in wanted.items() for i, version in enumerate(own)}


def test_prediction_results_are_beams(first_uri, records):
    handler = VAEModelHandler(first_uri)
    (result,) = handler.run_inference(records[:1], handler.load_model())
    assert type(result) is PredictionResult
    assert load_bundle(first_uri).model_version == result.model_id == result.inference["model_version"]

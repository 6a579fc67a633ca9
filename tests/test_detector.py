"""Beam's own tests of detectors (apache_beam/ml/anomaly/transforms_test.py), on ours with trained bundles."""

import json
import math
import pickle
import subprocess
import sys
import uuid

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.ml.anomaly.aggregations import AnyVote, AverageScore, MajorityVote, MaxScore
from apache_beam.ml.anomaly.base import AnomalyResult, EnsembleAnomalyDetector
from apache_beam.ml.anomaly.specifiable import Spec, Specifiable
from apache_beam.ml.anomaly.thresholds import FixedThreshold, QuantileThreshold
from apache_beam.ml.anomaly.transforms import AnomalyDetection
from apache_beam.ml.inference.base import ModelMetadata
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from pipeline.detector import VAEDetector
from vae_model.bundle import BundleError
from vae_model.promotion import promote

KEPT: dict[str, list] = {}


def keep(element, key):
    KEPT[key].append(element)


def run(branches) -> dict[str, list]:
    """The elements of the PCollections that `branches(p)` names, of one pipeline."""
    p = beam.Pipeline(runner="FnApiRunner")
    outputs = branches(p)
    keys = {name: uuid.uuid4().hex for name in outputs}
    for name, output in outputs.items():
        KEPT[keys[name]] = []
        output | f"keep {name}" >> beam.Map(keep, keys[name])
    p.run().wait_until_finish()
    return {name: KEPT.pop(key) for name, key in keys.items()}


@pytest.fixture(scope="module")
def table(make_table) -> pa.Table:
    """Rows with `n` to tell them by, among them strange ones; the last cannot be scored."""
    rows = make_table(30, seed=3).select(["length", "count", "color"]).to_pylist()
    rows[4] |= {"length": 500.0}
    rows[11] |= {"length": -300.0, "count": 1000}
    rows[-1] |= {"length": math.inf}
    return pa.Table.from_pylist([{**row, "n": n} for n, row in enumerate(rows)])


@pytest.fixture(scope="module")
def rows(table) -> list[beam.Row]:
    return [beam.Row(**row) for row in table.to_pylist()]


def wanted(bundle, table, **options) -> list[dict]:
    """What Python says of all rows but the last."""
    return bundle.score(table.slice(0, table.num_rows - 1), **options).to_pylist()


def by_row(results: list[AnomalyResult]) -> list:
    """The one prediction of each row, in the rows' order."""
    assert all(len(result.predictions) == 1 for result in results)
    return [result.predictions[0] for result in sorted(results, key=lambda result: result.example.n)]


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


# ---- one detector ----------------------------------------------------------------------------------


def test_one_detector_predicts_as_python_scores(first, first_uri, table, rows):
    keyed_rows = [(f"key-{row.n % 2}", row) for row in rows]

    def branches(p):
        detector = VAEDetector(first_uri, reasons=2)
        return {
            "unkeyed": p | "unkeyed" >> beam.Create(rows) | "of rows" >> AnomalyDetection(detector),
            "keyed": p | "keyed" >> beam.Create(keyed_rows) | "of pairs" >> AnomalyDetection(detector),
        }

    outputs = run(branches)
    assert {(key, result.example.n) for key, result in outputs["keyed"]} == {(key, row.n) for key, row in keyed_rows}
    expected = wanted(first, table, reasons=2)
    assert {row["is_anomaly"] for row in expected} == {True, False}
    for results in (outputs["unkeyed"], [result for _, result in outputs["keyed"]]):
        assert sorted(result.example._asdict()["n"] for result in results) == list(range(30))
        *good, bad = by_row(results)
        close([prediction.score for prediction in good], [row["anomaly_score"] for row in expected])
        assert [prediction.label for prediction in good] == [int(row["is_anomaly"]) for row in expected]
        for prediction, row in zip(good, expected, strict=True):
            reasons = json.loads(prediction.info)
            assert [reason["feature"] for reason in reasons] == [r["feature"] for r in row["anomaly_reasons"]]
            assert prediction.threshold == float(np.float32(first.threshold.value))
            assert prediction.model_id == first.model_version
        assert (bad.score, bad.label) == (None, None)
        assert json.loads(bad.info)["error_type"] == "not_finite"


def test_a_score_at_the_threshold_is_an_anomaly_whoever_compares(first, first_uri, table, rows):
    at = float(np.sort(first.score(table.slice(0, 29))["anomaly_score"].to_numpy())[20])
    above = float(np.nextafter(np.float32(at), np.float32(np.inf)))

    def branches(p):
        source = p | beam.Create(rows)
        outputs = {}
        for name, limit in {"at": at, "above": above}.items():
            ours = VAEDetector(first_uri, threshold=limit)
            beams = VAEDetector(first_uri, threshold_criterion=FixedThreshold(limit))
            outputs[name] = source | name >> AnomalyDetection(ours)
            outputs[f"{name}, Beam's"] = source | f"{name}, Beam's" >> AnomalyDetection(beams)
        default = VAEDetector(first_uri, threshold_criterion=FixedThreshold(float(np.float32(first.threshold.value))))
        outputs["default"] = source | "default" >> AnomalyDetection(VAEDetector(first_uri))
        outputs["default, Beam's"] = source | "default, Beam's" >> AnomalyDetection(default)
        return outputs

    labels = {name: [p.label for p in by_row(results)] for name, results in run(branches).items()}
    for name in ("at", "above", "default"):
        assert labels[name] == labels[f"{name}, Beam's"], name
    # One row has that very score, in a batch of any size.
    assert (sum(labels["at"][:-1]), sum(labels["above"][:-1])) == (9, 8)
    assert {label[-1] for label in labels.values()} == {None}


def test_a_quantile_threshold_follows_the_scores(first_uri, rows):
    def branches(p):
        detector = VAEDetector(first_uri, threshold_criterion=QuantileThreshold(quantile=0.5))
        return {"all": p | beam.Create(rows[:-1], reshuffle=False) | AnomalyDetection(detector)}

    predictions = [result.predictions[0] for result in run(branches)["all"]]
    scores = [prediction.score for prediction in predictions]
    for i, prediction in enumerate(predictions):  # in the order of their arrival
        assert prediction.threshold == pytest.approx(np.median(scores[: i + 1]))
        assert prediction.label == int(prediction.score >= prediction.threshold)


def test_after_a_swap_the_new_models_threshold_holds(first, second, first_uri, second_uri, rows):
    def timed(elements):
        return (
            beam.Create(elements, reshuffle=False)
            | beam.MapTuple(lambda secs, element: TimestampedValue(element, secs))
            | beam.WindowInto(FixedWindows(10))
        )

    def branches(p):
        updates = [(5, ModelMetadata(first_uri, "one")), (15, ModelMetadata(second_uri, "two"))]
        args = {"model_metadata_pcoll": p | "updates" >> timed(updates)}
        source = p | "rows" >> timed([(1, rows[0]), (12, rows[1])])
        return {"all": source | AnomalyDetection(VAEDetector(first_uri, run_inference_args=args))}

    thresholds = [prediction.threshold for prediction in by_row(run(branches)["all"])]
    assert thresholds == [float(np.float32(bundle.threshold.value)) for bundle in (first, second)]
    assert len(set(thresholds)) == 2


# ---- ensembles ---------------------------------------------------------------------------------------


def test_ensembles_hold_each_detectors_prediction_or_their_vote(first, second, first_uri, second_uri, table, rows):
    strict = float(np.sort(first.score(table.slice(0, 29))["anomaly_score"].to_numpy())[10])
    strategies = {
        "any": AnyVote(),
        "majority": MajorityVote(include_source_predictions=True),
        "mean": AverageScore(),
    }

    def detectors():
        return [
            VAEDetector(first_uri),
            VAEDetector(second_uri, reasons=1),
            VAEDetector(first_uri, threshold=strict, model_id="strict"),
        ]

    def branches(p):
        source = p | beam.Create(rows)
        outputs = {
            name: source | name >> AnomalyDetection(EnsembleAnomalyDetector(detectors(), aggregation_strategy=strategy))
            for name, strategy in strategies.items()
        }
        plain = EnsembleAnomalyDetector(detectors())
        nested = EnsembleAnomalyDetector([EnsembleAnomalyDetector(detectors()[:2]), detectors()[2]])
        outputs["plain"] = source | "plain" >> AnomalyDetection(plain)
        outputs["nested"] = source | "nested" >> AnomalyDetection(nested)
        limited = EnsembleAnomalyDetector(
            detectors(), aggregation_strategy=MaxScore(), threshold_criterion=FixedThreshold(strict)
        )
        outputs["limited"] = source | "limited" >> AnomalyDetection(limited)
        return outputs

    outputs = run(branches)
    scored = {
        first.model_version: wanted(first, table),
        second.model_version: wanted(second, table),
        "strict": wanted(first, table, threshold=strict),
    }
    labels = np.array([[row["is_anomaly"] for row in own] for own in scored.values()]).T.astype(int)
    scores = np.array([[row["anomaly_score"] for row in own] for own in scored.values()]).T
    assert len(np.unique(labels.sum(axis=1))) > 2  # they do not agree everywhere
    for name in ("plain", "nested"):
        for result in outputs[name]:
            assert {prediction.model_id for prediction in result.predictions} == set(scored)
            if result.example.n < 29:
                found = {prediction.model_id: prediction for prediction in result.predictions}
                row = [found[model_id] for model_id in scored]
                close([prediction.score for prediction in row], scores[result.example.n])
                assert [prediction.label for prediction in row] == labels[result.example.n].tolist()
                assert [bool(prediction.info) for prediction in row] == [False, True, False]
    votes = {"any": labels.max(axis=1), "majority": labels.sum(axis=1) >= 2}
    for name, vote in votes.items():
        *good, bad = by_row(outputs[name])
        assert [prediction.label for prediction in good] == vote.astype(int).tolist(), name
        assert bad.label is None
    assert all(len(prediction.source_predictions) == 3 for prediction in by_row(outputs["majority"]))
    for name, expected in {"mean": scores.mean(axis=1), "limited": scores.max(axis=1)}.items():
        *good, bad = by_row(outputs[name])
        close([prediction.score for prediction in good], expected)
        assert bad.score is None
    *good, bad = by_row(outputs["limited"])
    assert [prediction.label for prediction in good] == [int(prediction.score >= strict) for prediction in good]
    assert (bad.score, bad.label) == (None, None)


# ---- specs and construction --------------------------------------------------------------------------


def test_a_spec_and_a_detector_are_two_forms_of_one_thing(first, first_uri, rows):
    spec = Spec(
        "VAEDetector",
        {"bundle": first_uri, "reasons": 1, "threshold_criterion": Spec("FixedThreshold", {"cutoff": 9.5})},
    )
    by_spec = Specifiable.from_spec(spec)
    assert by_spec.to_spec() == spec
    detector = VAEDetector(first_uri, reasons=1, threshold_criterion=FixedThreshold(9.5))
    assert detector.to_spec() == spec
    pickled = pickle.loads(pickle.dumps(Specifiable.from_spec(detector.to_spec())))

    def branches(p):
        source = p | beam.Create(rows)
        forms = {"direct": detector, "spec": by_spec, "pickled": pickled}
        return {name: source | name >> AnomalyDetection(form) for name, form in forms.items()}

    direct, *others = (by_row(results) for results in run(branches).values())
    for other in others:
        assert [prediction.label for prediction in other] == [prediction.label for prediction in direct]
        close([prediction.score for prediction in other[:-1]], [prediction.score for prediction in direct[:-1]])
        assert {prediction.threshold for prediction in other} == {9.5}
        assert {prediction.model_id for prediction in other} == {first.model_version}


def test_beam_yaml_finds_the_detector_by_its_name(first, first_uri, table, rows):
    pytest.importorskip("jinja2", reason="comes with apache-beam[yaml]")
    from apache_beam.yaml.yaml_transform import YamlTransform

    text = f"""
    type: AnomalyDetection
    config:
      detector:
        type: VAEDetector
        config:
          bundle: {first_uri}
          threshold_criterion:
            type: FixedThreshold
            config:
              cutoff: 12.5
    """
    outputs = run(lambda p: {"all": p | beam.Create(rows) | YamlTransform(text)})
    *good, _ = by_row(outputs["all"])
    close([prediction.score for prediction in good], [row["anomaly_score"] for row in wanted(first, table)])
    assert [prediction.label for prediction in good] == [int(prediction.score >= 12.5) for prediction in good]


def test_building_pipelines_loads_no_tensorflow(first_uri):
    code = f"""
import sys
import apache_beam as beam
from apache_beam.ml.anomaly.transforms import AnomalyDetection
from apache_beam.ml.inference.base import RunInference
from pipeline import VAEDetector, VAEModelHandler
p = beam.Pipeline()
p | beam.Create([beam.Row(length=1.0)]) | AnomalyDetection(VAEDetector({first_uri!r}))
p | "dicts" >> beam.Create([{{}}]) | RunInference(VAEModelHandler({first_uri!r}))
p.to_runner_api()
print("tensorflow" in sys.modules or "keras" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_arguments_are_checked_at_construction(first, first_uri, tmp_path):
    with pytest.raises(BundleError, match="no bundle there"):
        VAEDetector(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="threshold: expected without a threshold_criterion, which replaces it"):
        VAEDetector(first_uri, threshold=1.0, threshold_criterion=FixedThreshold(2.0))
    with pytest.raises(ValueError, match="features: expected all columns that the model reads, got none named count"):
        VAEDetector(first_uri, features=["color", "length"])
    with pytest.raises(TypeError, match="max_batchsize: no such argument"):
        VAEDetector(first_uri, max_batchsize=3)
    absent = VAEDetector(str(tmp_path / "later"), model_version=first.model_version)
    assert absent._model_id == first.model_version


def test_bytes_are_counted_without_pickling_keys_that_hold_the_row(first_uri, rows):
    handler = VAEDetector(first_uri)._keyed_model_handler
    assert handler.get_num_bytes([(lambda: None, row) for row in rows]) == sum(row.__sizeof__() for row in rows)


def test_what_beam_is_given(first, second, first_uri, second_uri, tmp_path):
    pointer = str(tmp_path / "current.json")
    promote(second_uri, pointer)
    assert VAEDetector(pointer)._model_id == second.model_version
    args = {"metrics_namespace": "mine"}
    detector = VAEDetector(first_uri, features=["n", "color", "count", "length"], run_inference_args=args, target="n")
    assert detector._run_inference_args == {"metrics_namespace": "mine", "model_identifier": first.model_version}
    assert args == {"metrics_namespace": "mine"}  # of the caller, who may use it again
    assert detector._features is None  # Beam would build each row anew
    assert detector._target == "n"
    assert VAEDetector(first_uri, model_id="mine")._model_id == "mine"

"""Beam YAML's own program on real files, with the provider file and the example that we ship."""

import inspect
import json
import math
import os
import subprocess
import sys
import typing
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import yaml
from waiting import until

import beam_vae
from pipeline.records import DEAD_LETTER_SCHEMA
from vae_model.bundle import BundleError, score_fields
from vae_model.pointer import Entry, Pointer

pytest.importorskip("jinja2", reason="comes with apache-beam[yaml]")

from apache_beam.typehints.schemas import typing_from_runner_api
from apache_beam.yaml import main
from apache_beam.yaml.yaml_provider import load_providers

from pipeline.yaml_provider import DeadLetter, ScoreAnomalies

EXAMPLE = Path(__file__).parents[1] / "examples" / "score.yaml"
PROVIDER = Path(__file__).parents[1] / "pipeline" / "yaml_provider.yaml"


def run(transforms: list[dict], folder: Path, *flags: str) -> None:
    """Runs transforms, each with a name and an input, as a pipeline of a file in `folder`."""
    spec = {"pipeline": {"transforms": transforms}, "providers": [{"include": str(PROVIDER)}]}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(spec))
    main.run([f"--yaml_pipeline_file={folder}/pipeline.yaml", "--runner=FnApiRunner", *flags])


def step(kind: str, source: str | None = None, **config) -> dict:
    """A transform that is named like its type."""
    return {"type": kind, "name": kind, "config": config} | ({"input": source} if source else {})


def read_json(folder: Path, prefix: str) -> list[dict]:
    return [json.loads(line) for path in folder.glob(f"{prefix}*") for line in path.read_text().splitlines()]


def read_parquet(folder: Path, prefix: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in folder.glob(f"{prefix}*")]).sort_by("n")


def close(found: pa.Table, expected: pa.Table, prefix: str = "") -> None:
    for name in ("anomaly_score", "anomaly_p_value"):
        np.testing.assert_allclose(found[prefix + name], expected[name], rtol=1e-4, atol=1e-3)
    for name in ("is_anomaly", "model_version"):
        assert found[prefix + name].to_pylist() == expected[name].to_pylist()


@pytest.fixture(scope="module")
def table(make_table) -> pa.Table:
    """Rows with `n` to tell them by: some cells missing, some strange; the last two rows cannot be scored."""
    rows = make_table(300, seed=3).select(["length", "count", "color"]).to_pylist()
    rows[4] |= {"length": 500.0}
    rows[5] |= {"length": None}
    rows[6] |= {"color": None}
    rows[7] |= {"color": "never seen"}
    rows[-2] |= {"length": math.inf}
    rows[-1] |= {"length": -math.inf}
    return pa.Table.from_pylist([{**row, "n": n} for n, row in enumerate(rows)])


@pytest.fixture(scope="module")
def expected(first, table) -> pa.Table:
    """What Python says of all rows but the last two."""
    scored = first.score(table.slice(0, 298), reasons=2)
    assert set(scored["is_anomaly"].to_pylist()) == {True, False}
    return scored


# ---- files -----------------------------------------------------------------------------------------


def test_the_example_scores_parquet_and_loses_nothing(first_uri, table, expected, tmp_path, capsys):
    pq.write_table(table.slice(0, 200), tmp_path / "in-0.parquet")
    pq.write_table(table.slice(200), tmp_path / "in-1.parquet")
    assert beam_vae.main(["yaml-provider"]) == 0
    main.run(
        [
            f"--yaml_pipeline_file={EXAMPLE}",
            "--runner=FnApiRunner",
            "--jinja_variable_flags=provider,model,rows,scores,rejected",
            f"--provider={capsys.readouterr().out.strip()}",
            f"--model={first_uri}",
            f"--rows={tmp_path}/in-*.parquet",
            f"--scores={tmp_path}/scored",
            f"--rejected={tmp_path}/rejected",
        ]
    )
    scored, rejected = read_parquet(tmp_path, "scored"), read_json(tmp_path, "rejected")
    assert scored["n"].to_pylist() == list(range(298))
    close(scored, expected)
    assert scored.schema.names == expected.schema.names
    assert scored.schema.types[:4] == table.schema.types
    struct, reason = scored.schema.field("anomaly_reasons").type.value_type, pa.float32()
    assert [struct.field(name).type for name in ("feature", "nats", "low")] == [pa.string(), reason, pa.string()]
    for found, wanted in zip(
        scored["anomaly_reasons"].to_pylist(), expected["anomaly_reasons"].to_pylist(), strict=True
    ):
        assert [reason["feature"] for reason in found] == [reason["feature"] for reason in wanted]
        assert [reason["value"] for reason in found] == [reason["value"] for reason in wanted]
    assert sorted(json.loads(letter["payload"])["n"] for letter in rejected) == [298, 299]
    assert {letter["error"] for letter in rejected} == {"length: expected a finite number, got an infinite one"}
    assert {letter["column"] for letter in rejected} == {"length"}


@pytest.mark.parametrize("kind", ["Csv", "Json"])
def test_text_files_score_the_same(kind, first_uri, table, expected, tmp_path):
    good, path = table.slice(0, 298), tmp_path / "in.txt"
    if kind == "Csv":
        pa_csv.write_csv(good, path)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in good.to_pylist()))
    score = step("ScoreAnomalies", f"ReadFrom{kind}", bundle=first_uri, columns=["n"], prefix="my_", threshold=11.5)
    transforms = [step(f"ReadFrom{kind}", path=str(path)), score]
    run([*transforms, step("WriteToParquet", "ScoreAnomalies", path=f"{tmp_path}/out")], tmp_path)
    found = read_parquet(tmp_path, "out")
    assert found.schema.names == ["n", *(field.name for field in score_fields(0, "my_"))]
    labels = pa.array([score >= 11.5 for score in expected["anomaly_score"].to_pylist()])
    close(found, expected.set_column(expected.schema.names.index("is_anomaly"), "is_anomaly", labels), "my_")


def test_dead_letters_are_rows_for_any_sink(first_uri, table, tmp_path):
    pq.write_table(table.slice(290), tmp_path / "in.parquet")
    score = step("ScoreAnomalies", "ReadFromParquet", bundle=first_uri, error_handling={"output": "bad"})
    transforms = [step("ReadFromParquet", path=f"{tmp_path}/in.parquet"), score]
    outputs = [
        step("WriteToParquet", "ScoreAnomalies.bad", path=f"{tmp_path}/bad"),
        step("WriteToJson", "ScoreAnomalies", path=f"{tmp_path}/good"),
        step("WriteToCsv", "ScoreAnomalies.bad", path=f"{tmp_path}/text"),
    ]
    run([*transforms, *outputs], tmp_path)
    assert sorted(row["n"] for row in read_json(tmp_path, "good")) == list(range(290, 298))
    (bad,) = (pq.read_table(path) for path in tmp_path.glob("bad*"))
    assert bad.schema.names == DEAD_LETTER_SCHEMA.names
    for field in DEAD_LETTER_SCHEMA:
        kind = pa.string() if field.name == "event_time" else field.type
        assert str(bad.schema.field(field.name).type).replace(" ('attributes')", "") == str(kind)
    assert bad["error_type"].to_pylist() == ["not_finite"] * 2
    (text,) = tmp_path.glob("text*")
    assert pa_csv.read_csv(text)["column"].to_pylist() == ["length"] * 2


def test_without_error_handling_such_a_row_fails_the_pipeline(first_uri, table, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    score = step("ScoreAnomalies", "ReadFromParquet", bundle=first_uri)
    transforms = [step("ReadFromParquet", path=f"{tmp_path}/in.parquet"), score]
    with pytest.raises(Exception, match="a row cannot be scored: length: expected a finite number"):
        run([*transforms, step("WriteToParquet", "ScoreAnomalies", path=f"{tmp_path}/out")], tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_rows_are_scored_by_the_model_of_their_key(first, second, first_uri, second_uri, table, tmp_path):
    rows = table.slice(0, 60).append_column("tenant", pa.array(["a", "b", "new"] * 20))
    pq.write_table(rows, tmp_path / "in.parquet")
    Pointer(f"{tmp_path}/b/live.json", Entry(second_uri, second.model_version, "x")).write()
    keyed = {"key": "tenant", "columns": ["n"]}
    by_dict = {"models_by_key": {"a": first_uri, "b": f"{tmp_path}/b/live.json"}, **keyed}
    by_dict["error_handling"] = {"output": "bad"}
    by_pattern = {"models_by_key": f"{tmp_path}/{{key}}/live.json", "default_model": first_uri, **keyed}
    transforms = [step("ReadFromParquet", path=f"{tmp_path}/in.parquet")]
    for name, config in {"Dict": by_dict, "Pattern": by_pattern}.items():
        transforms += [step("ScoreAnomalies", "ReadFromParquet", **config) | {"name": name}]
        transforms += [step("WriteToParquet", name, path=f"{tmp_path}/{name}-good") | {"name": f"{name}Good"}]
    run([*transforms, step("WriteToJson", "Dict.bad", path=f"{tmp_path}/bad")], tmp_path)
    alone = [model.score(rows) for model in (first, second)]
    for name, models in {"Dict": {0: 0, 1: 1}, "Pattern": {0: 0, 1: 1, 2: 0}}.items():
        found = read_parquet(tmp_path, f"{name}-good")
        wanted = pa.concat_tables(
            alone[models[n % 3]].slice(n, 1).drop_columns(["tenant"]) for n in range(60) if n % 3 in models
        )
        assert found["n"].to_pylist() == wanted["n"].to_pylist()
        close(found, wanted)
    unknown = read_json(tmp_path, "bad")
    assert sorted(json.loads(letter["payload"])["n"] for letter in unknown) == list(range(2, 60, 3))
    assert {letter["error_type"] for letter in unknown} == {"unknown_model"}


def test_our_detector_in_beams_anomaly_detection(first_uri, table, expected, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    fields = {
        "n": {"callable": "lambda result: result.example.n", "output_type": "integer"},
        "score": {"callable": "lambda result: result.predictions[0].score or float('nan')", "output_type": "number"},
        "label": {"callable": "lambda result: result.predictions[0].label or 0", "output_type": "integer"},
        "info": {"callable": "lambda result: result.predictions[0].info", "output_type": "string"},
    }
    detector = {"type": "VAEDetector", "config": {"bundle": first_uri, "reasons": 1}}
    names = {name: name for name in table.schema.names}
    transforms = [
        step("ReadFromParquet", path=f"{tmp_path}/in.parquet"),
        step("MapToFields", "ReadFromParquet", fields=names) | {"name": "Rows"},
        step("AnomalyDetection", "Rows", detector=detector),
        step("MapToFields", "AnomalyDetection", language="python", fields=fields) | {"name": "Predictions"},
        step("WriteToParquet", "Predictions", path=f"{tmp_path}/out"),
    ]
    run(transforms, tmp_path)
    found = read_parquet(tmp_path, "out")
    assert found["n"].to_pylist() == list(range(300))
    np.testing.assert_allclose(found["score"][:298], expected["anomaly_score"], rtol=1e-4, atol=1e-3)
    assert found["label"].to_pylist()[:298] == [int(label) for label in expected["is_anomaly"].to_pylist()]
    first_reasons = [json.loads(info)[0]["feature"] for info in found["info"].to_pylist()[:298]]
    assert first_reasons == [reasons[0]["feature"] for reasons in expected["anomaly_reasons"].to_pylist()]
    assert [json.loads(info)["error_type"] for info in found["info"].to_pylist()[298:]] == ["not_finite"] * 2


# ---- streams ---------------------------------------------------------------------------------------


def test_messages_are_scored_and_published_again(first_uri, table, expected, tmp_path):
    pubsub = pytest.importorskip("pipeline.pubsub_emulator", reason="needs the extra gcp")
    rows = table.slice(0, 20).to_pylist()  # Beam YAML takes an absent key for missing, but no null
    messages = [json.dumps({k: v for k, v in row.items() if v is not None}).encode() for row in rows]
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "count": {"type": "integer"}}}
    schema["properties"] |= {"length": {"type": "number"}, "color": {"type": "string"}}
    topics = {name: f"projects/project/topics/{name}" for name in ("rows", "scores")}
    subscriptions = {name: f"projects/project/subscriptions/{name}" for name in topics}
    transforms = [
        step("ReadFromPubSub", subscription=subscriptions["rows"], format="JSON", schema=schema),
        step("ScoreAnomalies", "ReadFromPubSub", bundle=first_uri, reasons=1),
        step("WriteToPubSub", "ScoreAnomalies", topic=topics["scores"], format="JSON"),
    ]
    spec = {"pipeline": {"transforms": transforms}, "providers": [{"include": str(PROVIDER)}]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(spec))
    with pubsub.PubSubEmulator() as emulator:
        for name, topic in topics.items():
            emulator.publisher().create_topic(name=topic)
            emulator.subscriber().create_subscription(name=subscriptions[name], topic=topic)
        emulator.publisher().publish(topic=topics["rows"], messages=[{"data": data} for data in messages])
        command = [sys.executable, "-m", "apache_beam.yaml.main", f"--yaml_pipeline_file={tmp_path}/pipeline.yaml"]
        with (tmp_path / "log").open("w") as log:
            job = subprocess.Popen(
                [*command, "--streaming", "--runner=BundleBasedDirectRunner"],
                env={**os.environ, "PUBSUB_EMULATOR_HOST": emulator.host},
                stdout=log,
                stderr=log,
            )
        try:
            found: dict[int, dict] = {}

            def all_came() -> bool:
                assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
                pulled = emulator.subscriber().pull(subscription=subscriptions["scores"], max_messages=100)
                scored = [json.loads(received.message.data) for received in pulled.received_messages]
                found.update({row["n"]: row for row in scored})
                return len(found) == 20

            until(all_came)
        finally:
            job.kill()
            job.wait()
    wanted = expected.slice(0, 20).to_pylist()
    np.testing.assert_allclose(
        [found[n]["anomaly_score"] for n in range(20)], [row["anomaly_score"] for row in wanted], rtol=1e-4, atol=1e-3
    )
    assert [found[n]["anomaly_reasons"][0]["feature"] for n in range(20)] == [
        row["anomaly_reasons"][0]["feature"] for row in wanted
    ]


# ---- construction ----------------------------------------------------------------------------------


def test_dead_letters_of_yaml_have_the_fields_of_tables():
    assert list(DeadLetter._fields) == DEAD_LETTER_SCHEMA.names


def test_beam_yaml_knows_the_types_of_the_config():
    (provider,) = load_providers(str(PROVIDER))
    fields = provider.config_schema("ScoreAnomalies").fields
    assert {field.name for field in fields} == set(inspect.signature(ScoreAnomalies).parameters)
    assert all(field.description for field in fields)
    types = {field.name: typing_from_runner_api(field.type) for field in fields}
    assert (types["bundle"], types["threshold"]) == (typing.Optional[str], typing.Optional[np.float64])  # noqa: UP045
    assert types["models_by_key"] is typing.Any
    assert "anomaly score in nats" in provider.description("ScoreAnomalies")


def test_arguments_are_checked_at_construction(first_uri, tmp_path):
    with pytest.raises(BundleError, match="no bundle there"):
        ScoreAnomalies(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="columns: expected a list of names, got 'length'"):
        ScoreAnomalies(first_uri, columns="length")
    for wrong in ("bad", {}, {"output": "bad", "threshold": 1}, {"outputs": "bad"}):
        with pytest.raises(ValueError, match=r"error_handling: expected \{output: NAME\}, got"):
            ScoreAnomalies(first_uri, error_handling=wrong)
    with pytest.raises(ValueError, match="error_handling: expected a name other than 'good'"):
        ScoreAnomalies(first_uri, error_handling={"output": "good"})


def test_arguments_of_models_by_key_are_checked_at_construction(first_uri, tmp_path):
    with pytest.raises(ValueError, match="bundle: expected the URI of one, or else models_by_key"):
        ScoreAnomalies()
    with pytest.raises(ValueError, match="key: expected with models_by_key the column that holds it, got none"):
        ScoreAnomalies(models_by_key={"a": first_uri})
    with pytest.raises(
        ValueError, match=r"models_by_key: expected URIs by key, or one with \{key\} in it, got \['x'\]"
    ):
        ScoreAnomalies(models_by_key=["x"], key="site")
    with pytest.raises(BundleError, match="no bundle there"):
        ScoreAnomalies(models_by_key={"a": first_uri}, key="site", default_model=str(tmp_path / "none"))
    rows = beam.Pipeline() | beam.Create([beam.Row(length=1.0, count=1, color="red")])
    with pytest.raises(ValueError, match="site: named in key, but the rows have only length, count, color"):
        _ = rows | ScoreAnomalies(models_by_key={"a": first_uri}, key="site")


def test_rows_without_columns_are_refused(first_uri):
    with pytest.raises(ValueError, match="expected rows of known columns, got"):
        _ = beam.Pipeline() | beam.Create([{"length": 1.0}]) | ScoreAnomalies(first_uri)


def test_rows_that_do_not_fit_are_refused_before_anything_runs(first_uri, table, tmp_path):
    pq.write_table(table.drop_columns(["count"]), tmp_path / "in.parquet")
    transforms = [
        step("ReadFromParquet", path=f"{tmp_path}/in.parquet"),
        step("ScoreAnomalies", "ReadFromParquet", bundle=first_uri),
    ]
    with pytest.raises(
        ValueError, match=r"ScoreAnomalies.*the rows do not fit the model: count: expected such a column"
    ):
        run(transforms, tmp_path)
    transforms[1]["config"]["reason"] = 3
    with pytest.raises(ValueError, match="unexpected argument 'reason'"):
        run(transforms, tmp_path)


def test_building_one_loads_no_tensorflow(first_uri):
    code = f"""
import sys
import apache_beam as beam
from pipeline.yaml_provider import ScoreAnomalies
p = beam.Pipeline()
p | beam.Create([beam.Row(length=1.0, count=1, color="red")]) | ScoreAnomalies({first_uri!r}, reasons=1)
p.to_runner_api()
print("tensorflow" in sys.modules or "keras" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]

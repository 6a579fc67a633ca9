"""BigQuery's REST API as Beam's connectors use it, on this machine: jobs that load and export files in Cloud Storage.

Files are loaded by DuckDB, which knows JSON Lines by a schema and nothing of this project; what it cannot read as the
schema says fails the job. Exports are Avro as BigQuery documents it.
"""

import base64
import io
import json
import re
import tempfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import duckdb
import fastavro
import pytest
from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2
from apache_beam.io.gcp.internal.clients.bigquery import bigquery_v2_messages as messages
from apitools.base.py import encoding

_DUCKDB = {
    "STRING": "VARCHAR",
    "BYTES": "VARCHAR",  # base64
    "INTEGER": "BIGINT",
    "FLOAT": "DOUBLE",
    "NUMERIC": "DECIMAL(38, 9)",
    "BOOLEAN": "BOOLEAN",
    "TIMESTAMP": "TIMESTAMPTZ",
    "DATETIME": "TIMESTAMP",
    "DATE": "DATE",
    "TIME": "TIME",
}
_AVRO = {
    "STRING": "string",
    "BYTES": "bytes",
    "INTEGER": "long",
    "FLOAT": "double",
    "NUMERIC": {"type": "bytes", "logicalType": "decimal", "precision": 38, "scale": 9},
    "BIGNUMERIC": {"type": "bytes", "logicalType": "decimal", "precision": 77, "scale": 38},
    "BOOLEAN": "boolean",
    "TIMESTAMP": {"type": "long", "logicalType": "timestamp-micros"},
    "DATETIME": {"type": "string", "logicalType": "datetime"},
    "DATE": {"type": "int", "logicalType": "date"},
    "TIME": {"type": "long", "logicalType": "time-micros"},
    "GEOGRAPHY": {"type": "string", "sqlType": "GEOGRAPHY"},
    "JSON": {"type": "string", "sqlType": "JSON"},
}


class Answer(Exception):
    """An error that the API answers."""

    def __init__(self, code, reason, message):
        super().__init__(message)
        self.code, self.reason = code, reason


class BigQuery:
    """Tables by their names, as lists of rows; and the jobs that worked on them.

    Args:
        read: Gives the bytes of a file in Cloud Storage.
        write: Puts bytes there.
    """

    def __init__(self, read, write):
        self._read, self._write = read, write
        self.datasets, self.tables, self.jobs, self.queries, self.fault = {"flights"}, {}, {}, {}, None

    def create(self, name, fields, rows=(), kind="TABLE"):
        self.tables[name] = {"fields": fields, "rows": list(rows), "type": kind}

    def table(self, name):
        if name not in self.tables:
            raise Answer(404, "notFound", f"Not found: Table my-project:flights.{name}")
        found = self.tables[name]
        return {
            "kind": "bigquery#table",
            "tableReference": {"projectId": "my-project", "datasetId": "flights", "tableId": name},
            "schema": {"fields": found["fields"]},
            "numRows": str(len(found["rows"])),
            "numBytes": "1000",
            "type": found["type"],
        }

    def start(self, body):
        job = json.loads(body)
        # Strictly, as Google reads it: what the API's own message does not have is refused.
        known = encoding.JsonToMessage(messages.Job, json.dumps(job))
        if known.all_unrecognized_fields():
            raise Answer(400, "invalid", f"unknown fields {known.all_unrecognized_fields()}")
        settings, reference = job["configuration"], job["jobReference"]
        job |= {"id": reference["jobId"], "status": {"state": "DONE"}, "statistics": {}}
        try:
            if "load" in settings:
                self._load(settings["load"])
            elif "extract" in settings:
                self._extract(settings["extract"])
            else:
                job["statistics"]["query"] = {"schema": {"fields": self._query(settings)}, "referencedTables": []}
        except Answer as error:
            if settings.get("dryRun"):
                raise
            job["status"]["errorResult"] = {"reason": error.reason, "message": str(error)}
        if not settings.get("dryRun"):
            self.jobs[reference["jobId"]] = job
        return job

    def _load(self, settings):
        name, fields = settings["destinationTable"]["tableId"], settings["schema"]["fields"]
        if settings["sourceFormat"] != "NEWLINE_DELIMITED_JSON":
            raise Answer(400, "invalid", settings["sourceFormat"])
        old = self.tables.get(name, {"rows": []})["rows"]
        if old and settings["writeDisposition"] == "WRITE_EMPTY":
            raise Answer(409, "duplicate", f"Already Exists: Table {name}")
        if self.fault:
            raise Answer(400, "invalid", self.fault)
        self.create(name, fields, [row for uri in settings["sourceUris"] for row in _as_rows(self._read(uri), fields)])

    def _extract(self, settings):
        found = self.tables[settings["sourceTable"]["tableId"]]
        if (settings["destinationFormat"], settings["useAvroLogicalTypes"]) != ("AVRO", True):
            raise Answer(400, "invalid", settings["destinationFormat"])
        schema = fastavro.parse_schema(
            {"type": "record", "name": "Root", "fields": list(_avro_fields(found["fields"]))}
        )
        half = -(-len(found["rows"]) // 2)
        for part, rows in enumerate((found["rows"][:half], found["rows"][half:])):
            stream = io.BytesIO()
            fastavro.writer(stream, schema, rows)
            self._write(settings["destinationUris"][0].replace("*", f"{part:012}"), stream.getvalue())

    def _query(self, settings):
        query = settings["query"]
        if query["query"] not in self.queries:
            raise Answer(400, "invalidQuery", "Syntax error")
        source, keep = self.queries[query["query"]]
        fields = [field for field in self.tables[source]["fields"] if field["name"] in keep]
        if not settings.get("dryRun"):
            rows = [{name: row[name] for name in keep} for row in self.tables[source]["rows"]]
            self.create(query["destinationTable"]["tableId"], fields, rows)
        return fields

    def answer(self, command, path, body):
        place = re.fullmatch(r"/bigquery/v2/projects/my-project/(\w+)(?:/(\w[\w.-]*))?(?:/tables(?:/(\w+))?)?", path)
        if place is None:
            raise Answer(404, "notFound", path)
        kind, name, table = place.groups()
        if kind == "jobs":
            return self.start(body) if command == "POST" else self.jobs[name]
        if command == "POST":
            resource = json.loads(body)
            reference = resource.get(
                "tableReference", resource["datasetReference"] if table is None and not name else {}
            )
            if "tableId" in reference:
                self.create(reference["tableId"], resource["schema"]["fields"])
            else:
                self.datasets.add(reference["datasetId"])
            return resource
        if name not in self.datasets:
            raise Answer(404, "notFound", f"Not found: Dataset my-project:{name}")
        if command == "DELETE":
            self.datasets.discard(name) if table is None else self.tables.pop(table, None)
            return {}
        reference = {"projectId": "my-project", "datasetId": name}
        return self.table(table) if table else {"datasetReference": reference, "location": "US"}


def _as_rows(content, fields):
    """The rows of JSON Lines, typed, as DuckDB reads them by the schema."""
    names = {field["name"] for field in fields}
    unknown = {name for line in content.splitlines() for name in json.loads(line)} - names
    if unknown:
        raise Answer(400, "invalid", f"No such field: {unknown}")
    columns = {field["name"]: _duckdb_type(field) for field in fields}
    with duckdb.connect() as connection, tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(content)
        file.flush()
        connection.execute("SET TimeZone = 'UTC'")
        try:
            query = "SELECT * FROM read_json(?, format = 'newline_delimited', columns = ?)"
            rows = connection.sql(query, params=[file.name, columns]).to_arrow_table().to_pylist()
        except duckdb.Error as error:
            raise Answer(400, "invalid", f"Error while reading data: {error}") from error
    return [{field["name"]: _decoded(row[field["name"]], field) for field in fields} for row in rows]


def _duckdb_type(field):
    if field["type"] == "RECORD":
        items = (f'"{item["name"]}" {_duckdb_type(item)}' for item in field["fields"])
        kind = f"STRUCT({', '.join(items)})"
    else:
        kind = _DUCKDB[field["type"]]
    return f"{kind}[]" if field.get("mode") == "REPEATED" else kind


def _decoded(cell, field):
    """As Avro's writer wants it: bytes as bytes, the text of a DATETIME."""
    if cell is None:
        return [] if field.get("mode") == "REPEATED" else None
    if field.get("mode") == "REPEATED":
        return [_decoded(item, {**field, "mode": "NULLABLE"}) for item in cell]
    if field["type"] == "RECORD":
        return {item["name"]: _decoded(cell[item["name"]], item) for item in field["fields"]}
    if field["type"] == "BYTES":
        return base64.b64decode(cell, validate=True)
    return cell.isoformat() if field["type"] == "DATETIME" else cell


def _avro_fields(fields, path="Root"):
    for field in fields:
        if field["type"] == "RECORD":
            name = f"{path}_{field['name']}"
            kind = {"type": "record", "name": name, "fields": list(_avro_fields(field["fields"], name))}
        else:
            kind = _AVRO[field["type"]]
        mode = field.get("mode", "NULLABLE")
        kind = (
            {"type": "array", "items": kind} if mode == "REPEATED" else ["null", kind] if mode == "NULLABLE" else kind
        )
        yield {"name": field["name"], "type": kind}


def _handler(service):
    class Handler(BaseHTTPRequestHandler):
        def serve(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                code, answer = 200, service.answer(self.command, self.path.partition("?")[0], body)
            except Answer as error:
                details = {"reason": error.reason, "message": str(error)}
                code, answer = error.code, {"error": {"code": error.code, "message": str(error), "errors": [details]}}
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = serve

        def log_message(self, *_):
            pass

    return Handler


@contextmanager
def bigquery_service(read, write):
    """Where Google's and Beam's clients find it while the block runs."""
    service = BigQuery(read, write)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(service))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGQUERY_EMULATOR_HOST", url)
        patch.setattr(BigqueryV2, "BASE_URL", f"{url}/bigquery/v2/")  # Beam's client has no flag or variable for it
        try:
            yield service
        finally:
            server.shutdown()
            server.server_close()

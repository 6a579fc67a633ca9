"""A GCS and an S3 server, as a program: prints their addresses as a line of JSON and serves until its input ends.

Of their own process, because Arrow keeps Python's lock while it waits for some of a store's answers.
"""

import json
import logging
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from moto.server import ThreadedMotoServer


class GcsHandler(RequestHandler):
    """The emulator, which also gives out tokens: Beam's client asks for one before it asks for anything else."""

    def do_POST(self):
        if self.path != "/token":
            super().do_POST()
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        content = json.dumps({"access_token": "x", "token_type": "Bearer", "expires_in": 3600}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket("bucket", storage)
    # The emulator's own server has one thread: a reader that leaves a download half read would block it for good.
    gcs = ThreadingHTTPServer(("127.0.0.1", 0), partial(GcsHandler, storage))
    gcs.daemon_threads = True
    threading.Thread(target=gcs.serve_forever, daemon=True).start()
    s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    urls = {"gs": f"http://127.0.0.1:{gcs.server_port}", "s3": "http://{}:{}".format(*s3.get_host_and_port())}
    print(json.dumps(urls), flush=True)
    sys.stdin.read()
    s3.stop()

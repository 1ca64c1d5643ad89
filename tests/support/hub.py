"""A server that gives one data set by the Hugging Face hub's protocol, as far as a download needs it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = 40 * "0"


@contextmanager
def serve(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the files that have been asked for, as long as the `with` block lasts."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    given: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            file = files.get(path.removeprefix(f"/datasets/{name}/resolve/{COMMIT}/"))
            if path.startswith(f"/api/datasets/{name}/tree/"):
                entries = [
                    {"type": "file", "path": each, "size": found.stat().st_size, "oid": COMMIT}
                    for each, found in files.items()
                ]
                body = json.dumps(entries).encode()
            elif path.startswith(f"/api/datasets/{name}/"):
                siblings = [{"rfilename": each} for each in files]
                body = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            elif file is not None:
                body = file.read_bytes()
                given.extend([file.name] if with_body else [])
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", hashlib.sha256(body).hexdigest())
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", given
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

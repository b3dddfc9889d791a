"""A hub of one model on this machine: what the hub's client asks for, answered from a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

NAME, COMMIT, OLD_COMMIT = "some-org/some-model", "c" * 40, "b" * 40


@contextlib.contextmanager
def hub_of(folder: Path, old: Path | None = None) -> Iterator[str]:
    """The address to give as HF_ENDPOINT, while it answers. `old`: what the model is at its revision of that name."""
    commits = {COMMIT: folder, **({} if old is None else {OLD_COMMIT: old})}
    contents = {commit: {path.name: path for path in place.iterdir() if path.is_file()}
                for commit, place in commits.items()}

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = urlsplit(self.path).path
            commit = OLD_COMMIT if {"old", OLD_COMMIT} & set(path.split("/")) else COMMIT
            files = contents[commit]
            self.commit = commit
            model = {"id": NAME, "modelId": NAME, "sha": commit, "private": False, "gated": False,
                     "siblings": [{"rfilename": name} for name in files]}
            tree = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
                    for name, file in files.items()]
            if path.startswith(f"/api/models/{NAME}/tree/"):
                self.give(200, json.dumps(tree).encode(), body)
            elif path == f"/api/models/{NAME}" or path.startswith(f"/api/models/{NAME}/revision/"):
                self.give(200, json.dumps(model).encode(), body)
            elif path.startswith(f"/{NAME}/resolve/") and (file := files.get(path.rpartition("/")[2])):
                self.give(200, file.read_bytes(), body, ETag=f'"{_oid(file)}"')
            elif path.startswith(f"/{NAME}/resolve/"):
                self.give(404, b"", body, **{"X-Error-Code": "EntryNotFound"})
            else:
                self.give(404, b'{"error": "Repository not found"}', body, **{"X-Error-Code": "RepoNotFound"})

        def give(self, code: int, content: bytes, body: bool, **headers: str) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), "X-Repo-Commit": self.commit, **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()

"""Servers on loopback that speak as much of the Hugging Face hub's protocol as the tests need."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # where nobody listens


def environment_of(endpoint: str) -> dict:
    """With which a program takes `endpoint` for the hub."""
    return {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextlib.contextmanager
def serving(handler):
    """The endpoint at which `handler` answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")


@contextlib.contextmanager
def serve_repository(folder: Path):
    """`folder` as the hub repository somebody/mini: (endpoint, list of (method, path, range), dict of files whose
    connection is to be cut half way, once)."""
    requests, broken = [], {}

    class Repository(Handler):
        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            requests.append((self.command, path, self.headers.get("Range")))
            if path.startswith("/api/models/somebody/mini"):
                return self.list_files(path)
            prefix = "/somebody/mini/resolve/"
            if not path.startswith(prefix):
                return self.answer(404 if "somebody/mini" in path else 401, X_Error_Code="RepoNotFound", X_Error_Message="-")
            name = path[len(prefix):].split("/", 1)[1]
            if not (folder / name).is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="-")
            return self.send_file(name, (folder / name).read_bytes())

        do_HEAD = do_GET

        def list_files(self, path: str):
            names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
            if "/tree/" in path:
                below = path.split("/tree/")[1].partition("/")[2]
                return self.answer_json([{"type": "file", "path": n, "size": 1, "oid": COMMIT}
                                         for n in names if n.startswith(below)])
            return self.answer_json({"id": "somebody/mini", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]})

        def send_file(self, name: str, body: bytes):
            whole, start = len(body), 0
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if self.headers.get("Range"):
                start = int(self.headers["Range"].split("=")[1].split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
                body = body[start:]
            if self.command == "GET" and broken.pop(name, None):
                self.send_response(200)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            self.answer(206 if start else 200, body, **headers)

    with serving(Repository) as endpoint:
        yield endpoint, requests, broken


@contextlib.contextmanager
def serve_uploads(refused: str = ""):
    """A hub that takes uploads: (endpoint, {path: content} of what was committed, list of (path, token) of the posts).

    It checks cards, and with `refused` refuses every one for that reason.
    """
    stored, posts = {}, []

    class Uploads(Handler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            here = f"http://127.0.0.1:{self.server.server_port}"
            if self.command == "PUT":
                stored[self.path] = body
                return self.answer_json({})
            posts.append((self.path, self.headers.get("Authorization")))
            if self.path == "/api/validate-yaml":
                card = json.loads(body)
                assert card["repoType"] == "model" and card["content"].startswith("---\n")
                return self.answer(400, refused.encode()) if refused else self.answer_json({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                return self.answer_json({"files": [
                    {"path": f["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(body)["files"]]})
            if self.path.endswith("/objects/batch"):
                return self.answer_json({"transfer": "basic", "objects": [
                    {**o, "actions": {"upload": {"href": f"{here}/large/{o['oid']}"}}} for o in json.loads(body)["objects"]]})
            if "/commit/" in self.path:
                self.commit(body)
                return self.answer_json({"commitUrl": f"{here}/somebody/student/commit/{COMMIT}", "commitOid": COMMIT})
            return self.answer_json({"name": "somebody/student", "url": f"{here}/somebody/student"})

        do_PUT = do_POST

        def commit(self, body: bytes):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    stored[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    stored[line["value"]["path"]] = stored.pop(f"/large/{line['value']['oid']}")

        def do_GET(self):
            self.answer_json({"id": "somebody/student", "sha": COMMIT, "siblings": []})

        do_HEAD = do_GET

    with serving(Uploads) as endpoint:
        yield endpoint, stored, posts

"""Loading a teacher by hub id, against a server on loopback that serves the embedded teacher as a hub repository."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from urllib.parse import unquote, urlparse

import pytest
from conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = ROOT / "checkpoints" / "mini-teacher"
PROGRAM = ("import sys; sys.path.insert(0, '.')\nimport common, torch\nfrom common.teacher import load_teacher\n"
           "teacher = load_teacher(sys.argv[1], torch.device('cpu'))\n"
           "print('loaded', sum(p.numel() for p in teacher.unet.parameters()))\n")


def environment_of(server) -> dict:
    """With which a program takes the server for the hub."""
    return {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def hub():
    """(environment that points at the server, list of (method, path, range) requests, dict of what to break)."""
    requests, broken = [], {}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            requests.append((self.command, path, self.headers.get("Range")))
            if path.startswith("/api/models/somebody/mini"):
                names = [str(f.relative_to(FOLDER)).replace(os.sep, "/") for f in FOLDER.rglob("*") if f.is_file()]
                if "/tree/" in path:
                    below = path.split("/tree/")[1].partition("/")[2]
                    listing = [{"type": "file", "path": n, "size": 1, "oid": COMMIT} for n in names if n.startswith(below)]
                else:
                    listing = {"id": "somebody/mini", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                return self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
            prefix = "/somebody/mini/resolve/"
            if not path.startswith(prefix):
                return self.answer(404 if "somebody/mini" in path else 401, X_Error_Code="RepoNotFound", X_Error_Message="-")
            name = path[len(prefix):].split("/", 1)[1]
            file = FOLDER / name
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="-")
            body, start = file.read_bytes(), 0
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            whole = len(body)
            if self.headers.get("Range"):
                start = int(self.headers["Range"].split("=")[1].split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
                body = body[start:]
            if self.command == "GET" and broken.pop(name, None):  # the line is cut half way, once
                self.send_response(200)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                return None
            return self.answer(206 if start else 200, body, **headers)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield environment_of(server), requests, broken
    server.shutdown()


def load(name, environment, home):
    return subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, cwd=ROOT,
                          env={**environment, "HF_HOME": str(home)})


def test_a_hub_id_loads_and_goes_on_after_a_cut_connection(hub, tmp_path):
    environment, requests, broken = hub
    weights = "unet/diffusion_pytorch_model.safetensors"
    broken[weights] = True
    done = load("somebody/mini", environment, tmp_path)
    assert done.returncode == 0 and "loaded 13038884" in done.stdout, done.stderr[-1500:]
    ranges = [r for method, path, r in requests if method == "GET" and path.endswith(weights) and r]
    assert any(int(r.split("=")[1].split("-")[0]) > 0 for r in ranges)  # not from the start again
    before = len(requests)
    again = load("somebody/mini", environment, tmp_path)
    assert again.returncode == 0 and not [p for m, p, _ in requests[before:] if m == "GET" and p.endswith(".safetensors")]


def test_an_unknown_id_is_one_clear_line(hub, tmp_path):
    environment, _, _ = hub
    done = load("somebody/else", environment, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: the teacher somebody/else") and "--mini" in done.stderr


def test_no_network_is_one_clear_line(hub, tmp_path):
    environment, _, _ = hub
    done = load("somebody/mini", {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # the hub's client notes its retries before it
    assert last.startswith("error: the teacher somebody/mini") and "--mini" in last


def test_a_full_disk_is_one_clear_line_and_the_download_goes_on_after(hub, small_disk):
    environment, _, _ = hub
    disk, grow = small_disk
    done = load("somebody/mini", environment, disk)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("error: ") and "full" in last, done.stderr[-1500:]
    grow()
    done = load("somebody/mini", environment, disk)
    assert done.returncode == 0 and "loaded 13038884" in done.stdout, done.stderr[-1500:]


def test_v3_uploads_its_student(small_set, tmp_path):
    """Against a server that speaks the hub's upload protocol: the commit and the large files are the saved folder."""
    pytest.importorskip("tensorboard", reason="pip install -r v3/requirements.txt")
    stored, tokens = {}, set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            here = f"http://127.0.0.1:{self.server.server_port}"
            if self.command == "PUT":
                stored[self.path] = body
                answer = {}
            else:
                tokens.add(self.headers.get("Authorization"))
                answer = {"name": "somebody/student", "url": f"{here}/somebody/student", "warnings": [], "errors": []}
            if "/preupload/" in self.path:
                answer = {"files": [{"path": f["path"], "shouldIgnore": False, "oid": None, "uploadMode":
                                     "lfs" if f["path"].endswith(".safetensors") else "regular"}
                                    for f in json.loads(body)["files"]]}
            elif self.path.endswith("/objects/batch"):
                answer = {"transfer": "basic", "objects": [
                    {**o, "actions": {"upload": {"href": f"{here}/large/{o['oid']}"}}} for o in json.loads(body)["objects"]]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        stored[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        stored[line["value"]["path"]] = stored.pop(f"/large/{line['value']['oid']}")
                answer = {"commitUrl": f"{here}/somebody/student/commit/{COMMIT}", "commitOid": COMMIT}
            self.answer(answer)

        do_PUT = do_POST

        def do_GET(self):
            self.answer({"id": "somebody/student", "sha": COMMIT, "siblings": []})

        do_HEAD = do_GET

        def answer(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = environment_of(server) | {"HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path)}
    arguments = [sys.executable, "v3/train_student_kd.py", "--teacher", str(FOLDER), "--data", str(small_set), "--train-split",
                 "train", "--val-split", "val", "--resolution", "32", "--channels", "32,48,64", "--groups", "4", "--steps", "2",
                 "--batch-size", "2", "--features", "effnet-lite0", "--eval-every", "0", "--final-samples", "4",
                 "--sample-steps", "2", "--no-cache", "--push-to-hub", "somebody/student", "--out"]
    done = subprocess.run([*arguments, str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    student = tmp_path / "run" / "student"
    assert stored == {f.relative_to(student).as_posix(): f.read_bytes() for f in student.rglob("*") if f.is_file()}
    assert tokens == {"Bearer hf_x"} and b"base_model" in stored["README.md"]
    server.shutdown()
    # a hub that cannot be reached ends the run before the training
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = subprocess.run([*arguments, str(tmp_path / "x")], capture_output=True, text=True, cwd=ROOT, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: --push-to-hub somebody/student failed"), done.stderr[-2000:]
    assert not (tmp_path / "x").exists()

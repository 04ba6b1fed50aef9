"""A stand-in for the hub's HTTP interface, on the loopback interface alone."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

SHA = "a" * 40
TOKEN = "hf_secretOfTheUser"


class Hub(BaseHTTPRequestHandler):
    """As much of the interface as listing, downloading and committing needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, code, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self):
        state = self.server.state
        if state.needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Unauthorized"}, X_Error_Message="Invalid credentials")
            return True
        return False

    def do_GET(self):
        state, path = self.server.state, unquote(urlsplit(self.path).path)
        if self.refused():
            return
        kind, _, rest = path.removeprefix("/api/").partition("/")
        if "/resolve/" in path:
            self.send_file(re.split(r"/resolve/[^/]+/", path)[1])
        elif kind not in ("datasets", "models") or not rest.startswith("them/things"):
            self.reply(404, {"error": "no"}, X_Error_Code="RepoNotFound")
        elif "/revision/" in path and path.split("/revision/")[1] not in state.revisions:
            self.reply(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        elif "/tree/" in path:
            self.reply(200, [entry(name, content) for name, content in state.files.items()])
        else:
            self.reply(
                200, {"id": "them/things", "sha": SHA, "siblings": [], "private": state.private}
            )

    do_HEAD = do_GET

    def send_file(self, name):
        state = self.server.state
        if name not in state.files:
            self.reply(404, X_Error_Code="EntryNotFound")
            return
        content = state.files[name]
        etag = hashlib.sha256(content).hexdigest()
        if self.command == "GET":
            state.sent.append(name)
            if state.damaged.get(name, 0):
                state.damaged[name] -= 1
                content = content[:-1] + b"?"
        first = int(re.search(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        if self.command == "GET":
            state.asked_from.append(first)
        if self.command == "GET" and state.cut_off_after and len(state.asked_from) > 1:
            self.reply(500)
            return
        if self.command == "GET" and state.cut_off_after:
            self.send_response(200)  # and the connection breaks in the middle
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: state.cut_off_after])
            self.close_connection = True
            return
        code = 206 if first else 200
        self.reply(code, content[first:], ETag=f'"{etag}"', X_Repo_Commit=SHA)

    def do_POST(self):
        state = self.server.state
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused():
            return
        if self.path.endswith("/validate-yaml"):
            self.reply(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/repos/create"):
            state.created.append(json.loads(body)["name"])
            self.reply(200, {"url": f"{state.url}/them/things"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            self.reply(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    state.files[value["path"]] = base64.b64decode(value["content"])
            where = {"commitUrl": f"{state.url}/them/things/commit/{SHA}", "commitOid": SHA}
            self.reply(200, where | {"pullRequestUrl": None, "hookOutput": "", "success": True})
        else:
            self.reply(404, {"error": self.path})


def entry(name, content):
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    said = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if name.endswith((".array_record", ".safetensors")):
        sha = hashlib.sha256(content).hexdigest()
        said["lfs"] = {"size": len(content), "oid": sha, "pointerSize": 130}
    return said


@contextlib.contextmanager
def running():
    """The state of a hub that answers while the block runs: its files, and what was asked of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    state = dict(url=url, files={}, sent=[], damaged={}, created=[], needs_token=False)
    state |= dict(private=False, revisions=["main", SHA], asked_from=[], cut_off_after=0)
    server.state = SimpleNamespace(**state)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server.state
    server.shutdown()
    server.server_close()
    thread.join()

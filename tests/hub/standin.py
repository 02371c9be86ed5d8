"""A stand-in for the hub: a real HTTP server that speaks what huggingface_hub asks for, and keeps what it is given."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER = "me"


@dataclass
class HubState:
    """What the hub has. `repos`: id → private; `files`: path → content; `faults`: part of a request's line and body →
    statuses to answer with, one after the other, the last one for ever if it is negative.
    """

    token: str
    address: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def fault(self, text: str) -> int:
        for part, statuses in self.faults.items():
            if part in text and statuses:
                return abs(statuses[0] if statuses[0] < 0 else statuses.pop(0))
        return 0


class Handler(BaseHTTPRequestHandler):
    """One request. Files that end in .safetensors go through LFS."""

    hub: HubState
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = re.fullmatch(r"/api/models/([^?]+?)(/revision/main)?", self.path)
        if not self._allowed(b""):
            return
        if found and found[1] in self.hub.repos:
            self._answer(
                200, {"id": found[1], "private": self.hub.repos[found[1]], "siblings": [], "tags": [], "sha": "0" * 40}
            )
        else:
            self._answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._allowed(body):
            return
        for pattern, act in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._yaml),
            (r"/api/models/(.+)/preupload/main", self._preupload),
            (r"/(.+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/(.+)/commit/main", self._commit),
        ):
            if found := re.fullmatch(pattern, self.path.partition("?")[0]):
                act(body, *found.groups())
                return
        self._answer(404, {"error": self.path})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert "authorization" not in self.headers  # the address is signed; the token is not for the store
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.hub.stored[self.path.rpartition("/")[2]] = body
        self._answer(200, {})

    def _allowed(self, body: bytes) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._answer(401, {"error": "Invalid username or password."})
            return False
        if status := self.hub.fault(f"{self.path} {body.decode(errors='replace')}"):
            self._answer(status, {"error": f"a fault of {status}"})
            return False
        return True

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        private = asked.get("visibility") == "private" or asked.get("private") is True
        known = repo in self.hub.repos
        self.hub.repos.setdefault(repo, private)
        self._answer(409 if known else 200, {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo})

    def _yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        good = re.match(r"---\n(?:[a-z_]+:.*\n|- .*\n)+---\n", content)
        self._answer(200 if good else 400, {"errors": [] if good else [{"message": "no head"}], "warnings": []})

    def _preupload(self, body: bytes, repo: str) -> None:
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = [
            dict(found)
            if found["oid"] in self.hub.stored
            else found | {"actions": {"upload": {"href": f"{self.hub.address}/store/{found['oid']}"}}}
            for found in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _commit(self, body: bytes, repo: str) -> None:
        assert repo in self.hub.repos
        lines = [json.loads(line) for line in body.splitlines()]
        names = []
        for line in lines[1:]:
            value = line["value"]
            inline = line["key"] == "file"
            self.hub.files[value["path"]] = (
                base64.b64decode(value["content"]) if inline else self.hub.stored[value["oid"]]
            )
            names.append(value["path"])
        self.hub.commits.append((lines[0]["value"]["summary"], names))
        number = f"{len(self.hub.commits):040d}"
        self._answer(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{number}", "commitOid": number})

    def _answer(self, status: int, value: dict, kind: str = "application/json") -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing is said."""


@contextmanager
def serving(token: str) -> Iterator[HubState]:
    """A hub that knows one token."""
    state = HubState(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

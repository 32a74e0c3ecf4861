"""As much of a Hub as a push and a download take, on the loopback interface and in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """Files by name, and the messages of the commits that brought them."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Its repositories, by their ids, and whose tokens it was shown."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str | None] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.fail(404, "")

    def create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        is_new = repo_id not in self.server.repositories
        self.server.repositories.setdefault(repo_id, Repository(asked.get("visibility") == "private"))
        self.answer({"url": f"{self.server.endpoint}/{repo_id}"}, status=200 if is_new else 409)

    def commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[repo_id]
        for line in lines:
            if line["key"] == "header":
                repository.commits.append(line["value"]["summary"])
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.endpoint}/{repo_id}/commit/{repository.head}"
        self.answer({"commitUrl": url, "commitOid": repository.head, "pullRequestUrl": None, "success": True})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repository = self.server.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            self.fail(404, "RepoNotFound")
        elif match[3] not in repository.files:
            self.fail(404, "EntryNotFound")
        else:
            content = repository.files[match[3]]
            etag = hashlib.sha1(content).hexdigest()
            self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.head})

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *what: Any) -> None:
        pass

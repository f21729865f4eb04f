"""A stand-in of the Hugging Face hub: what create_repo, upload_folder and snapshot_download ask for, with git LFS."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
LFS = (".safetensors", ".png", "tokenizer.json")


def blob(content: bytes) -> str:
    """An id of 40 digits, as git has them."""
    return hashlib.sha256(content).hexdigest()[:40]


class Hub:
    """Repositories and what was asked.

    Attributes:
        files: content by path, by repository.
        asked: method and path of each request.
        large: names of the files that came by LFS.
        refuse: HTTP status of every answer to a request that writes; 0 for none.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.large: list[str] = []
        self.refuse = 0
        self.private: set[str] = set()

    def sha(self, repo: str) -> str:
        return blob(json.dumps(sorted((name, blob(content)) for name, content in self.files[repo].items())).encode())


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do(self) -> None:
        path, sent = unquote(urlsplit(self.path).path), self.body()
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and (self.hub.refuse or not known) and parts[1:2] != ["validate-yaml"]:
            return self.answer({"error": "no"}, self.hub.refuse or 401)
        if self.command == "PUT":
            self.hub.objects[parts[-1]] = sent
            return self.answer(b"")
        if parts[0] == "api":
            return self.api(parts[1:], sent)
        if path.endswith(".git/info/lfs/objects/batch"):
            url = f"http://{self.headers['Host']}/lfs/"
            objects = json.loads(sent)["objects"]
            actions = [{**one, "actions": {"upload": {"href": url + one["oid"]}}} for one in objects]
            return self.answer({"transfer": "basic", "objects": actions})
        if parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), "/".join(parts[4:]))
        return self.answer({"error": path}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = do

    def api(self, parts: list[str], sent: bytes) -> None:
        hub = self.hub
        if parts == ["repos", "create"]:
            given = json.loads(sent)
            repo = f"{given.get('organization', 'me')}/{given['name']}"
            url = f"http://{self.headers['Host']}/{repo}"
            if repo in hub.files:
                return self.answer({"error": "You already created this model repo", "url": url}, 409)
            hub.files[repo] = {".gitattributes": b""}
            hub.private |= {repo} if given.get("visibility") == "private" or given.get("private") else set()
            return self.answer({"url": url})
        if parts == ["validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        repo = "/".join(parts[1:3])
        if repo not in hub.files:
            return self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        files, action = hub.files[repo], parts[3] if len(parts) > 3 else ""
        if action == "preupload":
            asked = json.loads(sent)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular"} for f in asked]
            return self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if action == "commit":
            for line in sent.splitlines():
                self.commit(files, **json.loads(line))
            url = f"http://{self.headers['Host']}/{repo}/commit/{hub.sha(repo)}"
            return self.answer({"commitUrl": url, "commitOid": hub.sha(repo), "success": True})
        if action == "tree":
            return self.answer([self.entry(name, content) for name, content in sorted(files.items())])
        siblings = [{"rfilename": name} for name in sorted(files)]
        return self.answer(
            {"id": repo, "modelId": repo, "sha": hub.sha(repo), "siblings": siblings, "private": False, "tags": []}
        )

    def commit(self, files: dict[str, bytes], key: str, value: Any) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.hub.objects[value["oid"]]
            self.hub.large.append(value["path"])
        elif key == "deletedFile":
            del files[value["path"]]

    @staticmethod
    def entry(name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": blob(content)}

    def resolve(self, repo: str, name: str) -> None:
        content = self.hub.files.get(repo, {}).get(name)
        if content is None:
            return self.answer({"error": name}, 404, X_Error_Code="EntryNotFound")
        return self.answer(content, ETag=f'"{blob(content)}"', X_Repo_Commit=self.hub.sha(repo))


@contextlib.contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """A hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

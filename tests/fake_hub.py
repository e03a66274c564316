"""A hub of models on this machine: repositories over HTTP, with the headers of the real one."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace

import flask
from werkzeug.serving import make_server

COMMITS = {"main": "a" * 40, "old": "b" * 40}
PIPELINE = {
    "model_index.json": b'{"unet": ["diffusers", "UNet2DModel"], "safety_checker": ["a", "B"]}',
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"weights" * 100,
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half" * 100,
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "safety_checker/model.safetensors": b"checker",
    "everything.safetensors": b"all of it in one file",
    "README.md": b"# Words",
    "unet/code.py": b"print('ours')",
}
REPOS = {
    "we/pipeline": PIPELINE,
    "we/gated": PIPELINE,
    "we/pickles": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "we/climbing": {"config.json": b"{}", "../../model.safetensors": b"weights"},
    "we/model": {"config.json": b'{"a": 2}', "model.safetensors": b"new"},
    "we/lying": {"config.json": b"{}", "model.safetensors": b"not what is served"},
}
TOKEN = "hf_token_of_the_test"


OLD_MODEL = {"config.json": b'{"a": 1}', "model.safetensors": b"old", "extra.json": b"{}"}
"""Of the repository `we/model` at its old revision; the files of the new one have the same sizes."""


def of_revision(repo: str, revision: str) -> dict[str, bytes]:
    is_old = repo == "we/model" and revision in ("old", COMMITS["old"])
    return OLD_MODEL if is_old else REPOS[repo]


@contextmanager
def serve_hub() -> Iterator[SimpleNamespace]:
    """Its `url`, and what it was `asked` for: repository, file, method."""
    app = flask.Flask("hub")
    asked = []

    def failing(repo: str, code: str, status: int) -> flask.Response:
        return flask.Response("no", status, {"X-Error-Code": code, "X-Error-Message": f"no to {repo}"})

    @app.get("/api/models/<owner>/<name>", defaults={"revision": "main"})
    @app.get("/api/models/<owner>/<name>/revision/<revision>")
    def info(owner: str, name: str, revision: str) -> object:
        repo = f"{owner}/{name}"
        if repo not in REPOS:
            return failing(repo, "RepoNotFound", 401)
        if revision not in (*COMMITS, *COMMITS.values()):
            return failing(repo, "RevisionNotFound", 404)
        siblings = [sibling(path, content) for path, content in of_revision(repo, revision).items()]
        return {
            "id": repo,
            "sha": COMMITS.get(revision, revision),
            "gated": "auto" if name == "gated" else False,
            "private": False,
            "siblings": siblings,
            "cardData": {"license": "openrail++"},
            "tags": [],
            "downloads": 0,
        }

    def sibling(path: str, content: bytes) -> dict[str, object]:
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        told: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": blob}
        if path.endswith(".safetensors"):
            told["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
        return told

    @app.get("/api/models/<owner>/<name>/tree/<revision>")
    def tree(owner: str, name: str, revision: str) -> object:
        files = REPOS[f"{owner}/{name}"].items()
        return [{"type": "file", "path": path, "size": len(content), "oid": "0" * 40} for path, content in files]

    @app.get("/<owner>/<name>/resolve/<revision>/<path:path>")
    def resolve(owner: str, name: str, revision: str, path: str) -> flask.Response:
        asked.append((f"{owner}/{name}", path, flask.request.method))
        if name == "gated" and flask.request.headers.get("authorization") != f"Bearer {TOKEN}":
            return failing(name, "GatedRepo", 403)
        content = of_revision(f"{owner}/{name}", revision)[path]
        if name == "lying" and path.endswith(".safetensors"):
            content = content[::-1]
        headers = {"X-Repo-Commit": COMMITS.get(revision, revision), "ETag": hashlib.sha256(content).hexdigest()}
        return flask.Response(content, headers=headers, mimetype="application/octet-stream")

    server = make_server("127.0.0.1", 0, app, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    finally:
        server.shutdown()

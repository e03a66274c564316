"""An S3 API over HTTP on this machine, and a proxy before it that fails as networks and servers do."""

import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import botocore.session
import pytest
from moto.server import ThreadedMotoServer

from dla_cache.remote import FolderObjects, MissingObjectError, ObjectStore, Patience, S3Objects

KEY_ID, SECRET = "AKIAKEYOFTHETEST", "secret-of-the-test"
PATIENCE = Patience(timeout_s=10, tries=4, first_wait_s=0.01)
HASTY = Patience(timeout_s=0.3, tries=9, first_wait_s=0.01)
SLOW_S = 0.6
"""Longer than the hasty one waits."""


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on; `faults` says what goes wrong with the next ones, in their order."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.faults: list[str] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.writing = threading.Lock()
        """The made server looks and writes in two steps; with one write at a time it creates once."""

    def put(self, path: str) -> None:
        """Makes a bucket, or an empty object of any name, past the proxy."""
        connection = http.client.HTTPConnection(*self.target)
        connection.request("PUT", f"/{path}", headers={"Host": "127.0.0.1"})
        assert connection.getresponse().status == 200
        connection.close()

    def handle_error(self, *_: object) -> None:
        """A client that went away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_one_request(self) -> None:
        super().handle_one_request()
        self.close_connection = True

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, dict(self.headers)))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "dropped":
            return
        if fault.isdigit():
            self.reply(
                int(fault), f"<Error><Code>Made</Code><AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId></Error>".encode()
            )
            return
        headers = {name: value for name, value in self.headers.items() if name != "Expect"}
        with self.server.writing:
            connection = http.client.HTTPConnection(*self.server.target)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault != "lost":
            length = answer.getheader("Content-Length") or str(len(content))
            headers = {**dict(answer.getheaders()), "Content-Length": length}
            self.reply(answer.status, content[: len(content) // 2] if fault == "cut" else content, headers)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in (headers or {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    yield made.get_host_and_port()
    made.stop()


@pytest.fixture(scope="session")
def running_proxy(server: tuple[str, int]) -> Iterator[FaultyProxy]:
    with FaultyProxy(server) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture(scope="session")
def read_once() -> Iterator[None]:
    """The description of the API, half a second of JSON, is read by the first client only."""
    shared = botocore.session.create_loader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", lambda *_: shared)
        yield


@pytest.fixture
def proxy(running_proxy: FaultyProxy, read_once: None, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """The endpoint of a test; its environment has the credentials, and no file of the user's counts."""
    environment = {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{running_proxy.server_port}",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SKIP_SIGNATURE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    running_proxy.faults.clear()
    running_proxy.requests.clear()
    return running_proxy


@pytest.fixture
def s3(proxy: FaultyProxy, request: pytest.FixtureRequest) -> S3Objects:
    """A prefix of a bucket of its own, behind the proxy."""
    bucket = f"bucket-{abs(hash(request.node.nodeid))}"
    proxy.put(bucket)
    return S3Objects(f"s3://{bucket}/some/store", PATIENCE)


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A place for objects, empty: every test with it holds for both."""
    return request.getfixturevalue("s3") if request.param == "s3" else FolderObjects(tmp_path / "objects")


@pytest.fixture
def made_s3() -> SimpleNamespace:
    """What a test must know: with importlib mode it cannot import its conftest."""
    return SimpleNamespace(key_id=KEY_ID, secret=SECRET, patience=PATIENCE, hasty=HASTY)


class MemoryObjects:
    """Objects in memory, with `meanwhile[n]` called just before the n-th look or change from now on."""

    def __init__(self) -> None:
        self.url = self.key = "memory"
        self.contents: dict[str, bytes] = {}
        self.meanwhile: dict[int, Callable[[], object]] = {}
        self.steps = 0

    def _step(self) -> None:
        self.steps += 1
        self.meanwhile.pop(self.steps, lambda: None)()

    def create(self, name: str, content: bytes) -> bool:
        self._step()
        return self.contents.setdefault(name, content) is content

    def names(self, beginning: str = "") -> list[str]:
        self._step()
        return [name for name in self.contents if name.startswith(beginning)]

    def read(self, name: str) -> bytes:
        self._step()
        if name not in self.contents:
            raise MissingObjectError(name)
        return self.contents[name]

    def delete(self, name: str) -> None:
        self._step()
        self.contents.pop(name, None)


@pytest.fixture
def memory_objects() -> type[MemoryObjects]:
    return MemoryObjects

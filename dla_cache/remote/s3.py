"""The objects below one prefix of an S3 API.

Endpoint, region, profile and credentials are those of every AWS tool: its environment variables and files. They are
never arguments, so none can end in a spec, a store or a message.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, TypeVar

from dla_cache.errors import MissingDependencyError, StoreError
from dla_cache.remote.objects import PIECE_BYTES, ObjectStat, changed_meanwhile, checked_name, missing
from dla_cache.remote.retries import PassingError, Patience, try_again

T = TypeVar("T")

SKIP_SIGNATURE = "AWS_SKIP_SIGNATURE"
"""Environment variable: `true` for a public bucket, which is read without credentials."""

CONNECTIONS = 32
"""Requests at once from one process; more wait for their turn."""

PASSING_CODES = frozenset(
    (
        "ConditionalRequestConflict",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
    )
)

NO_SUCH_BUCKET = "NoSuchBucket"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")


class S3Objects:
    """The objects below `s3://bucket/prefix`; threads may share one, and a forked process makes connections anew."""

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        """
        Raises:
            StoreError: if the URL is not of this form, or carries credentials.
        """
        self._bucket, self._prefix = _parse(url)
        self._patience = patience or Patience()
        self._client: Any = None
        self._client_pid = 0

    def __reduce__(self) -> tuple[type["S3Objects"], tuple[str, Patience]]:
        return S3Objects, (self.url, self._patience)  # connections do not travel to another process

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def key(self) -> str:
        return f"{self._connected().meta.endpoint_url} {self.url}"

    def read(self, name: str) -> bytes:
        return self._ask(name, "read", lambda client, _: _whole_body(client.get_object(**self._at(name))))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        if not 0 <= start < stop:
            raise ValueError(f"[{start}, {stop}) is no range of bytes")

        def ask(client: Any, _failures: int) -> bytes:
            try:
                return _whole_body(client.get_object(**self._at(name), Range=f"bytes={start}-{stop - 1}"))
            except client.exceptions.ClientError as error:
                if _status(error) == 416:  # it ends before `start`
                    return b""
                raise

        return self._ask(name, "read", ask)

    def read_into(self, name: str, file: BinaryIO, stat: ObjectStat) -> None:
        def ask(client: Any, _failures: int) -> None:
            try:
                answer = client.get_object(**self._at(name), IfMatch=stat.etag)
            except client.exceptions.ClientError as error:
                if _status(error) == 412:
                    raise changed_meanwhile(f"{self.url}/{name}") from error
                raise
            file.seek(0)
            n_bytes = sum(file.write(piece) for piece in answer["Body"].iter_chunks(PIECE_BYTES))
            if n_bytes != stat.size_bytes:
                raise PassingError(f"{n_bytes} of {stat.size_bytes} bytes came")

        self._ask(name, "read", ask)

    def write(self, name: str, content: bytes) -> None:
        self._ask(name, "written", lambda client, _: client.put_object(**self._at(name), Body=content))

    def create(self, name: str, content: bytes) -> bool:
        return self._write_if(name, content, IfNoneMatch="*")

    def replace(self, name: str, content: bytes, etag: str) -> bool:
        return self._write_if(name, content, IfMatch=etag)

    def _write_if(self, name: str, content: bytes, **condition: str) -> bool:
        def ask(client: Any, failures: int) -> bool:
            try:
                client.put_object(**self._at(name), Body=content, **condition)
            except client.exceptions.ClientError as error:
                if _status(error) != 412:
                    raise
                if failures == 0:
                    return False
                # An earlier try may have come through and its answer got lost: then what is there is ours.
                try:
                    return _whole_body(client.get_object(**self._at(name))) == content
                except client.exceptions.NoSuchKey as gone:
                    raise PassingError("it was created and deleted by others at the same moment") from gone
            return True

        return self._ask(name, "written", ask)

    def names(self, beginning: str = "") -> Iterator[str]:
        return (name for name, _ in self.sizes(beginning))

    def sizes(self, beginning: str = "") -> Iterator[tuple[str, int]]:
        """The names that begin so; a key that ends in `/` is a folder of a file browser and no object."""
        token: dict[str, str] = {}
        while True:
            page = self._ask(beginning, "listed", partial(self._list, self._prefix + beginning, token))
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    yield checked_name(entry["Key"].removeprefix(self._prefix), self.url), entry["Size"]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def stat(self, name: str) -> ObjectStat:
        answer = self._ask(name, "read", lambda client, _: client.head_object(**self._at(name)))
        return ObjectStat(answer["ContentLength"], answer["ETag"])

    def delete(self, name: str) -> None:
        self._ask(name, "deleted", lambda client, _: client.delete_object(**self._at(name)))

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_name(name, self.url)}

    def _list(self, beginning: str, token: dict[str, str], client: Any, _failures: int) -> Any:
        return client.list_objects_v2(Bucket=self._bucket, Prefix=beginning, **token)

    def _ask(self, name: str, done: str, ask: Callable[[Any, int], T]) -> T:
        """What `ask` returns of a client and the number of failures so far; other failures as StoreError."""
        where = f"{self.url}/{name}".rstrip("/")
        client = self._connected()
        try:
            return try_again(lambda failures: _translated(ask, client, failures, where, done), self._patience)
        except PassingError as error:
            raise StoreError(
                f"`{where}` cannot be {done}: {error.what} ({self._patience.tries} tries)",
                hint="check network, endpoint and server, then run the same command again; it goes on from there",
            ) from error

    def _connected(self) -> Any:
        # Without a lock, which a fork could copy while it is held: two threads may connect at once, one client stays.
        if self._client_pid != os.getpid():
            self._client, self._client_pid = self._connect(), os.getpid()
        return self._client

    def _connect(self) -> Any:
        try:
            import boto3
            from botocore import UNSIGNED
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            raise MissingDependencyError(f"`{self.url}` needs `{error.name}`", hint="pip install 'dla[s3]'") from error
        try:
            return boto3.session.Session().client(
                "s3",
                config=Config(
                    connect_timeout=self._patience.timeout_s,
                    read_timeout=self._patience.timeout_s,
                    max_pool_connections=CONNECTIONS,
                    retries={"total_max_attempts": 1},  # it does not try again what breaks off in a body; we do
                    signature_version=UNSIGNED if os.environ.get(SKIP_SIGNATURE, "").lower() == "true" else None,
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise _refused(self.url, error) from error


def _translated(ask: Callable[[Any, int], T], client: Any, failures: int, where: str, done: str) -> T:
    """What `ask` returns; its failures as MissingObjectError, PassingError, or StoreError for what will not pass."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    try:
        return ask(client, failures)
    except exceptions.ClientError as error:
        status, code = _status(error), str(error.response.get("Error", {}).get("Code", ""))
        if status >= 500 or status in (408, 429) or code in PASSING_CODES:
            raise PassingError(f"the server answers {status} {code}".rstrip()) from error
        if status == 404 and code != NO_SUCH_BUCKET:
            raise missing(where) from error
        raise StoreError(
            f"`{where}` cannot be {done}: the server answers {status} {code}", hint=_cure(status)
        ) from error
    except (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        ResponseParserError,
    ) as error:
        # Not the error's own text: it holds the endpoint, and that may hold a password.
        raise PassingError(f"the connection failed ({type(error).__name__})") from error
    except (exceptions.BotoCoreError, ValueError) as error:
        raise _refused(where, error) from error


def _whole_body(answer: Any) -> bytes:
    content: bytes = answer["Body"].read()
    if len(content) != answer["ContentLength"]:
        raise PassingError(f"{len(content)} of {answer['ContentLength']} bytes came")
    return content


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _cure(status: int) -> str:
    if status in (401, 403):
        return (
            "check that the credentials are of this bucket and may list, read and write it;"
            f" for a public one set `{SKIP_SIGNATURE}=true`"
        )
    return "check bucket, region and endpoint (`AWS_ENDPOINT_URL`)"


def _refused(where: str, error: Exception) -> StoreError:
    """For what fails before a request is sent: no credentials, no such profile, an endpoint that is no URL."""
    return StoreError(
        f"`{where}` cannot be reached: no usable credentials, profile, region or endpoint ({type(error).__name__})",
        hint="name a profile (`AWS_PROFILE`) or set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`;"
        f" for a public bucket `{SKIP_SIGNATURE}=true`; the endpoint is `AWS_ENDPOINT_URL`",
    )


def _parse(url: str) -> tuple[str, str]:
    """Bucket and prefix, which ends in `/` unless it is empty.

    Raises:
        StoreError: if it is no such URL; what it says then shows no more of the URL than is safe.
    """
    scheme, rest = url.split("://", 1) if "://" in url else ("", url)
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3":
        raise StoreError(f"`{scheme}://` is no object store that dla can reach", hint="write `s3://bucket/prefix`")
    if "@" in rest or "?" in rest:
        raise StoreError(
            "the URL of a store holds `@` or `?`, which could be credentials",
            hint="write `s3://bucket/prefix`; credentials come from the environment or a profile",
        )
    if not _BUCKET.fullmatch(bucket):
        raise StoreError(f"`{bucket}` is no name of a bucket", hint="write `s3://bucket/prefix`")
    prefix = prefix.rstrip("/")
    return bucket, f"{checked_name(prefix, f's3://{bucket}')}/" if prefix else ""

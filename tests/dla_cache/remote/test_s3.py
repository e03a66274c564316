"""An S3 prefix behind a network that fails: what passes is waited for, what does not is said, without secrets."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_cache.errors import DlaError, MissingDependencyError, StoreError
from dla_cache.remote import MissingObjectError, Patience, S3Objects

CONTENT = bytes(range(256)) * 300
FAULTS = ["500", "503", "429", "dropped", "cut", "lost"]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_survives_a_fault(s3: S3Objects, proxy: Any, tmp_path: Path, fault: str) -> None:
    def with_fault(work: Any) -> Any:
        proxy.faults[:] = [fault]
        result = work()
        assert proxy.faults == []
        return result

    with_fault(lambda: s3.write("one", CONTENT))
    assert with_fault(lambda: s3.read("one")) == CONTENT
    assert with_fault(lambda: s3.read_range("one", 7, 999)) == CONTENT[7:999]
    assert with_fault(lambda: [*s3.names()]) == ["one"]
    stat = with_fault(lambda: s3.stat("one"))
    with (tmp_path / "file").open("w+b") as file:
        with_fault(lambda: s3.read_into("one", file, stat))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert with_fault(lambda: s3.create("two", CONTENT))
    with_fault(lambda: s3.delete("two"))
    assert [*s3.names()] == ["one"]


def test_an_answer_that_takes_too_long_is_asked_for_again(s3: S3Objects, proxy: Any, made_s3: SimpleNamespace) -> None:
    hasty = S3Objects(s3.url, made_s3.hasty)
    proxy.faults[:] = ["slow"]
    assert hasty.create("one", CONTENT)
    proxy.faults[:] = ["slow"]
    assert hasty.read("one") == CONTENT


@given(faults=st.lists(st.sampled_from(["500", "dropped", "lost", "cut"]), max_size=3), others=st.booleans())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_who_created_an_object_is_told_so_whatever_answers_got_lost(
    s3: S3Objects, proxy: Any, faults: list[str], others: bool
) -> None:
    proxy.faults.clear()
    s3.delete("one")
    if others:
        s3.write("one", b"another's")
    proxy.faults[:] = faults
    assert s3.create("one", b"mine") is not others
    assert s3.read("one") == (b"another's" if others else b"mine")


def test_a_name_that_was_taken_and_is_free_again_at_the_next_look_can_be_created(s3: S3Objects, proxy: Any) -> None:
    proxy.faults[:] = ["500", "412", "", ""]  # refused, taken by another, who then deleted it
    assert s3.create("one", b"mine")
    assert [method for method, _ in proxy.requests] == ["PUT", "PUT", "GET", "PUT"]


def test_after_its_last_try_a_fault_is_said(s3: S3Objects, proxy: Any, made_s3: SimpleNamespace) -> None:
    proxy.faults[:] = ["500"] * 99
    with pytest.raises(StoreError, match=r"`s3://bucket-.*/one` cannot be read: the server answers 500.*\(4 tries\)"):
        s3.read("one")
    assert len(proxy.requests) == made_s3.patience.tries


def test_waits_double_up_to_their_bound_and_differ() -> None:
    patience = Patience(first_wait_s=1, longest_wait_s=4)
    waits = [[patience.wait_s(failures) for _ in range(200)] for failures in (1, 2, 3, 4, 9)]
    for drawn, bound in zip(waits, (1, 2, 4, 4, 4), strict=True):
        assert 0.9 * bound < max(drawn) <= bound
        assert min(drawn) < 0.1 * bound


@pytest.mark.parametrize(("fault", "words"), [("403", "may list, read and write"), ("400", "AWS_ENDPOINT_URL")])
def test_a_refusal_is_not_asked_for_again(s3: S3Objects, proxy: Any, fault: str, words: str) -> None:
    proxy.faults[:] = [fault]
    with pytest.raises(StoreError, match=rf"(?s)the server answers {fault} Made\nhint: .*{words}"):
        s3.read("one")
    assert len(proxy.requests) == 1


def test_a_missing_object_is_not_asked_for_again(s3: S3Objects, proxy: Any) -> None:
    with pytest.raises(MissingObjectError):
        s3.read("one")
    assert len(proxy.requests) == 1


def test_a_missing_bucket_is_no_missing_object(proxy: Any) -> None:
    with pytest.raises(StoreError, match="404 NoSuchBucket") as caught:
        S3Objects("s3://no-such-bucket/store").read("one")
    assert not isinstance(caught.value, MissingObjectError)


ENDPOINT_WITH_PASSWORD = {"AWS_ENDPOINT_URL": "http://user:password-of-the-test@127.0.0.1:1"}
BROKEN = {
    "no server": {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
    "a password in the endpoint": ENDPOINT_WITH_PASSWORD,
    "an endpoint that is no URL": {"AWS_ENDPOINT_URL": "secret-of-the-test"},
    "no credentials": {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    "half of them": {"AWS_SECRET_ACCESS_KEY": None},
    "no such profile": {"AWS_PROFILE": "nobody"},
    "refused ones": {},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_failure_has_a_hint_and_shows_no_credentials(
    s3: S3Objects, proxy: Any, monkeypatch: pytest.MonkeyPatch, made_s3: SimpleNamespace, broken: str
) -> None:
    for name, value in BROKEN[broken].items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    proxy.faults[:] = ["403"]
    with pytest.raises(StoreError) as caught:
        s3.read("one")
    said = str(caught.value)
    assert "\nhint: " in said
    assert not any(secret in said for secret in (made_s3.key_id, made_s3.secret, "-of-the-test"))


@pytest.mark.parametrize(
    "url",
    ["s3://AKIA:secret@bucket/store", "s3://bucket/store?key=secret", "https://AKIA:secret@host/x", "s3:///secret"],
)
def test_a_url_that_is_no_prefix_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreError, match="write `s3://bucket/prefix`") as caught:
        S3Objects(url)
    assert "secret" not in str(caught.value)


def test_credentials_come_from_a_profile(
    s3: S3Objects, proxy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = AKIAOFPROFILE\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "work")
    s3.write("one", b"x")
    assert "AKIAOFPROFILE" in proxy.requests[-1][1]["Authorization"]


def test_a_public_bucket_is_read_without_credentials(
    s3: S3Objects, proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    s3.write("one", b"x")
    assert "Authorization" not in proxy.requests[-1][1]


def test_what_goes_to_another_process_holds_no_credentials(s3: S3Objects, made_s3: SimpleNamespace) -> None:
    s3.write("one", b"x")
    sent = repr(s3.__reduce__())
    assert made_s3.key_id not in sent
    assert made_s3.secret not in sent
    assert copy.copy(s3).read("one") == b"x"  # made by the same call


def test_a_missing_package_is_said_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dla\[s3\]'"):
        S3Objects("s3://bucket/store").read("one")


def test_a_folder_marker_is_no_object_and_a_name_that_leads_outside_is_refused(s3: S3Objects, proxy: Any) -> None:
    s3.write("one", b"x")
    proxy.put(s3.url.removeprefix("s3://") + "/")
    assert [*s3.names()] == ["one"]
    proxy.put(s3.url.removeprefix("s3://") + "/a/../../b")
    with pytest.raises(DlaError, match="no path below it"):
        list(s3.names())


def test_the_same_prefix_of_two_endpoints_has_two_keys(s3: S3Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    before = s3.key
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert S3Objects(s3.url).key != before
    assert S3Objects(s3.url).url == s3.url

"""Weights of gigabytes are hashed once, and again as soon as they could be others."""

import hashlib
import os
from pathlib import Path

import pytest

from dla_cache import remembered
from dla_cache.remembered import memory_file, sha256_of


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is worth remembering."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "WORTH_IT", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights of much")
    return path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_that_did_not_change_is_not_read_again(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sha256_of(weights) == digest(b"weights of much")
    monkeypatch.setattr("builtins.open", lambda *_arguments: pytest.fail("it was read again"))
    assert sha256_of(weights) == digest(b"weights of much")


def test_a_file_that_changed_is_read_though_its_size_and_time_are_the_same(weights: Path) -> None:
    sha256_of(weights)
    state = weights.stat()
    weights.write_bytes(b"weights of MUCH")
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert weights.stat().st_mtime_ns == state.st_mtime_ns
    assert sha256_of(weights) == digest(b"weights of MUCH")


@pytest.mark.parametrize("damage", [b"", b"[1]", b"{"])
def test_a_memory_that_is_damaged_or_cannot_be_written_costs_time_and_nothing_else(
    weights: Path, damage: bytes
) -> None:
    memory_file().parent.mkdir(parents=True)
    memory_file().write_bytes(damage)
    assert sha256_of(weights) == digest(b"weights of much")
    memory_file().unlink()
    memory_file().mkdir()
    assert sha256_of(weights) == digest(b"weights of much")


def test_small_files_leave_no_trace(weights: Path) -> None:
    weights.write_bytes(b"small")
    assert sha256_of(weights) == digest(b"small")
    assert not memory_file().exists()

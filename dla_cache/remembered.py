"""Hashes of large files, remembered from one process to the next: weights of gigabytes are read once, not by each."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from dla_cache.durable import write_durably

WORTH_IT = 2**24
"""Bytes from which on remembering is worth a file."""

BLOCK = 2**22

MOST = 10_000
"""Files that are remembered at most; then it begins anew."""


def memory_file() -> Path:
    """Where hashes are remembered; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dla" / "sha256.json"


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, hexadecimal; a file that has its size, times and inode still is not read."""
    state = os.stat(file)
    if state.st_size < WORTH_IT:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    key = json.dumps([str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino])
    known = _read()
    if key not in known:
        digest = hashlib.sha256()
        with open(file, "rb") as opened:
            while block := opened.read(BLOCK):
                digest.update(block)
        known = {**(_read() if len(known) < MOST else {}), key: digest.hexdigest()}
        with suppress(OSError):  # who cannot remember reads it again
            memory_file().parent.mkdir(parents=True, exist_ok=True)
            write_durably(memory_file(), json.dumps(known).encode())
    return known[key]


def _read() -> dict[str, str]:
    try:
        value = json.loads(memory_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

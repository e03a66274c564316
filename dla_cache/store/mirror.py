"""A store below a prefix of an object store, seen through a folder on this machine.

What is small, metadata and commit records, is copied into that folder, the mirror, and read there as of any store.
Shards are mapped out of a cache that has a bound. What is written goes to the prefix first; the mirror holds nothing
that is not there, and may be removed whenever nobody uses it.
"""

import hashlib
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from dla_cache.durable import locked_folder, make_folder, read_file, writing_to
from dla_cache.errors import DlaError, SpecError, StoreError, TooManyFilesError
from dla_cache.remote import FolderObjects, MissingObjectError, ObjectStore, ReadThroughCache, is_remote, open_objects
from dla_cache.remote.read_through import GB
from dla_cache.store.claims import CLAIMS
from dla_cache.store.creation import create_metadata
from dla_cache.store.files import COPY_IT, LocalFiles, StoreFiles, Turns
from dla_cache.store.layout import Layout
from dla_cache.store.metadata import LAYOUTS, StoreMetadata, read_metadata
from dla_cache.store.mirrored_records import MirroredRecords, fetch
from dla_cache.store.parts import ADOPTED, CARD, UNFINISHED
from dla_cache.store.record_files import RecordFiles
from dla_cache.store.row_files import OURS, index_name, listed_parts, row_files
from dla_cache.store.turns import POLL_S, ClaimedTurns

CACHE_DIR, CACHE_GB = "DLA_CACHE_DIR", "DLA_CACHE_GB"
"""Environment variables: the folder of mirrors and cached shards, and the bound of these shards. Neither decides what
is read, so they stand in no spec."""

SCHEME = "s3:"

TRIES = 20
"""Of several who begin or extend one store at the same moment all but one have to look again."""


def files_at(place: str | Path) -> StoreFiles:
    """The files of the store at a path or URL, which need not be there.

    Raises:
        StoreError: if it is a URL of something else than a prefix of an object store.
        SpecError: if the environment has another thing than a number as the bound of the cache.
    """
    if not is_remote(str(place)):
        refuse_lost_url(Path(place))
        return LocalFiles(Path(place))
    objects = open_objects(str(place))
    folder = Path(os.environ.get(CACHE_DIR) or Path.home() / ".cache" / "dla")
    return Mirror(objects, folder, _bound(os.environ.get(CACHE_GB, "20")))


def refuse_lost_url(path: Path) -> None:
    """Passes a path that was no URL before something took it for a path, which leaves one slash of two.

    Raises:
        StoreError: if it was.
    """
    if SCHEME in path.parts and not path.exists():
        bucket_and_prefix = path.parts[path.parts.index(SCHEME) + 1 :]
        raise StoreError(
            f"`{SCHEME}//{'/'.join(bucket_and_prefix)}` is no folder, and this works on folders only",
            hint=COPY_IT,
        )


def _bound(text: str) -> int:
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return int(float(text) * GB)
    raise SpecError(f"`{CACHE_GB}` is `{text}`", hint="set it to the gigabytes that cached shards may take, such as 20")


class Mirror:
    """A store below a prefix, and the copies of it on this machine, which processes share."""

    def __init__(self, objects: ObjectStore, folder: Path, max_bytes: int) -> None:
        """
        Args:
            folder: of the mirrors and cached shards of all stores.
            max_bytes: of cached shards, on disk and mapped.
        """
        self._objects = objects
        self._folder = folder
        self._max_bytes = max_bytes
        self._cache = ReadThroughCache(folder / "objects", max_bytes)
        self._root = folder / "stores" / hashlib.sha256(objects.key.encode()).hexdigest()[:32]
        self.path = self._root / "store"
        self._copies = FolderObjects(self.path)
        self._main: tuple[str, bytes, str] | None = None
        """Name, content and etag of the main file as the prefix has it."""
        self._mapped_bytes = 0

    def __reduce__(self) -> tuple[type["Mirror"], tuple[ObjectStore, Path, int]]:
        return Mirror, (self._objects, self._folder, self._max_bytes)

    @property
    def place(self) -> str:
        return self._objects.url

    def map(self, names: Sequence[str], sha256: str) -> list[Any]:
        # Several files have one hash together, which cannot be held against each as it comes.
        of_file = sha256 if len(names) == 1 else None
        contents = [self._cache.map(self._objects, name, sha256, of_file) for name in names]
        size_bytes = sum(map(len, contents))
        # A file that is mapped keeps its place on the disk though it was removed from the cache.
        if self._mapped_bytes and self._mapped_bytes + size_bytes > max(self._max_bytes, 2 * size_bytes):
            raise TooManyFilesError(
                f"more of `{self.place}` is mapped at a time than the cache `{self._folder}` may hold",
                hint=f"give it more: `{CACHE_GB}`",
            )
        for content in contents:
            if len(content):
                self._mapped_bytes += len(content)
                weakref.finalize(content, self._unmapped, len(content)).atexit = False
        return contents

    def _unmapped(self, size_bytes: int) -> None:
        self._mapped_bytes -= size_bytes

    def forget(self, names: Sequence[str], sha256: str) -> None:
        for name in names:
            self._cache.forget(self._objects, name, sha256)

    def size_bytes(self, name: str) -> int:
        return self._objects.stat(name).size_bytes

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        # By lists of a thousand each: one by one a million shards would take hours.
        folders = {_folder_of(name) for name in names}
        found = dict(entry for folder in sorted(folders) for entry in self._objects.sizes(f"{folder}/"))
        return {name: found[name] for name in names if name in found}

    def read(self, name: str) -> bytes:
        return self._objects.read(name)

    def entries(self) -> Iterator[tuple[str, str | None]]:
        return ((name, None) for name in sorted(self._objects.names()) if not _is_claim(name))

    def write(self, name: str, content: bytes) -> None:
        self._objects.write(name, content)

    def records(self, series: str) -> RecordFiles:
        return MirroredRecords(self._objects, self.path, series)

    @contextmanager
    def turns(self, is_committed: Callable[[str, int], bool]) -> Iterator[Turns]:
        with closing(ClaimedTurns(self._objects, is_committed)) as turns:
            yield turns

    @contextmanager
    def past_copies(self) -> Iterator[StoreFiles]:
        with tempfile.TemporaryDirectory(prefix="dla-") as folder:
            anew = Mirror(self._objects, Path(folder), self._max_bytes)
            anew.refresh()
            with anew.naming():
                yield anew

    @contextmanager
    def naming(self) -> Iterator[None]:
        try:
            yield
        except DlaError as error:
            error.message = error.message.replace(str(self.path), self.place)
            error.hint = error.hint and error.hint.replace(str(self.path), self.place)
            raise

    def refresh(self) -> None:
        with self._locked():
            self._pull()

    def create(self, wanted: StoreMetadata, *, append: bool) -> None:
        with self.naming(), self._locked():
            for _ in range(TRIES):
                self._pull()
                known = read_metadata(self.path).series if self._main is not None else {}
                create_metadata(self.path, wanted, append=append)
                if self._push(known):
                    return
                time.sleep(POLL_S)
            raise StoreError(f"others go on changing `{self.place}`", hint="run the same command again")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes of this machine from changing the mirror's metadata."""
        with writing_to(self._root):
            make_folder(self._root)
            with locked_folder(self._root):
                yield

    def _pull(self) -> None:
        """Makes the mirror's metadata what the prefix has."""
        while True:
            found = [(name, stat) for name in _main_files() if (stat := self._stat(name)) is not None]
            if not found:
                next(iter(self._objects.names(_main_files()[0])), None)  # tells where there is no such bucket
                # Nothing here may outlive its store, as for one that is begun at the same place.
                shutil.rmtree(self.path, ignore_errors=True)
                self._main = None
                return
            if len(found) > 1:
                names = " and ".join(f"`{name}`" for name, _ in found)
                raise StoreError(f"`{self.place}` has both {names}", hint="a prefix holds one store")
            name, stat = found[0]
            try:
                content = self._objects.read(name)
            except MissingObjectError:
                continue
            make_folder(self.path / "commits")
            self._main = name, content, stat.etag
            self._pull_rest(_layout_of(name), content)
            for other in _main_files():
                if other != name:
                    (self.path / other).unlink(missing_ok=True)
            if self._stat(name) == stat:  # else a former index of rows may be gone by now
                self._keep(name, content)
                return

    def _pull_rest(self, layout: Layout, main: bytes) -> None:
        """Copies all metadata that the main file names; of what is missing or damaged `read_metadata` tells."""
        with tempfile.TemporaryDirectory(dir=self._root) as folder:
            (Path(folder) / layout.main_file).write_bytes(main)
            try:
                attributes = layout.read_attributes(Path(folder))
                index, recipes = index_name(str(attributes["rows_sha256"])), layout.recipe_files(attributes)
            except (ValueError, KeyError, TypeError, AttributeError):
                return
        fetch(self._objects, self._copies, [index])
        parts = listed_parts(self.path, index)
        lacking = [name for name, size_bytes in parts.items() if self._local_size(name) != size_bytes]
        fetch(self._objects, self._copies, lacking)
        for name in (*recipes, ADOPTED, CARD, UNFINISHED):  # these change
            try:
                self._keep(name, self._objects.read(name))
            except MissingObjectError:
                (self.path / name).unlink(missing_ok=True)

    def _local_size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def _keep(self, name: str, content: bytes) -> None:
        # Left alone where it is the same, since its time tells readers whether they have to look again.
        if self._local_size(name) != len(content) or read_file(self.path / name) != content:
            self._copies.write(name, content)

    def _push(self, known: Collection[str]) -> bool:
        """Brings the mirror's metadata to the prefix, the main file last; whether nobody else changed it meanwhile.

        Args:
            known: the series of which it had been told before.
        """
        metadata = read_metadata(self.path)
        layout, files = metadata.layout, metadata.files(metadata.rows_sha256)
        content = files.pop(layout.main_file)
        rows = row_files(metadata.rows, metadata.rows_sha256)
        is_known = self._main is not None and self._main[:2] == (layout.main_file, content)
        if not is_known:
            self._refuse_others(metadata, known, {*rows, *files})
            for name in rows:
                if self._stat(name) is None:
                    self._objects.create(name, read_file(self.path / name))
        changed = {name: described for name, described in files.items() if self._content(name) != described}
        for name, described in changed.items():
            self._objects.write(name, described)
        if is_known and not changed:  # as of a store that is whole, and may be read-only
            return True
        if self._main is None:
            is_ours = self._objects.create(layout.main_file, content)
        else:
            is_ours = self._objects.replace(layout.main_file, content, self._main[2])
        if is_ours:
            for name in self._objects.names("rows/index-"):
                if name not in rows:
                    self._objects.delete(name)
        return is_ours

    def _refuse_others(self, metadata: StoreMetadata, known: Collection[str], ours: Collection[str]) -> None:
        """Passes a prefix where shards of the series that it has not yet can lie.

        Raises:
            StoreError: if other things lie there.
        """
        new = [layout for series, layout in metadata.series.items() if series not in known]
        beginnings = [""] if self._main is None else [f"{_folder_of(layout.files(0)[0])}/" for layout in new]
        for name in (name for beginning in beginnings for name in self._objects.names(beginning)):
            if not (name in ours or OURS.fullmatch(name) or name.endswith("/zarr.json") or _is_claim(name)):
                raise StoreError(f"`{self.place}` holds other things, such as `{name}`", hint="name a new prefix")

    def _content(self, name: str) -> bytes | None:
        try:
            return self._objects.read(name)
        except MissingObjectError:
            return None

    def _stat(self, name: str) -> Any:
        try:
            return self._objects.stat(name)
        except MissingObjectError:
            return None


def _main_files() -> list[str]:
    return [layout.main_file for layout in LAYOUTS.values()]


def _layout_of(main_file: str) -> Layout:
    return next(layout for layout in LAYOUTS.values() if layout.main_file == main_file)


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _is_claim(name: str) -> bool:
    return name.startswith(f"{CLAIMS}/")

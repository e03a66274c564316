"""Weights brought from the Hugging Face hub onto this machine: the one place of dla that uses the network for sources.

Only what `find_weights` loads is fetched: safetensors and the texts that configure them, never pickles, never code.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from dla_cache.errors import DlaError, SourceError, name_some
from dla_cache.remembered import sha256_of
from dla_cache.sources import SourceEntry
from dla_cache.sources.table import captioner_of
from dla_cache.weights import PICKLES, TEXTS, WEIGHTS

TIMEOUT_S = 10.0
"""For an answer of the hub: without a network the error comes within these seconds."""

COMMIT = re.compile("[0-9a-f]{40}")

# What the hub's client raises where there is no network depends on the library below it, and so on its version.
NETWORK_FAULTS = tuple(kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A repository that a source needs, or a part of one."""

    repo: str
    """As `owner/name`."""
    revision: str = ""
    """Branch, tag or commit; empty for the main branch."""
    variant: str = ""
    """As `fp16`: which of several files of the same weights."""
    only: str = ""
    """A single file, as of a LoRA."""
    without: tuple[str, ...] = ()
    """Folders of components that are not loaded."""
    replaced: tuple[str, ...] = ()
    """Folders of components of which the configuration is read, and the weights come from elsewhere."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    name: str
    size_bytes: int
    sha256: str = ""
    """Of large files; empty where the hub does not say it."""
    blob_sha1: str = ""
    """Of the others, as git names their content."""

    def is_at(self, path: Path) -> bool:
        """Whether a file is this one, by its content: another commit's may have the same size."""
        if not path.is_file() or path.stat().st_size != self.size_bytes:
            return False
        if self.sha256:
            return sha256_of(path) == self.sha256
        head = f"blob {self.size_bytes}\0".encode()
        return (
            not self.blob_sha1
            or hashlib.sha1(head + path.read_bytes(), usedforsecurity=False).hexdigest() == self.blob_sha1
        )


@dataclass(frozen=True, slots=True)
class Listing:
    """What the hub says of a repository, before a byte of weights is fetched."""

    wanted: Wanted
    commit: str
    licence: str
    is_gated: bool
    files: tuple[RemoteFile, ...]
    """Those that are loaded, the small ones first."""
    names: frozenset[str] = frozenset()
    """Of all files of the repository."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Hub:
    """The hub, or a mirror of it, and where what it gives is put."""

    def __init__(self, *, out: Path | None = None, endpoint: str | None = None, cache: Path | None = None) -> None:
        """
        Args:
            out: folder of plain files, below it `owner/name`; None for the hub's cache, where sources look by name.
            endpoint: None for that of the environment, `HF_ENDPOINT`.
            cache: None for that of the environment, `HF_HOME`.
        """
        self.endpoint = endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self.out, self.cache = out, cache or Path(constants.HF_HUB_CACHE)

    def list_files(self, wanted: Wanted) -> Listing:
        """What there is to fetch of a repository.

        Raises:
            SourceError: if the hub cannot be reached, does not show the repository, or it has no safetensors.
        """
        with self._told(wanted.repo, wanted.revision):
            info = HfApi(endpoint=self.endpoint).model_info(
                wanted.repo, revision=wanted.revision or None, timeout=TIMEOUT_S, files_metadata=True
            )
            present = {sibling.rfilename: _remote_file(sibling) for sibling in info.siblings or []}
            commit = str(info.sha)
            if not COMMIT.fullmatch(commit):
                raise ValueError(f"a commit `{commit}`")
        unsafe = [name for name in present if not _is_safe(name)]
        if unsafe:
            raise SourceError(
                f"`{wanted.repo}` has files that would be written outside of its folder: {name_some(unsafe)}",
                hint="do not use it",
            )
        files = [present[name] for name in loaded_files(wanted, list(present))]
        licence = getattr(info.card_data, "license", None) or "not stated"
        ordered = tuple(sorted(files, key=lambda file: (file.size_bytes, file.name)))
        return Listing(wanted, commit, str(licence), bool(info.gated), ordered, frozenset(present))

    def present_bytes(self, listing: Listing) -> int:
        """Bytes of a listing that are on this machine already."""
        return sum(file.size_bytes for file in listing.files if self._find(listing, file) is not None)

    def free_bytes(self) -> int:
        """Of the disk that files are put on."""
        folder = (self.out or self.cache).absolute()
        return shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.is_dir())).free

    def place_of(self, listing: Listing) -> Path:
        """The folder in which the files of a listing lie, once they were fetched."""
        if self.out is not None:
            return self.out / listing.wanted.repo
        folder = f"models--{listing.wanted.repo.replace('/', '--')}"
        return self.cache / folder / "snapshots" / listing.commit

    def fetch(self, listing: Listing, on_file: Callable[[RemoteFile], None] = lambda _file: None) -> Path:
        """Brings all files of a listing here; one that is here already is not fetched again. Returns `place_of` it.

        Args:
            on_file: told after each file.

        Raises:
            SourceError: if the disk is too small, the hub refuses, or a file is not what the hub says of it.
        """
        lacking = listing.size_bytes - self.present_bytes(listing)
        if lacking > self.free_bytes():
            raise SourceError(
                f"`{listing.wanted.repo}` needs {lacking / 1e9:.2f} GB more, {self.free_bytes() / 1e9:.2f} GB are free",
                hint="name a folder on another disk by `--out`, or set HF_HOME to one",
            )
        self._refuse_strangers(listing)
        for file in listing.files:
            if self._find(listing, file) is None:
                self._download(listing, file, listing.commit)
            on_file(file)
        revision = listing.wanted.revision or "main"
        if self.out is None and revision != listing.commit:
            self._download(listing, listing.files[0], revision)  # by it the cache knows what a branch or tag stands for
        return self.place_of(listing)

    def _find(self, listing: Listing, file: RemoteFile) -> Path | None:
        if self.out is not None:
            found: object = self.place_of(listing) / file.name
        else:
            found = try_to_load_from_cache(listing.wanted.repo, file.name, self.cache, listing.commit)
        path = Path(found) if isinstance(found, str | Path) else None
        return path if path is not None and file.is_at(path) else None

    def _refuse_strangers(self, listing: Listing) -> None:
        """Files of another commit in the folder would be loaded beside those of this one."""
        folder = self.place_of(listing)
        if self.out is None or not folder.is_dir():
            return
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (WEIGHTS, *TEXTS)}
        strange = sorted(name for name in names - listing.names if not name.startswith(".cache/"))
        if strange:
            at = f"`{listing.wanted.repo}` at `{listing.commit[:12]}`"
            raise SourceError(
                f"`{folder}` holds what {at} has not: {name_some(strange)}",
                hint="name another folder by `--out`, or remove this one if it is of another revision",
            )

    def _download(self, listing: Listing, file: RemoteFile, revision: str) -> None:
        with self._told(listing.wanted.repo, listing.wanted.revision):
            if self.out is not None:
                (self.place_of(listing) / file.name).unlink(missing_ok=True)  # another commit's, or broken
            path = Path(
                hf_hub_download(
                    listing.wanted.repo,
                    file.name,
                    revision=revision,
                    endpoint=self.endpoint,
                    etag_timeout=TIMEOUT_S,
                    cache_dir=self.cache,
                    local_dir=self.place_of(listing) if self.out is not None else None,
                )
            )
        if not file.is_at(path):
            path.resolve().unlink()
            raise SourceError(
                f"`{file.name}` of `{listing.wanted.repo}` came as another file than the hub says it is",
                hint="run the same command again; if it stays so, something between here and the hub changes files",
            )

    @contextmanager
    def _told(self, repo: str, revision: str) -> Iterator[None]:
        """Turns what the hub's client raises into one error with a hint."""
        try:
            yield
        except DlaError:
            raise
        except OfflineModeIsEnabled as error:
            raise SourceError(
                "`HF_HUB_OFFLINE` is set, and to fetch is to use the network", hint="unset it for this command"
            ) from error
        except GatedRepoError as error:
            raise SourceError(
                f"`{repo}` is gated, and your account may not load it", hint=how_to_get(repo, self.endpoint)
            ) from error
        except RevisionNotFoundError as error:
            raise SourceError(f"`{repo}` has no revision `{revision}`", hint="check branch, tag or commit") from error
        except RepositoryNotFoundError as error:
            raise SourceError(
                f"the hub shows no repository `{repo}`: it does not exist, or is private",
                hint="check the spelling; for a private one set HF_TOKEN to a token of an account that may read it",
            ) from error
        except HFValidationError as error:
            raise SourceError(f"no repository can be called `{repo}`", hint="it is `owner/name`") from error
        except HfHubHTTPError as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise SourceError(
                f"the hub at {self.endpoint} refuses `{repo}`: {reason}", hint="try again later"
            ) from error
        except NETWORK_FAULTS as error:
            if isinstance(error, OSError) and error.filename is not None and error.errno is not None:  # of the disk
                raise SourceError(
                    f"`{error.filename}` cannot be written: {error.strerror}",
                    hint="name a writable folder by `--out`, or set HF_HOME to one",
                ) from error
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise SourceError(
                f"the hub at {self.endpoint} cannot be reached: {reason}",
                hint="fetch where there is a network, with `--out FOLDER`, and copy that: a spec names it as `model`",
            ) from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # JSON that is none, or of something else
            raise SourceError(
                f"{self.endpoint} answers as no hub does when asked for `{repo}`: {error}",
                hint="check HF_ENDPOINT, and whether a proxy answers in its place",
            ) from error


def needed_by(entry: SourceEntry, *, model: str = "", revision: str = "", variant: str = "") -> list[Wanted]:
    """The repositories that a source of the catalog needs; none if it is shipped with its weights.

    Args:
        model: in place of the entry's own; revision and variant are of this one.
    """
    name, row = model or entry.model, entry.row
    if not name:
        return []
    without = tuple(part for part, value in getattr(row, "load", {}).items() if value is None)
    components = getattr(row, "components", {})
    replaced = tuple(part for part, place in components.items() if part != "lora" and place)
    others = [*components.values(), captioner_of(row)]
    parts = [other.partition("#") for other in others if other]
    return [
        Wanted(name, revision, variant, without=without, replaced=replaced),
        *(Wanted(repo, only=only) for repo, _, only in parts),
    ]


def how_to_get(repo: str, endpoint: str) -> str:
    """What opens a gated repository."""
    page, tokens = f"{endpoint}/{repo}", f"{endpoint}/settings/tokens"
    return f"accept its licence at {page} with your account, make a token at {tokens} and set HF_TOKEN to it"


def loaded_files(wanted: Wanted, names: Sequence[str]) -> list[str]:
    """Those files of a repository that loading it reads, of a pipeline those in the folders of its components.

    Raises:
        SourceError: if there are none, or weights come as pickles alone.
    """
    if wanted.only:
        if wanted.only not in names:
            raise SourceError(f"`{wanted.repo}` has no file `{wanted.only}`", hint="look at the names of its files")
        return [wanted.only]
    is_pipeline = "model_index.json" in names
    folders: dict[str, list[PurePosixPath]] = {}
    for name in names:
        path = PurePosixPath(name)
        folder = path.parent.as_posix()
        if len(path.parts) == (2 if is_pipeline else 1) and folder not in wanted.without:
            folders.setdefault(folder, []).append(path)
    chosen, pickled = ["model_index.json"] if is_pipeline else [], []
    n_weights = n_of_variant = 0
    for folder, paths in folders.items():
        if folder in wanted.replaced:
            paths = [path for path in paths if path.suffix in TEXTS and not path.name.endswith(".index.json")]
        weights = [path for path in paths if path.suffix == WEIGHTS]
        of_variant = [path for path in weights if wanted.variant and _variant_of(path) == wanted.variant]
        taken = of_variant or [path for path in weights if not _variant_of(path)]
        pickles = [path for path in paths if path.suffix in PICKLES]
        if pickles and not weights:
            pickled += pickles
        n_weights, n_of_variant = n_weights + len(taken), n_of_variant + len(of_variant)
        texts = [path for path in paths if path.suffix in TEXTS and _is_of(path, wanted.variant)]
        chosen += [path.as_posix() for path in (*taken, *texts)]
    if pickled:
        named = name_some([path.as_posix() for path in pickled])
        raise SourceError(
            f"`{wanted.repo}` has weights as pickles alone, which can run code when they are read: {named}",
            hint="take a revision or another repository that has safetensors, or convert it",
        )
    if not n_weights or (wanted.variant and not n_of_variant):
        kind = f"`{wanted.variant}` safetensors" if wanted.variant else "safetensors"
        raise SourceError(f"`{wanted.repo}` has no {kind}", hint="look at the names of its files on the hub")
    return chosen


def _variant_of(path: PurePosixPath) -> str:
    """`fp16` of `model.fp16.safetensors` and of `model.fp16-00001-of-00002.safetensors`."""
    parts = path.name.removesuffix(".json").removesuffix(".index").removesuffix(WEIGHTS).split(".")
    return parts[1].split("-")[0] if len(parts) > 1 else ""


def _is_of(path: PurePosixPath, variant: str) -> bool:
    return not path.name.endswith(".index.json") or _variant_of(path) in ("", variant)


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(name) & {"\\", "\0"}


def _remote_file(sibling: RepoSibling) -> RemoteFile:
    size = sibling.size or 0
    if not isinstance(sibling.rfilename, str) or not isinstance(size, int) or size < 0:
        raise ValueError(f"a file `{sibling.rfilename}` of `{size}` bytes")
    if sibling.lfs is not None:
        return RemoteFile(sibling.rfilename, size, sha256=str(sibling.lfs.sha256))
    return RemoteFile(sibling.rfilename, size, blob_sha1=sibling.blob_id or "")

"""Whole objects by their names, below a prefix of an object store or in a local folder, and a cache of them."""

from pathlib import Path

from dla_cache.remote.objects import FolderObjects, MissingObjectError, ObjectStat, ObjectStore
from dla_cache.remote.read_through import ReadThroughCache
from dla_cache.remote.retries import Patience
from dla_cache.remote.s3 import S3Objects

__all__ = [
    "FolderObjects",
    "MissingObjectError",
    "ObjectStat",
    "ObjectStore",
    "Patience",
    "ReadThroughCache",
    "S3Objects",
    "is_remote",
    "open_objects",
]


def is_remote(place: str) -> bool:
    """Whether a place is the URL of a prefix, rather than the path of a folder."""
    return "://" in place


def open_objects(place: str) -> ObjectStore:
    """The objects below `s3://bucket/prefix`, or the files below a folder.

    Raises:
        StoreError: if it is the URL of something else.
    """
    return S3Objects(place) if is_remote(place) else FolderObjects(Path(place))

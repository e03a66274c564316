"""What runs and studies leave as JSON, read without anything that trains."""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from dla_cache.errors import CheckpointError
from dla_cache.spec import StrictModel

M = TypeVar("M", bound=StrictModel)

Metric = Literal["top-1", "mAP"]
"""Top-1 where an image has one class, mean average precision where it may have several."""


def read_record(path: Path, model: type[M]) -> M:
    """A JSON file of a run folder as the `model` that was written.

    Raises:
        CheckpointError: if it is missing, damaged, or of another version of dla.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror}", hint=start_again(path.parent)) from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "file"
        raise CheckpointError(
            f"`{path}` is damaged or of another version of dla: `{where}`: {fault['msg']}",
            hint=start_again(path.parent),
        ) from error


def start_again(folder: Path) -> str:
    """The hint where a run cannot be saved: a folder that holds one is not trained into anew."""
    return f"restore the file from a copy, or remove `{folder}` and train the run again"

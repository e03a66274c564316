"""What can go wrong, one class per cause that a caller may treat apart."""

from collections.abc import Sequence


class DlaError(Exception):
    """Root of every error that dla raises on purpose: what, where, and a hint what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ManifestError(DlaError, ValueError):
    """The image list contradicts itself or its files."""


class ImageError(DlaError, ValueError):
    """An image is missing, changed, truncated or not an image."""


class BadImagesError(ImageError):
    """Some images of a build have no latent; shards without them are committed."""


class SpecError(DlaError, ValueError):
    """A spec or run file holds an unknown key, a value out of bounds, or is no YAML."""


class SourceError(DlaError, RuntimeError):
    """A source cannot be opened, or put out something that is no latent."""


class LatentShapeError(SourceError):
    """A source put out another shape or dtype than its recipe declares."""


class NonFiniteLatentError(SourceError):
    """A source put out NaN or infinity, or a value that the stored dtype cannot hold."""


class StoreError(DlaError, OSError):
    """A store cannot be opened, read or written."""

    def __str__(self) -> str:  # OSError's own __str__ would come first in some method orders
        return DlaError.__str__(self)


class RecipeMismatchError(StoreError):
    """A store holds latents of another recipe, row table or shard size."""


class CorruptShardError(StoreError):
    """Bytes on disk do not have the checksum they were committed with."""


class TooManyFilesError(StoreError):
    """The process has as many files open, or mapped, as it may."""


class MissingLatentError(StoreError, KeyError):
    """A latent is asked for that no commit record vouches for."""


class IncompleteBuildError(StoreError):
    """A build ended and some planned (modality, shard) is not committed."""


class LostProcessError(DlaError, RuntimeError):
    """A process that a build had started has died."""


class WorkInterrupted(DlaError):
    """A signal ended the work between two batches; what was committed stays."""


class TrainingError(DlaError, RuntimeError):
    """A run cannot go on: a non-finite loss, or a loss term that teaches nothing."""


class DeadLossError(TrainingError):
    """An active loss term gives the trained parameters no gradient."""


class CheckpointError(DlaError, OSError):
    """A checkpoint is missing, incomplete, or of another run."""

    def __str__(self) -> str:
        return DlaError.__str__(self)


class StudyError(DlaError, ValueError):
    """The records of a study contradict its spec or each other, or some of its runs are not there."""


class RunInUseError(CheckpointError):
    """Another process trains in a run folder."""


class ExportError(DlaError, RuntimeError):
    """An export does not give the logits of the student it was made from."""


class MissingDependencyError(DlaError, ImportError):
    """An optional package is needed and not installed."""


def name_some(names: Sequence[str], shown: int = 3) -> str:
    """The first names in backticks and how many more there are, for an error message."""
    listed = ", ".join(f"`{name}`" for name in names[:shown])
    return listed if len(names) <= shown else f"{listed} and {len(names) - shown} more"

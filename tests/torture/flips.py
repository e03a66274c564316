"""One damaged byte, or a file cut short: whether `verify` and a stream of pairs notice, and what they name.

What lies where in a store is worked out here from docs/format.md and not by the code under test.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dla_cache.errors import CorruptShardError, DlaError
from dla_cache.pairs import PairStream
from dla_cache.store import LatentStore, open_store
from dla_cache.verify import verify_store
from tests.torture.outcome import NOTICED, OTHER, SILENT, UNCHANGED, UNNAMED, Outcome

ENTRY = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32c", "<u4")])
CRC_BYTES = 4

Pair = tuple[bytes, dict[str, bytes], int]
"""Of one image: its file, its latents by modality, its label."""


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes of a file that belong to one image."""

    start: int
    stop: int
    series: str
    shard: int
    image_id: str


class Victim:
    """A store that is damaged and mended in turn, and what is right in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        store = open_store(path)
        self.files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        self.shard_of = {
            file.relative_to(path).as_posix(): (series, shard.index)
            for series in store.series
            for shard in store.shards
            for file in store.shard_files(series, shard.index)
        }
        self.payloads = {name: list(_payloads(store, path / name, *of)) for name, of in self.shard_of.items()}
        self.pairs = dict(stream_pairs(path))
        self.facts = facts_of(path)
        problems = verify_store(store).problems
        assert not problems, problems

    def payload_at(self, name: str, offset: int) -> Payload | None:
        """The payload that a byte belongs to, unless its image was removed: nobody reads it then."""
        found = [payload for payload in self.payloads.get(name, ()) if payload.start <= offset < payload.stop]
        return found[0] if found else None


def _payloads(store: LatentStore, file: Path, series: str, shard: int) -> Iterator[Payload]:
    planned = store.shards[shard]
    if file.suffix == ".index":
        return
    if file.suffix in (".tar", ".blob"):
        entries = np.frombuffer(file.with_suffix(".index").read_bytes()[8:-CRC_BYTES], ENTRY)
        places = [(offset, offset + size) for offset, size, _ in entries.tolist()]
    else:
        latent = store.recipe(series).format
        stride = int(np.prod(latent.shape)) * np.dtype(latent.dtype).itemsize + CRC_BYTES
        places = [(row * stride, (row + 1) * stride) for row in range(len(planned))]
    for row, (start, stop) in zip(range(planned.start, planned.stop), places, strict=True):
        if not store.rows[row].removed:
            yield Payload(start, stop, series, shard, store.rows.image_ids[row])


def stream_pairs(path: Path) -> Iterator[tuple[str, Pair]]:
    """All pairs of a store, as one epoch of a shuffled stream gives them."""
    stream = PairStream(open_store(path), None, None, 7, seed=0, decode=None)
    for batch in stream.epoch_once():
        for place, image_id in enumerate(batch.image_ids):
            latents = {name: values[place].numpy().tobytes() for name, values in batch.latents.items()}
            yield image_id, (batch.images[place], latents, int(batch.labels[place]))


def facts_of(path: Path) -> list[object]:
    """What else a run takes from a store: class names, statistics to standardise by, and its identity."""
    store = open_store(path)
    statistics = [store.statistics(modality, ["train"]) for modality in store.modalities]
    return [store.class_names, repr(statistics), store.content_hash()]


@dataclass(frozen=True, slots=True)
class Damage:
    """One byte of a file changed, or the file cut before it."""

    kind: str
    """`flip` or `truncation`."""
    number: int
    file: str
    offset: int
    mask: int
    """What the byte is combined with by exclusive or."""

    def of(self, content: bytes) -> bytes:
        if self.kind == "truncation":
            return content[: self.offset]
        return content[: self.offset] + bytes([content[self.offset] ^ self.mask]) + content[self.offset + 1 :]


def choose_damage(victim: Victim, kind: str, number: int, seed: int) -> Damage:
    """The damage of a number: each file in turn, a random byte of it."""
    rng = random.Random(f"{seed} {kind} {number}")
    file = victim.files[number % len(victim.files)]
    size = (victim.path / file).stat().st_size
    return Damage(kind, number, file, rng.randrange(size), rng.randrange(1, 256))


def inflict(victim: Victim, damage: Damage) -> tuple[Outcome, Outcome]:
    """What `verify` and the stream make of it; the store is mended again."""
    path = victim.path / damage.file
    content = path.read_bytes()
    path.write_bytes(damage.of(content))
    try:
        return ask_verify(victim, damage), ask_stream(victim, damage)
    finally:
        path.write_bytes(content)


def ask_verify(victim: Victim, damage: Damage) -> Outcome:
    try:
        problems = verify_store(open_store(victim.path)).problems
        said = "; ".join(f"{problem.where}: {problem.what}" for problem in problems)
        if not problems:
            return Outcome(SILENT, f"verify found nothing at {damage}")
    except DlaError as error:
        said = str(error)
    except Exception as error:  # whatever it is, it is a finding
        return Outcome(OTHER, f"verify at {damage}: {error!r}")
    return Outcome(NOTICED if names_the_place(victim, damage.file, said) else UNNAMED, f"verify at {damage}: {said}")


def names_the_place(victim: Victim, file: str, said: str) -> bool:
    """Whether a message holds the file's name, or the shard it is of; of a record, a shard of its series."""
    if Path(file).name in said:
        return True
    if file in victim.shard_of:
        series, shard = victim.shard_of[file]
        return f"{series}, shard {shard}" in said or f"shard {shard} of `{series}`" in said
    return file.startswith("commits/") and f"{Path(file).parent.name}, shard " in said


def ask_stream(victim: Victim, damage: Damage) -> Outcome:
    payload = victim.payload_at(damage.file, damage.offset) if damage.kind == "flip" else None
    try:
        pairs, facts = dict(stream_pairs(victim.path)), facts_of(victim.path)
    except DlaError as error:
        if payload is None or _names_payload(error, payload):
            return Outcome(NOTICED, f"stream at {damage}: {error}")
        return Outcome(UNNAMED, f"stream at {damage}, of {payload}: {error}")
    except Exception as error:  # whatever it is, it is a finding
        return Outcome(OTHER, f"stream at {damage}: {error!r}")
    if payload is not None:
        return Outcome(SILENT, f"the stream read {payload} at {damage}")
    if pairs != victim.pairs:
        return Outcome(SILENT, f"the stream gave other values at {damage}: {_differing(victim.pairs, pairs)}")
    if facts != victim.facts:
        return Outcome(SILENT, f"class names, statistics or content hash were read otherwise at {damage}")
    return Outcome(UNCHANGED, f"stream at {damage}")


def _names_payload(error: DlaError, payload: Payload) -> bool:
    place = f"shard {payload.shard} of `{payload.series}`"
    return isinstance(error, CorruptShardError) and place in str(error) and f"`{payload.image_id}`" in str(error)


def _differing(before: Mapping[str, Pair], after: Mapping[str, Pair]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

"""`dla train targets`: asks a frozen model about K views of every image and commits what it says, shard by shard."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dla_cache.errors import SpecError, WorkInterrupted, name_some
from dla_cache.shards import Shard, shards_of_rank
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.layout import payload_bytes
from dla_cache.store.precision import decode_numbers, encode_numbers
from dla_cache.store.rows import RowTable
from trainer.config import folder_of
from trainer.data import PairSource, PixelScale
from trainer.features import LOGITS, Target
from trainer.measure import check_fits
from trainer.reference import FrozenClassifier
from trainer.run import load_run
from trainer.targets import (
    DEFAULT_VIEWS,
    ReferenceFacts,
    Series,
    TargetLayout,
    TargetsConfig,
    recipe_of,
    series_name,
    view_count,
)
from trainer.upbringing import TrainedRun, pictures_seen
from trainer.views import ViewConfig

LOOSE_RECORDS = 64
"""Commit records of a series that are gathered into one file."""


@dataclass(frozen=True, slots=True)
class LogitsError:
    """How far stored logits are from those that the model gave."""

    kl_mean: float
    """Nats: KL(softmax(z) ‖ softmax(stored z)), mean over images and views."""
    kl_max: float
    top1_kept: float
    """Share of the answers whose likeliest class is the same."""


@dataclass(frozen=True, slots=True)
class TargetsReport:
    """What a store of targets holds now."""

    images: int
    views: int
    targets: tuple[str, ...]
    bytes_per_view: int
    """Of one image, before the store's own overhead."""
    shards: int
    """That this process answers for."""
    computed: int
    """Of those, how many were made just now."""
    seconds: float
    logits_error: LogitsError | None
    """Over all shards that are there; None without logits."""


def make_targets(
    config: TargetsConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TargetsReport:
    """Fills the shards of this process that are not committed yet.

    Args:
        rank, world_size: which shards are this process's; every rank may run by itself, and none waits for another.
        on_progress: takes images done and in all.

    Raises:
        CheckpointError: if the run to ask is none, or not finished.
        RecipeMismatchError: if it was trained on other latents or classes than the store holds, or the output holds
            targets of another model, of other views or images.
        SpecError: if the model has not what is asked for, or a split has no image.
        WorkInterrupted: if `should_stop` said so. What is committed stays, and the same call goes on from there.
    """
    began = time.monotonic()
    source = open_store(config.store)
    run = load_run(Path(config.teacher))
    facts = reference_facts(run, source, config)
    view = resolve_view(config.view, facts, source)
    asked = AskedModel(config, run, facts, view, source)
    layout = TargetLayout(asked.shapes(), config.top_logits, config.dtype)
    plan = {number: layout.series(number) for number in range(view_count(view))}
    recipes = {one.name: recipe_of(one, layout, facts, view, number) for number in plan for one in plan[number]}
    rows = rows_of_splits(source, asked.splits)
    target = create_store(config.output, rows, source.class_names, config.shard_size, recipes)
    mine = shards_of_rank(target.shards, rank, world_size)
    absent = set(chain.from_iterable(target.missing(name) for name in recipes))
    missing = [shard for shard in mine if shard.index in absent]
    total, done = sum(map(len, mine)), sum(map(len, mine)) - sum(map(len, missing))
    for shard in missing:
        for n_images in asked.fill(target, layout, plan, shard):
            done += n_images
            on_progress(done, total)
            if should_stop():
                raise WorkInterrupted(
                    f"targets of {done} of {total} images were computed; `{config.output}` keeps whole shards",
                    hint="run the same command again; it goes on from there",
                )
    for name in recipes:
        target.consolidate(name, at_least=1 if world_size == 1 else LOOSE_RECORDS)
    return TargetsReport(
        images=len(rows),
        views=view_count(view),
        targets=tuple(str(name) for name in layout.shapes),
        bytes_per_view=sum(payload_bytes(one.format) for one in plan[0]),
        shards=len(mine),
        computed=len(missing),
        seconds=time.monotonic() - began,
        logits_error=error_of_logits(target, layout, view_count(view)),
    )


class AskedModel:
    """A frozen model and the views that it is asked about, in the order of the rows of its splits."""

    def __init__(
        self, config: TargetsConfig, run: TrainedRun, facts: ReferenceFacts, view: ViewConfig, store: LatentStore
    ) -> None:
        """
        Raises:
            SpecError: if the model has not what is asked for, or a split has no image.
        """
        self.splits = config.splits or run.config.training_splits
        absent = sorted(set(self.splits) - store.rows.splits)
        if absent:
            raise SpecError(
                f"`{config.store}` has no image of split {name_some(absent)}",
                hint=f"its splits are {name_some(sorted(store.rows.splits), shown=10)}",
            )
        check_top_logits(len(facts.class_names), config.top_logits, is_multi_label=facts.is_multi_label)
        blocks = tuple(facts.blocks)
        also = [Target.parse(text) for text in config.also]
        for target in also:
            if target != LOGITS and (target.span not in facts.spans or target.block >= len(blocks)):
                raise SpecError(
                    f"the model has no `{target}`: it has {len(blocks)} blocks, and spans {name_some(facts.spans)}",
                    hint="name a block from 0 and one of these spans",
                )
        self.wanted = tuple(dict.fromkeys([*config.objective.targets(run.task.outline), *also]))
        self.batch_size = config.batch_size
        self.view = view
        self.reference = FrozenClassifier(run.task)
        run.task.module.to(config.device)
        self.device = config.device
        self.pairs = PairSource(
            store,
            folder_of(config.images),
            image_size=facts.image_size,
            pixel_scale=PixelScale(facts.pixel_mean, facts.pixel_std),
            modalities=facts.modalities,
            view=view,
            seed=0,
            device=config.device,
            sees_images=facts.sees_images,
            threads=config.threads,
        )
        self.stream = self.pairs.in_order(self.splits, config.batch_size)

    def shapes(self) -> dict[Target, tuple[int, ...]]:
        """Of each target of one image."""
        said = self.reference.targets(self.pairs.shown(self.stream.batch(0), 0).to(self.device), self.wanted)
        return {target: tuple(values.shape[1:]) for target, values in said.items()}

    def fill(
        self, target: LatentStore, layout: TargetLayout, plan: Mapping[int, Sequence[Series]], shard: Shard
    ) -> Iterator[int]:
        """Computes and commits a shard of all views; gives the number of images after each batch."""
        began = time.monotonic()
        packed: dict[str, list[NDArray[np.generic]]] = {one.name: [] for of_view in plan.values() for one in of_view}
        errors: dict[int, list[Tensor]] = {number: [] for number in plan}
        first, stop = shard.start // self.batch_size, -(-shard.stop // self.batch_size)
        with closing(self.stream.batches(first, stop=stop)) as batches:
            for part in batches:
                for number, of_view in plan.items():
                    said = self.reference.targets(self.pairs.shown(part, number).to(self.device), self.wanted)
                    for one in of_view:
                        packed[one.name].append(layout.pack(kind_of(one.name), said).cpu().numpy())
                    if LOGITS in said:
                        stored = {kind_of(one.name): packed[one.name][-1] for one in of_view}
                        errors[number].append(errors_of_logits(said[LOGITS].cpu(), stored, layout))
                yield len(part.image_ids)
        for number, of_view in plan.items():
            for one in of_view:
                values = np.concatenate(packed.pop(one.name))
                if one.format.kind == "codes":
                    values = values.astype(one.format.read_dtype)
                told = facts_of_errors(errors[number]) if kind_of(one.name) == "logits" else {}
                target.write_shard(
                    one.name,
                    shard,
                    values,
                    seconds=time.monotonic() - began,
                    device=self.device,
                    made_with={"batch_size": self.batch_size, "torch": torch.__version__, **told},
                )


def kind_of(series: str) -> str:
    """The kind of a series, by its name."""
    return series.split("-")[1]


def errors_of_logits(logits: Tensor, stored: Mapping[str, NDArray[np.generic]], layout: TargetLayout) -> Tensor:
    """For each image KL(softmax(z) ‖ softmax(stored z)) in nats, and whether its likeliest class is kept: [B, 2]."""
    formats = {kind_of(one.name): one.format for one in layout.series(0)}
    read = {
        kind: torch.from_numpy(decode_numbers(encode_numbers(values, formats[kind]), formats[kind]))
        for kind, values in stored.items()
        if kind in ("logits", "index")
    }
    kept = layout.unpack(read)[LOGITS].double()
    given = logits.double()
    kl = functional.kl_div(kept.log_softmax(-1), given.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return torch.stack([kl, (kept.argmax(-1) == given.argmax(-1)).double()], dim=1)


def facts_of_errors(errors: Sequence[Tensor]) -> dict[str, float | int]:
    """What the commit record of a shard of logits says of their error."""
    whole = torch.cat([*errors])
    return {
        "kl_mean": float(whole[:, 0].mean()),
        "kl_max": float(whole[:, 0].max()),
        "top1_kept": float(whole[:, 1].mean()),
    }


def error_of_logits(store: LatentStore, layout: TargetLayout, views: int) -> LogitsError | None:
    """The error over all shards of logits that are committed."""
    if LOGITS not in layout.shapes:
        return None
    records = [record for view in range(views) for record in store.committed(series_name("logits", view)).values()]
    told = [(record.n_rows, record.made_with) for record in records]
    images = sum(n_rows for n_rows, _ in told)
    if not images:
        return None

    def mean(name: str) -> float:
        return sum(n_rows * float(facts[name]) for n_rows, facts in told) / images

    return LogitsError(mean("kl_mean"), max(float(facts["kl_max"]) for _, facts in told), mean("top1_kept"))


def check_top_logits(n_classes: int, top_logits: int | None, *, is_multi_label: bool) -> None:
    """Passes a number of logits that can stand for all.

    Raises:
        SpecError: if there are not so many classes, or each is a question of its own.
    """
    if top_logits is None:
        return
    if is_multi_label:
        raise SpecError("`top_logits` is for one class an image: of several labels each logit is an answer of its own")
    if top_logits >= n_classes:
        raise SpecError(f"`top_logits` is {top_logits}, there are {n_classes} classes", hint="leave it out for all")


def resolve_view(view: ViewConfig, facts: ReferenceFacts, store: LatentStore) -> ViewConfig:
    """The views with their number and seed.

    Raises:
        SpecError: if several are asked for where all are alike.
    """
    n_draws = max((store.recipe(name).format.n_draws for name in facts.modalities), default=1)
    is_random = view.is_random and facts.sees_images
    if not is_random and (view.count or 1) > n_draws:
        why = "a probe sees no images" if not facts.sees_images else "nothing in `view` is random"
        raise SpecError(f"{view.count} views would not all differ: {why}", hint="leave `view.count` out")
    count = view.count or (DEFAULT_VIEWS if is_random else n_draws)
    return view.model_copy(update={"count": count, "seed": view.seed or 0})


def rows_of_splits(store: LatentStore, splits: Sequence[str]) -> RowTable:
    """The images of some splits as the rows of a store of their own, in the same order."""
    rows = store.rows_of(splits)
    images = [replace(store.rows[int(row)], row=place) for place, row in enumerate(rows)]
    return RowTable(images, is_multi_label=store.rows.is_multi_label)


def reference_facts(run: TrainedRun, store: LatentStore, config: TargetsConfig) -> ReferenceFacts:
    """What is to be known of a run, once it is sure that it may be asked about a store.

    Raises:
        RecipeMismatchError: if its classes or latents are others.
    """
    check_fits(run, store, config.store)
    return run.reference_facts(store).model_copy(update={"images": pictures_seen(store, config.images)})

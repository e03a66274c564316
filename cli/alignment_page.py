"""The page of `dla study alignment`: maps of layer by modality for every metric, against null and controls."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cli.gallery import GalleryPicture
from cli.page import Picture, read_picture
from cli.page_template import page_template
from dla_cache import __version__
from dla_cache.durable import write_durably, writing_to

if TYPE_CHECKING:
    from trainer.alignment_arms import AlignmentLine, DifferenceLine
    from trainer.alignment_study import Alignment, AlignmentPlan

HEAD_METRIC, HEAD_VARIANT = "r2-flattened", "within-class"
"""What stands first: fixed, so that nobody chooses the metric that flatters."""

DARKEST = 46.0
"""Percent of the accent colour under a number, so that it can be read."""


@dataclass(frozen=True, slots=True)
class MetricWords:
    """A metric in plain words."""

    title: str
    means: str
    does_not: str
    formula: str


WORDS: Mapping[str, MetricWords] = {
    "r2-flattened": MetricWords(
        "Ridge probe to the whole latent, R²",
        "The share of the latents' variance, in images it was not fitted on, that a linear map reads off the features.",
        "That the student uses it: what can be read off features need not matter for its answers. The most that any"
        " function of the image can reach is the noise ceiling, not 1.",
        "1 - Σ‖y - ŷ‖² / Σ‖y - ȳ‖²; penalty by generalised cross-validation within the fitted images",
    ),
    "r2-pooled": MetricWords(
        "Ridge probe to the pooled latent, R²",
        "The same for the mean of the latent over its places or steps: what is in the image, without where it is.",
        "Layout: a student may know the mean and nothing of the shape.",
        "as above, with y the mean over places, C numbers",
    ),
    "cka": MetricWords(
        "Linear CKA, unbiased",
        "How alike the two spaces are as a whole: 1 if one is the other turned and scaled, about 0 if unrelated.",
        "That everything of the latent is there: a few directions of large variance decide it.",
        "Σ HSIC₁(K, L) / √(Σ HSIC₁(K, K) · Σ HSIC₁(L, L)) over minibatches of about 128 images",
    ),
    "rsa": MetricWords(
        "Representational similarity, Spearman",
        "Whether images that lie far apart in one space lie far apart in the other; order alone counts, not amounts.",
        "What lies between them. A few classes or outliers far from all others raise it.",
        "Spearman's correlation of squared Euclidean distances, all pairs of up to 512 images drawn from a fixed seed",
    ),
    "mutual-knn": MetricWords(
        "Mutual nearest neighbours, k = 10",
        "How many of an image's ten most alike images are the same on both sides.",
        "A scale of its own: it falls with the number of images, so compare only numbers of the same images.",
        "mean of |S₁ ∩ S₂| / k by cosine, the image itself left out",
    ),
    "retrieval@1": MetricWords(
        "Retrieval, R@1",
        "How often the latent that the probe predicts is nearest to that image's own, among all measured images.",
        "More than the probe says: it is a strict way to read the same prediction.",
        "cosine around the mean latent; equal latents count against the image",
    ),
    "retrieval@5": MetricWords(
        "Retrieval, R@5",
        "How often the image's own latent is among the five nearest.",
        "As R@1.",
        "as R@1",
    ),
}


@dataclass(frozen=True, slots=True)
class MapCell:
    """A number on a map."""

    line: "AlignmentLine"
    shade: float
    """Percent of the accent colour: how far beyond its null, the farthest of the map having `DARKEST`."""


@dataclass(frozen=True, slots=True)
class MapRow:
    """One block of one arm."""

    arm: str
    is_first: bool
    n_blocks: int
    block: int
    block_name: str
    cells: tuple[MapCell | None, ...]


@dataclass(frozen=True, slots=True)
class MetricMap:
    """All arms, blocks and targets of one metric."""

    metric: str
    words: MetricWords
    columns: tuple[tuple[str, str], ...]
    """(target, variant)."""
    rows: tuple[MapRow, ...]
    chance: float


def head_lines(found: "Alignment") -> list[tuple["AlignmentLine", "DifferenceLine | None"]]:
    """What stands first: of each target and arm the last block by the metric fixed for it, with its matched control."""
    last = {line.arm: line.block for line in found.lines}
    matched = {
        (one.arm, one.target, one.block): one
        for one in found.differences
        if one.is_matched and (one.metric, one.class_means) == (HEAD_METRIC, HEAD_VARIANT)
    }
    chosen = [
        line
        for line in found.lines
        if line.block == last[line.arm] and (line.metric, line.class_means) == (HEAD_METRIC, HEAD_VARIANT)
    ]
    order = list(dict.fromkeys(line.target for line in found.lines))
    chosen.sort(key=lambda line: order.index(line.target))
    return [(line, matched.get((line.arm, line.target, line.block))) for line in chosen]


def maps_of(found: "Alignment") -> list[MetricMap]:
    """A map for each metric, in the order in which they are explained."""
    maps = []
    for metric, words in WORDS.items():
        lines = [line for line in found.lines if line.metric == metric]
        columns = tuple(dict.fromkeys((line.target, str(line.class_means)) for line in lines))
        by_place = {(line.arm, line.block, line.target, str(line.class_means)): line for line in lines}
        farthest = max((line.value - line.null for line in lines), default=0.0)
        names = dict.fromkeys((line.arm, line.block, line.block_name) for line in lines)
        n_blocks = {arm: sum(other == arm for other, _, _ in names) for arm, _, _ in names}
        rows = []
        for arm, block, block_name in names:
            cells = []
            for target, variant in columns:
                line = by_place.get((arm, block, target, variant))
                excess = max(0.0, line.value - line.null) if line is not None and line.is_beyond_null else 0.0
                cells.append(None if line is None else MapCell(line, round(DARKEST * excess / max(farthest, 1e-9), 1)))
            rows.append(MapRow(arm, block == 0, n_blocks[arm], block, block_name, tuple(cells)))
        if lines:
            maps.append(MetricMap(metric, words, columns, tuple(rows), lines[0].chance))
    return maps


def sentences_of(plan: "AlignmentPlan", found: "Alignment") -> list[str]:
    """What the first table allows to say, one sentence for each modality and arm that was taught it."""
    said = []
    for line, matched in head_lines(found):
        if not line.taught or line.target not in plan.modalities:
            continue
        knows = "knows" if line.is_beyond_null else "cannot be shown to know"
        sentence = (
            f"{line.arm} {knows} {line.target} beyond the class: R² {line.value:.2f} with class means removed,"
            f" {as_number(line.null, 2)} with latents shuffled within class"
        )
        if matched is not None:
            than = {
                "more": "more than",
                "less": "less than",
                "not told apart": "not told apart from",
            }[matched.verdict]
            sentence += (
                f"; {than} the control {matched.other}, of {100 * matched.other_accuracy:.1f} % against"
                f" {100 * matched.accuracy:.1f} % top-1, by {matched.difference:+.2f}"
                f" ({matched.low:+.2f} to {matched.high:+.2f})"
            )
        said.append(f"{sentence}.")
    return said


def write_alignment_page(
    path: Path,
    plan: "AlignmentPlan",
    found: "Alignment",
    notes: Sequence[str],
    galleries: Sequence[GalleryPicture],
) -> None:
    """Writes one HTML file that loads nothing; the same numbers give the same bytes.

    Raises:
        StoreError: if it cannot be written.
    """
    filters = {
        "percent": lambda fraction: f"{100 * fraction:.1f}",
        "count": lambda number: f"{number:,.0f}",
        "number": as_number,
        "signed": lambda value: f"{value:+.3f}",
    }
    pictures: list[tuple[GalleryPicture, Picture]] = [(one, read_picture(one.path)) for one in galleries]
    maps = maps_of(found)
    content = page_template("alignment.html.j2", filters).render(
        plan=plan,
        found=found,
        notes=notes,
        head=head_lines(found),
        sentences=sentences_of(plan, found),
        maps=maps,
        last={line.arm: line.block for line in found.lines},
        pictures=pictures,
        command=command_of(plan, path.parent),
        variant_words={"raw": "as it is", "within-class": "within class"},
        versions={"dla": __version__, "PyTorch": version("torch"), "Python": platform.python_version()},
    )
    with writing_to(path):
        write_durably(path, content.encode())


def as_number(value: float, digits: int = 3) -> str:
    """A number of so many digits, never minus nothing."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def command_of(plan: "AlignmentPlan", out: Path) -> str:
    """The command line that makes this page again."""
    words = ["dla", "study", "alignment", "--store", plan.store.place]
    if plan.images is not None:
        words += ["--images", str(plan.images)]
    for arm, folders in plan.arms.items():
        words += ["--arm", f"{arm}={','.join(str(folder) for folder in folders)}"]
    for name, folder in plan.targets.items():
        words += ["--target", f"{name}={folder}"]
    options = {"--split": plan.splits, "--fit-split": plan.fit_splits, "--modality": plan.modalities}
    for option, values in (options | {"--control": plan.controls}).items():
        for value in values:
            words += [option, value]
    if plan.other_draw is not None:
        words += ["--other-draw", plan.other_draw.place]
    words += ["--shuffles", str(plan.n_shuffles), "--out", str(out)]
    return " ".join(shlex.quote(word) for word in words)

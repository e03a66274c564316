"""Arms of several runs beside each other: intervals over seeds and images, and controls of the same accuracy.

Dimensions: M runs of an arm, R resamples, S shuffles, N images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from dla_cache.errors import SpecError
from trainer.alignment import METRICS, Key, Measurement, Metric, PreparedTarget, Variant, chance

INTERVAL = torch.tensor([0.025, 0.975], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A student's run: how good it is, what it was taught, and how its features align."""

    arm: str
    name: str
    """Of its folder, as it was given."""
    accuracy: float
    """Top-1 on the measured images."""
    taught: frozenset[str]
    """The modalities that it, or what it learned from, saw."""
    blocks: tuple[str, ...]
    found: tuple[Mapping[Key, Measurement], ...]
    """Of each block."""


@dataclass(frozen=True, slots=True)
class AlignmentLine:
    """One number of an arm, as a line of alignment.csv; None is an empty cell."""

    arm: str
    runs: int
    accuracy: float
    """Mean top-1 on the measured images."""
    block: int
    block_name: str
    target: str
    taught: bool
    """Whether the arm, or what it learned from, saw latents of the target."""
    class_means: Variant
    metric: Metric
    value: float
    """Mean over runs."""
    low: float
    """95 % interval over images, and over runs where there are several."""
    high: float
    null: float
    """Mean with latents shuffled within each class."""
    null_low: float
    null_high: float
    """2.5 and 97.5 % of the shuffles."""
    chance: float
    ceiling: float | None
    """Largest R² there can be, as far as the store tells."""
    values: tuple[float, ...]
    """Of each run."""

    @property
    def is_beyond_null(self) -> bool:
        """Whether the whole interval lies above what shuffled latents give."""
        return self.low > self.null_high


@dataclass(frozen=True, slots=True)
class DifferenceLine:
    """One number of an arm minus that of others, as a line of differences.csv."""

    arm: str
    other: str
    """An arm, or of a matched control the arms that its runs are of."""
    is_matched: bool
    """Whether the others are the runs that never saw the modality and come nearest in accuracy, one for each run."""
    accuracy: float
    other_accuracy: float
    block: int
    block_name: str
    target: str
    class_means: Variant
    metric: Metric
    value: float
    other_value: float
    difference: float
    low: float
    """95 % interval over images, and over runs where there are several; runs are paired where both have as many."""
    high: float

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        return "more" if self.low > 0 else "less" if self.high < 0 else "not told apart"


def draws_of(values: Tensor, deviations: Tensor, seed: int = 0) -> Tensor:
    """The mean over runs in each resample of images and, where there are several, of runs, float64 [R].

    Of M runs M - 1 are drawn, with which the spread over few runs is not too small; the images are drawn alike for all.

    Args:
        values: float64 [M].
        deviations: [M, R], how far each moves in each resample of the images.

    Source: Rao and Wu, JASA 83 (1988), bootstrap with m = n - 1.
    """
    n_runs, n_resamples = deviations.shape
    draws = values[:, None] + deviations.double()
    if n_runs > 1:
        drawn = torch.randint(n_runs, (n_runs - 1, n_resamples), generator=torch.Generator().manual_seed(seed))
        draws = draws.gather(0, drawn)
    return draws.mean(dim=0)


def bounds(draws: Tensor) -> tuple[float, float]:
    """The 95 % percentile interval of draws [R]."""
    low, high = draws.double().quantile(INTERVAL).tolist()
    return low, high


def match_controls(runs: Sequence[MeasuredRun], candidates: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """For each run the candidate of the nearest accuracy, the first of equally near ones."""
    return [min(candidates, key=lambda one, accuracy=run.accuracy: abs(one.accuracy - accuracy)) for run in runs]  # type: ignore[misc]


def same_depth(block: int, n_blocks: int, n_others: int) -> int:
    """The block of another model, of `n_others` blocks, that ends nearest to the same share of the depth."""
    return max(0, min(n_others - 1, round((block + 1) / n_blocks * n_others) - 1))


def arms_of(runs: Sequence[MeasuredRun]) -> dict[str, list[MeasuredRun]]:
    """The runs by arm, in their order.

    Raises:
        SpecError: if the runs of an arm have different blocks.
    """
    arms: dict[str, list[MeasuredRun]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    for arm, (first, *others) in arms.items():
        for run in others:
            if run.blocks != first.blocks:
                raise SpecError(
                    f"runs of arm `{arm}` have different blocks: `{first.name}` and `{run.name}`",
                    hint="give each kind of student an arm of its own",
                )
    return arms


def summarise(runs: Sequence[MeasuredRun], prepared: Sequence[PreparedTarget], n_images: int) -> list[AlignmentLine]:
    """Every number of every arm: arm by arm, block by block, in the order of the targets and metrics."""
    lines = []
    for members in arms_of(runs).values():
        for block, one, metric in places(members, prepared):
            values, deviations, nulls = stacked(members, block, (one.target.name, one.variant, metric))
            low, high = bounds(draws_of(values, deviations))
            null = nulls.mean(dim=0)  # the same shuffles for every run
            null_low, null_high = bounds(null)
            lines.append(
                AlignmentLine(
                    arm=members[0].arm,
                    runs=len(members),
                    accuracy=mean_accuracy(members),
                    block=block,
                    block_name=members[0].blocks[block],
                    target=one.target.name,
                    taught=bool(one.target.modalities & members[0].taught),
                    class_means=one.variant,
                    metric=metric,
                    value=float(values.mean()),
                    low=low,
                    high=high,
                    null=float(null.mean()),
                    null_low=null_low,
                    null_high=null_high,
                    chance=chance(metric, n_images),
                    ceiling=one.ceilings.get(metric),
                    values=tuple(values.tolist()),
                )
            )
    return lines


def differences(
    runs: Sequence[MeasuredRun], prepared: Sequence[PreparedTarget], controls: Sequence[str] = ()
) -> list[DifferenceLine]:
    """Every arm minus every one after it; and of each arm that was taught a target, itself minus its matched control.

    Args:
        controls: arms whose runs are matched; none for all runs that never saw the target.
    """
    arms = arms_of(runs)
    lines = []
    for one in prepared:
        seen = one.target.modalities
        free = [run for run in runs if (run.arm in controls if controls else not run.taught & seen)]
        for members in arms.values():
            if free and members[0].taught & seen and members[0].arm not in controls:
                lines += difference_lines(members, match_controls(members, free), one, is_matched=True)
    for first, second in combinations(arms.values(), 2):
        for one in prepared:
            lines += difference_lines(first, second, one, is_matched=False)
    return lines


def difference_lines(
    members: Sequence[MeasuredRun],
    others: Sequence[MeasuredRun],
    target: PreparedTarget,
    *,
    is_matched: bool,
) -> list[DifferenceLine]:
    """Some runs minus others, block by block and metric by metric, for one target."""
    lines = []
    for block, one, metric in places(members, [target]):
        key = (one.target.name, one.variant, metric)
        values, deviations, _ = stacked(members, block, key)
        other_block = same_depth(block, len(members[0].blocks), len(others[0].blocks))
        other_values, other_deviations, _ = stacked(others, other_block, key)
        if len(members) == len(others):
            low, high = bounds(draws_of(values - other_values, deviations - other_deviations))
        else:
            low, high = bounds(draws_of(values, deviations) - draws_of(other_values, other_deviations, seed=1))
        lines.append(
            DifferenceLine(
                arm=members[0].arm,
                other=" ".join(dict.fromkeys(run.arm for run in others)),
                is_matched=is_matched,
                accuracy=mean_accuracy(members),
                other_accuracy=mean_accuracy(others),
                block=block,
                block_name=members[0].blocks[block],
                target=one.target.name,
                class_means=one.variant,
                metric=metric,
                value=float(values.mean()),
                other_value=float(other_values.mean()),
                difference=float(values.mean() - other_values.mean()),
                low=low,
                high=high,
            )
        )
    return lines


def places(
    members: Sequence[MeasuredRun], prepared: Sequence[PreparedTarget]
) -> Iterator[tuple[int, PreparedTarget, Metric]]:
    """Block, target and metric of all that was measured of an arm."""
    for block, found in enumerate(members[0].found):
        for one in prepared:
            for metric in METRICS:
                if (one.target.name, one.variant, metric) in found:
                    yield block, one, metric


def mean_accuracy(runs: Sequence[MeasuredRun]) -> float:
    """Top-1, mean over runs."""
    return sum(run.accuracy for run in runs) / len(runs)


def stacked(runs: Sequence[MeasuredRun], block: int, key: Key) -> tuple[Tensor, Tensor, Tensor]:
    """Values float64 [M], deviations [M, R] and nulls [M, S] of several runs; `block` of the first one's blocks."""
    blocks = [same_depth(block, len(runs[0].blocks), len(run.blocks)) for run in runs]
    found = [run.found[number][key] for run, number in zip(runs, blocks, strict=True)]
    values = torch.tensor([one.value for one in found], dtype=torch.float64)
    return values, torch.stack([one.deviations for one in found]), torch.stack([one.nulls for one in found])

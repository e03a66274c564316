"""The rows of a page's table: what each run saw, what it learned from, and what it measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cli.page_charts import Style
from cli.page_runs import FinishedRun, RunGroup
from trainer.config import PLACES

METRIC_IN_WORDS = {"top-1": "Top-1 accuracy", "mAP": "Mean average precision (mAP)"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: a run, or several that differ in their seed alone."""

    group: RunGroup
    style: Style
    sees: str
    """What the model is given at test time."""
    learns_from: str
    learns_by: str
    """Its losses and whose answers they are about; empty where labels are all there is."""

    @property
    def has_parts(self) -> bool:
        """Whether more was measured than the whole model."""
        return len(self.group.branches) > 1

    @property
    def settings_yaml(self) -> str:
        """The config without places; several seeds as a list."""
        config = self.group.first.config.model_dump(mode="json", exclude=set(PLACES), exclude_none=True)
        if len(self.group.runs) > 1:
            config["seed"] = [run.config.seed for run in self.group.runs]
        return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)

    def as_json(self) -> dict[str, Any]:
        """The row in plain values, fractions and seconds, with the result of each of its runs."""
        group, test = self.group, self.group.test
        return {
            "run": group.label,
            "kind": group.first.result.kind,
            "sees": self.sees,
            "learns_from": self.learns_from,
            "learns_by": self.learns_by,
            "n_seeds": len(group.runs),
            "metric": group.first.result.metric,
            "test_score": test.value,
            "test_low": test.low,
            "test_high": test.high,
            "interval_over": test.over,
            "validation_score": group.validation,
            "train_seconds": group.mean_seconds,
            "images_per_s": group.mean_speed,
            "steps": group.first.steps,
            "branches": {name: part.value for name, part in group.branches.items()},
            "runs": [run.result.model_dump(mode="json") for run in group.runs],
        }


def describe_rows(groups: Sequence[RunGroup]) -> tuple[Row, ...]:
    """A row a group, in their order."""
    labels = {run.folder: group.label for group in groups for run in group.runs}
    return tuple(
        Row(group, Style(number), sees(group.first), learns_from(group.first), learns_by(group.first, labels))
        for number, group in enumerate(groups)
    )


def sees(run: FinishedRun) -> str:
    """What the model is given when it is tested."""
    latents = f"{' and '.join(run.facts.modalities)} latents" if run.facts.modalities else ""
    return latents if run.config.kind == "probe" else f"pixels and {latents}" if latents else "pixels"


def learns_from(run: FinishedRun) -> str:
    """The images it was trained on; how many, where the store is at hand."""

    def images(splits: Sequence[str], what: str) -> str:
        count = run.store.images_of(splits) if run.store is not None else 0
        return f"{count:,} {what}" if count else what

    parts = [images(run.config.roles.labelled, "labels")]
    if run.config.roles.transfer:
        parts.append(images(run.config.roles.transfer, "unlabelled"))
    return ", ".join(parts)


def learns_by(run: FinishedRun, labels: Mapping[Path, str]) -> str:
    """The terms of its loss, and whose answers it follows."""
    config = run.config
    if config.self_training is not None:
        return "by self-training"
    taught_by = config.teacher or config.targets
    if taught_by is None or config.objective is None:
        return ""
    place = Path(taught_by).resolve()
    stored = "targets in " if config.targets is not None else ""
    by = " + ".join(config.objective.model_dump(exclude_none=True))
    return f"by {by} from {stored}{labels.get(place, place.name)}"


def lead_of(groups: Sequence[RunGroup]) -> str:
    """What was compared, in a sentence that claims no more than the runs say."""
    kinds = [group.first.config.kind for group in groups]
    counts = [(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)]
    names = [f"{count} {kind}{'s' * (count > 1)}" for count, kind in counts]
    who = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    runs = [run for group in groups for run in group.runs]
    sizes = sorted({run.test.n for run in runs})
    classes = sorted({len(run.facts.class_names) for run in runs})
    images = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    n_classes = f"{classes[0]}" if len(classes) == 1 else f"{classes[0]} to {classes[-1]}"
    n_seeds = {len(group.runs) for group in groups}
    seeds = f", each with {n_seeds.pop()} seeds" if len(n_seeds) == 1 and n_seeds != {1} else ""
    students = " A student sees pixels and nothing else when it is tested." if "student" in kinds else ""
    metric = METRIC_IN_WORDS[runs[0].result.metric]
    return f"{metric} of {who} on {images} test images of {n_classes} classes{seeds}.{students}"

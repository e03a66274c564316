"""The run that each arm of a study is, with one choice of tuned settings or another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dla_cache.errors import SpecError
from dla_cache.spec import canonical_json
from trainer.config import RunConfig, merge, over_preset, resolve_run
from trainer.study_spec import StudySpec, fields_of_arm
from trainer.study_tuning import Settings, grid_trials, values_beyond
from trainer.views import ViewConfig


class ArmConfigs:
    """Run configs of the arms of a study, without a seed and without places that mean anything."""

    def __init__(self, spec: StudySpec, base: Path) -> None:
        """
        Args:
            base: folder that paths in the fields of runs are relative to.

        Raises:
            SpecError: if an arm's fields make no run, or some value that might be tried does not fit.
        """
        self.spec, self.base = spec, base
        self._known: dict[tuple[str, str, float | None], RunConfig] = {}
        for name in spec.in_order():
            self._check(name)
        tested = {name: self.config(name, {}, None).roles.test for name in spec.arms}
        first = next(iter(tested.values()))
        for name, splits in tested.items():
            if not splits or splits != first:
                raise SpecError(
                    f"arm `{name}` is tested on {list(splits)} and `{next(iter(tested))}` on {list(first)}",
                    hint="give `roles.test` once, in `base`: arms are compared image by image, and tuning leaves it out"
                    " by itself",
                )
        for pair in () if spec.label_fractions else spec.comparisons:
            shares = [self.config(name, {}, None).label_fraction for name in pair]
            if shares[0] != shares[1]:
                raise SpecError(
                    f"`comparisons` pairs `{pair[0]}` of {shares[0]:g} of the labels and `{pair[1]}` of {shares[1]:g}",
                    hint="give both the same `label_fraction`, or the study `label_fractions`: every arm has each",
                )

    def views(self, name: str, settings: Settings) -> ViewConfig:
        """What an arm says of views, which those of its stored targets are to be."""
        fields = self._fields(name, settings, {"teacher": "none"})
        return resolve_run(fields, base=self.base, where=self._where(name)).view

    def config(self, name: str, settings: Settings, fraction: float | None) -> RunConfig:
        """An arm's run with some settings, without a seed and places that mean anything."""
        known = (name, canonical_json(dict(settings)), fraction)
        if known not in self._known:
            place: dict[str, Any] = {}
            above = self.spec.learns_from(name)
            if above is not None and self.spec.beside(name):
                place = {"teachers": dict.fromkeys((above, *self.spec.beside(name)), "none")}
            elif above is not None:
                place = {"teacher" if self.spec.targets_of(name) is None else "targets": "none"}
            fields = self._fields(name, settings, place)
            if "targets" in place and "view" not in merged_fields(self.spec, name):
                fields.pop("view", None)  # the preset's: those of the targets take its place
            if fraction is not None:
                fields["label_fraction"] = fraction
            self._known[known] = resolve_run(fields, base=self.base, where=self._where(name))
        return self._known[known]

    def _fields(self, name: str, settings: Settings, place: Mapping[str, Any]) -> dict[str, Any]:
        fields = over_preset(merged_fields(self.spec, name), self._where(name))
        for setting, value in settings.items():
            fields = with_setting(fields, setting, value, f"arms.{name}.tune")
        return {**fields, "store": "none", "output": "none", **place}

    def _where(self, name: str) -> str:
        return f"{self.spec.name}: arms.{name}"

    def default(self, name: str) -> dict[str, Any]:
        """What an arm's run says of the settings that it tunes, as far as it says anything."""
        said = self.config(name, {}, None).model_dump(mode="json")
        return {name: value for name in self.spec.arms[name].tune if (value := value_at(said, name)) is not None}

    def _check(self, name: str) -> None:
        """Resolves the arm's run with every value that might be tried.

        Raises:
            SpecError: naming the arm and what does not fit.
        """
        self.config(name, {}, None)
        # An arm that takes the settings of another must fit them, too: it is trained after all of that one's tuning.
        axes = self.spec.arms[self.spec.tuned_as(name)].tune
        for setting, axis in axes.items():
            first = {other: one.values[0] for other, one in axes.items()}
            for value in (*axis.values, *values_beyond(axis, self.spec.tuning.extensions)):
                try:
                    self.config(name, {**first, setting: value}, None)
                except SpecError as error:
                    raise SpecError(
                        f"arm `{name}` may try {setting} = {value}: {error.message}",
                        hint=f"leave it out, or keep extensions from it by `low` and `high`; {error.hint}",
                    ) from error
        default = self.default(self.spec.tuned_as(name))
        for trial in grid_trials(axes, default, self.spec.tuning.trials) if axes else ():
            self.config(name, trial, None)
        for fraction in self.spec.fractions_of():
            self.config(name, {}, fraction)


def merged_fields(spec: StudySpec, name: str) -> dict[str, Any]:
    """What the study says of an arm's runs, as the fields of one run file."""
    value: dict[str, Any] = {}
    for fields in fields_of_arm(spec, name):
        value = merge(value, fields)
    return value


def with_setting(fields: Mapping[str, Any], setting: str, value: Any, where: str) -> dict[str, Any]:
    """The fields of a run with one more, given by its dotted name.

    Raises:
        SpecError: if the name leads through a plain value, or to an objective that the run has not.
    """
    name, _, rest = setting.partition(".")
    if not rest:
        return {**fields, name: value}
    below = fields.get(name)
    if below is not None and not isinstance(below, Mapping):
        raise SpecError(f"`{where}`: `{name}` of `{setting}` is a plain value", hint="check the name of the setting")
    inner = dict(below or {})
    term = rest.partition(".")[0]
    # An objective with a term more is another objective, which nobody asked for.
    if name == "objective" and not isinstance(inner.get(term), Mapping):
        raise SpecError(
            f"`{where}` tunes `{setting}`, and the run has no `objective.{term}`",
            hint=f"its objective has {', '.join(f'`{one}`' for one in inner) or 'nothing'}: add the term to `run`",
        )
    return {**fields, name: with_setting(inner, rest, value, where)}


def value_at(fields: Mapping[str, Any], setting: str) -> Any:
    """The field of a dotted name; None if there is none."""
    value: Any = fields
    for name in setting.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value

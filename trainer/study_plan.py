"""Which runs a study is made of: a pure function of its spec, of what its stores hold, and of the scores so far.

A run is known by its address: a hash of its settings, of what it reads of its store, and of the address of what it
learns from. So two arms that ask for the same run share it, and a run of other data is another run.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from dla_cache.errors import SpecError
from dla_cache.spec import canonical_json
from dla_cache.store import LatentStore
from trainer.classifiers import pretrained_facts
from trainer.config import RunConfig
from trainer.pretrained import with_places
from trainer.run_folder import digest_of_rows, identity_of
from trainer.study_arms import ArmConfigs
from trainer.study_spec import StudySpec
from trainer.study_tuning import Settings, TuningState, tune
from trainer.targets import TargetsConfig
from trainer.upbringing import pictures_seen

ADDRESS_FORMAT = 1
"""Part of every address: raised when the same settings would train another model."""

Stage = Literal["tuning", "final"]
Validation = Callable[[str], float | None]
"""The validation score of a run by its address; None until it is done."""


@dataclass(frozen=True, slots=True)
class StudyStore:
    """A store as far as the address of a run depends on it."""

    place: str
    images: str | None
    rows_sha256: str
    pictures: Mapping[str, Any]
    """What is decoded of the images, see `dla_cache.spec.ImageRecipe`."""
    latents_sha256: Mapping[str, str]
    """Modality → content hash."""


def store_facts(store: LatentStore, place: str, images: str | None) -> StudyStore:
    """What the addresses of runs on an open store depend on.

    Raises:
        IncompleteBuildError: if a modality is not whole.
    """
    return StudyStore(
        place,
        images,
        digest_of_rows(store),
        pictures_seen(store, images).model_dump(mode="json"),
        {name: store.content_hash([name]) for name in store.modalities},
    )


def no_stores(spec: StudySpec) -> dict[str | None, StudyStore]:
    """In place of stores that need not be there: each holds something of its own, so the plan has as many runs."""
    return {name: StudyStore("no-store", None, f"rows of {name}", {}, {}) for name in (None, *spec.stores)}


@dataclass(frozen=True, slots=True)
class PlannedTargets:
    """Targets of one teacher that students learn from."""

    key: str
    config: TargetsConfig


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of a study, with all that it is made from."""

    arm: str
    stage: Stage
    teacher_seed: int | None
    seed: int
    trial: int | None
    """Which settings of the arm's tuning it tries; None of a final run."""
    settings: Settings
    """Those that were tuned, or are being tuned."""
    key: str
    """Its address."""
    config: RunConfig
    upstream: "PlannedRun | None" = None
    """What it learns from."""
    beside: tuple["PlannedRun", ...] = ()
    """And what else, all of them together."""
    targets: PlannedTargets | None = None

    @property
    def all_upstream(self) -> tuple["PlannedRun", ...]:
        """All that it learns from."""
        return (() if self.upstream is None else (self.upstream,)) + self.beside

    @property
    def name(self) -> str:
        """For messages: `kd, teacher 0, seed 3`."""
        teacher = "" if self.teacher_seed is None else f", teacher {self.teacher_seed}"
        trial = "" if self.trial is None else f", trial {self.trial}"
        share = "" if self.config.label_fraction == 1 else f", {self.config.label_fraction:g} of the labels"
        return f"{self.arm}{teacher}, seed {self.seed}{trial}{share}"


def latents_of(run: PlannedRun, *, is_taught_by_targets: bool) -> tuple[str, ...] | None:
    """The modalities that a run reads of its store: for itself, its objectives, or its teacher; None for all."""
    if run.config.kind != "student":
        return run.config.modalities
    of_objectives = () if run.config.objective is None else run.config.objective.modalities
    if run.upstream is None or is_taught_by_targets:
        return tuple(of_objectives)
    of_teachers = [one.config.modalities for one in run.all_upstream if one.config.kind != "student"]
    read = [of_teacher for of_teacher in of_teachers if of_teacher is not None]
    return tuple(dict.fromkeys((*chain(*read), *of_objectives))) if len(read) == len(of_teachers) else None


@dataclass(frozen=True, slots=True)
class StudyState:
    """All that is known of a study's runs by now."""

    runs: tuple[PlannedRun, ...]
    """Each after what it learns from, but for runs whose settings are not chosen yet."""
    tuning: Mapping[str, TuningState]
    """By arm, of those that tune and whose teachers are tuned."""
    is_whole: bool
    """Whether no run waits for settings to be chosen."""


class StudyPlan:
    """The runs of one study in one folder."""

    def __init__(
        self,
        spec: StudySpec,
        stores: Mapping[str | None, StudyStore],
        out: Path,
        *,
        base: Path = Path(),
    ) -> None:
        """
        Args:
            stores: by the names that arms give them; None for the study's own.
            base: folder that paths in the fields of runs are relative to.

        Raises:
            SpecError: if an arm's fields make no run, or some value that might be tried does not fit.
        """
        self.spec, self.stores, self.out = spec, stores, out
        self.arms = ArmConfigs(spec, base)
        self._runtime: dict[str, Any] = {"device": spec.device, "threads": spec.threads}
        self._made: dict[tuple[Any, ...], PlannedRun] = {}
        self._weights: dict[str, str] = {}

    def state(self, validation: Validation) -> StudyState:
        """The runs that can be said by now: all but those whose settings wait for other runs."""
        chosen: dict[str, Settings] = {}
        tuning: dict[str, TuningState] = {}
        runs: dict[tuple[str, str], PlannedRun] = {}

        def add(run: PlannedRun) -> None:
            for other in run.all_upstream:
                add(other)
            runs.setdefault((run.arm, f"{run.stage} {run.key}"), run)

        order = self.spec.in_order()
        for name in order:
            above = (self.spec.learns_from(name), *self.spec.beside(name))
            if any(other is not None and other not in chosen for other in above):
                continue
            if self.spec.tuned_as(name) != name:
                if self.spec.tuned_as(name) not in chosen:
                    continue
                chosen[name] = chosen[self.spec.tuned_as(name)]
            elif self.spec.arms[name].tune:
                tuning[name] = self._tune(name, chosen, validation)
                for number, trial in enumerate(tuning[name].trials):
                    for run in self._of_trial(name, trial, number, chosen):
                        add(run)
                settings = tuning[name].chosen
                if settings is None:
                    continue
                chosen[name] = settings
            else:
                chosen[name] = {}
            for run in self._final(name, chosen):
                add(run)
        return StudyState(tuple(runs.values()), tuning, len(chosen) == len(order))

    def _tune(self, name: str, chosen: Mapping[str, Settings], validation: Validation) -> TuningState:
        def score(settings: Settings) -> float | None:
            scores = [validation(run.key) for run in self._of_trial(name, settings, 0, chosen)]
            known = [one for one in scores if one is not None]
            return fmean(known) if len(known) == len(scores) else None

        return tune(self.spec.arms[name].tune, self.arms.default(name), self.spec.tuning, score)

    def _of_trial(
        self, name: str, settings: Settings, number: int, chosen: Mapping[str, Settings]
    ) -> Iterator[PlannedRun]:
        seeds = self.spec.tuning.all_seeds
        teacher_seed = self._teacher_seeds(name, seeds[:1])[0]
        for seed in seeds:
            yield self._run(name, "tuning", teacher_seed, seed, None, {**chosen, name: settings}, trial=number)

    def _final(self, name: str, chosen: Mapping[str, Settings]) -> Iterator[PlannedRun]:
        for fraction in self.spec.fractions_of():
            for teacher_seed in self._teacher_seeds(name, self.spec.all_teacher_seeds):
                for seed in self.spec.final_seeds(name):
                    yield self._run(name, "final", teacher_seed, seed, fraction, chosen)

    def _teacher_seeds(self, name: str, seeds: tuple[int, ...]) -> tuple[int | None, ...]:
        """Those that an arm is crossed with. A teacher that learns from a teacher has its own seed."""
        is_crossed = self.spec.teacher_of(name) is not None and self.spec.arms[name].role != "teacher"
        return seeds if is_crossed else (None,)

    def _run(
        self,
        name: str,
        stage: Stage,
        teacher_seed: int | None,
        seed: int,
        fraction: float | None,
        chosen: Mapping[str, Settings],
        *,
        trial: int | None = None,
    ) -> PlannedRun:
        settings = chosen[name]
        above = self.spec.learns_from(name)

        def learned_from(above: str) -> PlannedRun:
            is_teacher = self.spec.arms[above].role == "teacher"
            own = seed if self.spec.arms[name].role == "teacher" or teacher_seed is None else teacher_seed
            # In tuning what is learned from is no trial of its own.
            return self._run(
                above,
                stage,
                None if is_teacher else teacher_seed,
                own if is_teacher else seed,
                fraction,
                chosen,
                trial=None if stage == "final" else 0,
            )

        upstream = None if above is None else learned_from(above)
        beside = tuple(learned_from(other) for other in self.spec.beside(name))
        learned = tuple(one.key for one in (upstream, *beside) if one is not None)
        made = (name, stage, teacher_seed, seed, fraction, canonical_json(dict(settings)), learned)
        if made not in self._made:
            self._made[made] = self._address(
                PlannedRun(
                    arm=name,
                    stage=stage,
                    teacher_seed=seed if self.spec.arms[name].role == "teacher" and above else teacher_seed,
                    seed=seed,
                    trial=trial,
                    settings=settings,
                    key="",
                    config=self.arms.config(name, settings, fraction).model_copy(update={"seed": seed}),
                    upstream=upstream,
                    beside=beside,
                )
            )
        return replace(self._made[made], trial=trial)

    def _address(self, run: PlannedRun) -> PlannedRun:
        """The run with its places and its address."""
        store = self.stores[self.spec.store_of(run.arm)]
        config = run.config
        if run.stage == "tuning":
            config = config.model_copy(update={"roles": config.roles.model_copy(update={"test": ()})})
        targets = self._targets(run, store)
        seen = latents_of(run, is_taught_by_targets=targets is not None)
        latents = {name: store.latents_sha256.get(name) for name in (store.latents_sha256 if seen is None else seen)}
        sees_images = config.kind != "probe"
        key = address_of(
            {
                "run": identity_of(config),
                "rows": store.rows_sha256,
                "pictures": store.pictures if sees_images else None,
                "latents": latents,
                "learns_from": None if run.upstream is None else run.upstream.key,
                "targets": None if targets is None else targets.key,
            }
            | ({"beside": {one.arm: one.key for one in run.beside}} if run.beside else {})
            | self._pretrained(config.model)
        )
        places: dict[str, Any] = {"store": store.place, "images": store.images, "output": str(self.folder_of(key))}
        if targets is not None:
            places["targets"] = targets.config.output
        elif run.beside:
            places["teachers"] = {
                one.arm: one.config.output for one in sorted(run.all_upstream, key=lambda one: one.arm)
            }
        elif run.upstream is not None:
            places["teacher"] = run.upstream.config.output
        # What places the config had were those of no run, put there to make it whole.
        config = config.model_copy(
            update={"teacher": None, "teachers": None, "targets": None, **places, **self._runtime}
        )
        return replace(run, key=key, config=config, targets=targets)

    def _pretrained(self, model: Mapping[str, Any]) -> dict[str, str]:
        """What of pretrained weights is in an address: their content, or where they are not on this machine (as for a
        dry run; no run begins without them) the names that `model` gives them."""
        named: list[str] = []
        with_places(model, named.append)
        known = canonical_json(dict(model))
        if named and known not in self._weights:
            try:
                facts = pretrained_facts(model)
            except SpecError:
                facts = None
            self._weights[known] = " ".join(named) if facts is None else facts.sha256
        return {"pretrained": self._weights[known]} if named else {}

    def _targets(self, run: PlannedRun, store: StudyStore) -> PlannedTargets | None:
        asked = self.spec.targets_of(run.arm)
        if asked is None:
            return None
        assert run.upstream is not None
        assert run.config.objective is not None
        config = TargetsConfig(
            store=store.place,
            images=store.images,
            output="",
            teacher=run.upstream.config.output,
            splits=run.config.training_splits,
            view=self.arms.views(run.arm, run.settings).model_copy(update={"count": asked.views}),
            objective=run.config.objective,
            **self._runtime,
        )
        said = config.model_dump(mode="json", include={"splits", "view", "objective"})
        # The teacher reads the latents of the student's store, which need not be the one that it was trained on.
        read = run.upstream.config.modalities if run.upstream.config.kind != "student" else ()
        latents = {name: store.latents_sha256.get(name) for name in (store.latents_sha256 if read is None else read)}
        key = address_of(
            {"targets": said, "rows": store.rows_sha256, "latents": latents, "learns_from": run.upstream.key}
        )
        return PlannedTargets(key, config.model_copy(update={"output": str(self.out / "targets" / key)}))

    def folder_of(self, key: str) -> Path:
        """Where the run of an address lies."""
        return self.out / "runs" / key


def address_of(what: Mapping[str, Any]) -> str:
    """The first 16 hex digits of a hash of plain values."""
    return hashlib.sha256(canonical_json({"format": ADDRESS_FORMAT, **what}).encode()).hexdigest()[:16]

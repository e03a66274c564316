"""What a study is: arms, seeds, budgets and the comparisons that are planned; one frozen spec, read from YAML.

Here stands what the spec says by itself. Whether an arm's fields make a run is looked at where runs are planned, so
that a page of a finished study needs no trainer.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dla_cache.spec import StrictModel
from trainer.study_entries import Axis, Seed, StoreEntry

FIRST_TUNING_SEED = 1000
"""Where the seeds of tuning start if their number alone is given: no final run has them, and more final seeds do not
change them."""

STUDY_OWN = frozenset(
    {"store", "images", "output", "teacher", "targets", "seed", "device", "threads", "label_fraction_seed"}
)
"""Fields of a run that the study sets itself, or that are no part of what is compared."""

NEVER_TUNED = frozenset({"kind", "preset", "roles", "label_fraction"})
"""Fields that decide what is measured on what, or what the arm is."""

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Fraction = Annotated[float, Field(gt=0, le=1)]


class StoredTargets(StrictModel):
    """Learn from what the teacher said once of so many views of every image, in place of the teacher at hand."""

    views: Annotated[int, Field(gt=0)] = 8
    """Views of an image that are stored."""


class StudyArm(StrictModel):
    """One way to train that is compared with others."""

    run: dict[str, Any] = Field(default_factory=dict)
    """Fields of a run file over the study's `base`."""
    role: Literal["teacher"] | None = None
    """`teacher`: its seeds are the teacher seeds, and it is no row of the main table."""
    learns_from: str | None = None
    """The arm whose runs are the teachers of this one's; that of `like` when absent."""
    beside: tuple[str, ...] = ()
    """More arms with the role of a teacher: with `learns_from`, and of the same seed, they are the `teachers` of
    this one's runs, by the names of the arms; those of `like` when absent."""
    like: str | None = None
    """Take the run fields of another arm, below this one's own, and the settings that it was tuned to."""
    store: str | None = None
    """Which of `stores` to train on; that of what it learns from when absent, and else the study's own."""
    tune: dict[str, Axis] = Field(default_factory=dict)
    """Settings by dotted name, and the values that are tried of each."""
    seeds: Annotated[int, Field(gt=0)] | tuple[Seed, ...] | None = None
    """Seeds 0 to n - 1, or a list; those of the study when absent."""
    targets: StoredTargets | None = None
    """Learn from stored targets of the teacher."""
    exploratory: bool = False
    """Thought of after results were seen: the report never calls it better."""
    label: str | None = None
    """What the page calls it."""
    note: str | None = None
    """What the page says beside it."""


class Tuning(StrictModel):
    """What each arm that tunes may spend, on validation alone."""

    trials: Annotated[int, Field(gt=0)] = 6
    """Settings that are tried of each arm."""
    seeds: Annotated[int, Field(gt=0)] | Annotated[tuple[Seed, ...], Field(min_length=1)] = 2
    """Runs of each trial, or their seeds; none of them is a final seed."""
    extensions: Annotated[int, Field(ge=0)] = 2
    """Trials more that an arm may have where its best value lies at the edge of an axis that may be extended."""

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of each trial."""
        return _listed(self.seeds, FIRST_TUNING_SEED)


class StudySpec(StrictModel):
    """A comparison of arms: what is trained, how often, what may be tuned, and what will be compared."""

    name: Annotated[str, Field(pattern=rf"^{SAFE_NAME.pattern}$")]
    question: str
    """One sentence that the page shows."""
    store: str | None = None
    """Place of the store, relative to the spec file; the command may name another."""
    images: str | None = None
    """Folder that the image paths of the store are relative to; none for a store that holds the images itself."""
    data: Literal["relief-digits", "relief-digits-depth"] | None = None
    """In place of `store` and `images`: data that the command makes by itself, and their latents; all, or depth."""
    stores: dict[str, StoreEntry] = Field(default_factory=dict)
    """More stores, by the names that arms give them."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Fields of a run file below those of every arm."""
    arms: Annotated[dict[str, StudyArm], Field(min_length=1)]
    """By name."""
    seeds: Annotated[int, Field(gt=0)] | Annotated[tuple[Seed, ...], Field(min_length=1)] = 10
    """Seeds 0 to n - 1 of every arm, or a list."""
    teacher_seeds: Annotated[int, Field(gt=0)] | Annotated[tuple[Seed, ...], Field(min_length=1)] = 3
    """Seeds of the arms with `role: teacher`: those who learn from one are trained with each of them."""
    label_fractions: Annotated[tuple[Fraction, ...], Field(min_length=1)] | None = None
    """Shares of the labelled images; all final runs are made with each. Tuning sees those of the run alone."""
    tuning: Tuning = Tuning()
    unequal_budget: str | None = None
    """Why some arm has fewer settings to try than `tuning.trials`; the page shows it."""
    comparisons: tuple[tuple[str, str], ...] = ()
    """Pairs of arms that the study was made to compare: the family that p values are adjusted over."""
    equivalence_margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Points (percent of the metric) below which a difference does not matter."""
    confidence: Annotated[float, Field(ge=0.8, lt=1)] = 0.95
    """Of intervals; one minus it is the level of the tests, so that below 0.8 most would find something."""
    device: str = "cpu"
    """What every run trains on, as torch names it."""
    threads: Annotated[int, Field(gt=0)] = 1
    """Of each run, that read and decode images ahead; they change nothing in a run."""
    groups: str | None = None
    """Table (CSV) of image_id and group, relative to the spec file, for images that belong together."""

    @field_validator("seeds", "teacher_seeds", mode="after")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        return _distinct(value)

    @property
    def all_teacher_seeds(self) -> tuple[int, ...]:
        """In their order."""
        return _listed(self.teacher_seeds)

    def final_seeds(self, name: str) -> tuple[int, ...]:
        """The seeds of an arm's final runs."""
        arm = self.arms[name]
        if arm.role == "teacher":
            return self.all_teacher_seeds
        return _listed(self.seeds if arm.seeds is None else arm.seeds)

    def likeness(self, name: str) -> tuple[str, ...]:
        """The arm and those that it is `like`, the one that says it all last: whose settings it takes."""
        names = [name]
        while (other := self.arms[names[-1]].like) is not None:
            names.append(other)
        return tuple(names)

    def tuned_as(self, name: str) -> str:
        """The arm whose tuned settings an arm takes: itself, or the one that it is `like`."""
        return self.likeness(name)[-1]

    def learns_from(self, name: str) -> str | None:
        """The arm that an arm learns from, its own or that of the arm it is `like`."""
        return next((found for one in self.likeness(name) if (found := self.arms[one].learns_from)), None)

    def beside(self, name: str) -> tuple[str, ...]:
        """The arms that an arm learns from beside that one."""
        return next((found for one in self.likeness(name) if (found := self.arms[one].beside)), ())

    def teacher_of(self, name: str) -> str | None:
        """The arm with `role: teacher` that an arm learns from, at any depth: whose seeds are its teacher seeds."""
        above = self.learns_from(name)
        while above is not None and self.arms[above].role != "teacher":
            above = self.learns_from(above)
        return above

    def store_of(self, name: str) -> str | None:
        """Which of `stores` an arm is trained on; None for the study's own."""
        above: str | None = name
        while above is not None:
            if self.arms[above].store is not None:
                return self.arms[above].store
            above = self.learns_from(above)
        return None

    def targets_of(self, name: str) -> StoredTargets | None:
        """The stored targets that an arm learns from, its own or those of the arm that it is `like`."""
        return next((found for one in self.likeness(name) if (found := self.arms[one].targets)), None)

    def fractions_of(self) -> tuple[float | None, ...]:
        """The label fractions of final runs; None for what each run says itself."""
        return (None,) if self.label_fractions is None else self.label_fractions

    def in_order(self) -> tuple[str, ...]:
        """The arms, each after those that it learns from and is like."""
        done: dict[str, None] = {}

        def visit(name: str) -> None:
            for other in (self.learns_from(name), *self.beside(name), self.arms[name].like):
                if other is not None and other not in done:
                    visit(other)
            done[name] = None

        for name in self.arms:
            if name not in done:
                visit(name)
        return tuple(done)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.store is None) == (self.data is None):
            raise ValueError("name either `store`, with `images` unless it holds them, or `data`")
        if self.data is not None and self.images is not None:
            raise ValueError("`images` belongs to `store`: the command makes those of `data`")
        made = [name for name, entry in self.stores.items() if entry.source is not None]
        if made and self.data is None:
            raise ValueError(f"`stores.{made[0]}.source` belongs to a study with `data`: name the `path` of a store")
        unsafe = [name for name in (*self.arms, *self.stores) if not SAFE_NAME.fullmatch(name)]
        if unsafe:
            raise ValueError(f"`{unsafe[0]}` is no safe name: letters, digits, `._-`, at most 64 of them")
        if self.label_fractions is not None and len(set(self.label_fractions)) != len(self.label_fractions):
            raise ValueError("a fraction stands twice in `label_fractions`")
        self._check_references()
        self._check_circles()
        for name, arm in self.arms.items():
            self._check_arm(name, arm)
        self._check_seeds()
        self._check_budget()
        self._check_comparisons()
        return self

    def _check_references(self) -> None:
        for name, arm in self.arms.items():
            for field in ("learns_from", "like"):
                other = getattr(arm, field)
                if other is not None and other not in self.arms:
                    raise ValueError(f"`arms.{name}.{field}` names `{other}`, and the arms are {_named(self.arms)}")
            for other in arm.beside:
                if other not in self.arms or self.arms[other].role != "teacher":
                    raise ValueError(f"`arms.{name}.beside` names `{other}`, which is no arm with `role: teacher`")
            if arm.store is not None and arm.store not in self.stores:
                have = f"are {_named(self.stores)}" if self.stores else "are none"
                raise ValueError(f"`arms.{name}.store` names `{arm.store}`, and the `stores` {have}")
        for pair in self.comparisons:
            for other in pair:
                if other not in self.arms:
                    raise ValueError(f"`comparisons` names `{other}`, and the arms are {_named(self.arms)}")

    def _check_circles(self) -> None:
        def others(name: str) -> list[str]:
            arm = self.arms[name]
            return [other for other in (arm.learns_from, *arm.beside, arm.like) if other is not None]

        for start in self.arms:
            seen: set[str] = set()
            found = others(start)
            while found:
                name = found.pop()
                if name == start:
                    raise ValueError(f"arm `{start}` comes back to itself over `learns_from` and `like`")
                if name not in seen:
                    seen.add(name)
                    found += others(name)

    def _check_arm(self, name: str, arm: StudyArm) -> None:
        where = f"`arms.{name}`"
        for place, fields in ((f"arms.{name}.run", arm.run), ("base", self.base)):
            own = sorted(fields.keys() & STUDY_OWN)
            if own:
                raise ValueError(f"`{place}.{own[0]}` is the study's to set: leave it out")
            if self.label_fractions is not None and "label_fraction" in fields:
                raise ValueError(f"`{place}.label_fraction` and `label_fractions` both say how many labels: leave one")
        for setting in arm.tune:
            first = setting.split(".")[0]
            if first in STUDY_OWN | NEVER_TUNED or not all(setting.split(".")):
                raise ValueError(f"`{setting}` in {where} is nothing to tune: name a setting of a run, as `loop.steps`")
        if arm.like is not None and arm.tune:
            raise ValueError(f"{where} is like `{arm.like}` and takes its settings: leave out `tune`, or `like`")
        if arm.role == "teacher" and arm.seeds is not None:
            raise ValueError(f"the seeds of {where} are the `teacher_seeds`: leave out `seeds`")
        above = self.learns_from(name)
        if others := self.beside(name):
            role = None if above is None else self.arms[above].role
            if role != "teacher" or above in others or self.targets_of(name) is not None:
                raise ValueError(
                    f"{where} has `beside`: let it learn from one more arm with `role: teacher`, no targets"
                )
        if above is None:
            if self.targets_of(name) is not None:
                raise ValueError(f"{where} has `targets` and learns from no arm that could give them")
            return
        if arm.role == "teacher" and self.arms[above].role != "teacher":
            raise ValueError(f"{where} has the role of a teacher and learns from `{above}`, which has not")

    def _check_seeds(self) -> None:
        for name, arm in self.arms.items():
            _distinct(arm.seeds, f"arms.{name}.seeds")
            above = self.learns_from(name)
            if above is not None and self.arms[above].role != "teacher":
                lacking = sorted(set(self.final_seeds(name)) - set(self.final_seeds(above)))
                if lacking:
                    raise ValueError(
                        f"`arms.{name}` has seed {lacking[0]}, and `{above}`, which it learns from, has not"
                    )
        _distinct(self.tuning.seeds, "tuning.seeds")
        if any(arm.tune for arm in self.arms.values()):
            for name in self.arms:
                both = sorted(set(self.final_seeds(name)) & set(self.tuning.all_seeds))
                if both:
                    raise ValueError(
                        f"seed {both[0]} is one of tuning and one of `{name}`'s final runs: what is chosen on a seed"
                        " must not be measured on it"
                    )

    def _check_budget(self) -> None:
        if self.unequal_budget is not None:
            return
        for name, arm in self.arms.items():
            n_settings = math.prod(len(axis.values) for axis in arm.tune.values())
            if arm.tune and n_settings < self.tuning.trials:
                raise ValueError(
                    f"`arms.{name}.tune` has {n_settings} settings to try and `tuning.trials` is {self.tuning.trials}:"
                    " arms that tune have equal budgets; give it more values, lower `tuning.trials`, or say why not in"
                    " `unequal_budget`"
                )

    def _check_comparisons(self) -> None:
        pairs = [frozenset(pair) for pair in self.comparisons]
        for pair, both in zip(self.comparisons, pairs, strict=True):
            if len(both) == 1:
                raise ValueError(f"`comparisons` compares `{pair[0]}` with itself")
            if pairs.count(both) > 1:
                raise ValueError(f"`comparisons` has `{pair[0]}` and `{pair[1]}` twice")
            for name in pair:
                if self.arms[name].role == "teacher":
                    raise ValueError(f"`comparisons` names `{name}`, a teacher, which has other seeds than students")
                if self.arms[name].exploratory:
                    raise ValueError(
                        f"`comparisons` names `{name}`, which is exploratory: no comparison of it is planned"
                    )
            first, second = (sorted(self.final_seeds(name)) for name in pair)
            if first != second:
                raise ValueError(f"`comparisons` pairs `{pair[0]}` of seeds {first} and `{pair[1]}` of seeds {second}")


def fields_of_arm(spec: StudySpec, name: str) -> list[Mapping[str, Any]]:
    """What is said of an arm's runs, the lowest first: the study's base, the arms that it is like, its own."""
    return [spec.base, *(spec.arms[one].run for one in reversed(spec.likeness(name)))]


def _listed(seeds: int | tuple[int, ...], first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + seeds)) if isinstance(seeds, int) else seeds


def _distinct(seeds: Any, where: str = "") -> Any:
    if isinstance(seeds, tuple) and len(set(seeds)) != len(seeds):
        raise ValueError(f"a seed stands twice in `{where}`" if where else "a seed stands twice")
    return seeds


def _named(names: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)

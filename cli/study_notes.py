"""What a reader of a study must know first, and which of its arms are controls of which."""

import math
from dataclasses import dataclass

from cli.render import counted
from dla_cache.errors import name_some
from trainer.leak_audit import LeakAudit
from trainer.study_pairs import LABEL_INFORMED, is_label_informed
from trainer.study_results import ArmResult, Comparison, StudyResults


@dataclass(frozen=True, slots=True)
class Control:
    """An arm beside the one that it is like, or that one itself."""

    arm: ArmResult
    latents: str
    """What stands in the place of the latents, in words."""
    against: Comparison | None
    """The arm that it is like minus this one; None for that one itself, or where they have no runs in common."""
    is_reversed: bool = False
    """Whether the planned comparisons have this one minus the arm that it is like."""


def controls_of(results: StudyResults) -> tuple[tuple[Control, ...], ...]:
    """Arms with those that take their settings, each group led by the arm that was tuned."""
    spec = results.table.spec
    groups = []
    for fraction in results.table.fractions:
        there = {arm.name: arm for arm in results.arms if arm.fraction == fraction and not arm.is_teacher}
        for name, arm in there.items():
            alike = [other for other in there if other != name and spec.tuned_as(other) == name]
            if not alike:
                continue
            pairs = {
                pair.second: pair for pair in results.comparisons if pair.first == name and pair.fraction == fraction
            }
            lines = [Control(arm, latents_of(results, name), None)]
            planned_first = {first for first, second in spec.comparisons if second == name}
            lines += [
                Control(there[other], latents_of(results, other), pairs.get(other), is_reversed=other in planned_first)
                for other in alike
            ]
            groups.append(tuple(lines))
    return tuple(groups)


def latents_of(results: StudyResults, name: str) -> str:
    """Which latents an arm, or what it learns from, is trained on, and what that is."""
    spec = results.table.spec
    store, above = spec.store_of(name), spec.learns_from(name)
    control = None if store is None else spec.stores[store].control
    latents = "as cached" if store is None else f"store {store}"
    if control is not None and store is not None:
        latents = f"control: {control}, seed {spec.stores[store].seed}"
    return latents if above is None else f"{latents}; {above}"


def notes_of(results: StudyResults, audit: LeakAudit | None) -> tuple[tuple[str, str], ...]:
    """The callout of the page: a word and a sentence each."""
    spec = results.table.spec
    notes = []
    if results.missing:
        lacking = f"{counted(len(results.missing), 'run')} of the spec not there"
        notes.append(("Not finished.", f"{lacking}: {name_some(results.missing).replace('`', '')}."))
    notes += faults_of_labels(results)
    single = [arm.label for arm in results.arms if len(arm.seeds) == 1 and not arm.is_teacher]
    if single:
        notes.append(("One seed proves nothing.", f"{'; '.join(single)}: nothing is known of training again."))
    runs_of = {(arm.name, arm.fraction): {run.run for run in arm.runs.values()} for arm in results.arms}
    for pair in results.comparisons:
        one, other = (runs_of[name, pair.fraction] for name in (pair.first, pair.second))
        if one & other:
            told = (
                f"{pair.evidence.first} and {pair.evidence.second} share {len(one & other)} of {len(one | other)} runs"
            )
            notes.append(("The same runs.", f"{told}: the same settings on the same data, so they differ in nothing."))
    informed = [name for name in spec.arms if is_label_informed(spec, name)]
    if informed:
        told = "The latents behind these saw labels, so what they teach is not what a generator knows"
        notes.append((f"{LABEL_INFORMED.capitalize()}.", f"{told}: {', '.join(informed)}."))
    for term in dict.fromkeys(term for arm in results.arms for term in arm.inert):
        arms_of: dict[str, list[str]] = {}
        for arm in (arm for arm in results.arms if term in arm.inert):
            some = "" if arm.inert[term] == len(arm.runs) else f" ({arm.inert[term]} of {len(arm.runs)} runs)"
            share = share_in_words(arm.gradient_shares.get(term, 0.0))
            arms_of.setdefault(share, []).append(f"{arm.label}{some}")
        shares = [f"{share} of the gradient in {', '.join(dict.fromkeys(arms))}" for share, arms in arms_of.items()]
        notes.append(("Inert term.", f"{term} gives {'; '.join(shares)}: nearly inert as set."))
    at_edge: dict[str, list[str]] = {}
    for tuned in results.tuning:
        for setting in tuned.at_edge:
            at_edge.setdefault(setting, []).append(tuned.name)
    if at_edge:
        told = "; ".join(f"{setting} of {', '.join(arms)}" for setting, arms in at_edge.items())
        notes.append(("Edge of the grid.", f"The best lies at the edge of what was tried: {told}."))
    for tuned in results.tuning:
        if not tuned.is_best:
            told = f"{tuned.name}: final runs have other settings than the best trial on validation."
            notes.append(("Not as tuned.", told))
    if spec.unequal_budget is not None:
        notes.append(("Unequal budgets.", spec.unequal_budget))
    if audit is not None:
        notes += audit_notes(audit)
    return tuple(dict.fromkeys(notes))


SUSPICIOUS_GAP = 10.0
"""Points that test may lie below validation, which a model is chosen by, before somebody should look."""


def faults_of_labels(results: StudyResults) -> list[tuple[str, str]]:
    """What looks as if classes were numbered otherwise in some split: no arm can then be good on it."""
    arms = [arm for arm in results.arms if not math.isnan(arm.score.mean)]
    validation = {arm.label: 100 * (arm.mean_of("validation") or 0.0) for arm in arms}
    gaps = {arm.label: validation[arm.label] - arm.score.mean for arm in arms}
    notes = []
    if gaps and min(gaps.values()) > SUSPICIOUS_GAP:
        least = min(gaps, key=lambda label: gaps[label])
        told = (
            f"In every arm, by {gaps[least]:.0f} points or more: are the labels of the test split numbered as those of"
            " the others, and are its images of one kind with theirs?"
        )
        notes.append(("Test lies far below validation.", told))
    chance = 100 / max(1, len(set(results.table.images.labels)))
    students = [arm for arm in arms if not arm.is_teacher]
    if results.table.metric != "top-1" or not students:
        return notes
    if all(arm.high < chance for arm in arms):
        told = f"Every arm is below {chance:.0f} % on test: classes may be numbered otherwise in some split."
        notes.append(("Worse than guessing.", told))
    elif all(arm.low < chance for arm in students):
        told = f"No student is surely above the {chance:.0f} % of guessing: equal, they are equally untrained."
        notes.append(("No better than guessing.", told))
    return notes


def share_in_words(share: float) -> str:
    """A share in percent, with as many digits as a small one needs."""
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def audit_notes(audit: LeakAudit) -> list[tuple[str, str]]:
    """What the leak audit found, if it found something."""
    notes = []
    if audit.n_shared:
        notes.append(("Leak.", f"In more than one role, byte by byte: {counted(audit.n_shared, 'image')}."))
    if audit.test_in_statistics:
        notes.append(("Leak.", "The test split is among those whose latents' statistics a model may know."))
    if audit.test_in_selection:
        notes.append(("Leak.", "The test split is among those that steps and settings were chosen on."))
    saw = [one for one in audit.modalities if one.saw_labels]
    if saw:
        told = [f"{one.modality}{f' of {one.store}' if one.store else ''}, {one.told}" for one in saw]
        notes.append(("Saw labels.", f"{'; '.join(told)}."))
    return notes

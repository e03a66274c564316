"""`dla study run`: every run that a study spec asks for and that is not there yet."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from cli.device import require_device
from cli.render import ProgressReporter, counted
from cli.settings import apply_overrides
from cli.signals import stop_on_signals
from dla_cache.remote import is_remote

if TYPE_CHECKING:
    from cli.study_stores import OpenedStore
    from dla_cache.store import LatentStore
    from trainer.study_plan import StudyPlan, StudyState


def run_command(
    spec_path: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The study.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the study; one that is there is gone on with.")],
    store: Annotated[
        str | None,
        typer.Option("--store", metavar="STORE", help="The store, a folder or a URL, in place of the spec's."),
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Folder the images' paths start from.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one field of the spec.")
    ] = None,
    n_processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Runs side by side, of one thread each; one a core if absent."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print all that would be run, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Run a study: tune, choose on validation, train every arm with every seed, read the test split once a run.

    Run it again to go on: finished runs stay, and those under way go on from their checkpoint.
    """
    from cli.study_dry_run import show_plan
    from cli.study_stores import open_stores
    from dla_cache.spec import load_yaml, parse_spec
    from trainer.leak_audit import AUDIT_NAME
    from trainer.run_folder import locked_run
    from trainer.study import StudyFolder, run_study
    from trainer.study_plan import StudyPlan, no_stores
    from trainer.study_records import read_groups, write_study
    from trainer.study_spec import StudySpec

    said = load_yaml(spec_path)
    value = apply_overrides(said, overrides or [])
    # A place on the command line starts from here, one in the file from the file.
    if store is not None:
        value = {name: one for name, one in value.items() if name != "data"} | {"store": placed(store)}
    if images is not None:
        value |= {"images": str(images.absolute())}
    is_as_given = not overrides and store is None and images is None
    text = spec_path.read_text(encoding="utf-8") if is_as_given else yaml.safe_dump(value, sort_keys=False)
    spec, base = parse_spec(value, StudySpec, where=str(spec_path)), spec_path.parent.absolute()
    processes = n_processes or os.cpu_count() or 1
    # What does not fit is said before anything is built.
    first = StudyPlan(spec, no_stores(spec), out, base=base)
    if dry_run:
        show_plan(first, out, processes, as_json=as_json)
        return
    require_device(spec.device)
    with locked_run(out), stop_on_signals() as should_stop:
        stores = open_stores(spec, base, out, should_stop=should_stop)
        facts = {name: one.facts for name, one in stores.items()}
        built = {name: one.build_seconds for name, one in stores.items()}
        folder = StudyFolder(StudyPlan(spec, facts, out.absolute(), base=base))
        groups = None if spec.groups is None else base / spec.groups
        if groups is not None:
            read_groups(groups, tested_images(folder.plan, stores[None].store))
        was_done = folder.is_whole
        try:
            with ProgressReporter("study", "runs") as reporter:
                show = from_found(reporter)
                state = run_study(folder, n_processes=processes, on_progress=show, should_stop=should_stop)
        finally:  # whatever ended it: a page of what is there can be made
            forget_another(out / "study", spec.name, text)
            place = write_study(folder, text, built, groups)
        if not (was_done and (place / AUDIT_NAME).exists()):
            write_audit(place, stores, state)
    if as_json:
        typer.echo(json.dumps({"study": spec.name, "runs": len(state.runs), "folder": str(place)}))
        return
    n_runs = Counter(run.stage for run in state.runs)
    typer.echo(f"{counted(n_runs['final'], 'final run')}, {counted(n_runs['tuning'], 'run')} of tuning")
    typer.echo(f"what was found: {place}")


def tested_images(plan: "StudyPlan", store: "LatentStore") -> list[str]:
    """IDs of the images that every arm is tested on."""
    splits = plan.arms.config(next(iter(plan.spec.arms)), {}, None).roles.test
    return [row.image_id for row in store.rows if row.split in splits and not row.removed]


def forget_another(place: Path, name: str, text: str) -> None:
    """Removes what was made of another spec than this one, so that no audit or page stands beside runs that it is not
    of; of another study it says so. Runs stay: they are nobody's."""
    from cli.study_page import PAGE_NAME, TABLES_NAME
    from dla_cache.spec import load_yaml
    from trainer.leak_audit import AUDIT_NAME
    from trainer.study_table import SPEC_NAME

    path = place / SPEC_NAME
    if not path.exists() or path.read_text(encoding="utf-8") == text:
        return
    there = load_yaml(path).get("name")
    if there != name:
        typer.echo(f"note: `{place}` held the tables of `{there}`; those of `{name}` take their place", err=True)
    for made in (AUDIT_NAME, PAGE_NAME, TABLES_NAME):
        (place / made).unlink(missing_ok=True)


def write_audit(place: Path, stores: "Mapping[str | None, OpenedStore]", state: "StudyState") -> None:
    """Looks whether what was tested had been learned from, and writes what was found."""
    from trainer.checkpoint import write_atomically
    from trainer.leak_audit import AUDIT_NAME, leak_audit
    from trainer.study_plan import latents_of

    own = stores[None]
    read = [latents_of(run, is_taught_by_targets=run.targets is not None) for run in state.runs]
    audit = leak_audit(
        own.store,
        [run.config.roles for run in state.runs],
        image_root=None if own.facts.images is None else Path(own.facts.images),
        more_stores={name: one.store for name, one in stores.items() if name is not None},
        modalities=None if None in read else {name for names in read for name in names or ()},
    )
    write_atomically(place / AUDIT_NAME, audit.model_dump_json(indent=1).encode())


def placed(store: str) -> str:
    """A store that the command line names, as seen from anywhere."""
    return store if is_remote(store) else str(Path(store).absolute())


def from_found(reporter: ProgressReporter) -> Callable[[int, int, str], None]:
    """Tells a reporter how many runs are done, those that were there at first apart: they say nothing of the rate."""
    found: list[int] = []

    def show(done: int, total: int, note: str) -> None:
        found.append(done) if not found else None
        reporter.update(done, total, note, found=found[0])

    return show

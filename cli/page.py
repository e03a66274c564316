"""The page: what runs measured, where it came from and what it cost, in one HTML file that loads nothing."""

import base64
import platform
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cli.cache import PICTURE_STRIDE
from cli.page_charts import NARROW, WIDE, DotChart, Layout, LineChart, dot_chart, line_chart
from cli.page_curves import loss_curves, validation_curve
from cli.page_rerun import Rerun, plan_rerun
from cli.page_rows import Row, describe_rows, lead_of
from cli.page_runs import FinishedRun, group_runs, read_runs
from cli.page_store import StoreFacts, describe_format
from cli.page_template import as_duration, page_template
from cli.page_values import Curve
from cli.render import as_size
from cli.sheet import draw_cache_sheet
from dla_cache import __version__
from dla_cache.durable import make_folder, write_durably, writing_to
from dla_cache.errors import ImageError, StoreError
from dla_cache.store import open_store

PNG_START = b"\x89PNG\r\n\x1a\n"
SHEET_IMAGES = 8
CURVE_HEIGHT = 380.0
LOSS_LAYOUT = Layout("any", 330, 12)
LOSS_HEIGHT = 220.0


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG as a data URI; size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class LossChart:
    """Every loss term of a row."""

    label: str
    n_seeds: int
    chart: LineChart


@dataclass(frozen=True, slots=True)
class Page:
    """All that a page shows."""

    title: str
    lead: str
    rows: tuple[Row, ...]
    dots: tuple[DotChart, ...]
    """The same chart for each screen, as are the curves."""
    curves: tuple[LineChart, ...]
    curve_values: tuple[Curve, ...]
    """In the order of `rows`."""
    losses: tuple[LossChart, ...]
    notes: tuple[str, ...]
    """What is missing, each a sentence."""
    stores: tuple[StoreFacts, ...]
    picture: Picture | None
    remarks: tuple[str, ...]
    commands: tuple[str, ...]
    rerun: Rerun

    @property
    def runs(self) -> list[FinishedRun]:
        """In the order of the rows."""
        return [run for row in self.rows for run in row.group.runs]

    @property
    def metric(self) -> str:
        """What all runs are measured by."""
        return self.rows[0].group.first.result.metric

    @property
    def single_seed(self) -> list[str]:
        """The rows that one seed stands behind."""
        return [row.group.label for row in self.rows if len(row.group.runs) == 1]

    @property
    def caveats(self) -> dict[str, str]:
        """Source → what a reader must know of it."""
        parts = [part for store in self.stores for part in store.modalities]
        return {part.recipe.source: part.note for part in parts if part.note is not None}

    @property
    def class_maps(self) -> dict[tuple[str, ...], list[str]]:
        """Class names → the rows that have them."""
        maps: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            maps.setdefault(row.group.first.facts.class_names, []).append(row.group.label)
        return maps

    def as_json(self) -> dict[str, Any]:
        """The table and what is missing, in plain values."""
        return {"rows": [row.as_json() for row in self.rows], "notes": list(self.notes)}


def write_page(
    path: Path,
    runs: Sequence[Path],
    *,
    store: Path | None = None,
    images: Path | None = None,
    picture: Path | None = None,
    title: str | None = None,
    remarks: Sequence[str] = (),
    commands: Sequence[str] = (),
) -> Page:
    """Writes what finished runs measured to one HTML file; the same runs give the same bytes.

    Args:
        runs: run folders, in the order of the table.
        store: the store they were trained on; None takes the one each run names, where it is still there.
        images: folder the images' paths start from; with it, or from a store that holds them, a contact sheet is drawn.
        picture: a PNG to show instead.
        remarks: sentences to stand above everything, such as that the runs were too short to mean anything.
        commands: what made all of it, such as `dla demo`; stands first among the commands.

    Raises:
        CheckpointError: if a folder is no finished run, or its records are damaged.
        StoreError: if the store is none or of other runs, or the page cannot be written.
        ImageError, SourceError: if the picture is none, or cannot be drawn.
    """
    finished, notes = read_runs(runs, store)
    stores = tuple({run.store.identity: run.store for run in finished if run.store is not None}.values())
    shown = None
    if picture is not None:
        shown = read_picture(picture)
    elif images is not None or any(open_store(one.place).has_images for one in stores[:1]):
        shown = draw_picture(stores, images)
    places = {"--store": store, "--images": images, "--picture": picture}
    rerun = plan_rerun([run.folder for run in finished], places)
    page = lay_out(finished, notes, stores, shown, title, tuple(remarks), tuple(commands), rerun)
    content = render(page).encode()
    with writing_to(path):
        make_folder(path.absolute().parent)
        write_durably(path, content)
    return page


def lay_out(
    runs: Sequence[FinishedRun],
    notes: Sequence[str],
    stores: tuple[StoreFacts, ...],
    picture: Picture | None,
    title: str | None,
    remarks: tuple[str, ...],
    commands: tuple[str, ...],
    rerun: Rerun,
) -> Page:
    """Everything of the page in its place."""
    groups = group_runs(runs)
    curves = [validation_curve(group) for group in groups]
    named = [(group.label, curve) for group, curve in zip(groups, curves, strict=True)]
    tests = [(group.label, group.test) for group in groups]
    charts = [line_chart(named, layout, height=CURVE_HEIGHT, in_percent=True) for layout in (WIDE, NARROW)]
    missing = [what for curve in curves for what in curve.missing]
    losses = []
    for group in groups:
        terms = loss_curves(group)
        missing += [what for curve in terms.values() for what in curve.missing]
        chart = line_chart([*terms.items()], LOSS_LAYOUT, height=LOSS_HEIGHT, in_percent=False)
        if chart is not None:
            losses.append(LossChart(group.label, len(group.runs), chart))
    return Page(
        title=title or f"What {len(runs)} run{'s' * (len(runs) > 1)} measured",
        lead=lead_of(groups),
        rows=describe_rows(groups),
        dots=tuple(dot_chart(tests, layout) for layout in (WIDE, NARROW)),
        curves=tuple(chart for chart in charts if chart is not None),
        curve_values=tuple(curves),
        losses=tuple(losses),
        notes=(*notes, *(f"{what}." for what in missing)),
        stores=stores,
        picture=picture,
        remarks=remarks,
        commands=commands,
        rerun=rerun,
    )


def draw_picture(stores: Sequence[StoreFacts], images: Path | None) -> Picture:
    """A contact sheet of the first store's images.

    Raises:
        StoreError: if no run has a store at hand.
        SourceError, ImageError: if it cannot be drawn.
    """
    if not stores:
        raise StoreError("a contact sheet needs the store of the runs", hint="name it with `--store`")
    store = open_store(stores[0].place)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        there = store.rows.kept_ids
        draw_cache_sheet(store, images, there[: SHEET_IMAGES * PICTURE_STRIDE : PICTURE_STRIDE], path)
        return read_picture(path)


def read_picture(path: Path) -> Picture:
    """The PNG at `path`.

    Raises:
        ImageError: if it cannot be read or is none.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"`{path}` cannot be read: {error.strerror}", hint="check the path") from error
    if not content.startswith(PNG_START) or len(content) < 24:
        raise ImageError(f"`{path}` is no PNG", hint="`dla cache inspect STORE --picture FILE.png` draws one")
    width, height = struct.unpack(">II", content[16:24])
    return Picture(f"data:image/png;base64,{base64.b64encode(content).decode()}", width, height)


def render(page: Page) -> str:
    """The page as HTML; every text of it is escaped."""
    filters: dict[str, Callable[..., str]] = {
        "percent": lambda fraction: f"{100 * fraction:.1f}",
        "count": lambda number: f"{number:,.0f}",
        "seconds": lambda seconds: f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}",
        "duration": as_duration,
        "size": as_size,
        "latent_format": describe_format,
    }
    versions = {"dla": __version__, "PyTorch": version("torch"), "Python": platform.python_version()}
    return page_template("page.html.j2", filters).render(page=page, versions=versions)

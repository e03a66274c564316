"""The pages of docs/ show what the commands print, and the start leads from photos to predictions."""

import difflib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.walk import (
    ELLIPSIS,
    PAGES,
    ROOT,
    START,
    File,
    Outcome,
    Step,
    find_lines,
    normalise,
    read_page,
    refresh,
    walk,
    write_photos,
)

Walked = tuple[Path, dict[Path, list[Outcome]]]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """The folder in which everything was done, and what each command of each page did."""
    folder = tmp_path_factory.mktemp("walk")
    write_photos(folder / "photos")
    return folder, walk(folder)


def describe(page: Path, outcome: Outcome) -> str:
    step = outcome.step
    shown, printed = (
        [normalise(line, is_measuring=step.is_measuring) for line in lines] for lines in (step.shown, outcome.printed)
    )
    difference = "\n".join(difflib.unified_diff(shown, printed, "the page", "the command", lineterm=""))
    return f"\n{page.relative_to(ROOT)}: `{step.command}` {outcome.fault}\n{difference}\n"


def test_the_pages_show_what_their_commands_print(walked: Walked) -> None:
    wrong = [describe(page, one) for page, outcomes in walked[1].items() for one in outcomes if one.fault]
    assert not wrong, f"run `make docs` and read its diff\n{''.join(wrong)}"


def test_the_start_leads_from_photos_to_predictions(walked: Walked) -> None:
    folder, outcomes = walked
    (predicted,) = [one for one in outcomes[START] if one.step.command == "dla predict runs/student photos/owl"]
    assert sum(line.startswith("photos/owl/") for line in predicted.printed) == 40
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "student" / "model.safetensors").exists()


def test_the_store_of_the_start_trains_without_the_photos(walked: Walked) -> None:
    assert "images: null" in (walked[0] / "runs" / "student" / "config.yaml").read_text()


def test_the_recorded_demo_is_the_one_that_readme_shows() -> None:
    shown = re.findall(r"<!-- demo-output -->\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (demo,) = [step for page in PAGES for step in steps_of(page) if step.command.startswith("dla demo")]
    assert [line for line in demo.shown if line not in (*shown[0].splitlines(), ELLIPSIS)] == []


def test_every_link_of_the_pages_leads_to_a_file() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "manifests" / "README.md"]
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert dead == []


def steps_of(page: Path) -> list[Step]:
    return [item for item in read_page(page.read_text(encoding="utf-8")) if isinstance(item, Step)]


PAGE = """Some words.

<!-- file: a.csv -->
```
path,class
```

<!-- run: cp a b -->
```console
$ dla cache ls \\
    --json
one
two
$ dla cache du s
```

<!-- recorded: it takes hours -->
```console
$ dla demo
…
```
"""


def test_a_page_is_read_in_its_order() -> None:
    assert list(read_page(PAGE)) == [
        File("a.csv", "path,class\n"),
        Step("cp a b", is_hidden=True),
        Step("dla cache ls --json", ("one", "two"), 11),
        Step("dla cache du s", (), 14),
        Step("dla demo", ("…",), 19, is_recorded=True),
    ]


LS, TRAIN = "dla cache ls", "dla train run.yaml"


@pytest.mark.parametrize(
    ("command", "shown", "printed"),
    [
        (LS, ["a", "b"], ["a", "b"]),
        (LS, ["a", "…", "d"], ["a", "b", "c", "d"]),
        (LS, ["a", "…", "d"], ["a", "d"]),
        (LS, ["…"], ["a", "b"]),
        (LS, ["a … c"], ["a b c"]),
        (LS, ["a [b] (c) *"], ["a [b] (c) *"]),
        (LS, ["7 images, 12.5 images/s, 3.0 s"], ["7 images, 9.1 images/s, 0.0 s"]),
        (LS, [f"hash {'0f' * 32}"], [f"hash {'1e' * 32}"]),
        (TRAIN, ["top-1  9.0 %  4 images"], ["top-1  100.0 %   12 images"]),
        (TRAIN, ["by 4.8e-07 at -1.5"], ["by 1e-6 at 0.25"]),
    ],
)
def test_what_is_shown_may_differ_in_what_the_machine_decides(
    command: str, shown: list[str], printed: list[str]
) -> None:
    assert find_lines(Step(command, tuple(shown)), printed) is not None


@pytest.mark.parametrize(
    ("command", "shown", "printed"),
    [
        (LS, ["a"], ["b"]),
        (LS, ["a"], ["a", "b"]),
        (LS, ["a", "b"], ["a"]),
        (LS, [], ["a"]),
        (LS, ["a", "…", "d"], ["a", "b"]),
        (LS, ["a … c"], ["a b"]),
        (LS, ["7 images"], ["8 images"]),
        (LS, ["a  b"], ["a   b"]),
        (LS, ["hash 0f0f"], ["hash 1e1e"]),
        (TRAIN, ["top-1  9.0 %"], ["top-1  9.0"]),
        (TRAIN, ["validation  9.0 %"], ["test  9.0 %"]),
    ],
)
def test_any_other_difference_is_seen(command: str, shown: list[str], printed: list[str]) -> None:
    assert find_lines(Step(command, tuple(shown)), printed) is None


@pytest.mark.parametrize(("shown", "exit_code"), [("done", 1), ("error: no", 0), ("error: no", 2)])
def test_a_command_ends_with_1_where_the_page_shows_an_error_and_else_with_0(shown: str, exit_code: int) -> None:
    outcome = Outcome(Step(LS, (shown,)), (shown,), exit_code, 0.0)
    assert outcome.fault is not None
    assert replace(outcome, exit_code=int(shown != "done")).fault is None


def page_of(*shown: str) -> str:
    return "\n".join(["# Words", "```console", *shown, "```", "More", ""])


def outcomes_of(text: str, *printed: list[str]) -> list[Outcome]:
    steps = [item for item in read_page(text) if isinstance(item, Step)]
    return [Outcome(step, tuple(lines), 0, 0.0) for step, lines in zip(steps, printed, strict=True)]


def test_a_page_that_is_true_stays_as_it_is() -> None:
    text = page_of(f"$ {LS}", "3.5 s", "…", "b")
    assert refresh(text, outcomes_of(text, ["9.9 s", "a", "b"])) == text


def test_a_page_with_one_fault_is_brought_up_to_date_and_leaves_out_what_it_left_out() -> None:
    text = page_of(f"$ {LS}", "old", f"$ {LS} x", "3.5 s", "…", "b … d", "e", f"$ {LS} y", "a", "…")
    printed = ["new", "more"], ["9.9 s", "a", "b c d", "e"], ["A", "B", "C"]
    shown = [f"$ {LS}", "new", "more", f"$ {LS} x", "9.9 s", "…", "b … d", "e", f"$ {LS} y", "A", "…"]
    assert refresh(text, outcomes_of(text, *printed)) == page_of(*shown)


def test_a_refreshed_page_has_no_fault() -> None:
    text = page_of(f"$ {LS}", f"$ {TRAIN}", "a", "…", "z")
    printed = ["a", "b"], ["b", "c", "d"]
    again = refresh(text, outcomes_of(text, *printed))
    assert [one.fault for one in outcomes_of(again, *printed)] == [None, None]

"""`dla doctor`: what dla finds on this machine, what is missing, and what to do about it."""

import json
import os
import platform
import re
import resource
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.render import print_table
from dla_cache import __version__
from dla_cache.errors import DlaError, MissingDependencyError

OUR_PACKAGES = ("dla_cache", "trainer", "cli")

LITTLE_DISK_BYTES = 2 * 10**9
FEW_FILES = 256


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution that dla uses."""

    name: str
    module: str
    minimum: str
    wanted_for: str = "all of dla"
    extra: str | None = None
    """The extra of dla that brings it, if it is not dla itself."""
    is_required: bool = True
    is_quick: bool = True
    """Whether it is imported here, which alone shows that it is whole."""


FOR_LORAS = "sources with a LoRA: `dla sources list`"
FOR_SOURCES = "the embedded sources: `dla demo`, `dla cache build`, `dla sources fit`"
FOR_ONNX = "`dla export --format onnx`"
FOR_TIMM = "students of timm"
FOR_S3 = "stores at `s3://...`"
FOR_STABLE_AUDIO = "the scheduler of the source `stable-audio`"
FOR_TARS = "reading tar stores with webdataset's own loader; dla does without"
OPTIONAL: dict[str, Any] = {"is_required": False, "is_quick": False}

PACKAGES = (
    Package("torch", "torch", "2.6"),
    Package("transformers", "transformers", "5.4", is_quick=False),
    Package("accelerate", "accelerate", "1.10", is_quick=False),
    Package("tensorboard", "tensorboard", "2.16"),
    Package("numpy", "numpy", "2.0"),
    Package("pillow", "PIL.Image", "11"),
    Package("simplejpeg", "simplejpeg", "1.7"),
    Package("pyarrow", "pyarrow", "17"),
    Package("zarr", "zarr", "3.1"),
    Package("fastcrc", "fastcrc", "0.4"),
    Package("safetensors", "safetensors", "0.4.5"),
    Package("scipy", "scipy", "1.13"),
    Package("pydantic", "pydantic", "2.9"),
    Package("pyyaml", "yaml", "6"),
    Package("jinja2", "jinja2", "3.1"),
    Package("rich", "rich", "13.7"),
    Package("typer", "typer", "0.15"),
    Package("diffusers", "diffusers", "0.42", FOR_SOURCES, "sources", **OPTIONAL),
    Package("peft", "peft", "0.20", FOR_LORAS, "sources", **OPTIONAL),
    Package("torchsde", "torchsde", "0.2.6", FOR_STABLE_AUDIO, "sources", **OPTIONAL),
    Package("onnx", "onnx", "1.16", FOR_ONNX, "onnx", **OPTIONAL),
    Package("onnxscript", "onnxscript", "0.5", FOR_ONNX, "onnx", **OPTIONAL),
    Package("onnxruntime", "onnxruntime", "1.20", FOR_ONNX, "onnx", **OPTIONAL),
    Package("timm", "timm", "1.0", FOR_TIMM, "timm", **OPTIONAL),
    Package("boto3", "boto3", "1.36", FOR_S3, "s3", **OPTIONAL),
    Package("webdataset", "webdataset", "0.2", FOR_TARS, **OPTIONAL),
)


@dataclass(frozen=True, slots=True)
class PackageState:
    """How a package is found."""

    name: str
    version: str | None
    minimum: str
    wanted_for: str
    is_required: bool
    fault: str | None
    """Why it cannot be used."""
    mend: str | None
    """The command that mends it."""


def doctor(
    store_path: Annotated[
        Path | None, typer.Option("--store", metavar="STORE", help="Look at this store, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show versions, devices and disk, what is missing, and how to mend it. Ends with 1 if dla cannot work here."""
    packages = [state_of(package) for package in PACKAGES]
    broken = [state for state in packages if state.is_required and state.fault is not None]
    has_torch = not any(state.name == "torch" for state in broken)
    report: dict[str, Any] = {
        "works": not broken,
        "dla": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [asdict(state) for state in packages],
        "ours": {name: folder_of(name) for name in OUR_PACKAGES},
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **(look_at_torch() if has_torch else {}),
        "free_bytes": {folder: shutil.disk_usage(folder).free for folder in (os.getcwd(), tempfile.gettempdir())},
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    if store_path is not None and not broken:
        report["store"] = look_at_store(store_path)
    report["notes"] = list(notes_of(report))
    if as_json:
        typer.echo(json.dumps(report))
    else:
        show(report, packages)
    if broken:
        faults = ", ".join(f"`{state.name}` is {state.fault}" for state in broken)
        mends = dict.fromkeys(state.mend for state in broken if state.mend is not None)
        raise MissingDependencyError(f"dla cannot work here: {faults}", hint=" && ".join(mends))


def state_of(package: Package) -> PackageState:
    """What is installed of a package, and what is wrong with it."""
    found, fault = None, None
    try:
        found = version(package.name) or "unknown"
        if package.is_quick:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(package.module)
        elif find_spec(package.module) is None:
            fault = "installed without its files"
    except PackageNotFoundError:
        fault = "not installed"
    except Exception as error:  # a border: whatever a half-installed package raises is what is looked for here
        reason = (str(error).splitlines() or [""])[0][:120]
        fault = f"broken: {type(error).__name__}: {reason}"
    if fault is None and found is not None and release(found) < release(package.minimum):
        fault = f"older than {package.minimum}"
    wanted = f"'{package.name}>={package.minimum}'"
    if fault is None:
        mend = None
    elif found is not None:
        mend = f"pip install --force-reinstall {wanted}"
    else:
        mend = f"pip install 'dla[{package.extra}]'" if package.extra else f"pip install {wanted}"
    return PackageState(package.name, found, package.minimum, package.wanted_for, package.is_required, fault, mend)


def release(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with; for one that begins with none, more than any."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else (2**31,)


def folder_of(name: str) -> str | None:
    """Where a package of ours is imported from."""
    spec = find_spec(name)
    return str(Path(spec.origin).parent) if spec is not None and spec.origin else None


def look_at_torch() -> dict[str, Any]:
    """Threads, and the devices that torch can compute on."""
    import torch

    with warnings.catch_warnings(record=True) as said:  # torch warns of an old driver, and goes on without
        warnings.simplefilter("always")
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(number) for number in range(n_devices)]
    return {
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "cuda": [{"name": device.name, "memory_bytes": device.total_memory} for device in devices],
        "cuda_warnings": [str(warning.message).splitlines()[0] for warning in said],
    }


def look_at_store(path: Path) -> dict[str, Any]:
    """What a store holds and lacks, or why it cannot be opened."""
    from dla_cache.describe import describe_store
    from dla_cache.store import open_store

    try:
        status = describe_store(open_store(path))
    except DlaError as error:
        return {"path": str(path), "fault": error.message, "hint": error.hint}
    return {
        "path": str(path),
        "images": status.images,
        "splits": status.images_per_split,
        "modalities": {state.modality: f"{state.shards}/{state.shards_planned} shards" for state in status.modalities},
        "content_hash": status.content_hash,
        "free_bytes": shutil.disk_usage(path).free,
    }


def notes_of(report: dict[str, Any]) -> Iterator[str]:
    """What is no fault of dla and yet worth a look."""
    for stranger in ("trainer", "cli"):
        try:
            found = version(stranger)
        except PackageNotFoundError:
            continue
        yield (
            f"distribution `{stranger}` {found} lies in the same folder as dla's own package of that name:"
            f" pip uninstall {stranger} && pip install --force-reinstall --no-deps dla"
        )
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if has_driver and "cuda" in report and not report["cuda"]:
        built = f"for CUDA {report['torch_cuda']}" if report["torch_cuda"] else "for the CPU alone"
        yield f"there is an NVIDIA driver, but torch cannot use it: this torch is built {built}"
    yield from report.get("cuda_warnings", ())
    for folder, free_bytes in report["free_bytes"].items():
        if free_bytes < LITTLE_DISK_BYTES:
            yield f"little disk is free in `{folder}`: {free_bytes / 1e9:.1f} GB"
    if 0 <= report["open_files"] < FEW_FILES:
        yield f"only {report['open_files']} files may be open at once: ulimit -n 1024"


def show(report: dict[str, Any], packages: list[PackageState]) -> None:
    """The report as text."""
    typer.echo(f"dla {report['dla']}, Python {report['python']}, {report['platform']}\n")
    print_table(
        ("package", "version", "needs", "state"),
        [(one.name, one.version or "", one.minimum, one.fault or "ok") for one in packages],
    )
    typer.echo()
    for wanted_for in dict.fromkeys(one.wanted_for for one in packages if one.fault is not None):
        missing = [one for one in packages if one.fault is not None and one.wanted_for == wanted_for]
        mends = " && ".join(dict.fromkeys(one.mend for one in missing if one.mend is not None))
        typer.echo(f"{'missing':<14}{', '.join(one.name for one in missing)}: needed for {wanted_for}")
        typer.echo(f"{'':<14}{mends}")
    folders = {str(Path(folder).parent) for folder in report["ours"].values() if folder}
    typer.echo(f"{'packages':<14}{', '.join(report['ours'])} are dla's own, in {', '.join(sorted(folders))}")
    threads = f", torch takes {report['torch_threads']} threads" if "torch_threads" in report else ""
    typer.echo(f"{'processor':<14}{report['cpu_cores']} cores usable{threads}")
    devices = [f"{one['name']}, {one['memory_bytes'] / 1e9:.1f} GB" for one in report.get("cuda", ())]
    for number, device in enumerate(devices):
        typer.echo(f"{f'cuda:{number}':<14}{device}")
    if not devices:
        typer.echo(f"{'cuda':<14}none")
    free = [f"{free_bytes / 1e9:.1f} GB in {folder}" for folder, free_bytes in report["free_bytes"].items()]
    typer.echo(f"{'free disk':<14}{', '.join(free)}")
    typer.echo(f"{'open files':<14}{report['open_files']} at once")
    if (store := report.get("store")) is not None:
        show_store(store)
    for note in report["notes"]:
        typer.echo(f"{'note':<14}{note}")
    if report["works"]:
        typer.echo("\ndla works here")


def show_store(store: dict[str, Any]) -> None:
    """What was found of a store."""
    if "fault" in store:
        typer.echo(f"{'store':<14}cannot be used: {store['fault']}; {store['hint']}")
        return
    modalities = ", ".join(f"{name} {shards}" for name, shards in store["modalities"].items())
    whole = "whole" if store["content_hash"] else "not whole: run `dla cache build` again"
    typer.echo(f"{'store':<14}{store['path']}: {store['images']} images; {modalities}; {whole}")
    typer.echo(f"{'':<14}{store['free_bytes'] / 1e9:.1f} GB free on its disk; `dla cache verify` reads all of it")

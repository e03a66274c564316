"""An interpreter for each library that the store bench compares, made with pip; versions are pinned here."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
TORCH_AND_VISION = ("torch===2.13.0", "torchvision==0.28.0")
"""Two libraries import torchvision, whose wheels on PyPI work with the build of torch on PyPI and no other: `===`
refuses a CPU build from elsewhere, which `==` would take."""

ENVIRONMENTS = {
    "mosaicml": ("mosaicml-streaming==0.13.0", *TORCH_AND_VISION),
    "litdata": ("litdata==0.2.76", *TORCH_AND_VISION),
    "webdataset": ("webdataset==1.0.2", TORCH),
    "datasets": ("datasets==5.2.0", TORCH),
    "safetensors": ("safetensors==0.8.0", TORCH),
    "zarr": ("zarr==3.1.6", TORCH),
    "tensorstore": ("tensorstore==0.1.86", TORCH),
}
COMMON = ("simplejpeg==1.9.0", "pillow>=11", "numpy>=2.0")
"""The decoders, the same for all; some libraries hold numpy back."""


def make_environment(name: str, folder: Path, pip_arguments: Sequence[str]) -> Path:
    """The interpreter of a library, made unless the one in `folder` has these very versions.

    Raises:
        subprocess.CalledProcessError: if venv or pip fails; pip has said why.
    """
    python = folder / "bin" / "python"
    wanted = "\n".join((*ENVIRONMENTS[name], *COMMON))
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making an environment for {name}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_arguments]
        subprocess.run([*pip, *ENVIRONMENTS[name], *COMMON], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return python

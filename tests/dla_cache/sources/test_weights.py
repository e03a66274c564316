"""`find_weights`: which checkpoints are taken, which are refused, and the one hash that names them."""

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from dla_cache.errors import SourceError
from dla_cache.sources import open_source
from dla_cache.weights import find_weights
from tests.dla_cache.sources.conftest import spec_of

ADAPTERS = ("dinov2", "vae-sd", "denoiser-features", "marigold-depth")
"""A source of each kind that loads a single model or a pipeline."""

COMMIT = "0123456789" * 4


def write(folder: Path, **files: Any) -> Path:
    """A folder with these files; `__` in a name stands for a slash, `_json` at its end for the suffix."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_safetensors", ".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def pipeline(folder: Path, **files: Any) -> Path:
    index = {"_class_name": "Some", "unet": ["diffusers", "UNet"], "vae": ["diffusers", "VAE"]}
    return write(folder, model_index_json=index, unet__config_json={}, vae__config_json={}, **files)


@pytest.fixture
def copied(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a row's tiny checkpoint, to be spoilt."""
    return lambda row: Path(shutil.copytree(checkpoint(row), tmp_path / row))


@pytest.mark.parametrize("row", ADAPTERS)
def test_a_source_of_pickles_alone_is_refused(row: str, copied: Callable[[str], Path]) -> None:
    folder = copied(row)
    for weights in folder.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(SourceError, match=r"no safetensors, only `.*\.bin`, which can run code") as caught:
        open_source(spec_of(row, folder), "cpu")
    assert "convert" in str(caught.value.hint)


def test_one_component_of_pickles_is_refused_beside_others_of_safetensors(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, unet__model_safetensors="weights")
    (folder / "vae" / "model.bin").write_text("a pickle")
    with pytest.raises(SourceError, match=r"`vae/model.bin`, which can run code"):
        find_weights(str(folder))
    assert find_weights(str(folder), without=["vae"]).sha256


@pytest.mark.parametrize("row", ADAPTERS)
def test_a_source_that_brings_its_own_code_is_refused(row: str, copied: Callable[[str], Path]) -> None:
    folder = copied(row)
    place = next(path for path in sorted(folder.rglob("config.json")))
    place.write_text(json.dumps(json.loads(place.read_text()) | {"auto_map": {"AutoModel": "own.Model"}}))
    with pytest.raises(SourceError, match=r"wants to run code of its own, which `config.json` names"):
        open_source(spec_of(row, folder), "cpu")


@pytest.mark.parametrize(
    "files",
    [
        {"processor_config_json": {"auto_map": {"AutoProcessor": "own.Processor"}}},
        {"config_json": {"attn_implementation": "someone/kernel"}},
        {"config_json": {"vision_config": {"_attn_implementation": "flash_hub"}}},
        {
            "model_index_json": {"unet": ["own", "UNet"]},
            "own.py": "",
            "unet__config_json": {},
            "unet__model_safetensors": "",
        },
    ],
)
def test_code_is_refused_wherever_it_is_named(files: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, model_safetensors="weights", **files)
    with pytest.raises(SourceError, match="code of its own"):
        find_weights(str(folder))


@pytest.mark.parametrize("row", ADAPTERS)
def test_a_variant_that_is_not_there_is_an_error_and_nothing_takes_its_place(
    row: str, checkpoint: Callable[[str], Path]
) -> None:
    spec = spec_of(row, checkpoint(row))
    with pytest.raises(SourceError, match="has no `fp16` safetensors"):
        open_source(spec.model_copy(update={"parameters": spec.parameters | {"variant": "fp16"}}), "cpu")


def test_a_component_without_the_variant_comes_as_it_is_beside_one_that_has_it(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, unet__model_safetensors="plain", vae__model_safetensors="plain")
    plain = find_weights(str(folder)).sha256
    (folder / "unet" / "model.fp16.safetensors").write_text("half")
    assert find_weights(str(folder)).sha256 == plain
    assert find_weights(str(folder), variant="fp16").sha256 != plain


def test_a_name_of_the_hub_that_is_not_here_is_an_error_within_a_second_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_arguments: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    begun = time.perf_counter()
    with pytest.raises(SourceError, match="`someone/something` are not on this machine") as caught:
        find_weights("someone/something")
    assert time.perf_counter() - begun < 1
    assert "dla sources fetch" in str(caught.value.hint)


def test_a_repository_of_the_hub_and_a_plain_folder_have_one_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = tmp_path / "hub" / "models--we--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(COMMIT)
    files: dict[str, Any] = {"config_json": {"width": 8}, "model_safetensors": "weights"}
    write(kept / "snapshots" / COMMIT, **files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    of_hub = find_weights("we/tiny")
    plain = find_weights(str(write(tmp_path / "elsewhere", **files)))
    assert of_hub.sha256 == plain.sha256
    assert (of_hub.repo, of_hub.commit, plain.repo, plain.commit) == ("we/tiny", COMMIT, "", "")
    assert find_weights("we/tiny", COMMIT) == of_hub


def test_the_hash_is_of_what_is_loaded_and_of_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path, config_json={"width": 8}, model_safetensors="weights")
    before = find_weights(str(folder)).sha256
    for name in ("README.md", "model.bin", "model.fp16.safetensors"):
        (folder / name).write_text("something")
    assert find_weights(str(folder)).sha256 == before
    write(folder, config_json={"width": 16})
    assert find_weights(str(folder)).sha256 != before


def test_a_configuration_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, config_json="{", model_safetensors="weights")
    with pytest.raises(SourceError, match=r"`config.json` .* cannot be read"):
        find_weights(str(folder))


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_the_hash_is_of_the_files_that_an_index_names_whatever_they_are_called(variant: str, tmp_path: Path) -> None:
    index = f"model_safetensors.index.{variant}_json" if variant else "model_safetensors.index_json"
    parts = {index: {"weight_map": {"weight": "model.own_name.safetensors"}}, "model.own_name_safetensors": "weights"}
    folder = write(tmp_path, config_json={}, **{f"model.{variant or 'x'}_safetensors": "other"}, **parts)
    write(folder, **({} if variant else {"model_safetensors": "unused"}))
    before = find_weights(str(folder), variant=variant).sha256
    write(folder, **{"model.own_name_safetensors": "changed"})
    assert find_weights(str(folder), variant=variant).sha256 != before


@pytest.mark.parametrize("place", ["../model.safetensors", "sub/model.safetensors", "/model.safetensors"])
def test_weights_that_an_index_looks_for_elsewhere_are_refused(place: str, tmp_path: Path) -> None:
    index = {"weight_map": {"weight": place}}
    folder = write(tmp_path, config_json={}, model_safetensors="x", **{"model_safetensors.index_json": index})
    with pytest.raises(SourceError, match="do not lie beside it"):
        find_weights(str(folder))


@pytest.mark.parametrize("row", ["sd-img2img", "musicgen"])
def test_a_tokenizer_without_its_words_is_refused_since_every_text_would_be_the_same(
    row: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(row)
    next(folder.rglob("tokenizer.json")).unlink()
    with pytest.raises(SourceError, match=r"tokenizer without its words: there is no `(tokenizer/)?tokenizer.json`"):
        find_weights(str(folder))


def test_a_configuration_that_is_too_deep_to_read_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, config_json='{"a":' * 100_000 + "1" + "}" * 100_000, model_safetensors="weights")
    with pytest.raises(SourceError, match="cannot be read"):
        find_weights(str(folder))

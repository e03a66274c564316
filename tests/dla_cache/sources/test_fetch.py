"""`Hub`: weights from a hub of this machine, served over HTTP with the headers of the real one."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from werkzeug.serving import make_server

from dla_cache.errors import SourceError
from dla_cache.sources import SOURCES
from dla_cache.sources.catalog.entry import CAPTIONER, PipelineRow, SourceEntry
from dla_cache.sources.fetch import Hub, Wanted, loaded_files, needed_by
from tests.fake_hub import COMMITS, PIPELINE, TOKEN, serve_hub

SILENT = {"prompt": ""}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def hub():
    with serve_hub() as served:
        yield served


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_what_loading_reads_is_fetched_and_nothing_else(hub, tmp_path):
    here = Hub(endpoint=hub.url, cache=tmp_path)
    listing = here.list_files(Wanted("we/pipeline", without=("safety_checker",)))
    assert (listing.commit, listing.licence, listing.is_gated) == (COMMITS["main"], "openrail++", False)
    assert not any(tmp_path.iterdir())
    folder = here.fetch(listing)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert listing.size_bytes == sum(len(PIPELINE[name]) for name in names)
    assert folder == here.place_of(listing)


def test_what_is_here_is_not_fetched_again(hub, tmp_path):
    here = Hub(endpoint=hub.url, cache=tmp_path)
    listing = here.list_files(Wanted("we/pipeline"))
    assert here.present_bytes(listing) == 0
    here.fetch(listing)
    assert here.present_bytes(listing) == listing.size_bytes
    hub.asked.clear()
    here.fetch(listing)
    assert [ask for ask in hub.asked if ask[2] == "GET"] == []
    plain = Hub(endpoint=hub.url, out=tmp_path / "plain")
    plain.fetch(listing)
    hub.asked.clear()
    plain.fetch(listing)
    assert hub.asked == []


def test_a_variant_comes_in_place_of_the_plain_weights_and_is_missed_if_there_is_none(hub, tmp_path):
    here = Hub(endpoint=hub.url, cache=tmp_path)
    names = [file.name for file in here.list_files(Wanted("we/pipeline", variant="fp16")).files]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in names
    assert "unet/diffusion_pytorch_model.safetensors" not in names
    with pytest.raises(SourceError, match="has no `bf16` safetensors"):
        here.list_files(Wanted("we/pipeline", variant="bf16"))


def test_into_a_folder_come_plain_files(hub, tmp_path):
    here = Hub(endpoint=hub.url, out=tmp_path / "weights")
    folder = here.fetch(here.list_files(Wanted("we/pipeline")))
    assert folder == tmp_path / "weights" / "we" / "pipeline"
    assert (folder / "unet" / "config.json").read_bytes() == b"{}"
    assert not (folder / "unet" / "config.json").is_symlink()


def test_a_gated_repository_says_how_to_get_it_before_large_files_are_asked_for(hub, tmp_path):
    here = Hub(endpoint=hub.url, cache=tmp_path)
    listing = here.list_files(Wanted("we/gated"))
    assert listing.is_gated
    hub.asked.clear()
    with pytest.raises(SourceError, match="`we/gated` is gated") as caught:
        here.fetch(listing)
    assert "accept its licence at" in caught.value.hint
    assert "HF_TOKEN" in caught.value.hint
    assert {path for _, path, _ in hub.asked} == {"unet/config.json"}


def test_a_gated_repository_comes_with_a_token(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    here = Hub(endpoint=hub.url, cache=tmp_path)
    assert (here.fetch(here.list_files(Wanted("we/gated"))) / "model_index.json").is_file()


def test_pickles_are_refused(hub, tmp_path):
    with pytest.raises(SourceError, match=r"as pickles alone.*`pytorch_model.bin`"):
        Hub(endpoint=hub.url, cache=tmp_path).list_files(Wanted("we/pickles"))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("we/nothing"), "shows no repository `we/nothing`"),
        (Wanted("we/pipeline", revision="v9"), "has no revision `v9`"),
        (Wanted("we//pipeline"), "no repository can be called"),
        (Wanted("we/pipeline", only="lora.safetensors"), "has no file `lora.safetensors`"),
    ],
)
def test_what_the_hub_does_not_have_is_one_error(hub, tmp_path, wanted, message):
    with pytest.raises(SourceError, match=message) as caught:
        Hub(endpoint=hub.url, cache=tmp_path).list_files(wanted)
    assert caught.value.hint


def test_a_file_that_was_changed_on_its_way_is_refused_and_not_kept(hub, tmp_path):
    here = Hub(endpoint=hub.url, cache=tmp_path)
    listing = here.list_files(Wanted("we/lying"))
    with pytest.raises(SourceError, match=r"`model.safetensors` of `we/lying` came as another file"):
        here.fetch(listing)
    assert here.present_bytes(listing) == len(b"{}")


def test_without_a_network_the_error_comes_within_seconds(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(SourceError, match="cannot be reached") as caught:
        Hub(endpoint=f"http://127.0.0.1:{port}", cache=tmp_path).list_files(Wanted("we/pipeline"))
    assert "--out FOLDER" in caught.value.hint
    assert time.monotonic() - started < 5


def test_where_the_network_is_switched_off_the_error_says_by_what(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="`HF_HUB_OFFLINE` is set"):
        Hub(cache=tmp_path).list_files(Wanted("we/pipeline"))


def test_a_place_that_cannot_be_written_is_no_fault_of_the_network(hub, tmp_path):
    (tmp_path / "file").touch()
    here = Hub(endpoint=hub.url, out=tmp_path / "file")
    with pytest.raises(SourceError, match=r"file/we.* cannot be written"):
        here.fetch(here.list_files(Wanted("we/pipeline")))


def test_a_file_that_would_leave_its_folder_is_refused(hub, tmp_path):
    with pytest.raises(SourceError, match=r"outside of its folder: `../../model.safetensors`"):
        Hub(endpoint=hub.url, cache=tmp_path).list_files(Wanted("we/climbing"))


def test_a_full_disk_is_told_before_the_first_byte(hub, tmp_path, monkeypatch):
    here = Hub(endpoint=hub.url, cache=tmp_path)
    listing = here.list_files(Wanted("we/pipeline"))
    monkeypatch.setattr(here, "free_bytes", lambda: 10)
    with pytest.raises(SourceError, match="GB are free"):
        here.fetch(listing)
    assert not any(tmp_path.iterdir())


def test_what_was_fetched_is_found_offline_by_its_name(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    fetch = """
from dla_cache.sources.fetch import Hub, Wanted
here = Hub()
here.fetch(here.list_files(Wanted("we/pipeline")))
# Other libraries leave a list of all files behind, by which the cache calls what it has incomplete.
from huggingface_hub import snapshot_download
snapshot_download("we/pipeline", allow_patterns="unet/*.json")
"""
    find = """
import json
from dla_cache.weights import find_weights
found = find_weights("we/pipeline")
print(json.dumps([found.repo, found.commit, found.sha256]))
"""
    subprocess.run([sys.executable, "-c", fetch], env=environment, check=True, cwd=tmp_path)
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", find], env=offline, check=True, cwd=tmp_path, capture_output=True)
    repo, commit, sha256 = json.loads(ended.stdout)
    assert (repo, commit, len(sha256)) == ("we/pipeline", COMMITS["main"], 64)


def test_of_a_model_that_is_no_pipeline_only_its_own_folder_is_read():
    names = ["config.json", "model.safetensors", "tokenizer.model", "onnx/model.safetensors", "logo.png", "code.py"]
    assert sorted(loaded_files(Wanted("we/model"), names)) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_of_a_unet_that_another_one_replaces_the_configuration_alone_is_fetched():
    base, unet = needed_by(SOURCES["sdxl-lightning"])[:2]
    assert unet.only.endswith(".safetensors")
    assert base.replaced == ("unet",)
    weights = "diffusion_pytorch_model.fp16"
    names = ["model_index.json", "unet/config.json", f"unet/{weights}.safetensors", f"unet/{weights}.bin"]
    names += [f"unet/{weights}.safetensors.index.json", "vae/config.json", "vae/model.safetensors"]
    assert sorted(loaded_files(base, names)) == [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "vae/model.safetensors",
    ]


def test_of_a_source_everything_it_is_made_of_is_needed():
    row = PipelineRow(
        "P", "images", (), "", 8, load={"safety_checker": None}, components={"lora": "they/lora#one.safetensors"}
    )
    entry = SourceEntry(SOURCES["embedded-depth"].modality, "m:C", "", model="we/pipeline", row=row)
    assert needed_by(entry, variant="fp16") == [
        Wanted("we/pipeline", variant="fp16", without=("safety_checker",)),
        Wanted("they/lora", only="one.safetensors"),
    ]
    captioned = replace(entry, row=replace(row, text_argument="prompt"))
    assert needed_by(captioned)[-1] == Wanted(CAPTIONER)
    assert Wanted(CAPTIONER) not in needed_by(replace(entry, row=replace(row, text_argument="prompt", settings=SILENT)))
    assert needed_by(entry, model="my/own", revision="v1")[0] == Wanted("my/own", "v1", without=("safety_checker",))
    assert needed_by(SOURCES["embedded-depth"]) == []


def test_another_revision_into_the_same_folder_is_never_mixed_with_the_one_that_is_there(hub, tmp_path):
    here = Hub(endpoint=hub.url, out=tmp_path)
    old, new = here.list_files(Wanted("we/model", "old")), here.list_files(Wanted("we/model"))
    folder = here.fetch(old)
    assert here.present_bytes(new) == 0
    with pytest.raises(SourceError, match=r"holds what `we/model` at `a+` has not: `extra.json`"):
        here.fetch(new)
    (folder / "extra.json").unlink()
    assert here.fetch(new) == folder
    assert (folder / "model.safetensors").read_bytes() == b"new"
    assert (folder / "config.json").read_bytes() == b'{"a": 2}'


def test_a_file_that_was_changed_where_it_lies_is_fetched_again(hub, tmp_path):
    here = Hub(endpoint=hub.url, out=tmp_path)
    listing = here.list_files(Wanted("we/model"))
    folder = here.fetch(listing)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[::-1])
    here.fetch(listing)
    assert (folder / "model.safetensors").read_bytes() == b"new"
    assert (folder / "config.json").read_bytes() == b'{"a": 2}'


@pytest.mark.parametrize(
    "answer",
    [
        "<html>sign in</html>",
        "null",
        "{}",
        '{"id": "a/b", "sha": "../../x", "siblings": []}',
        '{"id": "a/b", "sha": null, "siblings": [{"rfilename": 3, "size": 1}]}',
        '{"id": "a/b", "siblings": [{"rfilename": "config.json", "size": "large"}]}',
        '{"id": "a/b", "siblings": [{"rfilename": "config.json", "size": -1}]}',
    ],
)
def test_what_is_no_answer_of_a_hub_is_one_error(answer, tmp_path):
    server = make_server("127.0.0.1", 0, lambda _environ, start: (start("200 OK", []) and None) or [answer.encode()])
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(SourceError, match="answers as no hub does"):
            Hub(endpoint=f"http://127.0.0.1:{server.server_port}", cache=tmp_path).list_files(Wanted("a/b"))
    finally:
        server.shutdown()

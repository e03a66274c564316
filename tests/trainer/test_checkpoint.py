"""Checkpoints: what is damaged or of another run is refused, and what to do then is said."""

import errno
import shutil
import warnings

import pytest
import torch
from torch import nn

from dla_cache.errors import CheckpointError, StoreError, WorkInterrupted
from tests.trainer.toy import (
    CONFIG,
    ToyTask,
    assert_same_run,
    make_loop,
    run_loop,
    steps_told,
)
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.loop import Loop


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run_loop(make_loop(folder))
    return folder


@pytest.fixture
def stopped(tmp_path):
    """A run stopped at step 8."""
    loop = make_loop(tmp_path / "stopped")
    with pytest.raises(WorkInterrupted):
        run_loop(loop, should_stop=lambda: loop.step == 8)
    return tmp_path / "stopped"


def test_a_run_of_another_config_is_not_resumed(stopped):
    loop = make_loop(stopped, CONFIG.model_copy(update={"learning_rate": 0.1, "steps": 40}))
    with pytest.raises(CheckpointError, match="another `steps`, `learning_rate`") as refused:
        loop.resume()
    assert refused.value.hint
    assert loop.step == 0


@pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(stopped, kept_share):
    path = stopped / "last.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept_share)])
    with pytest.raises(CheckpointError, match=r"last\.safetensors") as refused:
        make_loop(stopped).resume()
    assert f"mv {stopped / 'previous.safetensors'} {path}" in refused.value.hint
    (stopped / "previous.safetensors").unlink()
    with pytest.raises(CheckpointError) as refused:
        make_loop(stopped).resume()
    assert f"remove `{stopped}`" in refused.value.hint


def test_a_checkpoint_with_a_flipped_bit_is_refused_wherever_it_is(stopped):
    path = stopped / "last.safetensors"
    content = path.read_bytes()
    for place in [*range(16), *range(16, len(content), len(content) // 100), len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"last\.safetensors") as refused:
            make_loop(stopped).resume()
        assert f"mv {stopped / 'previous.safetensors'} {path}" in refused.value.hint
    path.write_bytes(content)
    make_loop(stopped).resume()


def test_a_checkpoint_without_a_checksum_is_refused(stopped):
    path = stopped / "last.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha999"', 1))
    with pytest.raises(CheckpointError, match="it has no checksum"):
        make_loop(stopped).resume()


def test_kept_weights_in_place_of_a_checkpoint_are_refused(stopped):
    shutil.copy(stopped / "best.safetensors", stopped / "last.safetensors")
    with pytest.raises(CheckpointError, match=r"last\.safetensors` holds weights alone") as refused:
        make_loop(stopped).resume()
    assert f"remove `{stopped}`" in refused.value.hint


def test_a_checkpoint_of_another_model_is_refused(stopped):
    loop = make_loop(stopped)
    loop.task.module[3] = nn.Linear(8, 2)
    with pytest.raises(CheckpointError, match=r"is of another model: `3\.weight`, `3\.bias`"):
        loop.resume()


def test_averaged_weights_come_back_on_the_device_of_the_model(stopped):
    """The `meta` device stands for a GPU: it is another one than that of the checkpoint."""
    task = ToyTask()
    task.module.to("meta")
    loop = Loop(task, CONFIG, stopped, seed=3)
    with warnings.catch_warnings(action="ignore"):  # `meta` holds no values to copy into
        loop.resume()
    assert {value.device.type for value in loop.averaged.values()} == {"meta"}


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        make_loop(tmp_path).resume()
    (tmp_path / "last.safetensors").write_bytes(b"rubbish" * 100)
    with pytest.raises(CheckpointError, match="is no checkpoint of dla"):
        make_loop(tmp_path).resume()


def test_a_half_written_checkpoint_does_not_hide_the_whole_one(stopped, unbroken):
    (stopped / ".last.safetensors.tmp").write_bytes(b"half")
    loop = make_loop(stopped)
    loop.resume()
    run_loop(loop)
    assert_same_run(stopped, unbroken)


def test_a_resumed_log_tells_every_step_once_even_if_its_last_line_was_cut(stopped):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "losses": {}}\n{"step": 18, "los')
    loop = make_loop(stopped)
    loop.resume()
    run_loop(loop)
    assert steps_told(stopped) == [6, 12, 18, 20]
    assert [set(record["losses"]) for record in loop.metrics] == [{"fit", "total"}] * 4


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"step": 6}\n\xff\xfe\n', 2),
        (b'{"step": 6}\nrubbish\n{"step": 12}\n', 2),
        (b'{"losses": {}}\n', 1),
        (b'{"step": "6"}\n', 1),
        (b"[6]\n", 1),
        (b'{"step": 6}\n\n{"step": 12}\n', 2),
    ],
    ids=["no UTF-8", "no JSON", "no step", "no number", "no object", "empty"],
)
def test_a_damaged_line_of_the_log_is_named_and_its_file_can_be_removed(stopped, content, line):
    log = stopped / "metrics.jsonl"
    log.write_bytes(content)
    loop = make_loop(stopped)
    loop.resume()
    with pytest.raises(CheckpointError, match=rf"line {line} of `{log}` is damaged") as refused:
        run_loop(loop)
    assert "remove the file" in refused.value.hint
    log.unlink()
    run_loop(loop)
    assert steps_told(stopped) == [12, 18, 20]


def test_a_full_disk_gets_back_what_the_attempt_took(stopped, monkeypatch):
    before = {path: path.read_bytes() for path in stopped.iterdir()}

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StoreError, match="no space left"):
        make_loop(stopped).save("last")
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        run_loop(make_loop(tmp_path / "file" / "run"))


def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_never_run(stopped):
    (stopped / "last.safetensors").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(stopped / "ran").encode())
    with pytest.raises(CheckpointError, match="is no checkpoint of dla"):
        make_loop(stopped).resume()
    assert not (stopped / "ran").exists()


def test_the_checkpoint_before_the_last_is_kept_and_leads_to_the_same_run(stopped, unbroken):
    """Steps 6 and 8 were saved; the last is damaged and replaced as its error says."""
    (stopped / "previous.safetensors").replace(stopped / "last.safetensors")
    loop = make_loop(stopped)
    loop.resume()
    assert run_loop(loop).resumed_from == 6
    assert_same_run(stopped, unbroken)
    assert steps_told(stopped) == [6, 12, 18, 20]


def test_the_checkpoint_before_the_last_is_kept_where_there_are_no_hard_links(stopped, monkeypatch):
    before = (stopped / "last.safetensors").read_bytes()

    def refuse(source, target):
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("os.link", refuse)
    make_loop(stopped).save("last")
    assert (stopped / "previous.safetensors").read_bytes() == before
    assert not list(stopped.glob(".*"))


def test_a_run_is_gone_on_with_in_as_many_parts_as_it_was_begun_with(stopped):
    loop = make_loop(stopped, CONFIG.model_copy(update={"accumulation": 2}))
    with pytest.raises(CheckpointError, match=r"in 1 parts, and processes times `loop\.accumulation` are 2 now"):
        loop.resume()


def test_where_it_is_tracked_and_how_often_it_is_saved_is_no_part_of_a_run(stopped, unbroken):
    changes = {"trackers": (), "checkpoint_steps": 5, "process_timeout_s": 1.0}
    loop = make_loop(stopped, CONFIG.model_copy(update=changes))
    loop.resume()
    run_loop(loop)
    assert_same_run(stopped, unbroken)


def test_a_checkpoint_of_another_seed_is_refused(stopped, tmp_path):
    run_loop(Loop(ToyTask(), CONFIG, tmp_path / "other", seed=4))
    shutil.copy(tmp_path / "other" / "last.safetensors", stopped / "last.safetensors")
    with pytest.raises(CheckpointError, match="of a run of seed 4, and this one has 3") as refused:
        make_loop(stopped).resume()
    assert "previous.safetensors" in refused.value.hint


def test_where_the_last_checkpoint_is_gone_the_one_before_it_is_named(stopped):
    (stopped / "last.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint at") as refused:
        make_loop(stopped).resume()
    assert f"mv {stopped / 'previous.safetensors'}" in refused.value.hint


def test_equal_content_gives_equal_bytes_whatever_order_the_library_writes_its_header_in(tmp_path):
    written = set()
    for number in range(12):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, {"b": torch.ones(3), "a": torch.zeros(2)}, {"class": "Größe"})
        written.add(path.read_bytes())
        assert load_checkpoint(path)[1] == {"class": "Größe"}
    assert len(written) == 1

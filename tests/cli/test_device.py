"""A device that cannot be computed on is refused before anything is begun."""

import pytest
import torch

from cli.device import require_device
from dla_cache.errors import SpecError


def test_the_processor_passes():
    require_device("cpu")


@pytest.mark.parametrize("name", ["", "nonsense", "meta", "cuda:-1", "cuda:99999", "CPU"])
def test_what_cannot_be_computed_on_is_refused_by_name(name):
    with pytest.raises(SpecError, match=f"device `{name}` cannot be used here") as refused:
        require_device(name)
    assert "`cpu`" in refused.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(SpecError, match="`cuda`") as refused:
        require_device("cuda")
    assert "torch finds no CUDA here" in refused.value.hint

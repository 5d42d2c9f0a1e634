"""What a worker's process is made ready with, and what is left of it afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pipeline import preflight
from pipeline.config import ConfigError
from pipeline.distributed import process_group


def test_numbers_that_fade_out_are_0_while_a_worker_runs(make_config) -> None:
    tiny = torch.tensor(1e-30)
    with process_group(make_config()):
        assert dist.is_initialized()
        assert float(tiny * 1e-10) == 0.0
    assert not dist.is_initialized()
    assert 0 < float(tiny * 1e-10) < 1e-38


def test_a_gpu_without_bfloat16_is_named_with_the_remedy(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver elsewhere had no GPU to ask."""
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "is_bf16_supported": False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    config = make_config("scaling.gpus_per_worker=1", "model.dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"no bfloat16; set model\.dtype=float32$"), process_group(config):
        pass


def test_workers_that_share_a_gpu_cannot_train_together(make_config) -> None:
    preflight.check(make_config("scaling.gpus_per_worker=0.5"))  # as trials of a sweep do
    with pytest.raises(ConfigError, match=r"^scaling\.gpus_per_worker: .* set it to 1$"):
        preflight.check(make_config("scaling.gpus_per_worker=0.5", "scaling.workers=2"))

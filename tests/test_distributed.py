"""What a worker's process is made ready with, and what is left of it afterwards."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipeline.distributed import process_group


def test_numbers_that_fade_out_are_0_while_a_worker_runs(make_config) -> None:
    tiny = torch.tensor(1e-30)
    with process_group(make_config()):
        assert dist.is_initialized()
        assert float(tiny * 1e-10) == 0.0
    assert not dist.is_initialized()
    assert 0 < float(tiny * 1e-10) < 1e-38

"""fastpo.ops.chips: a GPU that Triton does not know, the choice of the forward; and the size of blocks on a GPU."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from fastpo.models import attention
from fastpo.ops import backends, chips, inputs
from fastpo.training import metrics


@pytest.fixture
def unknown_gpu(monkeypatch):
    """CUDA device 0 is a chip that Triton cannot compile for."""

    def fail(index: int) -> None:
        raise RuntimeError("PassManager::run failed\nand more")

    monkeypatch.setattr(chips, "_compile_probe", fail)
    monkeypatch.setattr(inputs, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA X900")
    chips._triton_compiles.cache_clear()
    yield SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    chips._triton_compiles.cache_clear()


def test_unknown_gpu_falls_back_with_one_warning(unknown_gpu):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [inputs.choose_backend("auto", unknown_gpu) for _ in range(3)] == ["torch"] * 3
    (warning,) = caught
    assert "NVIDIA X900" in str(warning.message) and "PassManager::run failed" in str(warning.message)
    assert "\n" not in str(warning.message)


def test_known_gpu_takes_triton(unknown_gpu, monkeypatch):
    monkeypatch.setattr(chips, "_compile_probe", lambda index: None)
    assert inputs.choose_backend("auto", unknown_gpu) == "triton"


@pytest.mark.parametrize("known", [True, False])
def test_losses_and_attention_fall_back_as_the_head_does(known, unknown_gpu, monkeypatch):
    if known:
        monkeypatch.setattr(chips, "_compile_probe", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    pytest.importorskip("triton")
    term, batch = SimpleNamespace(name="dpo", hyper={"beta": 0.1}), SimpleNamespace(label=None)
    logp = SimpleNamespace(device=unknown_gpu.device, dtype=torch.float32)
    query = SimpleNamespace(device=unknown_gpu.device, dtype=torch.float32, is_cuda=True, shape=(1, 2, 8, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert metrics.has_kernel(term, logp, batch) is known
        chosen = attention._choose_backend(query, query, True, 0.0, None, 30.0, None)
    assert chosen == ("triton" if known else "sdpa")


def test_the_probe_does_not_break_a_graph(unknown_gpu):
    def choose(x):
        return x + 1 if chips.triton_compiles(0) else x - 1

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "setting, dtype, transposed, expected",
    [
        ("1", torch.bfloat16, False, True),
        ("1", torch.float16, False, True),
        ("1", torch.float32, False, False),
        ("1", torch.bfloat16, True, False),
        ("0", torch.bfloat16, False, False),
        ("", torch.bfloat16, False, False),  # nothing is measured, so nothing is the default
    ],
)
def test_choice_of_the_forward(setting, dtype, transposed, expected, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(chips.FUSED_FORWARD_VARIABLE, setting)
    weight = torch.zeros(8, 6, dtype=dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    assert chips.use_fused_forward(torch.zeros(3, 6, dtype=dtype), weight) is expected


def test_setting_that_makes_no_sense(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(chips.FUSED_FORWARD_VARIABLE, "yes")
    with pytest.raises(chips.ChipError, match="must be 0, 1 or unset, not 'yes'"):
        chips.use_fused_forward(torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize(
    "n, columns, itemsize, expected",
    [
        (100_000, 32_000, 2, 8192),  # 512 MiB in whole steps of 256 rows
        (100_000, 128_256, 2, 2048),
        (100_000, 256_000, 4, 2048),  # the floor, over the budget
        (100, 256_000, 4, 100),
        (0, 256_000, 4, 1),
    ],
)
def test_rows_of_a_block(n, columns, itemsize, expected):
    assert backends.device_rows(n, columns * itemsize) == expected

"""Whether a CPU multiplies in bfloat16: by its flags, by a measurement that is kept, and never by chance."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embed_pipeline.models import bfloat16
from embed_pipeline.models.bfloat16 import WORTH_IT, faster_in_bfloat16, speedup

X86 = "processor : 0\nmodel name : One CPU\nflags : fpu sse {}\n\nprocessor : 1\nflags : none\n"
ARM = "processor : 0\nFeatures : fp asimd {}\nCPU implementer : 0x41\nCPU part : {}\n"
AVX512 = "avx512bw avx512vl avx512dq"


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give this machine another CPU, and an empty home folder."""
    monkeypatch.setattr(bfloat16, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    return lambda told: (tmp_path / "cpuinfo").write_text(told) and None


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the measurements of this test give, the next one first; what is left was not asked for."""
    figures: list[float] = []
    monkeypatch.setattr(bfloat16, "_measure", lambda: figures.pop(0))
    return figures


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home").rglob("bfloat16-*.json"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (f"{AVX512} amx_tile amx_bf16", True),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", True),
        (AVX512, False),  # torch calls it supported, and oneDNN converts
        (f"{AVX512} amx_tile amx_int8", False),
        ("avx512_bf16 amx_tile amx_bf16", False),  # torch does not use it
        ("avx2", False),
    ],
)
def test_flags_settle_it_on_x86(cpu: Callable[[str], None], tmp_path: Path, flags: str, expected: bool) -> None:
    cpu(X86.format(flags))
    assert faster_in_bfloat16() is expected
    assert kept(tmp_path) == []


def test_this_cpu_is_taken_for_what_torch_takes_it_for() -> None:
    told = bfloat16._by_flags(bfloat16._cpu_info())
    assert told is None or told == (torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_amx_tile_supported())


def test_flags_are_read_without_torch() -> None:
    code = (
        "import sys; from embed_pipeline.models.precision import resolve_precision; resolve_precision('auto', 'cpu'); "
        "from embed_pipeline.models import bfloat16; known = bfloat16._by_flags(bfloat16._cpu_info()) is not None; "
        "sys.exit(known and 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_arm_cpu_without_the_flag_needs_no_measurement(cpu: Callable[[str], None], tmp_path: Path) -> None:
    cpu(ARM.format("i8mm", "0xd0c"))
    assert not faster_in_bfloat16()
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "told",
    [
        X86.format(f"{AVX512} avx512_bf16"),  # AMD from Zen 4 on, Intel's Cooper Lake
        ARM.format("bf16", "0xd40"),
        "processor : 0\nisa : rv64imafdcv\n",
        "",
    ],
)
def test_what_flags_leave_open_is_measured_once_a_machine(
    cpu: Callable[[str], None], measures: list[float], tmp_path: Path, told: str
) -> None:
    cpu(told)
    measures += [WORTH_IT, WORTH_IT - 0.1]
    # The second measurement would give the other answer.
    assert [faster_in_bfloat16(), faster_in_bfloat16(), speedup()] == [True, True, WORTH_IT]
    assert len(measures) == len(kept(tmp_path)) == 1


def test_another_cpu_and_another_torch_are_measured_anew(
    cpu: Callable[[str], None], measures: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures += [3.0, 1.1, 2.0, 4.0]
    for part in ("0xd40", "0xd4f"):
        cpu(ARM.format("bf16", part))
        faster_in_bfloat16()
    assert not faster_in_bfloat16()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "torch" else version(name))
    assert speedup() == 2.0
    cpu(ARM.format("bf16 sve", "0xd4f"))
    assert speedup() == 4.0
    assert len(kept(tmp_path)) == 4


@pytest.mark.parametrize(
    "content",
    [b"", b'{"speedup": 3', b"[3.0]", b"3.0", b'{"speedup": "3"}', b'{"speedup": NaN}', b"\xff\x00", b"[" * 100_000],
)
def test_a_damaged_file_is_measured_again(
    cpu: Callable[[str], None], measures: list[float], tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cpu(ARM.format("bf16", "0xd40"))
    measures += [3.0, 2.5]
    speedup()
    kept(tmp_path)[0].write_bytes(content)
    assert [speedup(), speedup()] == [2.5, 2.5]
    assert caplog.text.count("is damaged: the speed of bfloat16 is measured again") == 1
    assert json.loads(kept(tmp_path)[0].read_text()) == {"speedup": 2.5}
    assert not list((tmp_path / "home").rglob("*.partial"))


def test_where_nothing_can_be_kept_it_is_measured_and_told(
    cpu: Callable[[str], None], measures: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpu(ARM.format("bf16", "0xd40"))
    (tmp_path / "home").write_text("a file where the folder should be")
    measures += [3.0, 3.1]
    assert [speedup(), speedup()] == [3.0, 3.1]
    assert "cannot be written" in caplog.text
    assert "set `precision` and `encode_precision` instead of auto" in caplog.text


def test_processes_that_measure_at_once_agree(cpu: Callable[[str], None]) -> None:
    cpu(ARM.format("bf16", "0xd40"))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert len(set(pool.map(_measured, range(3)))) == 1


def _measured(seed: int) -> float:
    bfloat16._measure = lambda: 1.0 + seed  # type: ignore[assignment]
    return speedup()


def test_the_measurement_is_a_ratio_and_draws_no_random_number(
    cpu: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpu("")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with caplog.at_level(logging.INFO):
        found = speedup()
    assert torch.equal(torch.rand(4), expected)
    assert 0.01 < found < 100
    assert f"multiplies {found:.1f} times as fast in bfloat16 as in float32" in caplog.text
    # Where the flags promise it, it is true.
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_amx_tile_supported():
        assert found > WORTH_IT

"""Whether this machine's CPU multiplies in bfloat16, and how much faster than in float32.

With AMX, and without any instructions for bfloat16, the CPU's flags answer the first question, without loading torch.
With AVX-512 BF16 alone they do not: the same instruction is 4 times as fast as float32 on AMD's Zen 5, and half as fast
on an Intel CPU whose AMX is hidden. On ARM the flag says what the CPU can do, but not whether this build of torch uses
it; other systems list no flags. There a measurement answers. It is kept in the home folder, so that one machine always
gives one answer: the arithmetic is part of what a version stands for.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from embed_pipeline.artifacts import home
from embed_pipeline.launch.environment import compute_as_asked

logger = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")
# torch hands a product in bfloat16 to oneDNN where it finds these (`mkldnn._is_mkldnn_bf16_supported`). oneDNN then
# needs instructions of either kind; without them it computes in float32 and converts, 5 times as slowly as float32.
_ONEDNN_FLAGS = {"avx512bw", "avx512vl", "avx512dq"}
_AMX, _AVX = {"amx_tile", "amx_bf16"}, {"avx512_bf16"}
# bfloat16 pays from here on. The conversions are in the measurement; what stays float32 takes a part of the gain.
WORTH_IT = 1.3
# A layer of a small model on a batch: milliseconds, long enough to be measured.
_TOKENS, _WIDTH, _WIDER = 2048, 384, 1536
_SECONDS, _LEAST_ROUNDS = 0.4, 5


def faster_in_bfloat16() -> bool:
    """Whether it is faster than float32 on this CPU. Loads torch only where a measurement has to tell."""
    settled = _by_flags(_cpu_info())
    return speedup() >= WORTH_IT if settled is None else settled


def speedup() -> float:
    """How many times as fast as in float32 torch multiplies in bfloat16 on this CPU, as measured once on this machine.

    The first call takes half a second. A damaged file is measured again. Where the home
    folder cannot be written, the figure is told and not kept.
    """
    file = home() / "measured" / f"bfloat16-{_machine()}.json"
    if (known := _read(file)) is not None:
        return known
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # two that measured could get two answers
            if (known := _read(file)) is not None:
                return known
            if file.exists():
                logger.warning("%s is damaged: the speed of bfloat16 is measured again", file)
            measured = _measure()
            _write(file, measured)
    except OSError as error:
        measured = _measure()
        logger.warning(
            "%s cannot be written (%s), so the speed of bfloat16 is measured again by every process. Make it writable, "
            "or set `precision` and `encode_precision` instead of auto",
            file,
            error,
        )
    logger.info("this CPU multiplies %.1f times as fast in bfloat16 as in float32 (kept in %s)", measured, file)
    return measured


def _cpu_info() -> dict[str, str]:
    """The kernel's words on the first processor by their names; empty where there is no such list."""
    try:
        first, _, _ = CPU_INFO.read_text().strip().partition("\n\n")
    except OSError:  # not Linux
        return {}
    lines = [line.partition(":") for line in first.splitlines()]
    return {name.strip(): value.strip() for name, _, value in lines}


def _by_flags(info: dict[str, str]) -> bool | None:
    """None where only a measurement can tell."""
    if "flags" in info:  # x86
        flags = set(info["flags"].split())
        if flags >= _ONEDNN_FLAGS | _AMX:
            return True
        return None if flags >= _ONEDNN_FLAGS | _AVX else False
    if "Features" in info and "bf16" not in info["Features"].split():  # ARM
        return False
    return None


def _machine() -> str:
    """What decides the measurement: the CPU, what of it this system may use, and torch."""
    info = _cpu_info()
    model = [info.get(name, "") for name in ("model name", "CPU implementer", "CPU part")]
    flags = sorted(info.get("flags", info.get("Features", "")).split())
    told = [platform.machine(), platform.processor(), *model, *flags, importlib.metadata.version("torch")]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _measure() -> float:
    """The shortest time of one linear layer in float32, over that under bfloat16 autocast, conversions included.

    One thread computes, and its processor time counts: what else the machine does must not decide it.
    """
    compute_as_asked()  # a variable for another program must not decide it for ever
    import torch

    # Nothing is drawn: the measurement must not move torch's generator, from which a training draws its dropout.
    given, weight = torch.ones(_TOKENS, _WIDTH), torch.ones(_WIDER, _WIDTH)
    shortest = {False: math.inf, True: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds, end = 0, time.thread_time() + _SECONDS
    try:
        with torch.inference_mode():
            while rounds < _LEAST_ROUNDS or time.thread_time() < end:
                for in_bfloat16 in shortest:
                    started = time.thread_time()
                    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
                        torch.nn.functional.linear(given, weight)
                    shortest[in_bfloat16] = min(shortest[in_bfloat16], time.thread_time() - started)
                rounds += 1
    finally:
        torch.set_num_threads(threads)
    return round(shortest[False] / shortest[True], 2)


def _read(file: Path) -> float | None:
    """None where there is no file, or not what was written."""
    try:
        found = json.loads(file.read_bytes())["speedup"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, float) and 0 < found < math.inf else None


def _write(file: Path, speedup: float) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("w") as opened:
            opened.write(json.dumps({"speedup": speedup}) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()

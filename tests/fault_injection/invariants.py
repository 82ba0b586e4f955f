"""What has to hold after every fault."""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.errors import ArtifactError
from tests.fault_injection.runs import ORDER

# What two runs without a fault have in common, byte by byte; the rest tells times and places.
_SAME = re.compile(r"(?!.*(seconds|results_timing)).*\.(parquet|safetensors)|model/(config|modules|tokenizer)\.json")
_VERSION = re.compile(r"[0-9a-f]{16}")

Bits = dict[str, tuple[str, dict[str, str]]]


class BrokenPromiseError(AssertionError):
    """Something that has to hold after a fault does not."""


def bits_of(store: Path) -> Bits:
    """asset -> the current version, and the digests of its files that have to be the same in every run."""
    small = PipelineStore(store, "small")
    found = {}
    for asset in ORDER:
        artifact = small.current(asset)
        artifact.verify()
        digests = {n: entry.sha256 for n, entry in artifact.manifest.files.items() if _SAME.fullmatch(n)}
        assert digests, f"{asset} has no file to compare: {list(artifact.manifest.files)}"
        found[asset] = (artifact.version, digests)
    return found


def versions_in(store: Path) -> set[Path]:
    """The folders of versions that can be seen."""
    return {
        path
        for asset in ORDER
        for path in (store / "small" / asset).glob("*")
        if _VERSION.fullmatch(path.name) and path.is_dir()
    }


def check_nothing_by_halves(store: Path, except_for: Set[Path] = frozenset()) -> None:
    """Every version that can be seen is whole, and every pointer leads to one."""
    small = PipelineStore(store, "small")
    try:
        for path in versions_in(store) - except_for:
            small.get(path.parent.name, path.name).verify()
        for asset in ORDER:
            if small.has_current(asset) and not except_for:
                small.current(asset).verify()
    except ArtifactError as error:
        raise BrokenPromiseError(f"published by halves: {error}") from error


def check_nothing_lost(before: set[Path], store: Path, except_for: Set[Path] = frozenset()) -> None:
    if lost := before - versions_in(store) - except_for:
        raise BrokenPromiseError(f"lost: {sorted(map(str, lost))}")


def check_leftovers_go(store: Path) -> None:
    """What dead processes left can be told from what is being made, and goes."""
    small = PipelineStore(store, "small")
    if making := small.in_the_making():
        raise BrokenPromiseError(f"nobody is at work, and yet: {making}")
    for path in small.abandoned():
        small.remove_folder(path)
    small.prunable()
    if left := set((store / "small" / ".staging").glob("*")) - set(small.foreign()):
        raise BrokenPromiseError(f"not cleared away: {left}")


def check_same_bits(expected: Bits, store: Path) -> None:
    found = bits_of(store)
    for asset, (version, digests) in expected.items():
        if found[asset] != (version, digests):
            other = [name for name in digests if found[asset][1].get(name) != digests[name]]
            raise BrokenPromiseError(f"{asset}: version {found[asset][0]} for {version}, other bits in {other}")

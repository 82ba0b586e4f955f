"""The variables that a shell gives us mean what they say, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from embed_pipeline.artifacts import home, is_smoke_test, store_root
from embed_pipeline.definitions import extra_folders
from embed_pipeline.errors import ConfigurationError


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((word, True) for word in ("1", "true", "True", "yes", "on", " 1 ")),
        *((word, False) for word in ("", "0", "false", "False", "no", "off", "OFF")),
    ],
)
def test_a_smoke_test_is_asked_for_by_yes_alone(given: str, meant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_PIPELINE_SMOKE_TEST", given)
    assert is_smoke_test() is meant


@pytest.mark.parametrize("given", ["2", "maybe", "-1", "nein"])
def test_what_is_neither_yes_nor_no_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_PIPELINE_SMOKE_TEST", given)
    with pytest.raises(ConfigurationError, match=f"EMBED_PIPELINE_SMOKE_TEST: found '{given}', expected one of 1, tr"):
        is_smoke_test()


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EMBED_PIPELINE_SMOKE_TEST", raising=False)
    monkeypatch.setenv("EMBED_PIPELINE_STORE", "~/store")
    monkeypatch.setenv("DAGSTER_HOME", "~")
    monkeypatch.setenv("EMBED_PIPELINE_DEFS", "~/a:~/b:~/a")
    assert store_root() == tmp_path / "store"
    assert home() == tmp_path
    assert extra_folders() == [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("address", ["s3://key:s3cr3t@bucket/store", "file:///store", "gs://bucket"])
def test_an_address_is_no_folder(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, read in (("EMBED_PIPELINE_STORE", store_root), ("DAGSTER_HOME", home)):
        monkeypatch.setenv(name, address)
        with pytest.raises(ConfigurationError, match=f"{name}: found .*, expected a local folder") as raised:
            read()
        assert "s3cr3t" not in str(raised.value)


def test_a_home_folder_of_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_PIPELINE_STORE", "~nobody-of-this-name/store")
    with pytest.raises(ConfigurationError, match=r"EMBED_PIPELINE_STORE: found .*, and no such user has a home folder"):
        store_root()

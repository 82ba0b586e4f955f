"""Getting a model that is not on this machine yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError

from embed_pipeline.errors import ModelError
from embed_pipeline.models.source import locate
from embed_pipeline.settings import ModelSource

HUB = ModelSource(hub="BAAI/bge-small-en-v1.5", revision="5c38ec7c405ec4b44b94cc5a9bb96e735b38267a")


@pytest.mark.parametrize(
    ("error", "offline", "passing"),
    [
        (ConnectionResetError("by peer"), False, True),
        (ConnectionResetError("by peer"), True, False),
        (HFValidationError("no such id"), False, False),
    ],
)
def test_a_lost_connection_is_worth_another_try_and_a_wrong_name_is_not(
    error: Exception, offline: bool, passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)

    with pytest.raises(ModelError, match=r"cannot get BAAI/bge-small-en-v1\.5 at revision 5c38ec7") as raised:
        locate(HUB, Path())

    assert raised.value.passing == passing

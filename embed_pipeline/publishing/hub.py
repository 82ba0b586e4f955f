"""Pushing a model folder to the Hugging Face Hub: one commit, private unless asked otherwise, tagged with our version.

The address is HF_ENDPOINT's, the token HF_TOKEN's. Large files go by the Hub's own xet storage, or by LFS where
HF_HUB_DISABLE_XET says so.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from pydantic import BaseModel, ConfigDict

from embed_pipeline.errors import HubError
from embed_pipeline.masking import without_password

# A model's files of before that the new one does not have are removed; what people added by hand stays.
MODEL_FILES = ["*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.onnx", "*.onnx.data", "*.xml", "*.npy"]


class Pushed(BaseModel):
    """Where a model lies on the Hub."""

    model_config = ConfigDict(frozen=True)

    repository: str
    commit: str
    tag: str
    url: str  # of the files at this commit
    private: bool
    at: str  # UTC, ISO 8601


def push(folder: Path, repository: str, *, private: bool, tag: str, message: str) -> Pushed:
    """Make `repository` hold the model in `folder`, in one commit with the tag `tag`.

    A folder that is there already makes no new commit. Raises HubError where the Hub may not or cannot be reached,
    refuses, or has a public repository of that name while a private one is asked for; nothing was uploaded then.
    """
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repository} cannot be pushed: HF_HUB_OFFLINE forbids to speak with the Hub. Unset it")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise HubError(
            f"{repository} cannot be pushed: HF_TOKEN is not set. Give it a token of the Hub that may write there"
        )
    api = HfApi(token=token)
    try:
        found = _visibility(api, repository)
        if private and found is False:
            raise HubError(
                f"{repository} exists and is public, but hub.private asks for a private one: nothing was uploaded. "
                "Make it private on its page, name another repository, or set `private: false`"
            )
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=MODEL_FILES
        )
        api.create_tag(repository, tag=tag, revision=commit.oid, exist_ok=True)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        hint = " Check HF_TOKEN: it needs the right to write there." if status in (401, 403) else ""
        # A server that stumbles or a line that breaks may be better in a minute; a refusal will not.
        passing = status >= 500 or status == 429 or (status == 0 and isinstance(error, OSError))
        raise HubError(
            without_password(f"the Hub at {api.endpoint} did not take {repository}: {error}.{hint}"), passing=passing
        ) from error
    return Pushed(
        repository=repository,
        commit=commit.oid,
        tag=tag,
        url=f"{without_password(api.endpoint)}/{repository}/tree/{commit.oid}",
        private=private if found is None else found,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _visibility(api: HfApi, repository: str) -> bool | None:
    """Whether it is private; None where there is none yet."""
    try:
        return bool(api.model_info(repository).private)
    except RepositoryNotFoundError:
        return None

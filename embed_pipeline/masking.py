"""Passwords and tokens in texts: found before they are stored, masked before they are shown."""

from __future__ import annotations

import re

# scheme://user:password@host. A password may hold slashes (S3 keys do); host:8080/path@x is no password.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/@\s]*:(?!\d+/)[^\s@]*(?:@[^/@\s]*)*|[^/\s]*)@")
_PASSWORD = re.compile(r"://[^/@\s]*:(?!\d+/)[^\s@]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# Keys and variables that may hold a secret: by their name, or because any address or shell line may.
_SECRET_NAME = re.compile(
    r"token(?!s)|passw|passphrase|secret|credential|auth|(?:api|access|private|account)[-_]?key|^(?:address|setup)$",
    re.IGNORECASE,
)


def without_password(text: str) -> str:
    """A text that may hold addresses, such as an error of MLflow's, without the names, passwords and Hub tokens."""
    return _TOKEN.sub("hf_***", _CREDENTIALS.sub("", text))


def secret_in(text: str) -> str | None:
    """What kind of secret `text` shows: an address with a password, or a token of the Hub; None if it shows none."""
    if _PASSWORD.search(text):
        return "an address with a user and a password"
    return "a token of the Hugging Face Hub" if _TOKEN.search(text) else None


def named_like_a_secret(name: str) -> bool:
    """Whether a key or variable called `name` may hold a password, a token or a key."""
    return _SECRET_NAME.search(name) is not None

"""Files that look like secrets: keys, tokens and passwords, by name or by what they hold."""

from __future__ import annotations

import re
from typing import Final

_NAMES: Final = re.compile(
    r"\.env(\..*)?|.*\.env|\.?netrc|\.npmrc|\.pypirc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)(\..*)?"
    r"|.*\.(pem|key|p12|pfx|kdbx|jks|keystore|ppk|asc)|kubeconfig(\..*)?|service[_-]?account.*\.json"
    r"|(.*[_\-. ])?(secrets?|credentials?|passwords?|passwd|tokens?|(api|access|private|auth)?[_-]?keys?)(\.\w+)?"
)
# Names that end in such a word and are a tokenizer's.
_HARMLESS: Final = re.compile(r"(added|special|extra|additional)[_-]?tokens?\.(json|txt)")
# Tokens have a prefix that says whose they are, and private keys a first line.
_CONTENT: Final = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    rb"|\bsk-[A-Za-z0-9_\-]{32,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9\-]{20,}|\bAIza[A-Za-z0-9_\-]{35}"
    rb"|\bglpat-[A-Za-z0-9_\-]{20,}"
)


def by_name(name: str) -> str:
    """Return that a file looks like a secret, if its name says so; otherwise an empty string."""
    lower = name.lower()
    return "it looks like a secret" if _NAMES.fullmatch(lower) and not _HARMLESS.fullmatch(lower) else ""


def by_content(data: bytes) -> str:
    """Return that a file looks like a secret, if it holds a private key or an access token; else an empty string."""
    return "it holds what looks like a key or an access token" if _CONTENT.search(data) else ""

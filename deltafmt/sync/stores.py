"""Where a folder of messages lies: on a file system, or behind a URL that fsspec knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from deltafmt.errors import StorageError
from deltafmt.extras import need
from deltafmt.output import storage_error, write_durably


class Store(Protocol):
    """Small files by name, each of which appears whole or not at all."""

    def names(self) -> list[str]:
        """Return the names of all files."""

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it."""

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""


class LocalStore:
    """A folder of a file system, which is made if it is missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # a name with a zero byte is no OSError
            raise storage_error("cannot make", path, error) from error

    def names(self) -> list[str]:
        """Return the names of all files, but for those that are being written."""
        try:
            return [name for name in os.listdir(self._path) if not name.startswith(".")]
        except OSError as error:
            raise storage_error("cannot list", self._path, error) from error

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        try:
            return (self._path / name).read_bytes()
        except OSError as error:
            raise storage_error("cannot read", self._path / name, error) from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file, and wait until it is on disk."""
        write_durably(self._path / name, data)

    def remove(self, name: str) -> None:
        """Remove a file."""
        try:
            (self._path / name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("cannot remove", self._path / name, error) from error


class UrlStore:
    """A folder behind a URL, such as ``s3://bucket/run``. A store of objects makes each appear whole."""

    def __init__(self, url: str) -> None:
        need("a folder behind a URL", "fsspec", extra="fsspec")
        import fsspec

        self._url = url
        try:
            self._files: Any
            self._files, self._path = fsspec.core.url_to_fs(url)
            self._files.makedirs(self._path, exist_ok=True)
        except (OSError, ValueError, ImportError) as error:
            raise StorageError(f"cannot open {url}: {error}") from error

    def names(self) -> list[str]:
        """Return the names of all files."""
        try:
            self._files.invalidate_cache()
            found = self._files.ls(self._path, detail=False)
        except OSError as error:
            raise storage_error("cannot list", self._url, error) from error
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        try:
            return bytes(self._files.cat_file(f"{self._path}/{name}"))
        except OSError as error:
            raise storage_error("cannot read", f"{self._url}/{name}", error) from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        try:
            self._files.pipe_file(f"{self._path}/{name}", data)
        except OSError as error:
            raise storage_error("cannot write", f"{self._url}/{name}", error) from error

    def remove(self, name: str) -> None:
        """Remove a file."""
        try:
            self._files.rm_file(f"{self._path}/{name}")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error("cannot remove", f"{self._url}/{name}", error) from error

"""s3://BUCKET/PREFIX, gs://..., memory://...: a package as files below a URL of fsspec.

lora_ft.json    first: it marks the prefix as a package, so that an interrupted upload can be repeated
other files     in one call
SHA256SUMS      last: until then a fetch fails, because the checksums differ
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import ConfigError, ResourceError, SecurityError
from lora_ft.io import durable
from lora_ft.publishing import checksums

_LOCAL = {"file", "local"}
# Errors of these packages, like OSError, mean that a store cannot be reached or refuses the login.
_CLIENTS = {"aiohttp", "azure", "botocore", "gcsfs", "google", "paramiko", "requests"}


@dataclass(frozen=True)
class Url:
    """A prefix in a store of fsspec, whose library finds the credentials."""

    url: str

    @classmethod
    def parse(cls, text: str) -> "Url":
        from fsspec.registry import known_implementations

        scheme, _, path = text.partition("://")
        if scheme in _LOCAL:
            raise ConfigError(f"to={text} is a folder on this machine: write to=dir:PATH")
        if re.search(r"://[^/]*@", text):
            raise SecurityError(
                "to= holds a login: set it in the environment or in the configuration of the store's library"
            )
        if scheme not in known_implementations or "::" in text:
            raise ConfigError(f"to={text}: fsspec has no store for {scheme}://")
        if not path.strip("/"):
            raise ConfigError(f"to={text} names no prefix for the package: write {scheme}://BUCKET/PREFIX")
        return cls(text.rstrip("/"))

    def check(self, public: bool) -> str:
        if public:
            raise ConfigError(f"public=true applies to to=hf: only; the store decides who can read {self.url}")
        with self._opened() as (store, root):
            existing = self._existing(store, root)
        return f"{self.url} ({'replaces the package there' if existing else 'new'}; the store decides who can read it)"

    def send(self, folder: Path, message: str, public: bool) -> str:
        self.check(public)
        names = checksums.file_names(folder)
        files = sorted(names - {checksums.RECORD, checksums.FILE})
        with self._opened() as (store, root):
            stale = self._existing(store, root) - names
            for parent in sorted({f"{root}/{name}".rpartition("/")[0] for name in names}):
                store.mkdirs(parent, exist_ok=True)
            store.put_file(str(folder / checksums.RECORD), f"{root}/{checksums.RECORD}")
            store.put([str(folder / name) for name in files], [f"{root}/{name}" for name in files])
            if stale:
                store.rm([f"{root}/{name}" for name in sorted(stale)])
            store.put_file(str(folder / checksums.FILE), f"{root}/{checksums.FILE}")
        return self.url

    def fetch(self, folder: Path, revision: str | None) -> None:
        with self._opened() as (store, root), durable.staged_folder(folder) as staging:
            store.get_file(f"{root}/{checksums.FILE}", str(staging / checksums.FILE))
            names = sorted(checksums.read(staging))
            store.get([f"{root}/{name}" for name in names], [str(staging / name) for name in names])
            checksums.check(staging)

    def _existing(self, store: Any, root: str) -> set[str]:
        """Return the files of the package that is there; raises ConfigError if the prefix holds other files only."""
        found = {path.removeprefix(f"{root}/") for path in store.find(root)}
        if found and checksums.RECORD not in found:
            raise ConfigError(f"to={self.url} holds files that are not a package of lora-ft: name another prefix")
        if checksums.FILE not in found:
            return found & {checksums.RECORD}
        listed = store.cat_file(f"{root}/{checksums.FILE}").decode("utf-8", "replace")
        return found & {checksums.RECORD, checksums.FILE, *checksums.parse(listed, f"{self.url}/{checksums.FILE}")}

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        """Yield the store and the prefix in it; turn errors of the store into errors of lora_ft."""
        from fsspec.core import url_to_fs

        try:
            store, root = url_to_fs(self.url)
            store.invalidate_cache()
            yield store, root.rstrip("/")
        except ImportError as error:  # fsspec names the package to install
            raise ConfigError(f"to={self.url}: {error}") from None
        except NotImplementedError:
            raise ConfigError(f"to={self.url}: fsspec can only read from this store, not write") from None
        except FileNotFoundError as error:
            raise ResourceError(f"{self.url} holds no complete package ({error})") from None
        except Exception as error:
            is_of_store = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS
            if not is_of_store or isinstance(error, ResourceError):
                raise
            raise ResourceError(f"{self.url} cannot be used ({error}): correct this and publish again") from error

"""s3://BUCKET/PREFIX, gs://..., memory://...: a package as files below a URL of fsspec, complete when its sums are.

    SHA256SUMS.sending comes   the names of old and new files: what a later try may replace
    SHA256SUMS goes            from here to the end a reader finds no package, never parts of two
    every file                 and what only the earlier package had goes
    SHA256SUMS comes           and SHA256SUMS.sending goes

Stores of objects have no folders that could be renamed.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import ConfigError, ResourceError, SecurityError
from lora_ft.io import durable
from lora_ft.publishing import sums

_SENDING = f"{sums.SUMS}.sending"
_LOCAL = {"file", "local"}
# Whose errors say that a store cannot be reached, or not with this login, beside OSError.
_LIBRARIES = {"aiohttp", "azure", "botocore", "gcsfs", "google", "paramiko", "requests"}


@dataclass(frozen=True)
class Remote:
    """A prefix of a store; credentials are those that its library finds by itself."""

    url: str

    @classmethod
    def parse(cls, text: str) -> "Remote":
        from fsspec.registry import known_implementations

        scheme, _, path = text.partition("://")
        if scheme in _LOCAL:
            raise ConfigError(f"to={text}: a folder of this machine is to=dir:PATH")
        if re.search(r"://[^/]*@", text):
            raise SecurityError("to= holds a login: leave it to the environment or to the library's own configuration")
        if scheme not in known_implementations or "::" in text:
            raise ConfigError(f"to={text}: fsspec knows no store of the kind {scheme}://")
        if not path.strip("/"):
            raise ConfigError(f"to={text} lacks a prefix for the package: {scheme}://BUCKET/PREFIX")
        return cls(text.rstrip("/"))

    def check(self, public: bool) -> str:
        if public:
            raise ConfigError(f"public=true is for hf: places; who reads {self.url} is decided by its store")
        with self._opened() as (store, root):
            there = _sizes(store, root)
            earlier = self._earlier(store, root, there)
        if there and earlier is None:
            raise ConfigError(
                f"to={self.url} holds files, and is no package that lora-ft published: name another prefix"
            )
        return f"{self.url} ({'replaces the package there' if there else 'new'}; who reads it, the store decides)"

    def send(self, folder: Path, message: str, public: bool) -> str:
        self.check(public)
        listed = (folder / sums.SUMS).read_bytes()
        names = sorted(sums.names(folder) - {sums.SUMS})
        sizes = {name: (folder / name).stat().st_size for name in names}
        with self._opened() as (store, root):
            there = _sizes(store, root)
            earlier = self._earlier(store, root, there) or set()
            is_whole = sums.SUMS in there and store.cat_file(f"{root}/{sums.SUMS}") == listed
            if not is_whole or any(there.get(name) != size for name, size in sizes.items()):
                own = sums.render(dict.fromkeys(earlier.union(names), "0" * 64))
                store.pipe_file(f"{root}/{_SENDING}", own.encode())
                _remove(store, root, {sums.SUMS} & there.keys())
                for name in names:
                    store.mkdirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                    store.put_file(str(folder / name), f"{root}/{name}")
                _remove(store, root, (earlier & there.keys()) - set(names))
                self._check_sizes(store, root, sizes)
                store.pipe_file(f"{root}/{sums.SUMS}", listed)
            _remove(store, root, {_SENDING} & _sizes(store, root).keys())
        return self.url

    def fetch(self, folder: Path, revision: str | None) -> None:
        with self._opened() as (store, root), durable.staged_folder(folder) as staging:
            if sums.SUMS not in _sizes(store, root):
                raise ResourceError(f"{self.url} holds no package, or one that was not sent to its end")
            store.get_file(f"{root}/{sums.SUMS}", str(staging / sums.SUMS))
            for name in sums.read(staging):
                durable.make_folder((staging / name).parent)
                store.get_file(f"{root}/{name}", str(staging / name))
            sums.check(staging)

    def _earlier(self, store: Any, root: str, there: dict[str, int]) -> set[str] | None:
        """Names that an earlier package has there, or one whose sending was cut off; None where there is neither."""
        if _SENDING not in there and not sums.is_package(set(there)):
            return None
        name = _SENDING if _SENDING in there else sums.SUMS
        return set(sums.parse(store.cat_file(f"{root}/{name}").decode("utf-8", "replace"), f"{self.url}/{name}"))

    def _check_sizes(self, store: Any, root: str, sizes: dict[str, int]) -> None:
        found = _sizes(store, root)
        if wrong := [name for name, size in sizes.items() if found.get(name) != size]:
            raise ResourceError(
                f"{self.url}: {wrong[0]} has {found.get(wrong[0])} bytes there, {sizes[wrong[0]]} were sent"
            )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        """The store as it is now, and the prefix in it; what goes wrong there is a ResourceError."""
        from fsspec.core import url_to_fs

        try:
            store, root = url_to_fs(self.url)
            store.invalidate_cache()
            yield store, root.rstrip("/")
        except ImportError as error:  # fsspec names the package to install
            raise ConfigError(f"to={self.url}: {error}") from None
        except NotImplementedError:
            raise ConfigError(f"to={self.url}: fsspec only reads from stores of this kind") from None
        except Exception as error:
            own = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES
            if not own or isinstance(error, ResourceError):
                raise
            raise ResourceError(
                f"{self.url} cannot be used ({error}): set this right and publish again, which goes on"
            ) from error


def _sizes(store: Any, root: str) -> dict[str, int]:
    """Bytes of each file below a prefix, by name."""
    store.invalidate_cache()
    found = store.find(root, detail=True)
    return {path.removeprefix(f"{root}/"): entry["size"] for path, entry in found.items()}


def _remove(store: Any, root: str, names: set[str]) -> None:
    for name in sorted(names):
        store.rm_file(f"{root}/{name}")

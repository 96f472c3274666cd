"""Destinations of a package.

dir:PATH                    a folder on this machine, replaced as a whole               directory.py
hf:OWNER/NAME               a repository of the Hugging Face hub, in one commit         hub.py
s3://BUCKET/PREFIX, ...     a URL of fsspec, complete as soon as SHA256SUMS is there    url.py
"""

import re
from pathlib import Path
from typing import Protocol

from lora_ft.errors import ConfigError
from lora_ft.publishing.destinations.directory import Directory
from lora_ft.publishing.destinations.hub import Hub
from lora_ft.publishing.destinations.url import Url


class Destination(Protocol):
    """The operations of every destination.

    They raise ConfigError for a setting that the user can correct, ResourceError if the destination is missing or
    cannot be reached, SecurityError if more people than intended would see the package.
    """

    def check(self, public: bool) -> str:
        """Connect with the available credentials, write nothing, and return one line on the address and its readers.

        With `public` a new repository of the hub can be read by everybody; without it, it is private.
        """

    def send(self, folder: Path, message: str, public: bool) -> str:
        """Send every file of a package; return its address, with a revision after `@` if the destination has them."""

    def fetch(self, folder: Path, revision: str | None) -> None:
        """Fetch the package of a revision, or the newest, into a new folder, and check it against its SHA256SUMS."""


def parse(to: str) -> Destination:
    """Return the destination that `to` names, or raise ConfigError."""
    kind, _, rest = to.partition(":")
    if kind == "dir":
        return Directory.parse(rest)
    if kind == "hf":
        return Hub.parse(rest)
    if re.match(r"[a-z][a-z0-9+.-]*://", to):
        return Url.parse(to)
    raise ConfigError(f"to must be dir:PATH, hf:OWNER/NAME or a URL (s3://BUCKET/PREFIX), got {to}")

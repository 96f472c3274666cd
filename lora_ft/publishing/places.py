"""Where a package is sent.

    dir:PATH                    a folder on this machine, replaced as a whole       place_dir.py
    hf:OWNER/NAME               a repository of the hub, in one commit              place_hub.py
    oci:HOST/NAME:TAG           an artifact in a registry, one manifest             place_oci.py
    s3://BUCKET/PREFIX, ...     whatever fsspec knows, the sums written last        place_url.py

Each is old or complete at every moment, and sending again finishes what was cut off.
"""

import re
from pathlib import Path
from typing import Protocol

from lora_ft.errors import ConfigError
from lora_ft.publishing.place_dir import Directory
from lora_ft.publishing.place_hub import Hub
from lora_ft.publishing.place_oci import Registry
from lora_ft.publishing.place_url import Remote


class Place(Protocol):
    """What all places do. Each raises ConfigError for what its user can set right, ResourceError for what is not there
    or cannot be reached, SecurityError for what would be seen by others than meant."""

    def check(self, public: bool) -> str:
        """Reach the place with the credentials there are, write nothing; one line: where files will go, who sees them.

        `public` asks for a place that everybody may read; a new repository of the hub is private without it.
        """

    def send(self, folder: Path, message: str, public: bool) -> str:
        """Send every file of a package at once; returns its address, with a revision after `@` where there are any."""

    def fetch(self, folder: Path, revision: str | None) -> None:
        """Fetch a package, the newest or the one of a revision, into a new folder, and check it against its sums."""


def parse(to: str) -> Place:
    """The place that a text names; ConfigError for what is none."""
    kind, _, rest = to.partition(":")
    match kind:
        case "dir":
            return Directory.parse(rest)
        case "hf":
            return Hub.parse(rest)
        case "oci":
            return Registry.parse(rest)
        case "file":
            raise ConfigError(f"to={to}: a folder of this machine is to=dir:PATH")
    if re.match(r"[a-z][a-z0-9+.-]*://", to):
        return Remote.parse(to)
    raise ConfigError(f"to must be dir:PATH, hf:OWNER/NAME, oci:HOST/NAME:TAG or a URL (s3://BUCKET/PREFIX), got {to}")

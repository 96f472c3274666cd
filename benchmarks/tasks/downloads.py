"""Files of Debian 12.15 that rows are made of: fetched once, checked by their sha256, kept in the cache.

    downloads.file("Packages.xz")      ~/.cache/lora_ft/tasks/downloads/Packages.xz

The lists are those of 2026-07-11. A mirror that has newer ones gives other rows and other figures, so they are refused.
"""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path

from lora_ft.errors import ResourceError
from lora_ft.io import caches, durable

MIRROR = "http://deb.debian.org/debian/"
TIMEOUT_SECONDS = 60

# Path on a mirror and sha256, as in dists/bookworm/InRelease and in Packages.
FILES = {
    "Packages.xz": (
        "dists/bookworm/main/binary-amd64/Packages.xz",
        "9e0b5aabb2465b3d2e7a7fe27f9913846277833f7a2826e7767acccff5b588c5",
    ),
    "Translation-en.xz": (
        "dists/bookworm/main/i18n/Translation-en.xz",
        "a3d4a0bfd8e9242810b0885eda7c1a6e05dac15b333ddbaab03ba56f2dfa4bf0",
    ),
    "Translation-de.bz2": (
        "dists/bookworm/main/i18n/Translation-de.bz2",
        "2cc65c7f8b85d8a2964c3735bbf86be79bfd3342ef8908150e268137fe5dac7f",
    ),
    "bsdgames.deb": (
        "pool/main/b/bsdgames/bsdgames_2.17-29+b1_amd64.deb",
        "cc92de974a1f66623a05ac0aed6dc790f682e5aac5205f0210294744d1532d10",
    ),
}


def file(name: str) -> Path:
    """Return the path of a file of FILES, fetched if it is not there. Raises ResourceError with what to do."""
    path = caches.writable("tasks") / "downloads" / name
    place, expected = FILES[name]
    advice = (
        f"fetch {MIRROR}{place} (or the same file of another mirror or of snapshot.debian.org) and save it as {path}"
    )
    if not path.exists():
        durable.make_folder(path.parent)
        try:
            with urllib.request.urlopen(MIRROR + place, timeout=TIMEOUT_SECONDS) as answer:
                content = answer.read()
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ResourceError(f"{name} of Debian 12.15 cannot be fetched ({error}): {advice}") from None
        _check(content, expected, name, advice)
        durable.write_bytes(path, content)
    _check(path.read_bytes(), expected, name, advice)
    return path


def _check(content: bytes, expected: str, name: str, advice: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ResourceError(f"{name} is not the file of Debian 12.15: its sha256 is {found}, not {expected}; {advice}")

"""Read the descriptions of Debian's packages from the lists that apt downloads.

Package: 0ad                                   -> Description("0ad", "0ad", "games",
Description-md5: d943...                              "Real-time strategy game of ancient warfare",
Description-en: Real-time strategy game of ...        ["0 A.D. (pronounced ...) is a free, ..."])
 0 A.D. (pronounced "zero ey-dee") is a free,
.
"""

import bz2
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import downloads

_ITEM = re.compile(r"^ (\s|[*o+-]\s)")  # preformatted lines and lists, which are not running text


@dataclass(frozen=True)
class Description:
    """Synopsis and paragraphs of a package; paragraphs with lists or preformatted lines are None.

    source: the source package, which the packages of one program share. section: games, science, ...
    """

    package: str
    source: str
    section: str
    synopsis: str
    paragraphs: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """The paragraphs that are running text, on one line each."""
        return "\n".join(paragraph for paragraph in self.paragraphs if paragraph)


@cache
def english() -> dict[str, Description]:
    """Return the English descriptions by their md5; of packages with the same text the first."""
    packages = {}
    for fields in stanzas(lzma.decompress(downloads.file("Packages.xz").read_bytes()).decode("utf-8")):
        source = fields.get("Source", fields["Package"]).partition(" ")[0]
        packages[fields["Package"]] = source, fields["Section"].rpartition("/")[2]
    text = lzma.decompress(downloads.file("Translation-en.xz").read_bytes()).decode("utf-8")
    return _descriptions(text, "en", packages)


@cache
def german() -> dict[str, Description]:
    """Return the German descriptions by the md5 of the English ones."""
    text = bz2.decompress(downloads.file("Translation-de.bz2").read_bytes()).decode("utf-8")
    return _descriptions(text, "de", {})


def _descriptions(text: str, language: str, packages: dict[str, tuple[str, str]]) -> dict[str, Description]:
    found: dict[str, Description] = {}
    for fields in stanzas(text):
        package, body = fields["Package"], fields[f"Description-{language}"]
        source, section = packages.get(package, (package, ""))
        synopsis, _, rest = body.partition("\n")
        described = Description(package, source, section, synopsis.strip(), paragraphs(rest))
        if not packages or package in packages:
            found.setdefault(fields["Description-md5"], described)
    return found


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each stanza of a Debian control file; further lines of a field keep their first blank."""
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith(" "):
                fields[name] += f"\n{line}"
            else:
                name, _, value = line.partition(": ")
                fields[name] = value
        if fields:
            yield fields


def paragraphs(body: str) -> tuple[str | None, ...]:
    """Return the paragraphs of a description, which a line with a dot separates; None for lists and tables."""
    parts = re.split(r"^ \.$\n?", body, flags=re.MULTILINE)
    lines = [[line for line in part.splitlines() if line.strip()] for part in parts]
    return tuple(None if any(map(_ITEM.match, part)) else " ".join(map(str.strip, part)) for part in lines if part)

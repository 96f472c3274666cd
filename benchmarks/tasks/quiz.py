"""Read the quiz of Debian's package bsdgames: questions and answers as patterns.

    {John {F{.} }}Kennedy|JFK:{Lee Harvey }Oswald     Who killed John F. Kennedy?    Lee Harvey Oswald

{x} is optional, a|b are alternatives, [a|b] alternatives within a text. A pattern is read in its longest form: with
what is optional, and the first alternative.
"""

import io
import tarfile

import downloads

_FOLDER = "./usr/share/games/bsdgames/quiz/"

# Question by file, with the columns of the question and of the answer.
QUESTIONS = {
    ("africa", 0, 1): "What is the capital of {}?",
    ("america", 0, 1): "What is the capital of {}?",
    ("asia", 0, 1): "What is the capital of {}?",
    ("europe", 0, 1): "What is the capital of {}?",
    ("province", 0, 1): "What is the capital of {}?",
    ("state", 0, 1): "What is the capital of {}?",
    ("state", 0, 2): "How is {} abbreviated?",
    ("state", 0, 3): "What is the state flower of {}?",
    ("elements", 0, 3): "Which element has the symbol {}?",
    ("elements", 3, 0): "What is the symbol of the element {}?",
    ("elements", 3, 1): "What is the atomic number of {}?",
    ("babies", 1, 0): "What is a young {} called?",
    ("collectives", 0, 1): "What is a group of {} called?",
    ("sexes", 0, 1): "What is the female counterpart of {}?",
    ("posneg", 0, 1): "What is the opposite of {}?",
    ("mult", 0, 1): "What is {}?",
    ("arith", 0, 1): "Which number is missing: {}",
    ("latin", 0, 1): "What does the Latin word {} mean?",
    ("pres", 0, 3): "Who became president of the USA after {}?",
    ("flowers", 0, 1): "What does this flower stand for: {}",
    ("murders", 0, 1): "Who killed {}?",
    ("morse", 0, 1): "What is {} in Morse code?",
    ("poetry", 2, 3): "Who wrote {}?",
}


def questions() -> list[tuple[str, str, str]]:
    """Return (group, question, answer): questions of one group are about the same line of a file."""
    files, found = _files(), {}
    for (subject, asked, wanted), template in QUESTIONS.items():
        for number, line in enumerate(lines(files[subject])):
            columns = split(line)
            if len(columns) > max(asked, wanted) and columns[asked] and columns[wanted]:
                question = template.format(longest(columns[asked]))
                found.setdefault(question, (f"{subject} {number}", question, longest(columns[wanted])))
    return list(found.values())


def lines(text: str) -> list[str]:
    """Return the lines of a file of patterns; a backslash at the end continues a line."""
    return [line for line in text.replace("\\\n", "").splitlines() if line]


def split(line: str) -> list[str]:
    """Return the columns of a line; a colon behind a backslash separates none."""
    return [column.replace("\0", ":") for column in line.replace("\\:", "\0").split(":")]


def longest(pattern: str) -> str:
    """Return the longest form of a pattern, without overstruck accents."""
    text, end = _alternatives(pattern, 0, "")
    assert end == len(pattern), pattern
    return " ".join(text.split())


def _alternatives(pattern: str, start: int, closing: str) -> tuple[str, int]:
    """Return the first alternative from `start`, without accents, and the end of the last one."""
    found, current, i = [], "", start
    while i < len(pattern) and pattern[i] != closing:
        if pattern[i] in "{[":
            inner, i = _alternatives(pattern, i + 1, "}" if pattern[i] == "{" else "]")
            current += inner
        elif pattern[i] == "|":
            found.append(current)
            current = ""
        elif pattern[i] == "\\":
            i += 1
            current += pattern[i]
        else:
            current += pattern[i]
        i += 1
    found.append(current)
    return next((text for text in found if "\b" not in text), found[0].replace("\b", "")), i


def _files() -> dict[str, str]:
    package, position = downloads.file("bsdgames.deb").read_bytes(), 8
    while position < len(package):  # an ar archive: a header of 60 bytes and the content, at even positions
        name, size = package[position : position + 16].decode().strip(), int(package[position + 48 : position + 58])
        content = package[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                members = [m for m in archive.getmembers() if m.name.startswith(_FOLDER) and m.isfile()]
                return {m.name.removeprefix(_FOLDER): archive.extractfile(m).read().decode("latin-1") for m in members}
    raise ValueError("bsdgames.deb has no data.tar")

"""The devices of conf/hardware/ with their sources.

for card in cards():  card.choice, card.hardware.memory, card.source
same_card("NVIDIA GeForce RTX 4090", 23.6 * 2**30)     the entry of a device that torch has found, or None
"""

import functools
import re
from dataclasses import dataclass

import yaml

from lora_ft import config
from lora_ft.settings.plan import Hardware

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Card:
    """A file of conf/hardware/. choice: its name, as in hardware=rtx_4090. source: address of its figures."""

    choice: str
    hardware: Hardware
    source: str

    @property
    def memory_bytes(self) -> int:
        """Nominal size of the memory."""
        return bytes_of(self.hardware.memory or "0MiB")


def bytes_of(memory: str) -> int:
    """Return the bytes of a setting such as 24GiB."""
    amount, unit = re.fullmatch(r"([0-9.]+)(.*)", memory).groups()  # type: ignore[union-attr]
    return int(float(amount) * UNITS[unit])


@functools.cache
def cards() -> tuple[Card, ...]:
    """Return the devices of conf/hardware/, the smallest first."""
    found = []
    for path in sorted((config.CONF / "hardware").glob("*.yaml")):
        text = path.read_text("utf-8")
        if values := yaml.safe_load(text):
            source = re.search(r"^# source: (\S+)$", text, re.MULTILINE)
            found.append(Card(path.stem, Hardware(**values), source[1] if source else ""))
    return tuple(sorted(found, key=lambda card: (card.memory_bytes, card.choice)))


def same_card(name: str, memory_bytes: float) -> Card | None:
    """Return the entry with the name of a device; of several, the one whose memory is nearest."""
    found = [card for card in cards() if card.hardware.name == name]
    nearest = min(found, key=lambda card: abs(card.memory_bytes - memory_bytes), default=None)
    if nearest is None or abs(nearest.memory_bytes - memory_bytes) > 0.15 * memory_bytes:
        return None
    return nearest


def source_of(hardware: Hardware) -> str:
    """Return the address of the figures of these settings; "" if they are not those of one file."""
    return next((card.source for card in cards() if card.hardware == hardware), "")

"""Sample sentences of Home Assistant's intents, each with the template that it comes from.

    <turn> on [(<all>|<the>)] <light> <in> [<the>] {area}   ->   turn on the lamps in the attic     turn on

The package home-assistant-intents has the templates; names of rooms, devices and things to buy come from here.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from itertools import islice

LANGUAGE = "en"
MOST_OF_A_TEMPLATE = 3000  # sentences that are looked at; a template may have millions
FEWEST_TEMPLATES = 5  # of an intent, so that some are left for evaluation
_NUMBER = re.compile(r"\{\w+\}")  # a list of numbers, as in {timer_minutes}, which is not expanded

WORDS = {
    "area": ["bedroom", "kitchen", "office", "garage", "attic", "living room"],
    "name": ["desk lamp", "front door", "heater", "coffee machine", "curtain", "tv"],
    "floor": ["first floor", "basement", "upstairs"],
    "message": ["dinner is ready", "time to go"],
    "search_query": ["jazz for the evening", "the beatles"],
    "zone": ["work", "school"],
    "timer_name": ["pizza", "laundry"],
    "timer_command": ["open the garage door"],
    "shopping_list_item": ["milk", "apples"],
    "todo_list_item": ["call the bank", "wash the car"],
}


@dataclass(frozen=True)
class Sentence:
    """A sentence, the name of its intent in words, and its template."""

    text: str
    intent: str
    template: str


def sentences(each: int, seed: int = 0) -> list[Sentence]:
    """Return up to `each` sentences of every template of the intents with enough templates; each text once.

    A sentence that templates of two intents give is left out.
    """
    from hassil.intents import Intents, TextSlotList
    from hassil.sample import sample_sentence
    from home_assistant_intents import get_intents

    known = Intents.from_dict(get_intents(LANGUAGE))
    lists = {**known.slot_lists, **{n: TextSlotList.from_strings(w, name=n) for n, w in WORDS.items()}}
    found: dict[str, Sentence] = {}
    intents_of: dict[str, set[str]] = {}
    for name, intent in known.intents.items():
        templates = [(data, sentence) for data in intent.data for sentence in data.sentences]
        if len(templates) < FEWEST_TEMPLATES:
            continue
        for data, sentence in templates:
            rules = {**known.expansion_rules, **data.expansion_rules}
            texts = sample_sentence(sentence, lists, rules, language=LANGUAGE, expand_ranges=False)
            distinct = sorted({tidy(text) for text in islice(texts, MOST_OF_A_TEMPLATE)})
            key = int.from_bytes(hashlib.sha256(f"{seed} {name} {sentence.text}".encode()).digest()[:8])
            rng = random.Random(key)
            for pattern in rng.sample(distinct, min(each, len(distinct))):
                text = _NUMBER.sub(lambda _, rng=rng: str(rng.randint(2, 60)), pattern)
                found.setdefault(text, Sentence(text, words(name), f"{name} {sentence.text}"))
            for text in distinct:
                intents_of.setdefault(text, set()).add(name)
    return [sentence for text, sentence in found.items() if len(intents_of.get(text, ())) <= 1]


def words(intent: str) -> str:
    """Return the name of an intent in words: HassTurnOn -> turn on."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", intent.removeprefix("Hass")).lower()


def tidy(text: str) -> str:
    return " ".join(text.split())

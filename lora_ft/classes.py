"""The classes of a classifier: names in the order of its logits, as the files of a model and an adapter hold them.

    Classes(("negative", "positive"), counts=(120, 80))
    config_fields()   {"id2label": {0: "negative", ...}, "label2id": ..., "problem_type": "single_label_classification"}
    record()          the same as JSON for lora_ft.json, with the training rows of each class

No torch here: data, models and adapters use this type.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft.errors import ConfigError, MismatchError

SEQ_CLS = "SEQ_CLS"  # PEFT's name of the task
HEAD = "score"  # name of the linear head in transformers' classifiers of GPT models
MULTI_LABEL = "multi_label_classification"
_PROBLEMS = {False: "single_label_classification", True: MULTI_LABEL}


@dataclass(frozen=True)
class Classes:
    """names: of the classes, in the order of the logits. is_multi: a row may have any number of them, none included.

    counts: training rows of each class; () if they are not known. rows: number of training rows.
    """

    names: tuple[str, ...]
    is_multi: bool = False
    counts: tuple[int, ...] = ()
    rows: int = 0

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of transformers' config that describe the classes."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": _PROBLEMS[self.is_multi],
        }

    def record(self) -> dict[str, Any]:
        """Return the fields for lora_ft.json."""
        fields = self.config_fields()
        named = {str(index): name for index, name in fields["id2label"].items()}
        return fields | {"id2label": named, "counts": list(self.counts), "rows": self.rows}

    def weights(self, given: dict[str, float], *, balanced: bool) -> list[float] | None:
        """Return the weight of each class in the loss, None if all are 1. Raises ConfigError for an unknown class.

        balanced: weights that give each class the same part of the loss: rows / (classes * rows of the class), and for
        classes that do not exclude each other, rows without the class / rows with it.
        """
        if given and balanced:
            raise ConfigError(
                "objective.class_weights and objective.balanced both weight the classes: give one of them"
            )
        if unknown := [name for name in given if name not in self.names]:
            raise ConfigError(f"objective.class_weights names {unknown[0]!r}, which is none of {listed(self.names)}")
        if wrong := [name for name, weight in given.items() if not weight > 0]:
            raise ConfigError(
                f"objective.class_weights: the weight of {wrong[0]!r} must be above 0, got {given[wrong[0]]}"
            )
        if given:
            return [given.get(name, 1.0) for name in self.names]
        if not balanced:
            return None
        if not self.counts or 0 in self.counts:
            missing = self.names[self.counts.index(0)] if self.counts else self.names[0]
            raise ConfigError(f"objective.balanced=true needs training rows of each class, and {missing!r} has none")
        if self.is_multi:
            return [(self.rows - count) / count for count in self.counts]
        return [self.rows / (len(self.names) * count) for count in self.counts]


def from_record(fields: Any, where: str) -> Classes:
    """Return the classes of a record; raises MismatchError, which names the file, for one that is not valid."""
    named = fields.get("id2label") if isinstance(fields, dict) else None
    names = [named.get(str(index)) for index in range(len(named))] if isinstance(named, dict) else []
    counts = fields.get("counts") or [] if isinstance(fields, dict) else []
    is_valid = (
        len(names) > 1
        and len(set(names)) == len(names)
        and all(isinstance(name, str) for name in names)
        and fields.get("problem_type") in _PROBLEMS.values()
        and isinstance(counts, list)
        and len(counts) in (0, len(names))
        and all(type(count) is int and count >= 0 for count in [*counts, fields.get("rows", 0)])
    )
    if not is_valid:
        raise MismatchError(
            f"{where}: classifier must hold id2label (two or more different names, numbered from 0) and problem_type, "
            f"got {str(fields)[:200]}"
        )
    return Classes(tuple(map(str, names)), fields["problem_type"] == _PROBLEMS[True], tuple(counts), fields["rows"])


def unnamed(number: int) -> Classes:
    """Return classes of which only the number is known, named as transformers names them."""
    return Classes(tuple(f"LABEL_{index}" for index in range(number)))


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return names for a message; of many only the first."""
    found: Sequence[str] = list(names)
    return ", ".join(found[:most]) + (f", ... ({len(found)} in all)" if len(found) > most else "")

"""Read ChatterBot's corpus of conversations as chats (PyPI chatterbot-corpus, BSD-3; one YAML file per topic).

    categories: [AI]
    conversations:
    - - What is AI?                      ->  ai.yml:4  user: What is AI?
      - The science of ...                            assistant: The science of ...

The YAML nodes are read without constructing values: nodes have line numbers, and `- Yes` stays text.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from lora_ft.data.rows import Ledger, Message, Record, excerpt
from lora_ft.errors import DataError

# Topics in which a list of more than two lines holds several answers to its first line, not a dialogue. Nothing in
# the files marks these lists; the topics were found by reading the English corpus.
_SEVERAL_ANSWERS = ("computers", "emotion")


def conversations(data: bytes, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield rows with `messages`, whose lines are by user and assistant in turn. Raises DataError for another file.

    A last line of the user has no answer to learn; it is left out and counted in the ledger.
    """
    topic = label.rpartition("/")[2].partition(".")[0]
    for conversation in _conversation_nodes(data, label):
        line = conversation.start_mark.line
        # A string instead of a list is a question without an answer; the corpus has eight.
        nodes = conversation.value if isinstance(conversation, yaml.SequenceNode) else [conversation]
        if not all(isinstance(node, yaml.ScalarNode) for node in nodes):
            shown = data.split(b"\n", line + 1)[line].decode("utf-8", "replace")
            ledger.add_bad(f"{label}:{line + 1}", "conversations", "must be lists of lines", shown)
        elif topic in _SEVERAL_ANSWERS and len(nodes) > 2:
            for node in nodes[1:]:
                yield f"{label}:{node.start_mark.line + 1}", {"messages": _dialogue([nodes[0], node])}
        else:
            ledger.left_out["user turns without an answer"] += len(nodes) % 2
            if len(nodes) > 1:
                yield f"{label}:{line + 1}", {"messages": _dialogue(nodes[: len(nodes) // 2 * 2])}


def _conversation_nodes(data: bytes, label: str) -> list[Any]:
    try:
        root = yaml.compose(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{label}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{label}: not YAML: {excerpt(error)}") from None
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "conversations" and isinstance(value, yaml.SequenceNode):
            return list(value.value)
    raise DataError(f"{label}: must hold `conversations`, a list of lists of lines")


def _dialogue(nodes: list[Any]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": node.value.strip()} for i, node in enumerate(nodes)]

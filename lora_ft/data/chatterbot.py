"""ChatterBot's corpus of conversations as chat rows (PyPI chatterbot-corpus, BSD-3; one YAML file a topic).

    categories: [AI]
    conversations:
    - - What is AI?                      ->  ai.yml:4  user: What is AI?
      - The science of ...                            assistant: The science of ...

The syntax tree is read, not loaded: it has line numbers, keeps `- Yes` the word it is, and constructs nothing.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from lora_ft.data.rows import Ledger, Message, Record, excerpt
from lora_ft.errors import DataError

# Topics whose longer lists hold other answers to the first line, not a dialogue. Nothing in the files
# tells the two apart: all longer lists of the English corpus were read.
_ALTERNATIVES = ("computers", "emotion")


def conversations(text: str, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield `messages` rows, lines spoken in turn by user and assistant; DataError where the file is no such corpus.

    A last line of the user has no answer to learn from: it is left out and counted in the ledger.
    """
    topic = label.rpartition("/")[2].partition(".")[0]
    for conversation in _conversation_nodes(text, label):
        source = f"{label}:{conversation.start_mark.line + 1}"
        # A lone string where a list belongs is a question without an answer (the corpus has eight).
        nodes = conversation.value if isinstance(conversation, yaml.SequenceNode) else [conversation]
        if not all(isinstance(node, yaml.ScalarNode) for node in nodes):
            shown = text.split("\n", conversation.start_mark.line + 1)[conversation.start_mark.line]
            ledger.add_bad(source, "conversations", "must be lists of lines", shown)
        elif topic in _ALTERNATIVES and len(nodes) > 2:
            for node in nodes[1:]:
                yield f"{label}:{node.start_mark.line + 1}", {"messages": _dialogue([nodes[0], node])}
        else:
            ledger.left_out["user turns without an answer"] += len(nodes) % 2
            if len(nodes) > 1:
                yield source, {"messages": _dialogue(nodes[: len(nodes) // 2 * 2])}


def _conversation_nodes(text: str, label: str) -> list[Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        root = yaml.compose(text, loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{label}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{label}: not YAML: {excerpt(error)}") from None
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "conversations" and isinstance(value, yaml.SequenceNode):
            return list(value.value)
    raise DataError(f"{label}: must hold `conversations`, a list of lists of lines")


def _dialogue(nodes: list[Any]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": node.value.strip()} for i, node in enumerate(nodes)]

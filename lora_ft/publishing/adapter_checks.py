"""Find faults of an adapter's files that concern every program that loads it.

    REFUSED  3 of 84 tensors hold NaN or infinities, first ...
    REFUSED  model.layers.0.mlp.up_proj has no lora_B: a tensor is missing or was renamed
    WARN     adapter_config.json names the base '/home/me/tiny', which is not a hub id

Tensors are read one at a time; names and shapes of the base come from its config.
"""

from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch

from lora_ft.adapters.peft_folder import CONFIG, WEIGHTS
from lora_ft.adapters.tensor_names import ENDS, is_in_full
from lora_ft.io import untrusted
from lora_ft.publishing.adapter_facts import AdapterFacts, Finding, Level, front_matter, is_named

# With these settings, names and shapes of A and B follow other rules.
_OTHER_SHAPES = ("layer_replication", "use_qalora", "use_bdlora", "megatron_config", "kasa_config",
                 "monteclora_config", "velora_config", "arrow_config")  # fmt: skip


def check(folder: Path, facts: AdapterFacts) -> Iterator[Finding]:
    """Yield the problems found while reading the folder, then the faults of its content."""
    yield from facts.problems
    if facts.layers or facts.whole:
        yield from _values(folder / WEIGHTS)
        yield from _pairs(facts)
        if not any(facts.config.get(name) for name in _OTHER_SHAPES):
            yield from _ranks(facts)
            yield from _targets(facts)
            yield from _unnamed(facts)
            yield from _base_mismatches(facts)
    yield from _modes(folder, facts.names)
    yield from _naming(facts)
    yield from _other_files(folder, facts.names)


def _values(path: Path) -> Iterator[Finding]:
    """Find tensors that are not finite, and matrices B of zeros, which change nothing."""
    broken, zero, matrices = [], [], 0
    with safetensors.safe_open(path, framework="pt") as file:
        keys = sorted(file.keys())
        for key in keys:
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                broken.append(key)
            if ".lora_B" in key or ".lora_embedding_B" in key:
                matrices += 1
                zero += [key] if not tensor.any() else []
    if broken:
        yield Finding(Level.REFUSED, f"{len(broken)} of {len(keys)} tensors hold NaN or infinities, first {broken[0]}",
                      "train again with a lower learning rate; these numbers cannot be repaired")  # fmt: skip
    if zero and len(zero) == matrices:
        yield Finding(Level.REFUSED, "every lora_B is zero: the adapter changes nothing", "it was never trained")
    elif zero:
        yield Finding(Level.WARN, f"{len(zero)} of {matrices} lora_B are zero, first {zero[0]}",
                      "these layers did not train")  # fmt: skip


def _pairs(facts: AdapterFacts) -> Iterator[Finding]:
    for layer, (a, b) in facts.layers.items():
        if a is None or b is None:
            yield Finding(Level.REFUSED, f"{layer} has no {'lora_A' if a is None else 'lora_B'}: a tensor is missing "
                          "or was renamed", "use the file that the trainer wrote")  # fmt: skip
            return


def _ranks(facts: AdapterFacts) -> Iterator[Finding]:
    pattern = facts.config.get("rank_pattern")
    known = {facts.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())}
    for layer, (a, b) in facts.layers.items():
        if _is_of_parameters(facts, layer):
            continue
        if a and b and (len(a) < 2 or len(b) < 2 or a[0] != b[1] or a[0] not in known):
            yield Finding(Level.REFUSED, f"{layer} has A {list(a)} and B {list(b)}, which do not match a rank in "
                          f"{CONFIG} ({', '.join(map(str, sorted(map(str, known))))})",
                          "use the weights and the config of one adapter")  # fmt: skip
            return


def _targets(facts: AdapterFacts) -> Iterator[Finding]:
    """Compare names in config and weights: PEFT drops or re-initializes unmatched layers with only a warning."""
    targets = facts.config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return
    untargeted = [
        layer
        for layer in facts.layers
        if not any(is_named(layer, t) for t in targets) and not _is_of_parameters(facts, layer)
    ]
    if untargeted:
        yield Finding(Level.REFUSED, f"{untargeted[0]} is in the weights, but is not a target of {CONFIG}: PEFT "
                      "would drop it with a warning",
                      "a tensor was renamed, or the config belongs to another adapter")  # fmt: skip
    unmatched = [t for t in targets if not any(is_named(layer, t) for layer in facts.layers)]
    expected = [t for t in unmatched if facts.has_layer(t)]
    if expected:
        yield Finding(Level.REFUSED, f"target {expected[0]} of {CONFIG} has no tensor: PEFT would initialize it",
                      "a tensor is missing or was renamed")  # fmt: skip
    elif unmatched and not facts.base_shapes:
        yield Finding(Level.WARN, f"target {unmatched[0]} of {CONFIG} has no tensor: one is missing, or the base "
                      "has no such layer", "name the base with model=")  # fmt: skip


def _is_of_parameters(facts: AdapterFacts, layer: str) -> bool:
    """Return True for A and B of a parameter (target_parameters), of which PEFT's file names only the module."""
    named = facts.config.get("target_parameters")
    owners = [str(name).rpartition(".")[0] for name in named] if isinstance(named, list) else []
    return any(not owner or is_named(layer.replace(".base_layer", ""), owner) for owner in owners)


def _unnamed(facts: AdapterFacts) -> Iterator[Finding]:
    """Find tensors that are neither A nor B and that modules_to_save does not name."""
    saved = facts.config.get("modules_to_save")
    saved = saved if isinstance(saved, list) else []
    if facts.config.get("bias", "none") == "none":
        for key in facts.whole:
            layer = key.rpartition(".")[0].removesuffix(".base_layer")
            if layer.rpartition(".")[2] not in ENDS and not is_in_full(layer, saved):
                yield Finding(Level.REFUSED, f"{key} is not part of a LoRA, and modules_to_save does not name it",
                              "a tensor was renamed, or the config belongs to another adapter")  # fmt: skip
                return


def _base_mismatches(facts: AdapterFacts) -> Iterator[Finding]:
    """Find layers that the base does not have, or has in other sizes."""
    shapes, vocabulary = facts.base_shapes, facts.base_config.get("vocab_size")
    for layer, (a, b) in facts.layers.items() if shapes else ():
        if _is_of_parameters(facts, layer):
            continue
        if ".experts." in layer:  # transformers 5 keeps experts in one tensor, and PEFT converts older adapters for it
            continue
        weight = shapes.get(f"{layer}.weight")
        if weight is None:
            yield Finding(
                Level.REFUSED, f"the base has no layer {layer}", "name the base that the adapter was trained on"
            )
            return
        # A layer with the vocabulary's size may have added tokens, which compatibility.py reports.
        if a and b and weight[0] != vocabulary and {a[-1], b[0]} != set(weight):
            yield Finding(Level.REFUSED, f"{layer} is {list(weight)} in the base, but A is {list(a)} "
                          f"and B {list(b)}", "name the base that the adapter was trained on")  # fmt: skip
            return


def _modes(folder: Path, names: frozenset[str]) -> Iterator[Finding]:
    unreadable = sorted(n for n in names if (folder / n).stat().st_mode & 0o044 != 0o044)
    if unreadable:
        mode = (folder / unreadable[0]).stat().st_mode & 0o777
        yield Finding(Level.WARN, f"{unreadable[0]} has mode {mode:04o}: servers that run as another user cannot read "
                      "it (safetensors issue 782)", "chmod 644; publishing does that as well")  # fmt: skip


def _naming(facts: AdapterFacts) -> Iterator[Finding]:
    base = facts.config.get("base_model_name_or_path")
    if facts.config and not untrusted.is_public_id(base):
        fault = "names no base" if not base else f"names the base {str(base)[:80]!r}, which is not a hub id"
        yield Finding(Level.WARN, f"{CONFIG} {fault}: others cannot find it", "publish with model.hub_id=OWNER/NAME")
    elif facts.config and not facts.config.get("revision"):
        yield Finding(Level.WARN, "no revision of the base is recorded: the base may change",
                      "train with model.path=OWNER/NAME model.revision=COMMIT")  # fmt: skip


def _other_files(folder: Path, names: frozenset[str]) -> Iterator[Finding]:
    if not front_matter(folder / "README.md").get("license"):
        yield Finding(Level.WARN, "no license: README.md does not name one", "publish with license=NAME")
    if pickled := sorted(n for n in names if n.endswith((".bin", ".pt", ".pth"))) if WEIGHTS in names else []:
        yield Finding(Level.WARN, f"{pickled[0]} is in the folder and can run code when loaded", "delete it")
    if "added_tokens.json" in names:
        yield Finding(Level.WARN, "added_tokens.json is in the folder: SGLang counts all its tokens as new ones",
                      "delete it")  # fmt: skip

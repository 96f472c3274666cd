"""What this machine could do: its sustained fp32 GEMM rate, and the operations that a token needs.

    ceiling in tokens/s = GEMM rate [FLOP/s] / FLOP a token

Counted is what the maths of LoRA over a frozen base needs, each product once: what a trainer computes again
(checkpointing, attention's scores in the backward) is its own affair, and so is everything that is no product.
Shapes: T tokens, E hidden size, F intermediate size, V words, r rank, S length of a row.

python benchmarks/ceiling.py CASE [SECONDS_PER_SHAPE]     prints {"gemm_flop_per_second": ..., "shapes": {...}}
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HEAD_ROWS, HEAD_WORDS = 256, 2048  # positions whose logits are made at a time, and words of the head
# Where a product can be written in two ways, the faster counts: the ceiling must not be too low.
_FORMS = {"head": ("x W'", "W x' in blocks"), "head, backward": ("x W", "W' x")}


@dataclass(frozen=True)
class Flop:
    """Floating-point operations of forward and backward over some rows; a multiply-add is two.

    linears: W x, and W'dy but for the first layer's query, key and value, whose input needs no gradient.
    head: its logits and their gradient, on supervised positions. attention: causal, within rows. lora: A and B.
    """

    linears: int
    head: int
    attention: int
    lora: int

    @property
    def total(self) -> int:
        return self.linears + self.head + self.attention + self.lora


def linear_shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers of one block of a llama-like model."""
    e, f = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or e // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {"q": (e, q), "k": (e, kv), "v": (e, kv), "o": (q, e), "gate": (e, f), "up": (e, f), "down": (f, e)}


def flop(config: dict[str, int], lengths: Sequence[int], supervised: int, r: int) -> Flop:
    """Operations of one forward and backward over rows of these lengths; `supervised` positions have a loss."""
    shapes, layers, tokens = linear_shapes(config), config["num_hidden_layers"], sum(lengths)
    inputs_of_first = [shapes[name] for name in ("q", "k", "v")]
    product = sum(i * o for i, o in shapes.values())
    # Forward and backward for x, less the first layer's.
    linears = 2 * tokens * (2 * layers * product - sum(i * o for i, o in inputs_of_first))
    # Forward, backward for x, and for A and B: three products each with A and with B.
    lora = 2 * tokens * r * (3 * layers * sum(i + o for i, o in shapes.values()) - sum(i for i, _ in inputs_of_first))
    # Scores and their product with v; in the backward the gradients of q, k, v and of the probabilities.
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = 2 * 6 * layers * shapes["q"][1] * pairs
    head = 2 * 2 * supervised * config["hidden_size"] * config["vocab_size"]
    return Flop(linears, head, attention, lora)


def case_flop(case: Path) -> tuple[Flop, int]:
    """Operations of all training rows of a case, and their tokens."""
    settings = json.loads((case / "settings.json").read_text("utf-8"))
    config = json.loads((Path(settings["model"]) / "config.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (case / "train_ids.jsonl").read_text("utf-8").splitlines()]
    lengths = [len(row["input_ids"]) for row in rows]
    supervised = sum(label != -100 for row in rows for label in row["labels"][1:])
    return flop(config, lengths, supervised, settings["r"]), sum(lengths)


def gemm_flop_per_second(case: Path, seconds: float) -> dict[str, float]:
    """Sustained rate of each shape that a step of this case multiplies, and of their mix as the model weighs them."""
    import torch

    settings = json.loads((case / "settings.json").read_text("utf-8"))
    config = json.loads((Path(settings["model"]) / "config.json").read_text("utf-8"))
    total, tokens = case_flop(case)
    step, e = tokens // settings["steps"], config["hidden_size"]
    shapes = {
        **{name: (step, i, o) for name, (i, o) in linear_shapes(config).items()},
        **{f"{name}, backward": (step, o, i) for name, (i, o) in linear_shapes(config).items()},
        "head": (HEAD_ROWS, e, config["vocab_size"]), "head, backward": (HEAD_ROWS, config["vocab_size"], e),
    }  # fmt: skip
    forms = {name: _FORMS.get(name, ("x W",) if "backward" in name else ("x W'",)) for name in shapes}
    rates = {name: max(_rate(torch, shapes[name], form, seconds) for form in forms[name]) for name in shapes}
    work = {name: i * o for name, (_, i, o) in shapes.items()}
    linears = {name: rate for name, rate in rates.items() if "head" not in name}
    of_linears = sum(work[n] for n in linears) / sum(work[n] / rate for n, rate in linears.items())
    of_head = 2 / sum(1 / rates[name] for name in ("head", "head, backward"))
    mix = total.total / ((total.total - total.head) / of_linears + total.head / of_head)
    return {"mix": mix, **rates}


def _rate(torch, shape: tuple[int, int, int], form: str, seconds: float) -> float:
    """FLOP/s of x [t, i] times a weight [i, o], after one to warm up."""
    products = _products(torch, shape, form)

    def multiply() -> None:
        for left, right, out in products:
            torch.mm(left, right, out=out)

    multiply()
    times, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not times:
        multiply()
        times += 1
    t, i, o = shape
    return 2 * t * i * o * times / elapsed


def _products(torch, shape: tuple[int, int, int], form: str) -> list[tuple]:
    """(left, right, out) of each product of a form; the names are the stored tensors', a ' turns one.

    The forms with W in front leave the product turned, [o, t]. In blocks: HEAD_WORDS rows of W at a time, as
    lora_ft/ops/cross_entropy.py does.
    """
    t, i, o = shape
    if form == "x W'":
        return [(torch.randn(t, i), torch.randn(o, i).T, torch.empty(t, o))]
    if form == "x W":
        return [(torch.randn(t, i), torch.randn(i, o), torch.empty(t, o))]
    if form == "W' x":  # the gradient of the logits lies turned already
        return [(torch.randn(i, o).T, torch.randn(i, t), torch.empty(o, t))]
    x, weight, out = torch.randn(t, i), torch.randn(o, i), torch.empty(o, t)
    blocks = zip(weight.split(HEAD_WORDS), out.split(HEAD_WORDS), strict=True)
    return [(words, x.T, of_words) for words, of_words in blocks]


def main() -> None:
    case, seconds = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.5
    total, tokens = case_flop(case)
    rates = gemm_flop_per_second(case, seconds)
    shown = {"gemm_flop_per_second": rates.pop("mix"), "shapes": rates, "flop": asdict(total), "tokens": tokens}
    sys.stdout.write(json.dumps(shown) + "\n")


if __name__ == "__main__":
    main()

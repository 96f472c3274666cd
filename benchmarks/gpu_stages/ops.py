"""Operations in bfloat16, forward and backward, each against its plain form in float32 (checks.py).

Attention within documents; norm, gated activation and rotary embedding of each kind of kernels; the loss; LoRA layers
over 16-bit, NF4 and int8 weights at several numbers of rows, on which their kernels depend.
"""

import importlib.util
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from gpu_stages.bases import base, write_rows
from gpu_stages.checks import FLOOR, compare, judge, values, weighting
from gpu_stages.setting import NotHere, Part, Setting, attempt
from gpu_stages.training import compose, settings
from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.models.acceleration import accelerated_lora
from lora_ft.models.load import load_base
from lora_ft.models.quantize import dequantize_reference
from lora_ft.ops import attention, kernels
from lora_ft.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_plain
from lora_ft.ops.mlp import gated_plain
from lora_ft.ops.norm import rms_norm_plain
from lora_ft.ops.rope import rotate_plain

DTYPE = torch.bfloat16
ROWS = (1, 8, 300, 2048)  # bitsandbytes has other kernels for few rows than for many
SCALING = 2.0


def run(setting: Setting) -> Iterator[Part]:
    for width in (64, 80, 128):
        for heads, groups, window in ((8, 2, None), (8, 2, setting.sized(40, 8)), (4, 4, None)):
            name = f"attention {heads}/{groups} heads of {width}" + (f", window {window}" if window else "")
            yield name, attempt(packed, setting, heads, groups, width, window)
    yield "loss", attempt(loss, setting)
    for kind in ("none", "nf4", "int8"):
        yield from lora(setting, kind)
    for kind in ("eager", "liger", "compile"):
        for offset in (0.0, 1.0):
            yield f"norm with offset {offset:.0f}, {kind}", attempt(norm, setting, kind, offset)
        for activation in ("silu", "gelu_tanh"):
            yield f"gated {activation}, {kind}", attempt(gated, setting, kind, activation)
        yield f"rope, {kind}", attempt(rope, setting, kind)


def draw(setting: Setting, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return drawn.to(setting.device, DTYPE)


def packed(setting: Setting, heads: int, groups: int, width: int, window: int | None) -> dict[str, Any]:
    """Compare packed attention over 30 documents, one of a single token, with a dense mask."""
    lengths = [1 + n * 37 % setting.sized(300, 20) for n in range(30)]
    starts = [0, *accumulate(lengths)]
    tokens = starts[-1]
    inputs = [draw(setting, 1, of, tokens, width, seed=of + n) for n, of in enumerate((heads, groups, groups))]
    document = torch.repeat_interleave(torch.arange(30), torch.tensor(lengths)).to(setting.device)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = (distance >= 0) & (distance < (window or tokens))
    mask = visible.to(setting.device) & (document[:, None] == document)

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.packed_causal_attention(
            nn.Module(), q, k, v, None, document_starts=starts, sliding_window=window
        )[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    kernel = attention.choose_kernel(torch.device(setting.device), DTYPE, width)
    return compare(fast, plain, inputs) | {"kernel": kernel.name, "tokens": tokens}


def loss(setting: Setting) -> dict[str, Any]:
    """Compare the loss of the head with the definition: sum and gradient of the hidden states."""
    tokens, width, words = setting.sized((1000, 1024, 128_256), (40, 32, 500))
    hidden, weight = draw(setting, tokens, width), draw(setting, words, width, seed=1, scale=width**-0.5)
    targets = torch.randint(words, (tokens,), generator=torch.Generator().manual_seed(2)).to(setting.device)
    return compare(
        lambda h: linear_cross_entropy(h, weight.to(h.dtype), None, targets),
        lambda h: linear_cross_entropy_plain(h, weight.to(h.dtype), None, targets),
        [hidden],
    )


def chosen(setting: Setting, kind: str) -> kernels.Kernels:
    """Return the kernels of a kind; raises NotHere if they cannot run here."""
    if kind == "eager":
        return kernels.OWN
    if kind == "compile":  # a CPU compiles with a C++ compiler, which may be absent: there, only the graphs are made
        return kernels.compiled_kernels(setting.sized("inductor", "eager"))
    if setting.dry or importlib.util.find_spec("liger_kernel") is None:
        raise NotHere("liger-kernel needs a GPU" if setting.dry else "liger-kernel is not installed")
    return kernels.liger_kernels()


def norm(setting: Setting, kind: str, offset: float) -> dict[str, Any]:
    of = chosen(setting, kind)
    rows, width = setting.sized((2048, 4096), (30, 64))
    weight, x = 1 + draw(setting, width, seed=1, scale=0.1), draw(setting, 1, rows, width)
    return compare(
        lambda x: of.rms_norm(x, weight.to(x.dtype), 1e-5, offset),
        lambda x: rms_norm_plain(x, weight.to(x.dtype), 1e-5, offset),
        [x],
    )


def gated(setting: Setting, kind: str, activation: str) -> dict[str, Any]:
    of = chosen(setting, kind)
    rows, width = setting.sized((2048, 14_336), (30, 64))
    return compare(
        lambda gate, up: of.gated(gate, up, activation),
        lambda gate, up: gated_plain(gate, up, activation),
        [draw(setting, 1, rows, width, seed=n) for n in range(2)],
    )


def rope(setting: Setting, kind: str) -> dict[str, Any]:
    of = chosen(setting, kind)
    tokens, width = setting.sized((2048, 128), (30, 16))
    angles = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(width // 2) / (width // 2))
    angles = torch.cat((angles, angles), dim=-1)[None].to(setting.device)

    def both(turn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        def turned(q: Tensor, k: Tensor) -> Tensor:
            return torch.cat([x.flatten() for x in turn(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))])

        return turned

    # Heads lie beside tokens in memory, as projections leave them.
    inputs = [draw(setting, 1, tokens, heads, width, seed=heads).transpose(1, 2) for heads in (8, 2)]
    plain = both(lambda q, k, cos, sin: (rotate_plain(q, cos, sin), rotate_plain(k, cos, sin)))
    return compare(both(of.rotate), plain, inputs)


def lora(setting: Setting, kind: str) -> Iterator[Part]:
    """Compare a LoRA layer of a base loaded by lora_ft, and the bare layer, with plain products."""
    found: dict[str, Any] = {}

    def load() -> dict[str, Any]:
        shape, layers = setting.sized(("qwen3_0_6b", 1), ("tiny", 1))
        overrides = settings(base(setting, shape, layers), write_rows(setting, [8], "ops"), 8, 1, f"quant={kind}")
        cfg = compose(setting, overrides)
        cfg.model.dtype = config.Dtype.bfloat16  # also on a GPU where auto is another
        model = load_base(cfg.model, cfg.quant, cfg.device).model
        peft_model = attach.attach(model, cfg.adapter, "default", 0, [])
        found.update(model=peft_model.train(), fast=cfg.fast, layer=model.model.layers[0].mlp.down_proj)
        return {}

    loaded = attempt(load)
    if loaded:
        yield f"lora, {kind}", loaded
        return
    for rows in setting.sized(ROWS, (1, 8, 60)):
        yield f"lora, {kind}, {rows} rows", attempt(layer_check, setting, found, rows)
        if kind == "nf4":
            yield f"product, {kind}, {rows} rows", attempt(product, setting, found["layer"], rows)


def weight_of(layer: Any, device: str) -> Tensor:
    """Return the float32 weight by which a layer multiplies."""
    quantized = layer.weight.dtype in (torch.uint8, torch.int8)
    return (dequantize_reference(layer) if quantized else layer.weight.detach().float()).to(device)


def product(setting: Setting, layer: Any, rows: int) -> dict[str, Any]:
    """Compare bitsandbytes' product with that of the dequantized weight."""
    bare, weight = layer.get_base_layer(), weight_of(layer.get_base_layer(), setting.device)
    x = draw(setting, 1, rows, weight.shape[1])
    return compare(bare, lambda x: linear(x, weight.to(x.dtype)), [x])


def layer_check(setting: Setting, loaded: dict[str, Any], rows: int) -> dict[str, Any]:
    """Compare the accelerated LoRA layer with the definition, for x, A and B."""
    layer = loaded["layer"]
    weight = weight_of(layer.get_base_layer(), setting.device)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(draw(setting, *a.shape, seed=1, scale=a.shape[1] ** -0.5))
        b.copy_(draw(setting, *b.shape, seed=2, scale=0.02))
    x = draw(setting, 1, rows, weight.shape[1])

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear(x, weight.to(x.dtype)) + linear(linear(x, a), b) * SCALING

    leaf = x.clone().requires_grad_()
    a.grad = b.grad = None
    with accelerated_lora(loaded["model"], "default", loaded["fast"]) as reasons:
        y = layer(leaf)
        y.backward(weighting(y))
    gradients = dict(enumerate((leaf.grad, a.grad, b.grad)))
    found = {"value": y.detach().float(), **{f"gradient {n}": g.float() for n, g in gradients.items() if g is not None}}
    inputs = [x, a.detach().to(DTYPE), b.detach().to(DTYPE)]
    exact = values(plain, [x.float(), a.detach(), b.detach()])
    return judge(found, values(plain, inputs), exact, FLOOR[DTYPE]) | {"log": reasons}

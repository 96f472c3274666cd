"""adapter.experts: the matrices of experts train, are saved, merged and detached, as PEFT alone does it."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import packed_models
import pytest
import torch
from finished import adapted, finished_run, settings
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save
from states import SETTINGS, detach, state_on, trained
from test_training import plain_loop
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import zoo_config, zoo_folder, zoo_model

import lora_ft
from lora_ft import config
from lora_ft.adapters import attach, audit, files, peft_folder, provenance, summary, targets
from lora_ft.adapters.experts import update
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.export import combine, lora_weights
from lora_ft.memory.trace import trace_step
from lora_ft.models.acceleration import accelerated_lora
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import Base, Identity, load_base, load_tokenizer
from lora_ft.models.meta_model import load_meta_model
from lora_ft.ops.expert_codes import is_quantized
from lora_ft.publishing import compatibility, verify_worker
from lora_ft.publishing.adapter_facts import Level
from lora_ft.training import checkpoint

# Experts are laid out otherwise in gpt_oss, and PEFT takes names of deepseek_v3's other layers for experts.
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
# PEFT alone reads a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(40)[None] * 37 % 512


def by_night(*cases: tuple[object, ...]) -> list[object]:
    return [pytest.param(*case, marks=pytest.mark.nightly) for case in cases]


def attached(name: str, dtype: torch.dtype = torch.float32, seed: int = 1, **adapter: object) -> PeftModel:
    base = zoo_model(name, dtype=dtype).requires_grad_(False)
    return attach.attach(base, config.Adapter(r=2, **adapter), "first", seed, [])


def wrappers(model: PeftModel) -> dict[str, ParamWrapper]:
    """Return PEFT's wrappers by the name of their parameter."""
    return {
        f"{name.removeprefix('base_model.model.')}.{module.parameter_name}".replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_of_every_expert_learns_what_a_plain_peft_loop_teaches(name: str, tmp_path: Path) -> None:
    train = dataclasses.replace(SETTINGS["train"], max_steps=20)
    state = state_on(zoo_model(name, dtype=torch.float64), tmp_path, train=train)
    found = trained(state)
    expected, losses = plain_loop(zoo_model(name, dtype=torch.float64).requires_grad_(False), state, masked=False)
    assert len(losses) == 20
    assert state.losses == pytest.approx(losses, rel=1e-6)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    matrices = 0
    for parameter, wrapper in wrappers(state.model).items():
        if wrapper.num_experts == 1:
            continue
        (a, b) = (state.start[f"{n}.default.weight"] for n in self_names(state.model, wrapper))
        moved_a = (wrapper.lora_A["default"].weight.cpu() != a).view(4, -1)
        moved_b = (wrapper.lora_B["default"].weight.cpu() != b).view(len(b), -1, 4)
        assert moved_a.any(1).all() and moved_b.any(0).any(0).all(), parameter
        matrices += 2
    assert matrices == {"deepseek_v3": 4}.get(name, 8)
    detach(state)


def self_names(model: PeftModel, wrapper: ParamWrapper) -> list[str]:
    (name,) = (name for name, module in model.named_modules() if module is wrapper)
    return [f"{name}.lora_A", f"{name}.lora_B"]


def test_initial_matrices_depend_on_the_seed_alone_and_are_float32() -> None:
    torch.manual_seed(5)
    first, again, other = (attach.trainable(attached("qwen3_moe", seed=s), "first") for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if ".lora_A." in n)
    half = attached("deepseek_v3", torch.bfloat16)
    parameters = attach.trainable(half, "first")
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert audit.check_trainable(half, "first", parameters) == sum(p.numel() for p in parameters.values())
    half.train()(input_ids=IDS, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    audit.check_gradients(parameters)
    assert {p.grad.dtype for p in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("experts", [{}, {"target_modules": ["experts.gate_up_proj"]}])
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_detached_base_is_the_same_to_the_bit_and_names_its_parameters_in_the_same_order(
    name: str, experts: dict[str, list[str]]
) -> None:
    """By their order PEFT names the matrices of the next adapter. Its own forward changes the order."""
    base = zoo_model(name).requires_grad_(False)
    before, names, expected = fingerprint(base), list(dict(base.named_parameters())), logits(base)
    classes = [type(module) for module in base.modules()]
    model = attach.attach(base, config.Adapter(r=2, **experts), "first", 1, [])
    wrapped = list(wrappers(model))
    logits(model)
    attach.detach(base)
    assert fingerprint(base) == before
    assert list(dict(base.named_parameters())) == names
    assert [type(module) for module in base.modules()] == classes
    assert torch.equal(logits(base), expected)
    assert not any(p.requires_grad for p in base.parameters())
    assert list(wrappers(attach.attach(base, config.Adapter(r=2, **experts), "first", 1, []))) == wrapped


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("gpt_oss", "none"),
        ("deepseek_v3", "none"),
        ("mixtral", "nf4"),
        *by_night(("qwen3_moe", "none"), ("mixtral", "none"), ("qwen3_moe", "nf4"), ("gpt_oss", "nf4")),
        *by_night(("deepseek_v3", "nf4")),
    ],
)
def test_saved_adapter_in_peft_alone_and_merged_model_compute_the_attached_logits(
    name: str, quant: str, tmp_path: Path
) -> None:
    zoo_folder(tmp_path, name)
    run = finished_run(tmp_path, name, quant=quant)
    base, model = adapted(settings(tmp_path, name, quant=quant))
    loaded, _ = lora_ft.load(run, ["device=cpu"])
    assert torch.equal(logits(loaded), logits(model))
    if quant == "none":  # PEFT alone would replace the codes of experts that lora_ft quantized
        attach.detach(base.model)
        alone = PeftModel.from_pretrained(base.model, run / "adapter")
        assert torch.equal(logits(alone), logits(loaded))
    lora_ft.merge(run, tmp_path / "merged", ["device=cpu", *(["base_weights=dequantized"] if quant == "nf4" else [])])
    merged = type(base.model).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    difference = (logits(merged) - logits(loaded)).norm() / logits(loaded).norm()
    assert difference < (2e-5 if quant == "none" else 2e-3)  # 4-bit products on a CPU round, too


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT knows layers only, and errs
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
def test_patterns_hold_for_experts_and_for_layers_that_are_adapted_as_parameters(tmp_path: Path) -> None:
    ranks, alphas = {"gate_up_proj": 3, "gate_proj": 5, "o_proj": 4}, {"experts.down_proj": 7.0, "up_proj": 9.0}
    model = attached("deepseek_v3", rank_pattern=ranks, alpha_pattern=alphas)
    found = {name: (module.r["first"], module.lora_alpha["first"]) for name, module in wrappers(model).items()}
    for name, (rank, alpha) in found.items():
        layer = name.removesuffix(".weight").rpartition(".")[2]
        assert rank == ranks.get(layer, 2)
        assert alpha == (7.0 if ".experts.down" in name else 9.0 if layer == "up_proj" else 32.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in attach.trainable(model, "first").values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    source = provenance.Provenance(Identity("x/y", None, None, None, "c", None), config.Quant(), None)
    files.save(model, "first", tmp_path / "adapter", tiny_tokenizer(), source)
    alone = PeftModel.from_pretrained(zoo_model("deepseek_v3"), tmp_path / "adapter")
    assert torch.equal(logits(alone), logits(model.eval()))
    assert torch.equal(logits(files.load(zoo_model("deepseek_v3"), tmp_path / "adapter", "x")), logits(model))
    with pytest.raises(ConfigError, match=r"adapter\.rank_pattern: gate_up matches no adapted layer"):
        attached("deepseek_v3", rank_pattern={"gate_up": 3})


@pytest.mark.parametrize(("name", "quant"), [("gpt_oss", "nf4"), ("deepseek_v3", "int8"), ("mixtral", "nf4")])
def test_quantized_experts_have_the_gradients_of_dequantized_ones_and_keep_their_codes(
    name: str, quant: str, tmp_path: Path
) -> None:
    zoo_folder(tmp_path, name)
    found = []
    for as_codes in (True, False):
        base, _ = base_of(tmp_path, name, quant)
        if not as_codes:
            dequantize_experts(base.model)
        before = fingerprint(base.model)
        model = attach.attach(base.model, config.Adapter(r=2, target_modules=[*BOTH, "o_proj"]), "first", 0, [])
        parameters = attach.trainable(model, "first")
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters.values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        loss = model.train()(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(parameters.values()))])
        assert fingerprint(base.model) == before
    for codes, values in zip(*found, strict=True):
        assert (codes - values).norm() < 1e-5 * values.norm()


def dequantize_experts(model: torch.nn.Module) -> None:
    for module in model.modules():
        if names := [key for key, parameter in module._parameters.items() if is_quantized(parameter)]:
            values = {key: torch.nn.Parameter(getattr(module, key), requires_grad=False) for key in names}
            module.__class__ = type(module).__mro__[1]
            module._parameters.update(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("gpt_oss", BOTH), ("qwen3_moe", BOTH[:1]), *by_night(("deepseek_v3", BOTH), ("mixtral", BOTH[1:]))],
)
def test_fast_experts_have_the_gradients_of_float64(name: str, targets: list[str], dtype: torch.dtype) -> None:
    """In bfloat16 their error is about that of PEFT's own forward."""
    base = zoo_model(name, dtype=torch.float64).to(dtype).to(torch.float64)

    def of(model: torch.nn.Module, is_fast: bool) -> list[Tensor]:
        made = attach.attach(model.requires_grad_(False), config.Adapter(r=2, target_modules=targets), "first", 0, [])
        generator = torch.Generator().manual_seed(0)
        for parameter in attach.trainable(made, "first").values():
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        with accelerated_lora(made, "first", config.Fast(lora=is_fast)) as reasons:
            assert is_fast == (reasons == [])
            loss = made.train()(input_ids=IDS, use_cache=False).logits.double().logsumexp(-1).sum()
            return [g.double() for g in torch.autograd.grad(loss, list(attach.trainable(made, "first").values()))]

    exact = of(base, False)
    errors = []
    for is_fast in (True, False):
        model = zoo_model(name, dtype=dtype)
        model.load_state_dict(zoo_model(name, dtype=torch.float64).state_dict())
        errors.append([(f - e).norm() / e.norm() for f, e in zip(of(model, is_fast), exact, strict=True)])
    most = 1e-5 if dtype is torch.float32 else 0.1
    assert all(fast < most for fast in errors[0])
    assert dtype is torch.float32 or sum(errors[0]) < 1.25 * sum(errors[1])


def test_fast_experts_stop_where_peft_switches_an_adapter_off() -> None:
    model = attached("qwen3_moe")
    bare = logits(zoo_model("qwen3_moe"))
    for parameter in attach.trainable(model, "first").values():
        torch.nn.init.normal_(parameter, std=0.1)
    expected = logits(model)
    with accelerated_lora(model, "first", config.Fast()):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), bare, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), expected)
    assert (expected - bare).norm() > 0.1 * bare.norm()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_update_is_the_delta_that_peft_adds(name: str) -> None:
    model = attached(name)
    for wrapper in wrappers(model).values():
        torch.nn.init.normal_(wrapper.lora_B["first"].weight)
        torch.testing.assert_close(update(wrapper, "first"), wrapper.get_delta_weight("first").detach())


@functools.cache
def meta_model(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(zoo_config(name))


def select(name: str, **adapter: object) -> targets.Selection:
    return targets.select(meta_model(name), config.Adapter(**adapter))


def test_experts_follow_their_setting_and_else_the_targets() -> None:
    both = {
        f"model.layers.{i}.mlp.experts.{part}" for i, part in itertools.product((0, 1), ("gate_up_proj", "down_proj"))
    }
    down = {name for name in both if "down" in name}
    assert set(select("qwen3_moe").experts) == both
    assert set(select("qwen3_moe", target_modules=["q_proj"]).experts) == set()
    assert set(select("qwen3_moe", target_modules=["q_proj"], experts=True).experts) == both
    assert set(select("qwen3_moe", target_modules=["q_proj", "down_proj"]).experts) == down
    assert set(select("qwen3_moe", exclude=["gate_up_proj"]).experts) == down
    assert set(select("qwen3_moe", exclude=["layers.0"]).experts) == {name for name in both if "layers.1" in name}
    assert select("qwen3_moe", target_modules=["experts.down_proj"]).layers == ()
    off = select("qwen3_moe", experts=False)
    assert off.experts == () and off.left_out == dict.fromkeys(off.left_out, targets.SWITCHED_OFF)
    assert set(off.left_out) == both
    dropout = select("qwen3_moe", lora_dropout=0.1)
    assert dropout.experts == () and len(dropout.layers) == 8 and set(dropout.left_out) == both


@pytest.mark.parametrize(
    ("name", "adapter", "message"),
    [
        ("llama", {"experts": True}, "adapter.experts=true: llama has no parameters of experts: remove the setting"),
        ("qwen3_moe", {"experts": True, "lora_dropout": 0.1}, r"cannot be adapted \(adapter.lora_dropout=0.1 has no"),
        ("qwen3_moe", {"experts": True, "use_dora": True}, r"PEFT has no DoRA for parameters \(adapter.use_dora=true"),
        ("qwen3_moe", {"experts": False, "target_modules": ["gate_up_proj"]}, r"gate_up_proj: adapter.experts=false\)"),
        ("qwen3_moe", {"target_modules": ["gate_proj"]}, "gate_proj matches no layer .* which has .*gate_up_proj"),
    ],
)
def test_experts_that_cannot_be_trained_are_refused(name: str, adapter: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(name, **adapter)


def test_adapter_of_experts_resumes_exactly(tmp_path: Path) -> None:
    train = config.Train(epochs=100, max_steps=6, tokens_per_step=60)
    whole = trained(state_on(zoo_model("qwen3_moe"), tmp_path / "whole", train=train))
    first = state_on(zoo_model("qwen3_moe"), tmp_path / "part", train=train)
    trained(first, until=3)
    checkpoint.save(first)
    second = state_on(zoo_model("qwen3_moe"), tmp_path / "part", train=train)
    checkpoint.resume(second)
    assert second.step == 3
    assert torch.equal(trained(second), whole)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", *by_night(("qwen3_moe",), ("mixtral",))])
def test_traced_step_holds_adapter_gradient_and_optimizer_of_the_experts(name: str) -> None:
    cfg = config.TrainRun(device="cpu", adapter=config.Adapter(r=2, lora_alpha=4.0))
    cfg.train.gradient_checkpointing = "off"
    trace = trace_step(cfg, zoo_config(name), [24, 30])
    count = sum(p.numel() for p in attach.trainable(attached(name), "first").values())
    assert trace.resident["adapter"] == trace.resident["gradient"] == pytest.approx(4 * count, rel=0.03)  # aligned
    assert trace.resident["optimizer"] == pytest.approx(8 * count, rel=0.03)


def test_layers_that_peft_adapts_as_parameters_have_a_fast_form() -> None:
    model = attached("deepseek_v3", torch.float64)  # the rounding of float32 depends on the processor
    parameters = attach.trainable(model, "first")
    torch.manual_seed(0)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)

    def gradients() -> list[Tensor]:
        loss = model.train()(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum()
        return list(torch.autograd.grad(loss, list(parameters.values())))

    expected = gradients()
    called: list[str] = []
    for name, wrapper in wrappers(model).items():
        wrapper.lora_A["first"].register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with accelerated_lora(model, "first", config.Fast()) as reasons:
        found = gradients()
        layers = [module for module in wrappers(model).values() if module.num_experts == 1]
        assert len(layers) == 6 and all("forward" in vars(layer) for layer in layers)
    assert not any("parameters" in line for line in reasons) and called == []
    for fast, plain in zip(found, expected, strict=True):
        assert (fast - plain).norm() <= 1e-12 * plain.norm()


def test_truncation_and_combination_refuse_experts(tmp_path: Path) -> None:
    zoo_folder(tmp_path, "qwen3_moe")
    run = finished_run(tmp_path, "qwen3_moe")
    refusal = r"has target_parameters=.*so it is not a plain LoRA; merge it into its base"
    with pytest.raises(MismatchError, match=refusal):
        lora_ft.merge(run, tmp_path / "out", ["device=cpu", "truncate_rank=2"])
    with pytest.raises(MismatchError, match=refusal):
        combine.check(*base_of(tmp_path, "qwen3_moe"), [run / "adapter", run / "adapter"])


def base_of(folder: Path, name: str, quant: str = "none") -> tuple[Base, config.Quant]:
    cfg = settings(folder, name, quant=quant)
    return load_base(cfg.model, cfg.quant, "cpu", load_tokenizer(cfg.model)), cfg.quant


def test_patterns_of_layers_that_are_adapted_as_parameters_are_read_from_the_files(tmp_path: Path) -> None:
    ranks, alphas = {"gate_proj": 5, "o_proj": 4, "gate_up_proj": 3}, {"up_proj": 9.0}
    zoo_folder(tmp_path, "deepseek_v3")
    run = finished_run(tmp_path, "deepseek_v3", rank_pattern=ranks, alpha_pattern=alphas)
    _, model = adapted(settings(tmp_path, "deepseek_v3", rank_pattern=ranks, alpha_pattern=alphas))
    shapes = {name: tuple(p.shape) for name, p in zoo_model("deepseek_v3").named_parameters() if p.dim() == 3}
    read = {layer.module: layer for layer in lora_weights.read(run / "adapter", shapes).layers}
    modules = {n.removesuffix(".weight"): m for n, m in wrappers(model).items()}
    assert modules.keys() < read.keys()
    for name, wrapper in modules.items():
        product = read[name].b @ read[name].a * read[name].scale
        assert read[name].rank == wrapper.r["first"]
        torch.testing.assert_close(torch.from_numpy(product), update(wrapper, "first"))


def test_published_adapter_of_experts_is_checked_and_described(tmp_path: Path) -> None:
    """Its ranks are not those of layers, but a missing or foreign tensor is still found."""
    zoo_folder(tmp_path, "qwen3_moe")
    adapter = finished_run(tmp_path, "qwen3_moe") / "adapter"
    described = json.loads((tmp_path / "qwen3_moe" / "config.json").read_text())

    def found() -> dict[str, compatibility.Verdict]:
        return {verdict.program: verdict for verdict in compatibility.verdicts(adapter, described)}

    levels = {program: verdict.level for program, verdict in found().items()}
    assert all(levels[name] is Level.OK for name in ("PEFT", "transformers", "llama.cpp"))
    assert all(levels[name] is Level.REFUSED for name in ("vLLM", "SGLang", "MLX"))
    assert "adapted parameters (target_parameters), such as experts" in found()["vLLM"].reason
    assert found()["PEFT"].reason.startswith("0.19.0 or newer")
    tensors = load_file(adapter / peft_folder.WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    renamed = {name.replace("0.self_attn.q_proj", "0.mlp.q_proj"): value for name, value in tensors.items()}
    assert key.format("A") in tensors and key.format("A") not in renamed
    (adapter / peft_folder.WEIGHTS).write_bytes(save(renamed))
    problems = [v.reason for v in compatibility.verdicts(adapter, described) if v.level is Level.REFUSED]
    assert "the base has no layer model.layers.0.mlp.q_proj" in problems


@pytest.mark.parametrize(("name", "quant"), [("gpt_oss", "int8"), ("mixtral", "nf4"), ("deepseek_v3", "fp4")])
def test_verification_without_lora_ft_rounds_adapted_experts_as_they_were_quantized(
    name: str, quant: str, tmp_path: Path
) -> None:
    folder = zoo_folder(tmp_path, name)
    cfg = settings(tmp_path, name, quant=quant)
    base, _ = adapted(cfg)
    described = provenance.loading(base, cfg.quant, cfg.model)
    attach.detach(base.model)
    assert described.experts == ("experts.down_proj", "experts.gate_up_proj")
    plain = type(base.model).from_pretrained(folder, dtype=torch.float32)
    before = {key: parameter.clone() for key, parameter in plain.named_parameters() if parameter.dim() == 3}
    verify_worker.round_experts(plain, dataclasses.asdict(described))
    for key, values in before.items():
        owner, _, leaf = key.rpartition(".")
        expected = getattr(base.model.get_submodule(owner), leaf)
        torch.testing.assert_close(plain.get_parameter(key), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(values, expected)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "quant"), [("granitemoe", "none"), ("gpt_oss", "nf4"), ("qwen3_moe", "int8")])
def test_adapter_of_experts_is_published_and_verified(name: str, quant: str, tmp_path: Path) -> None:
    zoo_folder(tmp_path, name)
    run = finished_run(tmp_path, name, quant=quant)
    lora_ft.publish(run, f"dir:{tmp_path / 'out'}", ["device=cpu", "license=mit", "model.hub_id=x/y"])
    assert (tmp_path / "out" / peft_folder.WEIGHTS).is_file()


def test_layers_of_fp8_files_that_peft_adapts_only_as_parameters_are_left_out(tmp_path: Path) -> None:
    folder = zoo_folder(tmp_path, "deepseek_v3")
    packed_models.rewrite(
        folder,
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        lambda name, tensor: packed_models.fp8(tensor, 32, 32) if "_proj" in name and tensor.dim() == 2 else None,
    )
    cfg = config.TrainRun(device="cpu", adapter=config.Adapter(r=2, lora_alpha=4.0))
    cfg.model.path = str(folder)
    base = load_base(cfg.model, cfg.quant, "cpu")
    selection = targets.select(base.model, cfg.adapter)
    assert set(selection.left_out.values()) == {targets.QUANTIZED} and len(selection.experts) == 2
    planned = summary.layers(load_meta_model(cfg.model, cfg.quant, "cpu", tiny_tokenizer()), cfg)
    assert planned.targets == selection.counts()
    model = attach.attach(base.model, cfg.adapter, "first", 0, [])
    assert planned.trainable == sum(p.numel() for p in attach.trainable(model, "first").values())
    logits(model)

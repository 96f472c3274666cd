"""The dry run predicts the run exactly, finds its errors and gives a warning for each likely mistake."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from finished import call, finished_run
from safetensors.torch import load_file, save_file
from tiny import BOS, FAMILIES, SENTENCES, tiny_folder, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from lora_ft import check, config, runs
from lora_ft.adapters import attach, files, peft_folder
from lora_ft.data.dataset import prepare_rows
from lora_ft.data.examples import Examples
from lora_ft.data.read import read
from lora_ft.data.statistics import measure, warnings
from lora_ft.errors import ConfigError, MismatchError, ResourceError
from lora_ft.io import durable
from lora_ft.models.load import load_base, load_tokenizer
from lora_ft.models.meta_model import load_meta_model
from lora_ft.training import checkpoint
from lora_ft.training.dry_run import DryRun, dry_run, read_rows


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with a tiny model of every family, and a llama with tied embeddings."""
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        tiny_folder(folder, family)
    (folder / "tied").mkdir()
    tiny_folder(folder / "tied", "llama", tie=True)
    return folder


def pairs(number=24, question="What is {} and {}?", answer="It is {}."):
    return [{"prompt": question.format(n, n), "completion": answer.format(2 * n)} for n in range(number)]


def rows_at(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def run_over(bases, tmp_path, rows, family="llama", **data):
    """Return settings of a run of about ten steps on these rows that give no warning."""
    cfg = config.TrainRun(device="cpu")
    cfg.model.path = str(bases / family)
    cfg.data = config.Data(**{"path": str(rows_at(tmp_path, rows)), "eval_fraction": 0.2} | data)
    cfg.train.tokens_per_step, cfg.train.epochs = 80, 2
    cfg.adapter.r, cfg.adapter.lora_alpha = 4, 8.0
    return cfg


def dry_run_of(cfg, tokenizer, folder) -> DryRun:
    return dry_run(cfg, read_rows(cfg, tokenizer), tokenizer, folder)


def warnings_of(cfg, tmp_path):
    return dry_run_of(cfg, load_tokenizer(cfg.model), tmp_path).warnings


def test_good_run_has_no_warnings(bases, tmp_path):
    assert warnings_of(run_over(bases, tmp_path, pairs()), tmp_path) == []


@pytest.mark.parametrize("folder", [*FAMILIES, "tied/llama"])
def test_meta_model_has_the_names_shapes_and_dtypes_of_the_base(bases, folder):
    model = config.Model(path=str(bases / folder), added_tokens=["<one>", "<two>"])
    tokenizer = load_tokenizer(model)
    base, meta = (load(model, config.Quant(), "cpu", tokenizer) for load in (load_base, load_meta_model))
    expected, result = ({n: (p.shape, p.dtype) for n, p in b.model.named_parameters()} for b in (base, meta))
    assert result == expected
    assert {p.device.type for p in meta.model.parameters()} == {"meta"}
    assert meta.identity == base.identity
    assert meta.model.generation_config.eos_token_id == base.model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", ["quant=nf4", "adapter.rank_pattern={q_proj:2}", "adapter.target_modules=[q_proj,mlp.up_proj]"]),
        ("llama", ["adapter=dora", "adapter.modules_to_save=[norm]", "model.added_tokens=['What','It']"]),
        ("gpt2", ["adapter=rslora", "train.max_steps=7", "optim.schedule=cosine"]),
        ("llama", ["model.dtype=bfloat16", "adapter.modules_to_save=[norm]", "model.added_tokens=['What','It']"]),
    ],
)
@pytest.mark.closes("A21")
def test_training_matches_the_dry_run(bases, tmp_path, monkeypatch, family, overrides):
    seen = []
    monkeypatch.setattr(check, "page", lambda cfg, known, *_: seen.append(known) or "")
    path = rows_at(tmp_path, pairs())
    overrides = ["model=local", f"model.path={bases / family}", f"data.path={path}", "train.tokens_per_step=80",
             "data.eval_fraction=0.2", "optim.warmup_steps=2", "train.samples=0", *overrides]  # fmt: skip
    folder = tmp_path / "run"
    assert call("check", *overrides) == 0
    assert call("train", *overrides, f"hydra.run.dir={folder}") == 0
    (report,) = seen
    result = json.loads((folder / "result.json").read_text())
    steps = [metrics for metrics in runs.read_metrics(folder) if metrics["step"]]
    tokens = [step["tokens"] for step in steps]
    assert (report.steps.count, report.layers.trainable) == (result["steps"], result["trainable_parameters"])
    assert (report.steps.smallest, report.steps.median, report.steps.largest) == (
        min(tokens), np.median(tokens), max(tokens)
    )  # fmt: skip
    assert report.steps.rates == [step["lr"] for step in steps]
    assert (
        report.rows.dataset.report.sha256
        == json.loads((folder / "adapter" / "lora_ft.json").read_text())["data_sha256"]
    )
    saved = sum(t.nbytes for t in files.read_tensors(folder / "adapter").values())
    assert report.disk.adapter == saved == 4 * report.layers.trainable
    if "model.added_tokens=['What','It']" not in overrides:
        assert report.layers.count * 2 == sum(
            ".lora_" in key for key in files.read_tensors(folder / "adapter")
        ) - report.layers.count * ("adapter=dora" in overrides)


@pytest.mark.closes("A21")
def test_layers_are_counted_per_target_module(bases, tmp_path):
    cfg = run_over(bases, tmp_path, pairs())
    cfg.adapter.target_modules = ["layers.0.self_attn.q_proj", "v_proj"]
    cfg.adapter.rank_pattern, cfg.adapter.alpha_pattern = {"v_proj": 2}, {"v_proj": 2.0}
    layers = dry_run_of(cfg, tiny_tokenizer(), tmp_path).layers
    assert (layers.targets, layers.count) == ({"q_proj": 1, "v_proj": 2}, 3)
    assert layers.trainable == 4 * (64 + 64) + 2 * 2 * (64 + 32)
    assert layers.scales == [1.0, 2.0]
    cfg.adapter.target_modules = ["all-linear"]
    layers = dry_run_of(cfg, tiny_tokenizer(), tmp_path).layers
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [*layers.targets.items()] == [(name, 2) for name in names]


def test_dry_run_report_round_trips_as_json(bases, tmp_path):
    report = asdict(dry_run_of(run_over(bases, tmp_path, pairs()), tiny_tokenizer(), tmp_path))
    durable.write_json(tmp_path / "check.json", report)
    assert json.loads((tmp_path / "check.json").read_text()) == json.loads(json.dumps(report))
    lengths = report["statistics"]["histogram"]
    assert sum(count for _, _, count in lengths) == report["rows"]["train_documents"]
    assert lengths[0][0] <= report["statistics"]["median"] <= lengths[-1][1]


def test_setting_errors_are_found_before_weights_are_read(bases, tmp_path, monkeypatch):
    """Errors in rows are tested in test_check.py."""
    tokenizer = tiny_tokenizer()
    cfg = run_over(bases, tmp_path, pairs())
    for change, error, message in (
        (("adapter", "target_modules", ["q_prj"]), ConfigError, "q_prj matches no layer"),
        (("adapter", "modules_to_save", ["nrm"]), ConfigError, "nrm matches no layer"),
        (("optim", "warmup_steps", 1000), ConfigError, "less than the run's"),
        (("train", "tokens_per_microbatch", 5), ConfigError, "at least the longest row"),
        (("model", "dtype", config.Dtype.float16), ConfigError, "float16 is not for CPUs"),
    ):
        group, name, value = change
        changed = replace(cfg, **{group: replace(getattr(cfg, group), **{name: value})})
        with pytest.raises(error, match=message):
            dry_run_of(changed, tokenizer, tmp_path)
    other = finished_run(tmp_path, "gpt2", r=4, lora_alpha=8.0)
    with pytest.raises(MismatchError, match="made for another base"):
        dry_run_of(replace(cfg, adapter=replace(cfg.adapter, init_from=str(other / "adapter"))), tokenizer, tmp_path)


@pytest.mark.closes("C08")
def test_wrong_init_from_tensors_give_the_same_error_in_dry_run_and_training(tmp_path):
    run = finished_run(tmp_path, "llama", r=4, lora_alpha=8.0)
    cfg = config.TrainRun(device="cpu", data=config.Data(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.4))
    cfg.model.path, cfg.adapter.r, cfg.adapter.lora_alpha = str(tmp_path / "llama"), 4, 8.0
    cfg.adapter.init_from, cfg.train.tokens_per_step = str(run / "adapter"), 60
    tokenizer = load_tokenizer(cfg.model)
    dry_run_of(cfg, tokenizer, tmp_path)
    path = run / "adapter" / peft_folder.WEIGHTS
    tensors = load_file(path)
    first = next(iter(tensors))
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != first},
        tensors | {"extra": tensors[first].clone()},
        tensors | {first: tensors[first][:2].clone()},
    ):
        save_file(changed, path)
        with pytest.raises(MismatchError) as in_dry_run:
            dry_run_of(cfg, tokenizer, tmp_path)
        base = load_base(cfg.model, cfg.quant, "cpu", tokenizer)
        with pytest.raises(MismatchError) as in_training:
            files.load_tensors(attach.attach(base.model, cfg.adapter, "first", 0, []), path.parent, "first")
        assert str(in_dry_run.value) == str(in_training.value)


def test_init_from_without_local_base_weights_gives_a_warning(tmp_path, monkeypatch):
    run = finished_run(tmp_path, "llama", r=4, lora_alpha=8.0)
    cfg = config.TrainRun(device="cpu", data=config.Data(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.4))
    cfg.model.path, cfg.adapter = str(tmp_path / "llama"), config.Adapter(r=4, lora_alpha=8.0)

    def without_weights(*args):
        base = load_meta_model(*args)
        return replace(base, identity=replace(base.identity, weights_sha256=None))

    monkeypatch.setattr("lora_ft.training.dry_run.load_meta_model", without_weights)
    assert not any("weights" in sentence for sentence in warnings_of(cfg, tmp_path))
    cfg.adapter.init_from = str(run / "adapter")
    assert any(s.startswith("the base's weights are not on this machine") for s in warnings_of(cfg, tmp_path))


def test_too_little_disk_space_names_needed_and_free_bytes(bases, tmp_path, monkeypatch):
    cfg = run_over(bases, tmp_path, pairs())
    report = dry_run_of(cfg, tiny_tokenizer(), tmp_path)
    assert report.disk.needed == checkpoint.bytes_needed(report.layers.trainable, report.steps.count, cfg)
    monkeypatch.setattr(durable, "free_bytes", lambda folder: report.disk.needed - 1)
    with pytest.raises(ResourceError, match=f"need {report.disk.needed:,} bytes, {report.disk.needed - 1:,} are free"):
        dry_run_of(cfg, tiny_tokenizer(), tmp_path)
    monkeypatch.setattr(durable, "free_bytes", lambda folder: report.disk.needed)
    dry_run_of(cfg, tiny_tokenizer(), tmp_path)


def row_warnings(cfg, tokenizer, change=lambda document: document):
    """Return the warnings about rows whose prepared documents are changed by `change`."""
    parsed = read(cfg.data)
    dataset = prepare_rows(parsed, cfg.data, tokenizer)
    dataset = replace(dataset, train=Examples.of([change(document) for document in dataset.train]))
    return list(warnings(measure(parsed, dataset, cfg.data, tokenizer), dataset.report, cfg.data))


@pytest.mark.closes("A05", "A06")
def test_documents_without_a_supervised_end_token_are_counted(bases, tmp_path):
    cfg = run_over(bases, tmp_path, pairs(4), eval_fraction=0.0)
    masked = lambda d: replace(d, supervised=np.append(d.supervised[:-1], False))  # noqa: E731
    cut = lambda d: replace(d, ids=d.ids[:-1], supervised=d.supervised[:-1])  # noqa: E731
    for change in (masked, cut):
        (sentence,) = row_warnings(cfg, tiny_tokenizer(), change)
        assert "4 of 4 documents have no supervised end token" in sentence


def test_only_the_last_window_of_a_split_text_needs_an_end_token(bases, tmp_path):
    cfg = run_over(bases, tmp_path, [{"text": " ".join(SENTENCES)}], eval_fraction=0.0, max_length=32,
                   too_long=config.TooLong.split)  # fmt: skip
    report = dry_run_of(cfg, tiny_tokenizer(), tmp_path)
    assert (report.statistics.unended, report.statistics.ends, report.rows.split) == (0, {"<|im_end|>": 1}, 1)
    cut = lambda d: replace(d, ids=d.ids[:-1], supervised=d.supervised[:-1])  # noqa: E731
    assert any(
        "1 of " in sentence and "no supervised end token" in sentence
        for sentence in row_warnings(cfg, tiny_tokenizer(), cut)
    )


@pytest.mark.closes("A07")
def test_template_without_bos_gives_a_warning(bases, tmp_path):
    cfg = run_over(bases, tmp_path, pairs(4), eval_fraction=0.0)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    (sentence,) = row_warnings(cfg, tokenizer)
    assert sentence.startswith(f"4 of 4 documents do not begin with {BOS}")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert row_warnings(cfg, tokenizer) == []


@pytest.mark.closes("A08")
@pytest.mark.parametrize("train_on", config.TrainOn)
def test_prompt_that_differs_at_inference_gives_a_warning(bases, tmp_path, train_on):
    chat = [{"role": role, "content": f"{role} says {n}"} for n in range(3) for role in ("user", "assistant")]
    rows = [{"messages": [*chat[:4], {"role": "user", "content": str(n)}, chat[-1]]} for n in range(40)]
    rows[3]["messages"][-1]["weight"] = 0 if train_on is config.TrainOn.answers else 1
    cfg = run_over(bases, tmp_path, rows, eval_fraction=0.0, train_on=train_on, system="Be brief.")
    tokenizer = tiny_tokenizer()
    parsed = read(cfg.data)
    assert measure(parsed, prepare_rows(parsed, cfg.data, tokenizer), cfg.data, tokenizer).prompts == 32
    assert row_warnings(cfg, tokenizer) == []
    other = lambda d: replace(d, ids=np.append([5], d.ids[1:])) if d.source.endswith(":1") else d  # noqa: E731
    (sentence,) = row_warnings(cfg, tokenizer, other)
    assert sentence.startswith("1 of 32 prompts differ between training and inference") and "rows.jsonl:1:" in sentence


def test_truncated_prompts_are_not_compared(bases, tmp_path):
    cfg = run_over(bases, tmp_path, pairs(8, question="What is {} and {}, tell me that please, be so kind, would you?"),
                   eval_fraction=0.0, max_length=20, too_long=config.TooLong.truncate_prompt)  # fmt: skip
    tokenizer = tiny_tokenizer()
    parsed = read(cfg.data)
    dataset = prepare_rows(parsed, cfg.data, tokenizer)
    assert dataset.report.truncated == 8
    assert measure(parsed, dataset, cfg.data, tokenizer).prompts == 0


@pytest.mark.closes("A26")
def test_added_tokens_are_counted_in_prompts_and_not_in_answers(bases, tmp_path):
    rows = pairs(12)
    rows[1]["prompt"] = "<tool> and <tool> and <think> and \u2002"
    rows[2]["prompt"] = "a <think>"
    rows[3]["completion"] = "<think>so</think> 6"
    cfg = run_over(bases, tmp_path, rows)
    cfg.model.added_tokens = ["<think>", "</think>", "<tool>", "<tool_call>"]
    tokenizer = load_tokenizer(cfg.model)
    sentences = [s for s in row_warnings(cfg, tokenizer) if "in a prompt or text" in s]
    assert [s.partition(":")[0] for s in sentences] == [
        "2 of 12 rows have <think> in a prompt or text", "1 of 12 rows have <tool> in a prompt or text"
    ]  # fmt: skip


@pytest.mark.closes("A26")
def test_special_tokens_in_plain_text_are_counted(bases, tmp_path):
    cfg = run_over(bases, tmp_path, [{"text": SENTENCES[1] + BOS + SENTENCES[2]}, {"text": SENTENCES[3]}])
    assert any(s.startswith(f"1 of 2 rows have {BOS} in a prompt or text") for s in row_warnings(cfg, tiny_tokenizer()))


@pytest.mark.closes("F07")
def test_eval_rows_with_a_training_prompt_are_counted(bases, tmp_path):
    eval_file = tmp_path / "eval.jsonl"
    prompts = ["what is 1 & 1", "WHAT is 2 and 2 ?!", "What is 2 and 2?", "What is 99 and 99?"]
    eval_file.write_text("".join(json.dumps({"prompt": p, "completion": "Other."}) + "\n" for p in prompts))
    cfg = run_over(bases, tmp_path, pairs(), eval_path=str(eval_file), eval_fraction=0.05)
    (sentence,) = row_warnings(cfg, tiny_tokenizer())
    assert sentence.startswith("2 eval rows have the prompt of a training row")


@pytest.mark.closes("A04")
def test_small_supervised_share_gives_a_warning(bases, tmp_path):
    cfg = run_over(
        bases, tmp_path, pairs(2, question="{} {}" + " and on" * 500, answer="{}"), eval_fraction=0.0, max_length=4000
    )
    (sentence,) = row_warnings(cfg, tiny_tokenizer())
    assert sentence.startswith("only 0.") and "supervised" in sentence


def test_duplicate_rows_give_a_warning_unless_deduplicated(bases, tmp_path):
    cfg = run_over(bases, tmp_path, pairs() + pairs(3))
    assert any(s.startswith("3 of 27 rows are duplicates") for s in row_warnings(cfg, tiny_tokenizer()))
    cfg.data.deduplicate = True
    assert row_warnings(cfg, tiny_tokenizer()) == []


def test_end_of_turn_that_is_not_a_stop_token_gives_a_warning(tmp_path):
    base = tiny_folder(tmp_path, "llama")
    cfg = run_over(tmp_path, tmp_path, pairs())
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.eos_token = BOS
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text()) | {"eos_token_id": 0}
        (base / name).write_text(json.dumps(settings))
    report = dry_run_of(cfg, tokenizer, tmp_path)
    (sentence,) = report.warnings
    assert f"{report.rows.train_documents} documents end with <|im_end|>, but neither the tokenizer" in sentence
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, 2]}))
    assert dry_run_of(cfg, tokenizer, tmp_path).warnings == []


@pytest.mark.closes("A24")
@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "shown"),
    [
        (4, 33.0, False, "8.25 (lora_alpha / r)"), (64, 15.0, False, "0.234 (lora_alpha / r)"),
        (4, 32.0, True, "16 (lora_alpha / sqrt"), (64, 16.0, False, None),
        (4, 32.0, False, None), (16, 8.0, True, None),
    ],
)  # fmt: skip
def test_unusual_adapter_scale_gives_a_warning(bases, tmp_path, r, alpha, rslora, shown):
    cfg = run_over(bases, tmp_path, pairs())
    cfg.adapter = config.Adapter(r=r, lora_alpha=alpha, use_rslora=rslora)
    sentences = [s for s in warnings_of(cfg, tmp_path) if "scaled by" in s]
    assert len(sentences) == (shown is not None)
    assert all(f"scaled by {shown}" in s for s in sentences)


def test_large_rank_few_steps_and_long_documents_give_warnings(bases, tmp_path):
    cfg = run_over(bases, tmp_path, pairs())
    cfg.adapter.r, cfg.adapter.lora_alpha = 32, 32.0
    assert [s.partition(" get")[0] for s in warnings_of(cfg, tmp_path)] == ["8 of 14 layers"]  # q, k, v and o of two
    cfg.adapter.r, cfg.train.tokens_per_step, cfg.train.epochs = 8, 20, 1
    rows = read_rows(cfg, tiny_tokenizer())
    report = dry_run(cfg, rows, tiny_tokenizer(), tmp_path)
    long = sum(len(document.ids) > 20 for document in rows.dataset.train)
    assert long and any(
        s.startswith(f"{long} of {len(rows.dataset.train)} documents are longer") for s in report.warnings
    )
    cfg.train.tokens_per_step = 5000
    assert any(s.startswith("only 1 steps") for s in warnings_of(cfg, tmp_path))
    cfg.train.max_steps = 1
    assert warnings_of(cfg, tmp_path) == []


# setting: (a value without effect, the other settings that make it so)
INEFFECTIVE = {
    "optim.offload": (True, {"optim.name": config.Optimizer.adamw_8bit}),
    "quant.double": (False, {}),
    "quant.compute_dtype": (config.Dtype.bfloat16, {}),
    "optim.decay_fraction": (0.5, {}),
    "optim.min_lr_ratio": (0.1, {"optim.schedule": config.Schedule.constant}),
    "train.epochs": (3, {"train.max_steps": 12, "train.epochs": 1}),
    "train.eval_every_steps": (100, {}),
    "train.eval_rows": (5, {"data.eval_fraction": 0.0}),
    "train.samples": (5, {"data.eval_fraction": 0.0}),
    "train.tokens_per_microbatch": (80, {}),
    "train.keep_checkpoints": (3, {"train.save_every_steps": None}),
    "data.eval_fraction": (0.3, {"data.eval_path": "EVAL", "data.eval_fraction": 0.05}),
    "data.train_on": (config.TrainOn.last_answer, {"data.path": "TEXTS"}),
    "model.chat_template": ("TEMPLATE", {"data.path": "TEXTS"}),
}
# setting: other settings with which the value above has an effect; the defaults for settings not listed
EFFECTIVE = {
    "quant.double": {"quant.kind": config.QuantKind.nf4},
    "quant.compute_dtype": {"quant.kind": config.QuantKind.fp4},
    "optim.decay_fraction": {"optim.schedule": config.Schedule.wsd},
    "train.eval_every_steps": {"train.epochs": 40},
    "train.tokens_per_microbatch": {"train.tokens_per_step": 160},
}


def test_eval_fraction_beside_validation_files_gives_a_warning(bases, tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    rows_at(folder, pairs()).rename(folder / "train.jsonl")
    cfg = run_over(bases, tmp_path, pairs(), path=str(folder))
    assert warnings_of(cfg, tmp_path) == []
    rows_at(folder, pairs(6, "Who is {} of {}?")).rename(folder / "validation.jsonl")
    message = f"data.eval_fraction has no effect: the eval rows are the validation files of {folder}"
    assert message in warnings_of(cfg, tmp_path)


def with_values(cfg, values, paths):
    for key, value in values.items():
        group, name = key.split(".")
        setattr(getattr(cfg, group), name, paths.get(value, value) if isinstance(value, str) else value)
    return cfg


@pytest.mark.parametrize("key", INEFFECTIVE)
def test_changed_setting_without_effect_gives_a_warning(bases, tmp_path, key):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": s * (i + 1)}) + "\n"
                                          for i in range(3) for s in SENTENCES))  # fmt: skip
    (tmp_path / "eval.jsonl").write_text('{"prompt": "Other?", "completion": "Yes."}\n')
    (tmp_path / "template.jinja").write_text(tiny_tokenizer().chat_template)
    paths = {"EVAL": str(tmp_path / "eval.jsonl"), "TEXTS": str(tmp_path / "texts.jsonl"),
              "TEMPLATE": str(tmp_path / "template.jinja")}  # fmt: skip
    value, others = INEFFECTIVE[key]
    ineffective = lambda *changes: [  # noqa: E731
        s.partition(" has no effect: ")[0]
        for s in warnings_of(with_values(run_over(bases, tmp_path, pairs(48)),
                                         {k: v for c in changes for k, v in c.items()}, paths), tmp_path)
        if " has no effect: " in s
    ]  # fmt: skip
    assert key in ineffective(others, {key: value})
    assert key not in ineffective(others)  # a default value gives no warning
    assert key not in ineffective({key: value}, EFFECTIVE.get(key, {}))


def test_layer_count_of_a_huge_model_allocates_no_memory(bases, tmp_path):
    """The base has over 10^11 parameters, on the meta device."""
    folder = tmp_path / "large"
    folder.mkdir()
    for path in (bases / "llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_size": 65536, "intermediate_size": 4 * 65536, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(settings))
    cfg = run_over(tmp_path, tmp_path, pairs(), family="large")
    layers = dry_run_of(cfg, tiny_tokenizer(), tmp_path).layers
    assert layers.base > 10**11 and layers.count == 21


def test_dry_run_creates_no_folder(bases, tmp_path):
    cfg = run_over(bases, tmp_path, pairs())
    before = sorted(tmp_path.iterdir())
    dry_run_of(cfg, tiny_tokenizer(), tmp_path / "runs" / "later")
    assert sorted(tmp_path.iterdir()) == before

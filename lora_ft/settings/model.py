"""Settings of the base model, its quantization, the adapter and the objective."""

from dataclasses import dataclass

from lora_ft.settings.setting import OnResume, setting
from lora_ft.values import Dtype, QuantKind


@dataclass(slots=True)
class Model:
    path: str = setting("", "base model: hub id, local folder, GGUF file, or package:NAME/FILE.gguf", path=True)
    revision: str | None = setting(None, "branch, tag or commit of a hub id; recorded as a commit", text=True)
    hub_id: str | None = setting(
        None, "hub id of the base for the adapter's files, if path is a local folder or file", text=True
    )
    dtype: Dtype = setting(
        Dtype.auto, "dtype of weights and computation; auto: bfloat16 or float16, as the GPU supports"
    )
    embedding_device: str = setting(
        "auto",
        "device of the token embedding: auto (the model's), or cpu, which frees its memory on a GPU; same numbers",
        pattern="auto|cpu",
        on_resume=OnResume.free,
    )
    chat_template: str | None = setting(None, "Jinja file that replaces the tokenizer's chat template", path=True)
    added_tokens: list[str] = setting([], "tokens to add; their embeddings are trained and saved with the adapter")


@dataclass(slots=True)
class Quant:
    kind: QuantKind = setting(QuantKind.none, "precision of the frozen linear layers")
    double: bool = setting(True, "nf4, fp4: quantize the scales as well")
    compute_dtype: Dtype = setting(Dtype.auto, "nf4, fp4: dtype of matrix products; auto: model.dtype")


@dataclass(slots=True)
class RecordedQuant(Quant):
    """Quantization of an adapter's base; null settings are taken from the adapter's record (adapters/loading.py)."""

    kind: QuantKind | None = setting(  # type: ignore[assignment]
        None, "precision of the frozen linear layers; null: as recorded in the adapter"
    )
    double: bool | None = setting(  # type: ignore[assignment]
        None, "nf4, fp4: quantize the scales as well; null: as recorded in the adapter"
    )


@dataclass(slots=True)
class Adapter:
    r: int = setting(16, "rank", at_least=1)
    lora_alpha: float = setting(32.0, "the update is scaled by lora_alpha / r", above=0)
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", at_least=0, below=1)
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)")
    use_dora: bool = setting(False, "train magnitude and direction separately (arXiv 2402.09353)")
    target_modules: list[str] = setting(
        ["all-linear"],
        "names or regular expressions of layers to adapt, or all-linear: every linear layer but the head, and experts",
    )
    exclude: list[str] = setting(
        [], "names or regular expressions of layers not to adapt, or of modules that contain them"
    )
    experts: bool | None = setting(
        None,
        "adapt the matrices of a mixture's experts: all of them, none, or (null) those that target_modules selects; "
        "needs lora_dropout=0 and use_dora=false",
    )
    modules_to_save: list[str] = setting([], "layers to train in full and save with the adapter")
    rank_pattern: dict[str, int] = setting({}, "ranks other than r, by layer name")
    alpha_pattern: dict[str, float] = setting({}, "lora_alpha of single layers, by layer name")
    init: str = setting("default", "initialization of the matrices: default or gaussian", text=True)
    init_from: str | None = setting(
        None, "adapter folder to start from; it must have been trained on this base", path=True
    )


@dataclass(slots=True)
class Objective:
    name: str = setting(
        "sft",
        "training objective; sft: cross-entropy of the supervised tokens; classification: a linear head on the last "
        "token of a text",
        text=True,
    )
    multi_label: bool = setting(
        False, "classification: a row has any number of labels (a list, or a list as JSON text), each yes or no"
    )
    class_weights: dict[str, float] = setting(
        {}, "classification: weight of classes in the loss, by name; 1 for others"
    )
    balanced: bool = setting(
        False, "classification: weight the classes so that each has the same part of the loss of the training rows"
    )
    label_smoothing: float = setting(
        0.0, "classification: part of each target that is spread over all classes", at_least=0, below=1
    )

"""Enums of the settings in config.py, which exports them again. No torch here."""

from enum import Enum


class Dtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    fp32, bf16, fp16 = float32, bfloat16, float16  # aliases


class QuantKind(Enum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"
    fp4 = "fp4"


class Format(Enum):
    auto = "auto"
    messages = "messages"
    conversations = "conversations"
    prompt_completion = "prompt_completion"
    alpaca = "alpaca"
    text = "text"
    table = "table"


class TooLong(Enum):
    error = "error"
    drop = "drop"
    truncate_prompt = "truncate_prompt"
    split = "split"


class MixUntil(Enum):
    first = "first"
    all = "all"


class Turns(Enum):
    strict = "strict"
    repair = "repair"
    drop = "drop"


class TrainOn(Enum):
    answers = "answers"
    last_answer = "last_answer"
    all = "all"


class Optimizer(Enum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw = "paged_adamw"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Keep(Enum):
    last = "last"
    best = "best"


class OnOom(Enum):
    stop = "stop"
    shrink = "shrink"


class BlockKernels(Enum):
    auto = "auto"
    liger = "liger"
    compile = "compile"
    eager = "eager"


class Tracker(Enum):
    """Trackers by their names in `accelerate.tracking`."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"
    aim = "aim"
    clearml = "clearml"
    comet_ml = "comet_ml"
    dvclive = "dvclive"
    swanlab = "swanlab"
    trackio = "trackio"


class BaseWeights(Enum):
    auto = "auto"
    dequantized = "dequantized"
    original = "original"


class Combination(Enum):
    linear = "linear"
    ties = "ties"
    dare_ties = "dare_ties"
    svd = "svd"


class GgufType(Enum):
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


class AdapterFormat(Enum):
    gguf = "gguf"
    mlx = "mlx"


class DistMode(Enum):
    auto = "auto"
    single = "single"
    ddp = "ddp"
    shard = "shard"

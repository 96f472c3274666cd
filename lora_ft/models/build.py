"""Read the config of a base, and build its model without weights.

    found = read_config(folder, "models/llama")      LlamaConfig
    network = on_meta(found, torch.bfloat16, AutoModelForCausalLM, "models/llama")

transformers checks some settings of a config. Others make its code raise whatever error comes first, such as a
ZeroDivisionError for num_attention_heads=0. All of these are one ConfigError here.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_ft.errors import ConfigError


def read_config(folder: Path, source: str) -> Any:
    """Read the config of a folder, of transformers' class; raises ConfigError, which names `source`."""
    from transformers import AutoConfig

    with _explained(source), quiet():
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def on_meta(model_config: Any, dtype: torch.dtype, model_class: Any, source: str) -> Any:
    """Build the model of a config on the meta device; raises ConfigError, which names `source`."""
    with _explained(source), quiet(), torch.device("meta"):
        return model_class.from_config(model_config, dtype=dtype, trust_remote_code=False)


def read_generation_config(folder: Path, source: str) -> Any:
    """Read generation_config.json of a folder, None without one; raises ConfigError, which names `source`."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    try:
        with quiet():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={source} cannot be loaded: {first_line(error)}") from None


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # written for users
        raise ConfigError(f"model.path={source} cannot be loaded: {first_line(error)}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"model.path={source}: its config.json does not describe a model ({reason})") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and log lines until the block ends; problems are raised as errors instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

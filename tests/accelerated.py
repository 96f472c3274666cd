"""Acceleration of an adapter for tests that hold no context open themselves."""

from peft import PeftModel

from lora_ft.config import Fast
from lora_ft.models.acceleration import accelerated_lora


def accelerate_adapter(model: PeftModel, name: str) -> list[str]:
    """Enter `accelerated_lora` for as long as the base lives; returns its reasons."""
    context = accelerated_lora(model, name, Fast())
    vars(model.get_base_model()).setdefault("held_by_the_test", []).append(context)
    return context.__enter__()

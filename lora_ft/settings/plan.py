"""Settings of the device that `plan` and `check` predict a run for."""

from dataclasses import dataclass

from lora_ft.settings.setting import setting


@dataclass(slots=True)
class Hardware:
    name: str | None = setting(None, "name of the device; null: the device of this machine", text=True)
    kind: str = setting(
        "auto", "auto, cuda or cpu; auto: cuda if its memory is given, else as device", pattern="auto|cuda|cpu"
    )
    memory: str | None = setting(
        None,
        "memory, as in 24GiB or 16GB; null: what is free on this machine",
        pattern=r"[0-9]+(\.[0-9]+)?(MiB|GiB|MB|GB)",
    )
    capability: str = setting("8.0", "CUDA: compute capability", pattern=r"[0-9]+\.[0-9]")
    bandwidth: float | None = setting(None, "bandwidth of the memory", unit="GB/s", above=0)
    bf16_tflops: float | None = setting(
        None, "rate of dense bfloat16 products that add up in float32", unit="TFLOPS", above=0
    )
    fp16_tflops: float | None = setting(
        None, "rate of dense float16 products that add up in float32", unit="TFLOPS", above=0
    )
    fp32_tflops: float | None = setting(None, "rate of float32 products", unit="TFLOPS", above=0)
    link: float | None = setting(None, "bandwidth between host and device, one way", unit="GB/s", above=0)

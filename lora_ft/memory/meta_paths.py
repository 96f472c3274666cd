"""Let libraries take on the meta device the way that they take on a real one, without a value to decide by."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from lora_ft.memory.fused_attention import fused_attention


@contextlib.contextmanager
def as_with_values(lengths: Sequence[int]) -> Iterator[None]:
    """Change what libraries do on the meta device until the block ends; lengths: of the documents of a step.

    torch's fused optimizers and attention run. transformers finds packed documents by their positions, of which there
    are more than the longest document has.
    """
    from torch.optim import optimizer
    from transformers import masking_utils

    fused, packed = optimizer._get_fused_kernels_supported_devices, masking_utils.find_packed_sequence_indices

    def found_packed(positions: torch.Tensor) -> torch.Tensor | None:
        if not positions.is_meta:
            return packed(positions)
        return positions.cumsum(-1) if positions.shape[-1] > max(lengths) else None

    optimizer._get_fused_kernels_supported_devices = lambda: [*fused(), "meta"]
    masking_utils.find_packed_sequence_indices = found_packed
    try:
        with fused_attention():
            yield
    finally:
        optimizer._get_fused_kernels_supported_devices = fused
        masking_utils.find_packed_sequence_indices = packed

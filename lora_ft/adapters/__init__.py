"""Adapters as PEFT defines them.

attach     settings -> trainable matrices on the layers of a frozen base
audit      checks that only these matrices train, that all of them move, and that the base does not change
summary    counts of layers and parameters, from the base's shapes
init       initial values of the matrices
files      matrices <-> the folder that any PEFT user loads
provenance records what PEFT does not (base hashes, quantization, data), and checks it
loading    run=, adapter_path= -> a base with its adapter

Importing this package imports bitsandbytes, with the changes that lora_ft needs.
"""

from lora_ft.models.quantize import import_bitsandbytes

# The modules of this package import PEFT, which always imports bitsandbytes. With a plain import, bitsandbytes would
# load torch's compiler (2.7 s) and download kernels from the hub.
import_bitsandbytes()

"""What is trained: adapters as PEFT defines them.

attach     settings -> matrices on the layers of a frozen base
audit      only they train, all of them move, the base stays
outline    which layers and how many parameters, by the base's shapes alone
fast       their layers compute with ops.lora_linear while they train
files      matrices <-> the folder that any PEFT user loads
origin     what PEFT does not record: base hashes, quantization, data; and its check
source     run=, adapter_path= -> a base with its adapter
"""

from lora_ft.models.quantize import import_bitsandbytes

# PEFT imports bitsandbytes whatever the quantization; imported plainly it would load torch's compiler (2.7 s).
import_bitsandbytes()

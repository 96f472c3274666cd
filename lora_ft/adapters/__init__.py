"""Adapters as PEFT defines them.

attach     settings -> matrices on the layers of a frozen base
audit      only they train, all of them move, the base stays
summary    which layers and how many parameters, by the base's shapes alone
init       how its matrices start
files      matrices <-> the folder that any PEFT user loads
provenance what PEFT does not record: base hashes, quantization, data; and its check
loading    run=, adapter_path= -> a base with its adapter

Importing this package has a side effect: it imports bitsandbytes, as lora_ft needs it imported.
"""

from lora_ft.models.quantize import import_bitsandbytes

# The modules beside this one import PEFT, and PEFT imports bitsandbytes whatever the quantization. Imported plainly,
# bitsandbytes would load torch's compiler (2.7 s) and fetch kernels from the hub.
import_bitsandbytes()

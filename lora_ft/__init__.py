"""Small adapters over frozen GPT models. Importing the package imports nothing else, and keeps compiled code out.

Where the package `kernels` is installed, bitsandbytes (while it is imported, which PEFT does) and transformers fetch
compiled code from the hub and run it. This stands here because it must precede any of their imports, in any order.
"""

import logging
import sys

# None makes `import kernels` fail, which both take for "not installed". A program that uses it already keeps it.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
# It warns of the missing kernels, and of its slower paths at each call.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

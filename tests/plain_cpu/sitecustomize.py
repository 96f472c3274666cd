"""Simulate a CPU with AVX2 and nothing newer in every Python process with this folder in PYTHONPATH.

torch, oneDNN and MKL read the environment variables. The feature queries of torch and bitsandbytes are patched when
they are imported. Queries in other compiled code (bitsandbytes' dequantization, numpy, llama.cpp) are not changed.
"""

import importlib.abc
import importlib.machinery
import os
import sys

os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def _torch(module):
    capabilities = module.get_capabilities
    newer = ("avx512", "avx10", "avx_", "amx")
    module.get_capabilities = lambda: {k: v and not k.startswith(newer) for k, v in capabilities().items()}


def _bitsandbytes(module):
    module.has_avx512bf16 = lambda: False


_PATCHES = {"torch.cpu": _torch, "bitsandbytes.functional": _bitsandbytes}


class _Patched(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname not in _PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _PATCHES[fullname](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Patched())

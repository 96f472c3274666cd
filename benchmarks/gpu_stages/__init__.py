"""The stages of benchmarks/gpu.py: a module each, with a function that yields its parts.

    def run(setting: Setting) -> Iterator[Part]:     # (name, figures); figures with "failed" or "skipped" say why

A part that raises an error, or runs out of memory, becomes a part with the reason (`attempt`), and the next one runs.
"""

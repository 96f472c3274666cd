"""Turn a command line into the dataclass of a command. No torch here.

arguments ─┬─ --help ── help ───────┐
           ├─ <TAB> ─── completion ─┼── choices (read from conf/ without Hydra)
           └─ overrides (checked, quoted) ── composition (Hydra) ── validate ── the command's main
"""

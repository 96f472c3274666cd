"""What stands behind `cli/entry.py`: from the words of a command line to the dataclass of a verb. No torch here.

words ─┬─ --help ── help ───────┐
       ├─ <TAB> ─── completion ─┼── choices (what conf/ offers, read without Hydra)
       └─ overrides (checked, quoted) ── composition (Hydra) ── rules.validate ── the verb's main
"""

"""Declarations of the settings by config group; `config.py` composes them into the commands' schemas. No torch here."""

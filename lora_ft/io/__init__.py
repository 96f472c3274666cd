"""Atomic writes, checks of untrusted files, redaction of secrets. No torch here."""

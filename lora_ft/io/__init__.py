"""Reading and writing: durable writes, untrusted files of others, redaction of secrets. No torch here."""

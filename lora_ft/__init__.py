"""Small adapters over frozen GPT models. Importing the package imports nothing else and changes nothing."""

"""Publish an adapter: make a package, verify it, send it; report the programs that can load an adapter.

prepare, package, card, training_summary, curve, pissa_to_lora   the files of a package and the text of its card
verification, verify_worker                                      load the package without lora_ft, compare logits
compatibility, adapter_facts, adapter_checks                     programs that can load an adapter, faults of its files
secret_scan, checksums                                           search for private data, check that files are complete
destinations/                                                    a folder, the Hugging Face hub, an fsspec URL
"""

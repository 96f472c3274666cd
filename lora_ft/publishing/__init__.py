"""Publishing an adapter: a package that is verified before it is sent, and a report of the programs that can load it.

prepare, package, card, training_summary, curve, pissa_to_lora   the files of a package and the text of its card
verification, verify_worker                                      load the package with PEFT alone, compare logits
compatibility, adapter_facts, adapter_checks                     programs that can load an adapter, faults of its files
secret_scan, checksums                                           nothing private leaves; everything arrives whole
destinations/                                                    a folder, the Hugging Face hub, an fsspec URL
"""

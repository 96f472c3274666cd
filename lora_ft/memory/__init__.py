"""Memory and launches of a training step, found by running it on tensors without values.

meter    counts bytes, dispatches and synchronisations of what runs inside it
trace    settings -> the run's own training step on the meta device -> StepTrace
twin     copies a loaded model to the meta device
auto     settles train.gradient_checkpointing=auto
storage  disk, download, and memory while a base is loaded
launches says when a step takes longer to launch than to compute
"""

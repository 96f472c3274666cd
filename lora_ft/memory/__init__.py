"""Memory and launches of a training step, found by running it on tensors without values.

meter       counts bytes, work, dispatches and synchronisations of what runs inside it
costs       work of one operation: FLOPs, bytes read and written
parts       part of the model that runs an operation, from the Python functions that called it
timeline    live bytes over the step, by what they belong to
results     results of operations that repeat, computed once
deepened    the trace of many equal layers, from those of three
workspaces  buffers inside operators, and what the allocator adds
trace       settings -> the run's own training step on the meta device -> StepTrace
twin        copies a loaded model to the meta device
auto        settles train.gradient_checkpointing=auto
machine     the device of a prediction: its memory and rates; cards has the table, measure measures this machine
roofline    the time of a step from its operations and the rates of a device; says when launches decide
storage     disk, download, and memory while a base is loaded
"""

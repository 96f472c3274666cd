"""Training of one adapter: state, loop, checkpoints and callbacks.

shared       tokenizer, rows and base, which the jobs of a sweep share
state        one adapter: parameters, optimizer, planned steps, losses, best values
trainer      one step: micro-batches, division by the step's weight, clipping, learning rate, optimizer
optimizers   flat parameters and the schedule      checkpoint   saving and restoring the state between steps
callbacks    hooks that follow a run               trackers     a callback for trackers, through accelerate
dry_run      checks that need no weights           ineffective_settings  changed settings without effect
finish       save, compare, result.json            progress     the live display and log.txt
signals      SIGINT, SIGTERM, ...                  ranks        the processes of a run: one for now
step         a step until its metrics are read     loss_scale   skipped steps in float16
deterministic  deterministic kernels               out_of_memory  frees what a failed job holds
"""

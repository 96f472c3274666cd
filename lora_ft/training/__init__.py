"""Train one adapter: its state, the loop, checkpoints, and the callbacks that follow it.

shared       tokenizer, rows and base, which the jobs of a sweep share
state        one adapter: parameters, optimizer, planned steps, losses, best values
trainer      a step: micro-batches, one division, clip, rate, optimizer
optimizers   flat parameters and the schedule      checkpoint   the state between two steps
callbacks    what can follow a run                 trackers     one of them, over accelerate
dry_run      checks that need no weights           ineffective_settings  settings that change nothing
finish       adapter saved, compared, result.json  progress     the live display and log.txt
signals      SIGINT and SIGTERM                    ranks        the processes of a run: one for now
"""

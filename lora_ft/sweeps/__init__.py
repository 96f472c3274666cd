"""Many runs as one: jobs that share a base take turns on it in one child process; reports are made from files alone.

launch     from Hydra's plans to each job's value
jobs       what a sweep is made of, and which jobs may share a base
children   the processes: queue, signals, what is run again
child      one of them: start, heartbeat, death            devices    the GPUs they may have
worker     what runs in it
live       what a person sees meanwhile                    metrics_reader   a job's files, read as they grow
results    state, figures and curves of each job           leaderboard      jobs ranked by held-out loss
report     report.md, report.json, report.html and PNG charts, made from tables, figures and page
"""

"""Sweeps: jobs that share a base run one after the other in one worker; reports are made from files only.

launch       run the jobs of a sweep            live         display the jobs while they run
jobs         groups of jobs that share a base   halving      choose the jobs that continue at a rung
scheduler    queue, signals, reruns             executors/   start and watch workers
worker       the process of a group             devices      the GPUs of this machine
results      read a sweep from its files        leaderboard  rank comparable jobs
report       write the reports                  tables, figures, page, terminal: their parts
"""

"""Many runs as one: jobs that share a base run one after the other in one worker; reports are made from files alone.

launch       the jobs of a sweep, brought to their values
jobs         which jobs may share a base           halving        which jobs go on at a rung
scheduler    queue, signals, what is run again     executors/     where workers run
worker       what runs in one                      devices        the GPUs they may have
live         what a person sees meanwhile          metrics_reader files read as they grow
results      a sweep as its files tell it          leaderboard    ranking, and what is comparable
report       what is written of it, by way of tables, figures and page
"""

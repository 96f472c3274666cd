"""How adapters are trained: a learner each, taking turns on one base.

learner      one adapter: parameters, order of steps, best state
loop         a step: micro-batches, one division, clip, rate, optimizer
optimizers   flat parameters and the schedule
checkpoint   the state between two steps     stop       signals that end a run after one
preflight    what is known beforehand        unused     settings that change nothing
metrics      where numbers go               progress   what a person sees
"""

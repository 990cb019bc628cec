"""The stage `rollout`: tasks in, episodes out.

    tasks.py ──> runner.py, many at once ──> attempt.py ──HTTP──> proxy ──> engine
                                                 └──> an environment of plugins/environments/

The runner opens a group for each task and plays its episodes, each in an environment of its own.
It keeps nothing: turns, rewards and outcomes are in the store, where the judge settles the group
and the learner finds its steps. A runner that is stopped closes its open episodes as aborted. One
that is killed leaves them open: they run into their deadline, and never train. A run with a name
can be started again: what has ended is not played again, and what was half is aborted.

`stage.py` is the run without end of `[rollout]`, with tasks from `sources.py`. It replaces what
was lost, leaves room for people, and plays the exams of candidates (`exam.py`). Only these two read
the store.
"""

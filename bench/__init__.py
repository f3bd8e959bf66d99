"""Throughput behind a gate: ``python -m bench main | kernels | model | peers | report | all``.

A case is one comparison; its contenders are built lazily, judged against an fp64 truth, timed in turns, and judged once more on what the
clock saw. `engine` does that for every job; `kernels`, `model` and `peers` are lists of cases.
"""

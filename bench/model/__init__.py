"""Whole models under the clock: `python -m bench model`.

One set of weights, one set of recorded decisions, and every way to compute the labels that a user could pick: dense, merged,
merged + exits; exact, static as a CUDA graph, with PyTorch's parts in the place of ours. A gate against the dense oracle comes
before the clock and once more after it.

`settings` the command line; `layouts` the kinds of supertoken layouts and who halts, `realistic` those of photographs;
`case` weights, inputs, decisions; `recorded` modules that repeat decisions; `registry` who takes part and what that
needs; `dense`, `ours`, `parts`, `buckets` and `grouped` the contenders; `gate`, `clocking`, `timed`, `costs`, `budget` (which comparisons,
in which order), `rows` and `measure` run them; `bars` what the bars of DESIGN.md section 8 say of the rows; `schema`,
`report` and `job` hold and show what came out; `machine`, `roofline` and `profile` what the device reaches, the least
time that follows, and where the time goes.
"""

"""Single ops under the clock: `python -m bench kernels`.

Each op of step_kernels runs beside the strongest composition of plain PyTorch ops for the same job, eager and compiled,
after a gate against the fp64 reference. Times are read against the bytes that the job must move and against what a copy
reaches on the same device in the same minute.

`settings` the command line; `layouts` supertokens as uneven as a policy leaves them; `examples` inputs of an op;
`ops_*` the ops, their inputs and necessary bytes; `plain` and `plain_*` the PyTorch contenders; `contenders`, `gate`, `clock`,
`answers`, `measure` and `job` run them; `rows`, `schema` and `report` hold and show what came out.
"""

"""Everything that a machine can measure, by one command: `python -m bench suite`.

`settings` the command line; `parts` what runs, in the order of importance, each as a process of its own; `gpu_tests` the tests on a GPU;
`job` runs the parts, each in its seconds; `summary` what comes out.
"""

"""Everything that a machine can measure, by one command: `python -m bench suite`.

`settings` the command line; `parts` what runs, in the order of importance, each as a process of its own; `budget` seconds for each;
`gpu_tests` the tests on a GPU; `job` runs the parts and sums up.
"""

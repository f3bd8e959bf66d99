"""The Triton floor: a module per op file, or a folder of that name where an op has several kernels, with the launchers that the op calls."""

"""The reference floor: every registered op in plain PyTorch.

It is the specification, the oracle of the tests, and the backend of every device without Triton kernels. The functions take what the
registered ops take (tensors and numbers). Where the amount of work depends on device values they read those on the host.
"""

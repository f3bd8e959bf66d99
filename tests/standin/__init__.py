"""A stand-in for one CUDA device, for tests without a GPU: ``pytest -m gpu --standin``. CONTRIBUTING.md says what it proves and what not.

Its tensors are CPU tensors whose storages are marked and which say ``cuda:0``. A file each: who is marked (marks), streams and graphs
(graphs), waits for the device (syncs), every operation (dispatch), tensors and factories in Python (tensors), ``torch.cuda`` (device), what
stands in for kernels (launches), pytest (plugin), and which lines of host code all this has reached (lines).
"""

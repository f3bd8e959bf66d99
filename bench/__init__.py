"""Throughput comparisons: `python -m bench`, run from the checkout.

The core has four parts that the subcommands (`kernels`, `model`, `peers`) share: a row schema (`bench.schema`), a registry of contenders
(`bench.providers`), a correctness gate (`bench.gate`) and an interleaving timer (`bench.timing`).
"""

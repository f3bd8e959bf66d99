"""Throughput comparisons: `python -m bench`, run from the checkout.

The core has four parts that later comparisons share: a row schema (`bench.schema`), a registry of contenders
(`bench.providers`), a correctness gate (`bench.gate`) and an interleaving timer (`bench.timing`).
"""

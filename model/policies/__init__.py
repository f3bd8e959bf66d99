"""Policies: which patches merge."""

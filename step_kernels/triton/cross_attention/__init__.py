"""Kernels of class_attention and masked_attention: queries of one kind against keys of another."""

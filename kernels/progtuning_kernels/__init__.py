"""Fused optimizer kernels for progressive fine-tuning.

A package of its own so that the repository's `kernels/` folder is never importable under that name, which
belongs to the Hugging Face package `kernels`. It holds no kernel yet.
"""

"""Triton kernels for two steps, selection and attention: their limits, the choice between them and torch, the code."""

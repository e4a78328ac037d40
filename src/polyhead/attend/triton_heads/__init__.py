"""Heads that talk, as Triton kernels. `kernels.py` imports triton: it is imported when a call runs them."""

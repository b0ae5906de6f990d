"""The steps that have Triton kernels: what they serve, which computes, and the kernels."""

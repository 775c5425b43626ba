"""Triton kernels for GPUs: fewer tokens, and attention over merged ones. PyTorch code of `nn` and `ops` is their reference.

available                   where they compute; the one place that decides
tokens, attention           the ops, with fakes and the number of kernels that each launches
importance_kernels, token_kernels, attention_kernels    the kernels; loaded at the first launch, with triton
launching                   what an op and a launch are

Static shapes, no synchronisation with the host, no atomics: results are the same every time. There are no gradients.
"""

"""The attention operators: tensors in, tensors out. Imports nothing of the packages above.

attention, spec                      the operator and its constants
reference, masked, selection, tails  its specification in PyTorch; a form for training; selection of keys; the tail
backends, auto, candidates, remembered    which backends there are; the fastest of them for a shape
weights, macs                        attention weights; MACs of a call
cpu, gpu                             kernels in C++ and in Triton
"""

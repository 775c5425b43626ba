"""The C++ kernels: build, load, call."""

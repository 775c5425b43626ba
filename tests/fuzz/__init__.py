"""A fuzzer of each class of input: drawn inputs, run by `tests/whole/test_fuzz.py` (a few hundred) and `make fuzz`."""

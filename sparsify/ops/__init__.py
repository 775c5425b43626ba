"""The attention operators: tensors in, tensors out. Imports nothing of the packages above."""

"""Folders, data sets and built-in images -> batches. May import nn, recipe and processes."""

"""Accuracy, MACs, time, and one image inside the model. May import images, nn, ops and the roots.

evaluate, accuracy      the sparse model beside the dense one on images, with labels or without; the figures
passes, neighbours      one pass of several models over images; nearest neighbours by their features
profile, figures        MACs and time of both; the figures
macs, analytic, paper   MACs counted by fvcore, by formulas, and as the paper counts them
adaptive, against       cost of adaptive inference; times in several runtimes
latency, paths          timing; which path `auto` takes for each block
inspection              queries, selected keys and remaining tokens of one image
conditions, sweep       what a result was measured on; the rows of a sweep
"""

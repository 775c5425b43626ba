"""Folders, archives, data sets and built-in images -> batches. May import nn and the roots.

datasets     what a path or name holds, with the model's preprocessing; entry: `labelled`, `unlabelled`
loaders      images by index or as a stream -> batches; unreadable images are left out and counted
trainset     training images and images held back from them
crops        random crops for least squares
sharing      the part of a loader that one of several processes reads
photograph   one image as the model sees it
digits, pictures    the built-in data set and the built-in calibration images
"""

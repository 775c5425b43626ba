"""Folders, archives, data sets and built-in images -> batches. May import nn and the roots.

datasets     what a path or name holds, with the model's preprocessing; entry: `labelled`
measured, listed   images to measure on; images by their paths to run a model on; `sampling`: some of them
folders      image files of a folder tree or .tar: what is read and what is left out
preprocessing   what the user says of the model's input and classes; `Preprocessing`
splits       which folder is which split; `splits_of`
labels       class folders -> the model's classes; `class_words`: what these are called
decode       a picture file -> RGB, and what its pixels lose
loaders      images by index or as a stream -> batches; unreadable images are left out and counted
given        images that the caller holds: tensors, loaders
trainset     images to calibrate on and to learn from, images held back from them, random crops for least squares
photograph   one image as the model sees it
digits, pictures    the built-in data set and the built-in calibration images
"""

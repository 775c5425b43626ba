"""A name -> a dense timm model; a file <-> a sparse model. May import nn and the roots.

names, catalogue           what a name stands for; the names that can be converted
building, pretrained       dense models without and with their weights
dense_weights              tensors of a user's own checkpoint
hub                        names and downloads of sparse models
checkpoint                 the file format
original, opened           the dense model that a file was made from; both together
provenance                 origin and licence
digits                     the built-in model
"""

"""A name -> a dense timm model; a file <-> a sparse model. May import nn and the roots.

names                      what a name stands for
building, pretrained       dense models without (and the names that can be converted) and with their weights
dense_weights, filetype    tensors of a user's own checkpoint; what a file is by its first bytes
shards, huggingface        checkpoints in several files; those of Hugging Face transformers
module                     a model that the caller holds
hub                        names and downloads of sparse models
checkpoint                 the file format
original                   a file with the dense model that it was made from
licence, provenance        licence of the weights; what a file was made from
digits                     the built-in model
"""

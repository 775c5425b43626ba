"""A name -> a dense timm model; a file <-> a sparse model. May import nn, ops, config and files."""

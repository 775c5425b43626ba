"""Sparse attention inside timm's models. May import ops and config.

hosts, projection       which models are supported, and what is read from them and their attention
graft, folding          exchanges a host's attention modules; folds predictors into their weights
schedules, adaptive     several schedules over one backbone; two of them by how sure the first is
methods                 methods that a grafted model has as attributes
attention, predictor    the sparse attention module; what ranks its keys
warmup                  a model meets the shapes of the calls to come
execution               which path computes it
tokens, merging, importance, token_blocks, token_models    removal of tokens: state, methods, blocks, whole models
observe                 queries and keys of each block, for fits and losses
"""

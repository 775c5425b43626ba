"""Checkpoints in the form of Hugging Face transformers, as timm's models; transformers itself is never imported.

families   the architectures that are understood: a table of names and defaults for each
configs    config.json and preprocessor_config.json -> timm's architecture, arguments and preprocessing
tensors    a state dict of transformers -> one of timm
"""

"""The built-in `digits` model: a small timm ViT with 197 tokens, so that the tool runs offline."""

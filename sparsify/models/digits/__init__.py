"""The built-in `digits` model (`network`): a small timm ViT with 197 tokens, so that the tool runs offline."""

"""Figures -> words, Markdown, PNG, HTML and the model card."""

"""Figures -> words, Markdown, PNG, HTML and the model card. May import measure, models, images and the roots.

words, drawing                       how numbers and plots look everywhere
profile, accuracy, adaptive, against, sweep, captions   tables and sentences
figures, panels                      pictures of one image inside the model
sweep_plot, training_plot, labels    plots, and labels beside their points
header, card, page                   facts of a file; its model card; its HTML page
readback                             results read from files
"""

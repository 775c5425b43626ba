"""How numbers enter a model. May import reports, measure, images, nn, ops and the roots.

calibrate    closed form, from unlabelled images
schedule     search for the keep and token rate of every block
finetune     gradient descent by the stages of a recipe
"""

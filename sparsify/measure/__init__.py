"""Accuracy, MACs, time, and one image inside the model. May import images, models, nn, ops and roots."""

"""Uptraining: recipes, the Trainer, losses and data; and the shipped demo model."""

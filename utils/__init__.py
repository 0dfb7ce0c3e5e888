"""Plumbing of the notebook series: data, models, losses, training, evaluation. README has a map."""

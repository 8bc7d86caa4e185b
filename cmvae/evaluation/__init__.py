"""Evaluation of a trained model from its export."""

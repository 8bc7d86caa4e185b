"""What a trained model is worth, from its export."""

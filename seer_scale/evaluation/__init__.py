"""What trained features are worth."""

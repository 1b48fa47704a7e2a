"""Commands that print the numbers of the docs."""

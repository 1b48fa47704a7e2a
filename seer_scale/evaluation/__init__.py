"""Protocols that judge a trained trunk, and the features, crops and reports that they share."""

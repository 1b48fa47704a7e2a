"""Tasks that judge a trunk: one module per protocol, with `Options` and `run`, and its helpers."""

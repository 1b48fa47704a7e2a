"""Self-supervised pretraining of billion-parameter RegNets, exact under every sharding strategy."""

__version__ = "0.1.0"

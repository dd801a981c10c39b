"""Training-time quantizers, one file each. To add one: a subclass of `base.FakeQuantize` that supplies `qparams`."""

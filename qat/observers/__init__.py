"""Ranges of a stream of activations, one file each. To add one: a subclass of `base.Observer`."""

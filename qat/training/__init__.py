"""Training: Lightning modules, callbacks, sampler and optimiser groups."""

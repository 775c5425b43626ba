"""Inside a sparse model: predictor, sparse attention, and the adapters that graft them into a timm host."""

"""The edge to transformers: checkpoint reading, model specifications and weight-free skeletons."""

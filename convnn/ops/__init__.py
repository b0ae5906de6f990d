"""Mathematics on tensors, without parameters: geometry, similarity, selection, aggregation."""

"""Pictures by matplotlib, of tensors and of metrics."""

"""The typed configuration: schema, checks, composing, identity. Nothing here imports torch."""

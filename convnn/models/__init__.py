"""timm's models: building them, replacing layers, scheduling blend and k, counting operations."""

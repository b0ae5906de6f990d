"""timm's models: built, swapped, scheduled, counted."""

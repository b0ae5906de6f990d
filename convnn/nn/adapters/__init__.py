"""How each kind of attention is read, one small file for each family."""

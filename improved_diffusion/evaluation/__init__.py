"""How good images are: features, Frechet and kernel distance, precision, recall, bits per dimension."""

"""Fast forms of what costs most: the alignment loss and the nearest neighbours in 3D."""

"""Attention kernels: which there are, how a call of each is read, and how it is seen wherever it is called from."""

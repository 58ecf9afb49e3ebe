"""Datasets of referring expressions: read, brought to the size of the network, and dealt out in batches."""

"""The pieces that models are made of. Shapes are named by suffix:

T tokens of the batch, H hidden, N query heads, K key-value heads, D head dimension, F feed-forward,
V vocabulary, R rows that are sampled.
"""

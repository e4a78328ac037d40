"""`polyhead sparsify MODEL`: selectors on a pretrained model, side by side at the same share of keys read.

methods    selectors by name, each with one level that says how much it reads
levels     the level at which a method reads a given share
trials     facts found again, perplexity, missed mass
timing     prefill, decoding and peak memory, each in a process of its own
table, plots, page, write      what came out
job        all of it, in a folder that can be cut off and goes on
"""

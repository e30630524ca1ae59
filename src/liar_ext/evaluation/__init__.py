"""Quality of a model, dense or pruned: perplexity, STS-B, multiple choice, stability, a look at its
text.

Import from the modules: a function exported here would hide the module of its name.
"""

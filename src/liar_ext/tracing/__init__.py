"""Sites found by running layers instead of knowing their family; no weight is ever read.

attempt.py     what code of models may raise, with what was tried before it
stand_ins.py   a backbone whose linears compute nothing of their own
dependence.py  which rows of which linears each column of a consumer depends on
signature.py   which layers are the same but for their number
removal.py     units removed against columns that are looked away from; integers a module keeps
stated.py      the config fields that state a width, found by value and checked
passage.py     the whole model: streamed against its own forward, pruned against masked
trace.py       all of it: `trace`, and what a command does with `--trace`
"""

from liar_ext.tracing.trace import Trace, TracedSite, trace, traced_data

__all__ = ["Trace", "TracedSite", "trace", "traced_data"]

from liar_ext.ops.gram import gram, gram_reference
from liar_ext.ops.moments import Moments

__all__ = ["Moments", "gram", "gram_reference"]

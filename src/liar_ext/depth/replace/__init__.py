"""A window of layers replaced by fewer, trained to do what it did (LLM-Streamline).

`settings` says what is asked for, `network` what may stand in, `window` which layers it stands in
for, `loss` what hidden states cost; `teacher` runs the whole model as far as it is needed,
`training` trains, `run` goes from folder to folder.
"""

from liar_ext.depth.replace.run import replace_layers
from liar_ext.depth.replace.settings import Replacement

__all__ = ["Replacement", "replace_layers"]

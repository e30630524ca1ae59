"""A process of its own: llama.cpp's converter, told which pre-tokenizer a tokenizer has.

    python _run_converter.py CONVERTER PRE_TOKENIZER [arguments of the converter]

The converter knows pre-tokenizers by a hash of what a tokenizer makes of a text, from a list that
llama.cpp keeps; a vocabulary that was trained anew is in no list, whatever its pre-tokenizer is.
An empty PRE_TOKENIZER leaves that to the list.
"""

import importlib.util
import os
import sys


def main() -> None:
    converter, pre = sys.argv[1:3]
    sys.argv = [converter, *sys.argv[3:]]
    sys.path.insert(0, os.path.dirname(os.path.abspath(converter)))
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", converter)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if pre:
        # releases of before 2026 have all in one file
        owner = getattr(module, "TextModel", None)
        if owner is None:
            owner = importlib.import_module("conversion.base").TextModel
        owner.get_vocab_base_pre = lambda self, tokenizer: pre
    module.main()


if __name__ == "__main__":
    main()

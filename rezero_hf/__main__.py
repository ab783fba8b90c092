"""Transformers' command line for models of this package: `python -m rezero_hf serve FOLDER`.

The plain `transformers serve` (5.23) looks for a checkpoint's class among the library's own and nowhere else, also with
`--trust-remote-code`.
"""

import transformers
from transformers.cli.transformers import main

import rezero_hf


if __name__ == "__main__":
    transformers.ReZeroForCausalLM = rezero_hf.ReZeroForCausalLM
    main()

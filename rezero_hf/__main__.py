"""Transformers' command line for models of this package: `python -m rezero_hf serve FOLDER`.

The plain `transformers serve` (5.23) looks for a checkpoint's class among the library's own and nowhere else, also with
`--trust-remote-code`.
"""

import sys

import transformers
from transformers.cli.transformers import main
from transformers.utils.import_utils import is_serve_available

import rezero_hf
from rezero_hf.cli import stop


if __name__ == "__main__":
    transformers.ReZeroForCausalLM = rezero_hf.ReZeroForCausalLM
    # Its own ImportError comes with a traceback.
    if sys.argv[1:2] == ["serve"] and "--help" not in sys.argv and not is_serve_available():
        stop("the server needs packages: pip install 'transformers[serving]'")
    main()

"""Try what a Hugging Face user does next with a checkpoint of this project, by the real clients, and write the table.

python scripts/integrations.py [CHECKPOINT] [--only PEFT] [--output runs/integrations]      (make integrations)

Each client is a file of scripts/clients/ in a process of its own. Without CHECKPOINT, one is trained for a minute.
"""

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer

from rezero_hf.benchmarks import alone
from rezero_hf.cli import run
from rezero_hf.errors import UserError
from rezero_hf.opening import load_config
from rezero_hf.results import integrations_table, works
from rezero_hf.runs import provenance, read_record
from rezero_hf.strict import check_names


SCRIPTS = Path(__file__).resolve().parent
# Name -> the package whose version is shown, and its file in scripts/clients/.
CLIENTS = {
    "pipeline": ("transformers", "text_pipeline"),
    "rezero_hf serve": ("transformers", "serve"),
    "PEFT": ("peft", "peft_lora"),
    "TRL": ("trl", "trl_sft"),
    "lm-eval": ("lm_eval", "lm_eval_task"),
    "ONNX Runtime": ("onnxruntime", "onnx_runtime"),
    "torchao": ("torchao", "torchao_int8"),
}
# The quickstart, but small.
TRAINING = (
    *("model.hidden_size=64", "model.num_hidden_layers=4", "data.block_size=128"),
    *("training.max_steps=200", "training.eval_blocks=32", "training.final_eval_blocks=64"),
)


def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="an exported language model [trains a small one]")] = None,
    only: Annotated[str | None, typer.Option(help=f"one of {', '.join(CLIENTS)}")] = None,
    output: Annotated[Path, typer.Option(help="where result and training go")] = Path("runs/integrations"),
):
    if only is not None:
        check_names([only], CLIENTS, "--only: client")
    # Everything is on this machine.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    trained = output / "trained"
    if checkpoint is None and not (trained / "model").exists():
        train = [sys.executable, SCRIPTS / "pretrain.py", SCRIPTS / "recipes" / "quickstart.yaml", *TRAINING]
        subprocess.run([*train, "--output", trained], check=True)
    checkpoint = checkpoint or trained / "model"
    if not (made := read_record(checkpoint / "run.json")):
        raise UserError(f"{checkpoint} is not what a run left; name a folder like runs/quickstart/model.")
    if load_config(checkpoint, str(checkpoint)).architectures != ["ReZeroForCausalLM"]:
        raise UserError(f"{checkpoint} holds no language model; name a folder like runs/quickstart/model.")

    result = {"name": "integrations", "size": "cpu", **provenance(torch.device("cpu"))}
    # Fine-tuning counts no tokens.
    after = f" after {made['tokens']:,} tokens" if "tokens" in made else ""
    result |= {"checkpoint": f"{made['parameters']:,} parameters{after}"}
    result |= {"checks": [], "left_out": {}, "failed": {}}
    for name, (package, file) in CLIENTS.items():
        if only not in (None, name):
            continue
        print(f"{name} ...", flush=True)
        try:
            client = {"client": name, "package": package, "version": metadata.version(package)}
        except metadata.PackageNotFoundError:
            result["left_out"][name] = package
            continue
        found, failed = alone([sys.executable, str(SCRIPTS / "clients" / f"{file}.py"), str(checkpoint)])
        result["checks"] += [client | check for check in found]
        result["failed"] |= {name: failed} if failed else {}
    result["seconds"] = round(time.perf_counter() - start)
    result["complete"] = not (only or result["left_out"] or result["failed"])
    print(integrations_table(result))
    if only is None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(f"commit it with: python scripts/report.py {output}")
    bad = [check["client"] for check in result["checks"] if not works(check)] + list(result["failed"])
    if bad:
        raise UserError(f"does not work: {', '.join(dict.fromkeys(bad))}")


if __name__ == "__main__":
    run(main)

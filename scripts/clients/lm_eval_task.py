"""lm-eval's command line on tasks of this machine, with the checkpoint's own code: what our evaluation measures."""

import json
import math
import subprocess
import sys

import torch
import yaml
from checks import WINDOW, Check, follow, load, logits, run, windows

from rezero_hf.data import DataConfig
from rezero_hf.evaluation import evaluate_text
from rezero_hf.opening import open_model
from rezero_hf.sources import Source
from rezero_hf.tokenization import END_OF_TEXT


BLOCKS, QUESTIONS, CHOICES = 32, 50, 4


def questions(lines):
    """Which line comes after these two: the first choice, or one from elsewhere in the text?"""
    for number in range(2, 2 + QUESTIONS):
        others = [lines[(number + 31 * step) % len(lines)] for step in range(1, CHOICES)]
        yield {"before": "".join(lines[number - 2 : number]), "choices": [lines[number], *others], "right": 0}


def tasks(scratch, documents):
    """Write tasks as lm-eval's guide describes them, one for each of `documents`."""
    kinds = {
        "text": {
            "output_type": "loglikelihood_rolling",
            **{"doc_to_text": "", "doc_to_target": "text", "metric_list": [{"metric": "bits_per_byte"}]},
        },
        "choice": {
            "output_type": "multiple_choice",
            **{"doc_to_text": "{{before}}", "doc_to_choice": "choices", "doc_to_target": "right"},
            **{"target_delimiter": "", "metric_list": [{"metric": "acc"}]},
        },
    }
    for name, task in kinds.items():
        rows = scratch / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(document) + "\n" for document in documents[name]), "utf-8")
        task |= {"task": f"rezero_{name}", "test_split": "test", "metadata": {"version": 0}}
        task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
        (scratch / f"{name}.yaml").write_text(yaml.safe_dump(task), "utf-8")
    return [f"rezero_{name}" for name in kinds]


def check(folder, scratch):
    model, tokenizer = load(folder)
    # Our evaluation predicts the separator after a document, too, and lm-eval sees more than a block before a last one
    # that is shorter.
    text = tokenizer.decode(windows(tokenizer, BLOCKS).flatten()[:-1])
    source = scratch / "text.py"
    source.write_text(text, "utf-8")
    asked = list(questions(text.splitlines(keepends=True)))
    documents = {"text": [{"text": text + END_OF_TEXT}], "choice": asked}
    model_args = f"pretrained={folder},trust_remote_code=True,max_length={WINDOW},dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model_args, "--device", "cpu"]
    command += ["--batch_size", "8", "--include_path", str(scratch), "--output_path", str(scratch / "out")]
    command += ["--log_samples"]
    subprocess.run([*command, "--tasks", ",".join(tasks(scratch, documents))], check=True, stdout=sys.stderr)
    found = json.loads(next((scratch / "out").rglob("results_*.json")).read_text())["results"]

    data = DataConfig([Source(str(source))], validation_fraction=0, test_fraction=0, cache_dir=str(scratch / "cache"))
    ours = evaluate_text(open_model(str(folder)), data, ["train"], WINDOW, None, batch_size=8)["results"]["train"]
    bits = found["rezero_text"]["bits_per_byte,none"] * len((text + END_OF_TEXT).encode())
    difference = abs(bits * math.log(2) / ours["tokens"] - ours["loss"])
    yield Check("loglikelihood_rolling, beside the loss that evaluate_model.py finds", difference, 1e-5, "nats a token")

    def log_likelihood(before, choice):
        ids = tokenizer(before + choice, return_tensors="pt").input_ids
        scores = logits(model, ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return scores[-len(tokenizer(choice).input_ids) :].sum()

    answers = [
        torch.stack([log_likelihood(question["before"], choice) for choice in question["choices"]]).argmax().item()
        for question in asked
    ]
    with next((scratch / "out").rglob("samples_rezero_choice_*.jsonl")).open(encoding="utf-8") as file:
        samples = sorted(map(json.loads, file), key=lambda sample: sample["doc_id"])
    # Of each choice its log likelihood, written as text, and whether it is what the model would say unasked.
    theirs = [torch.tensor([float(said) for said, _ in sample["filtered_resps"]]).argmax().item() for sample in samples]
    differ = sum(one != other for one, other in zip(answers, theirs, strict=True))
    yield Check("multiple_choice, each answer beside that by `forward`", differ, 0, f"of {QUESTIONS} differ")
    yield follow("lm-eval", folder, scratch)


if __name__ == "__main__":
    run(check)

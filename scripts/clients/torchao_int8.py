"""torchao's int8 weights through Transformers, of the model as it is and with its gates folded away."""

import torch
from checks import Check, follow, load, logits, run, windows
from torch.nn.functional import cross_entropy
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from rezero_hf import fold_gates


def check(folder, scratch):
    model, tokenizer = load(folder)
    ids = windows(tokenizer, 16)
    expected = logits(model, ids)
    fold_gates(model).save_pretrained(scratch / "folded")
    tokenizer.save_pretrained(scratch / "folded")

    def nats(found):
        return cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    for name, path in (("as it is", folder), ("with folded gates", scratch / "folded")):
        quantised, _ = load(path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
        matrices = [module for module in quantised.base_model.modules() if isinstance(module, torch.nn.Linear)]
        whole = sum(type(module.weight.data) is torch.Tensor for module in matrices)
        yield Check(f"the model {name}, matrices of its layers in int8", whole, 0, f"of {len(matrices)} are not")
        found = logits(quantised, ids)
        error = ((found - expected).norm() / expected.norm()).item()
        yield Check(f"the model {name}, logits beside those in fp32", error, 0.02, "of their norm")
        more = nats(found) - nats(expected)
        yield Check(f"the model {name}, loss beside that in fp32", more, 0.01, "nats a token more")
    yield follow("torchao", folder, scratch)


if __name__ == "__main__":
    run(check)

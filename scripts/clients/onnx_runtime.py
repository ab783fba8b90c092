"""ONNX Runtime on what Transformers' exporter writes: the model's logits, also at other sizes than the exported one."""

import onnxruntime
import torch
from checks import LOGITS, Check, apart, load, run, windows
from transformers.exporters import OnnxConfig, OnnxExporter


def check(folder, scratch):
    model, tokenizer = load(folder)
    # Some settings are read by tracing, and a cache is not among what a single pass gives.
    model.config.use_cache = False

    def inputs(rows, tokens):
        """Rows of text, the first one padded at the left."""
        ids = windows(tokenizer, rows)[:, :tokens].clone()
        mask = torch.ones_like(ids)
        ids[0, : tokens // 4], mask[0, : tokens // 4] = tokenizer.pad_token_id, 0
        return {"input_ids": ids, "attention_mask": mask}

    exported = OnnxExporter().export(model, inputs(2, 32), config=OnnxConfig(dynamic=True))
    exported.save_pretrained(scratch)
    session = onnxruntime.InferenceSession(next(scratch.glob("*.onnx")), providers=["CPUExecutionProvider"])
    for rows, tokens in ((2, 32), (3, 200)):
        feed = inputs(rows, tokens)
        with torch.no_grad():
            expected = model(**feed).logits
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in feed.items()})
        what = f"exported by OnnxExporter, {rows} rows of {tokens} tokens with padding, logits beside the model's"
        yield Check(what, apart(torch.from_numpy(found), expected), 1e-3, LOGITS)


if __name__ == "__main__":
    run(check)

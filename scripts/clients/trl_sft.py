"""TRL's SFTTrainer with packing on SDPA: packed documents do not see each other."""

import torch
from checks import Check, apart, follow, load, logits, run
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


CODE = "def f_{0}(x):\n    return x * {0}\n"
PACKED = 256


def check(folder, scratch):
    model, tokenizer = load(folder, attn_implementation="sdpa")
    # Of many lengths, and some longer than others.
    texts = ["".join(CODE.format(number * step) for step in range(1, 1 + number % 5)) for number in range(7, 71)]
    config = SFTConfig(
        str(scratch),
        **{"packing": True, "max_length": PACKED, "max_steps": 20, "learning_rate": 1e-3, "logging_steps": 1},
        **{"per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "save_strategy": "no"},
        **{"report_to": "none", "disable_tqdm": True},
    )
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    ids, positions, labels = (batch[name] for name in ("input_ids", "position_ids", "labels"))
    begins = (positions[0] == 0).nonzero().flatten().tolist()
    documents = [ids[:, start:end] for start, end in zip(begins, [*begins[1:], ids.shape[1]], strict=True)]

    model.eval()
    with torch.no_grad():
        packed = model(**batch)
        open_row = model(input_ids=ids).logits
    one_by_one = torch.cat([logits(model, document) for document in documents], dim=1)
    nats = torch.nn.functional.cross_entropy(one_by_one[0, :-1], labels[0, 1:], ignore_index=-100).item()
    what = f"{len(documents)} documents in a row, loss beside that of one by one"
    yield Check(what, abs(packed.loss.item() - nats), 1e-4, "nats a token")
    leak = apart(open_row, one_by_one)
    what = f"their logits beside those of one by one ({leak:.2g} apart where nothing tells the documents apart)"
    yield Check(what, apart(packed.logits, one_by_one), min(1e-3, leak / 100), "largest difference of a logit")

    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    yield Check("trained for 20 steps, loss", losses[-1] / losses[0], 0.9, "of the loss before")
    yield follow("TRL", folder, scratch)


if __name__ == "__main__":
    run(check)

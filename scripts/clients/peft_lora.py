"""PEFT: LoRA beside trained gates, saved, loaded, merged, and the merged model published."""

import torch
from checks import LOGITS, Check, apart, load, logits, run, windows
from peft import LoraConfig, PeftModel, get_peft_model

from rezero_hf import gates, parameter_groups


MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def check(folder, scratch):
    torch.manual_seed(0)
    base, tokenizer = load(folder)
    ids = windows(tokenizer, 4)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=MATRICES, modules_to_save=["residual_norm"])
    model = get_peft_model(base, lora).train()
    before = {name: alpha.clone() for name, alpha in gates(model).items() if "modules_to_save" in name}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-3))
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    yield Check("LoRA and gates trained for 20 steps, loss", losses[-1] / losses[0], 0.95, "of the loss before")
    now = gates(model)
    still = sum(torch.equal(now[name], alpha) for name, alpha in before.items())
    yield Check("gates trained as modules_to_save", still, 0, f"of {len(before)} gates did not move")

    trained = logits(model.eval(), ids)
    model.save_pretrained(scratch / "adapter")
    again = PeftModel.from_pretrained(load(folder)[0], scratch / "adapter").eval()
    yield Check("adapter saved and loaded, logits beside those before", apart(logits(again, ids), trained), 0, LOGITS)
    merged = again.merge_and_unload()
    yield Check("merged, logits beside the adapter's", apart(logits(merged, ids), trained), 1e-3, LOGITS)
    merged.save_pretrained(scratch / "merged")
    tokenizer.save_pretrained(scratch / "merged")
    whole, _ = load(scratch / "merged")
    yield Check(
        "merged model saved and loaded, logits beside those before",
        apart(logits(whole, ids), logits(merged, ids)),
        0,
        LOGITS,
    )


if __name__ == "__main__":
    run(check)

"""A saved folder is all one needs: it loads where this package does not exist, and stays whole however often it is saved again.

Each load runs in a process of its own, because loading one class registers it for those that follow and hides what is missing.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from rezero_hf import ReZeroConfig, ReZeroForCausalLM, ReZeroModel


SOURCES = {
    "configuration_rezero.py",
    "modeling_rezero.py",
    "portable.py",
    "residual.py",
    "embeddings.py",
    "gating.py",
    "piecewise_loss.py",
}
AUTO_MAP = {
    "AutoConfig": "configuration_rezero.ReZeroConfig",
    "AutoModel": "modeling_rezero.ReZeroModel",
    "AutoModelForCausalLM": "modeling_rezero.ReZeroForCausalLM",
    "AutoModelForMaskedLM": "modeling_rezero.ReZeroForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_rezero.ReZeroForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_rezero.ReZeroForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_rezero.ReZeroForQuestionAnswering",
}
TEXT = "héllo, world"

PROLOGUE = """
import sys
sys.modules["rezero_hf"] = None
folder, out = sys.argv[1:3]
remote = {"trust_remote_code": True}
"""


def start(tmp_path, code, folder, out="", **environment):
    """Start Python on `code` without our package: no network, no terminal, no module seen before; `folder` and `out` given."""
    modules = tmp_path / f"modules_{len(list(tmp_path.glob('modules_*')))}"
    modules.mkdir()
    script = modules / "script.py"
    script.write_text(PROLOGUE + textwrap.dedent(code))
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), "HF_HOME": str(modules), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-I", str(script), str(folder), str(out)],
        cwd=modules,
        env={**os.environ, **offline, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    """Wait for all; each must have succeeded."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)


def assert_whole(folder):
    """The folder has exactly our sources, as this package has them, and an `auto_map` with every entry, pointing to them."""
    assert {file.name for file in folder.glob("*.py")} == SOURCES
    package = Path(sys.modules[ReZeroModel.__module__].__file__).parent
    assert all((folder / name).read_text() == (package / name).read_text() for name in SOURCES)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(residual="rezero_pre_norm", gate_sharing="sublayer", num_key_value_heads=2, eos_token_id=256)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(TEXT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """What `save_pretrained` of a model and its tokenizer leave."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CONFIG = """
from transformers import AutoConfig
config = AutoConfig.from_pretrained(folder, **remote)
assert (config.model_type, config.residual, config.gate_sharing) == ("rezero", "rezero_pre_norm", "sublayer"), config
assert type(config).__module__.startswith("transformers_modules."), type(config)
"""
TOKENIZER = f"""
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer({TEXT!r}).input_ids == list({TEXT!r}.encode()) and tokenizer.pad_token_id == 257
"""
DECODER = f"""
import torch
from transformers import AutoModel
model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **remote)
assert not report["missing_keys"], report
torch.save(model(torch.tensor([list({TEXT!r}.encode())])).last_hidden_state, out + ".pt")
"""
CAUSAL_LM = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, **remote)
assert type(model).__module__.startswith("transformers_modules."), type(model)
tokenizer = AutoTokenizer.from_pretrained(folder)
torch.save(model(**tokenizer({TEXT!r}, return_tensors="pt")).logits, out + ".pt")
model.save_pretrained(out)
tokenizer.save_pretrained(out)
"""
PIPELINE = f"""
import torch
from transformers import pipeline
writer = pipeline("text-generation", model=folder, **remote)
text = writer({TEXT!r}, max_new_tokens=8, do_sample=False)[0]["generated_text"]
torch.save(text, out + ".pt")
"""


def test_a_save_is_whole(model, folder, tmp_path):
    """`save_pretrained` of any class writes every source and the whole `auto_map`; a configuration alone writes its own."""
    assert_whole(folder)
    model.model.save_pretrained(tmp_path / "decoder")
    assert_whole(tmp_path / "decoder")
    ReZeroConfig().save_pretrained(tmp_path / "config")
    assert {file.name for file in (tmp_path / "config").glob("*.py")} == {"configuration_rezero.py"}
    finish(
        start(
            tmp_path,
            "from transformers import AutoConfig; assert AutoConfig.from_pretrained(folder, **remote).hidden_size == 512",
            tmp_path / "config",
        )
    )


def test_loads_and_saves_without_the_package(model, tokenizer, ids, folder, tmp_path):
    """Every Auto class and the pipeline give this process's numbers to the last bit; saved from there, still so, twice over."""
    logits, stream = model(ids).logits, model.model(ids).last_hidden_state
    written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    second, third = tmp_path / "second", tmp_path / "third"

    # Two at a time.
    finish(start(tmp_path, CAUSAL_LM, folder, second), start(tmp_path, PIPELINE, folder, tmp_path / "text"))
    finish(start(tmp_path, CONFIG, folder), start(tmp_path, TOKENIZER, folder))
    finish(start(tmp_path, DECODER, folder, tmp_path / "stream"), start(tmp_path, CAUSAL_LM, second, third))

    for saved in (second, third):
        assert torch.equal(torch.load(f"{saved}.pt"), logits)
        assert_whole(saved)
        assert (saved / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert torch.equal(torch.load(tmp_path / "stream.pt"), stream)
    assert torch.load(tmp_path / "text.pt") == tokenizer.decode(written[0], skip_special_tokens=True)


def test_the_package_needs_no_trust(folder, ids, model):
    """With the package imported no flag is needed, and its classes win even when remote code is allowed."""
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(folder, **trust)) is ReZeroConfig
        assert type(AutoModel.from_pretrained(folder, **trust)) is ReZeroModel
        loaded = AutoModelForCausalLM.from_pretrained(folder, **trust)
        assert type(loaded) is ReZeroForCausalLM
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == ids[0].tolist()


def test_a_hub_model_saved_again_points_to_itself(folder, ids, model, tmp_path):
    """Loaded from a repository and saved, `auto_map` names the new folder's files, not the repository's."""
    repository, commit = tmp_path / "hub" / "models--org--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    finish(start(tmp_path, CAUSAL_LM, "org/name", tmp_path / "again", HF_HUB_CACHE=str(tmp_path / "hub")))
    assert_whole(tmp_path / "again")
    assert torch.equal(torch.load(tmp_path / "again.pt"), model(ids).logits)


SHARDED = """
import torch
from torch.distributed import device_mesh, fsdp, init_process_group
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM
init_process_group("gloo", init_method=f"file://{out}_store", rank=0, world_size=1)
mesh = device_mesh.init_device_mesh("cpu", (1,))
model = AutoModelForCausalLM.from_pretrained(folder, **remote)
for layer in model.model.layers:
    fsdp.fully_shard(layer.residual_norm, mesh=mesh)
    fsdp.fully_shard(layer, mesh=mesh)
fsdp.fully_shard(model, mesh=mesh)
assert type(model).__name__.startswith("FSDP"), type(model)
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
model.save_pretrained(out, state_dict=whole)
"""


def test_a_sharded_model_saves_our_sources_not_torchs(folder, tmp_path):
    """FSDP2 swaps the class of a loaded model for one of its own; what is saved is still the whole folder, bit for bit."""
    finish(start(tmp_path, SHARDED, folder, tmp_path / "sharded"))
    assert_whole(tmp_path / "sharded")
    weights = "model.safetensors"
    assert load_file(tmp_path / "sharded" / weights).keys() == load_file(folder / weights).keys()
    for name, tensor in load_file(folder / weights).items():
        assert torch.equal(load_file(tmp_path / "sharded" / weights)[name], tensor), name


TRAINER = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(folder, **remote)
start = {name: p.detach().clone() for name, p in model.named_parameters()}
rows = [{"input_ids": row, "labels": row} for row in torch.load(out + "_rows.pt")]

class NoGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        for p in model.parameters():
            p.grad.zero_()

def trainer(**settings):
    arguments = TrainingArguments(out, max_steps=2, per_device_train_batch_size=len(rows), per_device_eval_batch_size=len(rows),
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=1e-2, **settings)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)

smooth = trainer(label_smoothing_factor=0.3, max_grad_norm=0)
losses = {"evaluated": smooth.evaluate()["eval_loss"]}
smooth.train()
losses["trained"] = [row["loss"] for row in smooth.state.log_history if "loss" in row][0]
with torch.no_grad():
    for name, p in model.named_parameters():
        p.copy_(start[name])

decay = trainer(weight_decay=10.0)
decay.add_callback(NoGradients)
decay.train()
end = {name: p.detach().clone() for name, p in model.named_parameters()}
decay.save_model(out)
torch.save({"losses": losses, "start": start, "end": end}, out + ".pt")
"""


def test_the_stock_trainer_on_a_loaded_folder(folder, model, tmp_path):
    """Transformers' own Trainer decays no alpha, smooths labels that are shifted, and saves a whole folder."""
    rows = torch.randint(0, 256, (4, 10), generator=torch.Generator().manual_seed(4))
    torch.save(rows, tmp_path / "trained_rows.pt")
    finish(start(tmp_path, TRAINER, folder, tmp_path / "trained"))
    result = torch.load(tmp_path / "trained.pt")

    # With no gradient only weight decay moves anything: the factor is 1 - learning rate * decay, then a smaller one.
    start_values, end = result["start"], result["end"]
    gates = [name for name in end if name.endswith("alpha")]
    assert len(gates) == 2 and all(start_values[name].all() for name in gates)
    for name, value in end.items():
        decayed = value.ndim == 2
        assert torch.equal(value, start_values[name]) != decayed, name
        if decayed:
            assert value.norm() < 0.91 * start_values[name].norm(), name
    assert_whole(tmp_path / "trained")

    logprobs = model(rows).logits.log_softmax(-1)[:, :-1]
    hard = -logprobs.gather(-1, rows[:, 1:, None]).mean().item()
    smoothed = 0.7 * hard + 0.3 * -logprobs.mean().item()
    assert abs(smoothed - hard) > 0.01
    assert result["losses"]["evaluated"] == pytest.approx(smoothed, rel=1e-4)
    assert result["losses"]["trained"] == pytest.approx(smoothed, rel=1e-4)

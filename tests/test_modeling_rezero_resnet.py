"""The residual networks: their sizes, what they learn and decay, and that a saved folder is all one needs.

`test_parity_resnet.py` holds them to their equations, `test_initializations.py` to how they start. At alpha = 0 most
equivalences hold for any code, so only what is said about the start is tested there.
"""

import pytest
import torch
from PIL import Image
from test_portable import finish, start
from torch.utils.data import Dataset
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from rezero_hf import (
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
    ReZeroResNetModel,
    cifar_image_processor,
    parameter_groups,
)


SIZES = {"embedding_size": 4, "hidden_sizes": [4, 8, 12], "depths": [2, 2, 1], "num_labels": 5}
PREACT = {"layer_type": "preact", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
BOTTLENECK = {**PREACT, "layer_type": "preact_bottleneck"}
FIXUP = {"residual": "plain", "initialization": "fixup", "batch_norm": False}
KINDS = {
    "rezero": {},
    "rezero, activated sum": {"activation_position": "sum"},
    "rezero without batch norm": {"batch_norm": False},
    "rezero without any norm": {"batch_norm": False, "stem_batch_norm": False},
    "gated": {"residual": "gated"},
    "gated, activated sum": {"residual": "gated", "activation_position": "sum"},
    "plain": {"residual": "plain"},
    "plain, activated branch": {"residual": "plain", "activation_position": "branch"},
    "zero gamma": {"residual": "plain", "initialization": "zero_gamma"},
    "fixup": FIXUP,
    "preact rezero": PREACT,
    "preact rezero without batch norm": {**PREACT, "batch_norm": False},
    "preact gated": {**PREACT, "residual": "gated"},
    "preact plain": {**PREACT, "residual": "plain"},
    "preact fixup": {**PREACT, **FIXUP},
    "bottleneck rezero": BOTTLENECK,
    "bottleneck fixup": {**BOTTLENECK, **FIXUP},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.parametrize("kind", ["rezero", "gated, activated sum", "fixup", "bottleneck rezero"])
GATED = [kind for kind in KINDS if KINDS[kind].get("residual", "rezero") != "plain"]


def config_of(kind, **changes):
    return ReZeroResNetConfig(**{**SIZES, **KINDS[kind], **changes})


def new(kind, seed=0, **changes):
    """A model as its initialisation leaves it."""
    torch.manual_seed(seed)
    return ReZeroResNetForImageClassification(config_of(kind, **changes))


def switched_on(kind, **changes):
    """A model in eval mode whose every parameter and statistic has a value that no initialisation gives, in double."""
    model = new(kind, **changes).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.fill_(3)
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.endswith("alpha"):
                tensor.copy_(0.7 + 0.2 * noise)
            elif name.endswith("running_var"):
                tensor.copy_(noise.exp())
            else:
                tensor.add_(0.2 * noise)
    return model


IMAGES = torch.randn(3, 3, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([4, 0, 2])


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_a_cifar_net_has_the_papers_size(depth):
    """0.270, 0.853 and 1.728 million parameters; a gate adds one per residual layer, Fixup has scalars for norms."""
    count = {20: 269_722, 56: 853_018, 110: 1_727_962}[depth]
    layers = (depth - 2) // 2
    with torch.device("meta"):
        for residual, gates in (("plain", 0), ("rezero", layers), ("gated", layers)):
            config = ReZeroResNetConfig.cifar(depth, residual=residual)
            assert ReZeroResNetForImageClassification(config).num_parameters() == count + gates
        # Gamma and beta of the stem's norm and of two in each layer; their place is taken by a bias, by four and a scale.
        norms = 2 * 16 + layers // 3 * sum(2 * 2 * width for width in (16, 32, 64))
        # The classifier has one more.
        scalars = 1 + 5 * layers + 1
        net = ReZeroResNetForImageClassification(ReZeroResNetConfig.cifar(depth, **FIXUP))
    assert net.num_parameters() == count - norms + scalars


@pytest.mark.parametrize("depth", [18, 50])
def test_a_preact_net_has_its_published_size(depth):
    """11.171 and 23.509 million parameters and one gate per layer."""
    count, layers = {18: (11_171_146, 8), 50: (23_509_066, 16)}[depth]
    with torch.device("meta"):
        model = ReZeroResNetForImageClassification(ReZeroResNetConfig.preact(depth))
    assert model.num_parameters() == count + layers


@every_kind
def test_nothing_is_dead(kind):
    """After three steps every parameter hears the loss, and two steps on one batch have lowered it: no start is a deadlock."""
    model = new(kind).double()
    # A step small enough to follow the gradient.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model(IMAGES, labels=LABELS).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]


@pytest.mark.parametrize("kind", GATED)
def test_closed_gates_hear_their_branches_first(kind):
    """The first backward reaches every gate, the stem and the classifier, and no convolution of a branch."""
    model = new(kind).double()
    model(IMAGES, labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        if ".branch." in name:
            assert not parameter.grad.any(), name
        elif ".entry." not in name:
            assert parameter.grad.any(), name


@every_kind
def test_what_is_decayed(kind):
    """Trainer's rule and `parameter_groups` decay the same: convolutions and classifier; no gate, norm, scalar or bias."""
    model = new(kind)
    names = dict(model.named_parameters())
    matrices = {name for name, parameter in names.items() if parameter.ndim > 1}
    assert set(Trainer.get_decay_parameter_names(None, model)) == matrices
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model, 0.1, 0.1)}
    assert groups["matrices"] == {id(names[name]) for name in matrices}
    layers = range(model.config.num_hidden_layers) if kind in GATED else ()
    keys = [f"model.layers.{index}.residual_norm.alpha" for index in layers]
    assert [name for name in model.state_dict() if "alpha" in name] == keys
    assert groups.get("gates", set()) == {id(names[key]) for key in keys}
    assert all(names[key].shape == (1,) for key in keys)


@every_kind
def test_hidden_states_are_the_stream_between_layers(kind):
    """One before each layer and one after the last, each the layer's work on the one before; the pooled mean follows."""
    model = switched_on(kind).model
    output = model(IMAGES, output_hidden_states=True)
    streams = output.hidden_states
    assert len(streams) == model.config.num_hidden_layers + 1
    for layer, before, after in zip(model.layers, streams[:-1], streams[1:], strict=True):
        assert torch.equal(layer(before), after)
    assert torch.equal(streams[-1], output.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.flatten(2).mean(-1))
    assert model(IMAGES).hidden_states is None


def test_every_problem_type_has_its_loss():
    """Cross-entropy, squared error and independent labels, by `problem_type` or by what the labels are."""
    model = switched_on("rezero")
    logits = model(IMAGES).logits
    expected = -logits.log_softmax(-1).gather(-1, LABELS[:, None]).mean()
    torch.testing.assert_close(model(IMAGES, labels=LABELS).loss, expected)
    assert torch.equal(model(IMAGES, labels=LABELS, return_dict=False)[1], logits)

    several = torch.rand(3, 5, dtype=torch.float64).round()
    model.config.problem_type = "multi_label_classification"
    p = logits.sigmoid()
    expected = -(several * p.log() + (1 - several) * (1 - p).log()).mean()
    torch.testing.assert_close(model(IMAGES, labels=several).loss, expected)

    regression = switched_on("rezero", num_labels=1)
    values = torch.randn(3, dtype=torch.float64)
    expected = (regression(IMAGES).logits[:, 0] - values).square().mean()
    torch.testing.assert_close(regression(IMAGES, labels=values).loss, expected)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8, 8), (2, 8, 8, 3)])
def test_images_of_another_shape_are_refused(shape):
    """The line says the shape that came and the shape there must be."""
    with pytest.raises(ValueError, match=r"^pixel_values of shape \(.*\): must be \(batch, 3, height, width\), the"):
        new("rezero")(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"dtype torch\.uint8, so these are raw pixels"):
        new("rezero")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("use_reentrant", [False, True])
@some_kinds
def test_activation_checkpointing_changes_no_gradient(kind, use_reentrant):
    """Every layer runs again in the backward pass, and every gradient is the same."""
    model = switched_on(kind).train()
    model(IMAGES, labels=LABELS).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    runs = []
    for layer in model.model.layers:
        layer.branch.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(IMAGES, labels=LABELS).loss.backward()
    assert len(runs) == 2 * model.config.num_hidden_layers
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


@some_kinds
def test_a_compiled_training_step_is_one_graph(kind):
    """No graph break, the same loss and the same gradients."""
    torch._dynamo.reset()
    model = switched_on(kind).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses, gradients = [], []
    for forward in (model, compiled):
        model.zero_grad()
        losses.append(forward(IMAGES, labels=LABELS).loss)
        losses[-1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@every_kind
def test_saved_and_loaded_to_the_bit(kind, tmp_path):
    """By its class, by Auto and without its head: the same numbers; the gates come back, whatever they were."""
    model = switched_on(kind).float()
    images = IMAGES.float()
    model.save_pretrained(tmp_path)
    for loader in (ReZeroResNetForImageClassification, AutoModelForImageClassification):
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is ReZeroResNetForImageClassification
        assert not any(report.values()), report
        assert torch.equal(loaded(images).logits, model(images).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is ReZeroResNetModel
    assert torch.equal(body(images).pooler_output, model.model(images).pooler_output)


@pytest.mark.parametrize("kind", ["rezero", "gated", "fixup", "preact rezero"])
def test_in_bf16_gates_stay_fp32(kind, tmp_path):
    """Loaded in bf16 the stream is bf16 and close to fp32, fp32 images are taken, and gates keep their digits."""
    model = switched_on(kind).float()
    model.save_pretrained(tmp_path)
    loaded = ReZeroResNetForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        gate = name.endswith("alpha")
        assert parameter.dtype == (torch.float32 if gate else torch.bfloat16), name
        assert not gate or torch.equal(parameter, model.get_parameter(name))
    output = loaded(IMAGES.float(), output_hidden_states=True)
    assert {stream.dtype for stream in (*output.hidden_states, output.logits)} == {torch.bfloat16}
    expected = model(IMAGES.float()).logits
    assert (output.logits.float() - expected).norm() < 0.03 * expected.norm()


class Rows(Dataset):
    def __init__(self, labels):
        self.images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_the_stock_trainer_accumulates_gradients(problem_type, tmp_path):
    """Two batches of four move the net exactly as one of eight, whatever the loss is."""
    rows = Rows(torch.arange(8) % 5 if problem_type.startswith("single") else torch.eye(5)[torch.arange(8) % 5])
    ends = []
    for batch in (8, 4):
        model = switched_on("rezero without any norm", problem_type=problem_type).float()
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch,
            use_cpu=True, disable_tqdm=True, save_strategy="no", optim="sgd", learning_rate=0.1, max_grad_norm=0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        ends.append(model.state_dict())
    start_values = switched_on("rezero without any norm").float().state_dict()
    torch.testing.assert_close(ends[1], ends[0])
    assert not any(torch.equal(ends[0][name], value) for name, value in start_values.items())


PIPELINE = """
import torch
from transformers import pipeline
classifier = pipeline("image-classification", model=folder, **remote)
assert type(classifier.model).__module__.startswith("transformers_modules."), type(classifier.model)
torch.save(classifier(folder + "/cat.png"), out + ".pt")
classifier.model.save_pretrained(out)
classifier.image_processor.save_pretrained(out)
"""
MODEL = """
import torch
from transformers import AutoModel
model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **remote)
assert not report["missing_keys"], report
torch.save(model(torch.ones(1, 3, 8, 8)).pooler_output, out + ".pt")
"""


def test_the_pipeline_reads_a_saved_folder(tmp_path):
    """With the package and, from the folder's own code, without it: the same scores, the net's on the processed image."""
    names = ["cat", "dog", "fox", "owl", "yak"]
    model = switched_on("rezero", id2label=dict(enumerate(names))).float()
    folder = tmp_path / "saved" / "model"
    model.save_pretrained(folder)
    cifar_image_processor().save_pretrained(folder)
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    image.save(folder / "cat.png")
    away, body = tmp_path / "away", tmp_path / "body"
    processes = start(tmp_path, PIPELINE, folder, away), start(tmp_path, MODEL, folder, body)

    scores = pipeline("image-classification", folder)(image)
    inputs = cifar_image_processor()(image, return_tensors="pt")
    expected = dict(zip(names, model(**inputs).logits[0].softmax(-1).tolist(), strict=True))
    assert {entry["label"]: entry["score"] for entry in scores} == pytest.approx(expected, rel=1e-5)

    finish(*processes)
    assert torch.load(f"{away}.pt") == scores
    assert torch.equal(torch.load(f"{body}.pt"), model.model(torch.ones(1, 3, 8, 8)).pooler_output)
    sources = {file.name for file in folder.glob("*.py")}
    assert sources == {
        "configuration_rezero_resnet.py", "modeling_rezero_resnet.py", "gating.py", "initializations.py", "portable.py",
        "residual.py",
    }  # fmt: skip
    for name in (*sources, "model.safetensors", "preprocessor_config.json"):
        assert (away / name).read_bytes() == (folder / name).read_bytes(), name

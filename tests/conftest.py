"""What every test shares: no network, one thread, and models small enough to make hundreds of."""

import os


# Read when the libraries are imported, so before any of them is.
for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[offline] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hub_server import HubServer  # noqa: E402
from huggingface_hub import close_session, constants  # noqa: E402
from hypothesis import settings  # noqa: E402
from packaging.version import Version  # noqa: E402

from rezero_hf import ReZeroConfig, ReZeroForCausalLM, byte_tokenizer  # noqa: E402


# The same examples every time: a check that fails must fail for everybody.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

TINY = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none, those marked `since` on an older Transformers."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
        since = item.get_closest_marker("since")
        if since and Version(transformers.__version__) < Version(since.args[0]):
            item.add_marker(pytest.mark.skip(reason=f"needs Transformers {since.args[0]}"))


@pytest.fixture(scope="session")
def tiny_config():
    """Makes a configuration of a tiny byte-level model; keyword arguments change fields."""
    return lambda **changes: ReZeroConfig(**{**TINY, **changes})


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Makes a tiny model in eval mode with every alpha different and none 0; keyword arguments change fields.

    At alpha = 0 most equivalences hold for any code at all. A test about the start passes `gate_init`, which is then
    kept.
    """

    def make(model_class=ReZeroForCausalLM, seed=0, **changes):
        torch.manual_seed(seed)
        model = model_class(tiny_config(**changes)).eval()
        if "gate_init" not in changes:
            switch_on(model)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """The 256 bytes and three specials."""
    return byte_tokenizer()


@pytest.fixture
def uncompiled():
    """What the library compiles by itself (flex's masks) runs as it is written: the same numbers, and no minute of g++."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def text_file(tmp_path):
    """A small corpus: one file of four hundred lines."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of this text\n" for i in range(400)))
    return path


@pytest.fixture
def ids():
    """Two rows of twelve random bytes."""
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, for new processes (`hub.environment`) and for the libraries in this one.

    They read their settings at import, where the tests' are "offline".
    """
    with HubServer() as server:
        for name, value in server.constants(tmp_path).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", server.token)
        # What Transformers asks the Hub through, kept from its first use on; older ones have none.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield server
        close_session()


def switch_on(model):
    """Give every parameter that starts at a constant (alpha, biases, norms) a value of its own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("alpha"):
                parameter.copy_(0.7 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * noise)
